"""BoTorch's acquisition functions take the surrogates, and its optimizers climb them."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import (
    PosteriorMean,
    qKnowledgeGradient,
    qNoisyExpectedImprovement,
    qSimpleRegret,
    qUpperConfidenceBound,
)
from botorch.acquisition.analytic import LogExpectedImprovement, UpperConfidenceBound
from botorch.acquisition.logei import qLogExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions.warnings import NumericsWarning
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from bayes_kfac import Laplace, Posterior
from bayes_kfac.botorch import LinearizedSurrogate, SampledSurrogate
from bayes_kfac.likelihoods import Gaussian
from tests.helpers import randn, rng, seeded

D = 2
BOUNDS = torch.stack([torch.zeros(D), torch.ones(D)]).double()
SEEN = torch.rand(8, D, generator=rng(5), dtype=torch.float64)
PENDING = torch.rand(2, D, generator=rng(6), dtype=torch.float64)


def weights(outputs: int = 1) -> Posterior:
    """A Laplace posterior of a network as it was made: acquisitions need not be good ones here."""
    model = seeded(nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, outputs)))
    likelihood = Gaussian(torch.tensor(0.1, dtype=torch.float64))
    return Laplace(model, likelihood).fit([(SEEN, randn(8, outputs, seed=1))], progress=False).posterior()


def linearized(outputs: int = 1) -> LinearizedSurrogate:
    return LinearizedSurrogate(weights(outputs), num_outputs=outputs)


def best() -> Tensor:
    return linearized().posterior(SEEN).mean.max()


def qmc(count: int = 64) -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(torch.Size([count]), seed=0)


ACQUISITIONS = {
    "LogEI": (lambda: LogExpectedImprovement(linearized(), best()), 1),
    "UCB": (lambda: UpperConfidenceBound(linearized(), beta=4.0), 1),
    "qLogEI": (lambda: qLogExpectedImprovement(linearized(), best(), sampler=qmc()), 2),
    "qLogEI, pending": (lambda: qLogExpectedImprovement(linearized(), best(), sampler=qmc(), X_pending=PENDING), 2),
    "qLogNEI": (lambda: qLogNoisyExpectedImprovement(linearized(), SEEN, sampler=qmc()), 2),
    "qUCB": (lambda: qUpperConfidenceBound(linearized(), beta=4.0, sampler=qmc()), 2),
    "KG": (lambda: qKnowledgeGradient(linearized(), num_fantasies=4, sampler=qmc(4)), 1),
    "scalarized LogEI": (
        lambda: LogExpectedImprovement(
            linearized(2), 0.5, posterior_transform=ScalarizedPosteriorTransform(torch.tensor([1.0, -1.0]).double())
        ),
        1,
    ),
    "qLogEHVI": (
        lambda: qLogExpectedHypervolumeImprovement(
            linearized(2),
            [-2.0, -2.0],
            FastNondominatedPartitioning(torch.tensor([-2.0, -2.0]).double(), linearized(2).posterior(SEEN).mean),
            sampler=qmc(16),
        ),
        2,
    ),
    "qLogEI of draws": (lambda: qLogExpectedImprovement(SampledSurrogate(weights(), generator=rng(0)), best()), 2),
    "qLogNEI of draws": (lambda: qLogNoisyExpectedImprovement(SampledSurrogate(weights(), generator=rng(0)), SEEN), 2),
}


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_climbing_beats_random_search(name):
    """What the gradients lead to is at least as good as the best of more random candidates than they started from."""
    torch.manual_seed(0)
    build, q = ACQUISITIONS[name]
    acquisition = build()
    options = {"batch_limit": 4, "maxiter": 40}
    found, value = optimize_acqf(acquisition, BOUNDS, q=q, num_restarts=4, raw_samples=16, options=options)
    assert found.shape == (q, D)
    assert ((found >= 0) & (found <= 1)).all()
    points = acquisition.get_augmented_q_batch_size(q) if name == "KG" else q
    with torch.no_grad():
        random = acquisition(torch.rand(64, points, D, generator=rng(1), dtype=torch.float64))
    assert value > random.max() - 1e-6


def test_gradients_of_an_acquisition_are_finite_differences():
    X = torch.rand(3, 2, D, generator=rng(2), dtype=torch.float64).requires_grad_()
    for name in ("qLogEI", "qLogNEI"):
        assert torch.autograd.gradcheck(ACQUISITIONS[name][0](), X, fast_mode=True)
    X = torch.rand(3, 1 + 4, D, generator=rng(3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ACQUISITIONS["KG"][0](), X, fast_mode=True)


def test_expected_improvement_is_the_gaussians():
    """By its formula, and by Monte Carlo over joint draws."""
    surrogate, X = linearized(), torch.rand(5, 1, D, generator=rng(4), dtype=torch.float64)
    found = surrogate.posterior(X)
    mean, scale = found.mean.flatten(), found.variance.sqrt().flatten()
    z = (mean - best()) / scale
    normal = Normal(torch.zeros_like(z), torch.ones_like(z))
    expected = scale * (z * normal.cdf(z) + normal.log_prob(z).exp())
    assert_close(LogExpectedImprovement(surrogate, best())(X).exp(), expected)
    sampled = qLogExpectedImprovement(surrogate, best(), sampler=qmc(4096))
    assert_close(sampled(X).exp(), expected, rtol=0.05, atol=1e-3)


def test_the_older_noisy_expected_improvement_is_climbed():
    """With BoTorch's own advice to take the newer one."""
    torch.manual_seed(0)
    with pytest.warns(NumericsWarning, match="qLogNoisyExpectedImprovement"):
        acquisition = qNoisyExpectedImprovement(linearized(), SEEN, sampler=qmc(16))
    options = {"batch_limit": 4, "maxiter": 20}
    found, value = optimize_acqf(acquisition, BOUNDS, q=2, num_restarts=4, raw_samples=16, options=options)
    with torch.no_grad():
        random = acquisition(torch.rand(64, 2, D, generator=rng(1), dtype=torch.float64))
    assert found.shape == (2, D)
    assert value > random.max() - 1e-6


def test_pending_points_lower_what_is_expected_of_their_neighbours():
    """Improvement that is on its way already does not count again."""
    pending, X = PENDING, PENDING[:1].unsqueeze(0)
    plain = qLogExpectedImprovement(linearized(), best(), sampler=qmc())
    alone = plain(X)
    waiting = qLogExpectedImprovement(linearized(), best(), sampler=qmc(), X_pending=pending)
    assert_close(waiting(X), plain(torch.cat([X, pending.unsqueeze(0)], dim=1)))
    assert waiting(X) - plain(pending.unsqueeze(0)) < 1e-2 < alone.abs()


def test_one_batch_is_judged_as_if_alone():
    surrogate, X = linearized(), torch.rand(6, 2, D, generator=rng(2), dtype=torch.float64)
    acquisition = qLogExpectedImprovement(surrogate, best(), sampler=qmc())
    assert_close(acquisition(X), torch.cat([acquisition(X[index : index + 1]) for index in range(6)]))
    regret = qSimpleRegret(surrogate, sampler=qmc())
    assert regret(X).shape == (6,)
    assert PosteriorMean(surrogate)(X[:, :1]).shape == (6,)
