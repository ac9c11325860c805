"""EKFAC: a diagonal in the eigenvectors of K-FAC's factors, ``F̄ ≈ (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ``.

``S = E[(Q_Gᵀ J Q_A)²]`` is the diagonal of the Fisher itself in that basis, with each example's own Jacobian ``J``: of
all diagonals it is the nearest, nearer than K-FAC's ``d_G d_Aᵀ`` (George et al. 2018; as a posterior, Bae et al. 2018),
and its trace is the Fisher's. The basis is the statistics' frame: eigenvectors of the running factors, renewed at each
refresh. In a new basis the old ``S`` can be known in part only: the Fisher is taken to be K-FAC's product plus what
``S`` differs from it by, where it was measured. So ``S`` keeps its sum, and no example is forgotten.

A prior ``δ I`` is the same in every basis. Where the prior is a matrix normal, such as that of an earlier task, the
basis is that of the factors in the coordinates in which it is white, as K-FAC's is, and the Fisher is brought there in
the same way. Either enters exactly, whatever ``damping`` says. ``S`` is of the whole Jacobian, whatever ``sharing``
says: that decides about the basis alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Structure, register
from bayes_kfac.structures.jacobian import squares
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.tkfac import TKFACStructure


@register("ekfac")
class EKFACStructure(Structure):
    """K-FAC with eigenvalues that are measured."""

    card = Card(
        formula="F ≈ (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ, S = E[(Q_Gᵀ J Q_A)²], Q the eigenvectors of K-FAC's A and G",
        captures="K-FAC's correlations, and how large the gradient is along each of its directions, so that the trace "
        "is exact; never further from the Fisher than K-FAC in the same basis.",
        use="Where an eigendecomposition is affordable and variances matter; a basis stays good for long.",
        cost="Statistics n (in² + out² + in·out), with T positions T times that; refresh in³ + out³; sample or solve "
        "in·out (in + out); memory in² + out² + in·out. A Laplace fit takes two passes.",
        source="George et al. 2018; as a posterior, Bae et al. 2018.",
    )
    passes = 2
    #: The structure in whose eigenvectors the Fisher is taken to be diagonal.
    product: ClassVar[type[KroneckerStructure]] = KroneckerStructure

    def __init__(self, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"
        self._product = self.product(damping="exact", sharing=sharing)

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        factors = self._product.measure(rows)
        if frame:
            rows = _rotated(rows, frame["basis_row"], frame["basis_column"])
        return Statistics(
            {**factors.sums, "scale": squares(rows)}, {**factors.counts, "scale": rows.num_examples}, frame
        )

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        factors = self._product.identity(shape, like, sparse_sides=sparse_sides, tied=tied)
        scale = factors.sums["input"].new_ones(shape)
        return Statistics({**factors.sums, "scale": scale}, {**factors.counts, "scale": 1.0})

    def reframed(self, statistics: Statistics, name: str) -> Statistics:  # noqa: D102
        row_ones, column_ones = (torch.ones_like(basis[..., :1, :]) for basis in _bases(statistics))
        basis_row, basis_column, scale = self._in_eigenvectors(statistics, row_ones, column_ones, name)
        return Statistics(
            {**statistics.sums, "scale": scale * statistics.counts["scale"]},
            statistics.counts,
            {"basis_row": basis_row, "basis_column": basis_column},
        )

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        if isinstance(spec.prior, MatrixNormalGaussian):
            return self._white(spec, spec.prior)[2]
        return spec.statistics.mean("scale") / self._precisions(spec)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return [self._gaussian(spec) for spec in specs]

    def _gaussian(self, spec: BlockSpec) -> KroneckerEigenGaussian:
        prior = spec.prior
        if isinstance(prior, MatrixNormalGaussian):
            basis_row, basis_column, scale = self._white(spec, prior)
            return KroneckerEigenGaussian(basis_row, basis_column, scale * spec.data_scale + 1, -prior.logdet() / 2)
        precision = spec.statistics.mean("scale") * spec.data_scale + self._precisions(spec)
        return KroneckerEigenGaussian(*_bases(spec.statistics), precision)

    def _white(self, spec: BlockSpec, prior: MatrixNormalGaussian) -> tuple[Tensor, Tensor, Tensor]:
        return self._in_eigenvectors(spec.statistics, prior.scale_tril_row, prior.scale_tril_column, spec.name)

    def _in_eigenvectors(
        self, statistics: Statistics, row_root: Tensor, column_root: Tensor, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The factors' eigenvectors in the coordinates of two roots, and the Fisher's diagonal there.

        The Fisher is ``G ⊗ A + P diag(S − diag(Pᵀ (G ⊗ A) P)) Pᵀ`` with ``P = P_G ⊗ P_A``, in which ``S`` was measured.

        Args:
            statistics: What was measured.
            row_root: A factor, ``[*blocks, out, out]``.
            column_root: A factor, ``[*blocks, in, in]``.
            name: The layer's name, for messages.

        Returns:
            ``R_row Q_G``, ``R_column Q_A``, and the diagonal, ``[*blocks, out, in]``.
        """
        A, G = self._product.factors(statistics)
        P_G, P_A = _bases(statistics)
        B_G, d_G, inner_G, overlap_G = _turned_side(G, row_root, P_G, name)
        B_A, d_A, inner_A, overlap_A = _turned_side(A, column_root, P_A, name)
        beyond = linalg.left_product(overlap_G, statistics.mean("scale") - _outer(inner_G, inner_A))
        beyond = linalg.right_product(beyond, linalg.transpose(overlap_A))
        return B_G, B_A, _without_negatives(_outer(d_G, d_A) + beyond)

    def _precisions(self, spec: BlockSpec) -> Tensor:
        """The prior's precision of each direction, ``[*blocks, out, in]``: it must not vary within a turned side."""
        scale = spec.statistics.sums["scale"]
        if not isinstance(spec.prior, BlockGaussian):
            prior = torch.as_tensor(spec.prior, dtype=scale.dtype, device=scale.device).expand_as(scale)
            bases = zip((-2, -1), _bases(spec.statistics), strict=True)
            turned = [side for side, basis in bases if not linalg.is_diagonal(basis)]
            if all(bool((prior == prior.narrow(side, 0, 1)).all()) for side in turned):
                return prior
        raise spec.refuse_prior(
            self.name,
            "one precision for a block, Posterior.nearest_matrix_normal() of a posterior, or structure='kron'",
        )


@register("tekfac")
class TEKFACStructure(EKFACStructure):
    """TKFAC with eigenvalues that are measured."""

    card = replace(
        EKFACStructure.card,
        formula="F ≈ (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ, S = E[(Q_Gᵀ J Q_A)²], Q the eigenvectors of TKFAC's A and G",
        captures="As EKFAC, in the eigenvectors of the Fisher's partial traces; the trace is exact.",
        use="As EKFAC, where gradients are large where inputs are, or positions share weights.",
        source="Gao et al. 2020.",
    )
    product = TKFACStructure


def _bases(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """``Q_G`` and ``Q_A``; identities before there is a frame."""
    if statistics.frame:
        return statistics.frame["basis_row"], statistics.frame["basis_column"]
    ones = torch.ones_like(statistics.sums["scale"])
    return ones[..., 0].unsqueeze(-2), ones[..., :1, :]


def _turned_side(factor: Tensor, root: Tensor, basis: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One side of a new basis.

    Eigenvalues that are rounding are left out: ``S`` has what was measured there, and at each refresh it would be added
    once more.

    Args:
        factor: ``F``, in the weights' own coordinates.
        root: ``R``.
        basis: ``P``, in which ``S`` was measured.
        name: The layer's name, for messages.

    Returns:
        ``B = R Q`` and ``d``, with ``Rᵀ F R = Q diag(d) Qᵀ``; the diagonal of ``Pᵀ F P``; and ``(Bᵀ P)²``.
    """
    values, Q = linalg.eigh(linalg.congruence(factor, root), [name])
    rounding = values.amax(-1, keepdim=True) * (values.shape[-1] * torch.finfo(values.dtype).eps)
    d = torch.where(values > rounding, values, torch.zeros_like(values))
    turned = linalg.product(root, Q)
    inside = linalg.product(linalg.transpose(Q), linalg.quotient(root, basis)).square()
    inner = linalg.right_product(d.unsqueeze(-2), inside).squeeze(-2)
    return turned, d, inner, linalg.product(linalg.transpose(turned), basis).square()


def _outer(row: Tensor, column: Tensor) -> Tensor:
    return row.unsqueeze(-1) * column.unsqueeze(-2)


def _without_negatives(diagonal: Tensor) -> Tensor:
    """Zeros in the place of negative numbers, and the others reduced so that the sum over each block stays."""
    positive = diagonal.clamp(min=0)
    total = positive.sum((-2, -1), keepdim=True)
    share = diagonal.sum((-2, -1), keepdim=True).clamp(min=0) / torch.where(total > 0, total, torch.ones_like(total))
    return positive * share


def _rotated(rows: Rows, basis_row: Tensor, basis_column: Tensor) -> Rows:
    """The rows of ``Q_Gᵀ J Q_A``."""
    return replace(
        rows,
        inputs=_in_basis(rows.inputs, basis_column),
        gradients=_turned(rows.gradients, basis_row),
        transposed=None if rows.transposed is None else _rotated(rows.transposed, basis_column, basis_row),
    )


def _in_basis(inputs: Tensor | SparseRows, basis: Tensor) -> Tensor | SparseRows:
    if isinstance(inputs, SparseRows) and linalg.is_diagonal(basis):  # of words: the identity
        return inputs
    return _turned(inputs if isinstance(inputs, Tensor) else inputs.dense(), basis)


def _turned(rows: Tensor, basis: Tensor) -> Tensor:
    return linalg.right_product(rows.flatten(-3, -2), basis).unflatten(-2, rows.shape[-3:-1])
