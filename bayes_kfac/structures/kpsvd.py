"""Kronecker products nearest to the Fisher itself: one, two by deflation or Lanczos, or K-FAC and a correction.

K-FAC's ``G ⊗ A`` would be the Fisher if inputs and gradients were independent. The nearest product in the Frobenius
norm, ``KPSVD``, is the leading singular pair of the rearranged Fisher (:mod:`bayes_kfac.structures.rearranged`), which
its products with matrices find: ``E[Jᵀ V J]`` and ``E[J R Jᵀ]``, of each example's own Jacobian ``J``, positions that
share weights summed exactly, whatever ``sharing`` says. A frame is a stack of ``V`` and ``R``, and each renewal a step
of the iteration: several passes of a Laplace fit, or the refreshes of training. The rest of the Fisher is symmetric but
indefinite, and so is its nearest product, the second (Koroko et al. 2022); of a side whose inputs are sparse all is
diagonal.

A frame's first matrices are positive and of trace one, the others traceless. So the identity, whose map is
``V ↦ tr(V) I``, measures the same in every frame. At the beginning there is the first one alone, ``I / size``, where
:meth:`KPSVDStructure.factors` is the product of the Fisher's partial traces over its trace, TKFAC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import EXAMPLEWISE_KINDS, NO_FRAME, Frame, Rows, SparseRows, Statistics, kronecker_factors
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register
from bayes_kfac.structures.damping import damped
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.partial_products import partial_products
from bayes_kfac.structures.rearranged import RearrangedFisher
from bayes_kfac.structures.two_kronecker import TwoKroneckerGaussian, with_second_product


@register("kpsvd")
class KPSVDStructure(KroneckerStructure):
    """The Kronecker product nearest to the Fisher of a layer."""

    card = Card(
        formula="F ≈ G ⊗ A nearest in the Frobenius norm: A ∝ E[Jᵀ G J], G ∝ E[J A Jᵀ]",
        captures="As much of the Fisher as one Kronecker product can; unlike K-FAC, that sizes of inputs and gradients "
        "go together.",
        use="Where K-FAC misses the trace or the evidence, at the price of some passes over the data.",
        cost="Statistics n (in² + out²) for each position, or n in·out (in + out) where they are many; refresh in³ + "
        "out³; sample or solve in·out (in + out); memory 2 × K-FAC. 4 passes.",
        source="Koroko et al. 2022; Van Loan & Pitsianis 1993.",
    )
    # on small random and trained layers the Frobenius error then exceeds the least one by 0.1 % at most
    passes = 4
    fishers = EXAMPLEWISE_KINDS
    #: How many matrices of each side a frame has.
    basis: ClassVar[int] = 1

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        frame = frame or _start(*self._stacks(rows))
        by_row, by_column = partial_products(rows, frame["row"], frame["column"])
        counts = dict.fromkeys(("row", "column"), rows.num_examples)
        return Statistics({"row": by_row, "column": by_column}, counts, frame)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        one = super().identity(shape, like, sparse_sides=sparse_sides)
        names = {"row": "gradient", "column": "input"}
        sums = {name: _with_zeros(one.sums[side], self.basis) for name, side in names.items()}
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def factors(self, statistics: Statistics) -> tuple[Tensor, Tensor]:  # noqa: D102
        G, A = (statistics.mean(name)[..., 0, :, :] for name in ("row", "column"))
        R = _frame(statistics)["column"][..., 0, :, :]
        total = (R * A).sum((-2, -1), keepdim=True)
        return A / torch.where(total > 0, total, torch.ones_like(total)), G

    def reframed(self, statistics: Statistics, name: str) -> Statistics:  # noqa: D102
        old = _frame(statistics)
        row, column = (
            _renewed(old[side], vectors, name)
            for side, vectors in zip(("row", "column"), self._leading(statistics), strict=True)
        )
        images = self._images(statistics, row, column)
        sums = {side: _first_positive(image, name) * (statistics.counts[side] or 1.0) for side, image in images.items()}
        return Statistics(sums, statistics.counts, {"row": row, "column": column})

    def _leading(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The vectors of the next frame, ``[*blocks, basis, d]`` of each side; zeros where nothing is known."""
        rows, _, columns = _rearranged(statistics).singular_pairs(self.basis)
        return rows, columns

    def _images(self, statistics: Statistics, row: Tensor, column: Tensor) -> dict[str, Tensor]:
        """What would have been measured in another frame: by the first product, and what is known of the rest."""
        A, G = (factor.flatten(-2).unsqueeze(-2) for factor in self.factors(statistics))
        remainder, rows, columns = self._remainder(statistics), row.flatten(-2), column.flatten(-2)
        return {
            "row": _as_factors(remainder.adjoint_image(columns) + columns @ A.mT * G, row),
            "column": _as_factors(remainder.image(rows) + rows @ G.mT * A, column),
        }

    def _remainder(self, statistics: Statistics) -> RearrangedFisher:
        """The Fisher less the first product."""
        A, G = self.factors(statistics)
        return _rearranged(statistics).minus(G, A)

    def _stacks(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Empty stacks of matrices of the two sides of a block."""
        blocks, out_features = rows.gradients.shape[1:-3], rows.gradients.shape[-1]
        in_features, other = rows.inputs.shape[-1], rows.transposed
        out_height = 1 if other is not None and isinstance(other.inputs, SparseRows) else out_features
        in_height = 1 if other is None and isinstance(rows.inputs, SparseRows) else in_features
        like = rows.gradients
        return (
            like.new_empty(*blocks, self.basis, out_height, out_features),
            like.new_empty(*blocks, self.basis, in_height, in_features),
        )


class TwoProductsStructure(KPSVDStructure):
    """A Kronecker product and a second one, which is the nearest to what the first leaves over.

    Three Kronecker products have no closed form, so that the prior enters into the first, by ``"factored"`` or
    ``"optimal"`` damping; ``"exact"`` is ``"optimal"``. Directions in which the second product would take most of the
    first away are counted in
    :attr:`~bayes_kfac.structures.two_kronecker.TwoKroneckerGaussian.num_clamped` of the posterior's blocks.
    """

    def __init__(self, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        if damping == "exact":
            self.damping = "optimal"

    def second(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The factors of the second product, as :meth:`factors` gives those of the first.

        Args:
            statistics: What was measured.

        Returns:
            ``A`` and ``G``, symmetric, in general indefinite.
        """
        G, value, A = self._remainder(statistics).singular_pairs(1)
        G, A = (G * value.unsqueeze(-1)).squeeze(-2), A.squeeze(-2)
        return _as_factors(A, statistics.sums["column"]), _as_factors(G, statistics.sums["row"])

    def spectrum(self, spec: BlockSpec) -> Tensor:
        """The diagonal of the two products in the eigenvectors of the first, no less than zero; ``[*blocks, out, in]``.

        The prior enters exactly, and for the logarithm of the determinant it is an upper bound.

        Args:
            spec: The block.

        Returns:
            What takes the place of eigenvalues.
        """
        white = self._white(spec)
        A, G = self.second(spec.statistics)
        d_A, Q_A = linalg.eigh(white.A, [spec.name])
        d_G, Q_G = linalg.eigh(white.G, [spec.name])
        e_A = linalg.diagonal(linalg.congruence(A, linalg.product(white.column_root, Q_A)))
        e_G = linalg.diagonal(linalg.congruence(G, linalg.product(white.row_root, Q_G)))
        return (d_G.unsqueeze(-1) * d_A.unsqueeze(-2) + e_G.unsqueeze(-1) * e_A.unsqueeze(-2)).clamp(min=0)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        blocks = [self._white(_with_first(spec)) for spec in specs]
        firsts = cast("list[MatrixNormalGaussian]", damped(blocks, self.damping))
        seconds = [(A, G * spec.data_scale) for spec in specs for A, G in (self.second(spec.statistics),)]
        return [*with_second_product(firsts, seconds, [spec.name for spec in specs])]


@register("kpsvd_deflation")
class KPSVDDeflationStructure(TwoProductsStructure):
    """Two Kronecker products, from the smallest basis that can tell two."""

    card = Card(
        formula="F ≈ G₁ ⊗ A₁ + G₂ ⊗ A₂ nearest in the Frobenius norm, the second of F − G₁ ⊗ A₁",
        captures="As much of the Fisher as two Kronecker products with symmetric factors can.",
        use="Where one product is too coarse and memory is dear; kpsvd_lanczos takes fewer passes.",
        cost="Statistics and memory 2 × kpsvd, refresh in³ + out³; sample or solve as K-FAC. 8 passes.",
        source="Koroko et al. 2022.",
    )
    # slow where the second and third singular values are near each other: 8 % at most, after 6 passes 17 %
    passes = 8
    basis = 2


@register("kpsvd_lanczos")
class KPSVDLanczosStructure(TwoProductsStructure):
    """Two Kronecker products, from a Krylov basis of four."""

    card = Card(
        formula="F ≈ G₁ ⊗ A₁ + G₂ ⊗ A₂ nearest in the Frobenius norm, by a restarted Lanczos bidiagonalisation",
        captures="As much of the Fisher as two Kronecker products with symmetric factors can.",
        use="Where one Kronecker product is too coarse: nearest to the Fisher in the Frobenius norm, in which large "
        "curvature weighs most. As a posterior it is not always nearer to the exact one than kfac_corrected.",
        cost="Statistics and memory 4 × kpsvd, refresh in³ + out³; sample or solve as K-FAC. 5 passes.",
        source="Koroko et al. 2022.",
    )
    # 1.2 % at most; the published bidiagonalisation needs two passes for a step, and is not so near after as many
    passes = 5
    basis = 4


@register("kfac_corrected")
class KFACCorrectedStructure(TwoProductsStructure):
    """K-FAC's product, and the nearest one to what it leaves over."""

    card = Card(
        formula="F ≈ G ⊗ A + P ⊗ Q, A = E[a aᵀ], G = E[g gᵀ], P ⊗ Q nearest to F − G ⊗ A in the Frobenius norm",
        captures="K-FAC, and the largest part of what it misses.",
        use="To mend K-FAC: on small layers its posteriors were on average nearer to the exact ones in KL, with either "
        "damping.",
        cost="Statistics and memory 3 × kpsvd and K-FAC, refresh in³ + out³; sample or solve as K-FAC. 4 passes.",
        source="Koroko et al. 2022.",
    )
    # 2.8 % at most
    passes = 4
    basis = 3

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return _merged(kronecker_factors(rows, self.sharing), super().measure(rows, frame))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        kfac = KroneckerStructure.identity(self, shape, like, sparse_sides=sparse_sides, tied=tied)
        return _merged(kfac, super().identity(shape, like, sparse_sides=sparse_sides, tied=tied))

    def factors(self, statistics: Statistics) -> tuple[Tensor, Tensor]:  # noqa: D102
        return KroneckerStructure.factors(self, statistics)

    def reframed(self, statistics: Statistics, name: str) -> Statistics:  # noqa: D102
        return _merged(statistics, super().reframed(statistics, name))

    def _leading(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        A, G = (factor.flatten(-2).unsqueeze(-2) for factor in self.factors(statistics))
        rows, _, columns = self._remainder(statistics).singular_pairs(self.basis - 1)
        return torch.cat([G, rows], -2), torch.cat([A, columns], -2)


def _frame(statistics: Statistics) -> Frame:
    """The frame that was measured in."""
    return statistics.frame or _start(statistics.sums["row"], statistics.sums["column"])


def _start(row: Tensor, column: Tensor) -> Frame:
    """The first frame of stacks like these: an identity of trace one, and zeros."""
    frame = {}
    for name, like in (("row", row), ("column", column)):
        height, size = like.shape[-2:]
        one = like.new_ones(1, size) if height < size else torch.eye(size, dtype=like.dtype, device=like.device)
        frame[name] = _with_zeros((one / size).expand(*like.shape[:-3], height, size), like.shape[-3])
    return frame


def _with_zeros(factor: Tensor, count: int) -> Tensor:
    """A factor as the first of a stack ``[*blocks, count, ...]``, the others zero."""
    others = factor.new_zeros(*factor.shape[:-2], count - 1, *factor.shape[-2:])
    return torch.cat([factor.unsqueeze(-3), others], -3)


def _rearranged(statistics: Statistics) -> RearrangedFisher:
    frame = _frame(statistics)
    return RearrangedFisher.of(frame["row"], frame["column"], statistics.mean("column"), statistics.mean("row"))


def _renewed(old: Tensor, vectors: Tensor, name: str) -> Tensor:
    """One side of a frame from vectors ``[*blocks, k, d]``: the first positive, of trace one, the others traceless."""
    factors = _as_factors(vectors, old)
    first = factors[..., :1, :, :]
    first = _positive_part(first * linalg.trace(first).sign()[..., None, None], name)
    trace = linalg.trace(first)[..., None, None]
    is_known = trace > 0
    first = torch.where(is_known, first / torch.where(is_known, trace, torch.ones_like(trace)), old[..., :1, :, :])
    others = factors[..., 1:, :, :]
    return torch.cat([first, others - linalg.trace(others)[..., None, None] * first], -3).to(old)


def _first_positive(factors: Tensor, name: str) -> Tensor:
    """A stack with the first factor made positive: it is the image of a positive one, up to what is not known."""
    return torch.cat([_positive_part(factors[..., :1, :, :], name), factors[..., 1:, :, :]], -3)


def _positive_part(factor: Tensor, name: str) -> Tensor:
    """The nearest positive semi-definite factor."""
    values, vectors = linalg.eigh(factor, [name])
    if linalg.is_diagonal(factor):
        return values.unsqueeze(-2)
    return linalg.symmetrize((vectors * values.unsqueeze(-2)) @ vectors.mT)


def _as_factors(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors ``[..., d]`` as factors of a stack's shape, symmetric to the last bit."""
    factors = vectors.unflatten(-1, like.shape[-2:])
    return factors if linalg.is_diagonal(factors) else linalg.symmetrize(factors)


def _merged(one: Statistics, other: Statistics) -> Statistics:
    """Both, the second's where they have the same names."""
    return Statistics({**one.sums, **other.sums}, {**one.counts, **other.counts}, other.frame)


def _with_first(spec: BlockSpec) -> BlockSpec:
    """The block with the first product of its previous Gaussian, to start from."""
    previous = spec.previous.first if isinstance(spec.previous, TwoKroneckerGaussian) else None
    return replace(spec, previous=previous)
