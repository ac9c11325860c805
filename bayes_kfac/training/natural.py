"""Natural gradient without noise: the weights themselves are trained, and structures are preconditioners.

``W ← W − lr · (F̄ + γ I)^(-p) (∇ + γ_in W)`` with ``γ_in = δ/N`` and ``γ = γ_in + γ_ex``: with ``structure="kron"`` and
``p = 1`` plain K-FAC (Martens & Grosse 2015) for the maximum a posteriori.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from bayes_kfac.errors import ArgumentError, UsageError, check_positive
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.structures import JointGaussian, Structure
from bayes_kfac.training.blocks import Blocks
from bayes_kfac.training.noisy import NoisyNaturalGradient
from bayes_kfac.training.states import States

#: Options of the noisy trainer that speak of samples.
OF_SAMPLES = ("num_samples", "antithetic")


class PointBlocks(Blocks):
    """Blocks without a posterior to sample from: every layer is preconditioned.

    Args:
        structure: As for :class:`Blocks`.
        options: As for :class:`Blocks`.
        power: ``p``, the power of the inverse.
        others: Further arguments of :class:`Blocks`.
    """

    def __init__(
        self, structure: Structure, options: Callable[[str], Mapping[str, Any]], *, power: float, **others: Any
    ) -> None:
        super().__init__(structure, options, **others)
        self.power = power

    def with_posterior(self, states: States, names: Collection[str]) -> States:  # noqa: D102
        return states

    def is_preconditioned(self, name: str) -> bool:  # noqa: D102
        return True

    def preconditioner(self, states: States, names: Collection[str]) -> JointGaussian:  # noqa: D102
        gaussian = super().preconditioner(states, names)
        return gaussian if self.power == 1 else gaussian.to_power(self.power)


class NaturalGradient(NoisyNaturalGradient):
    """Trains weights by natural gradient: plain K-FAC and its kin.

    Loops are those of :class:`NoisyNaturalGradient`; its context puts no noise into the weights, and is where curvature
    is measured. :meth:`posterior` is the Gaussian around the trained weights that the running curvature gives.

    Args:
        model: The model.
        likelihood: What the output means; its mean negative log-likelihood is the loss.
        num_data: The number of examples in the training set; ``prior_precision / num_data`` is the weight decay.
        power: The power of the inverse Fisher, between 0 (a gradient step) and 1; between the two generalisation may be
            better than at either (Amari et al. 2021).
        options: As for :class:`NoisyNaturalGradient`, but for those of samples. ``structure`` may also be one of
            ``bayes_kfac.structures.preconditioners()``.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> x = torch.eye(3)  # for a linear model one full step is the least-squares solution
        >>> model, likelihood = torch.nn.Linear(3, 1, bias=False), bk.likelihoods.Gaussian(1.0)
        >>> optimizer = bk.NaturalGradient(
        ...     model, likelihood, num_data=3, lr=1.0, structure="dense", fisher="exact", prior_precision=1e-6,
        ...     momentum=0.0, warmup=False, kl_clip=None,
        ... )
        >>> with optimizer.sampled_params():  # no noise here; it is where curvature is measured
        ...     likelihood(model(x), torch.tensor([[1.0], [2.0], [3.0]])).backward()
        >>> optimizer.step()
        >>> model.weight.data.round(decimals=3)
        tensor([[1., 2., 3.]])
    """

    method = "natural gradient"

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, *, num_data: int, power: float = 1.0, **options: Any
    ) -> None:
        if unknown := [name for name in OF_SAMPLES if name in options]:
            raise ArgumentError(
                f"{unknown[0]}= is of weight samples, and {type(self).__name__} has none. Leave it out."
            )
        self.power = _check_power(power)
        super().__init__(model, likelihood, num_data=num_data, **options)

    def _check_structure(self) -> None:
        pass  # no posterior is needed to train

    def _make_blocks(self, **options: Any) -> Blocks:
        return PointBlocks(self.structure, self._group, power=self.power, **options)

    def posterior(self) -> Posterior:
        """The Gaussian around the trained weights, as a Laplace fit to the running curvature would have it.

        Returns:
            The posterior.
        """
        self.structure.check_posterior()
        return super().posterior()

    def kl(self) -> Tensor:
        """Refused: there is no Gaussian in training.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{type(self).__name__} trains weights and no Gaussian. Call posterior().kl().")


def _check_power(power: float) -> float:
    if check_positive("power", power, allow_zero=True) > 1:
        raise ArgumentError(f"power={power!r} is out of range. Allowed: 0 <= power <= 1.")
    return power
