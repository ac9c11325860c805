"""The pool, and what of it is labelled.

A pool is anything with rows: a tensor or array ``[n, ...]``, a data frame, or a map-style torch ``Dataset``, which may
be larger than memory: its examples are read in batches, and only scores or probabilities are kept. Items of a data set
are inputs, or what a loader would make a batch of, such as pairs of input and target; targets come from the oracle
alone.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from bayes_kfac.batches import without_target
from bayes_kfac.errors import ArgumentError, NonFiniteError, TargetError, check_count


def size_of(pool: Any) -> int:
    """The number of examples of a pool.

    Args:
        pool: The pool.

    Returns:
        How many.

    Raises:
        ArgumentError: If it has no rows.
    """
    if isinstance(pool, Tensor) and pool.ndim == 0:
        raise ArgumentError("pool is a tensor without dimensions. Allowed: a tensor [n, ...].")
    if hasattr(pool, "shape"):  # sparse matrices have no length
        return int(pool.shape[0])
    if not (hasattr(pool, "__len__") and hasattr(pool, "__getitem__")) or isinstance(pool, DataLoader):
        raise ArgumentError(
            f"pool is a {type(pool).__name__}. Allowed: a tensor or array [n, ...], a data frame, or a torch Dataset "
            "with a length. Pass the data set of a loader."
        )
    return len(pool)


def check_pool(pool: Any) -> int:
    """See that a pool has rows, and is no nested list of numbers, whose items would be taken for pairs.

    Args:
        pool: The pool.

    Returns:
        How many examples it has.

    Raises:
        ArgumentError: If it has none, or is such a list.
    """
    size = size_of(pool)
    first = pool[0] if isinstance(pool, list | tuple) and pool else None
    if isinstance(first, Number | list | tuple) and all(isinstance(leaf, Number) for leaf in tree_leaves(first)):
        raise ArgumentError(
            f"pool is a {type(pool).__name__} of numbers. Allowed: a tensor or array [n, ...], a data frame, or a "
            "torch Dataset with a length. Pass torch.tensor(pool)."
        )
    return size


def inputs_at(pool: Any, indices: Tensor) -> Any:
    """Some of the inputs together, of the pool's own kind; examples of a data set as a batch.

    Args:
        pool: The pool.
        indices: Which, ``[count]``.

    Returns:
        The inputs.
    """
    if isinstance(pool, Tensor):
        return pool[indices.to(pool.device)]
    if hasattr(pool, "shape"):
        return getattr(pool, "iloc", pool)[indices.numpy()]
    return default_collate([input_at(pool, int(index)) for index in indices])


def input_at(pool: Any, index: int) -> Any:
    """One input.

    Args:
        pool: The pool.
        index: Which.

    Returns:
        The input, without a target.
    """
    item = getattr(pool, "iloc", pool)[index]
    return item if hasattr(pool, "shape") else without_target(item)


def candidates_at(pool: Any, indices: Tensor, batch_size: int) -> Any:
    """Some of the inputs for an acquisition to look at: together where the pool is in memory, else a ``DataLoader``.

    Args:
        pool: The pool.
        indices: Which, ``[count]``.
        batch_size: How many at once.

    Returns:
        The inputs.
    """
    if hasattr(pool, "shape"):
        return inputs_at(pool, indices)
    return DataLoader(Subset(pool, indices.tolist()), batch_size)


class Labelled(Dataset[tuple[Any, Tensor]]):
    """The labelled part of a pool: a data set of pairs of input and target, in the order in which they were labelled.

    Attributes:
        pool: The pool.
        indices: Where the inputs are in it, ``[labels]``.
        targets: Their targets, ``[labels, ...]``.
    """

    def __init__(self, pool: Any, indices: Tensor, targets: Tensor) -> None:
        self.pool, self.indices, self.targets = pool, indices, targets

    def __repr__(self) -> str:
        return f"Labelled({len(self)} of {size_of(self.pool)} examples)"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return input_at(self.pool, int(self.indices[index])), self.targets[index]

    @property
    def inputs(self) -> Any:
        """All inputs together, of the pool's own kind: a tensor of a tensor, an array of an array."""
        return inputs_at(self.pool, self.indices)


def check_oracle(oracle: Any, size: int) -> None:
    """See that targets, where all of them are given, are as many as the pool.

    Args:
        oracle: The oracle.
        size: The pool's.

    Raises:
        ArgumentError: If they are not.
    """
    if not callable(oracle) and (isinstance(oracle, list | tuple) or hasattr(oracle, "shape")):
        count = size_of(oracle)
        if count != size:
            raise ArgumentError(f"oracle holds {count} targets for a pool of {size} examples. Allowed: one for each.")


def answer(oracle: Any, pool: Any, indices: Tensor) -> Tensor:
    """Ask the oracle.

    Args:
        oracle: A function of the inputs; or all targets, or anything else that is indexed by ``[count]`` indices.
        pool: The pool.
        indices: What to ask about.

    Returns:
        The targets, ``[count, ...]``.

    Raises:
        ArgumentError: If the oracle can be neither called nor indexed.
        TargetError: If it gives no numbers, or not one target for each index.
        NonFiniteError: If it gives NaN or infinity.
    """
    if callable(oracle):
        targets = oracle(inputs_at(pool, indices))
    elif isinstance(oracle, list | tuple):
        targets = [oracle[int(index)] for index in indices]
    elif hasattr(oracle, "__getitem__"):
        targets = getattr(oracle, "iloc", oracle)[indices.numpy() if hasattr(oracle, "shape") else indices]
    else:
        raise ArgumentError(
            f"oracle={oracle!r} is a {type(oracle).__name__}. Allowed: a function of inputs that returns targets, an "
            "array or tensor of all targets, or an object with __getitem__ that takes a tensor of indices."
        )
    if not isinstance(targets, Tensor):
        array = np.asarray(targets)
        if array.dtype.kind not in "biuf":
            raise TargetError(
                "The oracle returned None. Allowed: the targets. Is a return missing?"
                if targets is None
                else f"The oracle gave targets of dtype {array.dtype}. Allowed: numbers. Encode classes as 0, 1, ...: "
                "names, labels = numpy.unique(labels, return_inverse=True)."
            )
        targets = torch.tensor(array)  # a copy: arrays of frames may be read-only
    targets = targets.detach().cpu()
    if targets.ndim == 0 or len(targets) != len(indices):
        raise TargetError(
            f"The oracle gave targets of shape {tuple(targets.shape)} for {len(indices)} inputs. Allowed: one for each."
        )
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        where = (~targets.isfinite()).flatten(1).any(1) if targets.ndim > 1 else ~targets.isfinite()
        raise NonFiniteError(f"The oracle gave NaN or infinity for the indices {indices[where].tolist()}.")
    return targets


def stratified(targets: Any, per_class: int, *, seed: int = 0) -> Tensor:
    """As many examples of each class, drawn at random: an initial set for a benchmark, where all targets are known.

    Args:
        targets: The class of each example of the pool, ``[n]``: a number or a name.
        per_class: How many of each class.
        seed: Of the choice.

    Returns:
        Their indices, ``[classes · per_class]``.

    Raises:
        ArgumentError: If a class has fewer examples.
    """
    per_class = check_count("per_class", per_class)
    names, codes = np.unique(np.asarray(targets), return_inverse=True)
    classes = torch.tensor(codes).flatten()
    generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))
    chosen = []
    for code, name in enumerate(names.tolist()):
        members = (classes == code).nonzero().squeeze(1)
        if len(members) < per_class:
            raise ArgumentError(f"per_class={per_class} is more than the {len(members)} examples of class {name!r}.")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)
