"""Fishers written out: of rows, and of what a structure makes of them; rows on which approximations are good or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics
from bayes_kfac.structures import BlockSpec, Structure
from tests.helpers import randn
from tests.posteriors import surveyed
from tests.random_rows import dense_rows, tied_rows, words

__all__ = ["IN", "KINDS", "OUT", "correlated_rows", "error", "exact_fisher", "fisher_of", "get", "traces"]

OUT, IN = 3, 4

#: Rows of every kind, in blocks of 3×4. Two positions are few, nine are many.
KINDS: dict[str, Callable[[], Rows]] = {
    "one position": lambda: dense_rows(2, (), 6, 1, in_=IN, out=OUT),
    "two positions": lambda: dense_rows(2, (), 6, 2, in_=IN, out=OUT),
    "nine positions": lambda: dense_rows(2, (), 6, 9, in_=IN, out=OUT),
    "stacked": lambda: dense_rows(2, (2,), 6, 1, in_=IN, out=OUT),
    "stacked, two positions": lambda: dense_rows(2, (2,), 6, 2, in_=IN, out=OUT),
    "stacked twice, nine positions": lambda: dense_rows(2, (2, 3), 4, 9, in_=IN, out=OUT),
    "a word": lambda: Rows(words(6, 1, 1, size=IN), randn(2, 6, 1, OUT, seed=1)),
    "bags of words": lambda: Rows(words(6, 3, 4, size=IN), randn(2, 6, 3, OUT, seed=1)),
    "tied": lambda: tied_rows(batch=6, size=OUT, width=IN, sparse=False),
    "tied to words": lambda: tied_rows(batch=6, size=OUT, width=IN),
}


def get(name: str, sharing: str = "expand") -> Structure:
    """A structure with the exact damping, so that its Fisher can be told from the prior."""
    return structures.get(name, damping="exact", sharing=sharing)


def exact_fisher(rows: Rows) -> Tensor:
    """The Fisher of one example, ``[*blocks, out·in, out·in]``, from each example's own Jacobian."""
    J = rows.jacobians().flatten(-2)
    return torch.einsum("c...ni,c...nj->...ij", J, J) / J.shape[-2]


def fisher_of(structure: Structure, of: Rows | Statistics) -> Tensor:
    """The Fisher of one example as a structure has it, ``[*blocks, out·in, out·in]``."""
    statistics = surveyed(structure, of) if isinstance(of, Rows) else of
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 1.0, 1.0)])
    dense = gaussian.to_dense()
    return dense - torch.eye(dense.shape[-1], dtype=dense.dtype)


def traces(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """The partial traces on the input side and the output side of 3×4 blocks."""
    parts = fisher.unflatten(-1, (OUT, IN)).unflatten(-3, (OUT, IN))
    return torch.einsum("...oioj->...ij", parts), torch.einsum("...oipi->...op", parts)


def error(fisher: Tensor, expected: Tensor) -> float:
    """The Frobenius distance."""
    return float(torch.linalg.vector_norm(fisher - expected))


def correlated_rows(seed: int, *, batch: int = 12, shared: int = 1) -> Rows:
    """Rows whose inputs and gradients are large together and point in related directions."""
    sizes = randn(batch, 1, 1, seed=seed).exp()
    inputs = sizes * randn(batch, shared, IN, seed=seed + 1)
    gradients = sizes * (randn(2, batch, shared, OUT, seed=seed + 2) + inputs[..., :OUT])
    return Rows(inputs, gradients)
