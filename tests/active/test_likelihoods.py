"""What acquisitions do under likelihoods whose predictions are mixtures: scores that exist, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.active import BALD, EPIG, BatchBALD, Entropy, Variance
from bayes_kfac.active.gaussian import GaussianGains
from bayes_kfac.errors import ArgumentError, UsageError
from tests.helpers import randn, seeded

X = randn(12, 2, seed=0)


def posterior(likelihood: bk.likelihoods.Likelihood, outputs: int) -> bk.Posterior:
    model = seeded(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)))
    y = torch.ones(12, 1, dtype=torch.float64)
    return bk.Laplace(model, likelihood).fit([(X, y)], progress=False).posterior()


@pytest.mark.parametrize(
    ("acquisition", "name"),
    [(Variance(), "epistemic_variance"), (Entropy(), "entropy"), (BALD(), "mutual_information")],
    ids=["Variance", "Entropy", "BALD"],
)
def test_candidates_with_predicted_noise_are_judged_by_their_predictions(acquisition, name) -> None:
    net = posterior(bk.likelihoods.HeteroscedasticGaussian(), 2)
    scores = acquisition.scores(acquisition.look(net, X))
    assert_close(scores, getattr(net.predict(X), name).reshape(12), rtol=1e-12, atol=0.0)
    assert scores.isfinite().all()


def test_counts_are_judged_by_variance_and_have_no_entropy() -> None:
    net = posterior(bk.likelihoods.Poisson(), 1)
    assert_close(Variance().scores(Variance().look(net, X)), net.predict(X).epistemic_variance[:, 0])
    for acquisition in (Entropy(), BALD()):
        with pytest.raises(UsageError, match="which a PoissonPrediction does not know"):
            acquisition.scores(acquisition.look(net, X))


@pytest.mark.parametrize(
    ("likelihood", "outputs"), [(bk.likelihoods.HeteroscedasticGaussian(), 2), (bk.likelihoods.Poisson(), 1)]
)
def test_information_of_batches_is_refused(likelihood, outputs) -> None:
    """It is in closed form for one noise, and over draws for classes: neither is right here."""
    net = posterior(likelihood, outputs)
    for acquisition in (BatchBALD(), EPIG()):
        with pytest.raises(UsageError, match=r"needs sampled_probs, which a .* does not know"):
            acquisition.look(net, X)
    with pytest.raises(ArgumentError, match="Allowed: Gaussian"):
        GaussianGains(net, X)
