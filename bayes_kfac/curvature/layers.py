"""Layers: the parameters of a model, sorted into blocks ``[*blocks, out, in]`` and what no block covers.

A :class:`Layer` is one module of the model together with its adapter; it reads and writes the module's weight and bias
as one matrix whose last column is the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayes_kfac.curvature.modules import ModuleAdapter, adapter_for


@dataclass(frozen=True)
class Layer:
    """One block of a model.

    Attributes:
        name: The module's name in the model; ``"(root)"`` for the model itself.
        adapter: How the module looks as a block.
        weight_name: The weight's name in ``model.named_parameters()``.
        bias_name: The bias's name, or ``None`` where no bias is trained.
    """

    name: str
    adapter: ModuleAdapter
    weight_name: str
    bias_name: str | None

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.adapter.module

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight."""
        return self.adapter.module.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's bias, where it belongs to the block."""
        return self.adapter.module.bias if self.bias_name else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape ``(*blocks, out, in)``; ``in`` counts the bias's column."""
        return self.adapter.shape

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The block's parameters by their names in the model."""
        named = {self.weight_name: self.weight}
        if self.bias_name is not None and self.bias is not None:
            named[self.bias_name] = self.bias
        return named

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors keyed by parameter name (values, gradients, ...) into ``[*blocks, out, in]``."""
        return self.adapter.to_matrix(tensors[self.weight_name], tensors[self.bias_name] if self.bias_name else None)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Split ``[..., *blocks, out, in]`` into tensors keyed by parameter name; the inverse of :meth:`matrix`."""
        weight, bias = self.adapter.from_matrix(matrix)
        named = {self.weight_name: weight}
        if self.bias_name is not None and bias is not None:
            named[self.bias_name] = bias
        return named

    def values(self) -> Tensor:
        """A copy of the current weight and bias, ``[*blocks, out, in]``."""
        with torch.no_grad():
            return self.matrix(self.parameters).clone()

    def gradient(self) -> Tensor | None:
        """The current gradients of weight and bias, ``[*blocks, out, in]``, or ``None`` where there is none at all."""
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        if all(gradient is None for gradient in gradients.values()):
            return None
        filled = {
            name: torch.zeros_like(self.parameters[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }
        return self.matrix(filled)


def find_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Sort the trainable parameters of a model into blocks.

    Args:
        model: Any module.

    Returns:
        The layers by name, and for each trainable parameter that no layer covers the reason why. A frozen parameter
        (``requires_grad=False``) is a constant and appears in neither.
    """
    owners = _owners(model)
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}
        reason = _obstacle(module, own, owners)
        if own and reason is None:
            bias = "bias" in own
            name = prefix or "(root)"
            layers[name] = Layer(
                name=name,
                adapter=_adapter(module)(module, bias=bias),
                weight_name=_join(prefix, "weight"),
                bias_name=_join(prefix, "bias") if bias else None,
            )
        else:
            reasons.update({_join(prefix, name): reason or "" for name in own})
    return layers, {name: reason for name, reason in reasons.items() if name in dict(model.named_parameters())}


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of the modules that hold each parameter: more than one where weights are tied."""
    owners: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(prefix or "(root)")
    return owners


def _adapter(module: nn.Module) -> type[ModuleAdapter]:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter


def _obstacle(
    module: nn.Module, own: Mapping[str, nn.Parameter], owners: Mapping[nn.Parameter, list[str]]
) -> str | None:
    """Why the trainable parameters ``own`` of a module cannot be one block, or ``None``."""
    kind = type(module).__name__
    adapter = adapter_for(module)
    if adapter is None:
        return f"{kind} has no adapter"
    for parameter in own.values():
        if len(owners[parameter]) > 1:
            return f"its weights are tied between {', '.join(owners[parameter])}"
    if extra := set(own) - set(adapter.parameter_names):
        return f"{kind} has parameters {sorted(extra)} beside its weight and bias"
    if "weight" not in own and "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is not a parameter of its own (a parametrization computes it)"
    if "weight" not in own:
        return "it is the trainable bias of a frozen weight"
    return adapter.obstacle(module)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
