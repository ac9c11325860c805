"""Regression: targets of one or several outputs, with Gaussian noise of a scale of its own for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from torch import Tensor

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, check_count
from bayes_kfac.prediction import GaussianOutput, GaussianPrediction, Source, pool
from bayes_kfac.prediction.forward import call
from bayes_kfac.prediction.regression import RegressionPrediction
from bayes_kfac.sklearn.base import BayesianMLP, Scaling, checked, checked_weights
from bayes_kfac.sklearn.examples import Array, Examples


class BayesianMLPRegressor(MultiOutputMixin, RegressorMixin, BayesianMLP):  # type: ignore[misc]
    """A multilayer perceptron for regression that knows how sure it is.

    The weights have a Gaussian posterior, predictions are those of the network linearised in its weights, in closed
    form, and the noise is learned. Inputs and targets are standardised inside; everything that the methods take and
    return is in the units of the data.

    Args:
        hidden_layer_sizes: The number of units of each hidden layer; a number for one layer, ``()`` for none.
        activation: ``"tanh"``, ``"relu"``, ``"logistic"`` or ``"identity"``.
        method: ``"laplace"``: the most probable weights by Adam, and the curvature there. ``"noisy"``: noisy natural
            gradient, which trains the posterior itself; some times slower.
        n_members: How many posteriors to train from different initial weights; predictions are those of their equal
            mixture (:class:`bayes_kfac.Mixture`). All costs are times their number.
        structure: The family of the posterior's blocks: one of ``bayes_kfac.structures.available()``, or a structure
            with options of its own.
        damping: How the prior enters a block, ``"exact"``, ``"factored"`` or ``"optimal"``; by default the first for
            Laplace, the second for noisy natural gradient.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"recursive"``; by default the first for Laplace, the second
            for noisy natural gradient.
        prior_precision: The precision of the weights' Gaussian prior, or ``"marginal_likelihood"`` to find one for
            each layer from the training data.
        temperature: The weight of the prior against the data; by default 1, which is Bayes. Below it the noise is
            still that of 1: noisy natural gradient trains at 1 first and goes on from there, which doubles the cost.
        batch_size: The most examples in a step.
        learning_rate_init: The first step size, which decays along a half cosine; by default 0.01 for Laplace (Adam)
            and 0.1 for noisy natural gradient.
        max_iter: Passes over the data; by default as many as make 1000 steps, or 5000 of noisy natural gradient, and no
            less than 20.
        early_stopping: Whether to set a validation part aside, stop when its log-likelihood no longer gets better, and
            go back to the best epoch.
        validation_fraction: How large a part.
        n_iter_no_change: Epochs without a better one before training stops.
        random_state: A seed, or a ``numpy.random.RandomState``: of initial weights, batches and samples.
        verbose: Whether to show a progress bar.
        device: Where to compute, as torch names it.
        dtype: ``"float64"`` or ``"float32"``: in what precision to compute.

    Attributes:
        posterior_: The :class:`bayes_kfac.Posterior` of the network's weights, for standardised inputs and targets;
            of several members their :class:`bayes_kfac.Mixture`.
        posteriors_: Those of all members.
        input_scaling_: Its ``location`` and ``scale`` of each input.
        target_scaling_: The same of each target.
        total_weight_: How many examples the posterior is from: the sum of their weights.
        n_iter_: Passes over the data, of the first member.
        loss_curve_: The mean negative log-likelihood of each of its passes, of standardised targets in nats.
        validation_scores_: The mean log-likelihood of the validation part after each; empty where there is none.
        n_features_in_: The number of inputs.
        feature_names_in_: Their names, where ``X`` had string names.
    """

    # while the noise is still large, noisy natural gradient sees no more than a linear function
    _default_steps: ClassVar[Mapping[str, int]] = {"laplace": 1000, "noisy": 5000}

    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Take in more data, with the posterior so far as their prior; no data are kept.

        The first call is :meth:`fit`. Later ones find the most probable weights of the new data under the old
        posterior, and the Laplace posterior there. The past is remembered to second order, and scales stay those of
        the first data: each call's data should be like the whole. Structures whose
        posterior cannot be a prior exactly are refused by an error that says so.

        Args:
            X: New inputs, ``[examples, features]``.
            y: Their targets.
            sample_weight: How often each was seen; see :meth:`fit`.

        Returns:
            This estimator.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: ArrayLike, return_std: bool = False, return_cov: bool = False) -> Array | tuple[Array, Array]:
        """The mean of the targets, and how far they may be from it.

        Standard deviations and covariances are of new targets, noise included; :meth:`predict_distribution` tells
        noise from ignorance.

        Args:
            X: Inputs, ``[examples, features]``.
            return_std: Whether to return standard deviations too, shaped like the mean.
            return_cov: Whether to return the joint covariance over the examples too, ``[examples, examples]``, or
                ``[examples, examples, outputs]`` where ``y`` had two dimensions.

        Returns:
            The mean, ``[examples]`` or ``[examples, outputs]`` as ``y`` was; with the standard deviations or the
            covariance where they are asked for.

        Raises:
            ArgumentError: If both are asked for.
        """
        if return_std and return_cov:
            raise ArgumentError("return_std=True and return_cov=True cannot both be. The covariance has the variances.")
        inputs, scaling = self._inputs(X), self.target_scaling_
        if return_std:
            prediction = self._prediction(inputs, output_covariance="diagonal")
            return self._as_given(_array(prediction.mean)), self._as_given(_array(prediction.stddev))
        with torch.no_grad():
            outputs = torch.stack([call(own.model, own.mean, inputs) for own in self.posteriors_])
        mean = self._as_given(_array(outputs.mean(0)) * scaling.scale + scaling.location)
        if not return_cov:
            return mean
        covariance = np.mean([_covariance(own, inputs) for own in self.posteriors_], axis=0)
        apart = _array(outputs - outputs.mean(0))  # a member's means are off together at all inputs
        covariance += np.einsum("mio,mjo->ijo", apart, apart) / len(apart)
        return mean, self._as_given(covariance * scaling.scale**2)

    def predict_distribution(self, X: ArrayLike) -> RegressionPrediction:
        """The predictive distribution, in the units of the data, as the library's result.

        Args:
            X: Inputs, ``[examples, features]``.

        Returns:
            With ``mean``, ``stddev``, ``epistemic_variance``, ``aleatoric_variance``, ``interval(0.9)``,
            ``log_prob(target)`` and more, as tensors of ``[examples, outputs]``, in float64 on the CPU whatever
            ``dtype`` and ``device`` are; ``log_prob`` takes targets of that shape.
        """
        return self._prediction(self._inputs(X), output_covariance="full")

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: Any = 0) -> Array:
        """Draw targets jointly at some inputs: functions of the posterior, with noise.

        Args:
            X: Inputs, ``[examples, features]``.
            n_samples: How many draws.
            random_state: A seed, or a ``numpy.random.RandomState``.

        Returns:
            ``[examples, n_samples]``, or ``[examples, outputs, n_samples]`` where ``y`` had two dimensions. Their
            covariance over examples is that of :meth:`predict`.
        """
        inputs = self._inputs(X)
        n_samples = check_count("n_samples", n_samples)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        generator = torch.Generator(inputs.device).manual_seed(seed)
        members = len(self.posteriors_)
        of = torch.zeros(n_samples, dtype=torch.long, device=inputs.device)
        if members > 1:  # one member's draws are those of an estimator of one
            of = torch.randint(members, (n_samples,), generator=generator, device=inputs.device)
        standard = torch.empty(n_samples, len(inputs), self._outputs).to(inputs)
        for index in of.unique().tolist():
            own = of == index
            standard[own] = _targets(self.posteriors_[index], inputs, int(own.sum()), generator)
        drawn = _array(standard) * self.target_scaling_.scale + self.target_scaling_.location
        return self._as_given(drawn.transpose(1, 0, 2)) if self._is_flat else drawn.transpose(1, 2, 0)

    def _prediction(self, inputs: Tensor, *, output_covariance: str) -> RegressionPrediction:
        """The members' predictions together, brought from standard units to those of the targets as these are kept."""
        scale, location = map(torch.as_tensor, (self.target_scaling_.scale, self.target_scaling_.location))
        predictions = []
        for posterior in self.posteriors_:
            with torch.no_grad():
                output = posterior.output(inputs, output_covariance=output_covariance)
            # float32 could not hold variances of very small or large targets, nor what is small beside their location
            mean, spread, noise_scale = (
                own.cpu().double() for own in (output.mean, output.spread, _noise_scale(posterior))
            )
            spread = spread * (scale**2 if output.is_diagonal else torch.outer(scale, scale))
            source = Source("linearized", None, posterior.provenance)
            own = GaussianOutput(mean * scale + location, spread)
            predictions.append(GaussianPrediction(own, (noise_scale * scale) ** 2, source))
        return cast(RegressionPrediction, pool(predictions))

    def _as_given(self, values: Array) -> Array:
        """Without the dimension of outputs, the last one, where the targets had none."""
        return values[..., 0] if self._is_flat else values

    # -- what BayesianMLP asks for ------------------------------------------------------------------------------------

    def _checked(self, X: Any, y: Any, sample_weight: Any, *, is_first: bool, classes: Any = None) -> Examples:
        inputs, targets = checked(
            self,
            X,
            y,
            dtype=np.float64,
            multi_output=True,
            y_numeric=True,
            reset=is_first,
            ensure_min_samples=1 + is_first,
        )
        is_flat, targets = targets.ndim == 1, targets.reshape(len(targets), -1).astype(np.float64)
        if is_first:
            self._is_flat, self._num_targets = is_flat, targets.shape[1]
        elif (is_flat, targets.shape[1]) != (self._is_flat, self._num_targets):
            shape = "[examples]" if self._is_flat else f"[examples, {self._num_targets}]"
            raise ArgumentError(
                f"y has {targets.shape[1]} outputs. Allowed: targets shaped {shape}, as at the first fit."
            )
        return Examples.of(inputs, targets, checked_weights(sample_weight, inputs))

    def _take_scales(self, examples: Examples) -> None:
        self.input_scaling_ = Scaling.of(examples.inputs, examples.weights)
        self.target_scaling_ = Scaling.of(examples.targets, examples.weights)

    def _scaled(self, examples: Examples) -> Examples:
        return Examples(self.input_scaling_(examples.inputs), self.target_scaling_(examples.targets), examples.weights)

    def _likelihood(self) -> bk.likelihoods.Gaussian:
        unit = torch.ones(self._outputs, dtype=self._dtype)
        return bk.likelihoods.Gaussian(bk.likelihoods.LearnedNoise(unit) if self.method == "noisy" else unit)

    @property
    def _outputs(self) -> int:
        return self._num_targets


def _noise_scale(posterior: bk.Posterior) -> Tensor:
    """The noise's standard deviation, ``[outputs]``, for standardised targets."""
    return cast(bk.likelihoods.Gaussian, posterior.likelihood).noise_scale


def _covariance(posterior: bk.Posterior, inputs: Tensor) -> Array:
    """The joint covariance of standardised targets over inputs, noise included, ``[examples, examples, outputs]``."""
    covariance = _array(posterior.function_covariance(inputs).diagonal(dim1=-2, dim2=-1)).copy()
    diagonal = np.arange(len(covariance))
    covariance[diagonal, diagonal] += _array(_noise_scale(posterior) ** 2)
    return covariance


def _targets(posterior: bk.Posterior, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws of standardised targets, ``[count, examples, outputs]``."""
    functions = posterior.function_samples(inputs, count, generator=generator)
    noise = torch.randn(functions.shape, generator=generator, dtype=functions.dtype, device=functions.device)
    return functions + noise * _noise_scale(posterior)


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
