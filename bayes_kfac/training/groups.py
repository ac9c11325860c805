"""Parameter groups: from the arguments of a trainer to what ``torch.optim.Optimizer`` calls ``param_groups``.

A group of kind ``"block"`` holds the weights of curvature blocks with their hyper-parameters; the last group may be of
kind ``"deterministic"`` (see ``deterministic.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bayes_kfac.curvature import Layer
from bayes_kfac.errors import ArgumentError, check_fraction, check_positive

#: What a group may set, and how it is checked.
HYPERPARAMETERS: dict[str, Callable[[str, Any], float]] = {
    "lr": lambda name, value: check_positive(name, value, allow_zero=True),
    "prior_precision": check_positive,
    "extrinsic_damping": lambda name, value: check_positive(name, value, allow_zero=True),
    "momentum": check_fraction,
    "statistics_decay": check_fraction,
}


def block_groups(
    layers: Mapping[str, Layer], defaults: Mapping[str, float], groups: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Make the groups of kind ``"block"``.

    Args:
        layers: The layers by name.
        defaults: The hyper-parameters of what no group claims.
        groups: ``{"params": parameters, "lr": ..., "prior_precision": ...}`` and so on; may be ``None``.

    Returns:
        Groups of parameters with all hyper-parameters, checked; weight and bias of a layer together. The last is for
        what no group claims; it may be empty, as layers that are unfrozen later join it and schedules count groups.

    Raises:
        ArgumentError: If a group has unknown keys, claims a parameter twice, splits a layer, or holds parameters that
            belong to no layer.
    """
    home: dict[nn.Parameter, int] = {}
    made: list[dict[str, Any]] = []
    allowed = "Allowed: {'params': parameters of the model, ...}, with any of " + ", ".join(HYPERPARAMETERS) + "."
    if groups is not None and (not isinstance(groups, Iterable) or isinstance(groups, Mapping | str)):
        raise ArgumentError(f"groups={groups!r} is not allowed. Allowed: a list of groups. {allowed}")
    for index, given in enumerate(groups or ()):
        if not isinstance(given, Mapping) or "params" not in given:
            raise ArgumentError(f"groups[{index}] is {_told(given)}. {allowed}")
        options = dict(given)
        params = options.pop("params")
        if not isinstance(params, Iterable) or isinstance(params, str):
            raise ArgumentError(f"groups[{index}] has {_told(params)} for params. {allowed}")
        params = [params] if isinstance(params, Tensor) else list(params)
        for parameter in params:
            if not isinstance(parameter, nn.Parameter):
                raise ArgumentError(f"groups[{index}] has {_told(parameter)} in its params. {allowed}")
        if unknown := set(options) - set(HYPERPARAMETERS):
            raise ArgumentError(
                f"groups[{index}] has unknown options {sorted(unknown)}. Allowed: params, {', '.join(HYPERPARAMETERS)}."
            )
        for parameter in params:
            if parameter in home:
                raise ArgumentError(f"groups[{index}] holds a parameter that groups[{home[parameter]}] holds too.")
            home[parameter] = index
        made.append(_checked({**defaults, **options}))
    made.append({**_checked(defaults), "is_default": True})
    for layer in layers.values():
        indices = {home.pop(parameter, len(made) - 1) for parameter in layer.parameters.values()}
        if len(indices) > 1:
            raise ArgumentError(f"groups split layer {layer.name!r}: its weight and bias share one posterior block.")
        made[indices.pop()]["params"] += layer.parameters.values()
    for parameter in [parameter for parameter in home if not parameter.requires_grad]:
        made[home.pop(parameter)]["params"].append(parameter)  # frozen as yet
    if home:
        raise ArgumentError(f"groups[{min(home.values())}] holds parameters that belong to no curvature block.")
    return [group for group in made if group["params"] or "is_default" in group]


def follow_model(param_groups: Sequence[dict[str, Any]], model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Let parameters that the model has no more out of a trainer's groups, and new ones of layers into the default."""
    blocks, present = [group for group in param_groups if group["kind"] == "block"], set(model.parameters())
    for group in blocks:
        group["params"] = [parameter for parameter in group["params"] if parameter in present]
    known = {parameter for group in blocks for parameter in group["params"]}
    default = next(group for group in blocks if "is_default" in group)
    default["params"] += [p for layer in layers.values() for p in layer.parameters.values() if p not in known]


def layers_by_group(group_index: Mapping[str, int], param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of the layers in each of a trainer's groups."""
    return [[name for name, own in group_index.items() if own == index] for index in range(len(param_groups))]


def with_options(param_groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the options of saved ones, and the parameters that they hold by now: freezing changes those."""
    return [{**group, **options, "params": group["params"]} for group, options in zip(param_groups, saved, strict=True)]


class Checked:
    """Looks at the options of a trainer's groups, which loops and schedules change, where they are not as they were."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, ...]] = {}

    def __call__(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse options that are out of range.

        Args:
            param_groups: The groups.

        Raises:
            ArgumentError: If one is; the message names the group.
        """
        for index, group in enumerate(param_groups):
            names = HYPERPARAMETERS if group["kind"] == "block" else ("lr",)
            values = tuple(group[name] for name in names)
            if self._seen.get(index) != values:
                for name, value in zip(names, values, strict=True):
                    HYPERPARAMETERS[name](f"param_groups[{index}][{name!r}]", value)
                self._seen[index] = values


def _told(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor | nn.Module) else repr(value)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: check(name, options[name]) for name, check in HYPERPARAMETERS.items()}
    return {"params": [], "kind": "block", **values}
