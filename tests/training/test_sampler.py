"""The sampling context: the mean is back whatever happens, nothing leaks out of it, and misuse is named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UsageError


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))
    likelihood = bk.likelihoods.Gaussian(1.0)
    return model, likelihood, bk.NoisyKFAC(model, likelihood, num_data=40, statistics_every=1, **options)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def step(model, likelihood, optimizer):
    with optimizer.sampled_params():
        optimizer.zero_grad()
        likelihood(model(X), Y).backward()
    optimizer.step()


def snapshot(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_weights_are_sampled_inside_and_at_the_mean_outside():
    model, likelihood, optimizer = make()
    step(model, likelihood, optimizer)
    mean = snapshot(model)
    with optimizer.sampled_params():
        assert not same(snapshot(model), mean)
        first = snapshot(model)
    assert same(snapshot(model), mean)
    with optimizer.sampled_params():
        assert not same(snapshot(model), first)
    assert same(snapshot(model), mean)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_restores_the_mean_and_drops_the_sample(error):
    """Weights, statistics, gradients and hooks are as before the context; training goes on."""
    model, likelihood, optimizer = make(num_samples=2)
    for _ in range(2):
        with optimizer.sampled_params():
            likelihood(model(X), Y).backward()
    optimizer.step()
    mean = snapshot(model)
    optimizer.zero_grad()
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    def fail():
        with optimizer.sampled_params():
            likelihood(model(X), Y).backward()
            raise error

    with pytest.raises(error):
        fail()
    assert same(snapshot(model), mean)
    assert same([parameter.grad for parameter in model.parameters()], gradients)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [*model.modules(), likelihood])
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
    optimizer.step()


def test_nesting_is_refused_and_the_outer_context_survives():
    model, likelihood, optimizer = make()
    step(model, likelihood, optimizer)
    mean = snapshot(model)
    with optimizer.sampled_params():
        with pytest.raises(UsageError, match="entered already"):
            optimizer.sampled_params().__enter__()
        likelihood(model(X), Y).backward()
    assert same(snapshot(model), mean)
    optimizer.step()


def test_backward_after_the_context_cannot_use_the_wrong_weights():
    """Autograd sees that the weights changed, instead of differentiating at the mean."""
    model, likelihood, optimizer = make()
    step(model, likelihood, optimizer)
    with optimizer.sampled_params():
        loss = likelihood(model(X), Y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_without_a_sample_is_refused():
    model, likelihood, optimizer = make()
    likelihood(model(X), Y).backward()
    with pytest.raises(UsageError, match="nothing was sampled"):
        optimizer.step()


def test_step_without_backward_is_refused():
    model, likelihood, optimizer = make()
    with optimizer.sampled_params():
        likelihood(model(X), Y)
    with pytest.raises(UsageError, match="No layer has a gradient"):
        optimizer.step()


def test_step_inside_the_context_is_refused():
    model, likelihood, optimizer = make()
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
        with pytest.raises(UsageError, match="inside sampled_params"):
            optimizer.step()


def test_posterior_inside_the_context_is_refused():
    model, likelihood, optimizer = make()
    step(model, likelihood, optimizer)
    with optimizer.sampled_params(), pytest.raises(UsageError, match="inside sampled_params"):
        optimizer.posterior()


def test_posterior_before_training_names_the_layer():
    _, _, optimizer = make()
    with pytest.raises(UsageError, match="'0' has no curvature statistics"):
        optimizer.posterior()


def test_divergence_from_the_prior_is_of_all_layers_or_refused():
    """Before the first step it is that of what is sampled; without warm-up there is nothing yet."""
    model, likelihood, optimizer = make()
    first = optimizer.kl()
    assert first > 0
    model[2].requires_grad_(False)
    head = first - optimizer.kl()
    assert head > 0
    step(model, likelihood, optimizer)
    without = optimizer.kl()
    model[2].requires_grad_(True)
    assert optimizer.kl() > without
    with pytest.raises(UsageError, match="Layer '0' has no curvature statistics yet"):
        make(warmup=False)[2].kl()


def test_training_in_eval_mode_is_named():
    """Forwards in eval() are never counted, and the error says so."""
    model, likelihood, optimizer = make()
    model.eval()
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
    with pytest.raises(UsageError, match=r"train\(\) mode"):
        optimizer.step()


def test_no_grad_and_eval_forwards_inside_are_not_counted():
    model, likelihood, optimizer = make(warmup=False)
    twin, twin_likelihood, twin_optimizer = make(warmup=False)
    with optimizer.sampled_params():
        with torch.no_grad():
            model(X * 100)
        model.eval()
        model(X * 100)
        model.train()
        likelihood(model(X), Y).backward()
    with twin_optimizer.sampled_params():
        twin_likelihood(twin(X), Y).backward()
    optimizer.step()
    twin_optimizer.step()
    for name in ("0", "2"):
        assert torch.equal(
            optimizer.blocks[name].statistics.mean("input"), twin_optimizer.blocks[name].statistics.mean("input")
        )


def test_wrong_number_of_contexts_is_named():
    model, likelihood, optimizer = make(num_samples=4)
    for _ in range(3):
        with optimizer.sampled_params():
            likelihood(model(X), Y).backward()
    with pytest.raises(UsageError, match="entered 3 times"):
        optimizer.step()


def test_gradients_cleared_between_contexts_begin_the_step_anew():
    """A loop that gives up a batch and clears the gradients does not carry its samples into the next step."""
    model, likelihood, optimizer = make(fisher="exact", warmup=False)
    twin, twin_likelihood, twin_optimizer = make(fisher="exact", warmup=False)
    with optimizer.sampled_params():
        likelihood(model(X * 50), Y).backward()
    optimizer.zero_grad()
    step(model, likelihood, optimizer)
    step(twin, twin_likelihood, twin_optimizer)
    assert same(snapshot(model), snapshot(twin))


def test_a_second_antithetic_sample_mirrors_the_first_after_one_that_failed():
    """The retry is the mirror image too, not the mirror image of what failed."""
    model, likelihood, optimizer = make(num_samples=2, antithetic=True)
    mean, seen = snapshot(model), []
    with optimizer.sampled_params():
        seen.append(snapshot(model))
        likelihood(model(X), Y).backward()
    with pytest.raises(KeyError), optimizer.sampled_params():
        raise KeyError
    with optimizer.sampled_params():
        seen.append(snapshot(model))
        likelihood(model(X), Y).backward()
    for first, second, middle in zip(*seen, mean, strict=True):
        assert not torch.equal(first, middle)
        torch.testing.assert_close(first + second, 2 * middle)
    optimizer.step()


def test_contexts_that_only_measure_count_with_those_that_follow():
    """Unlabelled data in contexts of their own; gradients that are cleared still begin the step anew."""
    model, likelihood, optimizer = make()
    for _ in range(2):
        with optimizer.sampled_params():
            model(X)
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
    assert optimizer._sampler.statistics["0"].counts["input"] == 3 * len(X)
    model.zero_grad()
    with optimizer.sampled_params():
        likelihood(model(X), Y).backward()
    assert optimizer._sampler.statistics["0"].counts["input"] == len(X)


def test_odd_antithetic_samples_are_refused():
    with pytest.raises(ArgumentError, match="must be even"):
        make(num_samples=3, antithetic=True)


def test_models_carry_no_hooks_and_can_be_copied_and_pickled():
    model, likelihood, optimizer = make()
    step(model, likelihood, optimizer)
    assert same(snapshot(copy.deepcopy(model)), snapshot(model))
    assert same(snapshot(pickle.loads(pickle.dumps(model))), snapshot(model))


def test_the_generator_decides_everything():
    """Equal generators give equal runs whatever the global seed; the global stream is left alone."""
    results = []
    for global_seed in (1, 2):
        model, likelihood, optimizer = make(generator=torch.Generator().manual_seed(7))
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        for _ in range(3):
            step(model, likelihood, optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(snapshot(model))
    assert same(*results)
