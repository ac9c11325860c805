"""The diagonal of the Fisher: ``P = data_scale · diag F̄ + prior_precision``, independent weights.

``F̄`` is the mean over examples of the squares of each example's own gradient, summed over output-gradient columns:
not the square of a batch's gradient (Khan et al. 2018, "VOGN"; Zhang et al. 2018, "noisy Adam"). The prior enters
exactly, whatever ``damping`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register, register_gaussian
from bayes_kfac.structures.jacobian import JacobianStructure, squares
from bayes_kfac.structures.whitened import WhitenedRows, same_for_all


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

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return value * self.precision.rsqrt()

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        return value * self.precision

    def logdet(self) -> Tensor:  # noqa: D102
        return self.precision.log().sum((-2, -1))

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedRows:  # noqa: D102
        return WhitenedRows(inputs, same_for_all(gradients), self.precision.reciprocal())

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.precision.reciprocal()

    def to_power(self, exponent: float) -> DiagonalGaussian:  # noqa: D102
        return DiagonalGaussian(self.precision**exponent)

    def to_dense(self) -> Tensor:  # noqa: D102
        return torch.diag_embed(self.precision.flatten(-2))

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"precision": self.precision}


@register("diagonal")
class DiagonalStructure(JacobianStructure):
    """The diagonal of the Fisher, from each example's own gradient."""

    card = Card(
        formula="F ≈ diag(E[J ∘ J])",
        captures="The size of each weight's gradient; no correlation at all.",
        use="Very wide layers, bare parameters, and as the mean-field baseline: noisy Adam, Vadam, VOGN.",
        cost="Statistics n in·out; refresh, sample, solve and memory in·out.",
        source="Zhang et al. 2018 (noisy Adam); Khan et al. 2018 (Vadam, VOGN).",
    )

    def _fisher(self, rows: Rows) -> Tensor:
        return squares(rows)

    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_ones(shape)

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        return spec.statistics.mean("fisher") / _prior(spec)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return [DiagonalGaussian(spec.statistics.mean("fisher") * spec.data_scale + _prior(spec)) for spec in specs]


def _prior(spec: BlockSpec) -> float | Tensor:
    """The prior's precision of each weight."""
    if not isinstance(spec.prior, BlockGaussian):
        return spec.prior
    if not isinstance(spec.prior, DiagonalGaussian):
        raise spec.refuse_prior("diagonal", "precisions, or a posterior of structure='diagonal'")
    return spec.prior.precision
