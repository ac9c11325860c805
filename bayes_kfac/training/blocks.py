"""The blocks of a model in training: each layer's structure, and how its state goes from one step to the next.

A step computes new states and puts them in the place of the old ones only when nothing can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.curvature import Layer, Rows, Statistics
from bayes_kfac.structures import BlockSpec, JointGaussian, Structure, build, measure
from bayes_kfac.training.state import BlockState, dump_state, restore_block
from bayes_kfac.training.states import States

Parameters = tuple[nn.Parameter, ...]


def restore_set_aside(dumped: Mapping[tuple[str, ...], Any], model: nn.Module) -> dict[Parameters, BlockState]:
    """Rebuild what :meth:`Blocks.dump_set_aside` returned; older keys began with the layer's name."""
    named = dict(model.named_parameters())
    return {
        tuple(named[name] for name in dict.fromkeys(key) if name in named): restore_block(entry, "cpu")
        for key, entry in dumped.items()
    }


class Blocks:
    """Layers, their structures and their states.

    Args:
        structure: The structure of every layer whose kind has none of its own.
        options: The hyper-parameters of a layer, by its name.
        num_data: The number of examples in the training set.
        temperature: The weight of the KL term.
        warmup: Whether training goes by averages that started at the identity.

    Attributes:
        layers: The layers by name.
        structures: The structure of each.
        states: The state of each.
        set_aside: The states of layers that have gone, by their parameters: those are what makes a layer the same one.
    """

    def __init__(
        self,
        structure: Structure,
        options: Callable[[str], Mapping[str, Any]],
        *,
        num_data: int,
        temperature: float,
        warmup: bool,
    ) -> None:
        self.structure = structure
        self.num_data = num_data
        self.temperature = temperature
        self.warmup = warmup
        self.layers: dict[str, Layer] = {}
        self.structures: dict[str, Structure] = {}
        self.states = States()
        self._options = options
        self.set_aside: dict[Parameters, BlockState] = {}
        self._held: dict[Parameters, str] = {}

    def take_up(self, layers: Mapping[str, Layer]) -> None:
        """Go on with these layers. One that has gone keeps its state for its return; a new one starts afresh.

        Args:
            layers: The layers by name.
        """
        for parameters, name in self._held.items():
            self.set_aside[parameters] = self.states[name]
        before, self._held = self._held, {tuple(layer.parameters.values()): name for name, layer in layers.items()}
        self.layers = dict(layers)
        self.structures = self.structure.for_layers(layers)
        same = {name for parameters, name in self._held.items() if before.get(parameters) == name}
        taken = {name: self.set_aside.pop(parameters, BlockState()) for parameters, name in self._held.items()}
        self.states = self.states.of({name: self._adapted(name, own, same) for name, own in taken.items()}, same)

    def _adapted(self, name: str, state: BlockState, same: Collection[str]) -> BlockState:
        """The state of a layer whose neighbours may be others, given the names that mean the same layers as before."""
        if state.statistics is None:
            return state
        own, statistics = self.structures[name], state.statistics
        if own.linked_to is not None and own.linked_to not in same:
            statistics = self.structure.adapted(statistics)  # which is linked to none
        return replace(state, statistics=own.adapted(statistics))

    def dump_set_aside(self, model: nn.Module) -> dict[tuple[str, ...], dict[str, Any]]:
        """What was set aside of the model's layers, by the names of their parameters."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        present = {key: state for key, state in self.set_aside.items() if names.keys() >= set(key)}
        return dump_state({tuple(names[parameter] for parameter in key): state for key, state in present.items()})

    def follow_devices(self) -> None:
        """Move states to where the model went since the last step, in its dtype or float32."""
        self.states = self.states.like(self.layers)

    def with_zeros(self, measured: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """What was measured, and zeros for layers that did not run: processes add up the statistics of all layers."""
        return {name: measured[name] if name in measured else self._identity(name) * 0 for name in self.layers}

    def measure(self, rows: Mapping[str, Rows], names: Collection[str]) -> dict[str, Statistics]:
        """What the structures of some layers measure of the rows, in the frames of what they measured before."""
        frames = {name: statistics.frame for name, statistics in self.states.averages.items()}
        return measure({name: own for name, own in self.structures.items() if name in names}, rows, frames)

    @property
    def data_scale(self) -> float:
        """``N/τ``: the factor on the Fisher of one example in the posterior."""
        return self.num_data / self.temperature

    def intrinsic_damping(self, name: str) -> float:
        """``γ_in = τδ/N`` of a layer."""
        prior_precision: float = self._options(name)["prior_precision"]
        return self.temperature * prior_precision / self.num_data

    def posterior(self, states: States, names: Collection[str], *, in_training: bool) -> JointGaussian:
        """The Gaussian of some layers: the one that training samples from, or the posterior's without the warm-up."""
        specs = [
            BlockSpec(
                name,
                self._blended(name, state) if in_training else state.measured(name),
                data_scale=self.data_scale,
                prior=self._options(name)["prior_precision"],
                previous=state.posterior if in_training else None,
            )
            for name, state in states.items()
            if name in names
        ]
        return build(self.structures, specs)

    def with_posterior(self, states: States, names: Collection[str]) -> States:
        """The states with a fresh Gaussian of some layers to sample from."""
        return states.with_posterior(self.posterior(states, names, in_training=True), self.data_scale)

    def refreshed(self, states: States, names: Collection[str]) -> States:
        """The states with frames renewed and Gaussians rebuilt, of some layers and those that they are linked to."""
        linked = self._with_linked(names)
        framed = {
            # a layer that never ran has nothing to go by
            name: replace(state, statistics=self.structures[name].reframed(state.measured(name), name))
            for name, state in states.items()
            if name in linked
        }
        fresh = self.with_posterior(states.updated(framed), linked)
        return fresh.with_preconditioner(self.preconditioner(fresh, linked))

    def _with_linked(self, names: Collection[str]) -> set[str]:
        """Some layers and all that links lead to from them, or from which links lead to them."""
        links = {name: own.linked_to for name, own in self.structures.items() if own.linked_to is not None}
        found, more = set[str](), set(names)
        while more - found:
            found |= more
            more = {to for name, to in links.items() if name in found} | {n for n, to in links.items() if to in found}
        return found

    def preconditioner(self, states: States, names: Collection[str]) -> JointGaussian:
        """The Gaussian of precision ``F̄ + γ I``, of those of some layers whose steps go by it."""
        specs = [
            BlockSpec(
                name,
                self._blended(name, state),
                data_scale=1.0,
                prior=self.damping(name),
                previous=state.preconditioner,
            )
            for name, state in states.items()
            if name in names and self.is_preconditioned(name)
        ]
        return build(self.structures, specs)

    def is_preconditioned(self, name: str) -> bool:
        """Whether a layer's steps go by a preconditioner of their own, and not by the posterior."""
        return bool(self._options(name)["extrinsic_damping"] > 0)

    def damping(self, name: str) -> float:
        """``γ = γ_in + γ_ex`` of a layer."""
        extrinsic: float = self._options(name)["extrinsic_damping"]
        return self.intrinsic_damping(name) + extrinsic

    def averaged(self, states: States, batch: Mapping[str, Statistics]) -> States:
        """The states a step later, with a batch's statistics in the moving averages of the layers that it shows."""
        updated = {name: replace(state, age=state.age + 1) for name, state in states.items()}
        for name, statistics in batch.items():
            running = states[name].statistics
            decay = self._options(name)["statistics_decay"] ** updated[name].age
            # from nothing the average is (1 − decay) of the batch, and so is its count: debiased from the first step on
            average = statistics * (1 - decay) if running is None else running.moving_average(statistics, decay)
            weight = states[name].identity_weight * decay
            updated[name] = replace(states[name], statistics=average, identity_weight=weight, age=0)
        return states.updated(updated)

    def admitted(self, states: States, gradients: Mapping[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
        """The gradients if ``finite``, and else those that leave the average of gradients where it is."""
        admitted = {}
        for name, gradient in gradients.items():
            average = states[name].momentum
            admitted[name] = torch.where(finite, gradient, torch.zeros_like(gradient) if average is None else average)
        return admitted

    def directions(self, states: States, gradients: Mapping[str, Tensor]) -> tuple[States, dict[str, Tensor]]:
        """Average gradients over steps and precondition them: ``(F̄ + γ I)⁻¹ m``, of the layers that have one."""
        states = self._with_gradients(states, gradients)
        damped = {n for n in gradients if states[n].preconditioner is not None and self.is_preconditioned(n)}
        scales = [(1.0 if n in damped else self._scale_of(states[n])) / states[n].momentum_weight for n in gradients]
        scaled = dict(zip(gradients, torch._foreach_mul(_momenta(states, gradients), scales), strict=True))
        # linked layers without a gradient have a direction too, and stay where they are
        found = {
            **states.posterior.solve({name: own for name, own in scaled.items() if name not in damped}),
            **states.preconditioner.solve({name: own for name, own in scaled.items() if name in damped}),
        }
        return states, {name: found[name] for name in gradients}

    def _scale_of(self, state: BlockState) -> float:
        """``N/τ`` as the Gaussian of a layer has it, which may be of before it was changed."""
        return self.data_scale if state.data_scale is None else state.data_scale

    def squared_length(self, states: States, directions: Mapping[str, Tensor]) -> Tensor:
        """``lr² Σ dᵀ F̄ d``, damped, of what :meth:`directions` gave, without reading a number back from the device."""
        pairs = zip(_momenta(states, directions), directions.values(), strict=True)
        products = [torch.dot(momentum.flatten(), direction.flatten()) for momentum, direction in pairs]
        weights = [self._options(name)["lr"] ** 2 / states[name].momentum_weight for name in directions]
        return torch.stack(torch._foreach_mul(products, weights)).sum()

    def _with_gradients(self, states: States, gradients: Mapping[str, Tensor]) -> States:
        """The states with gradients in their moving averages."""
        decays = [self._options(name)["momentum"] for name in gradients]
        # of all layers at once: on a GPU a launch for each, here and in what follows, would take longer than the work
        first = [name for name in gradients if states[name].momentum is None]
        if first:
            states = states.updated({n: replace(states[n], momentum=torch.zeros_like(gradients[n])) for n in first})
        averages = torch._foreach_lerp(tuple(gradients.values()), _momenta(states, gradients), decays)
        changed = {
            name: replace(
                states[name], momentum=average, momentum_weight=decay * states[name].momentum_weight + (1 - decay)
            )
            for name, average, decay in zip(gradients, averages, decays, strict=True)
        }
        return states.updated(changed)

    def describe(self) -> dict[str, str]:
        """The structure of each layer in words, for the summary."""
        return {name: structure.label for name, structure in self.structures.items()}

    def _blended(self, name: str, state: BlockState) -> Statistics:
        """The statistics that training goes by: with warm-up, as if the average had started at the identity."""
        if not self.warmup:
            return state.measured(name)
        identity = self._identity(name)
        return identity if state.statistics is None else state.statistics.lean(identity, state.identity_weight)

    def _identity(self, name: str) -> Statistics:
        """The statistics of a layer whose Fisher is the identity."""
        layer = self.layers[name]
        return self.structures[name].identity(layer.shape, layer.template, **layer.form)


def _momenta(states: States, names: Iterable[str]) -> list[Tensor]:
    """The averages of gradients of layers that have had one."""
    return [states[name].momentum for name in names]  # type: ignore[misc]
