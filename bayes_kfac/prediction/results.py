"""Result objects: what a prediction knows, and how a likelihood chooses its kind of result.

All of them split the variance of a new target: ``variance = aleatoric_variance + epistemic_variance``, always. The
first is the expected noise of the target given the weights, the second the variance of its mean over the weights. The
first dimension of everything is the batch.

A result class is a frozen dataclass whose fields say along which dimension they hold the batch, with
``field(metadata=batch_dim(...))``; the others are the same for every batch.

A likelihood gets its results by one line each of ``from_gaussian.register`` and ``from_outputs.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.provenance import Provenance


def batch_dim(dim: int) -> Mapping[str, int]:
    """The metadata of a dataclass field that holds the batch along ``dim``: a tensor, or a :class:`GaussianOutput`."""
    return {"batch_dim": dim}


@dataclass(frozen=True)
class Source:
    """Where a prediction came from.

    Attributes:
        method: ``"linearized"`` or ``"sampling"``.
        num_samples: The number of draws, or ``None`` where the result is in closed form.
        posterior: How the posterior was made.
        link: How class probabilities came from a Gaussian of logits; ``None`` for regression and for sampled weights.
    """

    method: str
    num_samples: int | None
    posterior: Provenance
    link: str | None = None


class Prediction(ABC):
    """The predictive distribution of targets.

    Attributes:
        source: Where the prediction came from.
    """

    source: Source

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.mean)

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean of the target, ``[batch, ...]``; class probabilities in a classification."""

    @property
    @abstractmethod
    def epistemic_variance(self) -> Tensor:
        """The variance of the target's mean over the weights, shaped like :attr:`mean`."""

    @property
    @abstractmethod
    def aleatoric_variance(self) -> Tensor:
        """The expected variance of the target given the weights, shaped like :attr:`mean`."""

    @property
    @abstractmethod
    def distribution(self) -> Distribution:
        """The predictive distribution of the target, as a torch distribution."""

    @property
    def variance(self) -> Tensor:
        """The variance of the target: aleatoric plus epistemic."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def stddev(self) -> Tensor:
        """The standard deviation of the target, noise included."""
        return self.variance.sqrt()

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """The log-density of each target, ``[batch]``, in nats; dimensions of one example are summed."""


@singledispatch
def from_gaussian(
    likelihood: Likelihood,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> Prediction:
    """The prediction for a Gaussian model output.

    Args:
        likelihood: What the output means.
        output: The output's mean, and its covariance or variances.
        source: Where it came from.
        link: How class probabilities come from the output, one of :data:`bayes_kfac.prediction.links.LINKS`; ``None``
            for ``"mc"`` there, and for likelihoods that need no link.
        num_samples: Draws of the output for ``link="mc"``.
        generator: The source of randomness for them.

    Raises:
        ArgumentError: If the likelihood has no such result, or no such link.
    """
    raise ArgumentError(f"{type(likelihood).__name__} has no prediction: register it with from_gaussian.register.")


@singledispatch
def from_outputs(likelihood: Likelihood, outputs: Tensor, source: Source) -> Prediction:
    """The prediction for draws of the model's output.

    Args:
        likelihood: What the output means.
        outputs: ``[num_samples, batch, ...]``.
        source: Where they came from.

    Raises:
        ArgumentError: If the likelihood has no such result.
    """
    raise ArgumentError(f"{type(likelihood).__name__} has no prediction: register it with from_outputs.register.")
