"""How the model is trained in each round: a function of the user's, or an estimator's own ``fit``.

``start="cold"`` trains a new model on all labels each round, ``start="warm"`` goes on from the last one.
"""

from __future__ import annotations

import copy
import inspect
import reprlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bayes_kfac.active.pool import Labelled
from bayes_kfac.errors import ArgumentError, check_choice

STARTS = ("cold", "warm")

#: Takes the labelled data, how many of them are new, and the last predictor (``None`` in the first round and in all
#: rounds of a cold start), and returns the predictor.
Trainer = Callable[[Labelled, int, Any], Any]


def trainer_of(learner: Any, start: str) -> Trainer:
    """What trains a learner.

    Args:
        learner: A function of the labelled data and the last predictor that returns a predictor; or an estimator.
        start: ``"cold"`` or ``"warm"``.

    Returns:
        The trainer.

    Raises:
        ArgumentError: If the learner is neither, or cannot start warm.
    """
    is_warm = check_choice("start", start, STARTS) == "warm"
    if isinstance(learner, type):
        raise ArgumentError(f"learner={learner.__name__} is a class. Allowed: an object. Pass {learner.__name__}(...).")
    if callable(getattr(learner, "fit", None)):
        return _going_on(learner) if is_warm else _fitted_anew(learner)
    if not callable(learner) or isinstance(learner, nn.Module):
        raise ArgumentError(
            f"learner={reprlib.repr(learner)} is a {type(learner).__name__}. Allowed: a function "
            "learner(data, previous) that returns a predictor, or an object with fit(inputs, targets) and predict."
        )
    _check_arguments(learner)
    return lambda data, _, previous: learner(data, previous)


def _check_arguments(learner: Callable[..., Any]) -> None:
    """See that a function takes two arguments, before a label is paid for."""
    try:
        signature = inspect.signature(learner)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ArgumentError(
            f"learner{signature} does not take the two arguments (data, previous). Let it take both; previous is None "
            "in the first round and with start='cold'."
        ) from error


def _fitted_anew(estimator: Any) -> Trainer:
    def train(data: Labelled, _: int, previous: Any) -> Any:
        return _fit(_copy(estimator), data)

    return train


def _going_on(estimator: Any) -> Trainer:
    warm_start = getattr(estimator, "warm_start", False)
    if not warm_start and not hasattr(estimator, "partial_fit"):
        raise ArgumentError(
            f"start='warm' needs a learner that can go on, but {type(estimator).__name__} has neither warm_start=True "
            "nor partial_fit. Allowed: start='cold', an estimator made with warm_start=True, or a function "
            "learner(data, previous)."
        )

    def train(data: Labelled, new: int, previous: Any) -> Any:
        if previous is None:
            return _fit(_copy(estimator), data)
        current = copy.deepcopy(previous)  # states of earlier rounds keep theirs, whatever happens in this one
        if warm_start:
            return _fit(current, data)
        recent = Labelled(data.pool, data.indices[-new:], data.targets[-new:])
        current.partial_fit(*_arrays(recent))
        return current

    return train


def _copy(estimator: Any) -> Any:
    from sklearn.base import BaseEstimator, clone

    return clone(estimator) if isinstance(estimator, BaseEstimator) else copy.deepcopy(estimator)


def _fit(estimator: Any, data: Labelled) -> Any:
    fitted = estimator.fit(*_arrays(data))
    return estimator if fitted is None else fitted


def _arrays(data: Labelled) -> tuple[Any, Any]:
    """Inputs and targets as estimators take them: tensors as arrays."""
    inputs = data.inputs
    return inputs.numpy(force=True) if isinstance(inputs, Tensor) else inputs, data.targets.numpy()
