"""The prior of a Laplace fit: precisions for the whole model, for layers, for parameters or single weights.

What a user writes becomes one :data:`bayes_kfac.structures.Prior` for each layer: a scalar tensor, or the precision of
each weight ``[*blocks, out, in]``. Tensors stay in their graph, so that the evidence is differentiable in them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kfac.curvature import Layer
from bayes_kfac.errors import ArgumentError

PriorPrecision = float | Tensor | Mapping[str, "float | Tensor"]


def by_layer(prior_precision: PriorPrecision, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The precision of each layer's prior.

    Args:
        prior_precision: One number, or numbers by the names of layers or of parameters, where that of a parameter may
            have the parameter's shape, and that of a layer its block's. Together they must cover every layer.
        layers: The layers by name.

    Returns:
        For each layer a scalar, or the precision of each weight, ``[*blocks, out, in]``.

    Raises:
        ArgumentError: If a name is unknown, a layer is left out or named twice, or a value is not positive.
    """
    if not isinstance(prior_precision, Mapping):
        value = checked("prior_precision", prior_precision)
        return {name: _as_precision(value, layer) for name, layer in layers.items()}
    home = {parameter: name for name, layer in layers.items() for parameter in layer.parameters}
    if unknown := sorted(set(prior_precision) - set(layers) - set(home)):
        raise ArgumentError(
            f"prior_precision names {unknown}. Allowed: the layers {', '.join(layers)}, and the parameters "
            f"{', '.join(home)}."
        )
    return {name: _of_layer(layer, prior_precision) for name, layer in layers.items()}


def as_prior(value: Tensor, layer: Layer) -> Tensor:
    """A prior's tensors on a layer's device, in the dtype of its statistics."""
    return value.to(layer.template)


def _as_precision(value: Tensor, layer: Layer) -> Tensor:
    """:func:`as_prior` of precisions, which must not vanish or overflow in that dtype."""
    found = as_prior(value, layer)
    if bool(((found == 0) | found.isinf()).any()):
        raise ArgumentError(
            f"prior_precision has values between {value.min():.3g} and {value.max():.3g}, which are 0 or infinite in "
            f"the {found.dtype} of layer {layer.name!r}. Allowed: what that dtype can hold; or use float64."
        )
    return found


def _of_layer(layer: Layer, given: Mapping[str, float | Tensor]) -> Tensor:
    named = [parameter for parameter in layer.parameters if parameter in given and parameter != layer.name]
    if layer.name in given:
        if named:
            raise ArgumentError(f"prior_precision names the layer {layer.name!r} and {named} in it. Name one of them.")
        alone = layer.parameters.get(layer.name)  # a parameter that is a layer by itself
        shapes = [layer.shape] if alone is None else [layer.shape, tuple(alone.shape)]
        value = checked(f"prior_precision[{layer.name!r}]", given[layer.name], *shapes)
        is_prior = tuple(value.shape) in ((), layer.shape)
        return _as_precision(value if is_prior else layer.matrix({layer.name: value}), layer)
    if missing := [parameter for parameter in layer.parameters if parameter not in given]:
        raise ArgumentError(
            f"prior_precision leaves out {missing} of layer {layer.name!r}. Name the layer, or all of its parameters."
        )
    values = {}
    for name, parameter in layer.parameters.items():
        value = checked(f"prior_precision[{name!r}]", given[name], tuple(parameter.shape))
        values[name] = _as_precision(value, layer).expand_as(parameter)
    return layer.matrix(values)


def checked(name: str, value: float | Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """A positive number, or numbers of a shape, as a tensor in its graph.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        shapes: Which shapes are allowed beside that of one number.

    Returns:
        The tensor.

    Raises:
        ArgumentError: If it is none.
    """
    try:
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}={value!r} is not a number. Allowed: finite numbers > 0.") from error
    if tensor.numel() == 1 and tensor.ndim == 1:
        tensor = tensor.squeeze(0)
    if tensor.ndim and tuple(tensor.shape) not in shapes:
        allowed = f"a number, or a tensor of shape {' or '.join(map(str, shapes))}" if shapes else "one number"
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}. Allowed: {allowed}.")
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        what = f"{name}={value!r} is" if not tensor.ndim else f"{name} holds elements that are"
        raise ArgumentError(f"{what} out of range. Allowed: finite numbers > 0.")
    return tensor
