"""Tuning of a Laplace fit: the maximum of its evidence, or the best of a grid on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_kfac.batches import unpack
from bayes_kfac.errors import ArgumentError, NonFiniteError, check_choice
from bayes_kfac.laplace.fitted import Fitted
from bayes_kfac.laplace.prior import as_prior
from bayes_kfac.posterior import Posterior
from bayes_kfac.progress import progress_bar

METHODS = ("marginal_likelihood", "validation")
GROUPINGS = ("model", "layer", "parameter")
#: The evidence of weights that are all zero grows for ever with their prior's precision, and that of weights without
#: curvature may fall.
BOUNDS = (1e-10, 1e10)
MAX_ITERATIONS = 200
#: The search ends where a step gains less than this part of the evidence, or the slope is less.
TOLERANCE = 1e-13

Value = TypeVar("Value")


def values_of(grid: Iterable[Value] | None) -> list[Value] | list[float]:
    """The values to try; by default 21 from 1e-4 to 1e4.

    Args:
        grid: What the user gave.

    Returns:
        A list of them, unchecked.

    Raises:
        ArgumentError: If it is no collection.
    """
    if grid is None:
        return torch.logspace(-4, 4, 21, dtype=torch.float64).tolist()
    try:
        return list(grid)
    except TypeError as error:
        raise ArgumentError(f"grid={grid!r} is no collection. Allowed: values to try, such as [{grid!r}].") from error


def maximize_evidence(
    fitted: Fitted,
    start: Mapping[str, Tensor],
    temperature: float,
    noise_scale: Tensor | None,
    *,
    per: str,
    noise: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The precisions, and the noise's scale, at which the evidence is largest.

    In their logarithms it is concave, so that a quasi-Newton method finds the one maximum from anywhere.

    Args:
        fitted: The fit.
        start: Where to begin.
        temperature: ``τ``.
        noise_scale: The noise's scale, or ``None`` for what it was when the data were measured.
        per: ``"model"``, ``"layer"`` or ``"parameter"``: what has a precision of its own.
        noise: Whether to choose the noise's scale too.

    Returns:
        The precisions by layer, and the scale.

    Raises:
        ArgumentError: If ``per`` is unknown.
        NonFiniteError: If there is no largest evidence, since the targets have no noise.
    """
    check_choice("per", per, GROUPINGS)
    layers, like = fitted.layers, fitted.measurement.nll
    members = {
        "model": lambda: {"": 0},
        "layer": lambda: {name: index for index, name in enumerate(layers)},
        "parameter": lambda: {
            name: index for index, name in enumerate(name for layer in layers.values() for name in layer.parameters)
        },
    }[per]()
    bounds = (math.log(BOUNDS[0]), math.log(BOUNDS[1]))
    centre = torch.stack([prior.detach().double().log().mean() for prior in start.values()]).mean()
    point, limits = torch.full((len(members) + noise,), float(centre), dtype=torch.float64), [bounds] * len(members)
    if noise:
        # the factor on the Fisher at scale 1 is the variance of the noise
        _, variance = fitted.likelihood.at_noise_scale(like, fitted.measurement.num_targets, torch.ones_like(like))
        point[-1] = 0.5 * variance.log() if noise_scale is None else noise_scale.log()
        lowest = 0.5 * (float(variance.log()) + math.log(torch.finfo(next(iter(layers.values())).like.dtype).eps))
        limits.append((lowest, math.inf))
    fixed = torch.tensor(temperature, dtype=like.dtype, device=like.device)

    def at(point: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The priors and the noise's scale."""
        values = point.to(like).exp()
        scale = values[-1] if noise else noise_scale
        if per == "model":
            return dict.fromkeys(layers, values[0]), scale
        if per == "layer":
            return {name: values[members[name]] for name in layers}, scale
        return {
            name: layer.matrix({key: values[members[key]].expand(p.shape) for key, p in layer.parameters.items()})
            for name, layer in layers.items()
        }, scale

    def loss(point: Tensor) -> Tensor:
        priors, scale = at(point)
        return -fitted.evidence(priors, fixed, scale)

    point = _minimum(loss, point, limits)
    if noise:
        _check_noise(float(point[-1]), lowest, float(variance.sqrt()))
    priors, scale = at(point)
    return {name: as_prior(value, layers[name]) for name, value in priors.items()}, scale


def _minimum(loss: Callable[[Tensor], Tensor], start: Tensor, bounds: Sequence[tuple[float, float]]) -> Tensor:
    """Where a smooth function of a few numbers is least within bounds; a start outside begins at them."""
    from scipy.optimize import minimize  # half of the time of importing the library, if it were above

    def value_and_gradient(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        point = torch.tensor(values, requires_grad=True)
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": MAX_ITERATIONS, "ftol": TOLERANCE, "gtol": TOLERANCE}
    found = minimize(value_and_gradient, start.numpy(), jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return torch.as_tensor(found.x)


def _check_noise(log_scale: float, lowest: float, measured: float) -> None:
    """Refuse a scale of the noise that is nothing but rounding of losses at the measured one."""
    if not log_scale > lowest:  # so that NaN is refused too
        raise NonFiniteError(
            "noise=True, but the evidence grows without bound as the noise's scale goes to 0: the model fits all "
            "targets, up to rounding. Nothing was changed. Leave noise=False; or check whether the targets are the "
            "model's own outputs; or fit again with likelihoods.Gaussian(...) of the scale that is meant, if that is "
            f"far less than {measured:.3g}."
        )


def best_on_validation(
    candidates: Sequence[tuple[float, Callable[[], Posterior]]],
    loader: Iterable[Any],
    *,
    progress: bool,
    predict: Mapping[str, Any],
) -> float:
    """The value whose posterior predicts validation data best, by the mean negative log-likelihood.

    Args:
        candidates: Values, and what makes the posterior of each.
        loader: The validation data.
        progress: Whether to show a progress bar.
        predict: Arguments of :meth:`Posterior.predict`.

    Returns:
        The value.

    Raises:
        ArgumentError: If there is no candidate, or the loader is none, or yields nothing or masks.
        NonFiniteError: If there are no finite predictions.
    """
    if not isinstance(loader, Iterable):
        raise ArgumentError(f"loader={loader!r} is not iterable. Allowed: a DataLoader, or a list of batches.")
    if not candidates:
        raise ArgumentError("grid=[] is empty. Allowed: one value or more.")
    scores = {}
    with progress_bar(candidates, desc="validation", shown=progress) as bar:
        for value, make in bar:
            scores[value] = mean_nll(make(), loader, predict)
            bar.set_postfix(value=f"{value:.3g}", nll=f"{scores[value]:.4f}")
    return least(scores)


def least(scores: Mapping[Value, float]) -> Value:
    """The value with the least score that is finite.

    Args:
        scores: The scores by value.

    Returns:
        The value.

    Raises:
        NonFiniteError: If no score is finite.
    """
    finite = {value: score for value, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise NonFiniteError(
            f"At no value of the grid is the validation data's log-likelihood finite: {dict(scores)}. Check the data "
            "and the weights for NaN."
        )
    return min(finite, key=finite.__getitem__)


def mean_nll(posterior: Posterior, loader: Iterable[Any], predict: Mapping[str, Any]) -> float:
    """The mean negative log-likelihood of a loader's examples, in nats.

    Args:
        posterior: The posterior.
        loader: The data.
        predict: Arguments of :meth:`Posterior.predict`.

    Returns:
        The mean.

    Raises:
        ArgumentError: If the loader yields nothing, or masks.
    """
    total, count = 0.0, 0
    for raw in loader:
        batch = unpack(raw).to(posterior.device)
        if batch.is_empty:
            continue
        if batch.mask is not None:
            raise ArgumentError("loader= yields masks, which predictions do not know. Leave masked targets out of it.")
        with torch.no_grad():
            log_prob = posterior.predict(batch.inputs, **predict).log_prob(batch.target)
        total -= float(log_prob.double().sum())
        count += len(log_prob)
    if not count:
        raise ArgumentError(f"loader=<{type(loader).__name__}> yielded no example. Pass a DataLoader or a list.")
    return total / count
