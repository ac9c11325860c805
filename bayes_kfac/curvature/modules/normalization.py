"""The affine part of normalisations, ``w x̂ + b`` for each feature: unit-wise blocks.

``*blocks`` is ``(features,)`` and each block ``(1, 2)`` on rows ``[x̂, 1]``, or ``(1, 1)`` where there is only one of
weight and bias. Blocks that small are kept dense: a 2×2 Fisher for each feature (Osawa et al. 2019, "unit-wise").
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayes_kfac.curvature.modules.base import ModuleAdapter, register, register_like


def couples_examples(module: nn.Module) -> bool:
    """Whether a module makes the output of each example depend on the others: batch normalisation in training."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


class NormalizationAdapter(ModuleAdapter):
    """A module that normalises its input and then scales and shifts each feature."""

    structure = "dense"

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:  # noqa: D102
        # at once: running averages change with the next call
        inputs: Tensor = super().capture(args, kwargs, output)
        return self.normalize(inputs) if self.weight else inputs

    @abstractmethod
    def normalize(self, inputs: Tensor) -> Tensor:
        """The module's output without its weight and bias."""

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._append_one(self.gradient_rows(inputs))

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.module.weight.numel(), 1, 1)


class LastDimensionsAdapter(NormalizationAdapter):
    """Normalisations over the last dimensions, each element of them a feature."""

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        features = self.module.weight.numel()
        return gradient.reshape(gradient.shape[0], -1, features).movedim(-1, 0).unsqueeze(-1)


class ChannelsAdapter(NormalizationAdapter):
    """Normalisations of ``[batch, channels, *positions]``, each channel a feature."""

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.reshape(*gradient.shape[:2], -1).movedim(1, 0).unsqueeze(-1)


@register(nn.LayerNorm)
class LayerNormAdapter(LastDimensionsAdapter):
    """``nn.LayerNorm``."""

    def normalize(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return functional.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


@register(nn.RMSNorm)
class RMSNormAdapter(LastDimensionsAdapter):
    """``nn.RMSNorm``."""

    parameter_names = ("weight",)

    def normalize(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return functional.rms_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


@register(nn.GroupNorm)
class GroupNormAdapter(ChannelsAdapter):
    """``nn.GroupNorm``."""

    def normalize(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return functional.group_norm(inputs, self.module.num_groups, eps=self.module.eps)


@register(nn.InstanceNorm1d)
@register(nn.InstanceNorm2d)
@register(nn.InstanceNorm3d)
@register(nn.BatchNorm1d)
@register(nn.BatchNorm2d)
@register(nn.BatchNorm3d)
class BatchNormAdapter(ChannelsAdapter):
    """Batch and instance normalisation, which may use running averages.

    In training batch normalisation couples the examples of a batch. Its own statistics are right; those of layers
    before it lack the terms between the rows of two examples, as in every published use of K-FAC with it.
    """

    def normalize(self, inputs: Tensor) -> Tensor:  # noqa: D102
        norm = self.module
        if not norm.training and norm.running_mean is not None:
            shape = (-1, *[1] * (inputs.ndim - 2))
            return (inputs - norm.running_mean.view(shape)) * (norm.running_var.view(shape) + norm.eps).rsqrt()
        if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
            return functional.instance_norm(inputs, eps=norm.eps)
        return functional.batch_norm(inputs, None, None, training=True, eps=norm.eps)


def _is_affine_norm(module: nn.Module) -> bool:
    is_named_so = re.search(r"(RMS|Rms|Layer|Group)Norm(1|2d)?(NoBias)?(Fp32)?$", type(module).__name__) is not None
    own = dict(module.named_parameters())
    is_affine = "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].ndim == 1
    return is_named_so and is_affine and not any(True for _ in module.buffers())


@register_like(_is_affine_norm)
class AffineNormAdapter(NormalizationAdapter):
    """Layer-, RMS- and GroupNorms of other libraries, whatever they compute that is affine in weight and bias.

    What multiplies the weight is the difference between the outputs for weights of one and of zero.
    """

    #: The dimension of the features, which the first call tells.
    axis = -1

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:  # noqa: D102
        return self.normalize((args, kwargs))

    def normalize(self, inputs: Any) -> Tensor:  # noqa: D102
        ones = torch.ones_like(self.module.weight)
        nothing = self._output_with(torch.zeros_like(ones), *inputs)
        normalized = self._output_with(ones, *inputs) - nothing
        if normalized.ndim > 2 and normalized.shape[1] == len(ones):
            ramp = torch.arange(len(ones)).to(ones)
            ramped = self._output_with(ramp, *inputs) - nothing
            is_last = normalized.shape[-1] == len(ones) and torch.allclose(ramped, normalized * ramp, rtol=1e-3)
            self.axis = -1 if is_last else 1
        return normalized

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        rows = gradient.movedim(self.axis, 0)
        return rows.reshape(*rows.shape[:2], -1, 1)
