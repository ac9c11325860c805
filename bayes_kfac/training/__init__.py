"""Training: noisy natural gradient as an optimizer, and the loop around it."""

from bayes_kfac.training.fit import FitState, fit
from bayes_kfac.training.noisy import NoisyAdam, NoisyEKFAC, NoisyKFAC, NoisyNaturalGradient

__all__ = ["FitState", "NoisyAdam", "NoisyEKFAC", "NoisyKFAC", "NoisyNaturalGradient", "fit"]
