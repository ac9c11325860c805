"""What a trainer refuses: wrong kinds of arguments, calls in the wrong order, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayes_kfac.curvature import Layer, Statistics
from bayes_kfac.errors import ArgumentError, NonFiniteError, UnsupportedModelError, UsageError
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.training.sampler import Sampler


def check_types(model: nn.Module, likelihood: Likelihood) -> None:
    """Refuse a model that is no module and a likelihood that is none of the library's.

    Args:
        model: The model.
        likelihood: The likelihood.

    Raises:
        ArgumentError: If one of them is of the wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={model!r} must be an nn.Module.")
    if not isinstance(likelihood, Likelihood):
        raise ArgumentError(
            f"likelihood={likelihood!r} must be one of bayes_kfac.likelihoods, such as Gaussian() or Categorical()."
        )


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The user's own module inside what wraps it, so that its layers have the names that the user gave them.

    Args:
        model: The model, maybe compiled or wrapped in ``DistributedDataParallel``.

    Returns:
        The module, and whether it is trained by several processes.

    Raises:
        UnsupportedModelError: If the model is wrapped in ``DataParallel``, whose replicas no hook sees.
    """
    is_parallel = False
    while True:
        if isinstance(model, nn.DataParallel):
            raise UnsupportedModelError(
                "DataParallel runs replicas of the model, in which no layer can be watched. Wrap the model in "
                "DistributedDataParallel, one process for each device."
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, is_parallel = model.module, True
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # what torch.compile(model) returns
            model = inner
        else:
            return model, is_parallel


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


def check_ready(sampler: Sampler, layers: Mapping[str, Layer], *, measured: bool) -> None:
    """Refuse a step that has nothing to go by.

    Args:
        sampler: What was sampled since the last step.
        layers: The layers.
        measured: Whether statistics were due.

    Raises:
        UsageError: If no gradient, or no statistics that were due, came from inside ``sampled_params()``.
    """
    if sampler.contexts == 0:
        raise UsageError(
            "step() was called, but nothing was sampled since the last step. Compute the loss and call backward() "
            "inside `with optimizer.sampled_params():`, or pass a closure to step()."
        )
    if sampler.contexts % sampler.num_samples:
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


def check_finite(
    statistics: Mapping[str, Statistics], gradients: Mapping[str, Tensor], deterministic: Mapping[str, Tensor]
) -> None:
    """Refuse NaN and infinity before anything is changed.

    Args:
        statistics: The batch's statistics by layer.
        gradients: The gradients by layer.
        deterministic: The gradients of parameters without a posterior, by name.

    Raises:
        NonFiniteError: If any of them holds NaN or infinity; the message names the layer and the statistic.
    """
    advice = "Nothing was updated. Check the batch's data; if it is clean, lower lr or raise extrinsic_damping."
    for name, batch in statistics.items():
        for statistic in batch.non_finite():
            raise NonFiniteError(f"Layer {name!r}: the batch's {statistic!r} statistic holds NaN or infinity. {advice}")
    for kind, tensors in (("Layer", gradients), ("Parameter", deterministic)):
        for name, gradient in tensors.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(f"{kind} {name!r}: the gradient holds NaN or infinity. {advice}")
