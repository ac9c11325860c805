"""Acquisitions that judge candidates together, so that a batch does not ask the same question twice.

What a batch tells depends on how its candidates' targets vary together: in closed form for real-valued targets, over
draws for classes. The likelihood chooses, by one line each of ``information_gains.register`` and
``predictive_gains.register``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

from bayes_kfac.active.base import Acquisition, Gains, greedy, register
from bayes_kfac.active.gaussian import GaussianGains, GaussianPredictiveGains
from bayes_kfac.active.predictors import count, for_posterior, predict_jointly
from bayes_kfac.active.sampled import SampledGains, SampledPredictiveGains
from bayes_kfac.errors import ArgumentError, check_count, check_generator
from bayes_kfac.likelihoods import Gaussian, Likelihood
from bayes_kfac.prediction import MEMORY_BUDGET


@dataclass(frozen=True, kw_only=True)
class Joint(Acquisition):
    """Judges candidates by what they tell together; its view is a :class:`Gains`, which a selection adds to.

    Args:
        method: For classes, ``"linearized"``, the default, or ``"sampling"``: what is drawn under the weights. The same
            draws are used at all inputs. Real-valued targets are in closed form, always of the linearised model.
        num_samples: How many draws, for classes, by default 128: ``log(num_samples)`` nats is the most that a batch can
            tell about them.
        num_configurations: How many joint outcomes of the picked candidates are kept, for classes; more are sampled. By
            default those of :class:`SampledGains` and :class:`SampledPredictiveGains`.
        memory_budget: The bytes that the joint probabilities or covariances may use.
    """

    method: str | None = None
    num_samples: int | None = None
    num_configurations: int | None = None
    memory_budget: int = MEMORY_BUDGET

    def scores(self, view: Gains) -> Tensor:
        """The gain of each candidate given what was picked from this view before, ``[n]``.

        Args:
            view: The gains.

        Returns:
            The scores.
        """
        return view.scores

    def select(self, view: Gains, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The candidates to label: greedily, the one with the greatest gain given those picked before.

        Args:
            view: The gains; the picked candidates are added to it.
            count: How many.
            generator: Not used: the view has its own.

        Returns:
            Their indices, ``[count]``, in the order in which they were picked.
        """
        return greedy(view, count)

    def predict(self, predictor: Any, *inputs: Any, generator: torch.Generator | None) -> list[Any]:
        """Predictions at each of the inputs by the same draws."""
        options = {"method": self.method, "num_samples": self.num_samples}
        return predict_jointly(predictor, inputs, options, generator=generator)

    @property
    def limits(self) -> dict[str, int]:
        """What bounds the work of gains over draws."""
        limits = {"memory_budget": self.memory_budget}
        return limits if self.num_configurations is None else limits | {"num_configurations": self.num_configurations}

    def check_closed(self) -> None:
        """Refuse options of draws where there are none.

        Raises:
            ArgumentError: If there are any.
        """
        for name in ("method", "num_samples", "num_configurations"):
            if (value := getattr(self, name)) is not None:
                raise ArgumentError(
                    f"{name}={value!r} is for classes: what real-valued targets tell together is in closed form under "
                    "the linearised model, and has none over sampled weights. Leave it out. BALD(method='sampling') "
                    "judges candidates one by one, by a bound."
                )


@singledispatch
def information_gains(
    likelihood: Likelihood | None, acquisition: Joint, predictor: Any, inputs: Any, generator: torch.Generator | None
) -> Gains:
    """Information about the weights in each candidate's target given those of the picked ones.

    Args:
        likelihood: The predictor's, or ``None`` where it has none: draws of class probabilities are asked of it then.
        acquisition: Who asks, with its options.
        predictor: What predicts.
        inputs: The candidates.
        generator: The source of randomness.

    Returns:
        The gains.
    """
    (prediction,) = acquisition.predict(predictor, inputs, generator=generator)
    return SampledGains(prediction, generator=generator, **acquisition.limits)


@information_gains.register
def _(
    likelihood: Gaussian, acquisition: Joint, predictor: Any, inputs: Any, generator: torch.Generator | None
) -> Gains:
    acquisition.check_closed()
    return GaussianGains(predictor, for_posterior(predictor, inputs), memory_budget=acquisition.memory_budget)


@singledispatch
def predictive_gains(
    likelihood: Likelihood | None,
    acquisition: Joint,
    predictor: Any,
    inputs: Any,
    target_inputs: Any,
    generator: torch.Generator | None,
) -> Gains:
    """Expected information in each candidate's target about the targets at other inputs.

    Args:
        likelihood: The predictor's, or ``None``, as in :func:`information_gains`.
        acquisition: Who asks, with its options.
        predictor: What predicts.
        inputs: The candidates.
        target_inputs: The other inputs.
        generator: The source of randomness.

    Returns:
        The gains.
    """
    prediction, at_targets = acquisition.predict(predictor, inputs, target_inputs, generator=generator)
    return SampledPredictiveGains(prediction, at_targets, generator=generator, **acquisition.limits)


@predictive_gains.register
def _(
    likelihood: Gaussian,
    acquisition: Joint,
    predictor: Any,
    inputs: Any,
    target_inputs: Any,
    generator: torch.Generator | None,
) -> Gains:
    acquisition.check_closed()
    inputs, targets = for_posterior(predictor, inputs), for_posterior(predictor, target_inputs)
    return GaussianPredictiveGains(predictor, inputs, targets, memory_budget=acquisition.memory_budget)


@register("batch_bald")
@dataclass(frozen=True, kw_only=True)
class BatchBALD(Joint):
    """The information about the weights in the targets of a whole batch, in nats, picked greedily.

    Kirsch, van Amersfoort & Gal (2019), "BatchBALD: efficient and diverse batch acquisition for deep Bayesian active
    learning". For real-valued targets in closed form (:class:`GaussianGains`), for classes over draws
    (:class:`SampledGains`). The greedy batch has at least ``1 − 1/e`` of the information of the best.

    Args:
        method: As in :class:`Joint`.
        num_samples: As in :class:`Joint`.
        num_configurations: As in :class:`Joint`.
        memory_budget: As in :class:`Joint`.
    """

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Gains:  # noqa: D102
        likelihood = getattr(predictor, "likelihood", None)
        return information_gains(likelihood, self, predictor, inputs, generator)


@register("epig")
@dataclass(frozen=True, eq=False)  # tensors do not compare as one
class EPIG(Joint):
    """The expected information about targets where predictions will be wanted, in nats: less of it is beside the point.

    Bickford Smith, Kirsch, Farquhar, Gal, Foster & Rainforth (2023), "Prediction-oriented Bayesian active learning".
    Information about the weights may be about predictions that nobody asks for, as with outliers in a pool.

    Args:
        target_inputs: Inputs from the distribution of those where predictions will be wanted. By default up to
            ``num_targets`` of the candidates, drawn anew at each look: right where the pool is such a sample.
        num_targets: How many.
        method: As in :class:`Joint`.
        num_samples: As in :class:`Joint`.
        num_configurations: As in :class:`Joint`.
        memory_budget: As in :class:`Joint`.

    Raises:
        ArgumentError: If ``num_targets`` is no count.
    """

    target_inputs: Any = field(default=None, repr=False)
    num_targets: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_targets", check_count("num_targets", self.num_targets))

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Gains:  # noqa: D102
        likelihood = getattr(predictor, "likelihood", None)
        targets = self.target_inputs
        if targets is None:
            order = torch.randperm(count(inputs), generator=check_generator(generator))
            targets = _some(inputs, order[: self.num_targets])
        return predictive_gains(likelihood, self, predictor, inputs, targets, generator)


def _some(inputs: Any, indices: Tensor) -> Any:
    """Some of the inputs, of whatever they are."""
    if isinstance(inputs, DataLoader):
        batches = inputs.batch_sampler
        if not isinstance(batches, BatchSampler) or isinstance(inputs.dataset, IterableDataset):
            raise ArgumentError(
                "target_inputs=None, but the candidates come from a DataLoader whose examples have no index of their "
                "own. Pass target_inputs=, inputs from where predictions will be wanted."
            )
        some = Subset(inputs.dataset, indices.tolist())
        return DataLoader(some, batches.batch_size, collate_fn=inputs.collate_fn)
    if hasattr(inputs, "iloc"):
        return inputs.iloc[indices.numpy()]
    if isinstance(inputs, Tensor) or not hasattr(inputs, "shape"):
        return tree_map_only(Tensor, lambda tensor: tensor[indices.to(tensor.device)], inputs)
    return inputs[indices.numpy()]
