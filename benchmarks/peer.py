"""laplace-torch 0.3 (Daxberger et al. 2021), the library that ``laplace.py`` measures beside ours.

What it does, read from its source and confirmed in ``laplace.py agreement``: for a layer with weight ``W`` it takes
``N G ⊗ A + δ I`` in the joint eigenbasis, the damping that is ``"exact"`` here, with ``A`` the mean of ``a aᵀ`` and
``N G`` the sum of ``g gᵀ`` over examples and positions, as in ``sharing="expand"``. A bias is a block of its own,
``N G + δ I``: its covariance with the weights is left out, which is kept here. So the two posteriors are the same where
the layers have no biases, and not otherwise.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from networks import Batches
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


def laplace_torch() -> ModuleType:
    """The package ``laplace``, and not the script of that name in this folder.

    Its metrics import torchvision, of which nothing is used. Where that was built for another torch it does not load.

    Returns:
        The package.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms"):
            sys.modules[name] = MagicMock()
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != HERE]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports, by torch
            import laplace
    finally:
        sys.path[:] = path
    return laplace


def fit(model: nn.Module, batches: Batches, subset: str) -> Any:
    """Its Kronecker fit with the exact GGN (its default backend, curvlinops) and prior precision 1."""
    fitted = laplace_torch().Laplace(model, "classification", subset_of_weights=subset, hessian_structure="kron")
    fitted.fit(batches)
    return fitted


def linearized(fitted: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and covariance of the linearised output: the first thing that ``fitted(x)`` computes."""
    mean, covariance = fitted._glm_predictive_distribution(x)
    return mean, covariance
