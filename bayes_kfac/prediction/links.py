"""Links: class probabilities from a Gaussian over logits, by draws or in closed form.

``E[softmax(f)]`` under ``f ~ N(μ, S)`` has no closed form. Draws, ``link="mc"``, are exact up to their number; the
others approximate it. In brackets is each one's error with 2, 3 and 10 classes: the largest of a probability, against
200 000 draws, averaged over 40 random Gaussians with correlated logits of variance 1 or so.

- ``"extended_probit"`` is the closest at these variances (0.002, 0.03, 0.04); it takes covariances into account. Where
  logits have standard deviations of 3 and more it shrinks too much.
- ``"probit"`` takes each logit by itself (0.02, 0.05, 0.04).
- ``"laplace_bridge"`` gives a whole Dirichlet, but a poor mean where the Gaussian is not one that a Dirichlet could
  have made (0.03, 0.24, 0.18; softmax of the mean logits: 0.03, 0.06, 0.04). ``"laplace_bridge_norm"`` (0.14, 0.22,
  0.13) helps, if at all, at much larger variances.

Each position of an example, ``[batch, ..., classes]``, is on its own: it takes its block of the covariance. Covariances
are 0 where only variances are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.likelihoods import Bernoulli, Categorical
from bayes_kfac.prediction.classification import (
    DirichletPrediction,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
)
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.results import Prediction, Source, from_gaussian, from_outputs


def probit(output: GaussianOutput) -> Tensor:
    """Logits divided by ``√(1 + π/8 · variance)``, which makes the sigmoid nearly its expectation.

    The constant makes the logistic function and a probit touch (MacKay 1992, "The evidence framework applied to
    classification networks", moderated output). For several classes the same is done to every logit of a softmax; that
    is common practice without a derivation: unlike the softmax it changes with a constant added to all logits, unless
    their variances are equal. :func:`extended_probit` does not.

    Args:
        output: The Gaussian over logits.

    Returns:
        Logits of the mean probabilities, shaped like the mean.

    Example:
        >>> import torch
        >>> from bayes_kfac.prediction import GaussianOutput
        >>> from bayes_kfac.prediction.links import probit
        >>> sure, unsure = (GaussianOutput(torch.tensor([[2.0, 0.0]]), v * torch.eye(2)[None]) for v in (1e-6, 9.0))
        >>> probit(sure).softmax(-1), probit(unsure).softmax(-1)
        (tensor([[0.8808, 0.1192]]), tensor([[0.7189, 0.2811]]))
    """
    return _shrunk(output.mean, output.variance)


def extended_probit(output: GaussianOutput) -> Tensor:
    """The probit for the difference of each pair of logits: ``1 / p_k ∝ Σ_i exp(−(μ_k − μ_i) / √(1 + π/8 V_ki))``.

    ``V_ki = S_kk + S_ii − 2 S_ki`` is the variance of the difference; ``i = k`` adds the 1. Gibbs (1997), thesis;
    with covariances Lu, Ie & Sha (2020), "Mean-field approximation to Gaussian-softmax integral with application to
    uncertainty estimation", the form "mf2". For two classes it is the binary probit of their difference.

    Args:
        output: The Gaussian over logits, the classes along its last dimension.

    Returns:
        Log-probabilities up to a constant, shaped like the mean.
    """
    difference = output.mean.unsqueeze(-1) - output.mean.unsqueeze(-2)
    variance = output.variance.unsqueeze(-1) + output.variance.unsqueeze(-2)
    if not output.is_diagonal:
        variance = variance - 2 * _position_covariance(output)
    return -torch.logsumexp(-_shrunk(difference, variance), -1)


def laplace_bridge(output: GaussianOutput) -> Tensor:
    """The Dirichlet whose Laplace approximation over logits has this mean and these variances.

    ``α_k = (1 − 2/K + e^{μ_k} Σ_l e^{−μ_l} / K²) / S_kk`` (Hobbhahn, Kristiadi & Hennig 2022, "Fast predictive
    uncertainty for classification with Bayesian deep networks"), for logits that sum to zero.

    The inverse is exact where a Dirichlet gave ``μ`` and ``S_kk``. For other Gaussians the mean is not near the
    softmax, however small the variance: with three classes, ``μ = (0, 1, −1)`` and equal variances it is
    (0.28, 0.55, 0.18), and the softmax (0.24, 0.67, 0.09).

    The paper brings logits to sum to zero by conditioning on it, ``μ − S1 (1ᵀμ) / (1ᵀS1)``. That throws away
    uncertainty and changes the prediction: a constant added to all logits, which the softmax ignores, would move the
    probabilities. Here the logits are projected, ``f − 1 1ᵀf / K``, which leaves the softmax as it was; both agree
    where all rows of ``S`` have the same sum.

    Args:
        output: The Gaussian over logits, the classes along its last dimension.

    Returns:
        The concentrations, shaped like the mean.
    """
    return _bridge(*_sum_to_zero(output))


def laplace_bridge_norm(output: GaussianOutput) -> Tensor:
    """The Laplace bridge after variances are scaled to a mean of ``√(K/2)``, and the mean logits along with them.

    Hobbhahn, Kristiadi & Hennig (2022), appendix, for large variances, where the bridge alone is too certain. Small
    variances are scaled up in the same way, and the mean logits to infinity with them: the probabilities of a posterior
    that is nearly certain are 0 and 1, whatever its logits. The concentrations say little about the weights, since the
    variance they come from is always the same.

    Args:
        output: The Gaussian over logits, the classes along its last dimension.

    Returns:
        The concentrations, shaped like the mean.
    """
    mean, variance = _sum_to_zero(output)
    scale = variance.mean(-1, keepdim=True) / math.sqrt(mean.shape[-1] / 2)
    return _bridge(mean / scale.sqrt(), variance / scale)


Link = Callable[[GaussianOutput], Tensor]
MEANS: Mapping[str, Link] = {"probit": probit, "extended_probit": extended_probit}
DIRICHLETS: Mapping[str, Link] = {"laplace_bridge": laplace_bridge, "laplace_bridge_norm": laplace_bridge_norm}
#: The names that ``link=`` takes.
LINKS = ("mc", *MEANS, *DIRICHLETS)


def _shrunk(mean: Tensor, variance: Tensor) -> Tensor:
    return mean / (1 + math.pi / 8 * variance.clamp(min=0)).sqrt()


def _position_covariance(output: GaussianOutput) -> Tensor:
    """Each position's block of the covariance, ``[batch, ..., classes, classes]``."""
    batch, *positions, classes = output.mean.shape
    count = math.prod(positions)
    blocks = output.covariance.reshape(batch, count, classes, count, classes).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1).reshape(batch, *positions, classes, classes)


def _sum_to_zero(output: GaussianOutput) -> tuple[Tensor, Tensor]:
    """Mean and variances of the logits minus their average over classes."""
    # var(f_k − f̄) = S_kk − 2 cov(f_k, f̄) + var(f̄)
    with_average = output.variance / output.mean.shape[-1]
    if not output.is_diagonal:
        with_average = _position_covariance(output).mean(-1)
    variance = output.variance - 2 * with_average + with_average.mean(-1, keepdim=True)
    # what rounding leaves of a difference is no variance; and a certain output has a Dirichlet all the same
    precision = torch.finfo(variance.dtype)
    floor = variance.shape[-1] * precision.eps * output.variance.amax(-1, keepdim=True) + precision.tiny**0.5
    return output.mean - output.mean.mean(-1, keepdim=True), torch.maximum(variance, floor)


def _bridge(mean: Tensor, variance: Tensor) -> Tensor:
    classes = mean.shape[-1]
    constant = mean.new_tensor(max(1 - 2 / classes, 0.0)).log()
    exponent = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(classes)
    log_alpha = torch.logaddexp(constant, exponent) - variance.log()
    # concentrations beyond the dtype keep their ratios, and so the probabilities; their sum is all but infinite anyway
    limit = math.log(torch.finfo(log_alpha.dtype).max) / 2
    alpha = (log_alpha - (log_alpha.amax(-1, keepdim=True) - limit).clamp(min=0)).exp()
    return alpha.clamp(min=torch.finfo(alpha.dtype).tiny)  # so that none is impossible


@from_gaussian.register
def _(
    likelihood: Categorical,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> Prediction:
    link = check_choice("link", "mc" if link is None else link, LINKS)
    closed = replace(source, link=link, num_samples=None)
    if link in MEANS:
        return MeanCategoricalPrediction(MEANS[link](output), closed)
    if link in DIRICHLETS:
        return DirichletPrediction(DIRICHLETS[link](output), closed)
    return from_outputs(likelihood, output.sample(num_samples, generator), replace(closed, num_samples=num_samples))


@from_gaussian.register
def _(
    likelihood: Bernoulli,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> Prediction:
    link = check_choice("link", "mc" if link is None else link, LINKS)
    if link in DIRICHLETS:
        # two classes with logits (f, 0): α = (1 + e^μ, 1 + e^−μ) / S, whose mean is sigmoid(μ)
        raise ArgumentError(
            f"link={link!r} is for several classes: of one logit it makes no better a probability than sigmoid(mean), "
            "which ignores the variance. Allowed for a Bernoulli likelihood: 'mc', 'probit', 'extended_probit'. Use "
            "link='mc' to tell noise from ignorance."
        )
    closed = replace(source, link=link, num_samples=None)
    if link in MEANS:  # one logit has no others to differ from: both are the binary probit
        return MeanBernoulliPrediction(probit(output), closed)
    return from_outputs(likelihood, output.sample(num_samples, generator), replace(closed, num_samples=num_samples))
