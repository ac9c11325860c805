"""INGD: the roots of K-FAC's covariance followed by matrix products alone, with no inverse and no decomposition.

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
factor that rounding made indefinite, as in 16 bits, where Cholesky's factorisation fails, is shifted to be definite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Frame, Rows, Statistics
from bayes_kfac.errors import NotPositiveDefiniteError, check_count
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register
from bayes_kfac.structures.damping import WhiteBlock
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: From scratch, roots are improved until rounding ends the progress, or so many times.
COLD_SWEEPS = 100
#: The relative length of a step, by its spectral norm, at which no diagonal element loses more than half.
LONGEST_STEP = 0.5
#: Products with a vector in the estimate of a spectral norm.
POWER_STEPS = 6


@register("ingd")
class InverseFreeStructure(KroneckerStructure):
    """The nearest matrix normal to K-FAC's posterior by an inverse-free natural gradient.

    The prior enters optimally, whatever ``damping`` says.

    Args:
        damping: Not used.
        sharing: How positions that share weights are summed.
        sweeps: How many steps each root takes in a refresh that starts from an earlier one.

    Raises:
        ArgumentError: If there is no sweep.
    """

    card = Card(
        formula="F ≈ G ⊗ A; covariance C Cᵀ ⊗ K Kᵀ, K ← K (I − E), E ∝ (tr(CᵀGC) KᵀAK + γ tr(CᵀC) KᵀK) / out − I",
        captures="What kron with damping='optimal' does: the matrix normal nearest in KL(q ‖ p) to K-FAC's posterior.",
        use="On accelerators in low precision, or where Cholesky factorisations fail or are slow: products alone, and "
        "factors that rounding made indefinite are survived.",
        cost="Statistics n (in² + out²); a sweep about ten products of in³ + out³; sample in·out (in + out); memory "
        "in² + out².",
        source="Lin et al. 2023 (INGD); Lin, Dangel, Eschenhagen et al. 2024 (SINGD).",
    )

    def __init__(self, *, damping: str = "optimal", sharing: str = "expand", sweeps: int = 2) -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "optimal"
        self.sweeps = check_count("sweeps", sweeps)

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"sweeps": self.sweeps}

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        blocks = [self._white(spec) for spec in specs]
        starts = [_earlier_roots(block) for block in blocks]
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, block in enumerate(blocks):
            groups[block.A.shape, block.G.shape, block.A.dtype, block.A.device, starts[i] is None].append(i)
        built: dict[int, BlockGaussian] = {}
        for members in groups.values():
            pair = _Pair.of([blocks[i] for i in members], [starts[i] for i in members])
            pair = pair.converged() if starts[members[0]] is None else pair.improved(self.sweeps)
            for position, i in enumerate(members):
                built[i] = _gaussian(blocks[i], pair.C[position], pair.K[position])
        return [built[i] for i in range(len(blocks))]


@register("singd")
class StructuredInverseFreeStructure(InverseFreeStructure):
    """INGD with block-diagonal roots; of blocks of one, diagonal.

    Args:
        damping: Not used.
        sharing: How positions that share weights are summed.
        sweeps: How many steps each root takes in a refresh that starts from an earlier one.
        input_block: The size of the blocks on the input side; ``None`` for one block.
        output_block: The size of the blocks on the output side; ``None`` for one block.

    Raises:
        ArgumentError: If there is no sweep, or a block of no size.
    """

    card = Card(
        formula="F ≈ G ⊗ A with A and G block-diagonal; covariance C Cᵀ ⊗ K Kᵀ as in ingd, C and K block-diagonal",
        captures="Correlations within blocks of neighbouring inputs and of neighbouring outputs, or on one side only.",
        use="Very wide layers: diagonal on the wide side (input_block=1 or output_block=1), whole on the other.",
        cost="As ingd; a diagonal side takes n·size for statistics, and size for a sweep and for memory.",
        source="Lin, Dangel, Eschenhagen et al. 2024 (SINGD).",
    )

    def __init__(
        self,
        *,
        damping: str = "optimal",
        sharing: str = "expand",
        sweeps: int = 2,
        input_block: int | None = 1,
        output_block: int | None = 1,
    ) -> None:
        super().__init__(damping=damping, sharing=sharing, sweeps=sweeps)
        self.input_block = None if input_block is None else check_count("input_block", input_block)
        self.output_block = None if output_block is None else check_count("output_block", output_block)

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {**super().options, "input_block": self.input_block, "output_block": self.output_block}

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return self._kept(super().measure(rows, frame))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        return self._kept(super().identity(shape, like, sparse_sides=sparse_sides, tied=tied))

    def _kept(self, statistics: Statistics) -> Statistics:
        """What block-diagonal roots see of the factors: the same blocks of them."""
        sizes = {
            "input": self.input_block,
            "gradient": self.output_block,
            "transposed_input": self.output_block,
            "transposed_gradient": self.input_block,
        }
        return replace(
            statistics, sums={name: _block_diagonal(factor, sizes[name]) for name, factor in statistics.sums.items()}
        )


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
    """

    A: Tensor
    G: Tensor
    gamma: Tensor
    C: Tensor
    K: Tensor
    away: Tensor

    @classmethod
    def of(cls, blocks: Sequence[WhiteBlock], starts: Sequence[tuple[Tensor, Tensor] | None]) -> _Pair:
        """Blocks of equal shape from where they start; those that start afresh do at the prior."""
        A, G = torch.stack([block.A for block in blocks]), torch.stack([block.G for block in blocks])
        gamma = torch.stack([block.gamma for block in blocks]).reshape(-1, *[1] * (A.ndim - 3))
        roots = [
            (_identity(b.G), _identity(b.A)) if start is None else start
            for b, start in zip(blocks, starts, strict=True)
        ]
        C, K = (torch.stack(side) for side in zip(*roots, strict=True))
        return cls(A, G, gamma, C, K, away=torch.full_like(linalg.trace(A), torch.inf))

    def sweep(self) -> _Pair:
        """A step of each root, given the other."""
        A, G = _semidefinite(self.A, self.K), _semidefinite(self.G, self.C)
        C, away_C = _step(self.C, G, self.K, A, self.gamma)
        # of the two scales only the product means something: one is kept, so that neither runs away
        C = C / torch.linalg.matrix_norm(C, keepdim=True)
        K, away_K = _step(self.K, A, C, G, self.gamma)
        return replace(self, C=C, K=K, away=torch.maximum(away_C, away_K))

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


def _step(root: Tensor, own: Tensor, other_root: Tensor, other: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """``K (I − E)`` for the root of one side given the other's, and how far it was from the optimum."""
    dim, other_dim = own.shape[-1], other.shape[-1]
    weight = _trace_of_congruence(other, other_root).clamp(min=0) / other_dim
    damping = gamma * other_root.square().sum((-2, -1)) / other_dim
    S = _times(linalg.congruence(own, root), weight) + _times(linalg.gram(linalg.transpose(root)), damping)
    # the best scale first, so that a step is of the shape alone
    scale = dim / linalg.trace(S)
    root, E = _times(root, scale.sqrt()), _plus(_times(S, scale), -1) / 2
    away = E.square().sum((-2, -1)).div(dim).sqrt() + (scale - 1).abs()
    E = E if linalg.is_diagonal(E) else E.tril() + E.tril(-1)
    return root - _times(linalg.product(root, E), (LONGEST_STEP / _spectral_norm(E)).clamp(max=1)), away


def _semidefinite(factor: Tensor, root: Tensor) -> Tensor:
    """The factor, or where rounding made it indefinite ``F + 2 |λ| I`` with its least eigenvalue ``λ``."""
    if linalg.is_diagonal(factor):
        return factor.clamp(min=0)
    # a root is broad where its factor is small: in its coordinates the least eigenvalue stands out
    image = factor @ root
    trace = (image * root).sum((-2, -1), keepdim=True)
    scale = factor.shape[-1] / torch.where(trace > 0, trace, torch.ones_like(trace))
    vector = torch.ones_like(factor[..., :1])
    for _ in range(POWER_STEPS):
        vector = torch.nn.functional.normalize(vector - scale * (root.mT @ (image @ vector)), dim=-2)
    direction = torch.nn.functional.normalize(root @ vector, dim=-2)
    lowest = (direction * (factor @ direction)).sum((-2, -1))
    return linalg.add_to_diagonal(factor, -2 * lowest.clamp(max=0))


def _trace_of_congruence(factor: Tensor, root: Tensor) -> Tensor:
    """``tr(Rᵀ F R)``."""
    return (linalg.product(factor, root) * root).sum((-2, -1))


def _spectral_norm(matrix: Tensor) -> Tensor:
    """An estimate of the greatest singular value of factors, not below any diagonal element's size."""
    largest = linalg.diagonal(matrix).abs().amax(-1)
    if linalg.is_diagonal(matrix):
        return largest
    vector = matrix.square().sum(-2).unsqueeze(-1)
    for _ in range(POWER_STEPS):
        vector = matrix.mT @ (matrix @ torch.nn.functional.normalize(vector, dim=-2))
    return torch.maximum(largest, torch.linalg.vector_norm(vector, dim=(-2, -1)).sqrt())


def _times(factor: Tensor, scale: Tensor) -> Tensor:
    return factor * scale[..., None, None]


def _plus(factor: Tensor, value: float) -> Tensor:
    return linalg.add_to_diagonal(factor, factor.new_full(factor.shape[:-2], value))


def _identity(like: Tensor) -> Tensor:
    return _plus(torch.zeros_like(like), 1)


def _earlier_roots(block: WhiteBlock) -> tuple[Tensor, Tensor] | None:
    """The roots ``C`` and ``K`` of an earlier Gaussian in white coordinates, where there is one of this form."""
    earlier = block.spec.previous
    if not isinstance(earlier, MatrixNormalGaussian):
        return None
    C = linalg.quotient(block.row_root, earlier.scale_tril_row) * block.spec.data_scale**0.5
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


def _block_diagonal(factor: Tensor, size: int | None) -> Tensor:
    """The diagonal blocks of a factor, zero outside of them; of size 1 its diagonal as a row."""
    if size is None or linalg.is_diagonal(factor):
        return factor
    if size == 1:
        return linalg.diagonal(factor).unsqueeze(-2)
    block = torch.arange(factor.shape[-1], device=factor.device) // size
    return factor * (block.unsqueeze(-1) == block)
