"""Natural gradient that finds its own learning rate, momentum and damping (Martens & Grosse 2015, §6 and §7).

Learning rate and momentum are the minimum of the exact quadratic model of the batch along the preconditioned gradient
and the step before; the damping ``γ_ex`` follows how much of the promised decrease comes true.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.batches import output_tensor
from bayes_kfac.curvature import Layer
from bayes_kfac.distributed import mean_over_processes
from bayes_kfac.errors import ArgumentError, UsageError, check_count, check_positive
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction.forward import call
from bayes_kfac.training.natural import NaturalGradient
from bayes_kfac.training.quadratic import LevenbergMarquardt, QuadraticModel, fisher_products
from bayes_kfac.training.states import States

#: What is found here rather than given.
FOUND = ("lr", "momentum", "kl_clip", "extrinsic_damping")


class AdaptiveNaturalGradient(NaturalGradient):
    """Natural gradient whose learning rate, momentum and damping are found on the way (Martens & Grosse 2015, §6-7).

    Each step goes along the preconditioned gradient and the step before, as far as is best for the quadratic model of
    the batch with its exact Fisher; damping follows how much of the promised decrease comes true. A step costs two
    forward-mode passes, and two evaluations of the loss every ``damping_every`` steps. Deterministic models and large
    batches suit it; with several contexts in a step the last batch is what the model is of.

    Args:
        model: The model.
        likelihood: What the output means; its loss must be computed by calling it.
        num_data: The number of examples in the training set.
        initial_damping: ``γ_ex`` of the first steps, on the scale of one example's Fisher.
        damping_every: Steps between two changes of the damping.
        options: As for :class:`NaturalGradient`, but for ``lr``, ``momentum``, ``kl_clip`` and ``extrinsic_damping``.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> likelihood = bk.likelihoods.Gaussian(0.1)
        >>> optimizer = bk.AdaptiveNaturalGradient(model, likelihood, num_data=64)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = likelihood(model(x), (3 * x).sin())
        ...     loss.backward()
        ...     return loss.item()
        >>> losses = [optimizer.step(closure) for _ in range(20)]
        >>> losses[-1] < 0.01 * losses[0], optimizer.damping < 1.0  # with no learning rate given
        (True, True)
    """

    method = "adaptive natural gradient"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        num_data: int,
        initial_damping: float = 1.0,
        damping_every: int = 5,
        **options: Any,
    ) -> None:
        for name in FOUND:
            if name in options:
                raise ArgumentError(f"{name}= is found by {type(self).__name__} itself. Leave it out.")
        self._rule = LevenbergMarquardt(
            check_positive("initial_damping", initial_damping), check_count("damping_every", damping_every)
        )
        options |= {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "extrinsic_damping": initial_damping}
        self._batch: _Batch | None = None
        self._promised = 0.0
        self._last: dict[str, Tensor] = {}
        super().__init__(model, likelihood, num_data=num_data, **options)

    @property
    def damping(self) -> float:
        """``γ_ex`` as it is now."""
        return self._rule.damping

    def sampled_params(self) -> AbstractContextManager[None]:  # noqa: D102
        return self._witnessed(super().sampled_params())

    @contextmanager
    def _witnessed(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Take down what the model and the likelihood are called with."""
        passes: list[tuple[Any, Tensor | None]] = []
        batches: list[_Batch] = []

        def of_model(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            passes.append((_joined(module, args, kwargs), output_tensor(output)))

        def of_likelihood(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = dict(zip(("output", "target", "mask"), args, strict=False)) | kwargs
            if passes:
                # other passes may have come since, of unlabelled data say; what a loop made of an output is of the last
                inputs = next((own for own, output in passes if output is given["output"]), passes[-1][0])
                batches.append(_Batch(inputs, given["target"], given.get("mask")))

        handles = [
            self.model.register_forward_hook(of_model, with_kwargs=True),
            self.likelihood.register_forward_pre_hook(of_likelihood, with_kwargs=True),
        ]
        try:
            with context:
                yield
        finally:
            for handle in handles:
                handle.remove()
        if batches:
            self._batch = batches[-1]

    def _step(self) -> None:
        is_due = self._rule.is_due(self.steps)
        before = self._objective() if is_due else 0.0
        super()._step()
        if is_due:
            self._rule.observe(self._promised, self._objective() - before)
            for group in self.param_groups:
                if group["kind"] == "block":
                    group["extrinsic_damping"] = self._rule.damping
        self._batch = None  # of this step alone

    def _take_up(self, layers: Mapping[str, Layer]) -> None:
        super()._take_up(layers)
        self._last = {}  # it was of other layers

    def _changes(
        self, states: States, gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        batch = self._seen()
        ways = [
            {name: -own for name, own in directions.items()},
            {name: self._last.get(name, torch.zeros_like(own)) for name, own in directions.items()},
        ]
        named = [
            {key: part for name, own in way.items() for key, part in self.layers[name].tensors(own).items()}
            for way in ways
        ]
        curvature = fisher_products(self.model, self.likelihood, batch.inputs, named, batch.mask)
        curvature = mean_over_processes({"curvature": curvature})["curvature"] if self._is_parallel else curvature
        slope = torch.stack([_total({n: gradients[n] * own for n, own in way.items()}) for way in ways])
        for name in directions:
            pair = torch.stack([way[name].flatten().double() for way in ways])
            curvature = curvature + self._blocks.damping(name) * pair @ pair.T
        model = QuadraticModel(slope, curvature)
        best = model.minimum()
        self._promised = float(model.at(best))
        along, again = best.to(next(iter(directions.values())).dtype)
        self._last = {name: along * own + again * ways[1][name] for name, own in ways[0].items()}
        return self._last

    def _objective(self) -> float:
        """The last batch's mean loss at the weights as they are, with the prior's part."""
        batch = self._seen()
        loss = self.likelihood(call(self.model, {}, batch.inputs), batch.target, batch.mask)
        if self._is_parallel:
            loss = mean_over_processes({"loss": loss})["loss"]
        lengths = {
            name: self._blocks.intrinsic_damping(name) * layer.values().square() for name, layer in self.layers.items()
        }
        return float(loss) + 0.5 * float(_total(lengths))

    def _seen(self) -> _Batch:
        if self._batch is None:
            raise UsageError(
                f"{type(self).__name__} has not seen a batch: call the model and likelihood(output, target) inside "
                "sampled_params()."
            )
        return self._batch

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {**super().state_dict(), "adaptive": {"damping": self._rule.damping, "last": dict(self._last)}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: D102
        if "adaptive" not in state_dict:
            raise ArgumentError(f"state_dict is not from an {type(self).__name__}.")
        own = state_dict["adaptive"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "adaptive"})
        self._rule.damping = own["damping"]
        self._last = {name: value.to(self.layers[name].like.device) for name, value in own["last"].items()}


@dataclass(frozen=True)
class _Batch:
    """What the model and the likelihood were called with.

    Attributes:
        inputs: The model's input: a tuple of arguments, or a mapping of keyword arguments.
        target: The targets.
        mask: Which of them weigh.
    """

    inputs: Any
    target: Tensor
    mask: Tensor | None


def _joined(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a call as one tuple or mapping."""
    if not kwargs:
        return args
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _total(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.double().sum() for value in values.values()]).sum()
