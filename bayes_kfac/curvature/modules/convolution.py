"""Convolutions and transposed convolutions on ``[batch, channels, *positions]``, of one to three dimensions.

A row is one patch, ``in`` runs over channels × kernel. Groups are independent blocks: ``*blocks`` is ``(groups,)``
where there is more than one, so that a depthwise convolution has a block for each channel. As a tensor a block has
three modes, outputs × channels × kernel; with a bias's column beside them ``in`` is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.curvature.modules.base import Modes, ModuleAdapter, register


@register(nn.Conv1d)
@register(nn.Conv2d)
@register(nn.Conv3d)
class ConvAdapter(ModuleAdapter):
    """Convolutions with any stride, padding, padding mode, dilation and groups."""

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        patches = _unfold(self._pad(inputs), self.module.kernel_size, self.module.stride, self.module.dilation)
        return self._append_one(_patch_rows(patches, self.module.groups))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return _output_rows(gradient, self.module.groups)

    def _weight_shape(self) -> tuple[int, ...]:
        weight, groups = self.module.weight, self.module.groups
        matrix = (weight.shape[0] // groups, weight[0].numel())
        return matrix if groups == 1 else (groups, *matrix)

    @property
    def modes(self) -> Modes:  # noqa: D102
        return super().modes if self.bias else _modes(self.shape, self.module)

    def _pad(self, inputs: Tensor) -> Tensor:
        # torch keeps the padding of each side, last axis first, for every padding mode and for 'same'
        sides = self.module._reversed_padding_repeated_twice
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        return nn.functional.pad(inputs, list(sides), mode=mode)


@register(nn.ConvTranspose1d)
@register(nn.ConvTranspose2d)
@register(nn.ConvTranspose3d)
class ConvTransposeAdapter(ModuleAdapter):
    """Transposed convolutions: the convolution of an input spread out by the stride, its kernel mirrored.

    A row is what one *output* position sees, so that the bias is a column like any other.
    """

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:  # noqa: D102
        # output_size= of the call may have chosen among several output shapes
        return super().capture(args, kwargs, output), tuple(output.shape[2:])

    def input_rows(self, inputs: tuple[Tensor, tuple[int, ...]]) -> Tensor:  # noqa: D102
        conv, (images, positions) = self.module, inputs
        spread = _spread(images, conv.stride)
        sides: list[int] = []
        for axis, size in enumerate(positions):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            left = reach - conv.padding[axis]
            sides = [left, size + reach - left - spread.shape[2 + axis], *sides]
        spatial = len(positions)
        patches = _unfold(nn.functional.pad(spread, sides), conv.kernel_size, (1,) * spatial, conv.dilation)
        return self._append_one(_patch_rows(patches.flip(tuple(range(-spatial, 0))), conv.groups))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return _output_rows(gradient, self.module.groups)

    def to_matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: D102
        return super().to_matrix(None if weight is None else self._swapped(weight, self._grouped_shape()), bias)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        weight, bias = super().from_matrix(matrix)
        if weight is not None:
            groups, in_channels, out_channels, *kernel = self._grouped_shape()
            leading = weight.shape[: weight.ndim - self.module.weight.ndim]
            swapped = self._swapped(weight, (*leading, groups, out_channels, in_channels, *kernel))
            weight = swapped.reshape(*leading, *self.module.weight.shape)
        return weight, bias

    def _weight_shape(self) -> tuple[int, ...]:
        groups, in_channels, out_channels, *kernel = self._grouped_shape()
        matrix = (out_channels, in_channels * torch.Size(kernel).numel())
        return matrix if groups == 1 else (groups, *matrix)

    @property
    def modes(self) -> Modes:  # noqa: D102
        return super().modes if self.bias else _modes(self.shape, self.module)

    def _grouped_shape(self) -> tuple[int, ...]:
        """``(groups, in / groups, out / groups, *kernel)``, the order in which torch keeps the weight."""
        weight, groups = self.module.weight, self.module.groups
        return (groups, weight.shape[0] // groups, *weight.shape[1:])

    def _swapped(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight viewed as ``shape`` with its two channel dimensions exchanged."""
        channels = len(shape) - len(self.module.kernel_size) - 2
        return weight.reshape(shape).transpose(channels, channels + 1)


def _modes(shape: tuple[int, ...], module: Any) -> Modes:
    """Those of a block without a bias, and without channels or a kernel of one."""
    positions = torch.Size(module.kernel_size).numel()
    sizes = (shape[-1] // positions, positions)
    return (shape[-2],), tuple(size for size in sizes if size > 1) or (1,)


def _unfold(images: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Patches ``[batch, channels, *positions, *kernel]`` of padded images."""
    patches = images
    for axis, (kernel, step, spacing) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        # Tensor.unfold has no dilation: take the whole extent, keep every dilation-th element
        patches = patches.unfold(2 + axis, spacing * (kernel - 1) + 1, step)[..., ::spacing]
    return patches


def _patch_rows(patches: Tensor, groups: int) -> Tensor:
    """``[batch, channels, *positions, *kernel]`` to ``[(groups,) batch, shared, channels × kernel]``."""
    spatial = (patches.ndim - 2) // 2
    positions = patches.movedim(1, 1 + spatial)  # [batch, *positions, channels, *kernel]
    features = torch.Size(positions.shape[1 + spatial :]).numel()
    return _blocks_first(positions.reshape(patches.shape[0], -1, groups, features // groups))


def _output_rows(gradient: Tensor, groups: int) -> Tensor:
    """``[batch, channels, *positions]`` to ``[(groups,) batch, shared, channels]``."""
    return _blocks_first(gradient.flatten(2).mT.reshape(gradient.shape[0], -1, groups, gradient.shape[1] // groups))


def _blocks_first(rows: Tensor) -> Tensor:
    """``[batch, shared, groups, features]`` to ``[(groups,) batch, shared, features]``."""
    return rows.squeeze(2) if rows.shape[2] == 1 else rows.movedim(2, 0)


def _spread(images: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Images with ``stride − 1`` zeros between neighbouring positions."""
    if all(step == 1 for step in stride):
        return images
    sizes = [(size - 1) * step + 1 for size, step in zip(images.shape[2:], stride, strict=True)]
    spread = images.new_zeros(*images.shape[:2], *sizes)
    every = spread
    for axis, step in enumerate(stride):
        every = every.unfold(2 + axis, 1, step).squeeze(-1)
    every.copy_(images)
    return spread
