"""The names by which the noisy K-FAC paper and its successors call :class:`NoisyNaturalGradient` with one structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.training.noisy import NoisyNaturalGradient


class NoisyKFAC(NoisyNaturalGradient):
    """Noisy K-FAC (Zhang et al. 2018): :class:`NoisyNaturalGradient` with the Kronecker-factored Fisher."""


class NoisyEKFAC(NoisyNaturalGradient):
    """Noisy EK-FAC (Bae et al. 2018): :class:`NoisyNaturalGradient` with ``structure="ekfac"``.

    The paper's code starts the eigenvalues anew from K-FAC's at each change of basis; here they keep what was measured.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(model, likelihood, structure="ekfac", **options)


class NoisyAdam(NoisyNaturalGradient):
    """Noisy Adam (Zhang et al. 2018): :class:`NoisyNaturalGradient` with ``structure="diagonal"``.

    The diagonal preconditions as it is, without Adam's root, as in the paper.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(model, likelihood, structure="diagonal", **options)
