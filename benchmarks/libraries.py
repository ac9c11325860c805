"""The same fit and the same prediction by both libraries: ours and laplace-torch 0.3 (Daxberger et al. 2021).

What laplace-torch does, read from its source and confirmed by ``laplace.py agreement``: for a layer with weight ``W``
it takes ``N G ⊗ A + δ I`` in the joint eigenbasis, the damping that is ``"exact"`` here, with ``A`` the mean of
``a aᵀ`` and ``N G`` the sum of ``g gᵀ`` over examples and positions, as in ``sharing="expand"``. A bias is a block of
its own, ``N G + δ I``: its covariance with the weights is left out, which is kept here. So the two posteriors are the
same where layers have no biases, and not otherwise.
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

import bayes_kfac as bk

HERE = Path(__file__).resolve().parent
LIBRARIES = ("laplace-torch", "bayes_kfac")


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


def fit(library: str, model: nn.Module, batches: Batches, subset: str = "all", *, factorise: bool = True) -> Any:
    """The posterior of a classifier: Kronecker-factored exact GGN, prior precision 1 added in the eigenbasis.

    Without ``factorise`` ours is left as sums, before their eigenvectors are taken; laplace-torch always takes them.
    It does with its default backend, curvlinops.
    """
    if library == "laplace-torch":
        fitted = laplace_torch().Laplace(model, "classification", subset_of_weights=subset, hessian_structure="kron")
        fitted.fit(batches)
        return fitted
    options = {"structure": "kron", "damping": "exact", "fisher": "exact", "prior_precision": 1.0, "subset": subset}
    laplace = bk.Laplace(model, bk.likelihoods.Categorical(), num_data=len(batches.dataset), **options)
    laplace.fit(batches, progress=False)
    return laplace.posterior() if factorise else laplace


def linearized(posterior: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and covariance of the linearised output: what both compute before a link to probabilities."""
    if isinstance(posterior, bk.Posterior):
        output = posterior.output(x)
        return output.mean, output.covariance
    mean, covariance = posterior._glm_predictive_distribution(x)
    return mean, covariance
