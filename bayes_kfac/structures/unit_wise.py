"""The Fisher of each output unit over its own inputs: ``P_o = data_scale · E[g_o² a aᵀ] + prior``, each ``in×in``.

Rows of ``W`` are independent, and within a row nothing is approximated: where positions share weights, the average is
of ``J_o J_oᵀ`` with the row ``J_o = Σ_t g_to a_t`` of each example's own Jacobian (Ollivier 2015). The prior enters
exactly, whatever ``damping`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register, register_gaussian
from bayes_kfac.structures.diagonal import DiagonalGaussian
from bayes_kfac.structures.jacobian import JacobianStructure, in_pieces, pieces
from bayes_kfac.structures.whitened import Whitened, WhitenedJacobians, WhitenedRows, same_for_all


@register_gaussian("unit_wise")
class UnitWiseGaussian(BlockGaussian):
    """A zero-mean Gaussian of independent rows, each with a covariance of its own.

    Args:
        scale_tril: ``L``, the lower Cholesky factor of each row's covariance, ``[*blocks, out, in, in]``.
    """

    def __init__(self, scale_tril: Tensor) -> None:
        self.scale_tril = scale_tril

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.scale_tril.shape[:-1])

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self._by_row(lambda rows: self.scale_tril @ rows, noise)

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._by_row(lambda rows: self.scale_tril.mT @ rows, value)

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._by_row(lambda rows: self._solve(self._solve(rows), transposed=True), value)

    def _solve(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        return linalg.left_solve(self.scale_tril, rows, transposed=transposed)

    def _by_row(self, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """A map of the rows of ``[..., *blocks, out, in]``, for all leading dimensions at once."""
        columns = value.reshape(-1, *self.shape).movedim(0, -1)  # [*blocks, out, in, ...]
        return function(columns).movedim(-1, 0).reshape(value.shape)

    def logdet(self) -> Tensor:  # noqa: D102
        return -2 * linalg.diagonal(self.scale_tril).log().sum((-2, -1))

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedUnits:  # noqa: D102
        return WhitenedUnits(Rows(inputs, gradients), self)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.scale_tril.square().sum(-1)

    def to_dense(self) -> Tensor:  # noqa: D102
        precision = torch.cholesky_inverse(self.scale_tril)
        apart = torch.diag_embed(precision.movedim(-3, -1), dim1=-4, dim2=-2)  # [*blocks, out, in, out, in]
        return apart.flatten(-4, -3).flatten(-2)

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"scale_tril": self.scale_tril}


@dataclass(frozen=True)
class WhitenedUnits(Whitened):
    """Jacobians whose rows are whitened one by one, formed for a piece of the batch at a time.

    Attributes:
        rows: The rows as they are.
        gaussian: Whose coordinates are to be taken.
    """

    rows: Rows
    gaussian: UnitWiseGaussian

    def covariance(self) -> Tensor:  # noqa: D102
        return torch.cat([part.covariance() for part in self._parts()])

    def variance(self) -> Tensor:  # noqa: D102
        return torch.cat([part.variance() for part in self._parts()])

    def jacobians(self) -> Tensor:  # noqa: D102
        return torch.cat([part.jacobians() for part in self._parts()])

    def between(self, other: Whitened) -> Tensor:  # noqa: D102
        assert isinstance(other, WhitenedUnits)
        return torch.cat(
            [torch.cat([_products(mine, theirs) for theirs in other._parts()], dim=1) for mine in self._parts()]
        )

    def _parts(self) -> Iterator[Whitened]:
        return map(self._part, pieces(self.rows))

    def _part(self, rows: Rows) -> Whitened:
        columns, shared = len(rows.gradients), rows.inputs.shape[-2]
        if columns < shared:
            whitened = self.gaussian.whiten(rows.jacobians().movedim(-3, 0)).movedim(0, -3)
            return WhitenedJacobians(whitened, num_blocks=len(self.gaussian.shape) - 2)
        # each unit as a block of one output: its inputs are whitened once for all columns
        inputs = rows.inputs.dense() if isinstance(rows.inputs, SparseRows) else rows.inputs
        by_unit = inputs.flatten(-3, -2).unsqueeze(-3) @ self.gaussian.scale_tril
        gradients = same_for_all(rows.gradients).movedim(-1, -3).unsqueeze(-1)
        return WhitenedRows(by_unit.unflatten(-2, inputs.shape[-3:-1]), gradients)


@register("unit_wise")
class UnitWiseStructure(JacobianStructure):
    """The Fisher of each output unit."""

    card = Card(
        formula="F ≈ diag_o(E[J_o J_oᵀ]), J_o the row of unit o: E[g_o² a aᵀ]",
        captures="Everything between the weights into one unit; nothing between units.",
        use="Narrow or few outputs over correlated inputs of moderate number, such as regression with several targets.",
        cost="Statistics n out in²; a refresh out in³; a sample or a solve out in²; memory out in².",
        source="Ollivier 2015.",
    )

    def _fisher(self, rows: Rows) -> Tensor:
        alone = rows.transposed is None and rows.inputs.shape[-2] == 1 and isinstance(rows.inputs, Tensor)
        return in_pieces(_of_one_position if alone else _of_jacobians, rows)

    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        eye = torch.eye(shape[-1], dtype=like.dtype, device=like.device)
        return eye.expand(*shape, shape[-1])

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        fisher = spec.statistics.mean("fisher")
        if isinstance(spec.prior, UnitWiseGaussian):
            white = linalg.congruence(fisher, spec.prior.scale_tril)
        else:
            root = _precisions(spec, fisher).rsqrt()
            white = root.unsqueeze(-1) * fisher * root.unsqueeze(-2)
        return linalg.eigh(white, [spec.name])[0]

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        damped = []
        for spec in specs:
            fisher = spec.statistics.mean("fisher") * spec.data_scale
            if isinstance(spec.prior, UnitWiseGaussian):
                damped.append((fisher, torch.cholesky_inverse(spec.prior.scale_tril)))
            else:
                damped.append((fisher, _precisions(spec, fisher).unsqueeze(-2)))
        return [UnitWiseGaussian(root) for root in linalg.inverse_roots(damped, [spec.name for spec in specs])]


def _products(mine: Whitened, theirs: Whitened) -> Tensor:
    """The products of two pieces, which were whitened in the same way unless their numbers of positions differ."""
    return mine.between(theirs) if type(mine) is type(theirs) else Whitened.between(mine, theirs)


def _of_one_position(rows: Rows) -> Tensor:
    """``Σ g_o² a aᵀ`` of examples with one position: columns add up before inputs come in."""
    assert isinstance(rows.inputs, Tensor)
    inputs = rows.inputs.squeeze(-2)  # [*blocks, batch, in]
    weights = rows.gradients.squeeze(-2).square().sum(0)  # [*blocks, batch, out]
    weighted = weights.mT.unsqueeze(-1) * inputs.unsqueeze(-3)  # [*blocks, out, batch, in]
    return weighted.mT @ inputs.unsqueeze(-3)


def _of_jacobians(rows: Rows) -> Tensor:
    by_unit = rows.jacobians().movedim((0, -3), (-3, -2)).flatten(-3, -2)  # [*blocks, out, columns·batch, in]
    return by_unit.mT @ by_unit


def _precisions(spec: BlockSpec, fisher: Tensor) -> Tensor:
    """The prior's precision of each weight, ``[*blocks, out, in]``."""
    prior = spec.prior
    if isinstance(prior, DiagonalGaussian):
        return prior.precision
    if isinstance(prior, BlockGaussian):
        raise spec.refuse_prior("unit_wise", "precisions, or a posterior of structure='unit_wise' or 'diagonal'")
    return torch.as_tensor(prior, dtype=fisher.dtype, device=fisher.device).expand(fisher.shape[:-1])
