"""The blocks of a model in training: each layer's structure, and how its state goes from one step to the next.

A step computes new states and puts them in the place of the old ones only when nothing can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Layer, Rows, Statistics
from bayes_kfac.structures import BlockGaussian, BlockSpec, Structure, build
from bayes_kfac.training.state import BlockState

States = dict[str, BlockState]


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
        set_aside: The states of layers that have gone, by the layer's name and parameters.
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
        self.states: States = {}
        self._options = options
        self.set_aside: dict[tuple[str, ...], BlockState] = {}

    def take_up(self, layers: Mapping[str, Layer]) -> None:
        """Go on with these layers. One that has gone keeps its state for its return; a new one starts afresh.

        Args:
            layers: The layers by name.
        """
        for name, layer in self.layers.items():
            self.set_aside[_key(layer)] = self.states[name]
        self.layers = dict(layers)
        self.structures = {name: self.structure.for_block(layer.adapter.structure) for name, layer in layers.items()}
        self.states = {name: self.set_aside.pop(_key(layer), BlockState()) for name, layer in layers.items()}

    def follow_devices(self) -> None:
        """Move states to where the model went since the last step, in its dtype or float32."""
        followed = {name: state.like(self.layers[name].like) for name, state in self.states.items()}
        if any(followed[name] is not state for name, state in self.states.items()):
            self.states = followed

    def with_zeros(self, measured: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """What was measured, and zeros for layers that did not run: processes add up the statistics of all layers."""
        return {name: measured[name] if name in measured else self._identity(name) * 0 for name in self.layers}

    def measure(self, name: str, rows: Rows) -> Statistics:
        """What a layer's structure measures of its rows, in the frame of what it measured before."""
        before = self.states[name].statistics
        return self.structures[name].measure(rows, NO_FRAME if before is None else before.frame)

    def intrinsic_damping(self, name: str) -> float:
        """``γ_in = τδ/N`` of a layer."""
        prior_precision: float = self._options(name)["prior_precision"]
        return self.temperature * prior_precision / self.num_data

    def posteriors(self, states: Mapping[str, BlockState], *, in_training: bool) -> dict[str, BlockGaussian]:
        """The Gaussians of all layers: those that training samples from, or the posterior's own without the warm-up."""
        specs = [
            BlockSpec(
                name,
                self._blended(name, state) if in_training else state.measured(name),
                data_scale=self.num_data / self.temperature,
                prior=self._options(name)["prior_precision"],
                previous=state.posterior if in_training else None,
            )
            for name, state in states.items()
        ]
        return build(self.structures, specs)

    def with_posteriors(self, states: Mapping[str, BlockState]) -> States:
        """The states with fresh Gaussians to sample from."""
        gaussians = self.posteriors(states, in_training=True)
        return {name: replace(state, posterior=gaussians[name]) for name, state in states.items()}

    def refreshed(self, states: Mapping[str, BlockState]) -> States:
        """The states with frames renewed and all Gaussians rebuilt from their statistics."""
        framed = {
            # a layer that never ran has nothing to go by
            name: replace(state, statistics=self.structures[name].reframed(state.measured(name), name))
            for name, state in states.items()
        }
        fresh = self.with_posteriors(framed)
        specs = [
            BlockSpec(
                name,
                self._blended(name, state),
                data_scale=1.0,
                prior=self.intrinsic_damping(name) + self._options(name)["extrinsic_damping"],
                previous=state.preconditioner,
            )
            for name, state in fresh.items()
            if self._options(name)["extrinsic_damping"] > 0
        ]
        for name, gaussian in build(self.structures, specs).items():
            fresh[name] = replace(fresh[name], preconditioner=gaussian)
        return fresh

    def averaged(self, states: Mapping[str, BlockState], batch: Mapping[str, Statistics], steps: int) -> States:
        """The states with a batch's statistics in the moving averages, ``steps`` steps after the last ones."""
        updated = dict(states)
        for name, statistics in batch.items():
            running = states[name].statistics
            decay = self._options(name)["statistics_decay"] ** steps
            # from nothing the average is (1 − decay) of the batch, and so is its count: debiased from the first step on
            average = statistics * (1 - decay) if running is None else running.moving_average(statistics, decay)
            weight = states[name].identity_weight * decay
            updated[name] = replace(states[name], statistics=average, identity_weight=weight)
        return updated

    def direction(self, name: str, state: BlockState, gradient: Tensor) -> tuple[BlockState, Tensor]:
        """Average the gradient over steps and precondition it: ``(F̄ + γ I)⁻¹ m``."""
        options = self._options(name)
        decay = options["momentum"]
        weight = decay * state.momentum_weight + (1 - decay)
        average = (1 - decay) * gradient if state.momentum is None else decay * state.momentum + (1 - decay) * gradient
        state = replace(state, momentum=average, momentum_weight=weight)
        debiased = average / weight
        if state.preconditioner is not None and options["extrinsic_damping"] > 0:
            return state, state.preconditioner.solve(debiased)
        assert state.posterior is not None
        return state, state.posterior.solve(debiased) * (self.num_data / self.temperature)

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
        return self.structures[name].identity(layer.shape, layer.like, **layer.form)


def _key(layer: Layer) -> tuple[str, ...]:
    """What makes a layer the same one: a bias alone is another block than weight and bias."""
    return (layer.name, *layer.parameters)
