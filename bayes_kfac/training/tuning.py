"""Tuning while training: the prior's precision at which the evidence is greatest, from the curvature at hand.

Around the mean ``M`` the log-posterior is a quadratic, and its evidence has one maximum in ``δ``: where
``δ ‖M‖² = Σ sλ / (sλ + δ)``, the number of directions that the data determine, with ``s = N/τ`` and the eigenvalues
``λ`` of one example's Fisher (MacKay 1992; online, Immer et al. 2021). It is where the evidence lower bound has its
optimum in ``δ`` as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.structures import BlockSpec

if TYPE_CHECKING:
    from bayes_kfac.training.noisy import NoisyNaturalGradient

TUNE_KINDS = ("marginal_likelihood",)
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
        spectra = [scale * _spectrum(optimizer, name).flatten().double() for name in members]
        length = torch.stack([optimizer.layers[name].values().double().square().sum() for name in members]).sum()
        group["prior_precision"] = _maximum(torch.cat(spectra), length)


def _spectrum(optimizer: NoisyNaturalGradient, name: str) -> Tensor:
    statistics = optimizer.blocks[name].measured(name)
    with linalg.full_precision(optimizer.layers[name].like.device):
        structure = optimizer.structure.for_block(optimizer.layers[name].adapter.structure)
        return structure.spectrum(BlockSpec(name, statistics, 1.0, 1.0))


def _maximum(eigenvalues: Tensor, length: Tensor) -> float:
    """The root ``δ`` of ``δ ‖M‖² − Σ λ / (λ + δ)``, which increases with ``δ``."""
    lower, upper = (math.log(bound) for bound in BOUNDS)
    for _ in range(HALVINGS):
        middle = (lower + upper) / 2
        delta = math.exp(middle)
        if float(delta * length - (eigenvalues / (eigenvalues + delta)).sum()) < 0:
            lower = middle
        else:
            upper = middle
    return math.exp((lower + upper) / 2)
