"""Structures that see each example's own Jacobian, and not its two sides apart: dense and diagonal.

Their one statistic is ``fisher``, a sum over examples and output-gradient columns. The prior enters exactly, whatever
``damping`` says, and every kind of block is treated alike.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Rows, Statistics
from bayes_kfac.structures.base import Structure


class JacobianStructure(Structure):
    """The Fisher from Jacobians ``[columns, *blocks, batch, out, in]``."""

    def __init__(self, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"

    def for_block(self, own: str | None) -> Structure:  # noqa: D102
        return self

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        jacobians = rows.to(torch.promote_types(rows.gradients.dtype, torch.float32)).jacobians()
        return Statistics({"fisher": self._fisher(jacobians)}, {"fisher": rows.num_examples})

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        return Statistics({"fisher": self._identity(shape, like)}, {"fisher": 1.0})

    @abstractmethod
    def _fisher(self, jacobians: Tensor) -> Tensor:
        """What is kept of the sum of the Jacobians' outer products."""

    @abstractmethod
    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The same of one outer product that is the identity, in ``like``'s dtype and on its device."""
