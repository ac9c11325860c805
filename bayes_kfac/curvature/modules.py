"""Adapters: how each kind of module maps onto a block ``W a`` of shape ``(out, in)``.

A block speaks *rows*. Inputs become ``[*blocks, batch, shared, in]`` and output gradients
``[*blocks, batch, shared, out]``; ``shared`` counts the positions at which the same weights are used (1 for a plain
``Linear``, positions for a convolution, time for a sequence). A bias is the last column of the block, so inputs get a 1
appended. ``*blocks`` is empty for most modules; a grouped convolution is a stack of independent blocks, one for each
group.

A new kind of module is one subclass and one :func:`register` line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_REGISTRY: dict[type[nn.Module], type[ModuleAdapter]] = {}


class ModuleAdapter(ABC):
    """How one module's parameters, inputs and output gradients look as a block.

    Args:
        module: The module.
        bias: Whether its bias belongs to the block, as the last column.
    """

    #: The names of the parameters that an adapter understands.
    parameter_names: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, module: nn.Module, *, bias: bool) -> None:
        self.module: Any = module
        self.bias = bias

    @abstractmethod
    def input_rows(self, inputs: Tensor) -> Tensor:
        """Bring the module's input to ``[*blocks, batch, shared, in]``."""

    @abstractmethod
    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Bring a gradient with respect to the module's output to ``[*blocks, batch, shared, out]``."""

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Join tensors shaped like weight and bias into ``[*blocks, out, in]``."""
        matrix = weight.reshape(self._weight_shape())
        return matrix if bias is None else torch.cat([matrix, bias.reshape(*matrix.shape[:-1], 1)], dim=-1)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split ``[..., *blocks, out, in]`` into tensors shaped like weight and bias, keeping leading dimensions."""
        leading = matrix.shape[: matrix.ndim - len(self._weight_shape())]
        weight_shape = (*leading, *self.module.weight.shape)
        if not self.bias:
            return matrix.reshape(weight_shape), None
        return matrix[..., :-1].reshape(weight_shape), matrix[..., -1].reshape(*leading, *self.module.bias.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape, ``(*blocks, out, in)``, with the bias's column."""
        *leading, columns = self._weight_shape()
        return (*leading, columns + self.bias)

    def _weight_shape(self) -> tuple[int, ...]:
        """The weight's shape as a block, without the bias's column."""
        return (self.module.weight.shape[0], self.module.weight[0].numel())

    def _append_one(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if self.bias else rows

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Say why this module cannot be a block although its kind can, or return ``None``."""
        return None


def register(module_type: type[nn.Module]) -> Callable[[type[ModuleAdapter]], type[ModuleAdapter]]:
    """Class decorator that makes an adapter serve ``module_type`` and its subclasses that keep its ``forward``.

    Args:
        module_type: The kind of module.

    Returns:
        The decorator.
    """

    def decorate(adapter: type[ModuleAdapter]) -> type[ModuleAdapter]:
        _REGISTRY[module_type] = adapter
        return adapter

    return decorate


def adapter_for(module: nn.Module) -> type[ModuleAdapter] | None:
    """Return the adapter of a module's kind, or ``None``.

    A subclass counts as its parent's kind only while it keeps the parent's ``forward``: another forward pass is
    another function of the weights.
    """
    for kind in type(module).__mro__:
        if kind in _REGISTRY:
            return _REGISTRY[kind] if type(module).forward is kind.forward else None
    return None


@register(nn.Linear)
class LinearAdapter(ModuleAdapter):
    """``nn.Linear`` on inputs ``[batch, ..., in]``: the dimensions between are shared."""

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._append_one(_as_rows(inputs))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return _as_rows(gradient)

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: D102
        # MultiheadAttention reads the weights of its out_proj, of this type: no hook on it ever fires
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "MultiheadAttention uses it without calling it"
        return None


@register(nn.Conv1d)
@register(nn.Conv2d)
@register(nn.Conv3d)
class ConvAdapter(ModuleAdapter):
    """Convolutions on ``[batch, channels, *positions]``: a row is one patch, ``in`` runs over channels × kernel.

    Groups are independent blocks: ``*blocks`` is ``(groups,)`` where there is more than one.
    """

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        conv, spatial = self.module, len(self.module.kernel_size)
        patches = self._pad(inputs)
        for axis in range(spatial):
            dilation, kernel = conv.dilation[axis], conv.kernel_size[axis]
            # Tensor.unfold has no dilation: take the whole extent, keep every dilation-th element
            patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, conv.stride[axis])[..., ::dilation]
        positions = patches.movedim(1, 1 + spatial)  # [batch, *positions, channels, *kernel]
        rows = positions.reshape(inputs.shape[0], -1, conv.groups, conv.weight[0].numel())
        return self._append_one(self._blocks_first(rows))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        groups = self.module.groups
        rows = gradient.flatten(2).mT.reshape(gradient.shape[0], -1, groups, gradient.shape[1] // groups)
        return self._blocks_first(rows)

    def _blocks_first(self, rows: Tensor) -> Tensor:
        """``[batch, shared, groups, features]`` to ``[(groups,) batch, shared, features]``."""
        return rows.squeeze(2) if self.module.groups == 1 else rows.movedim(2, 0)

    def _weight_shape(self) -> tuple[int, ...]:
        weight, groups = self.module.weight, self.module.groups
        matrix = (weight.shape[0] // groups, weight[0].numel())
        return matrix if groups == 1 else (groups, *matrix)

    def _pad(self, inputs: Tensor) -> Tensor:
        # torch keeps the padding of each side, last axis first, for every padding mode and for 'same'
        sides = self.module._reversed_padding_repeated_twice
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        return nn.functional.pad(inputs, list(sides), mode=mode)


def _as_rows(tensor: Tensor) -> Tensor:
    """``[batch, ..., features]`` to ``[batch, shared, features]``; a lone vector is a batch of one."""
    if tensor.ndim == 1:
        return tensor[None, None]
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
