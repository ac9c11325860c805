"""Sketches: sums of outer products, ``Σ_k c_k c_kᵀ + φ I``, kept as their columns ``c_k`` rather than as a matrix.

They add as matrices do: columns side by side, floors ``φ`` as numbers. A factor on the sum is its root on the columns.
A sketch has a limit on the number of its columns; how it gets back within is its kind:

* :class:`LeadingColumns`: the nearest matrix of that rank, by its leading eigenvectors; what is left out is lost;
* :class:`FrequentDirections`: the same, shrunk, so that ``0 ⪯ F − F̂ ⪯ φ I`` whatever comes (Ghashami et al. 2016);
* :class:`LatestColumns`: those of the latest batches as they came, standing for all that were counted.

A column is shaped as what it is a column for: ``[*blocks, k, out, in]`` for a whole block, ``[*blocks, k, 1, n]`` for a
Kronecker factor of size ``n``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import check_choice

_KINDS: dict[str, type[Columns]] = {}


def principal(columns: Tensor, count: int, names: Sequence[str] = ("the columns",)) -> Tensor:
    """Orthogonal columns, longest first, with the same sum of outer products, or the nearest to it of their number.

    By the eigenvectors of the smaller of the two Gram matrices, ``k² n + k³`` operations, or ``k n² + n³``, in float64:
    they are of squares, and what is short beside the longest column would be lost.

    Args:
        columns: ``[..., k, out, in]``.
        count: How many columns to keep at most.
        names: Whose they are, as for :func:`bayes_kfac.linalg.eigh`.

    Returns:
        ``[..., min(count, k, out·in), out, in]``.
    """
    values = columns.flatten(-2).double()
    if not values.shape[-2]:
        return columns
    if values.shape[-2] <= values.shape[-1]:
        _, vectors = linalg.eigh(values @ values.mT, names)
        rotated = vectors.mT @ values
    else:
        squares, vectors = linalg.eigh(values.mT @ values, names)
        rotated = squares.sqrt().unsqueeze(-1) * vectors.mT
    return rotated.flip(-2)[..., :count, :].unflatten(-1, columns.shape[-2:]).to(columns)


@dataclass(frozen=True, eq=False)
class Columns(ABC):
    """A sum of outer products of at most ``limit`` columns, and a floor.

    Attributes:
        values: The columns, ``[*blocks, k, out, in]``.
        floor: ``φ``, ``[*blocks]``.
        limit: How many columns are kept at most.
    """

    values: Tensor
    floor: Tensor
    limit: int

    #: The name under which it is saved.
    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _KINDS[cls.kind] = cls

    @classmethod
    def of(cls, values: Tensor, limit: int) -> Self:
        """The sketch of a sum of outer products.

        Args:
            values: Any number of columns, ``[*blocks, k, out, in]``.
            limit: How many to keep at most.

        Returns:
            The sketch, without a floor.
        """
        return cls(values, values.new_zeros(values.shape[:-3]), limit)._reduced()

    @classmethod
    def identity(cls, shape: tuple[int, ...], limit: int, like: Tensor) -> Self:
        """The identity: no column, and a floor of one.

        Args:
            shape: ``(*blocks, out, in)``.
            limit: How many columns to keep at most.
            like: A tensor of the dtype and device.

        Returns:
            The sketch.
        """
        return cls(like.new_zeros(*shape[:-2], 0, *shape[-2:]), like.new_ones(shape[:-2]), limit)

    @abstractmethod
    def _reduced(self) -> Self:
        """The sketch within its limit."""

    @property
    def columns(self) -> Tensor:
        """The columns at the length at which their outer products are the sum, ``[*blocks, k, out, in]``."""
        return self.values

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; some are ragged, with the number of columns."""
        return {"values": self.values, "floor": self.floor}

    def diagonal(self) -> Tensor:
        """The diagonal of the sum, ``[*blocks, out, in]``."""
        return self.columns.square().sum(-3) + self.floor[..., None, None]

    def trace(self) -> Tensor:
        """The trace of the sum, ``[*blocks]``."""
        return self.diagonal().sum((-2, -1))

    def to_dense(self) -> Tensor:
        """The sum as a matrix, ``[*blocks, out·in, out·in]``; for tests and small sizes."""
        columns = self.columns.flatten(-2)
        return linalg.add_to_diagonal(columns.mT @ columns, self.floor)

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """The sum of several sketches, reduced once.

        Args:
            parts: The sketches, the oldest first; at least one.

        Returns:
            The sum, with the limit of the first.
        """
        return parts[0]._joined(parts)._reduced()

    def _joined(self, parts: Sequence[Self]) -> Self:
        """The sum before it is reduced."""
        values = torch.cat([part.values for part in parts], dim=-3)
        return replace(self, values=values, floor=_total([part.floor for part in parts]))

    def __add__(self, other: Self) -> Self:
        return self.merged([self, other])

    def __mul__(self, factor: float) -> Self:
        return replace(self, values=self.values * factor**0.5, floor=self.floor * factor)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The sketch with a function applied to every tensor: a move to another device or dtype."""
        return self.holding({name: function(tensor) for name, tensor in self.tensors.items()})

    def holding(self, tensors: Mapping[str, Any]) -> Self:
        """A sketch of the same kind and limit with other :attr:`tensors`."""
        return type(self)(**tensors, limit=self.limit)

    def is_finite(self) -> bool:
        """Whether neither it nor what its columns are squared to holds NaN or infinity."""
        return linalg.all_finite([*self.tensors.values(), self.values.square().sum()])

    def dump(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings, for :func:`columns_from_dump`."""
        return {"kind": self.kind, "limit": self.limit, "tensors": self.tensors}


class LeadingColumns(Columns):
    """The leading eigenvectors of a sum of outer products: beyond the limit the nearest matrix of that rank.

    Under a moving average this is the eigendecomposition of ``[√β U, √(1−β) G]`` (Mishkin et al. 2018; Le Roux et al.
    2007). What is cut off at one reduction does not come back.
    """

    kind = "leading"

    def _reduced(self) -> Self:
        if self.values.shape[-3] <= self.limit:
            return self
        if not self.is_finite():
            return _spoiled(self)
        return replace(self, values=principal(self.values, self.limit))


class FrequentDirections(Columns):
    """A sketch with a guarantee: ``0 ⪯ F − Σ_k c_k c_kᵀ ⪯ φ I``, so that with its floor it is never below ``F``.

    A reduction takes the largest squared length that it leaves out from all that it keeps, and adds it to the floor
    (Ghashami et al. 2016; Feinberg et al. 2023).
    """

    kind = "frequent directions"

    def _reduced(self) -> Self:
        if self.values.shape[-3] <= self.limit:
            return self
        if not self.is_finite():
            return _spoiled(self)
        columns = principal(self.values, self.limit + 1)
        if columns.shape[-3] <= self.limit:  # there are no more directions than that: nothing escapes
            return replace(self, values=columns)
        squares = columns.square().sum((-2, -1))
        kept, escaped = squares[..., :-1], squares[..., -1]
        left = (1 - escaped.unsqueeze(-1) / kept.clamp(min=torch.finfo(kept.dtype).tiny)).clamp(min=0)
        values = columns[..., :-1, :, :] * left.sqrt()[..., None, None]
        return replace(self, values=values, floor=self.floor + escaped)


@dataclass(frozen=True, eq=False)
class LatestColumns(Columns):
    """The columns of the latest batches as they came: a sliding window.

    Each column knows how many terms it counts for; those in the window stand for all that were ever counted, so that
    the average of the sum is the average over the window. A batch's columns are in an order without a pattern: those
    that the window has no room for are of all examples, positions and outputs alike.

    Attributes:
        weights: How many terms each column counts for, ``[k]``.
        counted: How many there were in all, scalar.
    """

    weights: Tensor
    counted: Tensor

    kind = "latest"

    @classmethod
    def of(cls, values: Tensor, limit: int, weight: float | None = None) -> Self:
        """The window over the sum of one batch's outer products.

        Args:
            values: Any number of columns, in any order, ``[*blocks, k, out, in]``.
            limit: How many to keep at most.
            weight: How many terms all of them count for; by default as many as they are.

        Returns:
            The sketch, without a floor.
        """
        count = values.shape[-3]
        each = 1.0 if weight is None else weight / max(count, 1)
        values = values.index_select(-3, _shuffled(count)[:limit].to(values.device))
        weights = values.new_full((values.shape[-3],), each)
        return cls(values, values.new_zeros(values.shape[:-3]), limit, weights, values.new_tensor(each * count))

    @classmethod
    def identity(cls, shape: tuple[int, ...], limit: int, like: Tensor) -> Self:  # noqa: D102
        values, floor = like.new_zeros(*shape[:-2], 0, *shape[-2:]), like.new_ones(shape[:-2])
        return cls(values, floor, limit, like.new_zeros(0), like.new_zeros(()))

    @property
    def columns(self) -> Tensor:  # noqa: D102
        kept = self.weights.sum()
        return self.values * torch.where(kept > 0, self.counted / kept, torch.ones_like(kept)).sqrt()

    @property
    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {**super().tensors, "weights": self.weights, "counted": self.counted}

    def _reduced(self) -> Self:
        if self.values.shape[-3] <= self.limit:
            return self
        return replace(self, values=self.values[..., -self.limit :, :, :], weights=self.weights[-self.limit :])

    def _joined(self, parts: Sequence[Self]) -> Self:
        joined = super()._joined(parts)
        weights = torch.cat([part.weights for part in parts])
        return replace(joined, weights=weights, counted=_total([part.counted for part in parts]))

    def __mul__(self, factor: float) -> Self:
        return replace(super().__mul__(factor), weights=self.weights * factor, counted=self.counted * factor)


def columns_from_dump(entry: Mapping[str, Any]) -> Columns:
    """Rebuild a sketch from :meth:`Columns.dump`.

    Args:
        entry: The dump.

    Returns:
        The sketch.
    """
    return _KINDS[check_choice("kind", entry["kind"], tuple(_KINDS))](**entry["tensors"], limit=entry["limit"])


def _shuffled(count: int) -> Tensor:
    """The numbers below ``count`` in an order without a pattern, always the same, whatever else is random."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _spoiled(columns: Columns) -> Any:
    """NaN in the place of columns that have no eigenvectors: they are found and named where statistics are checked."""
    values = columns.values[..., : columns.limit, :, :]
    return replace(columns, values=torch.full_like(values, torch.nan))
