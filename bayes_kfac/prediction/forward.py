"""Calling a model with weights that are not its own, watched or not, leaving it as it was.

All of it changes the model for a while: tensors are swapped, modes switched, hooks put on. :func:`exclusive` keeps
other threads off meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from bayes_kfac import batches, linalg
from bayes_kfac.batches import expect_output_tensor
from bayes_kfac.curvature import PullBack, Recorder
from bayes_kfac.errors import ArgumentError
from bayes_kfac.progress import progress_bar

#: Beside the models, since what holds a lock can be neither copied nor pickled.
_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def exclusive(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep a model to this thread, in which it may be nested; other threads that ask for it wait."""
    return _LOCKS.setdefault(model, RLock())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, in this thread alone, and each back into its own mode afterwards."""
    with exclusive(model), training(model, False):
        yield


@contextmanager
def training(model: nn.Module, mode: bool = True) -> Iterator[None]:
    """Put every module into training mode, or out of it, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, own in modes:
            module.training = own


def differentiable(tensor: Tensor) -> Tensor:
    """The same values as a tensor that autograd accepts: one made under ``inference_mode`` is copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def at_least_float32(output: Tensor) -> Tensor:
    """An output in the precision of predictions: 16 bits are too few for moments, and torch has no algebra for them."""
    return output.to(linalg.algebra_dtype(output.dtype))


def parts_of(loader: Iterable[Any], device: torch.device, progress: bool) -> Iterator[Any]:
    """The inputs of a loader's batches, one after the other.

    Args:
        loader: Any iterable of batches as :func:`bayes_kfac.batches.inputs_of` takes them.
        device: Where to put them.
        progress: Whether a bar is shown.

    Yields:
        What a model is called with for each batch that holds any example, on that device.

    Raises:
        ArgumentError: If none does.
    """
    is_empty = True
    for batch in progress_bar(loader, desc="predict", unit="batch", shown=progress):
        inputs = batches.inputs_of(batch, device)
        if batches.batch_size(inputs) != 0:
            is_empty = False
            yield inputs
    if is_empty:
        raise ArgumentError(f"inputs=<{type(loader).__name__}> yielded no example. Pass at least one.")


def check_batch(inputs: Any, name: str = "inputs") -> None:
    """Refuse what a model cannot be called with: a loader, and no examples, of which no output has a shape.

    Args:
        inputs: What a model is to be called with.
        name: The argument's name, for the message.

    Raises:
        ArgumentError: If it is such.
    """
    if isinstance(inputs, DataLoader):
        raise ArgumentError(
            f"{name}=<{type(inputs).__name__}> is for predict() alone. Allowed: what the model is called with. Pass "
            "one batch after another, or the inputs of all batches together."
        )
    if batches.batch_size(inputs) == 0:
        raise ArgumentError(f"{name} hold no example: their first dimension is 0. Pass at least one.")


@contextmanager
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other parameters and buffers for a while; tied ones in all their places.

    Args:
        model: The model.
        state: Parameters and buffers by name; those that are missing are the model's own. A forward pass may change
            buffers in place, so that these are copied.
    """
    with exclusive(model):
        buffers = dict(model.named_buffers())
        named = {**dict(model.named_parameters()), **buffers}
        values = {
            named[name]: value.clone() if name in buffers else value for name, value in (buffers | dict(state)).items()
        }
        homes: list[dict[str, Any]] = [
            own for module in model.modules() for own in (module._parameters, module._buffers)
        ]
        before = [(own, name, tensor) for own in homes for name, tensor in own.items() if tensor in values]
        try:
            for own, name, tensor in before:
                own[name] = values[tensor]
            yield
        finally:
            for own, name, tensor in before:
                own[name] = tensor


def call(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Run a model with the given parameters and buffers.

    Args:
        model: The model.
        state: Parameters and buffers by name; those that are missing are the model's own.
        inputs: One argument, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The model's output: a tensor, or the one that stands out in what it returned.

    Raises:
        ArgumentError: If there is no such tensor with a batch dimension, or the input is a single example.
    """
    with holding(model, state):
        output = expect_output_tensor(batches.call(model, inputs))
    batches.check_has_batch(inputs, output)
    return output


@contextmanager
def watched(
    recorder: Recorder,
    model: nn.Module,
    state: Mapping[str, Tensor],
    inputs: Any,
    *,
    keeps_graph: bool = False,
    **options: Any,
) -> Iterator[tuple[Tensor, PullBack]]:
    """Run a model in evaluation mode, and see the use of every layer.

    Only the weights of the recorder's layers are in the graph: with the last layer alone it costs a forward pass.

    Args:
        recorder: Watches the layers.
        model: The model; left as it was.
        state: All parameters and buffers.
        inputs: The model's input.
        keeps_graph: Whether what is seen stays in the autograd graph, for derivatives of it.
        options: Further arguments of :class:`PullBack`.

    Yields:
        The output, in the graph, and what pulls its gradients back.
    """
    weights = {name for layer in recorder.layers.values() for name in layer.parameters}
    # without a graph no Jacobian would be seen, and a covariance would be a silent zero
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        recorder.keeps_graph = keeps_graph
        recorder.attach()
        try:
            attached = {
                name: differentiable(value).detach().requires_grad_(name in weights) for name, value in state.items()
            }
            # in the model for as long as there may be a backward pass, in which checkpoints run parts of it again
            with holding(model, attached):
                output = expect_output_tensor(batches.call(model, tree_map_only(Tensor, differentiable, inputs)))
                batches.check_has_batch(inputs, output)
                recorder.is_recording = False
                yield output, recorder.pull_back(output, parameters=attached, **options)
        finally:
            recorder.is_recording = True
            recorder.detach()
