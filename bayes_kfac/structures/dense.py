"""The whole Fisher of a block: ``P = data_scale · F̄ + prior_precision I`` of size ``(out·in)²``.

For small networks, and as the unit-wise blocks of normalisations, which are a stack of 2×2 (Osawa et al. 2019). The
prior enters exactly, whatever ``damping`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register, register_gaussian
from bayes_kfac.structures.jacobian import JacobianStructure, in_pieces
from bayes_kfac.structures.whitened import WhitenedJacobians


@register_gaussian("dense")
class DenseGaussian(BlockGaussian):
    """A zero-mean Gaussian with a covariance of its own for every pair of weights.

    Args:
        scale_tril: The lower Cholesky factor of the covariance of ``vec W``, its rows laid out like ``W``:
            ``[*blocks, out, in, out·in]``.
    """

    def __init__(self, scale_tril: Tensor) -> None:
        self.scale_tril = scale_tril

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.scale_tril.shape[:-1])

    @property
    def _root(self) -> Tensor:
        """The factor as matrices, ``[*blocks, out·in, out·in]``."""
        return self.scale_tril.flatten(-3, -2)

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return (self._root @ noise.flatten(-2).unsqueeze(-1)).reshape(noise.shape)

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return (self._root.mT @ value.flatten(-2).unsqueeze(-1)).reshape(value.shape)

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        whitened = linalg.left_solve(self._root, value.flatten(-2).unsqueeze(-1))
        return linalg.left_solve(self._root, whitened, transposed=True).reshape(value.shape)

    def logdet(self) -> Tensor:  # noqa: D102
        return -2 * linalg.diagonal(self._root).log().sum(-1)

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedJacobians:  # noqa: D102
        jacobians = Rows(inputs, gradients).jacobians().flatten(-2)
        return WhitenedJacobians(jacobians @ self._root, num_blocks=self._root.ndim - 2)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.scale_tril.square().sum(-1)

    def to_power(self, exponent: float) -> DenseGaussian:  # noqa: D102
        root = linalg.triangular_root(linalg.root_of_power(self._root, exponent))
        return DenseGaussian(root.reshape(self.scale_tril.shape))

    def to_dense(self) -> Tensor:  # noqa: D102
        return torch.cholesky_inverse(self._root)

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"scale_tril": self.scale_tril}


@register("dense")
class DenseStructure(JacobianStructure):
    """The Fisher of a block without any approximation but its independence of other blocks."""

    card = Card(
        formula="F = E[vec J vec Jᵀ]",
        captures="Everything within a block.",
        use="Small networks, and as the reference that the others are measured against.",
        cost="Statistics n (in·out)²; a refresh (in·out)³; a sample or a solve (in·out)²; memory (in·out)².",
        source="Amari 1998.",
    )

    def _fisher(self, rows: Rows) -> Tensor:
        return in_pieces(_outer_products, rows)

    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        out_features, in_features = shape[-2:]
        size = out_features * in_features
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        return eye.reshape(out_features, in_features, size).expand(*shape, size)

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        fisher = spec.statistics.mean("fisher").flatten(-3, -2)
        if isinstance(spec.prior, Tensor | float | int):
            root = _diagonal(spec, fisher).rsqrt()
            whitened = root.unsqueeze(-1) * fisher * root.unsqueeze(-2)
        else:
            whitened = linalg.congruence(fisher, linalg.inverse_cholesky(spec.prior.to_dense(), [spec.name]))
        return linalg.eigh(whitened, [spec.name])[0]

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        damped = []
        for spec in specs:
            fisher = spec.statistics.mean("fisher").flatten(-3, -2) * spec.data_scale
            if isinstance(spec.prior, BlockGaussian):
                damped.append((fisher, spec.prior.to_dense()))
            else:
                damped.append((fisher, _diagonal(spec, fisher).unsqueeze(-2)))
        roots = linalg.inverse_roots(damped, [spec.name for spec in specs])
        return [
            DenseGaussian(root.reshape(spec.statistics.sums["fisher"].shape))
            for spec, root in zip(specs, roots, strict=True)
        ]


def _outer_products(rows: Rows) -> Tensor:
    """``Σ vec J vec Jᵀ`` over examples and columns, ``[*blocks, out, in, out·in]``."""
    jacobians = rows.jacobians()
    columns = jacobians.flatten(-2).movedim(0, -3).flatten(-3, -2)
    return (columns.mT @ columns).unflatten(-2, jacobians.shape[-2:])


def _diagonal(spec: BlockSpec, fisher: Tensor) -> Tensor:
    """The prior's precision of each weight, ``[*blocks, out·in]``."""
    prior = torch.as_tensor(spec.prior, dtype=fisher.dtype, device=fisher.device)
    return prior.expand(spec.statistics.sums["fisher"].shape[:-1]).flatten(-2)
