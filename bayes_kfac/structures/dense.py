"""The whole Fisher of a block: ``P = data_scale · F̄ + prior_precision I`` of size ``(out·in)²``.

For small networks, and as the unit-wise blocks of normalisations, which are a stack of 2×2 (Osawa et al. 2019). The
prior enters exactly, whatever ``damping`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Layer, Rows, SparseRows, Statistics
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Structure, register, register_gaussian


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

    def solve(self, value: Tensor) -> Tensor:  # noqa: D102
        whitened = self._root.mT @ value.flatten(-2).unsqueeze(-1)
        return (self._root @ whitened).reshape(value.shape)

    def logdet(self) -> Tensor:  # noqa: D102
        return -2 * linalg.diagonal(self._root).log().sum(-1)

    def quad(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Tensor:  # noqa: D102
        whitened = Rows(inputs, gradients).jacobians().flatten(-2) @ self._root
        return torch.einsum("c...nk,d...nk->ncd", whitened, whitened)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.scale_tril.square().sum(-1)

    def to_dense(self) -> Tensor:  # noqa: D102
        return torch.cholesky_inverse(self._root)

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"scale_tril": self.scale_tril}


@register("dense")
class DenseStructure(Structure):
    """The Fisher of a block without any approximation but its independence of other blocks."""

    def __init__(self, *, damping: str, sharing: str) -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"

    def for_layer(self, layer: Layer) -> Structure:  # noqa: D102
        return self

    def measure(self, rows: Rows) -> Statistics:  # noqa: D102
        dtype = torch.promote_types(rows.gradients.dtype, torch.float32)
        jacobians = rows.to(dtype).jacobians()
        columns = jacobians.flatten(-2).movedim(0, -3).flatten(-3, -2)
        fisher = (columns.mT @ columns).unflatten(-2, jacobians.shape[-2:])
        return Statistics({"fisher": fisher}, {"fisher": rows.num_examples})

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        out_features, in_features = shape[-2:]
        size = out_features * in_features
        eye = torch.eye(size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return Statistics(
            {"fisher": eye.reshape(out_features, in_features, size).expand(*shape, size)}, {"fisher": 1.0}
        )

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        precisions = []
        for spec in specs:
            fisher = spec.statistics.mean("fisher").flatten(-3, -2) * spec.data_scale
            prior = fisher.new_tensor(spec.prior_precision).expand(fisher.shape[:-2])
            precisions.append(linalg.add_to_diagonal(fisher, prior))
        roots = linalg.map_by_shape(_inverse_root, precisions, [spec.name for spec in specs])
        return [
            DenseGaussian(root.reshape(spec.statistics.sums["fisher"].shape))
            for spec, (root,) in zip(specs, roots, strict=True)
        ]


def _inverse_root(precision: Tensor, names: Sequence[str]) -> tuple[Tensor]:
    return (linalg.inverse_cholesky(precision, names),)
