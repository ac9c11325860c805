"""Likelihoods: what a model's output means. Each is an ``nn.Module`` criterion, ``likelihood(output, target)``."""

from bayes_kfac.likelihoods.base import Likelihood, available, from_config, register
from bayes_kfac.likelihoods.bernoulli import Bernoulli
from bayes_kfac.likelihoods.categorical import Categorical
from bayes_kfac.likelihoods.gaussian import Gaussian
from bayes_kfac.likelihoods.heteroscedastic import HeteroscedasticGaussian
from bayes_kfac.likelihoods.noise import BoundedNoise, FixedNoise, GammaNoise, LearnedNoise, Noise
from bayes_kfac.likelihoods.poisson import Poisson

__all__ = [
    "Bernoulli",
    "BoundedNoise",
    "Categorical",
    "FixedNoise",
    "GammaNoise",
    "Gaussian",
    "HeteroscedasticGaussian",
    "LearnedNoise",
    "Likelihood",
    "Noise",
    "Poisson",
    "available",
    "from_config",
    "register",
]
