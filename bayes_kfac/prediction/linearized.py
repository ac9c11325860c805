"""Linearised prediction: the model as an affine function of its weights around the mean, ``f(x) + J(x) (w − M)``.

The output is then Gaussian in closed form, with covariance ``Σ_blocks J P⁻¹ Jᵀ``. Jacobians are never formed as such:
each block takes the rows ``a`` and ``g`` of its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bayes_kfac import linalg
from bayes_kfac.curvature import Layer, Recorder
from bayes_kfac.errors import UsageError
from bayes_kfac.prediction.forward import call, differentiable, evaluating
from bayes_kfac.structures import BlockGaussian


def linearize(
    model: nn.Module,
    state: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    blocks: Mapping[str, BlockGaussian],
    inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The mean and covariance of the linearised model's output.

    Args:
        model: The model; left as it was.
        state: All parameters and buffers at the mean.
        layers: The layers that have a posterior.
        blocks: The zero-mean Gaussians of these layers.
        inputs: The model's input.

    Returns:
        The mean ``[batch, ...]`` and the covariance ``[batch, outputs, outputs]``, where ``outputs`` counts all
        elements of one example's output.

    Raises:
        UsageError: If autograd sees none of the layers.
    """
    recorder = Recorder(layers)
    weights = {name for layer in layers.values() for name in layer.parameters}
    recorder.attach()
    try:
        # without a graph no Jacobian would be seen, and the covariance would be a silent zero
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            attached = {
                name: differentiable(value).detach().requires_grad_(name in weights) for name, value in state.items()
            }
            output = call(model, attached, tree_map_only(Tensor, differentiable, inputs))
            size = output[0].numel()
            basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
            rows = recorder.rows(output, basis.expand(size, *output.shape), parameters=attached)
            if blocks and not rows:
                raise UsageError(
                    "No layer with a posterior was seen by autograd, so the linearised model has no variance. Does its "
                    "forward run under torch.no_grad(), or use none of these layers? method='sampling' needs no graph."
                )
    finally:
        recorder.detach()
    covariance = output.new_zeros(output.shape[0], size, size)
    with linalg.full_precision(output.device):  # a covariance in 16 bits is not symmetric
        for name, layer_rows in rows.items():
            dtype = next(iter(blocks[name].state.values())).dtype
            covariance = covariance + blocks[name].whitened_rows(layer_rows.to(dtype)).covariance()
    return output.detach(), covariance
