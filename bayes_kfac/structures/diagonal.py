"""The diagonal of the Fisher: ``P = data_scale · diag F̄ + prior_precision``, independent weights.

``F̄`` is the mean over examples of the squares of each example's own gradient, summed over output-gradient columns:
not the square of a batch's gradient (Khan et al. 2018, "VOGN"; Zhang et al. 2018, "noisy Adam"). The prior enters
exactly, whatever ``damping`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, register, register_gaussian
from bayes_kfac.structures.jacobian import JacobianStructure


@register_gaussian("diagonal")
class DiagonalGaussian(BlockGaussian):
    """A zero-mean Gaussian of independent weights.

    Args:
        precision: ``[*blocks, out, in]``, positive.
    """

    def __init__(self, precision: Tensor) -> None:
        self.precision = precision

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.precision.shape)

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return noise * self.precision.rsqrt()

    def solve(self, value: Tensor) -> Tensor:  # noqa: D102
        return value / self.precision

    def logdet(self) -> Tensor:  # noqa: D102
        return self.precision.log().sum((-2, -1))

    def quad(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Tensor:  # noqa: D102
        if isinstance(inputs, SparseRows):
            return self._quad_sparse(inputs, gradients)
        if inputs.shape[-2] == 1:
            # a Jacobian of rank one needs no Jacobian: Σ_oi g_co g_do a_i² / P_oi
            weights = inputs.squeeze(-2).square() @ self.precision.reciprocal().mT
            rows = gradients.squeeze(-2)
            return torch.einsum("c...no,...no,d...no->ncd", rows, weights, rows)
        jacobians = torch.einsum("c...nto,...nti->c...noi", gradients, inputs)
        jacobians = jacobians * self.precision.rsqrt().unsqueeze(-3)
        return torch.einsum("c...noi,d...noi->ncd", jacobians, jacobians)

    def _quad_sparse(self, inputs: SparseRows, gradients: Tensor) -> Tensor:
        # one position for each element of a row; two of them meet where they have the same index: Σ_o g_ct g_du / P_oi
        batch, _, count = inputs.indices.shape
        words = SparseRows(inputs.indices.reshape(batch, -1, 1), inputs.weights.reshape(batch, -1, 1), inputs.size)
        spread = gradients.repeat_interleave(count, dim=-2)
        variances = self.precision.reciprocal().mT[words.indices.squeeze(-1)]  # [batch, positions, out]
        meet = words.gram(variances.new_ones(inputs.size))
        return torch.einsum("cnto,nto,ntu,dnuo->ncd", spread, variances, meet, spread)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.precision.reciprocal()

    def to_dense(self) -> Tensor:  # noqa: D102
        return torch.diag_embed(self.precision.flatten(-2))

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"precision": self.precision}


@register("diagonal")
class DiagonalStructure(JacobianStructure):
    """The diagonal of the Fisher, from each example's own gradient."""

    def _fisher(self, jacobians: Tensor) -> Tensor:
        return jacobians.square().sum(0).sum(-3)

    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_ones(shape)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return [
            DiagonalGaussian(spec.statistics.mean("fisher") * spec.data_scale + spec.prior_precision) for spec in specs
        ]
