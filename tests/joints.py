"""The dense Gaussian that a joint one of all layers stands for: ``T diag(Λ) Tᵀ`` written out. All float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kfac.structures import JointGaussian

__all__ = ["as_vector", "dense_covariance", "unit_values"]


def dense_covariance(gaussian: JointGaussian) -> Tensor:
    """``P⁻¹`` over the weights of all layers, one after another, row by row; of layers without ``*blocks``."""
    places, size = _places(gaussian)
    blocks, T = torch.zeros(size, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for name, block in gaussian.items():
        blocks[places[name], places[name]] = torch.linalg.inv(block.to_dense())
    for name, link in gaussian.links.items():
        T[places[link.to], places[name]] = -torch.kron(link.row, link.column).mT
    return T @ blocks @ T.mT


def as_vector(values: Mapping[str, Tensor]) -> Tensor:
    """Values ``[..., out, in]`` of all layers as vectors ``[..., weights]``."""
    return torch.cat([value.flatten(-2) for value in values.values()], dim=-1)


def unit_values(gaussian: JointGaussian) -> dict[str, Tensor]:
    """All unit vectors as values of all layers, ``[weights, out, in]``."""
    places, size = _places(gaussian)
    basis = torch.eye(size, dtype=torch.float64)
    return {name: basis[:, place].unflatten(-1, gaussian[name].shape) for name, place in places.items()}


def _places(gaussian: JointGaussian) -> tuple[dict[str, slice], int]:
    places, start = {}, 0
    for name, block in gaussian.items():
        size = torch.Size(block.shape).numel()
        places[name] = slice(start, start + size)
        start += size
    return places, start
