"""The contract of an acquisition: it looks at a pool through a predictor, and selects the examples to label.

What it sees, its *view*, is a prediction of the whole pool where every candidate is judged by itself, and a
:class:`Gains` where it matters what else is picked. Scores are ``[n]``, one for each candidate, and the higher is the
better; information is in nats. Selections are indices into the pool, ``[count]``, distinct, best first.

An acquisition of your own is one class, and one line, ``@register("name")``, if it shall have a name.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, NonFiniteError, check_choice, check_count

A = TypeVar("A", bound="Callable[..., Acquisition]")
_ACQUISITIONS: dict[str, Callable[[], Acquisition]] = {}


class Gains(ABC):
    """What each candidate would add to those that were picked so far."""

    @property
    @abstractmethod
    def scores(self) -> Tensor:
        """The gain of each candidate given the picked ones, ``[n]``."""

    @abstractmethod
    def add(self, index: int) -> None:
        """Pick a candidate.

        Args:
            index: Which.
        """


class Acquisition(ABC):
    """Judges the candidates of a pool."""

    @abstractmethod
    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:
        """What this acquisition needs to know of the candidates.

        Args:
            predictor: A posterior, or anything that predicts.
            inputs: The candidates.
            generator: The source of randomness.

        Returns:
            The view, for :meth:`scores` and :meth:`select`.
        """

    @abstractmethod
    def scores(self, view: Any) -> Tensor:
        """How good each candidate is by itself, ``[n]``; the higher the better."""

    def select(self, view: Any, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The candidates to label: here those with the highest scores.

        Args:
            view: From :meth:`look`.
            count: How many.
            generator: The source of randomness, for acquisitions that draw.

        Returns:
            Their indices, ``[count]``, distinct, best first.

        Raises:
            ArgumentError: If there are fewer candidates.
            NonFiniteError: If a score is not a number.
        """
        return highest(self.scores(view), count)


def register(name: str) -> Callable[[A], A]:
    """Decorator that gives an acquisition a name: its class, or a function that makes it.

    Args:
        name: What users write for it.

    Returns:
        The decorator.

    Raises:
        ArgumentError: If it is no string, or the name of another acquisition. One that is defined again, as when a cell
            of a notebook runs a second time, takes its own place.
    """
    if not isinstance(name, str):
        raise ArgumentError(f'name={name!r} is not a string. Write @register("name") over the class.')

    def decorate(acquisition: A) -> A:
        held = _ACQUISITIONS.get(name, acquisition)
        if _origin(held) != _origin(acquisition):
            raise ArgumentError(f"name={name!r} is that of {_origin(held)}. Allowed: a name that is not in use.")
        _ACQUISITIONS[name] = acquisition
        return acquisition

    return decorate


def _origin(acquisition: Callable[..., Acquisition]) -> str:
    """Where an acquisition was defined."""
    return f"{acquisition.__module__}.{getattr(acquisition, '__qualname__', type(acquisition).__qualname__)}"


def available() -> tuple[str, ...]:
    """The names of the acquisitions."""
    return tuple(sorted(_ACQUISITIONS))


def get(acquisition: str | Acquisition) -> Acquisition:
    """Make an acquisition by its name.

    Args:
        acquisition: One of :func:`available`, with its default options; or an acquisition, which is returned.

    Returns:
        The acquisition.

    Raises:
        ArgumentError: If there is none of this name, or it is neither.
    """
    if isinstance(acquisition, Acquisition):
        return acquisition
    if not isinstance(acquisition, str):
        raise ArgumentError(
            f"acquisition={acquisition!r} is no acquisition. Allowed: {', '.join(map(repr, available()))}, or an "
            "object such as BALD()."
        )
    return _ACQUISITIONS[check_choice("acquisition", acquisition, available())]()


def highest(scores: Tensor, count: int) -> Tensor:
    """The candidates with the highest scores.

    Args:
        scores: ``[n]``.
        count: How many.

    Returns:
        Their indices, ``[count]``, best first.

    Raises:
        ArgumentError: If there are fewer candidates.
        NonFiniteError: If a score is not a number.
    """
    scores = check_scores(scores)
    check_enough(count, len(scores))
    return check_numbers(scores).topk(count).indices.cpu()


def greedy(gains: Gains, count: int) -> Tensor:
    """Pick the candidate with the greatest gain, again and again.

    For a monotone submodular gain, such as information about the weights, the result is at least ``1 − 1/e`` of the
    best (Nemhauser, Wolsey and Fisher, 1978).

    Args:
        gains: The gains; the picked candidates are added to it.
        count: How many.

    Returns:
        Their indices, ``[count]``, in the order in which they were picked.

    Raises:
        ArgumentError: If there are fewer candidates.
        NonFiniteError: If a gain is not a number.
    """
    picked: list[int] = []
    for _ in range(check_count("count", count)):
        scores = check_numbers(check_scores(gains.scores)).clone()
        check_enough(count, len(scores))
        scores[picked] = -torch.inf
        picked.append(int(scores.argmax()))
        gains.add(picked[-1])
    return torch.tensor(picked)


def check_enough(count: int, candidates: int) -> None:
    """See that there are as many candidates as shall be picked.

    Args:
        count: How many to pick.
        candidates: How many there are.

    Raises:
        ArgumentError: If there are fewer.
    """
    if check_count("count", count) > candidates:
        raise ArgumentError(f"count={count} is more than the {candidates} candidates. Allowed: 1 to {candidates}.")


def check_scores(scores: Tensor, candidates: int | None = None) -> Tensor:
    """The scores, if they are one number for each candidate.

    Args:
        scores: What an acquisition made.
        candidates: How many candidates there are, where that is known.

    Returns:
        The scores, in a floating-point dtype.

    Raises:
        ArgumentError: If they are not.
    """
    if not isinstance(scores, Tensor):
        raise ArgumentError(
            f"scores are a {type(scores).__name__}. Allowed: a tensor [n]. Use torch.as_tensor(scores)."
        )
    if scores.ndim != 1 or candidates not in (None, len(scores)):
        many = "n" if candidates is None else candidates
        raise ArgumentError(f"scores have the shape {tuple(scores.shape)}. Allowed: ({many},), one for each candidate.")
    return scores if scores.is_floating_point() else scores.double()


def check_selection(chosen: Tensor, count: int, candidates: int) -> Tensor:
    """The selection, if it is as many distinct indices of candidates as were asked for.

    Args:
        chosen: What an acquisition selected.
        count: How many it was asked for.
        candidates: How many candidates there are.

    Returns:
        The selection.

    Raises:
        ArgumentError: If it is not.
    """
    are_indices = isinstance(chosen, Tensor) and chosen.shape == (count,) and chosen.dtype in (torch.long, torch.int32)
    if not are_indices or len(chosen.unique()) < count or chosen.min() < 0 or chosen.max() >= candidates:
        raise ArgumentError(
            f"The acquisition selected {reprlib.repr(chosen)}. Allowed: a tensor of {count} distinct indices from 0 to "
            f"{candidates - 1}."
        )
    return chosen


def check_numbers(scores: Tensor) -> Tensor:
    """See that no score is NaN, which would count as the highest of all.

    Args:
        scores: One for each candidate, ``[n]``.

    Returns:
        The scores.

    Raises:
        NonFiniteError: If one is.
    """
    if bool(scores.isnan().any()):
        raise NonFiniteError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN, the first that of candidate "
            f"{int(scores.isnan().int().argmax())}. Are its inputs finite, and the predictor's weights?"
        )
    return scores
