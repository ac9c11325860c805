"""Links: class probabilities from Gaussian logits, against draws, definitions, and what they must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.errors import ArgumentError, TargetError, UsageError
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayes_kfac.prediction import (
    LINKS,
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    GaussianOutput,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
    Prediction,
    Source,
    from_gaussian,
)
from bayes_kfac.prediction.links import extended_probit, laplace_bridge, laplace_bridge_norm, probit
from bayes_kfac.provenance import Provenance
from tests.helpers import randn, random_spd, rng, seeded
from tests.posteriors import random_posterior

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
CLOSED = Source("linearized", None, PROVENANCE)
MEANS = ["probit", "extended_probit"]
BRIDGES = ["laplace_bridge", "laplace_bridge_norm"]
CLOSED_FORMS = MEANS + BRIDGES


def predict(
    output: GaussianOutput, link: str | None, likelihood: Likelihood | None = None, num_samples: int = 16
) -> Prediction:
    likelihood = likelihood or Categorical()
    return from_gaussian(likelihood, output, CLOSED, link=link, num_samples=num_samples, generator=rng(9))


def gaussian(*shape: int, scale: float = 1.0, diagonal: bool = False, seed: int = 0) -> GaussianOutput:
    """Logits of the given shape with correlations between all of an example's outputs, or none."""
    covariance = scale * random_spd(shape[0], math.prod(shape[1:]), seed=seed + 1)
    spread = covariance.diagonal(dim1=-2, dim2=-1) if diagonal else covariance
    return GaussianOutput(randn(*shape, seed=seed), spread)


def dirichlet_logits(alpha: Tensor) -> GaussianOutput:
    """The Laplace approximation of a Dirichlet over logits that sum to zero (MacKay 1998), written out."""
    classes, inverse = alpha.shape[-1], 1 / alpha
    mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    rows = inverse.unsqueeze(-1) + inverse.unsqueeze(-2) - inverse.mean(-1)[..., None, None]
    return GaussianOutput(mean, torch.diag_embed(inverse) - rows / classes)


# Against draws


@pytest.mark.parametrize(
    ("link", "classes", "error"),
    [
        ("probit", 2, 0.06),
        ("extended_probit", 2, 0.01),
        ("probit", 3, 0.12),
        ("extended_probit", 3, 0.11),
        ("probit", 10, 0.09),
        ("extended_probit", 10, 0.1),
    ],
)
def test_probit_links_are_near_the_expected_softmax(link: str, classes: int, error: float) -> None:
    """And nearer, on average over examples, than the softmax of the mean logits is."""
    output = gaussian(20, classes)
    sampled = predict(output, "mc", num_samples=50_000).probs
    distance = (predict(output, link).probs - sampled).abs()
    assert distance.max() < error
    assert distance.mean() < (output.mean.softmax(-1) - sampled).abs().mean()


def test_binary_probit_is_near_the_expected_sigmoid() -> None:
    """The integral by quadrature: MacKay's form is within 0.02 of it for any mean and any variance."""
    for variance in (0.01, 1.0, 10.0, 100.0):
        output = GaussianOutput(torch.linspace(-8, 8, 9, dtype=torch.float64), torch.full((9, 1), variance).double())
        scale = variance**0.5
        expected = [
            integrate.quad(
                lambda z, m=m, scale=scale: special.expit(m + scale * z) * stats.norm.pdf(z), -10, 10, limit=200
            )[0]
            for m in output.mean.tolist()
        ]
        assert_close(predict(output, "probit", Bernoulli()).probs, torch.tensor(expected).double(), rtol=0.0, atol=0.02)


def test_the_bridge_inverts_the_dirichlets_laplace_approximation() -> None:
    """The formula's definition: from the mean and variances that a Dirichlet has over logits back to the Dirichlet."""
    alpha = torch.rand(6, 4, generator=rng(0), dtype=torch.float64) * 5 + 0.2
    assert_close(laplace_bridge(dirichlet_logits(alpha)), alpha, **TIGHT)


def test_the_bridges_gaussian_is_the_dirichlets_over_logits() -> None:
    """Sampled logarithms of a concentrated Dirichlet have the mean and variances that the bridge starts from."""
    alpha = torch.tensor([[300.0, 900.0, 600.0]], dtype=torch.float64)
    torch.manual_seed(0)
    logits = torch.distributions.Dirichlet(alpha).sample((100_000,)).log()
    logits = logits - logits.mean(-1, keepdim=True)
    expected = dirichlet_logits(alpha)
    assert_close(logits.mean(0), expected.mean, rtol=0.0, atol=2e-3)
    assert_close(logits.var(0), expected.variance, rtol=0.03, atol=0.0)


def test_the_bridges_mean_is_the_softmax_where_a_dirichlet_is_concentrated() -> None:
    """A Gaussian that a Dirichlet could have made, ever narrower: the mean of the bridge is the softmax of the mean."""
    for count in (1.0, 1e3, 1e6):
        output = dirichlet_logits(count * torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float64))
        assert_close(predict(output, "laplace_bridge").probs, output.mean.softmax(-1), **TIGHT)


def test_the_bridges_mean_is_not_the_softmax_otherwise() -> None:
    """The docstring's example of where the published formula is off: equal variances, as small as one likes."""
    output = GaussianOutput(torch.tensor([[0.0, 1.0, -1.0]]).double(), torch.full((1, 3), 1e-6).double())
    expected = torch.tensor([[0.28, 0.55, 0.18]]).double()
    assert_close(predict(output, "laplace_bridge").probs, expected, rtol=0.0, atol=5e-3)
    softmax = torch.tensor([[0.24, 0.67, 0.09]]).double()
    assert_close(predict(output, "mc", num_samples=10).probs, softmax, rtol=0.0, atol=5e-3)
    assert predict(output, "laplace_bridge_norm").probs.max() > 1 - 1e-12


def test_the_normalised_bridge_is_the_bridge_at_its_own_scale() -> None:
    """Variances with a mean of √(K/2) are left as they are; others are scaled to it, and means by the root."""
    output = gaussian(5, 4)
    projector = torch.eye(4, dtype=torch.float64) - 0.25
    variance = (projector @ output.spread @ projector).diagonal(dim1=-2, dim2=-1).mean(-1)
    factor = (2**0.5 / variance)[:, None]
    scaled = GaussianOutput(output.mean * factor.sqrt(), output.spread * factor[..., None])
    assert_close(laplace_bridge_norm(output), laplace_bridge(scaled), **TIGHT)
    assert_close(laplace_bridge_norm(scaled), laplace_bridge(scaled), **TIGHT)


# Definitions, and what the links must not depend on


def test_extended_probit_is_the_sum_over_pairs() -> None:
    output = gaussian(3, 4)
    expected = np.zeros((3, 4))
    for n in range(3):
        mean, covariance = output.mean[n].numpy(), output.spread[n].numpy()
        for k in range(4):
            for i in range(4):
                variance = covariance[k, k] + covariance[i, i] - 2 * covariance[k, i]
                expected[n, k] += np.exp(-(mean[k] - mean[i]) / np.sqrt(1 + np.pi / 8 * variance))
    expected = 1 / expected
    assert_close(predict(output, "extended_probit").probs, torch.tensor(expected / expected.sum(-1, keepdims=True)))


def test_two_classes_are_the_binary_probit_of_their_difference() -> None:
    output = gaussian(6, 2)
    contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
    difference = GaussianOutput(output.mean @ contrast, (contrast @ output.spread @ contrast).unsqueeze(-1))
    binary = predict(difference, "probit", Bernoulli())
    assert_close(predict(output, "extended_probit").probs[:, 0], binary.probs, **TIGHT)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("link", ["mc", *MEANS])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_without_variance_it_is_the_softmax(likelihood: Likelihood, link: str, diagonal: bool) -> None:
    mean = 3 * randn(4, 3, seed=0)
    output = GaussianOutput(mean, torch.zeros(4, 3, *([] if diagonal else [3]), dtype=torch.float64))
    expected = mean.sigmoid() if isinstance(likelihood, Bernoulli) else mean.softmax(-1)
    assert_close(predict(output, link, likelihood).probs, expected, **TIGHT)


@pytest.mark.parametrize("link", ["mc", "extended_probit", *BRIDGES])
def test_a_constant_added_to_all_logits_changes_nothing(link: str) -> None:
    """Nor does a random one, independent of the logits, which a softmax ignores as well."""
    output = gaussian(4, 3)
    moved = GaussianOutput(output.mean + 7.0, output.spread)
    assert_close(predict(moved, link).probs, predict(output, link).probs, **TIGHT)
    if link != "mc":
        widened = GaussianOutput(output.mean, output.spread + 5.0)
        assert_close(predict(widened, link).probs, predict(output, link).probs, **TIGHT)


def test_the_plain_probit_ignores_a_constant_at_equal_variances_only() -> None:
    """What its docstring warns of."""
    output = gaussian(4, 3)
    moved = GaussianOutput(output.mean + 7.0, output.spread)
    assert ((predict(moved, "probit").probs - predict(output, "probit").probs).abs() > 0.05).any()
    even = GaussianOutput(output.mean, torch.full((4, 3), 2.0, dtype=torch.float64))
    moved = GaussianOutput(output.mean + 7.0, even.spread)
    assert_close(predict(moved, "probit").probs, predict(even, "probit").probs, **TIGHT)


@pytest.mark.parametrize("link", CLOSED_FORMS)
def test_permuted_classes_give_permuted_probabilities(link: str) -> None:
    output, order = gaussian(4, 3), torch.tensor([2, 0, 1])
    permuted = GaussianOutput(output.mean[:, order], output.spread[:, order][:, :, order])
    assert_close(predict(permuted, link).probs, predict(output, link).probs[:, order], **TIGHT)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("link", CLOSED_FORMS)
def test_each_position_is_on_its_own(link: str, diagonal: bool) -> None:
    """Every position of an example takes its own block of the covariance, whatever the others are."""
    output = gaussian(4, 2, 3, 5, diagonal=diagonal)
    probs = predict(output, link).probs
    for i in range(2):
        for j in range(3):
            own = slice(5 * (3 * i + j), 5 * (3 * i + j + 1))
            spread = output.spread[:, own] if diagonal else output.spread[:, own, own]
            assert_close(probs[:, i, j], predict(GaussianOutput(output.mean[:, i, j], spread), link).probs, **TIGHT)


@pytest.mark.parametrize("link", CLOSED_FORMS)
def test_variances_alone_are_a_diagonal_covariance(link: str) -> None:
    output = gaussian(4, 2, 3, diagonal=True)
    dense = GaussianOutput(output.mean, output.covariance)
    assert_close(predict(output, link).probs, predict(dense, link).probs, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("link", CLOSED_FORMS)
def test_extremes_stay_probabilities(link: str, diagonal: bool, scale: float, dtype: torch.dtype) -> None:
    """Logits far beyond the dtype's exponent, certain or hopeless ones, one class: never NaN, and they sum to one."""
    for classes in (1, 2, 4):
        output = gaussian(5, classes, scale=scale, diagonal=diagonal)
        prediction = predict(GaussianOutput((200 * output.mean).to(dtype), output.spread.to(dtype)), link)
        assert_close(prediction.probs.sum(-1), torch.ones(5, dtype=dtype))
        assert prediction.probs.dtype == dtype
        assert bool(torch.isfinite(prediction.variance).all())
        assert bool(torch.isfinite(prediction.entropy).all())


def test_a_shared_uncertainty_leaves_the_bridge_a_dirichlet() -> None:
    """Logits that move together only: what rounding leaves of their differences must not make one class certain."""
    mean = torch.tensor([[0.3, -0.2, 0.1, 0.0]])
    noise = 1e-5 * randn(1, 4, 4, seed=0).float()
    prediction = predict(GaussianOutput(mean, 123.4 + noise + noise.mT), "laplace_bridge")
    assert_close(prediction.probs, mean.softmax(-1), rtol=0.0, atol=0.05)


# The results


def test_the_link_chooses_the_result() -> None:
    """Kind, link and number of draws; a posterior's own draws have no link."""
    output = gaussian(4, 3)
    kinds = [CategoricalPrediction, *[MeanCategoricalPrediction] * 2, *[DirichletPrediction] * 2]
    for link, kind in zip(LINKS, kinds, strict=True):
        prediction = predict(output, link)
        assert type(prediction) is kind
        assert prediction.source == Source("linearized", 16 if link == "mc" else None, PROVENANCE, link)
        assert len(prediction) == 4
        assert_close(prediction.variance, prediction.probs * (1 - prediction.probs), **TIGHT)
        assert_close(prediction.stddev.square(), prediction.variance, **TIGHT)
        assert_close(prediction.distribution.probs, prediction.probs, **TIGHT)
        assert_close(prediction.distribution.entropy(), prediction.entropy, **TIGHT)
        assert torch.equal(prediction.mean, prediction.probs)
    for link in ("mc", *MEANS):
        kind = BernoulliPrediction if link == "mc" else MeanBernoulliPrediction
        prediction = predict(output, link, Bernoulli())
        assert type(prediction) is kind
        assert prediction.source.link == link
        assert_close(prediction.variance, prediction.probs * (1 - prediction.probs), **TIGHT)
        assert_close(prediction.distribution.entropy(), prediction.entropy, **TIGHT)
    assert type(predict(output, None)) is CategoricalPrediction


@pytest.mark.parametrize("name", ["expected_entropy", "mutual_information", "epistemic_variance", "aleatoric_variance"])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_mean_probabilities_do_not_say_where_they_come_from(likelihood: Likelihood, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} is unknown: link='probit'.*link='mc'"):
        getattr(predict(gaussian(4, 3), "probit", likelihood), name)


@pytest.mark.parametrize("link", CLOSED_FORMS)
@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_log_prob_of_classes(link: str, positions: tuple[int, ...]) -> None:
    """The sum over an example's positions of the log-probabilities of their classes."""
    prediction = predict(gaussian(4, *positions, 5), link)
    target = torch.randint(5, (4, *positions), generator=rng(3))
    chosen = prediction.probs.gather(-1, target.unsqueeze(-1)).log().reshape(4, -1).sum(-1)
    assert_close(prediction.log_prob(target), chosen, **TIGHT)
    with pytest.raises(TargetError, match="class indices"):
        prediction.log_prob(target.double())


@pytest.mark.parametrize("event", [(), (3,), (2, 3)])
def test_log_prob_of_binary_targets(event: tuple[int, ...]) -> None:
    prediction = predict(gaussian(4, *event), "probit", Bernoulli())
    target = torch.randint(2, (4, *event), generator=rng(3)).double()
    chosen = torch.where(target.bool(), prediction.probs, 1 - prediction.probs).log().reshape(4, -1).sum(-1)
    assert_close(prediction.log_prob(target), chosen, **TIGHT)


def test_log_prob_survives_probabilities_of_zero() -> None:
    output = GaussianOutput(torch.tensor([[0.0, -2000.0]]), torch.zeros(1, 2))
    assert_close(predict(output, "probit").log_prob(torch.tensor([1])), torch.tensor([-2000.0]))


def test_dirichlet_moments_and_entropies_are_those_of_its_samples() -> None:
    """Every closed form of the result against 200 000 samples of the Dirichlet, and SciPy's variance."""
    alpha = torch.tensor([[0.4, 1.0, 3.0], [20.0, 5.0, 0.1]], dtype=torch.float64)
    prediction = DirichletPrediction(alpha, CLOSED)
    torch.manual_seed(0)
    probs = torch.distributions.Dirichlet(alpha).sample((200_000,))
    assert_close(prediction.probs, probs.mean(0), rtol=0.0, atol=4e-3)
    assert_close(prediction.epistemic_variance, probs.var(0), rtol=0.0, atol=2e-3)
    assert_close(prediction.aleatoric_variance, (probs * (1 - probs)).mean(0), rtol=0.0, atol=2e-3)
    assert_close(prediction.expected_entropy, torch.special.entr(probs).sum(-1).mean(0), rtol=0.0, atol=4e-3)
    for own, variance in zip(alpha, prediction.epistemic_variance, strict=True):
        assert_close(variance, torch.as_tensor(stats.dirichlet(own.numpy()).var()), **TIGHT)
    assert_close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information, **TIGHT)
    assert (prediction.mutual_information > 0).all()


def test_a_concentrated_dirichlet_has_nothing_to_learn() -> None:
    prediction = DirichletPrediction(1e8 * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), CLOSED)
    assert_close(prediction.mutual_information, torch.zeros(1, dtype=torch.float64), rtol=0.0, atol=1e-7)
    assert_close(prediction.epistemic_variance, torch.zeros(1, 3, dtype=torch.float64), rtol=0.0, atol=1e-8)


# Refusals, and the posterior's door


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_unknown_links_are_refused(likelihood: Likelihood) -> None:
    with pytest.raises(ArgumentError, match=r"link='bridge' is unknown\. Allowed: 'mc', 'probit', 'extended_probit'"):
        predict(gaussian(4, 3), "bridge", likelihood)


@pytest.mark.parametrize("link", BRIDGES)
def test_the_bridge_refuses_one_logit(link: str) -> None:
    """The reason it gives is true: as two classes with logits ``(f, 0)``, the mean is the sigmoid of the mean."""
    with pytest.raises(ArgumentError, match=rf"link='{link}' is for several classes.*'probit'.*link='mc'"):
        predict(gaussian(4, 1), link, Bernoulli())
    logit = gaussian(4, 1, scale=5.0)
    pair = GaussianOutput(torch.cat([logit.mean, 0 * logit.mean], -1), torch.zeros(4, 2, 2, dtype=torch.float64))
    pair.spread[:, 0, 0] = logit.variance[:, 0]
    assert_close(predict(pair, "laplace_bridge").probs[:, 0], logit.mean[:, 0].sigmoid(), **TIGHT)


def classifier() -> Posterior:
    return random_posterior(seeded(torch.nn.Linear(3, 4)), Categorical(), prior_precision=5.0)


@pytest.mark.parametrize("link", CLOSED_FORMS)
def test_a_posterior_predicts_with_a_link(link: str) -> None:
    posterior, x = classifier(), randn(5, 3, seed=1)
    prediction = posterior.predict(x, link=link)
    assert prediction.source == Source("linearized", None, posterior.provenance, link)
    assert prediction.probs.shape == (5, 4)
    formula = {
        "probit": probit,
        "extended_probit": extended_probit,
        "laplace_bridge": laplace_bridge,
        "laplace_bridge_norm": laplace_bridge_norm,
    }[link]
    regression = random_posterior(posterior.model, Gaussian(0.5), prior_precision=5.0).predict(x)
    values = formula(regression.output)
    expected = values.softmax(-1) if link in MEANS else values / values.sum(-1, keepdim=True)
    assert_close(prediction.probs, expected, **TIGHT)


def test_a_link_is_for_the_linearised_prediction() -> None:
    posterior, x = classifier(), randn(5, 3, seed=1)
    with pytest.raises(ArgumentError, match="link='probit' is for method='linearized'"):
        posterior.predict(x, "sampling", link="probit")
    with pytest.raises(ArgumentError, match="link='probit' is for method='linearized'"):
        posterior.predict(x, draws=posterior.sample(3), link="probit")
    assert posterior.predict(x, "sampling", num_samples=3).source.link is None
