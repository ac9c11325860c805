"""Predictions of discrete targets: probabilities are averaged, and the entropies add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError, TargetError
from bayes_kfac.likelihoods import Bernoulli, Categorical, Likelihood
from bayes_kfac.prediction import (
    BernoulliPrediction,
    CategoricalPrediction,
    GaussianOutput,
    Source,
    from_gaussian,
    from_outputs,
)
from bayes_kfac.provenance import Provenance
from tests.helpers import randn, random_spd, rng

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
SAMPLED = Source("sampling", 7, PROVENANCE)
CASES = {
    "categorical": (CategoricalPrediction, (4,)),
    "categorical-sequence": (CategoricalPrediction, (3, 4)),
    "bernoulli": (BernoulliPrediction, (1,)),
    "bernoulli-no-event": (BernoulliPrediction, ()),
    "bernoulli-several": (BernoulliPrediction, (2, 3)),
}


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def categorical(*event: int, scale: float = 2.0) -> CategoricalPrediction:
    return CategoricalPrediction(scale * randn(7, 5, *event, seed=0), SAMPLED)


def bernoulli(*event: int, scale: float = 2.0) -> BernoulliPrediction:
    return BernoulliPrediction(scale * randn(7, 5, *event, seed=0), SAMPLED)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def prediction(request: pytest.FixtureRequest) -> CategoricalPrediction | BernoulliPrediction:
    kind, event = request.param
    return kind(2 * randn(7, 5, *event, seed=0), SAMPLED)


# What holds for both


def test_variance_is_aleatoric_plus_epistemic(prediction: CategoricalPrediction | BernoulliPrediction) -> None:
    """And their sum is the variance of the indicator of each class, ``p (1 − p)`` at the average probability."""
    assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance, rtol=0.0, atol=0.0)
    assert_close(prediction.variance, prediction.probs * (1 - prediction.probs), **TIGHT)
    assert_close(prediction.stddev.square(), prediction.variance, **TIGHT)
    assert_close(prediction.epistemic_variance, torch.as_tensor(prediction.sampled_probs.numpy().var(0)), **TIGHT)
    assert (prediction.epistemic_variance > 0).all()
    assert prediction.variance.shape == prediction.mean.shape == prediction.probs.shape


def test_entropy_is_expected_entropy_plus_mutual_information(
    prediction: CategoricalPrediction | BernoulliPrediction,
) -> None:
    assert_close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information, **TIGHT)
    assert (prediction.mutual_information > 0).all()
    assert_close(prediction.distribution.entropy(), prediction.entropy, **TIGHT)


def test_probabilities_are_averaged_not_logits(prediction: CategoricalPrediction | BernoulliPrediction) -> None:
    """The trap: the softmax of the mean logits is another, more confident prediction."""
    logits = prediction.logits.numpy()
    squash = special.expit if isinstance(prediction, BernoulliPrediction) else (lambda x: special.softmax(x, axis=-1))
    assert_close(prediction.probs, torch.as_tensor(squash(logits).mean(0)), **TIGHT)
    assert_close(prediction.mean, prediction.probs, **TIGHT)
    assert (np.abs(prediction.probs.numpy() - squash(logits.mean(0))) > 1e-3).any()
    assert_close(prediction.distribution.probs, prediction.probs, **TIGHT)


def test_no_mutual_information_without_disagreement() -> None:
    """Draws that agree leave noise only, whatever their number; the information is never negative by rounding."""
    for kind, event in CASES.values():
        logits = randn(1, 5, *event, seed=0).expand(9, 5, *event)
        prediction = kind(logits, SAMPLED)
        assert (prediction.mutual_information >= 0).all()
        assert_close(prediction.mutual_information, torch.zeros_like(prediction.entropy), rtol=0.0, atol=1e-14)
        assert_close(prediction.epistemic_variance, torch.zeros_like(prediction.probs), rtol=0.0, atol=1e-30)


def test_certain_draws_that_disagree_are_all_information() -> None:
    """Two certain draws for two classes: one bit of entropy, none of it noise, and no NaN at probabilities 0 and 1."""
    logits = double([[[1e4, -1e4]], [[-1e4, 1e4]]])
    for prediction in (CategoricalPrediction(logits, SAMPLED), BernoulliPrediction(logits, SAMPLED)):
        entropy = torch.full_like(prediction.entropy, math.log(2))
        assert_close(prediction.entropy, entropy, **TIGHT)
        assert_close(prediction.expected_entropy, torch.zeros_like(entropy), **TIGHT)
        assert_close(prediction.mutual_information, entropy, **TIGHT)


# Entropies and densities against SciPy


def test_categorical_entropies_are_scipys() -> None:
    prediction = categorical(3, 4)
    probs = special.softmax(prediction.logits.numpy(), axis=-1)
    assert_close(prediction.entropy, torch.as_tensor(stats.entropy(probs.mean(0), axis=-1)), **TIGHT)
    assert_close(prediction.expected_entropy, torch.as_tensor(stats.entropy(probs, axis=-1).mean(0)), **TIGHT)
    assert prediction.entropy.shape == (5, 3)


def test_bernoulli_entropies_are_scipys() -> None:
    prediction = bernoulli(2)
    probs = special.expit(prediction.logits.numpy())
    assert_close(prediction.entropy, torch.as_tensor(stats.bernoulli.entropy(probs.mean(0))), rtol=1e-9, atol=1e-10)
    expected = stats.bernoulli.entropy(probs).mean(0)
    assert_close(prediction.expected_entropy, torch.as_tensor(expected), rtol=1e-9, atol=1e-10)
    assert prediction.entropy.shape == (5, 2)


def test_categorical_log_prob_is_the_log_of_the_mean_probability() -> None:
    prediction = categorical(4)
    target = torch.randint(4, (5,), generator=rng(1))
    expected = prediction.probs[torch.arange(5), target].log()
    assert_close(prediction.log_prob(target), expected, **TIGHT)
    assert_close(prediction.distribution.log_prob(target), expected, **TIGHT)


def test_log_prob_of_a_sequence_is_joint() -> None:
    """Positions of one example are independent under one draw; the mean over draws is of their joint probability."""
    prediction = categorical(3, 4)
    target = torch.randint(4, (5, 3), generator=rng(1))
    probs = prediction.sampled_probs.gather(-1, target.expand(7, 5, 3).unsqueeze(-1)).squeeze(-1)
    assert prediction.log_prob(target).shape == (5,)
    assert_close(prediction.log_prob(target), probs.prod(-1).mean(0).log(), **TIGHT)
    assert ((prediction.log_prob(target) - probs.mean(0).log().sum(-1)).abs() > 1e-3).any()


@pytest.mark.parametrize("event", [(), (1,), (2, 3)])
def test_bernoulli_log_prob_is_joint(event: tuple[int, ...]) -> None:
    prediction = bernoulli(*event)
    target = torch.randint(2, (5, *event), generator=rng(1)).double()
    probs = torch.where(target.bool(), prediction.sampled_probs, 1 - prediction.sampled_probs)
    expected = probs.reshape(7, 5, -1).prod(-1).mean(0).log()
    assert_close(prediction.log_prob(target), expected, **TIGHT)


@settings(deadline=None, max_examples=30)
@given(draws=st.integers(1, 9), scale=st.floats(0.0, 300.0), seed=st.integers(0, 2**31))
def test_log_prob_for_any_number_of_draws(draws: int, scale: float, seed: int) -> None:
    """Also where probabilities underflow: SciPy's log-softmax and log-sum-exp."""
    logits = scale * randn(draws, 3, 4, seed=seed)
    target = torch.tensor([0, 3, 1])
    logs = np.take_along_axis(
        special.log_softmax(logits.numpy(), axis=-1), target.numpy()[None, :, None].repeat(draws, 0), -1
    )[..., 0]
    expected = special.logsumexp(logs, axis=0) - math.log(draws)
    result = CategoricalPrediction(logits, SAMPLED).log_prob(target)
    assert_close(result, torch.as_tensor(expected), rtol=1e-11, atol=1e-11)
    binary = (target % 2).double().unsqueeze(-1).expand(3, 4)
    logs = special.log_expit(np.where(binary.numpy() > 0, logits.numpy(), -logits.numpy())).sum(-1)
    expected = special.logsumexp(logs, axis=0) - math.log(draws)
    result = BernoulliPrediction(logits, SAMPLED).log_prob(binary)
    assert_close(result, torch.as_tensor(expected), rtol=1e-11, atol=1e-11)


def test_one_draw_is_the_likelihood() -> None:
    """With a single draw the log-probability is minus the criterion, soft binary targets included."""
    logits = 2 * randn(1, 5, 4, seed=0)
    target = torch.randint(4, (5,), generator=rng(1))
    losses = Categorical().negative_log_likelihood(logits[0], target)
    assert_close(CategoricalPrediction(logits, SAMPLED).log_prob(target), -losses, **TIGHT)
    soft = torch.rand(5, 4, generator=rng(2), dtype=torch.float64)
    losses = Bernoulli().negative_log_likelihood(logits[0], soft)
    assert_close(BernoulliPrediction(logits, SAMPLED).log_prob(soft), -losses, **TIGHT)


# Targets that do not fit


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(5), "class indices"),
        (torch.zeros(5, 1, dtype=torch.int64), "classes along"),
        (torch.zeros(5, 4, dtype=torch.int64), "classes along"),
        (torch.zeros(7, 5, dtype=torch.int64), "classes along"),
        (torch.tensor([0, 1, 2, 3, 4]), r"classes 0 to 4, .* Allowed: 0 to 3"),
        (torch.tensor([0, -1, 2, 3, 0]), r"classes -1 to 3, .* Allowed: 0 to 3"),
    ],
)
def test_categorical_refuses(target: Tensor, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        categorical(4).log_prob(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(5, 1, dtype=torch.int64), "floating point"),
        (torch.zeros(5), "must be equal"),
        (torch.full((5, 1), 2.0), "allowed: 0 and 1"),
        (torch.full((5, 1), math.nan), "allowed: 0 and 1"),
    ],
)
def test_bernoulli_refuses(target: Tensor, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        bernoulli(1).log_prob(target)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integers_are_class_indices(dtype: torch.dtype) -> None:
    prediction, target = categorical(4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(prediction.log_prob(target.to(dtype)), prediction.log_prob(target))


# From Gaussians and draws


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_draws_of_the_linearised_output_have_its_moments(likelihood: Likelihood) -> None:
    """Logits are drawn from the joint Gaussian of an example's outputs: mean and covariance within sampling error."""
    mean, covariance = randn(3, 2, 2, seed=0), random_spd(3, 4, seed=1)
    closed = Source("linearized", None, PROVENANCE)
    output = GaussianOutput(mean, covariance)
    result = from_gaussian(likelihood, output, closed, link=None, num_samples=40_000, generator=rng(2))
    logits = result.logits.flatten(2)
    assert result.source == Source("linearized", 40_000, PROVENANCE, link="mc")
    bound = 5 * (covariance.diagonal(dim1=-2, dim2=-1) / 40_000).sqrt()
    assert ((logits.mean(0) - mean.flatten(1)).abs() <= bound).all()
    centred = logits - logits.mean(0)
    sampled = torch.einsum("sbi,sbj->bij", centred, centred) / 40_000
    assert_close(sampled, covariance, rtol=0.0, atol=0.06)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_singular_output_covariance(likelihood: Likelihood) -> None:
    """Outputs that are certain, or rigidly correlated, are drawn as such and not refused."""
    mean = randn(2, 3, seed=0)
    direction = double([1.0, -2.0, 0.5])
    covariance = torch.stack([torch.zeros(3, 3, dtype=torch.float64), torch.outer(direction, direction)])
    closed = Source("linearized", None, PROVENANCE)
    output = GaussianOutput(mean, covariance)
    logits = from_gaussian(likelihood, output, closed, link="mc", num_samples=50, generator=rng(0)).logits
    assert_close(logits[:, 0], mean[0].expand(50, 3), **TIGHT)
    along = (logits[:, 1] - mean[1]) @ direction / direction.square().sum()
    assert_close(logits[:, 1] - mean[1], along[:, None] * direction, rtol=0.0, atol=1e-6)
    assert along.var() > 0.3


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_generator_is_respected(likelihood: Likelihood) -> None:
    output = GaussianOutput(randn(3, 2, seed=0), random_spd(3, 2, seed=1))
    closed = Source("linearized", None, PROVENANCE)

    def draw(seed: int) -> Tensor:
        return from_gaussian(likelihood, output, closed, link="mc", num_samples=3, generator=rng(seed)).logits

    before = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_results_are_chosen_by_the_likelihood() -> None:
    outputs = randn(7, 5, 4, seed=0)
    for likelihood, kind in ((Categorical(), CategoricalPrediction), (Bernoulli(), BernoulliPrediction)):
        result = from_outputs(likelihood, outputs, SAMPLED)
        assert type(result) is kind
        assert result.source is SAMPLED
        assert torch.equal(result.logits, outputs)


def test_likelihoods_without_a_result_say_so() -> None:
    """An own likelihood that is not registered is an error that names the registration; a subclass inherits."""

    class Own(Likelihood):
        check = sample_gradient = fisher_root = distribution = config = _elementwise = None

    with pytest.raises(ArgumentError, match=r"Own has no prediction.*from_outputs\.register"):
        from_outputs(Own(), randn(7, 5, 4, seed=0), SAMPLED)
    output = GaussianOutput(randn(5, 1, seed=0), random_spd(5, 1, seed=0))
    with pytest.raises(ArgumentError, match=r"Own has no prediction.*from_gaussian\.register"):
        from_gaussian(Own(), output, SAMPLED, link=None, num_samples=1, generator=None)

    class Tempered(Categorical):
        pass

    assert isinstance(from_outputs(Tempered(), randn(7, 5, 4, seed=0), SAMPLED), CategoricalPrediction)
