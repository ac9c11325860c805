"""The normal distribution of a block, of every structure, against the dense Gaussian that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from bayes_kfac.distributions import BlockNormal
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Gaussian
from tests.helpers import randn, seeded
from tests.posteriors import STRUCTURES, random_posterior

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def block_normal(structure: str = "kron", damping: str = "exact", *batch: int) -> BlockNormal:
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Gaussian(0.5), structure=structure, damping=damping)
    (gaussian,) = posterior.blocks.values()
    return BlockNormal(randn(*batch, 2, 4, seed=1), gaussian)


def dense(d: BlockNormal) -> MultivariateNormal:
    """The same distribution over the block's rows laid end to end."""
    return MultivariateNormal(d.loc.flatten(-2), precision_matrix=d.gaussian.to_dense())


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES)
def test_dense_gaussian(structure: str, damping: str) -> None:
    d = block_normal(structure, damping)
    reference, values = dense(d), randn(5, 3, 2, 4, seed=2)
    assert_close(d.log_prob(values), reference.log_prob(values.flatten(-2)), **CLOSE)
    assert_close(d.entropy(), reference.entropy(), **CLOSE)
    assert_close(d.variance, reference.variance.reshape(2, 4), **CLOSE)
    assert_close(d.mean, d.mode, rtol=0, atol=0)


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES)
def test_samples_are_the_map_of_standard_normals(structure: str, damping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of unit vectors, as many sample and batch dimensions as there are, squares to the covariance."""
    d = block_normal(structure, damping, 4)
    units = torch.eye(8, dtype=torch.float64).reshape(2, 4, 2, 4)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: units.reshape(shape))
    root = (d.rsample((2,)) - d.loc).reshape(8, 8)
    assert_close(root.T @ root, dense(d).covariance_matrix[0], **CLOSE)


def test_blocks_of_several_matrices_are_one_event() -> None:
    """Of a grouped convolution ``[groups, out, in]``: the log density is the sum over groups."""
    posterior = random_posterior(seeded(nn.Conv1d(4, 4, 2, groups=2)), Gaussian(0.5), damping="exact")
    (gaussian,) = posterior.blocks.values()
    d = BlockNormal(randn(3, 2, 2, 5, seed=1), gaussian)
    assert (d.batch_shape, d.event_shape) == ((3,), (2, 2, 5))
    value = randn(3, 2, 2, 5, seed=2)
    parts = MultivariateNormal(d.loc.flatten(-2), precision_matrix=gaussian.to_dense())
    assert_close(d.log_prob(value), parts.log_prob(value.flatten(-2)).sum(-1), **CLOSE)
    assert_close(d.entropy(), parts.entropy().sum(-1), **CLOSE)
    assert d.rsample((7,)).shape == (7, 3, 2, 2, 5)


def test_expand_and_independence() -> None:
    d = block_normal("kron", "exact")
    wide = d.expand((5, 3))
    assert (wide.batch_shape, wide.rsample((2,)).shape) == ((5, 3), (2, 5, 3, 2, 4))
    value = randn(5, 3, 2, 4, seed=3)
    assert_close(wide.log_prob(value), d.log_prob(value), **CLOSE)
    assert_close(wide.to_event(1).log_prob(value), d.log_prob(value).sum(-1), **CLOSE)
    assert_close(wide.entropy(), d.entropy().expand(5, 3), **CLOSE)
    assert wide.variance.shape == (5, 3, 2, 4)
    assert copy.deepcopy(wide).batch_shape == (5, 3)
    assert repr(wide).startswith("BlockNormal(")


def test_gradients_flow_to_the_mean() -> None:
    d = block_normal("kron", "exact")
    loc = d.loc.clone().requires_grad_()
    d = BlockNormal(loc, d.gaussian)
    value = randn(2, 4, seed=3)
    (gradient,) = torch.autograd.grad(d.log_prob(value), loc)
    assert_close(gradient.flatten(), d.gaussian.to_dense() @ (value - loc).flatten(), **CLOSE)
    (ones,) = torch.autograd.grad(d.rsample().sum(), loc)
    assert torch.equal(ones, torch.ones_like(ones))
    assert not d.sample().requires_grad


@pytest.mark.parametrize("shape", [(4,), (4, 2), (5, 2, 3)])
def test_shape_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"loc has shape .* over blocks of \(2, 4\)"):
        BlockNormal(torch.zeros(shape), block_normal().gaussian)


def test_log_prob_validates_its_value() -> None:
    d = block_normal()
    with pytest.raises(ValueError, match="to be within the support"):
        BlockNormal(d.loc, d.gaussian, validate_args=True).log_prob(torch.full((2, 4), torch.nan))
