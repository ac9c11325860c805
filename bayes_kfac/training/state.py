"""The state of one block in training, and its way into and out of a checkpoint of plain tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Layer, Statistics
from bayes_kfac.curvature.sketches import columns_from_dump
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.structures import BlockGaussian, gaussian_from_state

Key = TypeVar("Key")


@dataclass(frozen=True)
class BlockState:
    """What a trainer keeps of one block between two steps; a step replaces it, and never changes it in place.

    Attributes:
        statistics: Running sums and counts.
        identity_weight: The weight that a start at the identity would still have in the moving average.
        posterior: The Gaussian that samples are drawn from.
        data_scale: The factor on the Fisher of one example in it; ``None`` for the trainer's own.
        preconditioner: ``F̄ + γ I`` as a Gaussian's precision, where extrinsic damping makes it differ from the
            posterior's.
        momentum: The decayed sum of gradients, ``[*blocks, out, in]``.
        momentum_weight: The decayed sum of ones that debiases it.
        age: How many steps the layer has taken part in since its statistics were measured.
    """

    statistics: Statistics | None = None
    identity_weight: float = 1.0
    posterior: BlockGaussian | None = None
    data_scale: float | None = None
    preconditioner: BlockGaussian | None = None
    momentum: Tensor | None = None
    momentum_weight: float = 0.0
    age: int = 0

    def like(self, tensor: Tensor) -> BlockState:
        """The same state on a parameter's device, in the dtype of its algebra; itself if it is already."""
        held = self.posterior.like if self.posterior else self.statistics.tensors[0] if self.statistics else None
        dtype = linalg.algebra_dtype(tensor.dtype)
        if held is None or (held.dtype == dtype and held.device == tensor.device):
            return self

        def move(value: Tensor) -> Tensor:
            return value.to(tensor.device, dtype)

        return replace(
            self,
            statistics=None if self.statistics is None else self.statistics.map(move),
            posterior=None if self.posterior is None else self.posterior.map(move),
            preconditioner=None if self.preconditioner is None else self.preconditioner.map(move),
            momentum=None if self.momentum is None else move(self.momentum),
        )

    def measured(self, name: str) -> Statistics:
        """The statistics of the layer of this name.

        Args:
            name: The layer's name, for the message.

        Returns:
            The statistics.

        Raises:
            UsageError: If there are none yet.
        """
        if self.statistics is None:
            raise UsageError(
                f"Layer {name!r} has no curvature statistics yet: no training step ran through it. Train first; if the "
                "model never uses the layer, freeze it with requires_grad_(False); if the model skips layers at random "
                "(layerdrop=), switch that off; if it runs under activation checkpointing, pass use_reentrant=False, "
                "as no hook sees it otherwise."
            )
        return self.statistics


def dump_state(blocks: Mapping[Key, BlockState]) -> dict[Key, dict[str, Any]]:
    """Turn the states of blocks into nested dictionaries of tensors and numbers, by the same keys."""
    return {
        name: {
            "statistics": _dump_statistics(state.statistics),
            "identity_weight": state.identity_weight,
            "posterior": _dump_gaussian(state.posterior),
            "data_scale": state.data_scale,
            "preconditioner": _dump_gaussian(state.preconditioner),
            "momentum": state.momentum,
            "momentum_weight": state.momentum_weight,
            "age": state.age,
        }
        for name, state in blocks.items()
    }


def restore_state(
    dumped: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Layer], age: int = 0
) -> dict[str, BlockState]:
    """Rebuild the states of blocks from :func:`dump_state`, on the devices of their layers.

    Args:
        dumped: The dumped states.
        layers: The layers they are for.
        age: The age of their statistics, where they do not say.

    Returns:
        The states by layer name.

    Raises:
        ArgumentError: If layers or shapes are not those of the dump.
    """
    if set(dumped) != set(layers):
        raise ArgumentError(
            f"state_dict has the layers {sorted(dumped)} but the model has {sorted(layers)}. Load it into an optimizer "
            "of the same model, with the same layers frozen."
        )
    states = {}
    for name, entry in dumped.items():
        device = layers[name].like.device
        state = restore_block(entry, device, age)
        if state.posterior is not None and state.posterior.shape != layers[name].shape:
            raise ArgumentError(
                f"state_dict has a block of shape {state.posterior.shape} for layer {name!r}, whose shape is "
                f"{layers[name].shape}. Load it into an optimizer of the same model."
            )
        states[name] = state
    return states


def restore_block(entry: Mapping[str, Any], device: Any, age: int = 0) -> BlockState:
    """Rebuild the state of one block from its entry in a :func:`dump_state`, on a device.

    Args:
        entry: The entry.
        device: The device.
        age: The age of its statistics, where the entry does not say.

    Returns:
        The state.
    """
    momentum = entry["momentum"]
    return BlockState(
        statistics=_restore_statistics(entry["statistics"], device),
        identity_weight=entry["identity_weight"],
        posterior=_restore_gaussian(entry["posterior"], device),
        data_scale=entry.get("data_scale"),  # checkpoints of before it could be changed do not say
        preconditioner=_restore_gaussian(entry["preconditioner"], device),
        momentum=None if momentum is None else momentum.to(device),
        momentum_weight=entry["momentum_weight"],
        age=entry.get("age", age),
    )


def _dump_statistics(statistics: Statistics | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    return {
        "sums": dict(statistics.sums),
        "counts": dict(statistics.counts),
        "frame": dict(statistics.frame),
        "columns": {name: own.dump() for name, own in statistics.columns.items()},
    }


def _restore_statistics(entry: Mapping[str, Any] | None, device: Any) -> Statistics | None:
    if entry is None:
        return None
    # checkpoints of before there were frames and columns have none
    frame, columns = entry.get("frame", NO_FRAME), entry.get("columns", {})
    statistics = Statistics(
        dict(entry["sums"]),
        dict(entry["counts"]),
        dict(frame),
        {name: columns_from_dump(own) for name, own in columns.items()},
    )
    return statistics.map(lambda value: value.to(device))


def _dump_gaussian(gaussian: BlockGaussian | None) -> dict[str, Any] | None:
    return None if gaussian is None else {"kind": gaussian.kind, "state": gaussian.state}


def _restore_gaussian(entry: Mapping[str, Any] | None, device: Any) -> BlockGaussian | None:
    return None if entry is None else gaussian_from_state(entry["kind"], entry["state"]).to(device)
