"""Training: noisy natural gradient as an optimizer, and the loop around it."""

from bayes_kfac.training.adaptive import AdaptiveNaturalGradient
from bayes_kfac.training.fit import FitState, fit
from bayes_kfac.training.named import NoisyAdam, NoisyEKFAC, NoisyKFAC
from bayes_kfac.training.natural import NaturalGradient
from bayes_kfac.training.noisy import NoisyNaturalGradient

__all__ = [
    "AdaptiveNaturalGradient",
    "FitState",
    "NaturalGradient",
    "NoisyAdam",
    "NoisyEKFAC",
    "NoisyKFAC",
    "NoisyNaturalGradient",
    "fit",
]
