"""The names by which the noisy K-FAC paper and its successors call :class:`NoisyNaturalGradient` with one structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.training.noisy import NoisyNaturalGradient


class NoisyKFAC(NoisyNaturalGradient):
    """Noisy K-FAC (Zhang et al. 2018): :class:`NoisyNaturalGradient` with the Kronecker-factored Fisher.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> model, likelihood = torch.nn.Linear(4, 3), bk.likelihoods.Categorical()
        >>> optimizer = bk.NoisyKFAC(model, likelihood, num_data=8, lr=0.1)
        >>> def closure():  # step() calls it at a sample of the weights
        ...     optimizer.zero_grad()
        ...     loss = likelihood(model(torch.eye(4)), torch.tensor([0, 1, 2, 0]))
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> optimizer.posterior().distribution("(root)").event_shape  # three rows; the last of five columns is the bias
        torch.Size([3, 5])
    """


class NoisyEKFAC(NoisyNaturalGradient):
    """Noisy EK-FAC (Bae et al. 2018): :class:`NoisyNaturalGradient` with ``structure="ekfac"``.

    The paper's code starts the eigenvalues anew from K-FAC's at each change of basis; here they keep what was measured.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> bk.NoisyEKFAC(torch.nn.Linear(4, 1), bk.likelihoods.Bernoulli(), num_data=100).structure.name
        'ekfac'
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(model, likelihood, structure="ekfac", **options)


class NoisyAdam(NoisyNaturalGradient):
    """Noisy Adam (Zhang et al. 2018): :class:`NoisyNaturalGradient` with ``structure="diagonal"``.

    The diagonal preconditions as it is, without Adam's root, as in the paper.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> bk.NoisyAdam(torch.nn.Linear(4, 1), bk.likelihoods.Bernoulli(), num_data=100).structure.name
        'diagonal'
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(model, likelihood, structure="diagonal", **options)
