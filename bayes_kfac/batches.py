"""What batches, inputs and outputs may look like: tensors, and the collections that people pass around.

A batch is ``(inputs, target)`` or ``(inputs, target, mask)``, or a mapping or dataclass with a field for the target.
Inputs are one argument of the model, a tuple of arguments, or a mapping of keyword arguments; in a batch a list of
tensors is such a tuple too, because loaders make one of it. An output is a tensor ``[batch, ...]``, or a collection in
which one tensor stands out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bayes_kfac.errors import ArgumentError

#: The fields of an output that are it by their name, in this order.
OUTPUT_NAMES = ("logits", "output")
#: The fields of a batch that are its target by their name.
TARGET_NAMES = ("target", "targets", "label", "labels")


class Batch(NamedTuple):
    """A batch taken apart.

    Attributes:
        inputs: What the model is called with.
        target: The targets.
        mask: Which of them there are; ``None`` for all.
    """

    inputs: Any
    target: Tensor
    mask: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it holds no example."""
        return tuple(getattr(self.target, "shape", ())[:1]) == (0,)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*_moved(tuple(self), device))


def unpack(batch: Any) -> Batch:
    """Take a batch of a loader apart.

    Args:
        batch: ``(inputs, target)``, ``(inputs, target, mask)``, or a mapping, dataclass or longer named tuple with one
            field of the names ``target``, ``targets``, ``label`` or ``labels``, maybe one named ``mask``, and the
            model's keyword arguments.

    Returns:
        The batch.

    Raises:
        ArgumentError: If it is none of these, or a single example.
    """
    found = _apart(batch)
    if isinstance(found.target, Tensor) and found.target.ndim == 0:
        raise ArgumentError(
            "loader yielded a target without a dimension: a single example. Allowed: batches, whose first dimension is "
            "that of examples. Pass DataLoader(data, batch_size=32, shuffle=True)."
        )
    return found


def _apart(batch: Any) -> Batch:
    """:func:`unpack` of a batch or of a data set's item."""
    fields_of_tuple = getattr(batch, "_fields", ("inputs", "target", "mask"))
    if isinstance(batch, tuple | list) and (len(batch) == 2 or (len(batch) == 3 and fields_of_tuple[2] == "mask")):
        inputs, *others = batch
        return Batch(_arguments(inputs), *others)
    has_names = isinstance(batch, Mapping) or is_dataclass(batch) or hasattr(batch, "_fields")
    named = _named(batch) if has_names else {}
    found = [name for name in TARGET_NAMES if name in named]
    if len(found) != 1:
        what = f"the fields {sorted(map(str, named))}" if named else f"a {type(batch).__name__}"
        raise ArgumentError(
            f"loader yielded {what}. Allowed: (inputs, target), (inputs, target, mask), or a mapping or dataclass with "
            f"exactly one of the fields {', '.join(TARGET_NAMES)}."
        )
    target, mask = named.pop(found[0]), named.pop("mask", None)
    return Batch(named, target, mask)


def check_has_batch(inputs: Any, output: Tensor) -> None:
    """Refuse one example in the place of a batch, whose outputs would pass for examples.

    Args:
        inputs: What the model was called with.
        output: What it returned.

    Raises:
        ArgumentError: If the input is one row of numbers and the output another number of them.
    """
    if isinstance(inputs, Tensor) and inputs.ndim == output.ndim == 1 and len(inputs) != len(output):
        raise ArgumentError(
            f"The model made an output of shape {tuple(output.shape)} of an input of shape {tuple(inputs.shape)}: "
            "a single example's. Allowed: batches, whose first dimension is that of examples, such as inputs[None]."
        )


def inputs_of(batch: Any, device: torch.device) -> Any:
    """What a model is called with for a batch of a loader, with targets or without.

    Args:
        batch: A batch as in :func:`unpack`; a tensor; a list of one tensor, as loaders make of a data set without
            targets; or a mapping of keyword arguments.
        device: Where to put it.

    Returns:
        The inputs, on that device.
    """
    return _moved(without_target(batch), device)


def without_target(batch: Any) -> Any:
    """The inputs of a batch, or of an item of a data set, where they are; see :func:`inputs_of`."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    try:
        return _apart(batch).inputs
    except ArgumentError:
        return batch


def batch_size(inputs: Any) -> int | None:
    """The first dimension of all tensors that a model is called with, where it is one."""
    sizes = {len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _arguments(inputs: Any) -> Any:
    """A tuple of arguments of the list that ``default_collate`` makes of it; anything else as it is."""
    is_list = isinstance(inputs, list) and all(isinstance(each, Tensor) for each in inputs)
    return tuple(inputs) if is_list else inputs


def _moved(collection: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, collection)


def weighing_examples(mask: Tensor) -> Tensor:
    """Which examples of a batch have anything that weighs, ``[batch]``, for a mask ``[batch, ...]``."""
    return mask.reshape(len(mask), -1).any(1)


def count_examples(mask: Tensor) -> float:
    """How many examples of a batch have anything that weighs, for a mask ``[batch, ...]``."""
    return float(weighing_examples(mask).sum())


def widened(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask of a tensor's leading dimensions with as many dimensions as the tensor."""
    return mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim))


def call(function: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with its inputs.

    Args:
        function: The model.
        inputs: One argument, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        What it returns.
    """
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)


def output_tensor(output: Any) -> Tensor | None:
    """Find the output among what a model returned.

    A tensor is itself. Of a mapping, a dataclass or a named tuple (and their likes, such as ``ModelOutput``) it is the
    field ``logits`` or ``output``; of any collection the only floating-point tensor with a batch dimension.

    Args:
        output: What the model returned.

    Returns:
        The tensor, or ``None`` where none stands out.
    """
    if isinstance(output, Tensor):
        return output if output.ndim else None
    named = _named(output)
    for name in OUTPUT_NAMES:
        value = named.get(name)
        if isinstance(value, Tensor):
            return value
    tensors = [v for v in named.values() if isinstance(v, Tensor) and v.ndim and v.is_floating_point()]
    return tensors[0] if len(tensors) == 1 else None


def expect_output_tensor(output: Any) -> Tensor:
    """:func:`output_tensor`, or an error that says what to do.

    Args:
        output: What the model returned.

    Returns:
        The tensor.

    Raises:
        ArgumentError: If none stands out.
    """
    tensor = output_tensor(output)
    if tensor is None:
        raise ArgumentError(
            f"The model returned {type(output).__name__}. Allowed: a tensor whose first dimension is the batch, or a "
            f"collection with one such tensor or with one named {' or '.join(map(repr, OUTPUT_NAMES))}. Wrap the model "
            "in a module whose forward returns that tensor."
        )
    return tensor


def _named(collection: Any) -> dict[Any, Any]:
    if isinstance(collection, Mapping):
        return dict(collection)
    if is_dataclass(collection):
        return {field.name: getattr(collection, field.name) for field in fields(collection)}
    if isinstance(collection, tuple | list):
        return dict(zip(getattr(collection, "_fields", range(len(collection))), collection, strict=True))
    return {}
