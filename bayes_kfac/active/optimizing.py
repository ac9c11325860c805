"""Acquisitions that look for an optimum: expected improvement and Thompson sampling, of one real-valued output.

What is optimised is the mean of the target: noise is no improvement, so that it is left out of both. Which end is meant
is said by name, ``goal="minimize"`` or ``"maximize"``; there is no default.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bayes_kfac.active.base import Acquisition, check_enough, check_numbers
from bayes_kfac.active.predictors import ask, for_posterior, parts, predict
from bayes_kfac.errors import ArgumentError, check_choice, check_count
from bayes_kfac.prediction import concatenate

GOALS = ("minimize", "maximize")
#: Below so many standard deviations the improvement is a difference of numbers that agree in half of their digits; the
#: asymptotic series is exact to rounding there.
FAR = -100.0
#: Less than any standard deviation that float64 holds a square of.
TINY = 1e-150


class ExpectedImprovement(Acquisition):
    """``log E[max(f − best, 0)]`` under the Gaussian of the target's mean, in closed form (Jones et al. 1998).

    The logarithm ranks like the expectation, and still tells candidates apart where that is 0 in floating point (Ament
    et al. 2023). A batch holds those that are best by themselves, often neighbours; :class:`ThompsonSampling` spreads
    its picks. The mean's Gaussian has the mean and the epistemic variance of the prediction; of a prediction by
    sampled weights it has the moments only.

    Args:
        best: The best value so far, in the target's units; an attribute, to be set anew when a better one was found.
        goal: ``"minimize"`` or ``"maximize"``.

    Raises:
        ArgumentError: If ``best`` is not finite, or ``goal`` unknown.
    """

    def __init__(self, best: float, goal: str) -> None:
        self.best = best
        self.goal = check_choice("goal", goal, GOALS)

    @property
    def best(self) -> float:
        """The best value so far, in the target's units."""
        return self._best

    @best.setter
    def best(self, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"best={value!r} is not a number. Allowed: a finite number.") from error
        if not math.isfinite(number):
            raise ArgumentError(f"best={value!r} is out of range. Allowed: a finite number.")
        self._best = number

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:
        """The prediction of the candidates.

        Args:
            predictor: A posterior of a regression, a regressor of scikit-learn that gives standard deviations, a
                :class:`Committee`, or what predicts a ``mean`` and an ``epistemic_variance``.
            inputs: The candidates.
            generator: The source of randomness, where the predictor draws.

        Returns:
            The prediction.

        Raises:
            ArgumentError: If the predictor does not predict.
        """
        views = (predict(predictor, part, {}, generator=generator) for part in parts(predictor, inputs))
        return concatenate(list(views)) if isinstance(inputs, DataLoader) else next(views)

    def scores(self, view: Any) -> Tensor:
        """The logarithm of the expected improvement of each candidate, ``[n]``, in float64.

        Args:
            view: The prediction.

        Returns:
            The scores; ``exp`` of them is in the target's units.

        Raises:
            ArgumentError: If the target has several outputs.
            UsageError: If the prediction does not know its epistemic variance.
        """
        mean, variance = (_one_output(ask(view, name, type(self).__name__)) for name in ("mean", "epistemic_variance"))
        mean = mean.double()
        stddev = variance.double().clamp(min=0).sqrt().clamp(min=TINY)
        improvement = mean - self.best if self.goal == "maximize" else self.best - mean
        return stddev.log() + _log_standard_improvement(improvement / stddev)


class ThompsonSampling(Acquisition):
    """Each pick is the optimum of a function of its own, drawn from the posterior of the linearised model.

    A function is one draw of the weights at all candidates, so that neighbours rise and fall together; independent
    draws of each candidate's mean would favour those that are many. A candidate that was picked already is passed over
    for the function's next best.

    Args:
        goal: ``"minimize"`` or ``"maximize"``.
        num_samples: How many functions are drawn: as many as a batch has picks, and more for scores.

    Raises:
        ArgumentError: If an argument is not allowed.
    """

    def __init__(self, goal: str, *, num_samples: int = 64) -> None:
        self.goal = check_choice("goal", goal, GOALS)
        self.num_samples = check_count("num_samples", num_samples)

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Functions at all candidates.

        Args:
            predictor: A posterior of a regression.
            inputs: The candidates, as in :meth:`Posterior.predict`.
            generator: The source of randomness.

        Returns:
            ``[num_samples, n]``, the higher the better.

        Raises:
            ArgumentError: If the predictor draws no functions, or the target has several outputs.
            NonFiniteError: If a function is NaN at a candidate.
        """
        if not (hasattr(predictor, "function_samples") and hasattr(predictor, "sample")):
            raise ArgumentError(
                f"predictor is a {type(predictor).__name__}, which draws no functions. Allowed: a Posterior. Use "
                "ExpectedImprovement for anything that predicts a mean and a variance."
            )
        draws = predictor.sample(self.num_samples, generator=generator)  # the same weights for all batches of a loader
        with torch.no_grad():
            functions = [
                predictor.function_samples(for_posterior(predictor, part), draws=draws)
                for part in parts(predictor, inputs)
            ]
        values = torch.cat([_one_output(each, 1) for each in functions], dim=1)
        check_numbers(values.amax(0))  # NaN where any function is
        return values if self.goal == "maximize" else -values

    def scores(self, view: Tensor) -> Tensor:
        """The share of functions whose optimum is at each candidate, ``[n]``: how probable it is that it is there.

        Args:
            view: The functions.

        Returns:
            The scores, which add up to 1.
        """
        return torch.bincount(view.argmax(1), minlength=view.shape[1]) / len(view)

    def select(self, view: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The optimum of one function after another, among the candidates that are left.

        Args:
            view: The functions.
            count: How many.
            generator: Not used: :meth:`look` draws.

        Returns:
            Their indices, ``[count]``, distinct, in the order of the functions.

        Raises:
            ArgumentError: If there are fewer candidates or functions.
        """
        check_enough(count, view.shape[1])
        if count > len(view):
            raise ArgumentError(
                f"count={count} is more than the {len(view)} functions that were drawn, one for each pick. Use "
                f"ThompsonSampling(num_samples={count}) or more."
            )
        picked: list[int] = []
        for function in view[:count].clone():
            function[picked] = -torch.inf
            picked.append(int(function.argmax()))
        return torch.tensor(picked)


def _one_output(values: Tensor, leading: int = 0) -> Tensor:
    """Values ``[..., n, *one]`` as ``[..., n]``, for so many leading dimensions."""
    outputs = values.shape[leading + 1 :].numel()
    if outputs != 1:
        raise ArgumentError(
            f"The target has {outputs} outputs. Allowed: 1. Which of them, or which function of them, is to be "
            "optimised has to be an output of its own."
        )
    return values.reshape(*values.shape[: leading + 1])


def _log_standard_improvement(z: Tensor) -> Tensor:
    """``log E[max(z + ε, 0)] = log(φ(z) + z Φ(z))`` with a standard normal ``ε``, to rounding at every ``z``."""
    near, below, far = z.clamp(min=-1), z.clamp(FAR, -1), z.clamp(max=FAR)
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    direct = ((-0.5 * near**2).exp() / math.sqrt(2 * math.pi) + near * torch.special.ndtr(near)).log()
    # Φ(z) / φ(z) is Mills' ratio; 1 + z times it is 1/z² − 3/z⁴ + 15/z⁶ − 105/z⁸ far below
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-below / math.sqrt(2))
    by_mills = log_density + torch.log1p(below * mills)
    r = far**-2
    by_series = log_density + (r * (1 - r * (3 - r * (15 - r * 105)))).log()
    return torch.where(z > -1, direct, torch.where(z > FAR, by_mills, by_series))
