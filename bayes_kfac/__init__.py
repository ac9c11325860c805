"""bayes_kfac: Bayesian deep learning by Kronecker-factored curvature.

Matrix-variate Gaussian posteriors over the weights of your own PyTorch model, trained by noisy natural gradient, and
predictions with the uncertainty that follows.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bayes_kfac import curvature, errors, likelihoods, structures
from bayes_kfac.laplace import Laplace
from bayes_kfac.mixture import Mixture
from bayes_kfac.posterior import Posterior
from bayes_kfac.training import (
    AdaptiveNaturalGradient,
    NaturalGradient,
    NoisyAdam,
    NoisyEKFAC,
    NoisyKFAC,
    NoisyNaturalGradient,
    fit,
)

if TYPE_CHECKING:
    from bayes_kfac import active, botorch, distributions, metrics, plotting, pyro, sklearn

__version__ = "0.1.0"

__all__ = [
    "AdaptiveNaturalGradient",
    "Laplace",
    "Mixture",
    "NaturalGradient",
    "NoisyAdam",
    "NoisyEKFAC",
    "NoisyKFAC",
    "NoisyNaturalGradient",
    "Posterior",
    "active",
    "botorch",
    "curvature",
    "distributions",
    "errors",
    "fit",
    "likelihoods",
    "metrics",
    "plotting",
    "pyro",
    "sklearn",
    "structures",
]

#: Imported at first use: they bring other libraries, which `import bayes_kfac` should not cost.
_LAZY = ("active", "botorch", "distributions", "metrics", "plotting", "pyro", "sklearn")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"bayes_kfac.{name}")
    raise AttributeError(f"module 'bayes_kfac' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
