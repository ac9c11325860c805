"""What a trainer refuses: wrong kinds of arguments, and calls in the wrong order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.curvature import Layer
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.training.finite import check_finite
from bayes_kfac.training.sampler import Sampler


def check_params(model: nn.Module, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Refuse to train what are no parameters of the model.

    Args:
        model: The model.
        params: What is to be trained.

    Returns:
        The parameters; a generator is used up by one look.

    Raises:
        ArgumentError: If it is no collection, empty, or holds anything else.
    """
    own = set(model.parameters())
    chosen = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor | str) else None
    allowed = "Allowed: a list of parameters of the model, such as list(model.parameters())."
    if not chosen:
        what = "is empty" if chosen is not None else f"is a {type(params).__name__}"
        raise ArgumentError(f"params {what}. {allowed}")
    for index, each in enumerate(chosen):
        if not isinstance(each, nn.Parameter) or each not in own:
            shape = f" of shape {tuple(each.shape)}" if isinstance(each, Tensor) else ""
            raise ArgumentError(
                f"params[{index}] is a {type(each).__name__}{shape} and no parameter of the model. {allowed}"
            )
    return chosen


def check_outside(sampler: Sampler, call: str) -> None:
    """Refuse what goes by the mean while a sample is in the weights.

    Args:
        sampler: The sampler.
        call: What was called.

    Raises:
        UsageError: If it was called inside ``sampled_params()``.
    """
    if sampler.is_open:
        raise UsageError(f"{call} was called inside sampled_params(). Leave the context first.")


def check_losses(losses: Sequence[Any]) -> None:
    """Refuse what has no mean, before the step is taken.

    Args:
        losses: What a closure returned for each sample.

    Raises:
        ArgumentError: If they are no numbers.
    """
    for loss in losses:
        if not isinstance(loss, Tensor | int | float):
            raise ArgumentError(
                f"closure returned {type(loss).__name__}, so that no step was taken. Allowed with several samples: the "
                "loss, a number or a tensor."
            )


def check_ready(sampler: Sampler, layers: Mapping[str, Layer], *, measured: bool) -> None:
    """Refuse a step that has nothing to go by.

    Args:
        sampler: What was sampled since the last step.
        layers: The layers.
        measured: Whether statistics were due.

    Raises:
        UsageError: If no gradient, or no statistics that were due, came from inside ``sampled_params()``.
        NonFiniteError: If samples are missing because their gradients held NaN or infinity.
    """
    if sampler.contexts == 0:
        raise UsageError(
            "step() was called, but nothing was sampled since the last step. Compute the loss and call backward() "
            "inside `with optimizer.sampled_params():`, or pass a closure to step()."
        )
    if sampler.contexts % sampler.num_samples:
        # a sample after one whose gradients were not finite begins the step anew: then the count is not what is wrong
        check_finite({}, {}, _gradients(layers))
        raise UsageError(
            f"num_samples={sampler.num_samples}, but sampled_params() was entered {sampler.contexts} times before "
            "step(). Enter it num_samples times for each batch."
        )
    if all(parameter.grad is None for layer in layers.values() for parameter in layer.parameters.values()):
        raise UsageError("No layer has a gradient: call loss.backward() inside sampled_params(), before step().")
    if measured and not sampler.statistics:
        raise UsageError(
            "No curvature statistics were measured inside sampled_params(). The model must be called as model(x), in "
            "train() mode and with gradients enabled, activation checkpointing with use_reentrant=False; where its "
            "output is no tensor, or with fisher='empirical', the loss must be computed by calling "
            "likelihood(output, target)."
        )


def check_generator_state(generator: torch.Generator | None, state: Tensor | None) -> None:
    """Refuse the state of a generator that another cannot take up.

    Args:
        generator: The generator.
        state: The saved state.

    Raises:
        ArgumentError: If it is of another kind of device.
    """
    if generator is None or state is None:
        return
    try:
        torch.Generator(generator.device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"state_dict has the state of a generator that one on {generator.device} cannot take up ({error}). Load it "
            "into an optimizer whose generator= is on the same kind of device, or that has none."
        ) from error


def _gradients(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The gradients that there are, by parameter."""
    parameters = {key: value for layer in layers.values() for key, value in layer.parameters.items()}
    return {key: value.grad for key, value in parameters.items() if value.grad is not None}


def check_made_by(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of an optimizer whose numbers mean something else.

    Args:
        saved: What the state is of.
        own: What it is to be loaded into.

    Raises:
        ArgumentError: If they differ.
    """
    if differing := sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key)):
        theirs, ours = ({key: kind.get(key) for key in differing} for kind in (saved, own))
        raise ArgumentError(
            f"state_dict is of an optimizer with {theirs}, but this one has {ours}. Load it into one that is made as "
            "that was."
        )
