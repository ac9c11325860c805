"""K-FAC: ``F̄ ≈ G ⊗ A``, and the three ways in which a prior ``δ I`` enters ``P = (N/τ) (G ⊗ A + γ I)``, ``γ = τδ/N``.

``factored``: ``(G + √γ/π I) ⊗ (A + π√γ I)`` with ``π² = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015; the
noisy K-FAC paper's posterior). A matrix normal by two Cholesky factorisations, but its cross terms make it narrower
than the damped product: it loses 15-50 % of the marginal variance where the prior matters.

``optimal``: the matrix normal nearest to ``G ⊗ A + γ I`` in ``KL(q ‖ p)``, which is where the evidence lower bound
itself has its optimum. ``U`` and ``V`` solve ``U⁻¹ = (tr(AV) G + γ tr(V) I) / in`` and
``V⁻¹ = (tr(GU) A + γ tr(U) I) / out`` in turns.

``exact``: ``G ⊗ A + γ I`` itself, in its eigenbasis; not a matrix normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, Statistics, kronecker_factors
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Structure, register
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: A flip-flop from scratch ends when no root moves by more than this, relatively; the KL is then right to its square.
TOLERANCE = 1e-6
COLD_SWEEPS = 200
#: Between two refreshes in training the factors move little: a few sweeps from the last roots follow them.
WARM_SWEEPS = 2


@register("kron")
class KroneckerStructure(Structure):
    """The Kronecker-factored Fisher of a layer."""

    def measure(self, rows: Rows) -> Statistics:  # noqa: D102
        return kronecker_factors(rows, self.sharing)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        dtype = torch.promote_types(like.dtype, torch.float32)
        sizes = {"input": in_features, "gradient": out_features}
        sums = {}
        for side, size in sizes.items():
            factor = torch.eye(size, dtype=dtype, device=like.device)
            factor = factor.new_ones(1, size) if side in sparse_sides else factor
            sums[side] = factor.expand(*blocks, *factor.shape)
        if tied:  # the transposed uses add nothing
            sums["transposed_input"] = torch.zeros_like(sums["gradient"])
            sums["transposed_gradient"] = torch.zeros_like(sums["input"])
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return list(_BUILDERS[self.damping](specs))


def _factored(specs: Sequence[BlockSpec]) -> list[MatrixNormalGaussian]:
    rows, columns = [], []
    for spec in specs:
        A, G, gamma = _factors(spec)
        pi, A, G = _pi(A, G)
        rows.append(linalg.add_to_diagonal(G, gamma.sqrt() / pi))
        columns.append(linalg.add_to_diagonal(A, gamma.sqrt() * pi))
    return [
        MatrixNormalGaussian(root / spec.data_scale**0.5, column)
        for spec, root, column in zip(specs, _inverse_roots(rows, specs), _inverse_roots(columns, specs), strict=True)
    ]


def _optimal(specs: Sequence[BlockSpec]) -> list[MatrixNormalGaussian]:
    previous = [spec.previous for spec in specs if isinstance(spec.previous, MatrixNormalGaussian)]
    if len(previous) == len(specs):
        for _ in range(WARM_SWEEPS):
            previous = _sweep(specs, previous)
        return previous
    gaussians, last = _factored(specs), math.inf
    for _ in range(COLD_SWEEPS):
        old, gaussians = gaussians, _sweep(specs, gaussians)
        moved = max(map(_distance, old, gaussians), default=0.0)
        if moved < TOLERANCE or moved >= last:  # in float32 rounding may end the progress first
            break
        last = moved
    return gaussians


def _exact(specs: Sequence[BlockSpec]) -> list[KroneckerEigenGaussian]:
    names = [spec.name for spec in specs]
    factors = [_factors(spec) for spec in specs]
    columns = linalg.map_by_shape(linalg.eigh, [A for A, _, _ in factors], names)
    rows = linalg.map_by_shape(linalg.eigh, [G for _, G, _ in factors], names)
    return [
        KroneckerEigenGaussian(Q_G, Q_A, spec.data_scale * d_G.unsqueeze(-1) * d_A.unsqueeze(-2) + spec.prior_precision)
        for spec, (d_G, Q_G), (d_A, Q_A) in zip(specs, rows, columns, strict=True)
    ]


_BUILDERS: dict[str, Callable[[Sequence[BlockSpec]], Sequence[BlockGaussian]]] = {
    "factored": _factored,
    "optimal": _optimal,
    "exact": _exact,
}


def _factors(spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``G`` and ``γ`` of a block."""
    A, G = spec.statistics.mean("input"), spec.statistics.mean("gradient")
    if "transposed_input" in spec.statistics.sums:
        B, H = spec.statistics.mean("transposed_gradient"), spec.statistics.mean("transposed_input")
        A, G = _sum_of_products(A, G, B, H)
    return A, G, A.new_tensor(spec.prior_precision / spec.data_scale)


def _sum_of_products(A: Tensor, G: Tensor, B: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """One Kronecker product for ``G ⊗ A + H ⊗ B``: the product of its partial traces over its trace.

    It has the sum's trace and is the sum itself where the two are proportional on one side; one step of the power
    iteration for the nearest Kronecker product, from the identity (TKFAC: Gao et al. 2021).

    Args:
        A: The input factor of the first product.
        G: Its gradient factor.
        B: The factor of the second on the side of ``A``.
        H: The factor of the second on the side of ``G``.

    Returns:
        The two factors, on the sides of ``A`` and ``G``.
    """
    tr_A, tr_G, tr_B, tr_H = (linalg.trace(factor)[..., None, None] for factor in (A, G, B, H))
    total = tr_A * tr_G + tr_B * tr_H
    total = torch.where(total > 0, total, torch.ones_like(total))
    return (tr_G * A + tr_H * B) / total, tr_A * G + tr_B * H


def _pi(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the damping splits, the root of the ratio of mean eigenvalues, and the factors to damp."""
    # where one factor is zero (no gradient reaches the layer) the Fisher is too: with both at zero and π = 1 the damped
    # product is the prior's
    mean_A, mean_G = linalg.trace(A) / A.shape[-1], linalg.trace(G) / G.shape[-1]
    alive = (mean_A > 0) & (mean_G > 0)
    pi = torch.where(alive, (mean_A / mean_G).sqrt(), torch.ones_like(mean_A))
    return pi, A * alive[..., None, None], G * alive[..., None, None]


def _sweep(specs: Sequence[BlockSpec], gaussians: Sequence[MatrixNormalGaussian]) -> list[MatrixNormalGaussian]:
    """One flip-flop: the output side given the input side, then the input side given the output side."""
    factors = [_factors(spec) for spec in specs]
    rows = _inverse_roots(
        [
            _side(G, A, _of_norm_one(old.scale_tril_column), gamma)
            for (A, G, gamma), old in zip(factors, gaussians, strict=True)
        ],
        specs,
    )
    columns = _inverse_roots(
        [_side(A, G, root, gamma) for (A, G, gamma), root in zip(factors, rows, strict=True)], specs
    )
    return [
        MatrixNormalGaussian(root / spec.data_scale**0.5, column)
        for spec, root, column in zip(specs, rows, columns, strict=True)
    ]


def _side(own: Tensor, other: Tensor, other_root: Tensor, gamma: Tensor) -> Tensor:
    """``(tr(other C) own + γ tr(C) I) / dim`` with ``C`` the covariance of the other side, of dimension ``dim``."""
    covariance = linalg.gram(other_root)
    dim = other.shape[-1]
    # a singular factor is indefinite by rounding, and its trace can come out below zero
    weight = (other * covariance).sum((-2, -1)).clamp(min=0) / dim
    return linalg.add_to_diagonal(own * weight[..., None, None], gamma * linalg.trace(covariance) / dim)


def _of_norm_one(root: Tensor) -> Tensor:
    """The root at a scale of its own: where rounding needs jitter, one side's would grow and the other's shrink."""
    return root / torch.linalg.matrix_norm(root, keepdim=True)


def _inverse_roots(precisions: Sequence[Tensor], specs: Sequence[BlockSpec]) -> list[Tensor]:
    return linalg.inverse_roots(precisions, [spec.name for spec in specs])


def _distance(old: MatrixNormalGaussian, new: MatrixNormalGaussian) -> float:
    """The relative change of a flip-flop; the input side tells, as the output side follows from it."""
    change = torch.linalg.vector_norm(new.scale_tril_column - old.scale_tril_column)
    return float(change / torch.linalg.vector_norm(new.scale_tril_column))
