"""Calling a model with weights that are not its own, leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from bayes_kfac.errors import ArgumentError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Run a model with the given parameters and buffers.

    Args:
        model: The model.
        state: Parameters and buffers by name; those that are missing are the model's own.
        inputs: One argument, a tuple of arguments, or a dictionary of keyword arguments.

    Returns:
        The model's output.

    Raises:
        ArgumentError: If the output is no tensor with a batch dimension.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    output = functional_call(model, dict(state), args, kwargs)
    if not isinstance(output, Tensor) or output.ndim == 0:
        raise ArgumentError(
            f"The model returned {type(output).__name__}, but predictions need a tensor whose first dimension is the "
            "batch. Wrap the model in a module whose forward returns that tensor."
        )
    return output
