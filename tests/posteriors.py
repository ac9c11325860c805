"""Posteriors with random blocks around any model, and the dense Gaussian that each of them stands for. All float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayes_kfac import Posterior, structures
from bayes_kfac.curvature import Statistics, find_layers
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import DAMPING_KINDS, BlockSpec
from tests.helpers import block, random_spd

__all__ = ["DAMPING_KINDS", "dense_covariances", "dense_output_covariance", "random_posterior"]


def random_posterior(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    damping: str = "factored",
    num_data: int = 20,
    prior_precision: float = 1.3,
    seed: int = 0,
) -> Posterior:
    """A posterior around the model's weights, its blocks built from random curvature factors."""
    layers, _ = find_layers(model)
    dtype = next(model.parameters()).dtype
    specs = []
    for index, (name, layer) in enumerate(layers.items()):
        *blocks, rows, columns = layer.shape
        factors = {
            "input": random_spd(*blocks, columns, seed=seed + 2 * index).to(dtype),
            "gradient": random_spd(*blocks, rows, seed=seed + 2 * index + 1).to(dtype),
        }
        statistics = Statistics(factors, dict.fromkeys(factors, 1.0))
        specs.append(BlockSpec(name, statistics, data_scale=float(num_data), prior_precision=prior_precision))
    gaussians = structures.get("kron", damping=damping, sharing="expand").gaussians(specs)
    return Posterior(
        model,
        likelihood,
        dict(zip(layers, gaussians, strict=True)),
        prior_precision=dict.fromkeys(layers, prior_precision),
        provenance=Provenance("a test", "kron", damping, "mc", "expand", temperature=1.0, num_data=num_data),
    )


def dense_covariances(posterior: Posterior) -> dict[str, Tensor]:
    """``P⁻¹`` of each layer, ``[*blocks, out·in, out·in]``, by inverting the dense precision."""
    return {name: torch.linalg.inv(gaussian.to_dense()) for name, gaussian in posterior.blocks.items()}


def dense_output_covariance(posterior: Posterior, inputs: Any) -> tuple[Tensor, Tensor]:
    """The linearised model's mean ``[batch, ...]`` and ``J P⁻¹ Jᵀ``, ``[batch, outputs, outputs]``, by torch.func."""
    names = {name for layer in posterior.layers.values() for name in layer.parameters}
    weights = {name: value for name, value in posterior.mean.items() if name in names}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def function(values: dict[str, Tensor]) -> Tensor:
        return functional_call(posterior.model, {**posterior.mean, **values}, args, kwargs)

    modes = {module: module.training for module in posterior.model.modules()}
    posterior.model.eval()
    try:
        mean, derivatives = function(weights), jacrev(function)(weights)
    finally:
        for module, mode in modes.items():
            module.training = mode
    total = mean.new_zeros(len(mean), mean[0].numel(), mean[0].numel())
    for name, covariance in dense_covariances(posterior).items():
        layer = posterior.layers[name]
        flat = {}
        for key in layer.parameters:
            parameter_shape = weights[key].shape
            flat[key] = derivatives[key].reshape(len(mean), -1, *parameter_shape)
        J = block(layer, flat).flatten(-2)
        by_block = J.reshape(*J.shape[:2], -1, J.shape[-1])
        total = total + torch.einsum(
            "bcgi,gij,bdgj->bcd", by_block, covariance.reshape(-1, *covariance.shape[-2:]), by_block
        )
    return mean, total
