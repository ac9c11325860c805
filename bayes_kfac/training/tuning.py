"""Tuning while training: the prior's precision at which the evidence is greatest, from the curvature at hand.

Around the mean ``M`` the log-posterior is a quadratic, and its evidence has one maximum in ``δ``: where
``δ ‖M‖² = tr[sF̄ (sF̄ + δ)⁻¹]``, the number of directions that the data determine, with ``s = N/τ`` and one example's
Fisher ``F̄`` (MacKay 1992; online, Immer et al. 2021). It is where the evidence lower bound has its optimum in ``δ`` as
well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bayes_kfac import linalg
from bayes_kfac.structures import BlockSpec, Information, correlation

if TYPE_CHECKING:
    from bayes_kfac.training.noisy import NoisyNaturalGradient

TUNE_KINDS = ("marginal_likelihood",)
#: The extrinsic damping of a training that is tuned on the way. A mean that steps by the intrinsic damping alone walks
#: at random where the data say little, the longer for a weaker prior; its length asks for a weaker prior still.
EXTRINSIC_DAMPING = 1e-2
#: What precisions are kept within: weights that are all zero would have an infinite one.
BOUNDS = (1e-6, 1e8)
HALVINGS = 60


@torch.no_grad()
def tune_prior_precision(optimizer: NoisyNaturalGradient) -> None:
    """Set the prior's precision of each parameter group to where the evidence is greatest at the present mean.

    Args:
        optimizer: The trainer, after its first step.

    Raises:
        UsageError: If no statistics were measured yet.
    """
    scale = optimizer.num_data / optimizer.temperature
    for group in optimizer.param_groups:
        members = [name for name, layer in optimizer.layers.items() if any(layer.like is p for p in group["params"])]
        if group["kind"] != "block" or not members:
            continue
        informations = _informations(optimizer, members)
        length = torch.stack([optimizer.layers[name].values().double().square().sum() for name in members]).sum()
        group["prior_precision"] = _maximum(informations, scale, float(length))


def _informations(optimizer: NoisyNaturalGradient, names: Sequence[str]) -> list[Information]:
    """Of each layer by itself, and what is common to those that are linked; links to other groups do not count."""
    structures = optimizer.structure.for_layers(optimizer.layers)
    specs = [BlockSpec(name, optimizer.blocks[name].measured(name), 1.0, 1.0) for name in names]
    with linalg.full_precision(optimizer.layers[names[0]].like.device):
        return [*(structures[spec.name].information(spec) for spec in specs), correlation(structures, specs)]


def _maximum(informations: Sequence[Information], scale: float, length: float) -> float:
    """The root ``δ`` of ``δ ‖M‖² − tr[sF̄ (sF̄ + δ)⁻¹]``, which increases with ``δ``."""
    lower, upper = (math.log(bound) for bound in BOUNDS)
    for _ in range(HALVINGS):
        middle = (lower + upper) / 2
        delta = math.exp(middle)
        if delta * length < _determined(informations, scale / delta):
            lower = middle
        else:
            upper = middle
    return math.exp((lower + upper) / 2)


def _determined(informations: Sequence[Information], scale: float) -> float:
    """``tr[sF̄ (sF̄ + I)⁻¹]``: how ``log det(I + sF̄)`` grows with ``log s``."""
    with torch.enable_grad():
        variable = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        total = sum((information(variable) for information in informations), torch.zeros_like(variable))
        (slope,) = torch.autograd.grad(total, variable)
    return scale * float(slope)
