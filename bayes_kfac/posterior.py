"""The posterior: a Gaussian over a model's weights, as a mean and one zero-mean Gaussian for each layer.

It holds its own copies of all parameters and buffers, so that it stays what it is while the model trains on; the model
object serves as the function only, and is left as it was by every call here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Layer, Summary, find_layers, summarize
from bayes_kfac.errors import ArgumentError, check_choice, check_count
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction import (
    Draws,
    GaussianOutput,
    Prediction,
    Source,
    from_gaussian,
    from_outputs,
    linearize,
    sampled_outputs,
)
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, MatrixNormalGaussian, standard_normal

if TYPE_CHECKING:
    from bayes_kfac.distributions import MatrixNormal

METHODS = ("linearized", "sampling")


class Posterior:
    """A Gaussian over the weights of a model.

    Args:
        model: The model, whose current weights are the mean; it is kept as the function, not copied.
        likelihood: What its output means; copied.
        blocks: The zero-mean Gaussian of each layer, by the layer's name.
        prior_precision: The prior's precision of each layer, by the same names.
        provenance: How the posterior was made.
        layers: The layers; by default those of the model's parameters that are not frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        blocks: Mapping[str, BlockGaussian],
        *,
        prior_precision: Mapping[str, float],
        provenance: Provenance,
        layers: Mapping[str, Layer] | None = None,
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
        self.blocks = {name: _contiguous(block) for name, block in blocks.items()}
        self.prior_precision = dict(prior_precision)
        self.provenance = provenance
        self.mean = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in _named_state(model).items()
        }

    # -- draws and predictions ----------------------------------------------------------------------------------------

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Draws:
        """Draw weights, to be passed to :meth:`predict` as ``draws=`` as often as wanted.

        Args:
            num_samples: How many.
            generator: The source of randomness.

        Returns:
            The draws.
        """
        check_count("num_samples", num_samples)
        values: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            layer = self.layers[name]
            standard = standard_normal(block, generator, (num_samples,))
            with linalg.full_precision(standard.device):
                noise = block.sample(standard)
            for key, perturbation in layer.tensors(noise).items():
                mean = self.mean[key]
                values[key] = (mean + perturbation).to(mean.dtype)
        return Draws(values)

    def predict(
        self,
        inputs: Any,
        method: str | None = None,
        *,
        link: str | None = None,
        num_samples: int = 64,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The predictive distribution of the targets at some inputs.

        Args:
            inputs: The model's input: one argument, a tuple of arguments, or a dictionary of keyword arguments.
            method: ``"linearized"``, the default: the model is taken as affine in its weights, the output's Gaussian is
                exact then (classes are sampled from it). ``"sampling"``: the model is run under draws of the weights.
            link: How class probabilities come from the linearised output: ``"mc"`` (draws of it), the default,
                ``"probit"``, ``"extended_probit"``, ``"laplace_bridge"`` or ``"laplace_bridge_norm"``; see
                :mod:`bayes_kfac.prediction.links`.
            num_samples: Draws of the weights, or of the linearised output for ``link="mc"``.
            draws: Draws from :meth:`sample`, instead of new ones; implies ``method="sampling"``.
            generator: The source of randomness.

        Returns:
            The prediction; its kind depends on the likelihood.

        Raises:
            ArgumentError: If the method or link is unknown, draws come with ``method="linearized"``, or a link with
                ``method="sampling"`` or in a regression.
        """
        method = check_choice("method", method or ("linearized" if draws is None else "sampling"), METHODS)
        if draws is not None and method == "linearized":
            raise ArgumentError("draws= are for method='sampling', but method='linearized'. Leave one of them out.")
        check_count("num_samples", num_samples)
        if link is not None and method == "sampling":
            raise ArgumentError(
                f"link={link!r} is for method='linearized', but method='sampling'. Leave one of them out."
            )
        if method == "sampling":
            draws = draws or self.sample(num_samples, generator=generator)
            outputs = sampled_outputs(self.model, self.mean, draws, inputs)
            return from_outputs(self.likelihood, outputs, Source("sampling", len(draws), self.provenance))
        output = GaussianOutput(*linearize(self.model, self.mean, self.layers, self.blocks, inputs))
        source = Source("linearized", None, self.provenance)
        return from_gaussian(self.likelihood, output, source, link=link, num_samples=num_samples, generator=generator)

    # -- the Gaussian itself ------------------------------------------------------------------------------------------

    def kl(self) -> Tensor:
        """``KL(posterior ‖ prior)`` in nats, the likelihood's own parameters included."""
        total = self.likelihood.kl()
        for name, block in self.blocks.items():
            mean = self.layers[name].matrix(self.mean)
            total = total + block.kl(mean, self.prior_precision[name]).sum()
        return total

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

        block = self.blocks[layer]
        if not isinstance(block, MatrixNormalGaussian):
            own = self.layers[layer].adapter.structure
            remedy = "Fit with structure='kron' and damping='factored' or 'optimal'."
            raise ArgumentError(
                f"The Gaussian of layer {layer!r} (damping={self.provenance.damping!r}) is not a matrix normal. "
                + (remedy if own is None else f"Blocks of this kind are always {own}.")
            )
        mean = self.layers[layer].matrix(self.mean).to(block.scale_tril_row)
        return MatrixNormal(mean, linalg.dense(block.scale_tril_row), linalg.dense(block.scale_tril_column))

    def summary(self) -> Summary:
        """For each parameter: its block, structure, shape, and why where it has none."""
        made = self.provenance
        structure = structures.get(made.structure, damping=made.damping, sharing=made.sharing)
        own = {name: structure.for_block(layer.adapter.structure) for name, layer in self.layers.items()}
        names = {name: f"{kind.name}/{kind.damping}" for name, kind in own.items()}
        return summarize(self.model, self.layers, self.reasons, names)

    def to(self, target: torch.device | torch.dtype | str) -> Posterior:
        """The same posterior on another device or in another dtype; the model is moved too, as in ``nn.Module.to``.

        Args:
            target: A device or a floating-point dtype.

        Returns:
            A new posterior.
        """
        moved = copy.copy(self)
        moved.model = self.model.to(target)
        moved.likelihood = copy.deepcopy(self.likelihood).to(target)
        moved.blocks = {name: block.to(target) for name, block in self.blocks.items()}
        moved.mean = {
            name: value.to(target) if value.is_floating_point() or not isinstance(target, torch.dtype) else value
            for name, value in self.mean.items()
        }
        return moved

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
        """
        from bayes_kfac.serialization import load

        return load(cls, Path(path), model, likelihood)


def _contiguous(block: BlockGaussian) -> BlockGaussian:
    return block.map(Tensor.contiguous)


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
