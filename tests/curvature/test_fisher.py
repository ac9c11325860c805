"""Output gradients: their outer products are the output Fisher of each example, exactly or in expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.testing import assert_close

from bayes_kfac.curvature import FISHER_KINDS, output_gradients
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.helpers import TIGHT, randn, rng

SCALE = 0.3


def gaussian() -> Likelihood:
    return Gaussian(torch.tensor(SCALE, dtype=torch.float64))


def gaussian_of_two_scales() -> Likelihood:
    return Gaussian(torch.tensor([0.3, 2.0], dtype=torch.float64))


CASES = {
    "gaussian": (gaussian, (5, 2)),
    "gaussian of two scales": (gaussian_of_two_scales, (5, 2)),
    "gaussian without a feature": (gaussian, (5,)),
    "gaussian over time": (gaussian_of_two_scales, (4, 3, 2)),
    "bernoulli": (Bernoulli, (5, 3)),
    "bernoulli without a feature": (Bernoulli, (5,)),
    "bernoulli over time": (Bernoulli, (4, 3, 2)),
    "categorical": (Categorical, (5, 4)),
    "categorical over time": (Categorical, (4, 3, 4)),
    "categorical over an image": (Categorical, (3, 2, 2, 3)),
}


@pytest.fixture(params=CASES)
def likelihood_and_output(request: pytest.FixtureRequest) -> tuple[Likelihood, Tensor]:
    build, shape = CASES[request.param]
    return build(), 1.5 * randn(*shape, seed=3)


def a_target(likelihood: Likelihood, output: Tensor) -> Tensor:
    return likelihood.distribution(output).sample()


def analytic_fisher(likelihood: Likelihood, output: Tensor) -> Tensor:
    """The output Fisher of each example, ``[batch, elements, elements]``, from the textbook; blocks by position."""
    if isinstance(likelihood, Gaussian):
        return torch.diag_embed(likelihood.noise_scale.square().reciprocal().expand_as(output).reshape(len(output), -1))
    if isinstance(likelihood, Bernoulli):
        probs = output.sigmoid().reshape(len(output), -1)
        return torch.diag_embed(probs * (1 - probs))
    probs = output.softmax(-1).flatten(1, -2) if output.ndim > 2 else output.softmax(-1)[:, None]
    blocks = torch.diag_embed(probs) - probs[..., :, None] * probs[..., None, :]
    return torch.stack([torch.block_diag(*example) for example in blocks])


def outer_products(gradients: Tensor) -> Tensor:
    """``Σ_c u_c u_cᵀ`` of each example."""
    flat = gradients.reshape(*gradients.shape[:2], -1)
    return torch.einsum("cni,cnj->nij", flat, flat)


def test_exact_outer_products_sum_to_the_analytic_fisher(likelihood_and_output):
    likelihood, output = likelihood_and_output
    gradients = output_gradients(likelihood, output, "exact")
    assert gradients.shape[1:] == output.shape
    assert_close(outer_products(gradients), analytic_fisher(likelihood, output), **TIGHT)


def test_exact_fisher_is_the_hessian_of_the_negative_log_likelihood(likelihood_and_output):
    """For these likelihoods the Hessian with respect to the output does not depend on the target."""
    likelihood, output = likelihood_and_output
    target = a_target(likelihood, output)

    def nll(one: Tensor, its_target: Tensor) -> Tensor:
        return likelihood._elementwise(one[None], its_target[None]).sum()

    size = output[0].numel()
    expected = vmap(jacrev(jacrev(nll)))(output, target).reshape(len(output), size, size)
    assert_close(outer_products(output_gradients(likelihood, output, "exact")), expected, **TIGHT)


def test_mc_outer_products_are_unbiased(likelihood_and_output):
    """Every element is within five standard errors of the exact Fisher, over 20000 sampled targets."""
    likelihood, output = likelihood_and_output
    num_samples = 20_000
    gradients = output_gradients(likelihood, output, "mc", num_samples=num_samples, generator=rng(0))
    assert gradients.shape == (num_samples, *output.shape)
    flat = gradients.reshape(num_samples, len(output), -1) * num_samples**0.5
    products = flat[..., :, None] * flat[..., None, :]
    error = (products.mean(0) - analytic_fisher(likelihood, output)).abs()
    assert bool((error <= 5 * products.std(0) / num_samples**0.5 + 1e-12).all())
    assert_close(outer_products(gradients), products.mean(0), **TIGHT)


def test_mc_gradients_have_mean_zero(likelihood_and_output):
    likelihood, output = likelihood_and_output
    gradients = output_gradients(likelihood, output, "mc", num_samples=20_000, generator=rng(1)) * 20_000**0.5
    assert bool((gradients.mean(0).abs() <= 5 * gradients.std(0) / 20_000**0.5).all())


def test_mc_gradients_are_those_of_possible_targets(likelihood_and_output):
    """One sample is a gradient of one example's negative log-likelihood, not of the batch mean."""
    likelihood, output = likelihood_and_output
    gradient = output_gradients(likelihood, output, "mc", generator=rng(0))[0]
    if isinstance(likelihood, Categorical):
        sampled = output.softmax(-1) - gradient
        assert_close(sampled, torch.nn.functional.one_hot(sampled.argmax(-1), output.shape[-1]).double(), **TIGHT)
        target = sampled.argmax(-1)
    elif isinstance(likelihood, Bernoulli):
        target = (output.sigmoid() - gradient).round()
    else:
        target = output - gradient * likelihood.noise_scale**2
    assert_close(output_gradients(likelihood, output, "empirical", target=target)[0], gradient, **TIGHT)


def test_mc_is_reproducible_through_its_generator(likelihood_and_output):
    likelihood, output = likelihood_and_output
    first, again, other = (
        output_gradients(likelihood, output, "mc", num_samples=8, generator=rng(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mc_takes_nothing_from_the_global_generator(likelihood_and_output):
    likelihood, output = likelihood_and_output
    before = torch.get_rng_state()
    output_gradients(likelihood, output, "mc", generator=rng(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_empirical_is_the_gradient_of_each_examples_negative_log_likelihood(likelihood_and_output):
    likelihood, output = likelihood_and_output
    target = a_target(likelihood, output)
    gradients = output_gradients(likelihood, output, "empirical", target=target)
    leaf = output.clone().requires_grad_()
    for n in range(len(output)):
        (expected,) = torch.autograd.grad(-likelihood.distribution(leaf).log_prob(target)[n].sum(), leaf)
        assert_close(gradients[0, n], expected[n], **TIGHT)
    assert gradients.shape == (1, *output.shape)


@pytest.mark.parametrize("fisher", FISHER_KINDS)
def test_gradients_hold_no_graph(fisher, likelihood_and_output):
    likelihood, output = likelihood_and_output
    target = a_target(likelihood, output)
    gradients = output_gradients(likelihood, output.requires_grad_(), fisher, target=target, generator=rng(0))
    assert not gradients.requires_grad


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_the_fisher_itself_never_reads_the_targets(fisher):
    likelihood, output = Categorical(), randn(5, 3, seed=0)
    with_target, without = (
        output_gradients(likelihood, output, fisher, target=target, generator=rng(0))
        for target in (torch.zeros(5, dtype=torch.long), None)
    )
    assert torch.equal(with_target, without)


def test_empirical_without_targets_is_an_error_that_says_what_to_call():
    with pytest.raises(UsageError, match=r"call likelihood\(output, target\)"):
        output_gradients(gaussian(), randn(5, 2, seed=0), "empirical")


def test_an_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(ArgumentError, match="'mc', 'exact', 'empirical'"):
        output_gradients(gaussian(), randn(5, 2, seed=0), "ggn")
