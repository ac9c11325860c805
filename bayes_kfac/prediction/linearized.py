"""Linearised prediction: the model as an affine function of its weights around the mean, ``f(x) + J(x) (w − M)``.

The output is then Gaussian in closed form, with covariance ``Σ_blocks J P⁻¹ Jᵀ``. Jacobians are never formed as such:
each block takes the rows ``a`` and ``g`` of its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.curvature import Layer, Recorder
from bayes_kfac.prediction.forward import call, evaluating
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
    """
    recorder = Recorder(layers)
    weights = {name for layer in layers.values() for name in layer.parameters}
    attached = {name: value.detach().requires_grad_(name in weights) for name, value in state.items()}
    recorder.attach()
    try:
        with evaluating(model), torch.enable_grad():
            output = call(model, attached, inputs)
            size = output[0].numel()
            basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
            rows = recorder.rows(output, basis.expand(size, *output.shape))
    finally:
        recorder.detach()
    covariance = output.new_zeros(output.shape[0], size, size)
    for name, layer_rows in rows.items():
        dtype = next(iter(blocks[name].state.values())).dtype
        covariance = covariance + blocks[name].quad(layer_rows.inputs.to(dtype), layer_rows.gradients.to(dtype))
    return output.detach(), covariance
