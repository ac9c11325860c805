"""What a predictor says of some inputs, whoever made it: an object that knows what acquisitions ask for.

A posterior's predictions know everything, and so do those of an estimator with ``predict_distribution``, such as the
library's own. Of another classifier with ``predict_proba`` the mean probabilities are known; of a
regressor whose ``predict`` takes ``return_std=True``, mean and variance; a :class:`Committee` of either knows how its
members differ. Whatever else ``predict`` returns is asked for attributes of the same names: ``probs [n, classes]``,
``sampled_probs [draws, n, classes]``, ``epistemic_variance [n, ...]``, ``entropy`` and ``mutual_information`` ``[n]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from bayes_kfac.batches import without_target
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.mixture import Mixture
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import batch_dim, concatenate, pool
from bayes_kfac.prediction.forward import parts_of


@singledispatch
def predict(
    predictor: Any, inputs: Any, options: Mapping[str, Any], *, generator: torch.Generator | None = None
) -> Any:
    """What a predictor says of some inputs.

    Args:
        predictor: A posterior, or anything with ``predict`` or ``predict_proba``.
        inputs: What it predicts from.
        options: Arguments of :meth:`bayes_kfac.Posterior.predict`; those that are ``None`` are left out.
        generator: The source of randomness, for posteriors.

    Returns:
        The prediction.

    Raises:
        ArgumentError: If it predicts nothing, or options are given for another predictor than a posterior.
    """
    given = _given(options)
    if given:
        name, value = next(iter(given.items()))
        raise ArgumentError(
            f"{name}={value!r} is for predictions of a Posterior, but the predictor is a {type(predictor).__name__}. "
            "Leave it out."
        )
    if hasattr(predictor, "predict_distribution"):
        return predictor.predict_distribution(_as_estimator_takes(predictor, inputs))
    if hasattr(predictor, "predict_proba"):
        return ClassProbabilities(_probabilities(predictor, inputs))
    if not callable(getattr(predictor, "predict", None)):
        advice = " Return its .posterior()." if callable(getattr(predictor, "posterior", None)) else ""
        raise ArgumentError(
            f"A {type(predictor).__name__} has neither predict nor predict_proba. Allowed: a Posterior, an estimator, "
            f"or any object with one of the two.{advice}"
        )
    inputs = _as_estimator_takes(predictor, inputs)
    prediction = _with_stddev(predictor, inputs)
    if isinstance(prediction, tuple):
        mean, stddev = map(_tensor, prediction)
        return Moments(mean, stddev.square())
    return Means(_tensor(prediction)) if _is_array(prediction) else prediction


@predict.register
def _(
    predictor: Posterior | Mixture, inputs: Any, options: Mapping[str, Any], *, generator: torch.Generator | None = None
) -> Any:
    return predictor.predict(for_posterior(predictor, inputs), generator=generator, **_given(options))


def predict_jointly(
    predictor: Any, inputs: Sequence[Any], options: Mapping[str, Any], *, generator: torch.Generator | None = None
) -> list[Any]:
    """Predictions at several inputs by the same functions: a draw is one draw of the weights at all of them.

    Args:
        predictor: A posterior, whose linearised model is drawn from by default, as it is the more trusted; or anything
            whose predictions have ``sampled_probs`` of the same functions at every call, such as a :class:`Committee`.
        inputs: What it predicts from, each maybe a ``DataLoader``.
        options: Arguments of :meth:`bayes_kfac.Posterior.predict`; those that are ``None`` are left out.
        generator: The source of randomness, for posteriors.

    Returns:
        A prediction for each of the inputs.

    Raises:
        UsageError: If the draws of an estimator are not the same functions.
    """
    if hasattr(predictor, "predict_distribution"):
        raise UsageError(
            f"{type(predictor).__name__}.predict_distribution gives each example a distribution of its own, but what "
            "several tell together needs functions that are drawn once for all. Pass a bayes_kfac.Posterior, or choose "
            "by an acquisition that judges each candidate by itself, such as PowerBALD."
        )
    if isinstance(predictor, Mixture):  # the functions of each member, those of one after those of another
        found = [predict_jointly(member, inputs, options, generator=generator) for member in predictor.members]
        return [pool(predictions) for predictions in zip(*found, strict=True)]
    if isinstance(predictor, Posterior):
        given: dict[str, Any] = {"method": "linearized", "num_samples": 128} | _given(options)
        options = {"draws": predictor.sample(given.pop("num_samples"), generator=generator)} | given
    return [
        concatenate([predict(predictor, part, options) for part in parts(predictor, each)])
        if isinstance(each, DataLoader)
        else predict(predictor, each, options)
        for each in inputs
    ]


def parts(predictor: Any, inputs: Any) -> Iterator[Any]:
    """The inputs of a loader's batches one after another, without their targets; anything else in one piece."""
    if not isinstance(inputs, DataLoader):
        yield inputs
        return
    check_order("inputs", inputs)
    device = predictor.device if isinstance(predictor, Posterior | Mixture) else torch.device("cpu")
    yield from parts_of(inputs, device, progress=False)


def check_order(name: str, inputs: Any) -> None:
    """See that an index into the inputs is one into their data set.

    Args:
        name: The argument's name, for the message.
        inputs: The inputs, of any kind.

    Raises:
        ArgumentError: If they are a loader that shuffles, or leaves examples out.
    """
    if not isinstance(inputs, DataLoader):
        return
    advice = "To look at a part of a data set pass DataLoader(Subset(dataset, indices))."
    batches, sampler = inputs.batch_sampler, inputs.sampler
    if batches is not None:  # the loader's own sampler is not used where this one was passed
        sampler = batches.sampler if type(batches) is BatchSampler else batches
    if getattr(batches, "drop_last", False):
        raise ArgumentError(
            f"{name}=DataLoader(drop_last=True) leaves examples out. Allowed: drop_last=False. {advice}"
        )
    if not isinstance(inputs.dataset, IterableDataset) and not isinstance(sampler, SequentialSampler):
        argument = "batch_sampler" if sampler is batches else "sampler"
        given = "shuffle=True" if isinstance(sampler, RandomSampler) else f"{argument}={type(sampler).__name__}(...)"
        raise ArgumentError(
            f"{name}=DataLoader({given}) yields another order than its data set's, so that an index means nothing. "
            f"Allowed: shuffle=False, and no sampler but torch's SequentialSampler. {advice}"
        )


def count(inputs: Any) -> int:
    """The number of examples: of a loader, those that it yields."""
    if not isinstance(inputs, DataLoader):
        return int(tree_leaves(inputs)[0].shape[0])
    check_order("inputs", inputs)
    if inputs.collate_fn is default_collate and not isinstance(inputs.dataset, IterableDataset):
        return len(inputs.dataset)  # type: ignore[arg-type]  # a pool has a length
    return sum(count(without_target(batch)) for batch in inputs)  # what another function makes of items is not known


def ask(prediction: Any, name: str, who: str) -> Any:
    """What a prediction knows, or an error that says who knows it.

    Args:
        prediction: The prediction.
        name: The attribute.
        who: Who asks.

    Returns:
        The attribute.

    Raises:
        UsageError: If it has none.
    """
    if not hasattr(prediction, name):
        known = getattr(prediction, "known", f"a {type(prediction).__name__} does not know")
        raise UsageError(
            f"{who} needs {name}, which {known}. Predictions of a bayes_kfac.Posterior know it, where its likelihood "
            "has it; a Committee of several models knows how they differ."
        )
    return getattr(prediction, name)


def for_posterior(posterior: Posterior | Mixture, inputs: Any) -> Any:
    """Tensors on the posterior's device, and arrays as tensors of its dtype; anything else as it is."""
    posterior = posterior.members[0] if isinstance(posterior, Mixture) else posterior
    if isinstance(inputs, Tensor):
        return inputs.to(posterior.device)
    if hasattr(inputs, "iloc"):
        raise ArgumentError(
            f"inputs are a {type(inputs).__name__}, and the predictor is a Posterior. Allowed: what its model takes. "
            "Pass an array, frame.to_numpy(), or a tensor, as the pool."
        )
    if not isinstance(inputs, np.ndarray):
        return inputs
    dtype = next(value.dtype for value in posterior.mean.values() if value.is_floating_point())
    tensor = torch.as_tensor(inputs, device=posterior.device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# -- what is known of predictors that are no posteriors ---------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """A prediction of which nothing but the mean is known: nothing to choose by, but enough for :class:`Random`.

    Attributes:
        mean: ``[n, ...]``.
    """

    known: ClassVar[str] = (
        "predict alone does not tell; predict_proba of a classifier or predict(return_std=True) of a regressor does"
    )

    mean: Tensor = field(metadata=batch_dim(0))


@dataclass(frozen=True)
class Moments:
    """A prediction of real values by mean and variance.

    Attributes:
        mean: ``[n, ...]``.
        epistemic_variance: The variance that the regressor gives. Where its noise is in it, as in a
            ``GaussianProcessRegressor`` with a ``WhiteKernel``, it is the same for all candidates and changes no rank.
    """

    known: ClassVar[str] = "a mean and a standard deviation do not tell: how much of it is noise is not known"

    mean: Tensor = field(metadata=batch_dim(0))
    epistemic_variance: Tensor = field(metadata=batch_dim(0))


@dataclass(frozen=True)
class ClassProbabilities:
    """A classifier's mean probabilities.

    Attributes:
        probs: ``[n, classes]``.
    """

    known: ClassVar[str] = "predict_proba does not tell, as it has the mean probabilities alone"

    probs: Tensor = field(metadata=batch_dim(0))

    @property
    def entropy(self) -> Tensor:
        """The entropy of the class, ``[n]``, in nats."""
        return torch.special.entr(self.probs).sum(-1)


@dataclass(frozen=True)
class SampledProbabilities:
    """The probabilities of several classifiers.

    Attributes:
        sampled_probs: ``[members, n, classes]``.
    """

    sampled_probs: Tensor = field(metadata=batch_dim(1))

    @property
    def probs(self) -> Tensor:
        """The mean over the members, ``[n, classes]``."""
        return self.sampled_probs.mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of each probability over the members, ``[n, classes]``."""
        return self.sampled_probs.var(0, correction=0)

    @property
    def entropy(self) -> Tensor:
        """The entropy of the mean, ``[n]``, in nats."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def mutual_information(self) -> Tensor:
        """The information about who of the members is right, ``[n]``, in nats."""
        return (self.entropy - torch.special.entr(self.sampled_probs).sum(-1).mean(0)).clamp(min=0)


class Committee:
    """Several models that count as equally likely draws: a deep ensemble, or the trees of a forest.

    Query by committee (Seung, Opper & Sompolinsky 1992) is an acquisition on its predictions: :class:`BALD` is the
    members' mean divergence from their average, :class:`VariationRatio` their vote.

    Args:
        members: At least two models; all with ``predict_proba``, for the same classes, or all with ``predict``, which
            returns numbers.

    Raises:
        ArgumentError: If there are fewer, or they are of another kind.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        if len(self.members) < 2:
            raise ArgumentError(f"members={members!r} do not differ. Allowed: two models or more.")
        kinds = {hasattr(each, "predict_proba") for each in self.members}
        for each in self.members:
            if len(kinds) > 1 or isinstance(each, Posterior) or not (kinds == {True} or hasattr(each, "predict")):
                names = ", ".join(sorted({type(own).__name__ for own in self.members}))
                raise ArgumentError(
                    f"members hold {names}. Allowed: models that all have predict_proba, or that all have predict, "
                    "which returns numbers. Wrap a network in an object with one of the two; a Posterior knows how its "
                    "own draws differ, and needs no Committee; several are a bayes_kfac.Mixture."
                )

    def predict(self, inputs: Any) -> SampledProbabilities | Moments:
        """The members' predictions.

        Args:
            inputs: What they predict from.

        Returns:
            All probabilities, of classifiers; of regressors the mean and variance over the members.

        Raises:
            ArgumentError: If the classifiers do not have the same classes.
        """
        if not hasattr(self.members[0], "predict_proba"):
            means = torch.stack([_tensor(each.predict(_as_estimator_takes(each, inputs))) for each in self.members])
            return Moments(means.mean(0), means.var(0, correction=0))
        probs = [_probabilities(each, inputs) for each in self.members]
        if len({each.shape for each in probs}) > 1:
            raise ArgumentError(
                f"members predict {sorted({each.shape[1] for each in probs})} classes. Allowed: models of the same "
                "classes. Train each on data that hold all of them."
            )
        names = [np.asarray(each.classes_).tolist() for each in self.members if hasattr(each, "classes_")]
        if any(each != names[0] for each in names):
            raise ArgumentError(
                f"members predict different classes: {next(each for each in names if each != names[0])} and "
                f"{names[0]}. Allowed: models of the same classes. Train each on data that hold all of them."
            )
        return SampledProbabilities(torch.stack(probs))


def _with_stddev(predictor: Any, inputs: Any) -> Any:
    """What ``predict`` gives, with standard deviations where it has them; a pipeline only tells when it is asked."""
    try:
        return predictor.predict(inputs, return_std=True)
    except (TypeError, AttributeError):  # it does not take this, or wraps what does and cannot use the pair
        return predictor.predict(inputs)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _probabilities(classifier: Any, inputs: Any) -> Tensor:
    probs = classifier.predict_proba(_as_estimator_takes(classifier, inputs))
    if not _is_array(probs) or probs.ndim != 2:
        raise ArgumentError(
            f"predict_proba of a {type(classifier).__name__} gave no array [n, classes]. Allowed: one target for each "
            "example."
        )
    tensor = _tensor(probs)
    if bool((tensor < 0).any() or ((tensor.sum(-1) - 1).abs() > 1e-2).any()):
        raise ArgumentError(
            f"predict_proba of a {type(classifier).__name__} gave numbers that are negative or do not add up to 1. "
            "Allowed: probabilities [n, classes]. Take the softmax of logits."
        )
    return tensor


def _as_estimator_takes(predictor: Any, inputs: Any) -> Any:
    """Arrays for scikit-learn's estimators; anything else gets what there is."""
    from sklearn.base import BaseEstimator

    return inputs.numpy(force=True) if isinstance(inputs, Tensor) and isinstance(predictor, BaseEstimator) else inputs


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
