"""K-FAC with factors of low rank, ``A ≈ Q diag(s) Qᵀ + ρ I`` and ``G`` alike, kept as their columns.

``sketchy``: by Frequent Directions, whose ``ρ`` is the mass that escaped the sketch. ``skfac``: by the rows of the
latest batches themselves, ``ρ = 0``, so that a damped factor is inverted by a matrix of the batch's size. With as many
columns as a factor has dimensions both are K-FAC itself.

The prior enters in the three ways of K-FAC, where it is white: each of them is a function of the eigenvalues of the two
factors, ``λ_G`` and ``λ_A``, as ``G``, ``A`` and ``I`` commute there. So that ``A`` is of its form there too, a prior
``S`` with a precision for each column takes ``ρ`` along: what a sketch left out, of which no more than the amount is
known, is ``ρ dim / tr(S) · S``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import (
    FISHER_KINDS,
    NO_FRAME,
    Columns,
    Frame,
    FrequentDirections,
    LatestColumns,
    Rows,
    Statistics,
    factor_rows,
    principal,
)
from bayes_kfac.errors import check_count
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Information, Structure, register
from bayes_kfac.structures.damping import optimal_spectra
from bayes_kfac.structures.low_rank_kron import LowRankKroneckerGaussian, multiplicity

#: Directions whose eigenvalue is smaller than this part of the largest are the rounding of others.
NEGLIGIBLE = 1e-12


class LowRankFactorStructure(Structure):
    """The Kronecker-factored Fisher of a layer, its factors as columns ``[*blocks, k, 1, size]``.

    Args:
        limit: How many columns of each factor are kept at most.
        damping: How the prior enters, as for K-FAC.
        sharing: How positions that share weights are summed.
    """

    #: How a factor is kept.
    sketch: type[Columns]

    def __init__(self, limit: int, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.limit = limit

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        found = factor_rows(rows, self.sharing)
        columns = {name: self._sketch(values.unsqueeze(-2), count) for name, (values, count) in found.items()}
        return Statistics({}, {name: count for name, (_, count) in found.items()}, columns=columns)

    @abstractmethod
    def _sketch(self, values: Tensor, count: float) -> Columns:
        """The sketch of a sum over so many terms, of columns ``[*blocks, k, 1, size]``."""

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        rows, columns = (
            self.sketch.identity((*blocks, 1, size), self.limit, like) for size in (out_features, in_features)
        )
        factors = {"input": columns, "gradient": rows}
        if tied:  # the transposed uses add nothing
            factors |= {"transposed_input": rows * 0, "transposed_gradient": columns * 0}
        return Statistics({}, dict.fromkeys(factors, 1.0), columns=factors)

    def information(self, spec: BlockSpec) -> Information:  # noqa: D102
        A, G, _ = _white_factors(spec, self.name)
        (values_A, dimensions_A), (values_G, dimensions_G) = _spectrum(A, spec.name), _spectrum(G, spec.name)
        eigenvalues, dimensions = _outer(values_G, values_A), _outer(dimensions_G, dimensions_A)
        return lambda scale: (dimensions * torch.log1p(scale * eigenvalues)).sum()

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        names = [spec.name for spec in specs]
        white = [_white_factors(spec, self.name) for spec in specs]
        sides = _sides([A for A, _, _ in white], names), _sides([G for _, G, _ in white], names)
        return [
            LowRankKroneckerGaussian(
                G.basis, A.basis, spec.data_scale * _DAMPED[self.damping](G, A, 1 / spec.data_scale), root
            )
            for spec, A, G, (_, _, root) in zip(specs, *sides, white, strict=True)
        ]


@register("sketchy")
class SketchyStructure(LowRankFactorStructure):
    """K-FAC with each factor in a sketch of Frequent Directions.

    Args:
        rank: How many columns of each factor.
        damping: How the prior enters, as for K-FAC.
        sharing: How positions that share weights are summed.
    """

    card = Card(
        formula="F ≈ G ⊗ A, A ≈ Q diag(s) Qᵀ + ρ I by Frequent Directions, and G alike",
        captures="The leading eigenvectors of K-FAC's factors; in all other directions their escaped mass, so that no "
        "factor is ever below its own.",
        use="Layers too wide for K-FAC's factors, with a posterior that is rather too narrow than too wide.",
        cost="Statistics (n + k)² (in + out); refresh k² (in + out); sample or solve k in·out; memory k (in + out).",
        source="Feinberg, Chen, Sun, Anil & Hazan 2023 (Sketchy).",
    )
    fishers = FISHER_KINDS
    sketch = FrequentDirections

    def __init__(self, rank: int = 64, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(check_count("rank", rank), damping=damping, sharing=sharing)

    @property
    def options(self) -> dict[str, int]:  # noqa: D102
        return {"rank": self.limit}

    def _sketch(self, values: Tensor, count: float) -> FrequentDirections:
        return FrequentDirections.of(values, self.limit)


@register("skfac")
class SkfacStructure(LowRankFactorStructure):
    """K-FAC with factors that are the latest rows themselves, inverted through their Gram matrices.

    ``(aᵀ a / m + λ I)⁻¹ = (I − aᵀ (m λ I + a aᵀ)⁻¹ a) / λ`` takes the inverse of a matrix of the size of the batch.
    Where a batch has more rows than the window, as with many positions, a fixed random choice of them is taken.

    Args:
        window: How many rows of each side.
        damping: How the prior enters, as for K-FAC.
        sharing: How positions that share weights are summed.
    """

    card = Card(
        formula="F ≈ G ⊗ A, A = E[a aᵀ] and G = E[g gᵀ] over a window of rows, by their Gram matrices",
        captures="What K-FAC does, of the rows in the window; nothing in directions in which there is no row.",
        use="Layers wider than a batch has rows; natural gradients.",
        cost="Statistics n (in + out); refresh k² (in + out) + k³; a sample or a solve k in·out; memory k (in + out).",
        source="Tang et al. 2021 (SKFAC).",
    )
    sketch = LatestColumns
    takes_parts = False

    def __init__(self, window: int = 256, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(check_count("window", window), damping=damping, sharing=sharing)

    @property
    def options(self) -> dict[str, int]:  # noqa: D102
        return {"window": self.limit}

    def _sketch(self, values: Tensor, count: float) -> LatestColumns:
        return LatestColumns.of(values, self.limit, count)


@dataclass(frozen=True)
class _Factor:
    """``Σ_k c_k c_kᵀ + ρ I``.

    Attributes:
        columns: ``c``, ``[*blocks, k, 1, size]``.
        floor: ``ρ``, ``[*blocks]``.
    """

    columns: Tensor
    floor: Tensor


@dataclass(frozen=True)
class _Side:
    """A factor by its eigenvectors.

    Attributes:
        basis: Orthonormal rows, ``[*blocks, k, size]``, or rows of zeros.
        values: Their eigenvalues, and last that of all other directions, ``[*blocks, k + 1]``.
    """

    basis: Tensor
    values: Tensor

    @property
    def dimensions(self) -> Tensor:
        """How many dimensions each eigenvalue has, ``[*blocks, k + 1]``."""
        return multiplicity(self.basis)

    def mean(self) -> Tensor:
        """The mean eigenvalue, ``[*blocks, 1]``."""
        return (self.dimensions * self.values).sum(-1, keepdim=True) / self.basis.shape[-1]


def _white_factors(spec: BlockSpec, structure: str) -> tuple[_Factor, _Factor, Tensor]:
    """The factors ``A`` and ``G`` where the prior is white, and a root of its covariance, ``[*blocks, 1, in]``."""
    A, G = _factors(spec.statistics)
    precision = _by_column(spec, structure, A.columns)
    # a floor where the prior is white, of the trace that it has where it is not
    floor = A.floor * A.columns.shape[-1] / precision.sum((-2, -1))
    root = precision.rsqrt()
    return _Factor(A.columns * root.unsqueeze(-3), floor), G, root


def _by_column(spec: BlockSpec, structure: str, like: Tensor) -> Tensor:
    """The prior's precision of each column of the block, ``[*blocks, 1, in]``."""
    prior = spec.prior
    if isinstance(prior, BlockGaussian):
        raise spec.refuse_prior(structure, "one precision for each column of a block")
    precision = torch.as_tensor(prior, dtype=like.dtype, device=like.device)
    if precision.ndim > 1 and not bool((precision == precision[..., :1, :]).all()):
        raise spec.refuse_prior(structure, "one precision for each column of a block, or structure='diagonal'")
    by_column = precision[..., :1, :] if precision.ndim > 1 else precision
    return by_column.expand(*like.shape[:-3], 1, like.shape[-1])


def _factors(statistics: Statistics) -> tuple[_Factor, _Factor]:
    """The input and the gradient factor."""
    A, G = statistics.mean_columns("input"), statistics.mean_columns("gradient")
    if "transposed_input" not in statistics.columns:
        return _Factor(A.columns, A.floor), _Factor(G.columns, G.floor)
    # one product for the sum of two: that of its partial traces, over its trace, as K-FAC takes it
    B, H = statistics.mean_columns("transposed_gradient"), statistics.mean_columns("transposed_input")
    total = A.trace() * G.trace() + B.trace() * H.trace()
    total = torch.where(total > 0, total, torch.ones_like(total))
    return (
        _weighted_sum((A, G.trace() / total), (B, H.trace() / total)),
        _weighted_sum((G, A.trace()), (H, B.trace())),
    )


def _weighted_sum(*parts: tuple[Columns, Tensor]) -> _Factor:
    columns = torch.cat([own.columns * weight.sqrt()[..., None, None, None] for own, weight in parts], dim=-3)
    return _Factor(columns, torch.stack([own.floor * weight for own, weight in parts]).sum(0))


def _spectrum(factor: _Factor, name: str) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a factor and how many dimensions each has, in float64; differentiable, as they alone are."""
    columns = factor.columns.double().flatten(-2)
    count, size = columns.shape[-2:]
    squares, _ = linalg.eigh(columns @ columns.mT if count <= size else columns.mT @ columns, [name])
    floor = factor.floor.double().unsqueeze(-1)
    dimensions = squares.new_ones(squares.shape[-1] + 1)
    dimensions[-1] = size - squares.shape[-1]
    return torch.cat([squares + floor, floor], dim=-1), dimensions


def _sides(factors: Sequence[_Factor], names: Sequence[str]) -> list[_Side]:
    """Factors by their eigenvectors, in one call for those of equal shape."""
    found = linalg.map_by_shape(_orthonormal, [factor.columns for factor in factors], names)
    sides = []
    for (squares, basis), factor in zip(found, factors, strict=True):
        floor = factor.floor.unsqueeze(-1)
        values = squares + floor
        # a rest of no dimension has the eigenvalue beside it: products take it in and out again, whatever its size
        rest = values[..., -1:] if basis.shape[-2] == basis.shape[-1] else floor
        sides.append(_Side(basis, torch.cat([values, rest], dim=-1)))
    return sides


def _orthonormal(columns: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The eigenvalues of ``Σ c cᵀ`` and its eigenvectors as rows, zeros where the eigenvalue is negligible."""
    # in float64: what is orthogonal in float32 is not so when it has length one
    rotated = principal(columns.double(), columns.shape[-3], names).squeeze(-2)
    squares = rotated.square().sum(-1)
    longest = squares.amax(-1, keepdim=True) if squares.shape[-1] else squares
    counts = (squares > NEGLIGIBLE * longest).to(squares.dtype)
    basis = rotated * (counts * squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt()).unsqueeze(-1)
    return (squares * counts).to(columns), basis.to(columns)


def _exact(G: _Side, A: _Side, gamma: float) -> Tensor:
    """``λ_G λ_A + γ``."""
    return _outer(G.values, A.values) + gamma


def _factored(G: _Side, A: _Side, gamma: float) -> Tensor:
    """``(λ_G + √γ / π) (λ_A + π √γ)`` with ``π`` the root of the ratio of the mean eigenvalues of ``A`` and ``G``."""
    mean_A, mean_G = A.mean(), G.mean()
    alive = (mean_A > 0) & (mean_G > 0)  # with one factor at zero the Fisher is too
    pi = torch.where(alive, mean_A.sqrt() / mean_G.sqrt(), torch.ones_like(mean_A))
    return _outer(G.values * alive + gamma**0.5 / pi, A.values * alive + gamma**0.5 * pi)


def _optimal(G: _Side, A: _Side, gamma: float) -> Tensor:
    """The inverse of ``u vᵀ``, the matrix normal nearest to ``λ_G λ_A + γ`` in ``KL(q ‖ p)``: see K-FAC's damping."""
    u, v = optimal_spectra(G.values, A.values, A.values.new_tensor(gamma), n_G=G.dimensions, n_A=A.dimensions)
    return (1 / _outer(u, v)).to(G.values)


_DAMPED: dict[str, Callable[[_Side, _Side, float], Tensor]] = {
    "factored": _factored,
    "optimal": _optimal,
    "exact": _exact,
}


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)
