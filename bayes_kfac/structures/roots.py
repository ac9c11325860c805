"""The roots of K-FAC's covariance followed by matrix products alone, with no inverse and no decomposition.

The nearest matrix normal to ``(G ⊗ A + γ I)⁻¹`` in ``KL(q ‖ p)``, ``damping="optimal"`` of K-FAC, has the covariance
``U ⊗ V`` with ``U = C Cᵀ`` and ``V = K Kᵀ``. Written in the roots, what is to be least is

    ``½ tr(Cᵀ G C) tr(Kᵀ A K) + ½ γ tr(Cᵀ C) tr(Kᵀ K) − in log det C − out log det K``,

whose derivative along ``K ← K (I − E)`` is ``−out tr(E (S − I))`` with

    ``S = (tr(Cᵀ G C) Kᵀ A K + γ tr(Cᵀ C) Kᵀ K) / out``,

and likewise for ``C``. INGD steps along ``E = β/2 (S − I)``, and SINGD keeps ``K`` in a group of structured matrices by
a projection of ``E`` (Lin, Dangel, Eschenhagen et al. 2024). In the group of lower triangular matrices it is
``E_ii = β/2 (S_ii − 1)`` and ``E_ij = β S_ij`` below the diagonal: the same Gaussian as of dense roots, with its log
determinant and its solves for nothing. At ``β = 1`` this is Newton's step (among symmetric ``E`` the Newton–Schulz
iteration), so that from a root off by ``ε`` one step leaves ``O(ε²)``: a refresh follows a moving average of decay
``1 − ε`` that closely. Where ``E`` is large the step is shortened to half of ``K``: no root can become singular. A
factor that rounding made indefinite, as in 16 bits, is shifted to be definite.

IKFAC is the same with ``S = Kᵀ (A + π√γ I) K``: K-FAC's factored damping.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import NotPositiveDefiniteError
from bayes_kfac.structures.damping import WhiteBlock
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: From scratch, roots are improved until rounding ends the progress, or so many times.
COLD_SWEEPS = 100
#: The relative length of a step, by its spectral norm, at which no diagonal element loses more than half.
LONGEST_STEP = 0.5
#: Products with a vector in the estimate of a spectral norm.
POWER_STEPS = 6

#: What one side's factor is weighted with and damped by: of its factor, the other side's, the other's root, and ``γ``.
Split = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def matrix_normals(blocks: Sequence[WhiteBlock], damping: str, sweeps: int) -> list[MatrixNormalGaussian]:
    """The Gaussians of blocks with their priors, from the roots of earlier ones where there are.

    Args:
        blocks: The blocks.
        damping: ``"optimal"`` or ``"factored"``.
        sweeps: How many steps each root takes from an earlier one; from scratch they go on to the optimum.

    Returns:
        One Gaussian for each.
    """
    starts = [_earlier_roots(block) for block in blocks]
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, block in enumerate(blocks):
        groups[block.A.shape, block.G.shape, block.A.dtype, block.A.device, starts[i] is None].append(i)
    built: dict[int, MatrixNormalGaussian] = {}
    for members in groups.values():
        pair = _Pair.of([blocks[i] for i in members], [starts[i] for i in members], _SPLITS[damping])
        pair = pair.converged() if starts[members[0]] is None else pair.improved(sweeps)
        for position, i in enumerate(members):
            built[i] = _gaussian(blocks[i], pair.C[position], pair.K[position])
    return [built[i] for i in range(len(blocks))]


@dataclass(frozen=True)
class _Pair:
    """Stacked blocks of equal shape in white coordinates, and the roots of their covariance ``(C Cᵀ) ⊗ (K Kᵀ)``.

    Attributes:
        A: The input factors.
        G: The gradient factors.
        gamma: ``γ`` of each, in a shape that broadcasts to the stack's.
        C: The roots of the output side, in the shape of ``G``.
        K: The roots of the input side, in the shape of ``A``.
        away: How far from the optimum each was before the last sweep, relatively.
        split: How the prior enters.
    """

    A: Tensor
    G: Tensor
    gamma: Tensor
    C: Tensor
    K: Tensor
    away: Tensor
    split: Split

    @classmethod
    def of(cls, blocks: Sequence[WhiteBlock], starts: Sequence[tuple[Tensor, Tensor] | None], split: Split) -> _Pair:
        """Blocks of equal shape from where they start; those that start afresh do at the prior."""
        A, G = torch.stack([block.A for block in blocks]), torch.stack([block.G for block in blocks])
        gamma = torch.stack([block.gamma for block in blocks]).reshape(-1, *[1] * (A.ndim - 3))
        roots = [
            (_identity(b.G), _identity(b.A)) if start is None else start
            for b, start in zip(blocks, starts, strict=True)
        ]
        C, K = (torch.stack(side) for side in zip(*roots, strict=True))
        return cls(A, G, gamma, C, K, away=torch.full_like(linalg.trace(A), torch.inf), split=split)

    def sweep(self) -> _Pair:
        """A step of each root, given the other."""
        A, G = _semidefinite(self.A, self.K), _semidefinite(self.G, self.C)
        C, away_C = _step(self.C, G, *self.split(G, A, self.K, self.gamma))
        K, away_K = _step(self.K, A, *self.split(A, G, C, self.gamma))
        return replace(self, A=A, G=G, C=C, K=K, away=torch.maximum(away_C, away_K))

    def improved(self, sweeps: int) -> _Pair:
        """The pair after some sweeps."""
        pair = self
        for _ in range(sweeps):
            pair = pair.sweep()
        return pair

    def converged(self) -> _Pair:
        """The pair at the optimum, up to rounding."""
        pair, done = self, torch.zeros_like(self.away, dtype=torch.bool)
        for _ in range(COLD_SWEEPS):
            last, pair = pair, pair.sweep()
            # from near the optimum on the distance falls until rounding ends it; a distance of NaN does not fall
            done = done | ~(pair.away < last.away) & ~(pair.away > 0.1)
            if bool(done.all()):
                break
        return pair


def _step(root: Tensor, factor: Tensor, weight: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``K (I − E)`` towards the inverse root of ``weight A + damping I``, and how far it was from it."""
    inner = linalg.congruence(factor, root)
    linalg.diagonal(inner).clamp_(min=0)  # products with long roots may be rounded below
    S = _times(inner, weight) + _times(linalg.gram(linalg.transpose(root)), damping)
    # the best scale first, so that a step is of the shape alone
    scale = factor.shape[-1] / linalg.trace(S)
    root, E = _times(root, scale.sqrt()), _plus(_times(S, scale), -1) / 2
    away = E.square().sum((-2, -1)).div(factor.shape[-1]).sqrt() + (scale - 1).abs()
    E = E if linalg.is_diagonal(E) else E.tril() + E.tril(-1)
    return root - _times(linalg.product(root, E), (LONGEST_STEP / _spectral_norm(E)).clamp(max=1)), away


def _optimal(own: Tensor, other: Tensor, other_root: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """``tr(Cᵀ G C) / out`` and ``γ tr(Cᵀ C) / out``, for the input side."""
    weight = (linalg.product(other, other_root) * other_root).sum((-2, -1))
    return weight.clamp(min=0) / other.shape[-1], gamma * other_root.square().sum((-2, -1)) / other.shape[-1]


def _factored(own: Tensor, other: Tensor, other_root: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """1 and ``π√γ``, for the input side; where one factor is zero, so is the Fisher."""
    mean, other_mean = (linalg.trace(factor) / factor.shape[-1] for factor in (own, other))
    alive = (mean > 0) & (other_mean > 0)
    ratio = torch.where(alive, mean.sqrt() / other_mean.sqrt(), torch.ones_like(mean))  # whose square may overflow
    return alive.to(mean), gamma.sqrt() * ratio


_SPLITS: dict[str, Split] = {"optimal": _optimal, "factored": _factored}


def _semidefinite(factor: Tensor, root: Tensor) -> Tensor:
    """The factor, or where rounding made it indefinite ``F + 2 |λ| I`` with about its least eigenvalue ``λ``."""
    if linalg.is_diagonal(factor):
        return factor.clamp(min=0)
    # a root is broad where its factor is small: in its coordinates the least eigenvalue stands out
    image = factor @ root

    def product(vector: Tensor) -> Tensor:
        return root.mT @ (image @ vector)

    start = torch.ones_like(factor[..., :1])
    longest = torch.linalg.vector_norm(_power(product, start), dim=-2, keepdim=True)
    longest = torch.where(longest > 0, longest, torch.ones_like(longest))
    vector = _power(lambda vector: vector - product(vector) / longest, start)
    direction = torch.nn.functional.normalize(root @ vector, dim=-2)
    lowest = (direction * (factor @ direction)).sum((-2, -1))
    return linalg.add_to_diagonal(factor, -2 * lowest.clamp(max=0))


def _spectral_norm(matrix: Tensor) -> Tensor:
    """An estimate of the greatest singular value of factors, not below any diagonal element's size."""
    largest = linalg.diagonal(matrix).abs().amax(-1)
    if linalg.is_diagonal(matrix):
        return largest
    vector = _power(lambda vector: matrix.mT @ (matrix @ vector), matrix.square().sum(-2).unsqueeze(-1))
    return torch.maximum(largest, torch.linalg.vector_norm(vector, dim=(-2, -1)).sqrt())


def _power(product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """The image of a vector after some steps of the power method."""
    for _ in range(POWER_STEPS):
        vector = product(torch.nn.functional.normalize(vector, dim=-2))
    return vector


def _times(factor: Tensor, scale: Tensor) -> Tensor:
    return factor * scale[..., None, None]


def _plus(factor: Tensor, value: float) -> Tensor:
    return linalg.add_to_diagonal(factor, factor.new_full(factor.shape[:-2], value))


def _identity(like: Tensor) -> Tensor:
    return _plus(torch.zeros_like(like), 1)


def _earlier_roots(block: WhiteBlock) -> tuple[Tensor, Tensor] | None:
    """The roots ``C`` and ``K`` of an earlier Gaussian of this form in white coordinates, but for their scale."""
    earlier = block.spec.previous
    if not isinstance(earlier, MatrixNormalGaussian):
        return None
    C = linalg.quotient(block.row_root, earlier.scale_tril_row)
    K = linalg.quotient(block.column_root, earlier.scale_tril_column)
    return (C, K) if (C.shape, K.shape) == (block.G.shape, block.A.shape) else None


def _gaussian(block: WhiteBlock, C: Tensor, K: Tensor) -> MatrixNormalGaussian:
    """The matrix normal with these roots in white coordinates, in the weights' own."""
    if not bool(torch.isfinite(C).all() & torch.isfinite(K).all()):
        raise NotPositiveDefiniteError(
            f"The covariance roots of {block.spec.name!r} hold NaN or infinity. Check the data and the learning rate."
        )
    row = linalg.product(block.row_root, C / block.spec.data_scale**0.5)
    return MatrixNormalGaussian(row, linalg.product(block.column_root, K))
