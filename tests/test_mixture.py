"""Mixtures of posteriors: they predict what their members predict, pooled; over loaders, devices and files too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bayes_kfac import Mixture, Posterior, active
from bayes_kfac.active.predictors import predict_jointly
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedNoise,
    Likelihood,
    Poisson,
)
from bayes_kfac.prediction import PooledRegression, Prediction, pool
from tests.helpers import TIGHT, randn, rng, seeded
from tests.posteriors import random_posterior

X, Y = randn(7, 3, seed=1), randn(7, 2, seed=2)
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "gaussian": lambda: Gaussian(0.5),
    "heteroscedastic": HeteroscedasticGaussian,
    "poisson": Poisson,
    "categorical": Categorical,
    "bernoulli": Bernoulli,
}
#: How a prediction may be asked for.
WAYS: list[dict[str, Any]] = [{}, {"method": "sampling"}, {"output_covariance": "diagonal", "memory_budget": 1}]


def net(out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out))


def member(seed: int, likelihood: Likelihood | None = None, **options: Any) -> Posterior:
    return random_posterior(seeded(net(), seed), likelihood or Gaussian(0.5 + seed), seed=10 * seed, **options)


def mixture(likelihood: Likelihood | None = None, count: int = 3) -> Mixture:
    return Mixture([member(seed, likelihood) for seed in range(count)])


def quantities(prediction: Prediction) -> dict[str, Any]:
    """Everything a prediction says without arguments."""
    said = {}
    for name in dir(prediction):
        if not name.startswith("_") and name not in {"members", "source", "distribution"}:
            value = getattr(prediction, name)
            if isinstance(value, Tensor):
                said[name] = value
    return said


# What it predicts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_predictions_are_its_members_pooled(build: Callable[[], Likelihood], way: dict[str, Any]) -> None:
    """With one generator for one member after another."""
    whole, generator = mixture(build()), rng(0)
    found = whole.predict(X, num_samples=5, generator=rng(0), **way)
    own = [each.predict(X, num_samples=5, generator=generator, **way) for each in whole.members]
    expected = pool(own)
    assert type(found) is type(expected)
    assert found.source == expected.source
    assert found.source.posterior == tuple(each.provenance for each in whole.members)
    for name, value in quantities(expected).items():
        assert torch.equal(getattr(found, name), value), name


@pytest.mark.parametrize("link", ["mc", "probit", "extended_probit", "laplace_bridge"])
def test_links(link: str) -> None:
    whole = mixture(Categorical())
    found = whole.predict(X, link=link, num_samples=6, generator=rng(0))
    generator = rng(0)
    own = [each.predict(X, link=link, num_samples=6, generator=generator).probs for each in whole.members]
    assert_close(found.probs, sum(own) / 3, **TIGHT)
    assert found.source.link == link
    if link == "mc":
        assert found.sampled_probs.shape == (18, 7, 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_a_mixture_of_one_is_its_member(build: Callable[[], Likelihood], way: dict[str, Any]) -> None:
    """To the last bit."""
    one = member(0, build())
    found = Mixture([one]).predict(X, generator=rng(0), **way)
    expected = one.predict(X, generator=rng(0), **way)
    assert type(found) is type(expected)
    assert found.source == expected.source
    for name, value in quantities(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_members_may_share_the_model() -> None:
    """Posteriors hold their own weights: one model object or one each, and what it is trained to later on."""
    model = net().double()
    shared = []
    for seed in range(3):
        model.load_state_dict(seeded(net(), seed).state_dict())
        shared.append(random_posterior(model, Gaussian(0.5 + seed), seed=10 * seed))
    before = copy.deepcopy(model.state_dict())
    found, expected = Mixture(shared).predict(X), mixture().predict(X)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.covariance, expected.covariance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_order_of_members_does_not_matter() -> None:
    whole = mixture()
    found, expected = Mixture(whole.members[::-1]).predict(X), whole.predict(X)
    assert_close(found.covariance, expected.covariance, **TIGHT)
    assert_close(found.log_prob(Y), expected.log_prob(Y), **TIGHT)


def test_members_may_differ_in_structure_and_damping() -> None:
    whole = Mixture([member(0), member(1, structure="diagonal", damping="exact"), member(2, damping="exact")])
    p = whole.predict(X)
    assert isinstance(p, PooledRegression)
    assert [own.damping for own in p.source.posterior] == ["factored", "exact", "exact"]
    assert_close(p.mean, sum(each.predict(X).mean for each in whole.members) / 3, **TIGHT)


# Loaders


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_over_a_loader_is_over_the_whole(name: str, way: dict[str, Any]) -> None:
    """In batches of three, the last of one; sampled weights are the same functions in all of them."""
    whole = mixture(LIKELIHOODS[name]())
    if name == "categorical" and "method" not in way:
        way = {**way, "link": "probit"}  # draws of logits are anew in each batch
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    found = whole.predict(loader, num_samples=5, generator=rng(0), progress=False, **way)
    expected = whole.predict(X, num_samples=5, generator=rng(0), **way)
    assert type(found) is type(expected)
    assert found.source == expected.source
    assert len(found) == 7
    assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-9)
    assert_close(found.variance, expected.variance, rtol=1e-9, atol=1e-9)
    target = Y if name == "gaussian" else torch.arange(7) % 2
    assert_close(found.log_prob(target), expected.log_prob(target), rtol=1e-9, atol=1e-9)


class Once(IterableDataset):
    """Examples that come only once."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(X)


def test_one_pass_over_a_loader_is_enough() -> None:
    dataset = Once()
    found = mixture().predict(DataLoader(dataset, batch_size=3), progress=False)
    assert dataset.passes == 1
    assert_close(found.mean, mixture().predict(X).mean, rtol=1e-9, atol=1e-9)


def test_a_loader_that_shuffles_gives_all_members_the_same_inputs() -> None:
    loader = DataLoader(TensorDataset(torch.arange(7)), batch_size=3, shuffle=True, generator=rng(3))
    order = torch.cat([part for (part,) in loader])
    loader = DataLoader(TensorDataset(X), batch_size=3, shuffle=True, generator=rng(3))
    found = mixture().predict(loader, progress=False)
    assert_close(found.variance, mixture().predict(X).variance[order], rtol=1e-9, atol=1e-9)


# The object


def test_its_members_and_device() -> None:
    whole = mixture()
    assert len(whole) == len(whole.members) == 3
    assert whole.device == torch.device("cpu")
    assert repr(whole).startswith("Mixture([Posterior(layers=['0', '2'], Provenance(")
    assert repr(whole).count("Posterior(") == 3


def test_another_dtype() -> None:
    whole = mixture()
    expected = whole.predict(X)
    single = whole.to(torch.float32)
    found = single.predict(X.float())
    assert found.mean.dtype == torch.float32
    assert_close(found.covariance, expected.covariance.float(), rtol=1e-4, atol=1e-4)
    assert whole.members[0].mean["0.weight"].dtype == torch.float64


def test_a_noise_chosen_afterwards_is_that_of_all_members() -> None:
    whole = mixture()
    other = whole.with_likelihood(Gaussian(0.1))
    assert_close(other.predict(X).aleatoric_variance, torch.full((7, 2), 0.01).double(), rtol=1e-6, atol=0)
    assert_close(other.predict(X).epistemic_variance, whole.predict(X).epistemic_variance, rtol=0, atol=0)
    assert_close(whole.predict(X).aleatoric_variance, mixture().predict(X).aleatoric_variance, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: [], r"members=\[\] is empty. Allowed: one posterior or more"),
        (lambda: member(0), r"members=Posterior\(.*\) is not a list. Allowed: posteriors in a list"),
        (
            lambda: [member(0), member(1).to(torch.float32)],
            r"members\[1\] has .* in torch\.float32 and members\[0\] in torch\.float64\. .*\.to\(dtype\)",
        ),
        (lambda: [member(0), net()], r"members\[1\] is a Sequential. Allowed: posteriors, such as bk.fit"),
        (lambda: [net()], r"members\[0\] is a Sequential"),
        (lambda: [mixture(), member(0)], r"members\[0\] is a Mixture"),
        (
            lambda: [member(0), member(1), member(2, Categorical())],
            r"members\[2\] has a Categorical likelihood and members\[0\] a Gaussian",
        ),
        (
            lambda: [member(0), random_posterior(seeded(net(5)), Gaussian(0.5))],
            r"(?s)members\[1\] is over another architecture than members\[0\]:.*"
            r"2\.bias: members\[1\] \(5,\), members\[0\] \(2,\)\n  2\.weight: members\[1\] \(5, 4\)",
        ),
        (
            lambda: [member(0), random_posterior(seeded(nn.Sequential(nn.Linear(3, 2))), Gaussian(0.5))],
            r"(?s)another architecture.*2\.weight: members\[1\] None, members\[0\] \(2, 4\)",
        ),
    ],
)
def test_what_is_no_mixture(members: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Mixture(members())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simpling"}, "method='simpling' is unknown"),
        ({"method": "sampling", "link": "mc"}, "link='mc' is for method='linearized' without draws, but method="),
        ({"link": "probit"}, "link='probit' is for class probabilities"),
        ({"output_covariance": "ful"}, "output_covariance='ful' is unknown"),
        ({"num_samples": 0}, "num_samples=0 is not allowed"),
        ({"method": "sampling", "num_samples": 0}, "num_samples=0 is not allowed"),
        ({"memory_budget": 0}, "memory_budget=0 is not allowed"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        mixture().predict(X, **options)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_are_bit_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of twelve members with noises, dampings and structures of their own, in a new model."""
    kinds = [("kron", "factored"), ("kron", "exact"), ("diagonal", "exact"), ("dense", "exact")]
    whole = Mixture(
        [
            member(seed, Gaussian(LearnedNoise([0.3, 0.7 + seed])), structure=kind, damping=damping)
            for seed, (kind, damping) in enumerate(kinds * 3)
        ]
    ).to(dtype)
    path = tmp_path / "mixture.safetensors"
    whole.save(path)
    model = net()
    loaded = Mixture.load(path, model)
    assert [each.provenance for each in loaded.members] == [each.provenance for each in whole.members]
    assert all(each.model is model for each in loaded.members)
    for method in ("linearized", "sampling"):
        before, after = (each.predict(X.to(dtype), method, num_samples=4, generator=rng(0)) for each in (whole, loaded))
        for name, value in quantities(before).items():
            assert torch.equal(getattr(after, name), value), name
            assert value.dtype == dtype
        assert torch.equal(after.log_prob(Y.to(dtype)), before.log_prob(Y.to(dtype)))
        assert after.source == before.source


class OwnNoise(Gaussian):
    """A likelihood that is not registered."""


def test_a_likelihood_of_ones_own(tmp_path: Path) -> None:
    whole = Mixture([member(seed, OwnNoise(LearnedNoise(0.5 + seed))) for seed in range(2)])
    whole.save(tmp_path / "mixture.safetensors")
    with pytest.raises(ArgumentError, match="OwnNoise"):
        Mixture.load(tmp_path / "mixture.safetensors", net())
    loaded = Mixture.load(tmp_path / "mixture.safetensors", net(), likelihood=OwnNoise("learned"))
    assert torch.equal(loaded.predict(X).aleatoric_variance, whole.predict(X).aleatoric_variance)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    """A mixture is not read as a posterior, nor a posterior as a mixture, nor either in another architecture."""
    whole, path = mixture(), tmp_path / "mixture.safetensors"
    whole.save(path)
    with pytest.raises(ArgumentError, match=r"holds a mixture of 3 posteriors. Read it with Mixture.load\(\)"):
        Posterior.load(path, net())
    with pytest.raises(ArgumentError, match="holds the posterior of another architecture"):
        Mixture.load(path, net(5))
    whole.members[0].save(path)
    with pytest.raises(ArgumentError, match=r"holds one posterior, not a mixture. Read it with Posterior.load\(\)"):
        Mixture.load(path, net())
    with pytest.raises(ArgumentError, match="is a folder"):
        whole.save(tmp_path)


# Active learning


@pytest.mark.parametrize("likelihood", [None, Categorical(), Bernoulli()], ids=["gaussian", "categorical", "bernoulli"])
def test_acquisitions_that_judge_each_candidate(likelihood: Likelihood | None) -> None:
    """From tensors, arrays and loaders."""
    whole = mixture(likelihood)
    p = whole.predict(X, generator=rng(0))
    for acquisition, expected in (
        (active.BALD(), p.mutual_information),
        (active.Variance(), p.epistemic_variance),
        (active.Entropy(), p.entropy),
    ):
        score = expected.reshape(7, -1).sum(1)
        for pool_ in (X, X.numpy()):
            view = acquisition.look(whole, pool_, generator=rng(0))
            assert_close(acquisition.scores(view), score, **TIGHT)
        if likelihood is None:
            view = acquisition.look(whole, DataLoader(TensorDataset(X, Y), batch_size=3))
            assert_close(acquisition.scores(view), score, rtol=1e-8, atol=1e-8)


def test_joint_acquisitions_of_classes() -> None:
    """The functions of each member, the same at all inputs: those of one after those of another."""
    whole = mixture(Categorical())
    at_pool, at_others = predict_jointly(whole, [X, X[:2]], {"num_samples": 5}, generator=rng(0))
    assert at_pool.sampled_probs.shape == (15, 7, 2)
    assert_close(at_pool.sampled_probs[:, :2], at_others.sampled_probs, **TIGHT)
    generator = rng(0)
    draws = whole.members[0].sample(5, generator=generator)
    own = whole.members[0].predict(X, "linearized", draws=draws).probs
    assert_close(at_pool.members[0].probs, own, **TIGHT)
    for acquisition in (active.BatchBALD(num_samples=20), active.EPIG(num_samples=20)):
        chosen = acquisition.select(acquisition.look(whole, X, generator=rng(0)), 2)
        assert len(set(chosen.tolist())) == 2


def test_joint_acquisitions_of_real_values_are_refused() -> None:
    """There is no closed form."""
    with pytest.raises(UsageError, match="needs sampled_probs, which a PooledRegression does not know"):
        active.BatchBALD().look(mixture(), X)
    with pytest.raises(ArgumentError, match="predictor is a Mixture, which draws no functions"):
        active.ThompsonSampling("maximize").look(mixture(), X)
