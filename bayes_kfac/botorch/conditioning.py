"""A linearised model, and the same given observations: a Gaussian process whose kernel is ``J P⁻¹ Jᵀ``.

In the linearised model ``f(x) = f(x; M) + J(x) (w − M)`` Gaussian observations change the Gaussian of the weights
exactly. In function space that is the regression of Gaussian processes: with ``k(x, x') = J P⁻¹ J'ᵀ``, observations
``y`` at ``x_n`` of noise ``R``, and ``C = K_nn + R``,

    ``mean(x) = f(x; M) + k(x, x_n) C⁻¹ (y − f(x_n; M))``,    ``cov(x, x') = k(x, x') − k(x, x_n) C⁻¹ k(x_n, x')``.

Inputs are ``batch_shape x q x d``; the outputs of one point follow each other, so that covariances are
``batch_shape x q·m x q·m``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.prediction import Features, LinearizedModel


@dataclass(frozen=True)
class Observations:
    """Observations of a linearised model, and what is needed of them at every prediction.

    An observation is of one output at one point. Which outputs were seen may differ between points.

    Attributes:
        linearized: The model.
        X: The points, ``batch_shape x n x d``.
        Y: What was seen, ``batch_shape' x N x 1``, of the network's outputs.
        noise: Its variance, likewise.
        points: At which of the points each was seen, ``[N]``.
        outputs: Of which element of the network's output it was, ``[N]``.
        features: The model at these points, of the outputs that were seen anywhere.
        rows: Where each observation is among these, ``[N]``.
        root: The Cholesky factor of ``C``.
        weights: ``C⁻¹ (y − f(x_n; M))``, ``... x N x 1``.
    """

    linearized: LinearizedModel
    X: Tensor
    Y: Tensor
    noise: Tensor
    points: Tensor
    outputs: Tensor
    features: Features = field(init=False)
    rows: Tensor = field(init=False)
    root: Tensor = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, (distinct, column) = self.X.shape[:-2], self.outputs.unique(return_inverse=True)
        features = self.linearized.features(self.X.flatten(0, -2), distinct.tolist())
        rows, size = self.points * len(distinct) + column, self.X.shape[-2] * len(distinct)
        covariance = as_matrix(features.covariance(features, batch.numel())).reshape(*batch, size, size)
        covariance = covariance.index_select(-2, rows).index_select(-1, rows)
        root = linalg.cholesky(covariance + torch.diag_embed(self.noise.squeeze(-1)), ["the observations"])
        residual = self.Y - features.mean.reshape(*batch, size, 1).index_select(-2, rows)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "weights", torch.cholesky_solve(residual, root))

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of all of it."""
        return self.weights.shape[:-2]


def observed(
    linearized: LinearizedModel,
    X: Tensor,
    Y: Tensor,
    noise: Tensor,
    outputs: Sequence[int],
    given: Observations | None = None,
) -> Observations:
    """Observations of some outputs at each of some points, and those that there are already.

    Args:
        linearized: The model.
        X: The points, ``batch_shape x n x d``.
        Y: What was seen, ``batch_shape' x n x m``, of the network's outputs.
        noise: Its variance, likewise.
        outputs: Which elements of the network's output these are.
        given: What was observed before, maybe of other outputs.

    Returns:
        All of them.
    """
    points, columns = torch.arange(X.shape[-2], device=X.device), torch.as_tensor(outputs, device=X.device)
    points, columns = points.repeat_interleave(len(outputs)), columns.repeat(len(points))
    Y, noise = (value.flatten(-2).unsqueeze(-1) for value in (Y, noise))
    if given is not None:
        points, columns = torch.cat([given.points, points + given.X.shape[-2]]), torch.cat([given.outputs, columns])
        X, Y, noise = _joined(given.X, X), _joined(given.Y, Y), _joined(given.noise, noise)
    return Observations(linearized, X, Y, noise, points, columns)


def moments(
    linearized: LinearizedModel, X: Tensor, outputs: Sequence[int], given: Observations | None
) -> tuple[Tensor, Tensor]:
    """The joint Gaussian of the outputs at each batch of points.

    Points of different batches never meet, so that the covariance between them is not computed.

    Args:
        linearized: The model.
        X: The points, ``batch_shape x q x d``.
        outputs: Which elements of the network's output.
        given: What was observed.

    Returns:
        The mean ``batch_shape x q x m``, and the covariance ``batch_shape x q·m x q·m``; the batch shape is broadcast
        with that of the observations.
    """
    seen = torch.Size() if given is None else given.X.shape[:-2]
    X = X.expand(*torch.broadcast_shapes(X.shape[:-2], seen), -1, -1)
    # batches that have observations of their own come first: they are the groups within which points meet these
    of_group = [False] * (X.ndim - 2 - len(seen)) + [size > 1 for size in seen]
    order = sorted(range(X.ndim - 2), key=lambda dim: not of_group[dim])
    back = [order.index(dim) for dim in range(X.ndim - 2)]
    X = X.permute(*order, -2, -1)
    batch, groups = X.shape[:-2], seen.numel()

    features = linearized.features(X.flatten(0, -2), outputs)
    mean = features.mean.reshape(*X.shape[:-1], -1)
    size = mean.shape[-2:].numel()
    covariance = as_matrix(features.covariance(features, batch.numel())).reshape(*batch, size, size)
    covariance = with_jitter(covariance)
    mean, covariance = mean.permute(*back, -2, -1), covariance.permute(*back, -2, -1)
    if given is None:
        return mean, covariance
    cross = as_matrix(features.covariance(given.features, groups)).index_select(-1, given.rows)
    cross = cross.reshape(*batch, size, -1).permute(*back, -2, -1)
    mean = mean + (cross @ given.weights).reshape(*_broadcast(cross, given.weights), *mean.shape[-2:])
    explained = _solved(given.root, cross)
    covariance = covariance - explained @ explained.mT
    return mean, covariance.expand(*mean.shape[:-2], size, size)


def as_matrix(covariance: Tensor) -> Tensor:
    """``[groups, n, m, c, d]`` as matrices ``[groups, n·c, m·d]``."""
    return covariance.transpose(2, 3).flatten(3).flatten(1, 2)


def with_jitter(covariance: Tensor) -> Tensor:
    """Positive definite in spite of rounding, where points coincide or are more than weights.

    Args:
        covariance: Covariances, ``[..., n, n]``.

    Returns:
        The same with variances that are larger by a factor of 1 + 1.5e-10 in float64.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return covariance + torch.diag_embed(0.01 * math.sqrt(torch.finfo(covariance.dtype).eps) * diagonal)


def _solved(root: Tensor, rows: Tensor) -> Tensor:
    """``(L⁻¹ Rᵀ)ᵀ`` of rows ``[..., r, n]``, without a copy of ``L`` for every batch that shares it."""
    batch = _broadcast(root, rows)
    own = [1] * (len(batch) - root.ndim + 2) + list(root.shape[:-2])
    order = sorted(range(len(batch)), key=lambda dim: own[dim] == 1)
    back = [order.index(dim) for dim in range(len(batch))]
    roots = [size for size in own if size > 1]
    moved = rows.expand(*batch, -1, -1).permute(*order, -2, -1)
    folded = moved.flatten(len(roots), -2)  # what shares a root is one matrix of rows
    solved = torch.linalg.solve_triangular(root.reshape(*roots, *root.shape[-2:]), folded.mT, upper=False).mT
    return solved.reshape(moved.shape).permute(*back, -2, -1)


def _broadcast(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))


def _joined(first: Tensor, second: Tensor) -> Tensor:
    batch = _broadcast(first, second)
    return torch.cat([tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (first, second)], dim=-2)
