"""Which models have curvature: what wraps a module, and what becomes of parameters that no block covers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from bayes_kfac.curvature.layers import Layer, find_layers
from bayes_kfac.errors import ArgumentError, UnsupportedModelError, check_choice
from bayes_kfac.likelihoods import Likelihood

OTHERS = ("error", "diagonal", "deterministic")


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


def find_covered(
    model: nn.Module, parameters: Collection[nn.Parameter], others: str
) -> tuple[dict[str, Layer], dict[str, str]]:
    """:func:`find_layers`, with what the user said about parameters that no block covers.

    Args:
        model: The model.
        parameters: Which parameters to sort.
        others: ``"error"``, ``"diagonal"`` or ``"deterministic"``.

    Returns:
        The layers by name, and for each parameter that no layer covers the reason why.

    Raises:
        UnsupportedModelError: If there is no block, or a parameter is not covered and ``others="error"``.
    """
    check_choice("others", others, OTHERS)
    layers, reasons = find_layers(model, parameters, rest="diagonal" if others == "diagonal" else "none")
    _check_coverage(layers, reasons, others)
    return layers, reasons


def _check_coverage(layers: Mapping[str, Layer], reasons: Mapping[str, str], others: str) -> None:
    listing = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    if not layers:
        raise UnsupportedModelError(
            f"The model has no layer with a curvature block. Its trainable parameters:{listing or ' none'}"
        )
    if reasons and others == "error":
        raise UnsupportedModelError(
            f"No curvature block covers these parameters:{listing}\nPass others='diagonal' to give each an independent "
            "Gaussian, others='deterministic' to keep point estimates of them, leave them out (params= of a trainer, "
            "subset= of a Laplace fit, requires_grad_(False)), or register an adapter with "
            "bayes_kfac.curvature.register."
        )
