"""Sampled prediction: reusable weight draws, and the model's outputs under each of them.

Small models spend their time on starting operations rather than on doing them, so several draws are run at once by
``torch.vmap`` where the model allows it. Large ones gain nothing by it, and lose where the activations of several draws
do not fit the caches: they are run draw by draw.
"""

from __future__ import annotations

import copy
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bayes_kfac.curvature import Layer
from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction.forward import at_least_float32, call, check_batch, evaluating

#: Bytes of weights and activations that are run at once: on a CPU what pays off by measurement, since they have to stay
#: in the caches; on accelerators, where starting an operation costs more, a bound of the memory.
CPU_CHUNK_BYTES = 2**23
ACCELERATOR_CHUNK_BYTES = 2**28
#: Fewer draws at once than this gain nothing, by measurement.
FEWEST_DRAWS = 8
#: How many times the bytes of its inputs and outputs a model's activations are taken to be.
ACTIVATIONS = 16


@dataclass(frozen=True)
class Draws:
    """Weights drawn from a posterior: the same functions at every call that they are passed to.

    Attributes:
        values: For each parameter with a posterior, the drawn values, ``[num_samples, *parameter.shape]``.
    """

    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.values.values())).shape[0]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The draws one by one, each a dictionary of parameters by name."""
        for index in range(len(self)):
            yield {name: value[index] for name, value in self.values.items()}


def check_draws(draws: object, layers: Mapping[str, Layer]) -> None:
    """See that draws are of the weights of a posterior: others would be left aside, or leave its own at the mean.

    Args:
        draws: What was passed as ``draws=``.
        layers: The posterior's layers.

    Raises:
        ArgumentError: If they are no draws, or of other parameters.
    """
    advice = "Draw them from this posterior: draws=posterior.sample(num_samples)."
    if not isinstance(draws, Draws):
        raise ArgumentError(f"draws={reprlib.repr(draws)} is not allowed. Allowed: Draws. {advice}")
    given = {name: tuple(value.shape[1:]) for name, value in draws.values.items()}
    own = {name: tuple(value.shape) for layer in layers.values() for name, value in layer.parameters.items()}
    differing = sorted(name for name in given.keys() | own.keys() if given.get(name) != own.get(name))
    if differing:
        details = "".join(f"\n  {name}: draws {given.get(name)}, posterior {own.get(name)}" for name in differing[:8])
        raise ArgumentError(f"draws= are of another posterior. {advice} What differs:{details}")


def sampled_outputs(model: nn.Module, state: Mapping[str, Tensor], draws: Draws, inputs: Any) -> Tensor:
    """The model's outputs under each draw; differentiable in inputs that require gradients.

    Args:
        model: The model; left as it was.
        state: All parameters and buffers at the mean.
        draws: The draws.
        inputs: The model's input.

    Returns:
        ``[num_samples, batch, ...]``, at least in float32.

    Raises:
        ArgumentError: If the inputs hold no example.
    """
    check_batch(inputs)
    keeps_graph = torch.is_grad_enabled() and any(
        leaf.requires_grad for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)
    )
    state = {name: value.detach() for name, value in state.items()}
    with evaluating(model), torch.set_grad_enabled(keeps_graph):
        # the first draw as a plain call: errors of the model itself are raised as they are
        first, *others = draws
        output = call(model, {**state, **first}, inputs)
        chunk = _chunk_size(first, inputs, output)
        is_worth_it = min(chunk, len(others)) >= FEWEST_DRAWS
        rest = _vectorized(model, state, draws, inputs, chunk) if is_worth_it else None
        if rest is None:
            return at_least_float32(torch.stack([output, *(call(model, {**state, **draw}, inputs) for draw in others)]))
        return at_least_float32(torch.cat([output.unsqueeze(0), rest]))


def _chunk_size(draw: Mapping[str, Tensor], inputs: Any, output: Tensor) -> int:
    """How many draws to run at once."""
    budget = CPU_CHUNK_BYTES if output.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    data = [output, *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    return budget // max(1, _bytes(draw.values()) + ACTIVATIONS * _bytes(data))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # sparse tensors have no nbytes


def _vectorized(
    model: nn.Module, state: Mapping[str, Tensor], draws: Draws, inputs: Any, chunk_size: int
) -> Tensor | None:
    """The outputs of all draws but the first, several at once, or ``None`` where the model does not allow that."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None  # hooks are for watching: they would see, and maybe keep, tensors that are none outside of vmap
    try:
        # a copy that shares the tensors: what a forward pass keeps in the model's attributes must not outlive vmap
        shadow = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        with warnings.catch_warnings():
            # vmap's own fallback to a loop over draws is no faster than ours
            warnings.filterwarnings("error", message="There is a performance drop")
            run = torch.vmap(lambda draw: call(shadow, {**state, **draw}, inputs), chunk_size=chunk_size)
            return run({name: value[1:] for name, value in draws.values.items()})
    except Exception:  # vmap refuses what it cannot do; an error of the model itself comes again from the plain calls
        return None
