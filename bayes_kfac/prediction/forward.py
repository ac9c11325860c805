"""Calling a model with weights that are not its own, leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from bayes_kfac import batches
from bayes_kfac.batches import expect_output_tensor


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


def differentiable(tensor: Tensor) -> Tensor:
    """The same values as a tensor that autograd accepts: one made under ``inference_mode`` is copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def call(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Run a model with the given parameters and buffers.

    Args:
        model: The model.
        state: Parameters and buffers by name; those that are missing are the model's own.
        inputs: One argument, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The model's output: a tensor, or the one that stands out in what it returned.

    Raises:
        ArgumentError: If there is no such tensor with a batch dimension.
    """
    # buffers are copied: a forward pass may change them in place, and the state is not its to change
    buffers = dict(model.named_buffers())
    own = {name: value.clone() if name in buffers else value for name, value in (buffers | dict(state)).items()}

    def function(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, own, args, kwargs)

    return expect_output_tensor(batches.call(function, inputs))
