"""Posteriors in Pyro: a frozen guide for a Pyro model of one's own, and the model that a posterior approximates.

A guide has one auxiliary site for each layer, over ``[weight, bias]`` as a block ``[*blocks, out, in]``, and for each
of the parameters in it a ``Delta``, under the name that the Pyro model gives it: weight and bias stay correlated.
Taking a block apart changes no volume, so that the guide's log-density is that of its auxiliary sites; a ``Delta``
adds 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Normal
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_kfac import linalg
from bayes_kfac.curvature import Layer
from bayes_kfac.distributions import BlockNormal, MatrixNormal
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.likelihoods.base import check_examples
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction.forward import call, evaluating
from bayes_kfac.structures import BlockGaussian, JointGaussian, Link, gaussian_from_state

__all__ = ["PosteriorGuide", "generative_model"]


class PosteriorGuide(AutoGuide):
    """A posterior as the guide of a Pyro model; made by :meth:`bayes_kfac.Posterior.to_pyro_guide`.

    The auxiliary site of a layer is named ``<prefix><layer>_block``. Its distribution is a
    :class:`~bayes_kfac.distributions.MatrixNormal` where the posterior's block is one, else a
    :class:`~bayes_kfac.distributions.BlockNormal`; for a layer that is linked to earlier ones it is conditional on
    them, so that the guide is the whole posterior in any case. A parameter that has no block, but is random in the
    model, is a point: a ``Delta`` at the mean. Sites of the model that are no parameters of the network are left to
    other guides, in an ``AutoGuideList``.

    A guide is draws of the weights. Those of a Laplace posterior of all layers do not fit its own data: train the
    posterior, or take ``subset="last_layer"``.

    Nothing in it is trained: means and blocks are buffers. The model is run once, at the first call, to see its sites.

    Args:
        posterior: The posterior, as it is now.
        model: The Pyro model. Every parameter with a block is a ``sample`` site of it, with the parameter's shape.
        prefix: What stands before the parameters' names in the names of the model's sites, such as ``"net."``; by
            default it is found.

    Raises:
        UsageError: If the posterior's network was itself turned into a Pyro module.
        ArgumentError: At the first call, if the model's sites do not fit the posterior.
    """

    def __init__(self, posterior: Posterior, model: Callable[..., Any], *, prefix: str | None = None) -> None:
        initialized: Any = InitMessenger(init_to_median)  # type: ignore[no-untyped-call]
        super().__init__(initialized(model))  # type: ignore[no-untyped-call]
        self._layers = dict(posterior.layers)
        self._covered = [key for layer in self._layers.values() for key in _names(layer)]
        first = {parameter: name for name, parameter in posterior.model.named_parameters()}
        if lost := [key for key in self._covered if key not in first.values()]:
            raise UsageError(
                f"The posterior's network has no parameter {lost[0]!r} any more. If it was turned into a Pyro module, "
                "build that from copy.deepcopy(network) instead."
            )
        named = posterior.model.named_parameters(remove_duplicate=False)
        self._tied = {name: first[parameter] for name, parameter in named if first[parameter] != name}
        self._points = [name for name in first.values() if name not in self._covered]
        self._given_prefix, self._prefix = prefix, ""
        self._sites: dict[str, str] = {}
        blocks, links = posterior.blocks, posterior.blocks.links
        self._kinds = {name: block.kind for name, block in blocks.items()}
        self._leads_to = {name: link.to for name, link in links.items()}
        self.means = _buffers({name: posterior.mean[name] for name in first.values()})
        self.blocks = _buffers({f"{name}.{key}": own for name in blocks for key, own in blocks[name].state.items()})
        self.links = _buffers({f"{name}.{key}": own for name in links for key, own in links[name].state.items()})

    # -- what Pyro asks of a guide ------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the weights.

        Args:
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Returns:
            The value of each site of the model that is a parameter of the network.
        """
        nodes = self._see(*args, **kwargs)
        plates: Any = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
        drawn = self._draw()
        result = {}
        for site, name in self._sites.items():
            event_dim = nodes[site]["fn"].event_dim
            value = _among_plates(drawn[name], self._mean(name).shape, event_dim)
            with ExitStack() as stack:
                for frame in nodes[site]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                point = Delta(value, event_dim=event_dim)  # type: ignore[no-untyped-call]
                result[site] = pyro.sample(site, point)
        return result

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each weight, which is its mean.

        Args:
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Returns:
            The medians by site.
        """
        self._see(*args, **kwargs)
        return {site: self._mean(name).clone() for site, name in self._sites.items()}

    def quantiles(self, quantiles: Iterable[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each weight on its own.

        Args:
            quantiles: Probabilities.
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Returns:
            The quantiles by site, ``[quantiles, *parameter.shape]``.

        Raises:
            ArgumentError: If a probability is not between 0 and 1.
        """
        probabilities = torch.as_tensor(quantiles, dtype=torch.float64)
        if not bool(((probabilities > 0) & (probabilities < 1)).all()):
            raise ArgumentError(f"quantiles={quantiles!r} is out of range. Allowed: numbers between 0 and 1.")
        self._see(*args, **kwargs)
        variances: dict[str, Tensor] = {}
        for name, variance in self._gaussian().marginal_variance().items():
            variances |= self._layers[name].tensors(variance)
        standard = torch.special.ndtri(probabilities)
        result = {}
        for site, name in self._sites.items():
            mean = self._mean(name)
            shifts = standard.to(mean).reshape(-1, *(1,) * mean.dim())
            result[site] = mean + shifts * variances[name].sqrt().to(mean) if name in variances else mean + 0 * shifts
        return result

    # -- the posterior itself -----------------------------------------------------------------------------------------

    def _mean(self, name: str) -> Tensor:
        return self.means.get_buffer(name)

    def _gaussian(self) -> JointGaussian:
        """The Gaussian over all layers, of the buffers as they are now."""
        blocks = {name: gaussian_from_state(kind, _state(self.blocks, name)) for name, kind in self._kinds.items()}
        links = {name: Link(to, **_state(self.links, name)) for name, to in self._leads_to.items()}
        return JointGaussian(blocks, links)

    def _draw(self) -> dict[str, Tensor]:
        """Every parameter's value; each layer is drawn given those before it that are linked to it."""
        gaussian = self._gaussian()
        values = {name: self._mean(name) for name in self._points}
        shifts: dict[str, Tensor] = {}
        with linalg.full_precision(next(self.means.buffers()).device):
            for name, block in gaussian.items():
                layer = self._layers[name]
                loc = layer.matrix({key: self._mean(key) for key in _names(layer)}).to(block.like)
                loc = loc + shifts[name] if name in shifts else loc
                drawn = pyro.sample(
                    f"{self._prefix}{name}_block", _distribution(loc, block), infer={"is_auxiliary": True}
                )
                if link := gaussian.links.get(name):
                    shift = -link.adjoint(drawn - loc)
                    shifts[link.to] = shifts[link.to] + shift if link.to in shifts else shift
                values |= {key: value.to(self._mean(key).dtype) for key, value in layer.tensors(drawn).items()}
        return values

    # -- the model's sites --------------------------------------------------------------------------------------------

    def _see(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The sites of the model, which is run if it never was."""
        if self.prototype_trace is None:
            if self._model is None:
                raise UsageError(
                    "This guide was pickled before its first call, and has no model. Call it once before it is "
                    "pickled, or make it anew by posterior.to_pyro_guide(model)."
                )
            self._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        return trace.nodes

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)  # type: ignore[no-untyped-call]
        trace: Any = self.prototype_trace
        nodes = dict(trace.iter_stochastic_nodes())
        try:
            self._prefix = _find_prefix(self._given_prefix, self._covered, nodes)
            self._check_sites(nodes)
        except ArgumentError:
            self.prototype_trace = None  # the next call looks again
            raise
        ours = {self._prefix + name: name for name in (*self._covered, *self._points)}
        self._sites = {site: ours[site] for site in nodes if site in ours}

    def _check_sites(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse sites that look like the network's parameters, but are not."""
        for alias, name in self._tied.items():
            if f"{self._prefix}{alias}" in nodes:
                raise ArgumentError(
                    f"In the network {alias!r} is tied to {name!r}, but in the model it is a site of its own, "
                    f"{self._prefix + alias!r}. Let the model use the value of {self._prefix + name!r} in both places."
                )
        for name in (*self._covered, *self._points):
            node, shape = nodes.get(f"{self._prefix}{name}"), tuple(self._mean(name).shape)
            if node is None:
                continue
            if tuple(node["value"].shape) != shape:
                raise ArgumentError(
                    f"Site {node['name']!r} has shape {tuple(node['value'].shape)}, but the posterior's {name!r} has "
                    f"shape {shape}. The model's network must be of the same architecture, and be called outside of "
                    "plates over the data."
                )
            if not _is_unconstrained(node["fn"].support):
                raise ArgumentError(
                    f"The support of site {node['name']!r} is {node['fn'].support}, but the posterior's {name!r} is "
                    "Gaussian. Give it a prior over all real numbers, such as Normal(0, 1)."
                )

    # -- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Pyro drops the model from what is pickled, which is right, and from the guide that is left here too
        model, master = self._model, self.master
        try:
            state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
            return state
        finally:
            self._model, self.master = model, master

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = self.__class__.__new__(self.__class__)
        memo |= {id(self): new, id(self._layers): self._layers}
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        new._model = self._model
        return new


def generative_model(posterior: Posterior) -> Callable[..., Tensor]:
    """The model that a posterior approximates, in Pyro: for its guide, or to be sampled by NUTS.

    It has a Normal site of the posterior's prior for each parameter with a block, under the parameter's name; the other
    parameters, buffers and the noise are at the posterior's. The targets are the site ``"obs"``, one of its likelihood
    for each example, in the plate ``"data"``. Where targets are given, their log-likelihood is that of ``num_data``
    examples, however many there are, at the posterior's temperature.

    Args:
        posterior: The posterior; its prior is centred at zero.

    Returns:
        ``model(inputs, target=None)``, with ``inputs`` as in :meth:`bayes_kfac.Posterior.predict`, which returns the
        network's output and raises ``TargetError`` if output and targets do not fit each other.

    Raises:
        ArgumentError: If it is no posterior.
        UsageError: If the prior was another posterior.
    """
    if not isinstance(posterior, Posterior):
        raise ArgumentError(
            f"posterior is a {type(posterior).__name__}. Allowed: a bayes_kfac.Posterior, as from bayes_kfac.fit() or "
            "Laplace(...).fit(...).posterior()."
        )
    if posterior.blocks.keys() - posterior.prior_precision.keys():
        raise UsageError(
            "generative_model() is of posteriors whose prior is centred at zero, but this one's was a posterior."
        )
    priors = {}
    for name, layer in posterior.layers.items():
        like = posterior.blocks[name].like
        precision = torch.as_tensor(posterior.prior_precision[name], dtype=like.dtype, device=like.device)
        for key, own in layer.tensors(precision.expand(layer.shape)).items():
            scale = own.rsqrt().to(posterior.mean[key].dtype)
            prior: Any = Normal(torch.zeros_like(scale), scale)
            priors[key] = prior.to_event(scale.dim())
    made = posterior.provenance

    def model(inputs: Any, target: Tensor | None = None) -> Tensor:
        weights = {name: pyro.sample(name, prior) for name, prior in priors.items()}
        with evaluating(posterior.model):
            output = call(posterior.model, {**posterior.mean, **weights}, inputs)
        if target is not None:
            posterior.likelihood.check(output, target)
            check_examples(output)
        targets = _in_pyro(posterior.likelihood.distribution(output))
        scale = 1.0 if target is None else made.num_data / (made.temperature * len(output))
        with pyro.plate("data", len(output), dim=-1), poutine.scale(scale=scale):
            pyro.sample("obs", targets.to_event(len(targets.batch_shape) - 1), obs=target)
        return output

    return model


# -- small parts ------------------------------------------------------------------------------------------------------


def _names(layer: Layer) -> list[str]:
    """The names of a layer's parameters; the parameters themselves are not looked at."""
    return [name for name in (layer.weight_name, layer.bias_name) if name is not None]


def _buffers(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module, and modules in it, that hold copies of tensors under dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor.detach().clone())
    return root


def _state(root: nn.Module, name: str) -> dict[str, Tensor]:
    return dict(root.get_submodule(name).named_buffers(recurse=False))


def _distribution(loc: Tensor, block: BlockGaussian) -> Any:
    """A block's distribution around a mean, ``[..., *blocks, out, in]``, as one event."""
    roots = block.matrix_normal_roots
    if roots is None or any(map(linalg.is_diagonal, roots)):  # a diagonal side, a vocabulary say, is not written out
        return BlockNormal(loc, block)
    normal: Any = MatrixNormal(loc, *roots)
    return normal.to_event(len(block.shape) - 2)


def _among_plates(value: Tensor, shape: torch.Size, event_dim: int) -> Tensor:
    """A value that was drawn outside of a site's plates, as it stands inside of them."""
    # plates of the caller's, of particles say, lie further out, at the other side of dimensions of size 1
    outer = value.shape[: value.dim() - len(shape)]
    own_plates = len(shape) - event_dim
    return value.reshape(outer[: max(0, len(outer) - own_plates)] + shape)


def _is_unconstrained(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _find_prefix(given: str | None, names: Collection[str], sites: Collection[str]) -> str:
    """What stands before all of these names among the sites."""
    first = next(iter(names))
    ends = [site.removesuffix(first) for site in sites if site.endswith(first)]
    candidates = [end for end in ends if not end[-1:].isidentifier() and not end[-1:].isdigit()]
    if given is not None:
        candidates = [given]
    fitting = [prefix for prefix in candidates if all(prefix + name in sites for name in names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ArgumentError(
            f"The model has the network's parameters more than once, with the prefixes {fitting}. Pass prefix= to say "
            "which are meant."
        )
    prefix = candidates[0] if candidates else ""
    missing = [prefix + name for name in names if prefix + name not in sites]
    raise ArgumentError(
        f"prefix={given!r}: the model has no site named {', '.join(map(repr, missing))}; its sites are "
        f"{', '.join(map(repr, sites)) or 'none'}. Make each parameter that has a block a PyroSample, under the name "
        "that it has in the posterior's network after a common prefix, such as 'net.'."
    )


def _in_pyro(distribution: Any) -> Any:
    """A distribution of torch's as Pyro's of the same name."""
    name = type(distribution).__name__
    kind: Any = getattr(pyro.distributions, name, None)
    if kind is None or not issubclass(kind, type(distribution)):
        raise ArgumentError(
            f"The likelihood's distribution, {name}, is none of pyro.distributions. Write the Pyro model by hand."
        )
    distribution.__class__ = kind  # which adds methods, and no state
    if kind is pyro.distributions.Poisson:
        distribution.is_sparse = False  # but for this one
    return distribution
