"""The surrogate of the linearised network: joint Gaussians in closed form, which observations change exactly."""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.exceptions.warnings import InputDataWarning
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform, Standardize
from botorch.models.utils import validate_input_scaling
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from botorch.utils.types import DEFAULT, _DefaultType
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac.botorch.base import Surrogate, check_finite, check_tensor, wants_noise
from bayes_kfac.botorch.conditioning import Observations, moments, observed
from bayes_kfac.botorch.fitting import BATCH_SIZE, check_network, default_network, fit_prior
from bayes_kfac.errors import ArgumentError, check_count, check_positive
from bayes_kfac.laplace import Laplace
from bayes_kfac.structures import Structure

#: Conditioning on so many training outcomes takes seconds; beyond it time and memory grow fast.
MAX_EXACT = 4000


class LinearizedSurrogate(Surrogate, FantasizeMixin):
    """The network as an affine function of its weights: a Gaussian process whose kernel is ``J P⁻¹ Jᵀ``.

    Args:
        posterior: The posterior, of a ``Gaussian`` likelihood. The network takes ``[batch, d]``.
        num_outputs: The outputs of the network for one input.
        input_transform: Applied to inputs before the network; such as ``Normalize``.
        outcome_transform: What the targets of the network were transformed by; such as ``Standardize``. Predictions are
            transformed back.

    Raises:
        ArgumentError: If the likelihood is not ``Gaussian``.
    """

    _given: Observations | None = None

    @classmethod
    def fit(
        cls,
        train_X: Tensor,
        train_Y: Tensor,
        *,
        network: nn.Module | None = None,
        structure: str | Structure | None = None,
        prior_precision: float | None = None,
        noise_scale: float | None = None,
        steps: int = 400,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | _DefaultType | None = DEFAULT,
    ) -> Self:
        """Train a network on data, and make a surrogate of it.

        The weights are the mode under a Gaussian prior, found by Adam. The precision of the prior and the noise are
        found where the evidence of the linearised network is greatest.

        Args:
            train_X: Inputs, ``n x d``; in the unit cube, or brought there by ``input_transform``. In torch.float64.
            train_Y: Outcomes, ``n x m``.
            network: Takes ``[batch, d]``, gives ``[batch, m]``; trained in place, from the weights that it has. That of
                an earlier surrogate, ``surrogate.weight_posterior.model``, is a warm start. By default a new one of two
                hidden layers of 50 tanh units.
            structure: ``None`` for the whole Gauss-Newton matrix, all layers together, by conditioning on the training
                data in function space: the most exact, for some thousand outcomes at most. Or a structure of blocks as
                in :class:`bayes_kfac.Laplace`, such as ``"kron"``, whose cost does not grow with ``n``.
            prior_precision: Of the weights; by default chosen.
            noise_scale: The noise's standard deviation, of transformed outcomes; by default chosen.
            steps: Steps of Adam, before Gauss-Newton steps where outcomes are at most 1000. A quarter of them
                suffice for a warm start with few new data.
            input_transform: Applied to inputs before the network; such as ``Normalize(d)``. It learns from ``train_X``.
            outcome_transform: Applied to outcomes; by default ``Standardize(m)``. It learns from ``train_Y``. ``None``
                leaves outcomes as they are; prior and noise are then still looked for as for outcomes of unit variance.

        Returns:
            The surrogate.

        Raises:
            ArgumentError: If the shapes or dtypes do not fit, or there are too many data for ``structure=None``.
            NonFiniteError: If an argument holds NaN or infinity.
        """
        check_finite("train_X", train_X)
        check_finite("train_Y", train_Y)
        if train_X.ndim != 2 or train_Y.ndim != 2 or len(train_X) != len(train_Y) or not len(train_X):
            raise ArgumentError(
                f"train_X has shape {tuple(train_X.shape)} and train_Y {tuple(train_Y.shape)}. Allowed: (n, d) and "
                "(n, m), with n >= 1."
            )
        if train_X.dtype != train_Y.dtype or not train_X.is_floating_point():
            raise ArgumentError(
                f"train_X is {train_X.dtype} and train_Y {train_Y.dtype}. Allowed: one floating-point dtype, best "
                "torch.float64."
            )
        if train_X.dtype != torch.float64:
            warnings.warn(
                f"train_X is {train_X.dtype}: BoTorch's optimizers and covariances of close points need torch.float64.",
                InputDataWarning,
                stacklevel=2,
            )
        if structure is None and train_Y.numel() > MAX_EXACT:
            raise ArgumentError(
                f"structure=None is for {MAX_EXACT} outcomes at most, but train_Y holds {train_Y.numel()}. Pass "
                "structure='kron'."
            )
        for name, value in (("prior_precision", prior_precision), ("noise_scale", noise_scale)):
            if value is not None:
                check_positive(name, value)
        steps = check_count("steps", steps)
        if isinstance(outcome_transform, _DefaultType):
            outcome_transform = Standardize(train_Y.shape[1])
        with torch.no_grad():
            X = _learned(input_transform, train_X)
            Y = _learned(outcome_transform, train_Y, X=X)
        validate_input_scaling(train_X=X, train_Y=Y)
        network = default_network(X.shape[1], Y.shape[1], X) if network is None else network
        check_network(network, X, Y)
        with torch.inference_mode(False), torch.enable_grad():  # training needs gradients, wherever this is called
            prior = fit_prior(network, X, Y, prior_precision=prior_precision, noise_scale=noise_scale, steps=steps)
        options = {
            "num_outputs": Y.shape[1],
            "input_transform": input_transform,
            "outcome_transform": outcome_transform,
        }
        if structure is not None:
            delta = dict(prior.prior_precision)
            laplace = Laplace(network, prior.likelihood, structure=structure, prior_precision=delta)
            loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH_SIZE)
            return cls(laplace.fit(loader, progress=False).posterior(), **options)
        surrogate = cls(prior, **options)
        # at the mode the data move nothing: what they say of the mean is in the weights, what of the covariance is here
        with torch.no_grad():
            fitted = surrogate.weight_posterior.linearized.features(X).mean
        variance = surrogate._noise(True, fitted, surrogate._chosen(None)).expand_as(fitted)
        surrogate._given = observed(surrogate.weight_posterior.linearized, X, fitted, variance, surrogate._outputs)
        return surrogate

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the observations that it was conditioned on."""
        return torch.Size() if self._given is None else self._given.batch_shape

    def posterior(  # type: ignore[override]  # FantasizeMixin's own signature is not that of Model
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> BotorchPosterior:
        """The joint Gaussian of all outputs at the ``q`` points of each batch; differentiable in ``X``.

        Args:
            X: Inputs, ``batch_shape x q x d``.
            output_indices: Which outputs; by default all of them. The others are not computed.
            observation_noise: Whether to add the likelihood's noise; or variances of transformed outcomes, which
                broadcast to ``batch_shape x q x m``.
            posterior_transform: Applied to the result.

        Returns:
            A ``GPyTorchPosterior`` over ``batch_shape x q x m``, or what the transforms make of it.
        """
        X = self._transformed(X)
        chosen = self._chosen(output_indices)
        check_broadcast("X", X, self.batch_shape)
        mean, covariance = moments(self.weight_posterior.linearized, X, self._of_network(chosen), self._given)
        if wants_noise(observation_noise):
            noise = self._noise(observation_noise, mean, chosen).expand_as(mean)
            covariance = covariance + torch.diag_embed(noise.flatten(-2))
        operator = to_linear_operator(covariance)
        posterior: BotorchPosterior
        if len(chosen) == 1:
            posterior = GPyTorchPosterior(MultivariateNormal(mean.squeeze(-1), operator))
        else:
            posterior = GPyTorchPosterior(MultitaskMultivariateNormal(mean, operator))
        transform = self._outcome_transform_of(chosen)
        if transform is not None:
            posterior = transform.untransform_posterior(posterior, X=X)
        return posterior if posterior_transform is None else posterior_transform(posterior, X=X)

    def condition_on_observations(  # type: ignore[override]  # other keyword arguments would be lost in silence
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None
    ) -> Self:
        """The surrogate given more observations: the exact update of the linearised model, without any training.

        Observations that the network was trained with are in the posterior already: give it new ones only.

        Args:
            X: Inputs, ``batch_shape x n x d``.
            Y: Observed outcomes, ``batch_shape' x n x m``, where ``batch_shape'`` may have further dimensions first; in
                the order of the outputs, which of a :meth:`subset_output` are those that were chosen.
            noise: The variances of transformed outcomes, which broadcast to ``Y``; by default the likelihood's.

        Returns:
            A new surrogate; this one stays as it is.

        Raises:
            ArgumentError: If the shapes do not fit, or a variance is negative.
            NonFiniteError: If an argument holds NaN or infinity.
        """
        check_finite("X", X)
        check_finite("Y", Y)
        if noise is not None:
            check_tensor("noise", noise)
        if X.ndim < 2 or Y.ndim < 2 or X.shape[-2] != Y.shape[-2] or not X.shape[-2] or Y.shape[-1] != self.num_outputs:
            raise ArgumentError(
                f"X has shape {tuple(X.shape)} and Y {tuple(Y.shape)}. Allowed: batch_shape x n x d and batch_shape' x "
                f"n x {self.num_outputs}, with at least one observation."
            )
        X = self._transformed(X)
        check_broadcast("Y", Y, X.shape[:-2])
        if self._given is not None:
            check_broadcast("X", X, self._given.X.shape[:-2])
            check_broadcast("Y", Y, self.batch_shape)
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=X)
        variance = self._noise(True if noise is None else noise, Y, self._chosen(None), "noise").expand(
            *torch.broadcast_shapes(Y.shape, () if noise is None else noise.shape)
        )
        conditioned = self._copy()
        conditioned._given = observed(
            self.weight_posterior.linearized, X, Y, variance, self._outputs, given=self._given
        )
        return conditioned

    def _copy(self) -> Self:
        copy = type(self)(self.weight_posterior, **self._options())
        copy._outputs, copy._given = self._outputs, self._given
        return copy


def _learned(transform: nn.Module | None, value: Tensor, **options: Any) -> Any:
    """What a transform, if there is one, makes of data that it learns from."""
    if transform is None:
        return value
    made = transform.to(value).train()(value, **options)
    return made[0] if isinstance(made, tuple) else made  # those of outcomes return variances too


def check_broadcast(name: str, value: Tensor, batch_shape: torch.Size) -> None:
    """See that a batch goes with another.

    Args:
        name: The argument's name, for the message.
        value: The argument, ``batch_shape' x n x ...``.
        batch_shape: The other batch.

    Raises:
        ArgumentError: If not.
    """
    try:
        torch.broadcast_shapes(value.shape[:-2], batch_shape)
    except RuntimeError:
        raise ArgumentError(
            f"{name} has batch shape {tuple(value.shape[:-2])}. Allowed: one that broadcasts with "
            f"{tuple(batch_shape)}, that of the observations."
        ) from None
