"""The examples of a fit, each with its weight, and the batches that are made of them.

An example's weight says how often it was seen. Examples that are equal are one here, with the sum of their weights, in
an order of their own: whatever is made from them depends on *what* was seen how often, not on rows, so that a fit to
weights is the fit to repeated rows, to the last bit, and a repeated example cannot be in training and validation.

Batches hold examples in proportion to their weights, so that a batch's mean loss and curvature are unbiased estimates
of the weighted means without any weight in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

#: How finely weights that are no whole numbers are taken in the one pass of a Laplace fit: copies of a mean example.
COPIES = 10


@dataclass(frozen=True)
class Examples:
    """Different examples and how often each was seen.

    Attributes:
        inputs: ``[examples, features]``.
        targets: ``[examples, outputs]``; class indices are numbers here too.
        weights: ``[examples]``, all positive.
    """

    inputs: Array
    targets: Array
    weights: Array

    @classmethod
    def of(cls, inputs: Array, targets: Array, weights: Array) -> Examples:
        """Examples from rows, of which some may be equal; those of weight 0 are left out.

        Args:
            inputs: ``[rows, features]``.
            targets: ``[rows, outputs]``.
            weights: ``[rows]``.

        Returns:
            The examples.
        """
        rows, row_of = np.unique(np.column_stack([inputs, targets])[weights > 0], axis=0, return_inverse=True)
        sums = np.bincount(row_of.reshape(-1), weights[weights > 0]).astype(np.float64)
        return cls(rows[:, : inputs.shape[1]], rows[:, inputs.shape[1] :], sums)

    def __len__(self) -> int:
        """How many different examples there are."""
        return len(self.weights)

    def __getitem__(self, index: Any) -> Examples:
        """Some of the examples."""
        return Examples(self.inputs[index], self.targets[index], self.weights[index])

    @property
    def total(self) -> float:
        """How many examples were seen, repeated ones as often as they were."""
        return float(self.weights.sum())

    def split(self, fraction: float, random: np.random.RandomState, *, stratified: bool) -> tuple[Examples, Examples]:
        """A part for training and one for validation.

        Args:
            fraction: What part of the different examples is for validation; at least one is, and one is not.
            random: The source of randomness.
            stratified: Whether each part is to have its share of each target.

        Returns:
            The two parts.
        """
        order = random.permutation(len(self))
        if stratified:  # every so many-th of a list in which equal targets stand together
            order = order[np.argsort(self.targets[order, 0], kind="stable")]
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        chosen = order[np.floor((np.arange(count) + 0.5) / count * len(self)).astype(int)]
        is_chosen = np.isin(np.arange(len(self)), chosen)
        return self[~is_chosen], self[is_chosen]

    def drawn(self, count: int, random: np.random.RandomState) -> NDArray[np.int64]:
        """Indices of ``count`` examples in proportion to their weights, each as nearly as whole numbers allow.

        Where all weights are equal and ``count`` is the number of examples, this is a permutation of them.

        Args:
            count: How many.
            random: The source of randomness.

        Returns:
            The indices, in random order.
        """
        order = random.permutation(len(self))  # systematic sampling: a comb of even pitch along the weights' line
        ends = np.cumsum(self.weights[order]) * (count / self.total)
        teeth_before = np.ceil(np.concatenate([[0.0], ends[:-1], [float(count)]]) - random.random_sample())
        return random.permutation(np.repeat(order, np.diff(teeth_before).astype(int)))

    def whole(self, random: np.random.RandomState) -> NDArray[np.int64]:
        """Indices that hold each example in proportion to its weight: exactly, where the weights are whole numbers.

        Others are rounded at random, without bias, to a tenth of their mean.

        Args:
            random: The source of randomness.

        Returns:
            The indices.
        """
        in_least = self.weights / self.weights.min()  # 1 for each, where all are equal
        for counts in (in_least, self.weights):
            if np.all(counts == np.round(counts)) and counts.sum() <= COPIES * len(self):
                return np.repeat(np.arange(len(self)), counts.astype(int))
        return np.sort(self.drawn(COPIES * len(self), random))


class Batches:
    """The examples in batches of nearly equal sizes, drawn anew at each pass; a loader for ``bayes_kfac.fit``.

    Args:
        examples: The examples.
        size: The most that a batch holds.
        random: The source of randomness.
        device: Where batches are to be.
        dtype: Of what dtype inputs and real targets are to be.
        has_classes: Whether targets are class indices.
    """

    def __init__(
        self,
        examples: Examples,
        size: int,
        random: np.random.RandomState,
        *,
        device: torch.device,
        dtype: torch.dtype,
        has_classes: bool,
    ) -> None:
        self.examples = examples
        self.size = size
        self.random = random
        self.inputs = torch.as_tensor(examples.inputs, device=device).to(dtype)
        targets = torch.as_tensor(examples.targets, device=device)
        self.targets = targets[:, 0].long() if has_classes else targets.to(dtype)
        self.weights = torch.as_tensor(examples.weights, device=device).to(dtype)

    def __len__(self) -> int:
        """How many batches there are in a pass."""
        return max(1, -(-len(self.examples) // self.size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of a pass's batches."""
        yield from self._of(self.examples.drawn(len(self.examples), self.random), len(self))

    def whole(self) -> list[tuple[Tensor, Tensor]]:
        """Batches that hold each example in proportion to its weight, as :meth:`Examples.whole` does."""
        drawn = self.examples.whole(self.random)
        return list(self._of(drawn, -(-len(drawn) // max(self.size, 1024))))

    def _of(self, drawn: NDArray[np.int64], parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in np.array_split(drawn, parts):
            index = torch.as_tensor(part, device=self.inputs.device)
            yield self.inputs[index], self.targets[index]
