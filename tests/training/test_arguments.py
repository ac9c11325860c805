"""Bad input: each wrong argument, model, batch and target has an error that names it, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, NonFiniteError, TargetError, UnsupportedModelError, UsageError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def make(model=None, likelihood=None, **options):
    model = net() if model is None else model
    likelihood = bk.likelihoods.Gaussian(1.0) if likelihood is None else likelihood
    return bk.NoisyKFAC(model, likelihood, **{"num_data": 40, "statistics_every": 1, **options})


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def step(optimizer, x=X, y=Y):
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_data": 0}, "num_data=0"),
        ({"num_data": 3.5}, "num_data=3.5"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"prior_precision": 0.0}, "prior_precision=0.0"),
        ({"prior_precision": -2.0}, "prior_precision=-2.0"),
        ({"prior_precision": "big"}, "prior_precision='big'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"extrinsic_damping": -1e-3}, "extrinsic_damping=-0.001"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"statistics_decay": 1.0}, "statistics_decay=1.0"),
        ({"statistics_every": 0}, "statistics_every=0"),
        ({"inverse_every": 0}, "inverse_every=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"kl_clip": 0.0}, "kl_clip=0.0"),
        ({"structure": "kfac"}, "structure='kfac'"),
        ({"damping": "pi"}, "damping='pi'"),
        ({"fisher": "true"}, "fisher='true'"),
        ({"sharing": "expanded"}, "sharing='expanded'"),
        ({"others": "ignore"}, "others='ignore'"),
    ],
)
def test_each_bad_argument_is_named_with_what_is_allowed(options, name):
    with pytest.raises(ArgumentError, match=name.replace("(", r"\(")) as caught:
        make(**options)
    assert "Allowed" in str(caught.value)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        bk.NoisyKFAC(net(), bk.likelihoods.Gaussian(1.0))


def test_a_batch_larger_than_num_data_is_refused_and_the_mean_stays():
    optimizer = make(num_data=4)
    before = [parameter.clone() for parameter in optimizer.model.parameters()]
    with pytest.raises(ArgumentError, match="num_data=4 is smaller than a batch of 8"):
        step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))


def test_wrong_kinds_of_model_and_likelihood_are_named():
    with pytest.raises(ArgumentError, match=r"model=.* must be an nn\.Module"):
        make(model=lambda x: x)
    with pytest.raises(ArgumentError, match="likelihood=MSELoss"):
        make(likelihood=nn.MSELoss())


def test_a_model_without_supported_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="no layer with a curvature block"):
        make(model=nn.Sequential(nn.ReLU()))
    frozen = net().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="no layer with a curvature block"):
        make(model=frozen)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (lambda model: ["0.weight"], r"\[0\] is a str and no parameter of the model\. Allowed: a list of parameters"),
        (lambda model: model[0], "params is a Linear"),
        (lambda model: model, r"params\[0\] is a Linear"),
        (lambda model: "0.weight", "params is a str"),
        (lambda model: model.named_parameters(), r"params\[0\] is a tuple"),
        (lambda model: dict(model.named_parameters()), r"params\[0\] is a str"),
        (lambda model: [{"params": model.parameters()}], r"params\[0\] is a dict"),
        (lambda model: model[0].weight, "params is a Parameter"),
        (lambda model: [*model.parameters(), nn.Parameter(torch.ones(2))], r"\[4\] is a Parameter of shape \(2,\)"),
        (lambda model: net().parameters(), r"params\[0\] is a Parameter of shape \(5, 3\) and no parameter"),
        (lambda model: [], "params is empty"),
    ],
)
def test_what_are_no_parameters_of_the_model_is_refused(params, match):
    model = net()
    with pytest.raises(ArgumentError, match=match):
        make(model=model, params=params(model))
    batches = [(torch.ones(4, 3), torch.ones(4, 1))]
    for tune in (None, "marginal_likelihood"):
        with pytest.raises(ArgumentError, match=match):
            bk.fit(model, bk.likelihoods.Gaussian(), batches, epochs=1, num_data=4, tune=tune, params=params(model))


def test_parameters_outside_blocks_are_listed_with_reasons():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 1))
    with pytest.raises(UnsupportedModelError, match=r"1\.weight: PReLU has no adapter") as caught:
        make(model=model)
    assert "others='deterministic'" in str(caught.value)


def test_others_can_be_trained_as_point_estimates():
    """Their values move, the summary says what they are, and the posterior predicts with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 1))
    start = model[1].weight.detach().clone()
    optimizer = make(model=model, others="deterministic")
    for _ in range(3):
        step(optimizer)
    assert not torch.equal(model[1].weight, start)
    text = str(optimizer.summary())
    assert "1.weight" in text
    assert "deterministic" in text
    assert "PReLU has no adapter" in text
    assert optimizer.posterior().predict(X).mean.shape == (8, 1)


def test_a_first_layer_under_a_reentrant_checkpoint_is_an_error_that_says_so():
    """Nothing is in its graph that the first check could miss; its gradient comes from the backward pass alone."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(checkpoint(self.first, x, use_reentrant=True))

    optimizer = make(model=Checkpointed())
    with pytest.raises(UsageError, match=r"'first'.*use_reentrant=False"):
        step(optimizer, X.clone().requires_grad_())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_inputs_name_the_layer_and_leave_the_state_as_it_was(bad):
    optimizer = make(likelihood=bk.likelihoods.Gaussian("learned"))
    step(optimizer)
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()["bayes_kfac"]
    blocks = optimizer.blocks
    x = X.clone()
    x[2, 1] = bad
    with pytest.raises(NonFiniteError, match="Layer '0': the batch's 'input' statistic"):
        step(optimizer, x)
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.steps == state["steps"]
    assert optimizer.blocks is blocks
    step(optimizer)  # and training goes on


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "recursive"])
@pytest.mark.parametrize("statistics_every", [1, 10])
def test_an_empty_batch_is_named_and_leaves_the_state_as_it_was(fisher, statistics_every):
    """On steps that measure, and on those that do not."""
    optimizer = make(fisher=fisher, statistics_every=statistics_every)
    for _ in range(4):
        step(optimizer)
    before = [parameter.detach().clone() for parameter in optimizer.model.parameters()]
    blocks, steps = optimizer.blocks, optimizer.steps
    with pytest.raises(TargetError, match=r"output of shape \(0, \d\) holds no example"):
        step(optimizer, X[:0], Y[:0])
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))
    assert optimizer.steps == steps
    assert optimizer.blocks is blocks
    step(optimizer)  # and training goes on


def test_non_finite_targets_are_found_in_the_gradients():
    optimizer = make(likelihood=bk.likelihoods.Gaussian("learned"))
    y = Y.clone()
    y[0] = math.nan
    before = [parameter.detach().clone() for parameter in optimizer.model.parameters()]
    with pytest.raises(NonFiniteError, match="gradient holds NaN"):
        step(optimizer, X, y)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))


@pytest.mark.parametrize("kl_clip", [1e-3, None])
def test_gradients_whose_step_would_overflow_are_refused_and_leave_the_state_as_it_was(kl_clip):
    """They are finite, but the squares that the step's length sums up are not: the mean would become NaN."""
    optimizer = make(kl_clip=kl_clip)
    step(optimizer)
    before = [parameter.detach().clone() for parameter in optimizer.model.parameters()]
    blocks = optimizer.blocks
    y = Y.clone()
    y[0], y[1] = 1e24, -1e24
    with pytest.raises(NonFiniteError, match=r"as large as \d\.\de\+2\d, and a step goes along none beyond 7e\+12"):
        step(optimizer, X, y)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))
    assert optimizer.blocks is blocks
    step(optimizer)  # and training goes on
    assert all(torch.isfinite(parameter).all() for parameter in optimizer.model.parameters())


def test_a_count_of_samples_that_is_off_is_named_where_there_is_no_gradient():
    optimizer = make(num_samples=2)
    with optimizer.sampled_params():
        optimizer.model(X)
    with pytest.raises(UsageError, match="num_samples=2, but"):
        optimizer.step()


def test_a_parameter_without_entries_is_no_hindrance():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.nothing = nn.Linear(3, 1), nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return self.first(x) + self.nothing.sum()

    optimizer = make(model=Net(), others="deterministic")
    step(optimizer)
    assert optimizer.steps == 1


def test_several_samples_of_a_batch_that_is_not_finite_are_told_by_what_is_wrong():
    """The second sample begins the step anew, so that the count is off too."""
    optimizer = make(num_samples=2)
    y = Y.clone()
    y[0] = math.nan

    def closure():
        optimizer.zero_grad()
        loss = optimizer.likelihood(optimizer.model(X), y)
        loss.backward()
        return loss.detach()

    with pytest.raises(NonFiniteError, match="gradient holds NaN"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("target", "match"),
    [(Y.squeeze(1), "must be equal"), (Y.long(), "must be floating point"), (Y[:4], "must be equal")],
)
def test_targets_of_the_wrong_shape_or_dtype_are_refused(target, match):
    optimizer = make()
    with pytest.raises(TargetError, match=match):
        step(optimizer, X, target)


def test_groups_set_options_for_parts_of_the_model():
    model = net()
    optimizer = make(model=model, groups=[{"params": model[2].parameters(), "prior_precision": 9.0, "lr": 0.0}])
    before = model[2].weight.clone()
    step(optimizer)
    step(optimizer)
    assert torch.equal(model[2].weight, before)
    posterior = optimizer.posterior()
    assert posterior.prior_precision == {"0": 1.0, "2": 9.0}
    assert [group["prior_precision"] for group in optimizer.param_groups] == [9.0, 1.0]
    with pytest.raises(TypeError, match="does not support item assignment"):  # where it would change nothing
        optimizer.prior_precision["0"] = 5.0


def test_bad_groups_are_named():
    model = net()
    with pytest.raises(ArgumentError, match="split layer '0'"):
        make(model=model, groups=[{"params": [model[0].weight]}])
    with pytest.raises(ArgumentError, match=r"unknown options \['weight_decay'\]"):
        make(model=model, groups=[{"params": model[0].parameters(), "weight_decay": 1.0}])
    with pytest.raises(ArgumentError, match="belong to no curvature block"):
        make(model=model, groups=[{"params": nn.Linear(2, 2).parameters()}])
    with pytest.raises(ArgumentError, match=r"groups\[1\] holds a parameter that groups\[0\]"):
        make(model=model, groups=[{"params": model[0].parameters()}, {"params": model[0].parameters()}])
    with pytest.raises(ArgumentError, match="prior_precision=-1"):
        make(model=model, groups=[{"params": model[0].parameters(), "prior_precision": -1}])


def test_a_layer_that_never_runs_is_named():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3, 1)
            self.unused = nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    optimizer = make(model=Forgetful())
    with pytest.raises(bk.errors.UsageError, match="'unused' has no curvature statistics"):
        step(optimizer)
