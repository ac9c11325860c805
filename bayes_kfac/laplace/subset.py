"""Which parameters of a model a Laplace fit is over."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from bayes_kfac.curvature import find_layers
from bayes_kfac.errors import ArgumentError

#: ``"all"``, ``"requires_grad"``, ``"last_layer"``, names, or a predicate of a parameter's name and itself.
Subset = str | Collection[str] | Callable[[str, nn.Parameter], bool]


def choose_parameters(model: nn.Module, subset: Subset) -> list[nn.Parameter]:
    """The parameters of a subset, in the model's order.

    Args:
        model: The model.
        subset: ``"all"``; ``"requires_grad"``, those that are not frozen; ``"last_layer"``, those of the last layer in
            the order of definition; names of parameters, modules or layers; or a predicate of name and parameter.

    Returns:
        The parameters, at least one.

    Raises:
        ArgumentError: If the subset is none of these, or empty.
    """
    named = dict(model.named_parameters())
    if subset == "all":
        chosen = set(named)
    elif subset == "requires_grad":
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
    elif subset == "last_layer":
        chosen = _of_last_layer(model, named.values())
    elif callable(subset) and not isinstance(subset, nn.Module):
        chosen = {name for name, parameter in named.items() if subset(name, parameter)}
    else:
        chosen = _by_names(named, subset)
    if not chosen:
        raise ArgumentError(f"subset={subset!r} holds no parameter of the model. Its parameters: {', '.join(named)}.")
    return [parameter for name, parameter in named.items() if name in chosen]


def _of_last_layer(model: nn.Module, parameters: Collection[nn.Parameter]) -> set[str]:
    """The parameters of the last module that uses any: a head that is tied to an embedding, say."""
    layers, _ = find_layers(model, parameters, rest="diagonal")
    order = {module: place for place, module in enumerate(model.modules())}
    uses = [use for layer in layers.values() for use in layer.uses]
    # of a module with several blocks the last one
    last = max(reversed(uses), key=lambda use: order[use.adapter.module], default=None)
    if last is None:
        return set()
    place = (last.adapter.module, last.part)
    return {
        name
        for layer in layers.values()
        if any((use.adapter.module, use.part) == place for use in layer.uses)
        for name in layer.parameters
    }


def _by_names(named: dict[str, nn.Parameter], subset: Any) -> set[str]:
    if isinstance(subset, str | nn.Module | Tensor) or not isinstance(subset, Collection):
        given = f"a {type(subset).__name__}" if isinstance(subset, nn.Module | Tensor) else repr(subset)
        raise ArgumentError(
            f"subset={given} is unknown. Allowed: 'all', 'requires_grad', 'last_layer', a list of names of "
            "parameters or modules, or a function of name and parameter."
        )
    chosen = set()
    for wanted in subset:
        if not isinstance(wanted, str):
            raise ArgumentError(
                f"subset holds a {type(wanted).__name__}. Allowed: names of parameters or modules, such as "
                f"{next(iter(named))!r}; or pass a function of name and parameter."
            )
        own = {name for name in named if name == wanted or name.startswith(f"{wanted}.")}
        if not own:
            raise ArgumentError(
                f"subset names {wanted!r}, which is no parameter and no module with parameters. The model's "
                f"parameters: {', '.join(named)}."
            )
        chosen |= own
    return chosen
