"""Block-tridiagonal K-FAC: the Gaussian whose inverse covariance agrees with the Fisher in neighbouring layers.

``F_{l,l+1} ≈ G_{l,l+1} ⊗ A_{l,l+1}`` with ``A_{l,l+1} = E[a_l a_{l+1}ᵀ]`` and ``G_{l,l+1} = E[g_l g_{l+1}ᵀ]``, beside
the blocks ``G_ll ⊗ A_ll`` of K-FAC. Of all precisions with these blocks on and beside the diagonal, that of a chain of
layers has an inverse that is block-tridiagonal: ``Ψ_l = Ψ^G_l ⊗ Ψ^A_l`` with ``Ψ^A_l = A_{l,l+1} A_{l+1,l+1}⁻¹`` and
``Ψ^G_l`` likewise, and ``Λ_l⁻¹ = G_ll ⊗ A_ll − (Ψ^G_l G_{l+1,l+1} Ψ^G_lᵀ) ⊗ (Ψ^A_l A_{l+1,l+1} Ψ^A_lᵀ)``
(Martens & Grosse 2015, §4.3).

The damping is factored, in the blocks on the diagonal: with the roots ``R_l`` of their inverses as K-FAC has them, the
correlations of neighbours are ``M_l = R_lᵀ F_{l,l+1} R_{l+1} = M^G_l ⊗ M^A_l``, and in the eigenvectors ``Q`` of
``M Mᵀ``, with eigenvalues ``d`` below 1, ``Λ_l = (R Q)_G ⊗ (R Q)_A diag(1 − d_G d_Aᵀ)⁻¹ (·)ᵀ``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import EXAMPLEWISE_KINDS, NO_FRAME, Frame, Layer, Rows, Statistics, kronecker_factors
from bayes_kfac.structures.base import (
    BlockGaussian,
    BlockSpec,
    Card,
    Information,
    Prior,
    Structure,
    register,
    register_gaussian,
)
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.link import Link
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

SIDES = ("input", "gradient")
#: Between the names of a layer's side and of the layer that it is multiplied with.
ACROSS = " × "


@register_gaussian("conditional")
class ConditionalGaussian(KroneckerEigenGaussian):
    """``Λ_l``: the weights of a layer given the layers before it, in the bases ``R Q`` of ``P_ll⁻¹``."""

    def as_prior(self) -> MatrixNormalGaussian:
        """The matrix normal of precision ``P_ll``: of independent ones the nearest to the chain in ``KL(q ‖ p)``."""
        return MatrixNormalGaussian(linalg.triangular_root(self.basis_row), linalg.triangular_root(self.basis_column))


@register("tridiagonal")
class TridiagonalStructure(KroneckerStructure):
    """K-FAC with correlations between consecutive layers.

    Two layers of this structure that follow each other in the model are linked, unless one of them has a diagonal side,
    tied weights or several blocks. They are correlated by the batches in which both have one position for each example
    (after pooling, with ``sharing="reduce"``); a layer without such batches is as K-FAC has it. What is kept of the
    correlation of two layers is 1 but for averages of unlike data: see :attr:`bayes_kfac.structures.Link.kept`.
    """

    card = Card(
        formula="F_{l,l+1} ≈ E[g_l g_{l+1}ᵀ] ⊗ E[a_l a_{l+1}ᵀ] beside G ⊗ A, and an inverse that is block-tridiagonal",
        captures="Correlations between the weights of consecutive layers: the one Kronecker posterior that has any. "
        "The prior enters by factored damping.",
        use="Chains of linear layers, where what one layer does another can undo.",
        cost="Beside K-FAC's: statistics n (in·in' + out·out'); refresh in float64, with an eigendecomposition of each "
        "side; two products with Ψ for each sample; memory in·in' + out·out'.",
        source="Martens & Grosse 2015, §4.3.",
    )
    fishers = EXAMPLEWISE_KINDS

    def __init__(self, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "factored"
        self._next_shape: tuple[int, ...] = ()

    @property
    def label(self) -> str:  # noqa: D102
        return super().label if self.linked_to is None else f"{super().label} → {self.linked_to}"

    def for_layers(self, layers: Mapping[str, Layer]) -> dict[str, Structure]:  # noqa: D102
        structures = super().for_layers(layers)
        chain = [name for name, own in structures.items() if isinstance(own, TridiagonalStructure)]
        for name, following in pairwise(chain):
            if _has_dense_sides(layers[name]) and _has_dense_sides(layers[following]):
                structures[name] = linked = copy.copy(self)
                linked.linked_to, linked._next_shape = following, layers[following].shape
        return structures

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return self.measure_linked(rows, None, frame)

    def measure_linked(self, rows: Rows, other: Rows | None, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        own = kronecker_factors(rows, self.sharing)
        return self._with_products(own, None if other is None else _products(rows, other, self.sharing))

    def adapted(self, statistics: Statistics) -> Statistics:  # noqa: D102
        if self.linked_to is not None and _across("input", self.linked_to) in statistics.sums:
            return statistics
        own = [name for name in statistics.sums if ACROSS not in name]
        sums = {name: statistics.sums[name] for name in own}
        return self._with_products(Statistics(sums, {name: statistics.counts[name] for name in own}), None)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        own = super().identity(shape, like, sparse_sides=sparse_sides, tied=tied)
        return self._with_products(own, None)

    def linked_gaussians(  # noqa: D102
        self, specs: Sequence[BlockSpec], pairs: Mapping[str, str]
    ) -> tuple[list[BlockGaussian], dict[str, Link]]:
        neighbours = self._neighbours(specs, pairs)
        linked = {name for pair in neighbours for name in (pair.name, pair.to)}
        plain = [spec for spec in specs if spec.name not in linked]
        blocks = dict(zip((spec.name for spec in plain), self.gaussians(plain), strict=True))
        links = {}
        for pair, (row, column) in zip(neighbours, _spectra(neighbours), strict=True):
            block, link = pair.conditional(row, column)
            blocks[pair.name], links[pair.name] = block.to(pair.dtype), link.map(pair.rounded)
            blocks.setdefault(pair.to, pair.second.to(pair.dtype))  # what follows it, if anything, comes later
        return [blocks[spec.name] for spec in specs], links

    def correlation(self, specs: Sequence[BlockSpec], pairs: Mapping[str, str]) -> Information:
        """``Σ log det(I − M Mᵀ)`` over neighbours; the prior enters it by factored damping.

        Args:
            specs: The layers' blocks.
            pairs: Which of them are linked to which.

        Returns:
            The function of ``data_scale``.
        """

        def total(scale: Tensor) -> Tensor:
            neighbours = self._neighbours([_at(scale, spec) for spec in specs], pairs)
            logs = [
                pair.remainder(d_G, d_A).log().sum()
                for pair, ((d_G, _), (d_A, _)) in zip(neighbours, _spectra(neighbours), strict=True)
            ]
            return torch.stack(logs).sum() if logs else torch.zeros_like(scale)

        return total

    def _with_products(self, own: Statistics, products: Sequence[Tensor] | None) -> Statistics:
        """A layer's factors with those that it has with the next one: zeros where nothing is known of them."""
        if self.linked_to is None:
            return own
        if products is None:
            sizes = dict(zip(("gradient", "input"), self._next_shape, strict=True))
            products = [own.sums[side].new_zeros(own.sums[side].shape[-1], sizes[side]) for side in SIDES]
        across = {_across(side, self.linked_to): side for side in SIDES}
        return Statistics(
            {**own.sums, **dict(zip(across, products, strict=True))},
            {**own.counts, **{name: own.counts[side] for name, side in across.items()}},
        )

    def _neighbours(self, specs: Sequence[BlockSpec], pairs: Mapping[str, str]) -> list[_Neighbours]:
        """The pairs that are correlated, in float64: one minus a correlation is all that is left of a direction."""
        by_name = {spec.name: spec for spec in specs}
        pairs = {name: to for name, to in pairs.items() if _is_correlated(by_name[name], to)}
        linked = [_in_double(spec) for spec in specs if spec.name in {*pairs, *pairs.values()}]
        alone = dict(zip((spec.name for spec in linked), self.gaussians(linked), strict=True))
        return [_Neighbours.of(by_name[name], by_name[to], alone[name], alone[to]) for name, to in pairs.items()]


@dataclass(frozen=True)
class _Neighbours:
    """Two consecutive layers.

    Attributes:
        name: The first layer.
        to: The second.
        first: ``P_ll⁻¹``.
        second: ``P_{l+1,l+1}⁻¹``.
        G: ``data_scale · G_{l,l+1}``.
        A: ``A_{l,l+1}``.
        dtype: What the statistics are in.
    """

    name: str
    to: str
    first: MatrixNormalGaussian
    second: MatrixNormalGaussian
    G: Tensor
    A: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, spec: BlockSpec, following: BlockSpec, first: BlockGaussian, second: BlockGaussian) -> _Neighbours:
        """The neighbours of two specs."""
        assert isinstance(first, MatrixNormalGaussian)
        assert isinstance(second, MatrixNormalGaussian)
        scale = (spec.data_scale * following.data_scale) ** 0.5
        A, G = (_mean_across(side, spec.statistics, following) for side in SIDES)
        dtype = spec.statistics.sums["input"].dtype
        return cls(spec.name, following.name, first, second, scale * G, A, dtype)

    def correlations(self) -> tuple[Tensor, Tensor]:
        """``M^G M^Gᵀ`` and ``M^A M^Aᵀ``."""
        M_G = self.first.scale_tril_row.mT @ self.G @ self.second.scale_tril_row
        M_A = self.first.scale_tril_column.mT @ self.A @ self.second.scale_tril_column
        return M_G @ M_G.mT, M_A @ M_A.mT

    def kept(self, d_G: Tensor, d_A: Tensor) -> Tensor:
        """The factor on ``M Mᵀ`` that leaves something of every direction: 1 where statistics are of the same data."""
        largest = 1 - 10 * torch.finfo(self.dtype).eps
        return (largest / (d_G.max() * d_A.max()).detach()).clamp(max=1)

    def remainder(self, d_G: Tensor, d_A: Tensor) -> Tensor:
        """``I − M Mᵀ`` in its eigenvectors, ``[out, in]``."""
        return 1 - self.kept(d_G, d_A) * d_G.unsqueeze(-1) * d_A

    def conditional(self, row: Sequence[Tensor], column: Sequence[Tensor]) -> tuple[ConditionalGaussian, Link]:
        """``Λ`` and ``Ψ``, from the eigenvalues and eigenvectors of :meth:`correlations`."""
        (d_G, Q_G), (d_A, Q_A) = row, column
        R_G, R_A = self.first.scale_tril_row, self.first.scale_tril_column
        log_volume = len(R_A) * linalg.diagonal(R_G).log().sum() + len(R_G) * linalg.diagonal(R_A).log().sum()
        block = ConditionalGaussian(R_G @ Q_G, R_A @ Q_A, self.remainder(d_G, d_A), log_volume)
        kept = self.kept(d_G, d_A).sqrt()
        U, V = linalg.gram(self.second.scale_tril_row), linalg.gram(self.second.scale_tril_column)
        return block, Link(self.to, self.G @ U, kept * self.A @ V, kept)

    def rounded(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the statistics."""
        return tensor.to(self.dtype)


def _spectra(neighbours: Sequence[_Neighbours]) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Eigenvalues and eigenvectors of ``M^G M^Gᵀ`` and of ``M^A M^Aᵀ``, of all pairs."""
    names = [pair.name for pair in neighbours]
    sides = zip(*(pair.correlations() for pair in neighbours), strict=True)
    return list(zip(*(linalg.map_by_shape(linalg.eigh, side, names) for side in sides), strict=True))


def _products(rows: Rows, other: Rows, sharing: str) -> list[Tensor] | None:
    """The sums of ``a_l a_{l+1}ᵀ`` and ``g_l g_{l+1}ᵀ``, where both layers have one position for each example."""
    if sharing == "reduce":
        rows, other = rows.pooled(), other.pooled()
    if rows.inputs.shape[:-1] != other.inputs.shape[:-1] or rows.inputs.shape[-2] != 1:
        return None
    assert isinstance(rows.inputs, Tensor)
    assert isinstance(other.inputs, Tensor)
    weighted = rows.inputs if rows.mask is None else rows.inputs * rows.mask.unsqueeze(-1)
    inputs = weighted.flatten(0, -2).mT @ other.inputs.flatten(0, -2) * rows.share
    return [inputs, rows.gradients.flatten(0, -2).mT @ other.gradients.flatten(0, -2)]


def _mean_across(side: str, statistics: Statistics, following: BlockSpec) -> Tensor:
    """``E[x_l x_{l+1}ᵀ]``: over the counts' geometric mean it goes with the means of both, whatever they are of."""
    count = (statistics.counts[side] * following.statistics.counts[side]) ** 0.5
    return statistics.sums[_across(side, following.name)].double() / (count or 1.0)


def _across(side: str, to: str) -> str:
    return f"{side}{ACROSS}{to}"


def _has_dense_sides(layer: Layer) -> bool:
    return len(layer.shape) == 2 and not layer.sparse_sides and not layer.is_tied_to_transpose


def _is_correlated(spec: BlockSpec, to: str) -> bool:
    return all(bool(spec.statistics.sums[_across(side, to)].any()) for side in SIDES)


def _in_double(spec: BlockSpec) -> BlockSpec:
    prior = spec.prior if isinstance(spec.prior, float | int) else spec.prior.to(torch.float64)
    return replace(spec, statistics=spec.statistics.map(Tensor.double), prior=prior, previous=None)


def _at(scale: Tensor, spec: BlockSpec) -> BlockSpec:
    """The block at a scale of the data, which is that of the prior inversely; in the graph of both."""
    if isinstance(spec.prior, BlockGaussian):
        prior: Prior = spec.prior.map(lambda root: root.double() * scale**0.25)  # of two roots of a covariance
    else:
        prior = torch.as_tensor(spec.prior, dtype=torch.float64, device=scale.device) / scale
    return replace(spec, data_scale=1.0, prior=prior)
