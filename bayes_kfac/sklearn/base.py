"""What the two estimators share: parameters, checks, scaling, the training, and updates by more data.

Inputs and targets are standardised inside, so that a prior and a step size mean the same whatever the units; the
posterior is of the network in standardised units, and the estimators' methods speak the user's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, is_classifier
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, check_choice, check_count, check_fraction, check_positive
from bayes_kfac.sklearn.examples import Array, Batches, Examples
from bayes_kfac.sklearn.training import Plan, Record, train_laplace, train_noisy, update_laplace
from bayes_kfac.structures import Structure

METHODS = {"laplace": train_laplace, "noisy": train_noisy}
#: The first step size of each method, for standardised data.
STEP_SIZES = {"laplace": 1e-2, "noisy": 1e-1}
ACTIVATIONS = {"identity": nn.Identity, "logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: What chooses the prior's precision from the data.
TUNED = "marginal_likelihood"
#: By default no fewer epochs than this.
EPOCHS = 20


@dataclass(frozen=True)
class Scaling:
    """What columns have taken off and are divided by to have mean 0 and variance 1.

    Attributes:
        location: ``[columns]``.
        scale: ``[columns]``; 1 for a column that is constant.
    """

    location: Array
    scale: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Scaling:
        """The scaling of columns with weighted rows.

        Args:
            values: ``[rows, columns]``.
            weights: ``[rows]``.

        Returns:
            The scaling.
        """
        largest = np.abs(values).max(0)
        shares = weights / weights.sum()
        unit = np.where(largest > 0, largest, 1.0)  # squares of large numbers are not finite
        location = shares @ (values / unit)
        scale = np.sqrt(shares @ (values / unit - location) ** 2)
        is_constant = scale <= 10 * np.finfo(np.float64).eps * len(values)
        return cls(location * unit, np.where(is_constant, 1.0, scale * unit))

    def __call__(self, values: Array) -> Array:
        """The values scaled."""
        return (values - self.location) / self.scale


class BayesianMLP(BaseEstimator, ABC):  # type: ignore[misc]
    """A multilayer perceptron with a Gaussian posterior over its weights; see its two children."""

    _default_temperature = 1.0
    #: By default as many epochs as make so many steps.
    _default_steps: ClassVar[Mapping[str, int]] = {"laplace": 1000, "noisy": 1000}

    def __init__(
        self,
        hidden_layer_sizes: Any = (50,),
        activation: str = "tanh",
        *,
        method: str = "laplace",
        n_members: int = 1,
        structure: str | Structure = "kron",
        damping: str | None = None,
        fisher: str | None = None,
        prior_precision: float | str = "marginal_likelihood",
        temperature: float | None = None,
        batch_size: int = 64,
        learning_rate_init: float | None = None,
        max_iter: int | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        random_state: Any = None,
        verbose: bool = False,
        device: str | torch.device = "cpu",
        dtype: str = "float64",
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.method = method
        self.n_members = n_members
        self.structure = structure
        self.damping = damping
        self.fisher = fisher
        self.prior_precision = prior_precision
        self.temperature = temperature
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.verbose = verbose
        self.device = device
        self.dtype = dtype

    # -- what regression and classification differ in -----------------------------------------------------------------

    @abstractmethod
    def _checked(self, X: Any, y: Any, sample_weight: Any, *, is_first: bool, classes: Any = None) -> Examples:
        """Check data; take note of what the targets are where they are the first."""

    @abstractmethod
    def _take_scales(self, examples: Examples) -> None:
        """Take the scales of inputs and targets from the first data."""

    @abstractmethod
    def _scaled(self, examples: Examples) -> Examples:
        """The examples as the network sees them."""

    @abstractmethod
    def _likelihood(self) -> bk.likelihoods.Likelihood:
        """What the network's output means."""

    @property
    @abstractmethod
    def _outputs(self) -> int:
        """How many outputs the network has."""

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train the posterior from scratch.

        Args:
            X: Inputs, ``[examples, features]``.
            y: Targets, ``[examples]``, or ``[examples, outputs]`` in a regression.
            sample_weight: How often each example was seen, ``[examples]``. A fit to whole numbers is, to the last bit,
                the fit to examples repeated that often. Their sum is the number of data that the prior is weighed
                against, so that it matters: weights of 0.5 are half of the evidence.

        Returns:
            This estimator.

        Raises:
            ArgumentError: If a parameter is out of range.
        """
        self._check_parameters()
        with self._kept_if_it_fails():
            return self._fit(self._checked(X, y, sample_weight, is_first=True), early_stopping=self.early_stopping)

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        """The first data as in :meth:`fit`; further data with the posterior so far as their prior."""
        self._check_parameters()
        if self.early_stopping:
            raise ArgumentError(
                "early_stopping=True sets examples aside for validation, which partial_fit never sees again. Set "
                "early_stopping=False, or call fit()."
            )
        is_first = not hasattr(self, "posteriors_")
        with self._kept_if_it_fails():
            examples = self._checked(X, y, sample_weight, is_first=is_first, classes=classes)
            return self._fit(examples, early_stopping=False) if is_first else self._update(examples)

    @contextmanager
    def _kept_if_it_fails(self) -> Iterator[None]:
        """A fit before stays whole: its posteriors mean nothing with the scales and classes of one that broke off."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _update(self, examples: Examples) -> Self:
        random = check_random_state(self.random_state)
        scaled, trained = self._scaled(examples), []
        for posterior in self.posteriors_:
            plan = self._plan(len(examples), random, "laplace")  # whichever method the first call used
            trained.append(update_laplace(posterior, self.total_weight_, self._batches(scaled, random), plan))
        self.total_weight_ += examples.total
        return self._take(trained)

    def _fit(self, examples: Examples, *, early_stopping: bool) -> Self:
        random = check_random_state(self.random_state)
        plan = self._plan(len(examples), random, self.method)
        self._take_scales(examples)
        scaled, held = self._scaled(examples), None
        if early_stopping:
            if len(scaled) < 2:
                raise ArgumentError("early_stopping=True needs two different examples or more: one is for validation.")
            scaled, held = scaled.split(self.validation_fraction, random, stratified=self._has_classes)
        trained: list[tuple[bk.Posterior, Record]] = []
        for _ in range(self.n_members):
            own = self._plan(len(examples), random, self.method) if trained else plan
            network, likelihood = self._network(own.generator.initial_seed()), self._likelihood()
            likelihood.to(self._device, self._dtype)
            validation = None if held is None else self._batches(held, random)
            trained.append(METHODS[self.method](network, likelihood, self._batches(scaled, random), validation, own))
        self.total_weight_ = scaled.total
        return self._take(trained)

    def _take(self, trained: list[tuple[bk.Posterior, Record]]) -> Self:
        self.posteriors_ = [posterior for posterior, _ in trained]
        record = trained[0][1]
        self.n_iter_ = len(record.losses)
        self.loss_curve_ = record.losses
        self.validation_scores_ = record.scores
        return self

    @property
    def posterior_(self) -> bk.Posterior | bk.Mixture:
        """The posterior of the network's weights; with several members their mixture."""
        check_is_fitted(self)
        return self.posteriors_[0] if len(self.posteriors_) == 1 else bk.Mixture(self.posteriors_)

    def _check_parameters(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if isinstance(self.prior_precision, str):
            if self.prior_precision != TUNED:
                raise ArgumentError(
                    f"prior_precision={self.prior_precision!r} is unknown. Allowed: {TUNED!r}, or a number > 0."
                )
        else:
            check_positive("prior_precision", self.prior_precision)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        self._layer_sizes()
        check_count("n_members", self.n_members)
        check_count("batch_size", self.batch_size)
        check_count("n_iter_no_change", self.n_iter_no_change)
        if self.max_iter is not None:
            check_count("max_iter", self.max_iter)
        if self.learning_rate_init is not None:
            check_positive("learning_rate_init", self.learning_rate_init)
        check_fraction("validation_fraction", self.validation_fraction)
        try:
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ArgumentError(
                f"device={self.device!r} cannot be used ({str(error).splitlines()[0]}). Allowed: a device that this "
                "machine has, as torch names it, such as 'cpu' or 'cuda'."
            ) from error

    def _plan(self, num_examples: int, random: np.random.RandomState, method: str) -> Plan:
        """How to train a member on so many different examples, as long as a method takes."""
        seed = int(random.randint(np.iinfo(np.int32).max))
        steps = -(-num_examples // self.batch_size)
        given = {"damping": self.damping, "fisher": self.fisher}
        return Plan(
            epochs=int(self.max_iter or max(EPOCHS, -(-self._default_steps[method] // steps))),
            lr=float(self.learning_rate_init or STEP_SIZES[method]),
            prior_precision=None if self.prior_precision == TUNED else float(self.prior_precision),
            temperature=self._default_temperature if self.temperature is None else float(self.temperature),
            structure=self.structure,
            options={name: value for name, value in given.items() if value is not None},
            patience=int(self.n_iter_no_change),
            generator=torch.Generator(self._device).manual_seed(seed),
            progress=bool(self.verbose),
        )

    def _network(self, seed: int) -> nn.Sequential:
        """The network with torch's initial weights, by a seed of its own."""
        sizes = [self.n_features_in_, *self._layer_sizes(), self._outputs]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            linear = [nn.Linear(*pair, dtype=torch.float64) for pair in pairwise(sizes)]
        modules = [module for layer in linear[:-1] for module in (layer, ACTIVATIONS[self.activation]())]
        return nn.Sequential(*modules, linear[-1]).to(self._device, self._dtype)

    def _batches(self, examples: Examples, random: np.random.RandomState) -> Batches:
        return Batches(
            examples,
            int(self.batch_size),
            random,
            device=self._device,
            dtype=self._dtype,
            has_classes=self._has_classes,
        )

    # -- predicting ---------------------------------------------------------------------------------------------------

    def _inputs(self, X: ArrayLike) -> Tensor:
        """Checked and scaled inputs for the network."""
        check_is_fitted(self)
        inputs = self.input_scaling_(checked(self, X, dtype=np.float64, reset=False))
        return torch.as_tensor(inputs).to(self.posteriors_[0].device, self._dtype)

    def _layer_sizes(self) -> list[int]:
        """The number of units of each hidden layer, checked."""
        sizes = self.hidden_layer_sizes
        return [check_count("hidden_layer_sizes", size) for size in (sizes if np.iterable(sizes) else [sizes])]

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def _has_classes(self) -> bool:
        return is_classifier(self)


def checked(estimator: BayesianMLP, *args: Any, **options: Any) -> Any:
    """scikit-learn's ``validate_data``, which was a method before its version 1.6.

    Args:
        estimator: Whose data they are.
        args: Inputs, and maybe targets.
        options: What to check.

    Returns:
        The data as arrays.
    """
    try:
        from sklearn.utils.validation import validate_data
    except ImportError:
        return estimator._validate_data(*args, **options)
    return validate_data(estimator, *args, **options)


def checked_weights(sample_weight: Any, X: Array) -> Array:
    """Weights of examples: numbers that are finite, not negative and not all zero.

    Args:
        sample_weight: ``[examples]``, or ``None`` for 1 each.
        X: Inputs, ``[examples, features]``.

    Returns:
        ``[examples]``.

    Raises:
        ArgumentError: If they are not.
    """
    weights: Array = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if not weights.any():  # before scikit-learn's check, which allows it or not by its version
        raise ArgumentError("sample_weight is zero for every example. Allowed: at least one weight > 0.")
    weights = np.asarray(_check_sample_weight(sample_weight, X, dtype=np.float64))
    if (weights < 0).any():
        raise ArgumentError(f"sample_weight holds {weights.min()}. Allowed: how often each example was seen, >= 0.")
    return weights
