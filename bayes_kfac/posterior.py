"""The posterior: a Gaussian over a model's weights, as a mean and a zero-mean Gaussian over all layers.

It holds its own copies of all parameters and buffers, so that it stays what it is while the model trains on; the model
object serves as the function only, and is left as it was by every call here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Layer, Summary, find_layers, summarize
from bayes_kfac.errors import ArgumentError, UsageError, check_choice, check_count, check_generator
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction import (
    LINKS,
    MEMORY_BUDGET,
    Draws,
    GaussianOutput,
    LinearizedModel,
    Prediction,
    Source,
    check_draws,
    concatenate,
    from_gaussian,
    from_outputs,
    sampled_outputs,
)
from bayes_kfac.prediction.forward import parts_of
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, JointGaussian

if TYPE_CHECKING:
    from bayes_kfac.distributions import MatrixNormal
    from bayes_kfac.pyro import PosteriorGuide

METHODS = ("linearized", "sampling")
OUTPUT_COVARIANCES = ("full", "diagonal")


class Posterior:
    """A Gaussian over the weights of a model.

    Args:
        model: The model, whose current weights are the mean; it is kept as the function, not copied.
        likelihood: What its output means; copied.
        blocks: The zero-mean Gaussian of each layer, by the layer's name; or of all layers together, where some are
            linked: a block is then the Gaussian of its layer given the layers before it.
        prior_precision: The prior's precision of each layer, by the same names: a number, or that of each weight in the
            shape of its block.
        provenance: How the posterior was made.
        layers: The layers; by default those of the model's parameters that are not frozen.
        mean: All parameters and buffers at the mean; by default the model's own.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> model, x = torch.nn.Linear(2, 1), torch.eye(2)
        >>> laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.5), damping="optimal")
        >>> posterior = laplace.fit([(x, torch.ones(2, 1))], progress=False).posterior()
        >>> posterior.predict(x).mean.shape
        torch.Size([2, 1])
        >>> posterior.distribution("(root)").event_shape  # of [weight, bias]
        torch.Size([1, 3])
        >>> bool(posterior.kl() > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        blocks: Mapping[str, BlockGaussian],
        *,
        prior_precision: Mapping[str, float | Tensor],
        provenance: Provenance,
        layers: Mapping[str, Layer] | None = None,
        mean: Mapping[str, Tensor] | None = None,
    ) -> None:
        found, self.reasons = find_layers(model)
        self.model = model
        self.layers = {name: (layers or found)[name] for name in blocks}
        covered = {parameter for layer in self.layers.values() for parameter in layer.parameters}
        for layer in found.values():
            missing = [parameter for parameter in layer.parameters if parameter not in covered]
            self.reasons.update(dict.fromkeys(missing, "it has no block in this posterior"))
        self.likelihood = copy.deepcopy(likelihood).requires_grad_(False)
        # contiguous, as they come back from a file: in another layout products may differ in the last bit
        self.blocks = JointGaussian.of(blocks).map(Tensor.contiguous)
        self.prior_precision = dict(prior_precision)
        self.provenance = provenance
        self.mean = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in (_named_state(model) if mean is None else mean).items()
        }
        #: The model as an affine function of its weights around the mean.
        self.linearized = LinearizedModel(model, self.mean, self.layers, self.blocks)

    def __repr__(self) -> str:
        """The layers and where they came from; :meth:`summary` has a line for each parameter."""
        return f"Posterior(layers={list(self.layers)}, {self.provenance!r})"

    # -- draws and predictions ----------------------------------------------------------------------------------------

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Draws:
        """Draw weights, to be passed to :meth:`predict` as ``draws=`` as often as wanted.

        Args:
            num_samples: How many.
            generator: The source of randomness.

        Returns:
            The draws.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 1), bk.likelihoods.Gaussian(0.5))
            >>> posterior = laplace.fit([(torch.eye(2), torch.ones(2, 1))], progress=False).posterior()
            >>> draws = posterior.sample(8, generator=torch.Generator().manual_seed(0))
            >>> len(draws), draws.values["weight"].shape
            (8, torch.Size([8, 1, 2]))
            >>> one, two = (posterior.predict(torch.eye(2), draws=draws) for _ in range(2))
            >>> torch.equal(one.mean, two.mean)  # the same functions at every call
            True
        """
        num_samples = check_count("num_samples", num_samples)
        check_generator(generator)
        values: dict[str, Tensor] = {}
        with linalg.leaving_inference_mode(), linalg.full_precision(self.device):
            noise = self.blocks.sample(self.blocks.standard_normal(generator, (num_samples,)))
            for name, layer in self.layers.items():
                for key, perturbation in layer.tensors(noise[name]).items():
                    mean = self.mean[key]
                    values[key] = (mean + perturbation).to(mean.dtype)
        return Draws(values)

    def predict(
        self,
        inputs: Any,
        method: str | None = None,
        *,
        link: str | None = None,
        output_covariance: str = "full",
        num_samples: int = 64,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
        progress: bool = True,
    ) -> Prediction:
        """The predictive distribution of the targets at some inputs.

        Args:
            inputs: The model's input: one argument, a tuple of arguments, or a dictionary of keyword arguments; or a
                ``DataLoader``, whose targets are left aside. Linearised predictions are differentiable in inputs that
                require gradients.
            method: ``"linearized"``, the default: the model is taken as affine in its weights, and the output's
                Gaussian is exact then. ``"sampling"``: the model is run under draws of the weights.
            link: How class probabilities come from the linearised output: ``"mc"`` (draws of it), the default,
                ``"probit"``, ``"extended_probit"``, ``"laplace_bridge"`` or ``"laplace_bridge_norm"``; see
                :mod:`bayes_kfac.prediction.links`.
            output_covariance: ``"full"`` between the linearised outputs of an example, or ``"diagonal"``, their
                variances alone: for a thousand classes.
            num_samples: Draws of the weights, or of the linearised output for ``link="mc"``.
            draws: Draws from :meth:`sample`, instead of new ones. The method is ``"sampling"`` then by default; with
                ``"linearized"`` they are draws of the affine model.
            generator: The source of randomness.
            memory_budget: Bytes that the layers' rows of a linearised prediction may take up; larger batches go through
                in parts.
            progress: Whether to show a progress bar over a ``DataLoader``.

        Returns:
            The prediction; its kind depends on the likelihood.

        Raises:
            ArgumentError: If an argument is unknown, or one that does not go with the method or the likelihood, or
                draws are of another posterior.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 3), bk.likelihoods.Categorical())
            >>> posterior = laplace.fit([(torch.eye(2), torch.tensor([0, 2]))], progress=False).posterior()
            >>> posterior.predict(torch.eye(2), num_samples=100).mutual_information.shape
            torch.Size([2])
            >>> posterior.predict(torch.eye(2), link="probit").source.link
            'probit'
            >>> posterior.predict(torch.eye(2), "sampling", num_samples=10).logits.shape
            torch.Size([10, 2, 3])
        """
        method = check_choice("method", method or ("linearized" if draws is None else "sampling"), METHODS)
        check_choice("output_covariance", output_covariance, OUTPUT_COVARIANCES)
        if link is not None:
            check_choice("link", link, LINKS)
        num_samples = check_count("num_samples", num_samples)
        memory_budget = check_count("memory_budget", memory_budget)
        check_generator(generator)
        if link is not None and (method == "sampling" or draws is not None):
            given = f"method={method!r}" if draws is None else "draws are given"
            raise ArgumentError(
                f"link={link!r} is for method='linearized' without draws, but {given}. Leave one of them out."
            )
        if draws is not None:
            check_draws(draws, self.layers)
        elif method == "sampling":
            draws = self.sample(num_samples, generator=generator)
        changes = None if draws is None or method == "sampling" else self._changes(draws)

        def predict(part: Any) -> Prediction:
            if draws is None:
                output = self.output(part, output_covariance=output_covariance, memory_budget=memory_budget)
                source = Source(method, None, self.provenance)
                return from_gaussian(
                    self.likelihood, output, source, link=link, num_samples=num_samples, generator=generator
                )
            if changes is None:
                outputs = sampled_outputs(self.model, self.mean, draws, part)
            else:
                outputs = self.linearized.draws(part, changes, memory_budget=memory_budget)
            return from_outputs(self.likelihood, outputs, Source(method, len(draws), self.provenance))

        if isinstance(inputs, DataLoader):
            return concatenate([predict(part) for part in parts_of(inputs, self.device, progress)])
        return predict(inputs)

    def output(
        self, inputs: Any, *, output_covariance: str = "full", memory_budget: int = MEMORY_BUDGET
    ) -> GaussianOutput:
        """The Gaussian of the linearised model's output: of logits, where classes are predicted.

        Args:
            inputs: The model's input, as in :meth:`predict`, but no ``DataLoader``.
            output_covariance: As in :meth:`predict`.
            memory_budget: As in :meth:`predict`.

        Returns:
            Its mean, and its covariance or variances; noise of the targets is not in it.

        Raises:
            ArgumentError: If the inputs are a ``DataLoader``.
        """
        check_choice("output_covariance", output_covariance, OUTPUT_COVARIANCES)
        memory_budget = check_count("memory_budget", memory_budget)
        return self.linearized.output(inputs, diagonal=output_covariance == "diagonal", memory_budget=memory_budget)

    def function_covariance(self, inputs: Any, others: Any = None, *, memory_budget: int = MEMORY_BUDGET) -> Tensor:
        """The covariance of the linearised model's outputs between all pairs of examples.

        Args:
            inputs: The model's input, as in :meth:`predict`, but no ``DataLoader``.
            others: The input to take the pairs' second examples from; by default the same.
            memory_budget: As in :meth:`predict`.

        Returns:
            ``[batch, other batch, outputs, outputs]``; noise of the targets is not in it. At ``[n, m, c, d]`` is the
            covariance of output ``c`` of example ``n`` with output ``d`` of example ``m``.

        Raises:
            ArgumentError: If the inputs are a ``DataLoader``.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(1, 1, bias=False), bk.likelihoods.Gaussian(1.0))
            >>> posterior = laplace.fit([(torch.ones(3, 1), torch.ones(3, 1))], progress=False).posterior()
            >>> x = torch.tensor([[1.0], [2.0]])
            >>> posterior.function_covariance(x).squeeze()  # x xᵀ times the weight's variance 1 / (3 + 1)
            tensor([[0.2500, 0.5000],
                    [0.5000, 1.0000]])
        """
        memory_budget = check_count("memory_budget", memory_budget)
        return self.linearized.covariance(inputs, inputs if others is None else others, memory_budget=memory_budget)

    def function_samples(
        self,
        inputs: Any,
        num_samples: int = 64,
        *,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> Tensor:
        """Functions drawn from the linearised model: each is one draw of the weights at all inputs.

        Their covariance over examples is :meth:`function_covariance`.

        Args:
            inputs: The model's input, as in :meth:`predict`, but no ``DataLoader``.
            num_samples: How many functions.
            draws: Draws from :meth:`sample`, instead of new ones: the same functions at every call, such as for one
                batch after another.
            generator: The source of randomness.
            memory_budget: As in :meth:`predict`.

        Returns:
            ``[num_samples, batch, ...]``, without noise of the targets.

        Raises:
            ArgumentError: If draws are of another posterior, or the inputs are a ``DataLoader``.
        """
        draws = self.sample(num_samples, generator=generator) if draws is None else draws
        check_draws(draws, self.layers)
        return self.linearized.draws(inputs, self._changes(draws), memory_budget=memory_budget)

    def _changes(self, draws: Draws) -> dict[str, Tensor]:
        """How far each layer's draws are from the mean, ``[num_samples, *blocks, out, in]``."""
        return {
            name: torch.vmap(layer.matrix)({key: draws.values[key] - self.mean[key] for key in layer.parameters})
            for name, layer in self.layers.items()
        }

    # -- the Gaussian itself ------------------------------------------------------------------------------------------

    def kl(self) -> Tensor:
        """``KL(posterior ‖ prior)`` in nats, the likelihood's own parameters included.

        Returns:
            A scalar.

        Raises:
            UsageError: If the prior was another posterior.
        """
        if self.blocks.keys() - self.prior_precision.keys():
            raise UsageError("kl() is of posteriors whose prior is centred at zero, but this one's was a posterior.")
        means = {name: layer.matrix(self.mean) for name, layer in self.layers.items()}
        return self.likelihood.kl() + self.blocks.kl(means, self.prior_precision)

    def penalty(self) -> Tensor:
        """``½ (w − M)ᵀ P (w − M)`` at the model's weights ``w``: minus its log-density, up to a constant.

        Differentiable in the weights: with ``penalty() / num_data`` added to the mean loss of a new task's data, their
        mode has this posterior as its prior.

        Returns:
            A scalar.
        """
        named = dict(self.model.named_parameters())
        away = {
            name: layer.matrix({key: named[key] - self.mean[key] for key in layer.parameters}).to(
                self.blocks[name].like
            )
            for name, layer in self.layers.items()
        }
        gradient = self.blocks.multiply(away)
        return 0.5 * sum(((away[name] * gradient[name]).sum() for name in away), torch.zeros((), device=self.device))

    def nearest_matrix_normal(self) -> Posterior:
        """The posterior whose blocks are the matrix normals nearest to this in ``KL(q ‖ p)``, where they are not.

        A matrix normal can be the prior of a new task exactly; a sum of Kronecker products, or a Gaussian that links
        layers, cannot.

        Returns:
            A new posterior.
        """
        with linalg.leaving_inference_mode():
            return self._with(blocks=self.blocks.as_prior(), provenance=replace(self.provenance, damping="optimal"))

    def distribution(self, layer: str) -> MatrixNormal:
        """The posterior of one layer's ``[weight, bias]`` as a Pyro distribution over ``(*blocks, out, in)``.

        Args:
            layer: The layer's name.

        Returns:
            The matrix normal.

        Raises:
            ArgumentError: If there is no such layer, or its Gaussian is not a matrix normal.
        """
        check_choice("layer", layer, tuple(self.blocks))
        from bayes_kfac.distributions import MatrixNormal

        if self.blocks.is_linked(layer):
            raise ArgumentError(
                f"Layer {layer!r} is linked to another, so that its Gaussian is not a matrix normal. That of "
                "nearest_matrix_normal() is one."
            )
        roots = self.blocks[layer].matrix_normal_roots
        if roots is None:
            own, kind = self.layers[layer].adapter.structure, self.blocks[layer].kind
            remedy = "Fit with structure='kron' and damping='factored' or 'optimal'."
            raise ArgumentError(
                f"The Gaussian of layer {layer!r} (damping={self.provenance.damping!r}) is not a matrix normal. "
                + (f"Blocks of this kind are always {own}." if own == kind else remedy)
            )
        row, column = map(linalg.dense, roots)
        return MatrixNormal(self.layers[layer].matrix(self.mean).to(row), row, column)

    def to_pyro_guide(self, model: Callable[..., Any], *, prefix: str | None = None) -> PosteriorGuide:
        """The posterior as a frozen guide of a Pyro model; see :class:`bayes_kfac.pyro.PosteriorGuide`.

        Args:
            model: The Pyro model, of whose sites some are the parameters of this posterior's network.
            prefix: What stands before their names, such as ``"net."``; by default it is found.

        Returns:
            The guide.
        """
        from bayes_kfac.pyro import PosteriorGuide

        return PosteriorGuide(self, model, prefix=prefix)

    def summary(self) -> Summary:
        """For each parameter: its block, structure, shape, and why where it has none."""
        made = self.provenance
        structure = structures.get(made.structure, damping=made.damping, sharing=made.sharing)
        own = {name: structure.for_layer(layer) for name, layer in self.layers.items()}
        return summarize(self.model, self.layers, self.reasons, self.blocks.labels(own))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.mean.values())).device

    def to(self, target: torch.device | torch.dtype | str) -> Posterior:
        """The same posterior on another device or in another dtype; the model is moved too, as in ``nn.Module.to``.

        Args:
            target: A device or a floating-point dtype.

        Returns:
            A new posterior.
        """
        mean = {
            name: value.to(target) if value.is_floating_point() or not isinstance(target, torch.dtype) else value
            for name, value in self.mean.items()
        }
        prior_precision = {
            name: value.to(target) if isinstance(value, Tensor) else value
            for name, value in self.prior_precision.items()
        }
        return self._with(
            model=self.model.to(target),
            likelihood=copy.deepcopy(self.likelihood).to(target),
            blocks=self.blocks.to(target),
            prior_precision=prior_precision,
            mean=mean,
        )

    def with_likelihood(self, likelihood: Likelihood) -> Posterior:
        """The same Gaussian over the weights, whose predictions have another likelihood: a noise chosen afterwards.

        Args:
            likelihood: What the model's output means, of the kind that it was; copied.

        Returns:
            A new posterior.

        Raises:
            ArgumentError: If the likelihood is of another kind.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 1), bk.likelihoods.Gaussian(0.5))
            >>> posterior = laplace.fit([(torch.eye(2), torch.ones(2, 1))], progress=False).posterior()
            >>> posterior.with_likelihood(bk.likelihoods.Gaussian(0.25)).predict(torch.eye(2)).aleatoric_variance
            tensor([[0.0625],
                    [0.0625]])
        """
        if type(likelihood) is not type(self.likelihood):
            raise ArgumentError(
                f"likelihood={likelihood!r} is not allowed. Allowed: a {type(self.likelihood).__name__}, as the "
                "posterior was made with."
            )
        return self._with(likelihood=copy.deepcopy(likelihood).to(self.device).requires_grad_(False))

    def _with(self, **changed: Any) -> Posterior:
        """The same posterior with other attributes."""
        new = copy.copy(self)
        new.__dict__.update(changed)
        new.linearized = LinearizedModel(new.model, new.mean, new.layers, new.blocks)
        return new

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a safetensors file: tensors, numbers and strings only, no code.

        Args:
            path: The file.
        """
        from bayes_kfac.serialization import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, likelihood: Likelihood | None = None) -> Posterior:
        """Read a posterior from a file.

        Args:
            path: The file.
            model: A model of the same architecture; its own weights are neither used nor changed.
            likelihood: A likelihood of the saved kind, where it is a class of your own that is not registered; a copy
                of it takes the saved state.

        Returns:
            The posterior.

        Example:
            >>> import bayes_kfac as bk, tempfile, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 1), bk.likelihoods.Gaussian(0.5))
            >>> posterior = laplace.fit([(torch.eye(2), torch.ones(2, 1))], progress=False).posterior()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     posterior.save(f"{folder}/posterior.safetensors")
            ...     again = bk.Posterior.load(f"{folder}/posterior.safetensors", torch.nn.Linear(2, 1))
            >>> torch.equal(again.predict(torch.eye(2)).mean, posterior.predict(torch.eye(2)).mean)
            True
        """
        from bayes_kfac.serialization import load

        return load(cls, Path(path), model, likelihood)


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
