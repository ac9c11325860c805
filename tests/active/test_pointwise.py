"""Pointwise acquisitions: hand-computed cases, independent formulas, invariances, loaders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac.active import BALD, Entropy, LeastConfidence, Margin, Random, Variance, VariationRatio
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.prediction import BernoulliPrediction, CategoricalPrediction
from tests.active.pools import SOURCE, binary, binary_posterior, certain, classes, pool, posterior, regression
from tests.helpers import TIGHT, randn, rng
from tests.posteriors import dense_output_covariance

ALL = [Variance(), Entropy(), BALD(), Margin(), LeastConfidence(), VariationRatio()]
#: Two draws of three classes, for three examples: they agree and are unsure; they disagree and are sure; both.
HAND = torch.tensor(
    [[[0.5, 0.3, 0.2], [1, 0, 0], [0.8, 0.1, 0.1]], [[0.5, 0.3, 0.2], [0, 1, 0], [0.1, 0.8, 0.1]]], dtype=torch.float64
)
LOG2 = math.log(2)


def hand() -> CategoricalPrediction:
    return CategoricalPrediction(HAND.log(), SOURCE)


@pytest.mark.parametrize(
    ("acquisition", "expected"),
    [
        (Variance(), [0, 0.5, 2 * 0.35**2]),
        (Entropy(), [-(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)), LOG2, None]),
        (BALD(), [0, LOG2, None]),
        (Margin(), [-0.2, 0, 0]),
        (LeastConfidence(), [0.5, 0.5, 0.55]),
        (VariationRatio(), [0, 0.5, 0.5]),
    ],
)
def test_three_examples_by_hand(acquisition, expected):
    for score, value in zip(acquisition.scores(hand()).tolist(), expected, strict=True):
        assert value is None or score == pytest.approx(value, abs=1e-12)


def test_information_is_the_mean_divergence_of_the_draws_from_their_average():
    """An independent formula of BALD, by SciPy's relative entropies."""
    prediction = classes(9, 6, 4)
    probs = prediction.sampled_probs.numpy()
    expected = np.mean([stats.entropy(draw, probs.mean(0), axis=-1) for draw in probs], axis=0)
    assert_close(BALD().scores(prediction), torch.from_numpy(expected), **TIGHT)


def test_information_by_simulation():
    """Draw weights and classes together, and take the mean log-ratio: a Monte Carlo check to five standard errors."""
    prediction = classes(4, 1, 3)
    probs = prediction.sampled_probs[:, 0]
    draws = torch.randint(4, (200_000,), generator=rng(0))
    labels = torch.multinomial(probs[draws], 1, generator=rng(1)).squeeze(1)
    ratios = (probs[draws, labels] / probs.mean(0)[labels]).log()
    error = ratios.std() / math.sqrt(len(ratios))
    assert abs(ratios.mean() - BALD().scores(prediction)[0]) < 5 * error


@pytest.mark.parametrize("acquisition", [BALD(), Entropy()], ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_log_determinants_of_dense_covariances(acquisition, outputs):
    net, x = regression(outputs), pool()
    _, covariance = dense_output_covariance(net, x)
    noise = 0.09 * torch.eye(outputs, dtype=torch.float64)
    expected = 0.5 * torch.linalg.slogdet(covariance + noise).logabsdet
    if isinstance(acquisition, BALD):
        expected = expected - 0.5 * torch.linalg.slogdet(noise).logabsdet
    else:
        expected = expected + 0.5 * outputs * math.log(2 * math.pi * math.e)
    assert_close(acquisition.scores(acquisition.look(net, x)), expected, rtol=1e-8, atol=1e-10)


def test_variance_of_several_outputs_is_the_trace():
    net, x = regression(2), pool()
    _, covariance = dense_output_covariance(net, x)
    acquisition = Variance()
    expected = covariance.diagonal(dim1=1, dim2=2).sum(1)
    assert_close(acquisition.scores(acquisition.look(net, x)), expected, rtol=1e-8, atol=1e-10)


def test_information_of_sampled_regression_is_a_bound():
    acquisition = BALD(method="sampling", num_samples=30)
    prediction = acquisition.look(regression(), pool(), generator=rng(0))
    variance = prediction.outputs.var(0, correction=0).squeeze(1)
    assert_close(acquisition.scores(prediction), 0.5 * (variance / 0.09).log1p(), **TIGHT)


@pytest.mark.parametrize("acquisition", ALL, ids=lambda own: type(own).__name__)
def test_binary_targets_are_two_classes(acquisition):
    prediction = binary(5, 8)
    two = CategoricalPrediction(torch.stack([torch.zeros_like(prediction.logits), prediction.logits], -1), SOURCE)
    factor = 2 if isinstance(acquisition, Variance) else 1  # of both one-hot entries
    assert_close(factor * acquisition.scores(prediction), acquisition.scores(two), **TIGHT)
    column = BernoulliPrediction(prediction.logits.unsqueeze(-1), SOURCE)
    assert_close(acquisition.scores(column), acquisition.scores(prediction), **TIGHT)


@pytest.mark.parametrize("acquisition", ALL, ids=lambda own: type(own).__name__)
def test_positions_of_an_example_are_summed(acquisition):
    logits = randn(5, 4, 6, 3, seed=3)
    whole = acquisition.scores(CategoricalPrediction(logits, SOURCE))
    parts = [acquisition.scores(CategoricalPrediction(logits[:, :, position], SOURCE)) for position in range(6)]
    assert_close(whole, torch.stack(parts).sum(0), **TIGHT)


@pytest.mark.parametrize("acquisition", ALL, ids=lambda own: type(own).__name__)
def test_the_order_of_pool_draws_and_classes_does_not_matter(acquisition):
    logits = 2 * randn(7, 9, 4, seed=2)
    scores = acquisition.scores(CategoricalPrediction(logits, SOURCE))
    order = torch.randperm(9, generator=rng(0))
    assert_close(acquisition.scores(CategoricalPrediction(logits[:, order], SOURCE)), scores[order], **TIGHT)
    assert_close(acquisition.scores(CategoricalPrediction(logits.flip(0).flip(2), SOURCE)), scores, **TIGHT)


def test_copies_of_the_best_are_all_selected_by_top_k():
    prediction = certain([[0, 0, 0], [1, 1, 0]], 2)
    assert sorted(BALD().select(prediction, 2).tolist()) == [0, 1]


@pytest.mark.parametrize("acquisition", [*ALL, Random()], ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("make", [posterior, binary_posterior], ids=["categorical", "bernoulli"])
def test_a_posterior_is_looked_at_with_its_generator(acquisition, make):
    views = [acquisition.look(make(), pool(), generator=rng(3)) for _ in range(2)]
    first, second = (acquisition.scores(view) for view in views)
    assert torch.equal(first, second)
    assert first.shape == (12,)


@pytest.mark.parametrize("acquisition", [Variance(), BALD(), Entropy()], ids=lambda own: type(own).__name__)
def test_a_loader_gives_the_scores_of_its_pool(acquisition):
    net, x = regression(), pool()
    loader = DataLoader(TensorDataset(x, torch.zeros(12)), batch_size=5)
    view = acquisition.look(net, loader)
    assert torch.is_tensor(view)
    assert_close(acquisition.scores(view), acquisition.scores(acquisition.look(net, x)), **TIGHT)
    assert torch.equal(acquisition.select(view, 3), acquisition.select(acquisition.look(net, x), 3))


def test_options_reach_the_posterior():
    prediction = LeastConfidence(link="extended_probit").look(posterior(), pool())
    assert prediction.source.link == "extended_probit"
    assert BALD(num_samples=5).look(posterior(), pool()).source.num_samples == 5
    assert BALD(method="sampling").look(posterior(), pool()).source.method == "sampling"


def test_means_of_probabilities_hold_no_information():
    with pytest.raises(UsageError, match="link='mc'"):
        BALD(link="probit").scores(BALD(link="probit").look(posterior(), pool()))


def test_a_wrong_option_is_refused_as_by_predict():
    with pytest.raises(ArgumentError, match="method='exact' is unknown"):
        BALD(method="exact").look(posterior(), pool())


def test_probabilities_are_asked_of_classifications_only():
    with pytest.raises(UsageError, match="Margin needs probs, which a GaussianPrediction does not know"):
        Margin().scores(Margin().look(regression(), pool()))


def test_random_needs_no_predictor_and_its_seed():
    scores = Random().look(None, pool(), generator=rng(0))
    assert torch.equal(scores, Random().look(None, DataLoader(pool(), batch_size=5), generator=rng(0)))
    assert len(Random().select(scores, 12).unique()) == 12
