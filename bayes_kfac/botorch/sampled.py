"""The surrogate of weight draws: the network itself under each of them, as an ensemble."""

from __future__ import annotations

from typing import Self

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors.ensemble import EnsemblePosterior
from torch import Tensor

from bayes_kfac.botorch.base import Surrogate, wants_noise
from bayes_kfac.errors import check_generator
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import Draws, check_draws, sampled_outputs


class SampledSurrogate(Surrogate):
    """The network under draws of its weights, the same functions at every call.

    For posteriors that were trained by noisy natural gradient; draws of a Laplace posterior do not fit its own training
    data, and the linearised surrogate is the one to take.

    Args:
        posterior: The posterior, of a ``Gaussian`` likelihood. The network takes ``[batch, d]``.
        num_samples: How many draws.
        draws: Draws from :meth:`bayes_kfac.Posterior.sample`, instead of new ones.
        num_outputs: The outputs of the network for one input.
        input_transform: Applied to inputs before the network; such as ``Normalize``.
        outcome_transform: What the targets of the network were transformed by; such as ``Standardize``.
        generator: The source of randomness.

    Raises:
        ArgumentError: If the likelihood is not ``Gaussian``, or draws are of another posterior.
    """

    def __init__(
        self,
        posterior: Posterior,
        num_samples: int = 64,
        *,
        draws: Draws | None = None,
        num_outputs: int = 1,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            posterior, num_outputs=num_outputs, input_transform=input_transform, outcome_transform=outcome_transform
        )
        self.draws = posterior.sample(num_samples, generator=generator) if draws is None else draws
        check_draws(self.draws, posterior.layers)
        self._seed = int(torch.randint(2**62, (), generator=check_generator(generator)))

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> EnsemblePosterior:
        """The outputs under each draw; differentiable in ``X``.

        Args:
            X: Inputs, ``batch_shape x q x d``.
            output_indices: Which outputs; by default all of them.
            observation_noise: Whether each draw is one of noisy targets: with the likelihood's noise, or with these
                variances of transformed outcomes, which broadcast to ``batch_shape x q x m``. The draws of noise are
                the same at every call, and for every batch.
            posterior_transform: Applied to the result.

        Returns:
            The draws, ``batch_shape x num_samples x q x m``.
        """
        X = self._transformed(X)
        chosen = self._chosen(output_indices)
        weights = self.weight_posterior
        outputs = sampled_outputs(weights.model, weights.mean, self.draws, X.flatten(0, -2)).flatten(2)
        # [draws, batch, m] to batch_shape x draws x q x m
        values = outputs[..., self._of_network(chosen)].unflatten(1, X.shape[:-1]).movedim(0, -3)
        if wants_noise(observation_noise):
            variance = self._noise(observation_noise, values[..., 0, :, :], chosen)
            variance = variance.unsqueeze(-3) if variance.ndim > 1 else variance
            values = values + variance.sqrt() * self._standard_noise(values)
        transform = self._outcome_transform_of(chosen)
        if transform is not None:
            values, _ = transform.untransform(values, X=X)
        posterior = EnsemblePosterior(values)
        return posterior if posterior_transform is None else posterior_transform(posterior, X=X)

    def _standard_noise(self, values: Tensor) -> Tensor:
        """Standard normal draws, ``num_samples x q x m``."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(values.shape[-3:], generator=generator, dtype=values.dtype).to(values.device)

    def _copy(self) -> Self:
        copy = type(self)(self.weight_posterior, draws=self.draws, **self._options())
        copy._outputs, copy._seed = self._outputs, self._seed
        return copy
