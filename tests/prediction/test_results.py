"""What every result shares: its length, and that the results of batches join to the result of all examples."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Bernoulli, Categorical, GammaNoise, Gaussian
from bayes_kfac.prediction import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    GaussianOutput,
    GaussianPrediction,
    HeteroscedasticMixturePrediction,
    HeteroscedasticPrediction,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
    MixturePrediction,
    PoissonMixturePrediction,
    PoissonPrediction,
    PooledBernoulli,
    PooledCategorical,
    PooledCounts,
    PooledPrediction,
    PooledRegression,
    Prediction,
    Source,
    batch_dim,
    concatenate,
)
from bayes_kfac.prediction.classification import OfClasses
from bayes_kfac.provenance import Provenance
from tests.helpers import randn, random_spd, rng, seeded
from tests.posteriors import random_posterior

PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
SOURCE = Source("linearized", None, PROVENANCE)
NOISE = torch.tensor([0.3, 0.8], dtype=torch.float64)
LIKELIHOOD = Gaussian(GammaNoise(5.0, 2.0, (2,))).double().requires_grad_(False)

Make = Callable[[slice], Prediction]
MEAN, COVARIANCE = randn(9, 2, seed=0), random_spd(9, 2, seed=1)
DRAWS = randn(6, 9, 2, seed=2)
OUTPUTS, OUTPUT_COVARIANCE, OUTPUT_DRAWS = randn(9, 4, seed=3), 0.3 * random_spd(9, 4, seed=4), randn(6, 9, 4, seed=5)
#: Every kind of result for some of nine examples. With draws, the batch is not the first dimension of what it holds.
KINDS: dict[str, Make] = {
    "gaussian": lambda n: GaussianPrediction(GaussianOutput(MEAN[n], COVARIANCE[n]), NOISE, SOURCE),
    "gaussian-diagonal": lambda n: GaussianPrediction(GaussianOutput(MEAN[n], MEAN[n].square()), NOISE, SOURCE),
    "mixture": lambda n: MixturePrediction(DRAWS[:, n], LIKELIHOOD, SOURCE),
    "heteroscedastic": lambda n: HeteroscedasticPrediction(GaussianOutput(OUTPUTS[n], OUTPUT_COVARIANCE[n]), SOURCE),
    "heteroscedastic-mixture": lambda n: HeteroscedasticMixturePrediction(OUTPUT_DRAWS[:, n], SOURCE),
    "poisson": lambda n: PoissonPrediction(GaussianOutput(MEAN[n], COVARIANCE[n]), SOURCE),
    "poisson-mixture": lambda n: PoissonMixturePrediction(DRAWS[:, n], SOURCE),
    "categorical": lambda n: CategoricalPrediction(DRAWS[:, n], SOURCE),
    "bernoulli": lambda n: BernoulliPrediction(DRAWS[:, n], SOURCE),
    "mean-categorical": lambda n: MeanCategoricalPrediction(MEAN[n], SOURCE),
    "mean-bernoulli": lambda n: MeanBernoulliPrediction(MEAN[n], SOURCE),
    "dirichlet": lambda n: DirichletPrediction(MEAN[n].exp(), SOURCE),
}


def pooled(kind: type[Prediction], name: str) -> Make:
    """Of two members, the other of which holds the examples in the opposite order."""
    return lambda n: kind((KINDS[name](n), reversed_member(KINDS[name](slice(0, 9)), n)), SOURCE)


def reversed_member(prediction: Prediction, n: slice) -> Prediction:
    own = {}
    for each in dataclasses.fields(prediction):
        value, dim = getattr(prediction, each.name), each.metadata.get("batch_dim")
        if isinstance(value, GaussianOutput):
            value = GaussianOutput(value.mean.flip(0)[n], value.spread.flip(0)[n])
        elif dim is not None:
            value = value.flip(dim)[(slice(None),) * dim + (n,)]
        own[each.name] = value
    return type(prediction)(**own)


KINDS |= {
    "pooled": pooled(PooledPrediction, "gaussian"),
    "pooled-regression": pooled(PooledRegression, "mixture"),
    "pooled-counts": pooled(PooledCounts, "poisson"),
    "pooled-categorical": pooled(PooledCategorical, "dirichlet"),
    "pooled-bernoulli": pooled(PooledBernoulli, "bernoulli"),
}


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


def target_of(prediction: Prediction) -> Tensor:
    if isinstance(prediction, OfClasses):
        return torch.arange(len(prediction)) % 2
    return (torch.arange(2 * len(prediction)) % 2).double().reshape(-1, 2)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def test_every_kind_of_result_is_tested_here() -> None:
    concrete = {
        kind
        for kind in subclasses(Prediction)
        if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind) and "bayes_kfac." in kind.__module__
    }
    assert {type(make(slice(0, 1))) for make in KINDS.values()} == concrete


def test_length_is_the_number_of_examples(make: Make) -> None:
    assert len(make(slice(0, 9))) == 9
    assert len(make(slice(2, 3))) == 1


def test_batches_join_to_the_result_of_all(make: Make) -> None:
    """In order, for uneven batches, down to the last bit; a batch on its own is itself."""
    whole, parts = make(slice(0, 9)), [make(slice(0, 4)), make(slice(4, 5)), make(slice(5, 9))]
    joined = concatenate(parts)
    assert type(joined) is type(whole)
    assert joined.source == whole.source
    assert len(joined) == 9
    assert torch.equal(joined.mean, whole.mean)
    assert torch.equal(joined.variance, whole.variance)
    assert torch.equal(joined.log_prob(target_of(joined)), whole.log_prob(target_of(whole)))
    assert torch.equal(concatenate(part for part in parts).mean, joined.mean)
    alone = concatenate(parts[:1])
    assert torch.equal(alone.mean, parts[0].mean)


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"predictions=\[\] is empty. Allowed: one prediction or more"):
        concatenate([])


def test_different_kinds_are_refused() -> None:
    n = slice(0, 3)
    with pytest.raises(
        ArgumentError, match=r"predictions\[2\] is a BernoulliPrediction and predictions\[0\] a Categor"
    ):
        concatenate([KINDS["categorical"](n), KINDS["categorical"](n), KINDS["bernoulli"](n)])


@pytest.mark.parametrize(
    "change",
    [
        {"method": "sampling"},
        {"num_samples": 6},
        {"link": "mc"},
        {"posterior": dataclasses.replace(PROVENANCE, damping="exact")},
    ],
)
def test_different_sources_are_refused(make: Make, change: dict[str, object]) -> None:
    other = make(slice(4, 9))
    other = dataclasses.replace(other, source=dataclasses.replace(SOURCE, **change))
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.source=.* differs .*Concatenate the others apart"):
        concatenate([make(slice(0, 4)), other])


def test_different_numbers_of_draws_are_refused() -> None:
    few = CategoricalPrediction(DRAWS[:2], SOURCE)
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.logits has shape \(2, 9, 2\).*same num_samples"):
        concatenate([KINDS["categorical"](slice(0, 4)), few])


def test_different_numbers_of_members_are_refused() -> None:
    one = KINDS["pooled-regression"](slice(0, 4))
    fewer = dataclasses.replace(one, members=one.members[:1])
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.number of members=1 differs"):
        concatenate([one, fewer])


def test_covariances_and_variances_are_refused_together() -> None:
    parts = [KINDS["gaussian"](slice(0, 4)), KINDS["gaussian-diagonal"](slice(4, 9))]
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.output\.spread has shape \(5, 2\)"):
        concatenate(parts)


def test_different_noise_is_refused() -> None:
    """A noise of its own value in each batch, or a likelihood with another state; an equal copy is the same."""
    one = KINDS["gaussian"](slice(0, 4))
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.noise_variance=.* differs"):
        concatenate([one, dataclasses.replace(one, noise_variance=2 * NOISE)])
    mixture, loaded = KINDS["mixture"](slice(0, 4)), copy.deepcopy(LIKELIHOOD)
    assert len(concatenate([mixture, dataclasses.replace(mixture, likelihood=loaded)])) == 8
    loaded.noise.log_rate.add_(1.0)
    with pytest.raises(ArgumentError, match=r"likelihood=Gaussian\(.*'noise.log_rate': \[1\.69.* differs"):
        concatenate([mixture, dataclasses.replace(mixture, likelihood=loaded)])
    with pytest.raises(ArgumentError, match=r"predictions\[1\]\.likelihood=Gaussian.* differs"):
        concatenate([mixture, dataclasses.replace(mixture, likelihood=Gaussian(0.5))])


def test_a_new_kind_declares_one_line() -> None:
    """A result of one's own joins along the dimension that its field names."""

    @dataclass(frozen=True)
    class Transposed(MeanBernoulliPrediction):
        extra: Tensor = field(metadata=batch_dim(2), kw_only=True)

    parts = [Transposed(MEAN[:n], SOURCE, extra=torch.ones(3, 1, n)) for n in (2, 4)]
    assert concatenate(parts).extra.shape == (3, 1, 6)


@pytest.mark.parametrize(
    ("likelihood", "method", "link"),
    [
        (Gaussian(0.5), "linearized", None),
        (Gaussian(0.5), "sampling", None),
        (Categorical(), "linearized", "mc"),
        (Categorical(), "linearized", "extended_probit"),
        (Categorical(), "linearized", "laplace_bridge"),
        (Bernoulli(), "sampling", None),
    ],
)
def test_a_loaders_batches(likelihood: nn.Module, method: str, link: str | None) -> None:
    """Predictions of a posterior, batch by batch, are those at all inputs: the same draws make the same functions."""
    posterior = random_posterior(seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), likelihood)
    x = randn(7, 3, seed=1)
    draws = posterior.sample(5, generator=rng(0)) if method == "sampling" else None
    batches = [
        posterior.predict(part, method, link=link, draws=draws, num_samples=5, generator=rng(0)) for part in x.split(3)
    ]
    joined = concatenate(batches)
    assert len(joined) == 7
    assert joined.source == batches[0].source
    if link != "mc":  # there each batch has its own draws
        assert_close(joined.mean, posterior.predict(x, method, link=link, draws=draws).mean, rtol=1e-12, atol=1e-12)
