"""Posteriors with random blocks around any model, and the dense Gaussian that each of them stands for. All float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayes_kfac import Posterior, structures
from bayes_kfac.batches import call
from bayes_kfac.curvature import Layer, Rows, Statistics, find_layers
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction import Draws
from bayes_kfac.prediction.forward import evaluating
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import DAMPING_KINDS, BlockSpec, Structure
from tests.helpers import in_block, parameter_jacobians, randn

__all__ = [
    "BY_COLUMN",
    "DAMPING_KINDS",
    "ESTIMATES",
    "FAMILIES",
    "FAMILY_NAMES",
    "STRUCTURES",
    "dense_covariances",
    "dense_derivatives",
    "dense_function_covariance",
    "dense_function_samples",
    "dense_mean",
    "dense_output_covariance",
    "random_posterior",
    "surveyed",
]

#: One structure for each kind of Gaussian, and for each way in which a prior enters: what depends on these alone is
#: tested with them. What every structure must do is in ``tests/structures/test_contract.py`` and ``test_in_use.py``.
FAMILIES = [
    ("dense", "exact"),
    ("diagonal", "exact"),
    ("kron", "exact"),
    ("kron", "factored"),
    ("kron", "optimal"),
    ("unit_wise", "exact"),
    ("sketchy", "exact"),
    ("smw", "exact"),
]
FAMILY_NAMES = sorted({name for name, _ in FAMILIES})

#: Structures that have one column for a whole batch: of parts of it there is another estimate, and only what it
#: estimates adds up.
ESTIMATES = {"mfac"}

#: Families that take a precision for each column of a block, and not for each weight.
BY_COLUMN = {"kron", "sketchy"}

#: Every structure with every damping that makes a difference to it.
STRUCTURES = sorted(
    {
        (name, structures.get(name, damping=damping, sharing="expand").damping)
        for name in structures.available()
        for damping in DAMPING_KINDS
    }
)


def surveyed(structure: Structure, rows: Rows) -> Statistics:
    """What a structure measures of these rows in as many passes as it takes."""
    statistics = structure.measure(rows)
    for _ in range(structure.passes - 1):
        statistics = structure.measure(rows, structure.reframed(statistics, "layer").frame)
    return statistics


def random_posterior(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    structure: str = "kron",
    damping: str = "factored",
    num_data: int = 20,
    prior_precision: float = 1.3,
    rows: Mapping[str, Rows] | None = None,
    seed: int = 0,
) -> Posterior:
    """A posterior around the model's weights, its blocks built from random rows or from those that are given."""
    layers, _ = find_layers(model)
    whole = structures.get(structure, damping=damping, sharing="expand")
    blocks = {}
    for index, (name, layer) in enumerate(layers.items()):
        own = whole.for_layer(layer)
        statistics = surveyed(own, random_rows(layer, seed=seed + 2 * index) if rows is None else rows[name])
        (blocks[name],) = own.gaussians([BlockSpec(name, statistics, float(num_data), prior_precision)])
    return Posterior(
        model,
        likelihood,
        blocks,
        prior_precision=dict.fromkeys(layers, prior_precision),
        provenance=Provenance("a test", structure, damping, "mc", "expand", temperature=1.0, num_data=num_data),
    )


def random_rows(layer: Layer, *, seed: int) -> Rows:
    """Rows of thirty examples and one column, of a layer whose inputs are not sparse."""
    *blocks, out, in_ = layer.shape
    rows = Rows(randn(*blocks, 30, 1, in_, seed=seed), randn(1, *blocks, 30, 1, out, seed=seed + 1))
    return rows.to(layer.like.dtype).for_algebra()


def dense_covariances(posterior: Posterior) -> dict[str, Tensor]:
    """``P⁻¹`` of each layer, ``[*blocks, out·in, out·in]``, by inverting the dense precision."""
    return {name: torch.linalg.inv(gaussian.to_dense()) for name, gaussian in posterior.blocks.items()}


def dense_mean(posterior: Posterior, inputs: Any) -> Tensor:
    """The model's output at the posterior's mean, ``[batch, ...]``."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return functional_call(posterior.model, posterior.mean, args, kwargs)

    with evaluating(posterior.model):
        return call(function, inputs).detach()


def dense_derivatives(posterior: Posterior, inputs: Any) -> dict[str, Tensor]:
    """By torch.func, of each example's output by each parameter at the mean, ``[batch, outputs, *parameter]``."""
    with evaluating(posterior.model):
        return parameter_jacobians(posterior.model, inputs, posterior.mean)


def dense_output_covariance(posterior: Posterior, inputs: Any) -> tuple[Tensor, Tensor]:
    """The linearised model's mean ``[batch, ...]`` and ``J P⁻¹ Jᵀ``, ``[batch, outputs, outputs]``, by torch.func."""
    joint = dense_function_covariance(posterior, inputs, inputs)
    return dense_mean(posterior, inputs), joint.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def dense_function_covariance(
    posterior: Posterior, inputs: Any, others: Any, derivatives: dict[str, Tensor] | None = None
) -> Tensor:
    """``J P⁻¹ J'ᵀ`` between all pairs of examples, ``[batch, other batch, outputs, outputs]``, by torch.func.

    Where ``others`` is ``inputs``, their derivatives may be passed on.
    """
    mine = dense_derivatives(posterior, inputs) if derivatives is None else derivatives
    theirs = mine if others is inputs else dense_derivatives(posterior, others)
    total = []
    for name, covariance in dense_covariances(posterior).items():
        J, K = (in_block(posterior.layers[name], each).flatten(-2) for each in (mine, theirs))
        total.append(torch.einsum("nc...i,...ij,md...j->nmcd", J, covariance, K))
    return torch.stack(total).sum(0)


def dense_function_samples(
    posterior: Posterior, inputs: Any, draws: Draws, derivatives: dict[str, Tensor] | None = None
) -> Tensor:
    """``f(x) + J (w − M)`` for each draw ``w``, ``[num_samples, batch, ...]``, by torch.func."""
    mean = dense_mean(posterior, inputs)
    derivatives = dense_derivatives(posterior, inputs) if derivatives is None else derivatives
    change = torch.zeros(len(draws), len(mean), mean[0].numel(), dtype=mean.dtype)
    for name, values in draws.values.items():
        J = derivatives[name].reshape(*derivatives[name].shape[:2], -1)
        change = change + torch.einsum("nci,si->snc", J, (values - posterior.mean[name]).reshape(len(draws), -1))
    return mean + change.reshape(-1, *mean.shape)
