"""``Laplace``: a Gaussian around the weights of a trained model, with the curvature of its loss as the precision.

``P = (N/τ) F̄ + P₀`` at the weights as they are, with the structures, the posterior and the predictions of the rest of
the library. Fitting is one pass over the data, in which nothing of the model changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import (
    Frame,
    Recorder,
    Statistics,
    Summary,
    check_types,
    find_covered,
    summarize,
    unwrapped,
)
from bayes_kfac.errors import ArgumentError, UsageError, check_choice, check_count, check_generator, check_positive
from bayes_kfac.laplace import tuning
from bayes_kfac.laplace.fitted import Fitted, Priors
from bayes_kfac.laplace.loaders import warn_of_samplers
from bayes_kfac.laplace.measurement import Measurement, Surveyor
from bayes_kfac.laplace.prior import PriorPrecision, as_prior, by_layer, checked
from bayes_kfac.laplace.subset import Subset, choose_parameters
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import MEMORY_BUDGET
from bayes_kfac.provenance import Provenance
from bayes_kfac.readonly import ReadOnly
from bayes_kfac.structures import BlockSpec, Structure

if TYPE_CHECKING:
    from bayes_kfac.training import NoisyNaturalGradient


#: What is settled when a Laplace is made: layers and blocks, or the measurement, are of it.
SETTLED = ("model", "likelihood", "structure", "fisher", "num_data", "prior")
#: So are these, which are no attributes.
ARGUMENTS = ("damping", "sharing", "subset", "others")


class Laplace:
    """A Laplace approximation of the posterior around a model's weights.

    ``bk.Laplace(model, likelihood).fit(loader).posterior()``.

    Args:
        model: The trained model; its weights are the mode. It stays as it is: mode, weights, hooks, attributes.
        likelihood: What its output means; copied, and again by a fit, which stays what it was if this one changes.
        structure: The family of the posterior's blocks: one of ``bayes_kfac.structures.available()``, or a structure
            with options of its own.
        subset: Which parameters have a posterior: ``"all"``, ``"last_layer"`` (that which is defined last),
            ``"requires_grad"``, a list of names of parameters or modules, or a function of a parameter's name and the
            parameter. The others stay at the mode.
        damping: How the prior enters a block: ``"exact"``, ``"factored"`` or ``"optimal"``.
        fisher: ``"exact"`` (the generalised Gauss-Newton), ``"mc"``, ``"empirical"``, or ``"recursive"`` (KFRA, of
            chains of layers; it averages over each batch, and depends on how the data are cut into batches).
        sharing: How positions that share weights are summed: ``"expand"`` or ``"reduce"``.
        prior_precision: The precision ``δ`` of the prior ``N(0, I/δ)``, 1 by default; or numbers by the names of layers
            or parameters.
        prior: The posterior of an earlier task as the prior, mean and precision, in the place of ``prior_precision``.
            With Kronecker blocks it must be a matrix normal: of damping ``"factored"`` or ``"optimal"``, or
            :meth:`Posterior.nearest_matrix_normal`; the sum is then exact.
        temperature: The weight ``τ`` of the prior against the data; 1 is Bayes.
        others: What to do with parameters that no block covers: ``"error"``, ``"diagonal"`` to give each an independent
            Gaussian, or ``"deterministic"`` to leave them at the mode.
        num_data: The number of training examples; by default those that the loader yields.
        generator: The source of randomness for ``fisher="mc"``.
        memory_budget: Bytes that output gradients may take up while they are pulled back. Before that the exact Fisher
            has outputs² numbers for each example of a batch, and the structures that keep a window of columns,
            ``"smw"``, ``"skfac"`` and ``"mfac"``, need what was pulled back for a whole batch together: for many
            outputs choose small batches, or ``fisher="mc"``.

    Raises:
        ArgumentError: If an argument is out of range.
        UnsupportedModelError: If the subset has no block, or parameters outside blocks with ``others="error"``.

    Example:
        With one weight, 99 inputs of 1, noise 1 and prior precision 1 the posterior variance is 1 / (99 + 1):

        >>> import bayes_kfac as bk, torch
        >>> x = torch.ones(99, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(2.0)
        tensor([[2.]])
        >>> laplace = bk.Laplace(model, bk.likelihoods.Gaussian(1.0)).fit([(x, 2 * x)], progress=False)
        >>> laplace.posterior().predict(x[:1]).epistemic_variance
        tensor([[0.0100]])
        >>> _ = laplace.update([(x, 2 * x)], progress=False)  # as many again
        >>> laplace.posterior().provenance.num_data
        198
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        structure: str | Structure = "kron",
        subset: Subset = "all",
        damping: str = "exact",
        fisher: str = "exact",
        sharing: str = "expand",
        prior_precision: PriorPrecision | None = None,
        prior: Posterior | None = None,
        temperature: float = 1.0,
        others: str = "error",
        num_data: int | None = None,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        check_types(model, likelihood)
        self.model, _ = unwrapped(model)
        self.likelihood = copy.deepcopy(likelihood)
        self.structure = structures.get(structure, damping=damping, sharing=sharing)
        self.structure.check_posterior()
        self.structure.check_fisher(fisher)
        self.fisher = fisher
        self.temperature = temperature
        self.num_data = None if num_data is None else check_count("num_data", num_data)
        self.memory_budget = memory_budget
        self.generator = generator
        parameters = choose_parameters(self.model, subset)
        self.layers, self.reasons = find_covered(self.model, parameters, others)
        self.structures = self.structure.for_layers(self.layers)
        self.prior = prior
        self._prior_precision: dict[str, Tensor] = {}
        if prior is not None:
            self._check_prior(prior, prior_precision)
        else:
            self.prior_precision = 1.0 if prior_precision is None else prior_precision
        self._noise_scale: Tensor | None = None
        self._recorder = Recorder(self.layers)
        self._fitted: Fitted | None = None

    @classmethod
    def from_trainer(cls, trainer: NoisyNaturalGradient, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """The evidence and the tuning of a posterior that was trained by noisy natural gradient.

        The curvature is the trainer's moving average, so that :meth:`posterior` is the trainer's; the log-likelihood at
        the mean is measured.

        Args:
            trainer: The trainer; it stays as it is.
            loader: The training data, as for :meth:`fit`.
            progress: Whether to show a progress bar.

        Returns:
            What :meth:`fit` would return with that curvature.

        Raises:
            ArgumentError: If ``trainer`` is none.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> x, y = torch.eye(4), torch.tensor([0, 1, 1, 0])
            >>> model, likelihood = torch.nn.Linear(4, 2), bk.likelihoods.Categorical()
            >>> optimizer = bk.NoisyKFAC(model, likelihood, num_data=4)
            >>> with optimizer.sampled_params():
            ...     likelihood(model(x), y).backward()
            >>> optimizer.step()
            >>> laplace = bk.Laplace.from_trainer(optimizer, [(x, y)], progress=False)
            >>> bool(laplace.log_marginal_likelihood() < 0)  # of class labels, in nats
            True
        """
        if not hasattr(trainer, "blocks"):
            raise ArgumentError(
                f"trainer={trainer!r} is not allowed. Allowed: an optimizer of this library, such as NoisyKFAC."
            )
        own = {parameter for layer in trainer.layers.values() for parameter in layer.parameters.values()}
        laplace = cls(
            trainer.model,
            trainer.likelihood,
            structure=trainer.structure,
            subset=lambda _, parameter: parameter in own,
            damping=trainer.structure.damping,
            fisher=trainer.fisher,
            sharing=trainer.structure.sharing,
            prior_precision=trainer.prior_precision,
            temperature=trainer.temperature,
            others="diagonal",
            num_data=trainer.num_data,
        )
        statistics = {name: state.measured(name) for name, state in trainer.blocks.items()}
        mean = _copied_state(laplace.model)
        likelihood = copy.deepcopy(laplace.likelihood)
        measured = laplace._measure(likelihood, Recorder({}), loader, mean, {}, progress)
        laplace._take(replace(measured, statistics=statistics), mean, likelihood)
        return laplace

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be set and not counted."""
        if name == "generator":
            check_generator(value)
        if name == "memory_budget":
            check_count("memory_budget", value)
        if (name in SETTLED and name in self.__dict__) or name in ARGUMENTS:
            raise AttributeError(
                f"{name} is settled when a Laplace is made. Make a new one with the other {name}, and fit it."
            )
        super().__setattr__(name, value)

    @property
    def prior_precision(self) -> dict[str, Tensor]:
        """The precision of each layer's prior, to be read; may be set as a whole, in the forms of the constructor."""
        return ReadOnly(self._prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        if self.prior is not None:
            raise ArgumentError("prior_precision= cannot be changed where the prior is a posterior. Leave it out.")
        self._prior_precision = by_layer(value, self.layers)

    @property
    def temperature(self) -> float:
        """The weight ``τ`` of the prior against the data; may be set."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_positive("temperature", value)

    # -- the data -----------------------------------------------------------------------------------------------------

    def fit(self, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Measure the curvature and the log-likelihood of the training data at the weights as they are.

        One pass over the data for most structures; some take several.

        Args:
            loader: Yields batches: ``(inputs, target)``, ``(inputs, target, mask)``, or mappings or dataclasses with a
                field ``target`` or ``labels``, maybe a ``mask``, and the model's keyword arguments.
            progress: Whether to show a progress bar.

        Returns:
            This object. A fit before is forgotten, with the noise that was chosen by it; the prior stays.
        """
        with torch.inference_mode(False):  # the evidence is to be differentiable, wherever this is called
            mean, likelihood = _copied_state(self.model), copy.deepcopy(self.likelihood)
            frames: dict[str, Frame] = {}
            for _ in range(self.passes - 1):
                before = self._measure(likelihood, self._recorder, loader, mean, frames, progress)
                frames = {
                    name: self.structures[name].reframed(own, name).frame for name, own in before.statistics.items()
                }
            measured = self._measure(likelihood, self._recorder, loader, mean, frames, progress)
            self._take(measured, mean, likelihood)
        self._noise_scale = None
        return self

    @property
    def passes(self) -> int:
        """How often :meth:`fit` goes through the data."""
        return max((structure.passes for structure in self.structures.values()), default=1)

    def update(self, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Add more data to the fit: the result is that of one fit to all of them, where a fit takes one pass.

        Structures that take several (:attr:`passes` above 1: ``"ekfac"``, ``"tekfac"`` and the sums of Kronecker
        products) measure the new data in coordinates that the old data gave, which one fit to all would choose anew:
        close to it where the new data are like the old. Columns of ``"mfac"`` are of batches, and depend on them.

        Args:
            loader: The new data, as for :meth:`fit`.
            progress: Whether to show a progress bar.

        Returns:
            This object.

        Raises:
            UsageError: If nothing was fitted, or the model's weights have changed since.
        """
        fitted = self._check_fitted()
        now = _copied_state(self.model)
        if any(not torch.equal(value, now[name]) for name, value in fitted.mean.items()):
            raise UsageError(
                "The model's weights have changed since fit(), so that the curvature of old and new data is not that "
                "of one mode. Make a new Laplace with prior=laplace.posterior()."
            )
        if self.num_data is not None:
            raise UsageError(
                f"num_data={self.num_data} was given for all of the data. Leave it out to count what fit() and "
                "update() see."
            )
        with torch.inference_mode(False):
            frames = fitted.measurement.frames
            more = self._measure(fitted.likelihood, self._recorder, loader, fitted.mean, frames, progress)
            self._take(fitted.measurement + more, fitted.mean, fitted.likelihood)
        return self

    def _take(self, measurement: Measurement, mean: Mapping[str, Tensor], likelihood: Likelihood) -> None:
        """Go by a measurement at a mean from now on, made with a likelihood."""
        self._fitted = Fitted(
            measurement,
            self.model,
            mean,
            self.layers,
            self.structures,
            likelihood,
            Provenance(
                method="Laplace",
                structure=self.structure.name,
                damping=self.structure.damping,
                fisher=self.fisher,
                sharing=self.structure.sharing,
                temperature=self.temperature,
                num_data=round(measurement.num_examples),
            ),
            None if self.prior is None else self.prior.mean,
        )

    def _measure(
        self,
        likelihood: Likelihood,
        recorder: Recorder,
        loader: Iterable[Any],
        mean: Mapping[str, Tensor],
        frames: Mapping[str, Frame],
        progress: bool,
    ) -> Measurement:
        surveyor = Surveyor(
            self.model,
            mean,
            likelihood,
            recorder,
            self.structures,
            self.fisher,
            self.generator,
            self.memory_budget,
        )
        measured = surveyor.survey(loader, frames, progress=progress)
        if self.num_data is not None:
            return measured.counting(self.num_data)
        warn_of_samplers(loader, surveyor.num_yielded, stacklevel=3)
        return measured

    # -- the evidence -------------------------------------------------------------------------------------------------

    def log_marginal_likelihood(
        self,
        prior_precision: PriorPrecision | None = None,
        *,
        temperature: float | Tensor | None = None,
        noise_scale: float | Tensor | None = None,
    ) -> Tensor:
        """The evidence ``log p(D)`` of the training data, in nats, differentiable in its arguments.

        Args:
            prior_precision: Another prior than the fit's, in the forms of the constructor.
            temperature: Another temperature: the likelihood is taken to the power ``1/τ``. It compares priors at one
                temperature, not temperatures: a likelihood that is raised to a power is no density.
            noise_scale: Another noise of a Gaussian likelihood.

        Returns:
            A scalar, in float64.

        Raises:
            ArgumentError: If an argument is out of range, or the prior is a posterior.
            UsageError: If nothing was fitted.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> model = torch.nn.Linear(2, 1)
            >>> laplace = bk.Laplace(model, bk.likelihoods.Gaussian(1.0))
            >>> _ = laplace.fit([(torch.eye(2), torch.ones(2, 1))], progress=False)
            >>> delta = torch.tensor(1.0, requires_grad=True)
            >>> laplace.log_marginal_likelihood(delta).backward()
            >>> delta.grad is not None
            True
        """
        fitted = self._check_fitted()
        if prior_precision is not None and self.prior is not None:
            raise ArgumentError("prior_precision= cannot be changed where the prior is a posterior. Leave it out.")
        device = fitted.measurement.nll.device
        priors = self._priors if prior_precision is None else by_layer(prior_precision, self.layers)
        temperature = self.temperature if temperature is None else temperature
        noise = self._noise_scale if noise_scale is None else noise_scale
        with linalg.leaving_inference_mode():  # what is decomposed here is kept
            return fitted.evidence(
                priors,
                checked("temperature", temperature).to(device, torch.float64),
                None if noise is None else checked("noise_scale", noise).to(device, torch.float64),
            )

    def optimize_prior_precision(
        self,
        method: str = "marginal_likelihood",
        *,
        per: str = "layer",
        noise: bool = False,
        loader: Iterable[Any] | None = None,
        grid: Iterable[float] | None = None,
        progress: bool = True,
        **predict: Any,
    ) -> Self:
        """Choose the prior's precision, by the evidence or by predictions of validation data.

        Args:
            method: ``"marginal_likelihood"``: the maximum of the evidence, which is concave in the logarithms.
                ``"validation"``: the value of a grid with the least negative log-likelihood of validation data.
            per: By the evidence: one precision for the ``"model"``, each ``"layer"`` or each ``"parameter"``.
            noise: Whether to choose the scale of a Gaussian likelihood's noise with it, by the evidence.
            loader: The validation data.
            grid: The values to try, one for the whole model; by default 21 from 1e-4 to 1e4.
            progress: Whether to show a progress bar over the grid.
            predict: How to predict validation data: arguments of :meth:`Posterior.predict`.

        Returns:
            This object.

        Raises:
            ArgumentError: If arguments do not go with the method.
            NonFiniteError: If the noise is to be chosen where the model fits all targets exactly; the fit stays as it
                was.
            UsageError: If nothing was fitted.

        Example:
            A weight of 2 that is well determined: the evidence wants prior variance 2² + (posterior variance).

            >>> import bayes_kfac as bk, torch
            >>> x = torch.ones(1000, 1)
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.constant_(model.weight, 2.0)
            >>> laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.1)).fit([(x, 2 * x)], progress=False)
            >>> laplace.optimize_prior_precision().prior_precision
            {'(root)': tensor(0.2500)}
        """
        fitted = self._check_fitted()
        check_choice("method", method, tuning.METHODS)
        check_choice("per", per, tuning.GROUPINGS)
        if self.prior is not None:
            raise ArgumentError("prior= is a posterior, whose precision is what it is. Nothing to optimize.")
        if method == "validation":
            if noise or loader is None:
                raise ArgumentError("method='validation' needs loader=, the validation data, and leaves noise=False.")
            values = tuning.values_of(grid)
            best = tuning.best_on_validation(
                [
                    (v, partial(fitted.posterior, by_layer(v, self.layers), self.temperature, self._noise_scale))
                    for v in values
                ],
                loader,
                progress=progress,
                predict=predict,
            )
            self.prior_precision = by_layer(best, self.layers)
            return self
        if not isinstance(noise, bool):
            raise ArgumentError(f"noise={noise!r} is not allowed. Allowed: True, to choose its scale too, or False.")
        if loader is not None or grid is not None or predict:
            raise ArgumentError("loader=, grid= and arguments of predict are for method='validation'.")
        with torch.inference_mode(False), torch.enable_grad():
            self.prior_precision, self._noise_scale = tuning.maximize_evidence(
                fitted,
                self.prior_precision,
                self.temperature,
                self._noise_scale,
                per=per,
                noise=noise,
            )
        return self

    def optimize_temperature(
        self,
        loader: Iterable[Any],
        *,
        grid: Iterable[float] | None = None,
        progress: bool = True,
        **predict: Any,
    ) -> Self:
        """Choose the temperature with the least negative log-likelihood of validation data.

        Args:
            loader: The validation data.
            grid: The values to try; by default 21 from 1e-4 to 1e4.
            progress: Whether to show a progress bar over the grid.
            predict: How to predict: arguments of :meth:`Posterior.predict`.

        Returns:
            This object.
        """
        fitted = self._check_fitted()
        values = [check_positive("temperature", value) for value in tuning.values_of(grid)]
        self.temperature = tuning.best_on_validation(
            [(v, partial(fitted.posterior, self._priors, v, self._noise_scale)) for v in values],
            loader,
            progress=progress,
            predict=predict,
        )
        return self

    # -- the result ---------------------------------------------------------------------------------------------------

    def posterior(self) -> Posterior:
        """The posterior: the weights of :meth:`fit`, and blocks by the present prior, noise and temperature.

        Returns:
            The posterior.

        Raises:
            UsageError: If nothing was fitted.
        """
        with linalg.leaving_inference_mode():
            return self._check_fitted().posterior(self._priors, self.temperature, self._noise_scale)

    def summary(self) -> Summary:
        """For each parameter: its block, structure, shape, and why where it has none."""
        names = {name: kind.label for name, kind in self.structures.items()}
        return summarize(self.model, self.layers, self.reasons, names)

    def _check_fitted(self) -> Fitted:
        if self._fitted is None:
            raise UsageError("Nothing was fitted yet. Call fit(loader) first.")
        return self._fitted

    @property
    def _priors(self) -> Priors:
        if self.prior is None:
            return self.prior_precision
        return {
            name: block.map(partial(as_prior, layer=self.layers[name])) for name, block in self.prior.blocks.items()
        }

    def _check_prior(self, prior: Posterior, prior_precision: PriorPrecision | None) -> None:
        if prior_precision is not None:
            raise ArgumentError("prior= and prior_precision= both say what the prior is. Leave one of them out.")
        if not isinstance(prior, Posterior):
            raise ArgumentError(
                f"prior={prior!r} is not allowed. Allowed: a Posterior. A number is a prior_precision=."
            )
        own = {name: layer.shape for name, layer in self.layers.items()}
        theirs = {name: block.shape for name, block in prior.blocks.items()}
        if own != theirs:
            differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            raise ArgumentError(
                f"prior= has other blocks than this model's subset: {', '.join(differing)}. Allowed: a posterior over "
                "the same layers."
            )
        if prior.blocks.links:
            raise ArgumentError(
                "prior= links layers, which no structure can add exactly. Allowed: nearest_matrix_normal() of it."
            )
        # whether each structure can add the prior exactly is known when it has done so, and better before the data
        specs = [BlockSpec(name, self._without_curvature(name), 1.0, block) for name, block in self._priors.items()]
        structures.build(self.structures, specs)

    def _without_curvature(self, name: str) -> Statistics:
        layer = self.layers[name]
        identity = self.structures[name].identity(layer.shape, layer.template, **layer.form)
        return identity.map(torch.zeros_like)


def _copied_state(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in named}
