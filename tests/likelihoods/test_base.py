"""The contract that every likelihood keeps: whose gradient, which mean, and the Fisher as the Hessian it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace
from torch.testing import assert_close

from bayes_kfac import likelihoods
from bayes_kfac.curvature import output_gradients
from bayes_kfac.errors import ArgumentError, BayesKfacError, TargetError
from bayes_kfac.likelihoods import (
    Bernoulli,
    BoundedNoise,
    Categorical,
    GammaNoise,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedNoise,
    Likelihood,
    Poisson,
    base,
    from_config,
)

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
BATCH = 6


def gaussian(**arguments: Any) -> Likelihood:
    return Gaussian(**arguments).double()


def moved_gamma(shape: tuple[int, ...]) -> Likelihood:
    """A Gamma belief whose posterior has left its prior."""
    noise = GammaNoise(6.0, 4.0, shape)
    with torch.no_grad():
        noise.log_concentration.add_(0.3)
        noise.log_rate.sub_(torch.linspace(0.2, 0.7, noise.log_rate.numel()).reshape(shape))
    return Gaussian(noise).double()


@dataclass(frozen=True)
class Case:
    """A likelihood and the shape of one example's output."""

    build: Callable[[], Likelihood]
    event: tuple[int, ...]

    def data(self, seed: int = 0, batch: int = BATCH) -> tuple[Likelihood, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        output = torch.randn(batch, *self.event, generator=generator, dtype=torch.float64)
        likelihood = self.build()
        if isinstance(likelihood, Categorical):
            return likelihood, output, torch.randint(self.event[-1], output.shape[:-1], generator=generator)
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if isinstance(likelihood, HeteroscedasticGaussian):
            return likelihood, output, noise.chunk(2, -1)[0]
        if isinstance(likelihood, Poisson):
            return likelihood, output, torch.poisson((output + noise).exp(), generator=generator)
        return likelihood, output, (noise > 0).double() if isinstance(likelihood, Bernoulli) else noise


CASES = {
    "gaussian": Case(lambda: gaussian(noise_scale=0.7), (1,)),
    "gaussian-no-event": Case(lambda: gaussian(noise_scale=0.7), ()),
    "gaussian-per-output": Case(lambda: gaussian(noise_scale=[0.3, 1.0, 2.0]), (3,)),
    "gaussian-broadcast": Case(lambda: gaussian(noise_scale=[[0.3], [1.5]]), (2, 3)),
    "gaussian-learned": Case(lambda: gaussian(noise_scale=LearnedNoise([0.5, 1.7])), (2,)),
    "gaussian-bounded": Case(lambda: gaussian(noise_scale=BoundedNoise([0.5, 1.7])), (2,)),
    "gaussian-learned-image": Case(lambda: gaussian(noise_scale="learned"), (2, 2, 2)),
    "gaussian-gamma": Case(lambda: moved_gamma(()), (2,)),
    "gaussian-gamma-per-output": Case(lambda: moved_gamma((3,)), (2, 3)),
    "heteroscedastic": Case(HeteroscedasticGaussian, (2,)),
    "heteroscedastic-outputs": Case(HeteroscedasticGaussian, (6,)),
    "heteroscedastic-sequence": Case(HeteroscedasticGaussian, (3, 4)),
    "poisson-no-event": Case(Poisson, ()),
    "poisson": Case(Poisson, (3,)),
    "poisson-image": Case(Poisson, (2, 2)),
    "categorical": Case(Categorical, (4,)),
    "categorical-sequence": Case(Categorical, (3, 4)),
    "categorical-image": Case(Categorical, (2, 2, 3)),
    "bernoulli-no-event": Case(Bernoulli, ()),
    "bernoulli": Case(Bernoulli, (3,)),
    "bernoulli-image": Case(Bernoulli, (2, 2)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# The criterion


def test_criterion_is_the_mean_over_examples_of_sums_over_dimensions(case: Case) -> None:
    """``num_data × criterion`` is the data's negative log-likelihood: an example's dimensions are never averaged."""
    likelihood, output, target = case.data()
    losses = likelihood.negative_log_likelihood(output, target)
    assert losses.shape == (BATCH,)
    alone = torch.stack([likelihood(output[n : n + 1], target[n : n + 1]) for n in range(BATCH)])
    assert_close(losses, alone, **TIGHT)
    assert_close(BATCH * likelihood(output, target), alone.sum(), **TIGHT)


def test_a_batch_without_examples_has_no_mean(case: Case) -> None:
    likelihood, output, target = case.data(batch=2)
    for mask in (None, torch.ones(0, dtype=torch.bool)):
        with pytest.raises(TargetError, match=r"output of shape \(0,.* holds no example.*Skip batches that are empty"):
            likelihood(output[:0], target[:0], mask)


def test_targets_that_are_no_tensor_are_refused(case: Case) -> None:
    likelihood, output, target = case.data()
    for mask in (None, torch.ones(BATCH, dtype=torch.bool)):
        with pytest.raises(TargetError, match=r"target of type list must be a tensor: torch\.as_tensor"):
            likelihood(output, target.tolist(), mask)


def test_criterion_is_minus_the_log_density_of_its_distribution(case: Case) -> None:
    """The criterion in training and the density at test time are one; a belief is the density's lower bound."""
    likelihood, output, target = case.data()
    log_prob = likelihood.distribution(output).log_prob(target).reshape(BATCH, -1).sum(1)
    losses = likelihood.negative_log_likelihood(output, target)
    if isinstance(likelihood, Gaussian) and isinstance(likelihood.noise, GammaNoise):
        assert (losses > -log_prob).all()  # Jensen: E[−log p] > −log E[p]
    else:
        assert_close(losses, -log_prob, **TIGHT)


# Gradients: of one example, whatever the batch


def test_target_gradient_is_of_one_example(case: Case) -> None:
    """It does not depend on the batch around the example, and is ``batch`` times the criterion's gradient."""
    likelihood, output, target = case.data()
    gradient = likelihood.target_gradient(output, target)
    assert gradient.shape == output.shape
    assert not gradient.requires_grad
    leaf = output.clone().requires_grad_()
    likelihood(leaf, target).backward()
    assert_close(gradient, BATCH * leaf.grad, **TIGHT)
    assert_close(gradient[1:3], likelihood.target_gradient(output[1:3], target[1:3]), **TIGHT)
    twice = likelihood.target_gradient(torch.cat([output, output]), torch.cat([target, target]))
    assert_close(twice[:BATCH], gradient, **TIGHT)


def test_target_gradient_leaves_no_trace(case: Case) -> None:
    """It works without gradients, and touches neither the output's graph nor the likelihood's own gradients."""
    likelihood, output, target = case.data()
    leaf = output.clone().requires_grad_()
    with torch.no_grad():
        under_no_grad = likelihood.target_gradient(2 * leaf, target)
    assert_close(under_no_grad, likelihood.target_gradient(2 * leaf, target), **TIGHT)
    assert leaf.grad is None
    assert all(parameter.grad is None for parameter in likelihood.parameters())


def test_sampled_gradients_have_mean_zero_and_the_fisher_as_covariance(case: Case) -> None:
    """20 000 sampled gradients of each example agree with the analytic moments within five standard errors."""
    likelihood, output, _ = case.data(batch=2)
    count = 20_000
    samples = likelihood.sample_gradient(output, count, torch.Generator().manual_seed(1))
    assert samples.shape == (count, *output.shape)
    assert not samples.requires_grad
    flat = samples.reshape(count, 2, -1)
    assert_within(flat, torch.zeros(flat.shape[1:], dtype=torch.float64))
    assert_within(torch.einsum("sbi,sbj->sbij", flat, flat), fisher(likelihood, output))


def assert_within(samples: Tensor, expected: Tensor, errors: float = 5.0) -> None:
    """Check that the mean over the first dimension is ``expected`` within some standard errors."""
    bound = errors * samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() <= bound + 1e-12).all()


def test_sampled_gradients_do_not_depend_on_the_batch(case: Case) -> None:
    """The second moment for an example is the same alone and in a large batch (no hidden ``1 / batch``)."""
    likelihood, output, _ = case.data(batch=1)
    alone = likelihood.sample_gradient(output, 4000, torch.Generator().manual_seed(0)).square().mean()
    crowd = output.expand(64, *output.shape[1:])
    crowded = likelihood.sample_gradient(crowd, 64, torch.Generator().manual_seed(0)).square().mean()
    assert_close(alone, crowded, rtol=0.1, atol=0.0)


def test_generator_is_respected(case: Case) -> None:
    """Equal seeds give equal samples, others differ, and the global generator is not touched."""
    likelihood, output, _ = case.data()

    def draw(seed: int) -> Tensor:
        return likelihood.sample_gradient(output, 3, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_without_generator_the_global_one_serves(case: Case) -> None:
    likelihood, output, _ = case.data()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = likelihood.sample_gradient(output, 2, None)
        torch.manual_seed(3)
        again = likelihood.sample_gradient(output, 2, None)
    assert torch.equal(first, again)


# Masks


def test_masked_targets_are_as_if_they_were_not_there(case: Case) -> None:
    """Losses, gradients and Fisher roots of each target alone: none for masked ones, whatever they and outputs hold."""
    likelihood, output, target = case.data()
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(7)) < 0.6
    of_output = likelihood.output_mask(mask, output).expand_as(output)
    assert 0 < of_output.sum() < of_output.numel()
    broken = torch.where(mask, target, -1 if isinstance(likelihood, Categorical) else torch.nan)
    torn = torch.where(of_output, output, torch.nan)
    losses = likelihood.negative_log_likelihood(torn, broken, mask)
    gradient = likelihood.target_gradient(torn, broken, mask)
    assert_close(gradient, torch.where(of_output, likelihood.target_gradient(output, target), 0.0), **TIGHT)
    positions = likelihood._elementwise(output, target)
    expected = torch.where(mask, positions, 0.0).reshape(BATCH, -1).sum(1)
    assert_close(losses, expected, **TIGHT)
    for kind in ("exact", "mc", "empirical"):
        columns = output_gradients(likelihood, output, kind, target=target, mask=mask)
        assert (columns[:, ~of_output] == 0).all()
        assert (columns[:, of_output] != 0).any()


# The Fisher


def fisher(likelihood: Likelihood, output: Tensor) -> Tensor:
    """The sum of outer products of the root's columns, ``[batch, outputs, outputs]``."""
    columns = likelihood.fisher_root(output)
    assert columns.shape[1:] == output.shape
    flat = columns.reshape(len(columns), len(output), -1)
    return torch.einsum("cbi,cbj->bij", flat, flat)


def test_fisher_root_is_the_hessian_of_the_expected_loss(case: Case) -> None:
    """``Σ_c u_c u_cᵀ`` is autograd's expected Hessian, which for canonical parameters is the same at any target.

    Where it is not, it is quadratic in the target: its mean over ``mean ± stddev`` is its expectation.
    """
    likelihood, output, target = case.data()
    analytic = fisher(likelihood, output)
    assert not likelihood.fisher_root(output).requires_grad
    for n in range(BATCH):
        own = [target[n : n + 1]]
        if isinstance(likelihood, HeteroscedasticGaussian):
            density = likelihood.distribution(output[n : n + 1])
            own = [density.mean - density.stddev, density.mean + density.stddev]

        def loss(event: Tensor, own: list[Tensor] = own) -> Tensor:
            losses = [likelihood.negative_log_likelihood(event.unsqueeze(0), each).sum() for each in own]
            return torch.stack(losses).mean()

        hessian = torch.autograd.functional.hessian(loss, output[n])
        assert_close(analytic[n], hessian.reshape(analytic[n].shape), **TIGHT)


def test_fisher_root_does_not_depend_on_the_batch(case: Case) -> None:
    likelihood, output, _ = case.data()
    assert_close(likelihood.fisher_root(output)[:, 2:3], likelihood.fisher_root(output[2:3]), **TIGHT)


# Shapes that do not fit


def test_another_batch_is_refused(case: Case) -> None:
    """A target for one example never broadcasts over the batch."""
    likelihood, output, target = case.data()
    with pytest.raises(TargetError, match="shape"):
        likelihood(output, target[:1])
    with pytest.raises(TargetError, match="shape"):
        likelihood(output, target.unsqueeze(-1))


# The registry


def test_config_and_state_rebuild_the_likelihood(case: Case) -> None:
    """Through JSON, as in a file: class name and ``config()`` rebuild it, ``state_dict()`` gives it what it learned."""
    likelihood, output, target = case.data()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.25)
    config = json.loads(json.dumps(likelihood.config()))
    rebuilt = from_config(type(likelihood).__name__, config).double()
    rebuilt.load_state_dict(likelihood.state_dict())
    assert type(rebuilt) is type(likelihood)
    assert torch.equal(rebuilt(output, target), likelihood(output, target))
    assert_close(rebuilt.kl(), likelihood.kl(), **TIGHT)
    assert rebuilt.config().keys() == likelihood.config().keys()


def test_only_a_belief_has_a_divergence(case: Case) -> None:
    """A KL belongs to parameters that have a prior; everywhere else it is 0."""
    likelihood, _, _ = case.data()
    has_prior = isinstance(likelihood, Gaussian) and isinstance(likelihood.noise, GammaNoise)
    assert likelihood.kl().shape == ()
    assert (likelihood.kl() > 0) == has_prior


def test_registry_lists_the_likelihoods() -> None:
    assert {"Bernoulli", "Categorical", "Gaussian", "HeteroscedasticGaussian", "Poisson"} <= set(
        likelihoods.available()
    )


def test_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"'Poison' is unknown.*'Gaussian'.*'Poisson'") as caught:
        from_config("Poison", {})
    assert isinstance(caught.value, BayesKfacError)


class LaplaceLikelihood(Likelihood):
    """A likelihood of a user's own, with the least that the contract asks for."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def check(self, output: Tensor, target: Tensor) -> None:
        base.check_same_shape(output, target)

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        signs = torch.randint(2, (num_samples, *output.shape), generator=generator) * 2 - 1
        return signs.to(output) / self.scale

    def fisher_root(self, output: Tensor) -> Tensor:
        return torch.eye(output[0].numel()).reshape(-1, 1, *output.shape[1:]).expand(-1, *output.shape) / self.scale

    def distribution(self, output: Tensor) -> Distribution:
        return Laplace(output, self.scale)

    def config(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return -Laplace(output, self.scale).log_prob(target)


def test_own_likelihood_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered by a decorator, it can be rebuilt by name; unregistered it cannot, but works as a criterion."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    own = LaplaceLikelihood(0.5)
    output, target = torch.zeros(4, 2), torch.ones(4, 2)
    assert_close(own(output, target), torch.tensor(4.0))
    assert_close(own.target_gradient(output, target), torch.full((4, 2), -2.0))
    assert own.kl() == 0
    with pytest.raises(ArgumentError, match="LaplaceLikelihood"):
        from_config("LaplaceLikelihood", own.config())
    assert likelihoods.register(LaplaceLikelihood) is LaplaceLikelihood
    assert from_config("LaplaceLikelihood", own.config()).scale == 0.5


def test_names_of_the_library_are_not_taken_over() -> None:
    """A class of the same name elsewhere would be read from files in its place; one of one's own may be run again."""
    with pytest.raises(ArgumentError, match=r"a likelihood named 'Poisson'.*Rename it"):
        likelihoods.register(type("Poisson", (likelihoods.Poisson,), {"__module__": "elsewhere"}))
    assert likelihoods.from_config("Poisson", {}).__class__ is likelihoods.Poisson
    assert likelihoods.register(likelihoods.Poisson) is likelihoods.Poisson
