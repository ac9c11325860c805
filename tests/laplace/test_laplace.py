"""``Laplace`` as a user meets it: the model comes back as it was, data add up, files hold it, wrong calls are named."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close
from torch.utils.data import (
    ChainDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, BayesKfacWarning, TargetError, UnsupportedModelError, UsageError
from bayes_kfac.likelihoods import Categorical, GammaNoise, Gaussian, Likelihood
from tests.helpers import TIGHT, randn, rng, seeded
from tests.joints import dense_covariance
from tests.laplace.oracles import (
    NETS,
    X,
    Y,
    batches,
    dense_priors,
    fit_net,
    fitted,
    gaussian,
    mlp,
    prior_forms,
)
from tests.posteriors import ESTIMATES, FAMILIES

NAMES = bk.structures.available()
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


# The model comes back as it was


class Busy(nn.Module):
    """Dropout, running averages, attention (whose forward pass is replaced while it is watched), buffers and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(self.norm(self.first(x + self.shift)).tanh()).unsqueeze(1)
        return self.head(self.attention(h, h, h, need_weights=False)[0].squeeze(1))


def busy() -> Busy:
    """In a mixture of modes, with gradients, frozen parameters, and hooks of the user's."""
    model = Busy()
    seeded(model)
    model.train()
    model.norm.eval()
    model.head.eval()
    model.first.weight.requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if index % 2 else None
    with torch.no_grad():
        model.norm.running_mean.copy_(randn(4, seed=3))
        model.norm.running_var.copy_(randn(4, seed=4).exp())
        model.norm.num_batches_tracked.fill_(7)
        model.shift.copy_(randn(3, seed=5))
    return model


def picture(model: nn.Module) -> dict[str, Any]:
    """All of a module that a fit could change."""
    state: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        state[f"{prefix}/mode"] = module.training
        state[f"{prefix}/keys"] = list(module.__dict__)
        state[f"{prefix}/type"] = type(module)
        state[f"{prefix}/hooks"] = {
            key: list(value.items()) for key, value in module.__dict__.items() if key.endswith("_hooks")
        }
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        state[f"{name}/parameter"] = (id(parameter), parameter.requires_grad, parameter.data_ptr())
        state[f"{name}/value"] = parameter.detach().clone()
        state[f"{name}/gradient"] = None if gradient is None else (id(gradient), gradient.clone())
    for name, buffer in model.named_buffers():
        state[f"{name}/buffer"] = (id(buffer), buffer.clone())
    return state


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple | list) and left and any(isinstance(value, Tensor) for value in left):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = picture(model)
    assert after.keys() == before.keys()
    assert [key for key, value in before.items() if not same(value, after[key])] == []


def breaks_off() -> Iterator[tuple[Tensor, Tensor]]:
    yield X, Y
    raise OSError("the disk is gone")


FAILURES = {
    "the loader raises": (breaks_off, OSError, "the disk is gone"),
    "a target does not fit": (lambda: [(X, Y), (X, Y[:, :1])], TargetError, "must be equal"),
    "an input does not fit": (lambda: [(X, Y), (X[:, :2], Y)], RuntimeError, "size"),
    "a batch is none": (lambda: [(X, Y), X], ArgumentError, "loader yielded"),
    "data are NaN": (lambda: [(X, Y), (X, Y * torch.nan)], bk.errors.NonFiniteError, "Check the data"),
    "there are no data": (list, ArgumentError, "yielded no example"),
}


@pytest.mark.parametrize("structure", NAMES)
def test_the_model_comes_back_as_it_was(structure: str) -> None:
    """Each module's mode, weights, flags, gradients, hooks, attributes and buffers, bit for bit.

    Through fit, update, evidence, tuning and predictions.
    """
    model = busy()
    hooked: list[str] = []
    model.first.register_forward_hook(lambda *args: hooked.append("forward"))
    model.head.register_full_backward_hook(lambda *args: hooked.append("backward"))
    model.attention.register_forward_pre_hook(lambda *args: hooked.append("before"))
    before = picture(model)
    laplace = bk.Laplace(model, gaussian(), structure=structure, subset="all")
    assert_unchanged(model, before)
    assert laplace.fit(batches(X, Y), progress=False) is laplace
    assert_unchanged(model, before)
    assert {"forward", "before"} <= set(hooked), "the user's hooks run as ever"
    assert laplace.update(batches(X, Y), progress=False) is laplace
    laplace.log_marginal_likelihood()
    assert laplace.optimize_prior_precision() is laplace
    posterior = laplace.posterior()
    posterior.predict(X)
    posterior.predict(X, "sampling", num_samples=2)
    assert laplace.optimize_prior_precision("validation", loader=[(X, Y)], grid=[0.5], progress=False) is laplace
    assert laplace.optimize_temperature([(X, Y)], grid=[0.5], progress=False) is laplace
    laplace.summary()
    assert_unchanged(model, before)
    assert model.calls > 5


@pytest.mark.parametrize("failure", FAILURES)
def test_a_fit_that_fails_leaves_the_model_and_an_earlier_fit_as_they_were(failure: str) -> None:
    """Also an update that fails, and a likelihood whose noise is being learned."""
    make, error, message = FAILURES[failure]
    model, likelihood = busy(), Gaussian("learned").double()
    before, state = picture(model), copy.deepcopy(likelihood.state_dict())
    laplace = bk.Laplace(model, likelihood)
    with pytest.raises(error, match=message):
        laplace.fit(make(), progress=False)
    assert_unchanged(model, before)
    with pytest.raises(UsageError, match=r"fit\(loader\)"):
        laplace.posterior()
    laplace.fit(batches(X, Y), progress=False)
    evidence, blocks = laplace.log_marginal_likelihood(), laplace.posterior().blocks
    for method in (laplace.fit, laplace.update):
        with pytest.raises(error, match=message):
            method(make(), progress=False)
        assert_unchanged(model, before)
        assert torch.equal(laplace.log_marginal_likelihood(), evidence)
        for name, block in laplace.posterior().blocks.items():
            assert torch.equal(block.to_dense(), blocks[name].to_dense())
    assert all(torch.equal(value, likelihood.state_dict()[name]) for name, value in state.items())
    assert all(parameter.requires_grad for parameter in likelihood.parameters())


def test_a_fit_takes_the_model_in_evaluation_mode() -> None:
    """Dropout is off, running averages are used, whatever the modes at the call."""
    model = busy()
    trained = fitted(model, gaussian(), batches(X, Y))
    evaluated = fitted(busy().eval(), gaussian(), batches(X, Y))
    assert torch.equal(trained.log_marginal_likelihood(), evaluated.log_marginal_likelihood())


def test_a_fit_is_a_snapshot() -> None:
    """Weights, buffers and likelihood are those of the call of ``fit``, though they change later."""
    model, likelihood = busy(), Gaussian("learned").double()
    laplace = fitted(model, likelihood, batches(X, Y))
    evidence, mean = laplace.log_marginal_likelihood(), laplace.posterior().predict(X).mean
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.norm.buffers(), *likelihood.parameters()):
            tensor.add_(1)
    assert torch.equal(laplace.log_marginal_likelihood(), evidence)
    assert torch.equal(laplace.posterior().predict(X).mean, mean)
    assert laplace.posterior().likelihood.noise_scale == 1


def test_a_second_fit_forgets_the_first() -> None:
    """At other weights, with other data; an evidence that was computed does not stay behind."""
    model = mlp()
    laplace = fitted(model, gaussian(), batches(X, Y))
    laplace.log_marginal_likelihood()
    with torch.no_grad():
        model[0].weight.mul_(2)
    laplace.fit(batches(X[:6], Y[:6]), progress=False)
    fresh = fitted(model, gaussian(), batches(X[:6], Y[:6]))
    assert torch.equal(laplace.log_marginal_likelihood(), fresh.log_marginal_likelihood())
    for name, block in laplace.posterior().blocks.items():
        assert torch.equal(block.to_dense(), fresh.posterior().blocks[name].to_dense())
    assert torch.equal(laplace.posterior().mean["0.weight"], model[0].weight)
    assert laplace.posterior().provenance.num_data == 6


def test_fits_work_where_gradients_are_off() -> None:
    """A user who has ``no_grad`` or ``inference_mode`` around an evaluation script gets the same."""
    expected = fit_net("mlp", structure="kron").optimize_prior_precision()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            laplace = fit_net("mlp", structure="kron").optimize_prior_precision()
            evidence = laplace.log_marginal_likelihood()
        assert_close(evidence.clone(), expected.log_marginal_likelihood(), **CLOSE)


def test_two_fits_of_one_model_do_not_meet() -> None:
    model = mlp()
    first, second = bk.Laplace(model, gaussian()), bk.Laplace(model, gaussian(), structure="dense")
    first.fit(batches(X, Y), progress=False)
    second.fit(batches(X[:5], Y[:5]), progress=False)
    alone = fit_net("mlp")
    assert torch.equal(first.log_marginal_likelihood(), alone.log_marginal_likelihood())


# More data


def halves(name: str) -> list[list[tuple[Any, Tensor]]]:
    net = NETS[name]
    return [batches(net.x[part], net.y[part], 3) for part in (slice(0, 4), slice(4, 5), slice(5, 11))]


@pytest.mark.parametrize(("structure", "damping"), FAMILIES)
@pytest.mark.parametrize("name", NETS)
def test_data_added_later_are_as_if_they_had_been_there(name: str, structure: str, damping: str) -> None:
    """One fit to all is a fit and updates in any order: statistics, evidence and posterior."""
    options = {"structure": structure, "damping": damping, "prior_precision": 0.4, "temperature": 0.7}
    expected = fit_net(name, **options)
    parts, net = halves(name), NETS[name]
    for order in ((0, 1, 2), (2, 0, 1)):
        laplace = bk.Laplace(net.make(), net.likelihood(), **options)
        laplace.fit(parts[order[0]], progress=False)
        laplace.log_marginal_likelihood()  # nothing of it may stay
        for index in order[1:]:
            laplace.update(parts[index], progress=False)
        assert_close(laplace.log_marginal_likelihood(), expected.log_marginal_likelihood(), **CLOSE)
        posterior, reference = laplace.posterior(), expected.posterior()
        assert posterior.provenance == reference.provenance
        for layer, block in posterior.blocks.items():
            tolerance = {"rtol": 1e-8, "atol": 1e-8} if damping == "optimal" else CLOSE
            assert_close(block.to_dense(), reference.blocks[layer].to_dense(), **tolerance)


def test_an_update_after_tuning_keeps_what_was_tuned() -> None:
    laplace = fitted(mlp(), gaussian(), batches(X[:6], Y[:6])).optimize_prior_precision(noise=True)
    tuned = laplace.posterior()
    laplace.update(batches(X[6:], Y[6:]), progress=False)
    assert laplace.posterior().prior_precision == tuned.prior_precision
    whole = fit_net("mlp", prior_precision=tuned.prior_precision)
    scale = tuned.likelihood.noise_scale.double()
    expected = whole.log_marginal_likelihood(noise_scale=scale)
    assert_close(laplace.log_marginal_likelihood(), expected, rtol=1e-6, atol=0)


def test_updates_of_changed_weights_are_refused_with_the_remedy() -> None:
    """Weights, or running averages: the curvature of another mode does not add."""
    for change in ("first.weight", "head.bias", "norm.running_mean"):
        model = busy()
        laplace = fitted(model, gaussian(), batches(X, Y))
        before = laplace.log_marginal_likelihood()
        with torch.no_grad():
            dict([*model.named_parameters(), *model.named_buffers()])[change].view(-1)[-1].add_(1e-9)
        with pytest.raises(UsageError, match=r"weights have changed since fit\(\).*prior=laplace\.posterior\(\)"):
            laplace.update(batches(X, Y), progress=False)
        assert torch.equal(laplace.log_marginal_likelihood(), before)


def test_num_data_and_updates_do_not_go_together() -> None:
    laplace = fitted(mlp(), gaussian(), batches(X, Y), num_data=100)
    with pytest.raises(UsageError, match=r"num_data=100 was given for all.*Leave it out"):
        laplace.update(batches(X, Y), progress=False)


# How many data there are


class Endless(Dataset):
    """A data set that does not know how long it is."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index % 11], Y[index % 11]


class Stream(IterableDataset):
    """A data set that yields what comes, and may know how much that is."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


class Counted(Stream):
    """One that does."""

    def __len__(self) -> int:
        return 11


def data_set() -> TensorDataset:
    return TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("options", "yielded"),
    [
        ({"drop_last": True, "batch_size": 4}, 8),
        ({"sampler": SubsetRandomSampler(range(7)), "batch_size": 4}, 7),
        ({"sampler": RandomSampler(data_set(), replacement=True, num_samples=30), "batch_size": 8}, 30),
    ],
)
def test_a_loader_that_does_not_yield_its_data_set_warns(options: dict[str, Any], yielded: int) -> None:
    """``fit`` counts what it was given and says so; ``num_data`` settles it without a word."""
    loader = DataLoader(data_set(), **options)
    laplace = bk.Laplace(mlp(), gaussian())
    with pytest.warns(BayesKfacWarning, match=rf"yielded {yielded} examples of a data set of 11.*num_data=") as seen:
        laplace.fit(loader, progress=False)
    assert seen[0].filename == __file__, "the warning is about the caller's line"
    assert laplace.posterior().provenance.num_data == yielded
    with pytest.warns(BayesKfacWarning, match=f"yielded {yielded} examples"):
        laplace.update(loader, progress=False)
    assert laplace.posterior().provenance.num_data == 2 * yielded
    settled = fitted(mlp(), gaussian(), loader, num_data=11)
    assert settled.posterior().provenance.num_data == 11


def test_a_stream_that_drops_its_last_examples_warns_without_naming_a_sampler() -> None:
    with pytest.warns(BayesKfacWarning, match="yielded 8 examples of a data set of 11: drop_last=True"):
        bk.Laplace(mlp(), gaussian()).fit(DataLoader(Counted(), batch_size=4, drop_last=True), progress=False)


def test_a_bootstrap_warns_though_its_number_is_right() -> None:
    """As many draws with replacement as there are examples are not the examples."""
    bootstrap = RandomSampler(data_set(), replacement=True)
    for sampler in (bootstrap, WeightedRandomSampler(torch.ones(11), 11)):
        loader = DataLoader(data_set(), sampler=sampler, batch_size=4)
        with pytest.warns(BayesKfacWarning, match=rf"{type(sampler).__name__} may repeat.*num_data="):
            bk.Laplace(mlp(), gaussian()).fit(loader, progress=False)


def test_loaders_that_yield_all_or_know_no_length_do_not_warn() -> None:
    for loader in (
        DataLoader(data_set(), batch_size=4, shuffle=True),
        DataLoader(data_set(), batch_size=11, drop_last=True),
        DataLoader(Endless(), sampler=range(11), batch_size=3),
        DataLoader(Stream(), batch_size=3),
        DataLoader(Counted(), batch_size=3),
        DataLoader(ChainDataset([Stream()]), batch_size=3),
        batches(X, Y),
    ):
        assert fitted(mlp(), gaussian(), loader).posterior().provenance.num_data == 11


# Parameters outside of blocks


def with_prelu() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)))


@pytest.mark.parametrize("structure", NAMES)
def test_others_have_a_choice_of_three(structure: str) -> None:
    """An error, an independent Gaussian by the exact diagonal, or nothing; the other blocks are the same."""
    with pytest.raises(UnsupportedModelError, match=r"(?s)1\.weight: PReLU has no adapter.*others='diagonal'"):
        bk.Laplace(with_prelu(), gaussian(), structure=structure)
    left_out = fitted(with_prelu(), gaussian(), batches(X, Y), structure=structure, others="deterministic").posterior()
    taken_in = fitted(with_prelu(), gaussian(), batches(X, Y), structure=structure, others="diagonal").posterior()
    assert set(left_out.blocks) == {"0", "2"}
    assert set(taken_in.blocks) == {"0", "1.weight", "2"}
    for name, block in left_out.blocks.items():
        assert_close(taken_in.blocks[name].to_dense(), block.to_dense(), **TIGHT)
    model = with_prelu()

    def output(weight: Tensor) -> Tensor:
        return nn.functional.linear(torch.nn.functional.prelu(model[0](X), weight), model[2].weight, model[2].bias)

    J = torch.autograd.functional.jacobian(output, model[1].weight.detach())  # [n, outputs, 4]
    fisher = torch.einsum("nci,ncj->ij", J, J) / 0.7**2
    dense = taken_in.blocks["1.weight"].to_dense().reshape(-1, *taken_in.blocks["1.weight"].to_dense().shape[-2:])
    found = torch.cat([block.diagonal() for block in dense])
    assert_close(found, fisher.diagonal() + 1.0, **TIGHT)
    assert torch.isfinite(taken_in.predict(X).covariance).all()
    assert "1.weight" in str(bk.Laplace(with_prelu(), gaussian(), others="diagonal").summary())


# Wrong calls


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": "kfac"}, r"structure='kfac' is unknown\. Allowed: .*'kron'"),
        ({"damping": "pi"}, "damping='pi' is unknown"),
        ({"fisher": "true"}, r"fisher='true' is unknown\. Allowed: .*'exact'"),
        ({"sharing": "both"}, "sharing='both' is unknown"),
        ({"others": "ignore"}, r"others='ignore' is unknown\. Allowed: .*'diagonal'"),
        ({"temperature": 0}, r"temperature=0 is out of range\. Allowed"),
        ({"temperature": "cold"}, "temperature='cold' is not a number"),
        ({"num_data": 0}, r"num_data=0 is not allowed\. Allowed: an integer >= 1"),
        ({"num_data": 2.5}, r"num_data=2\.5 is not allowed"),
        ({"memory_budget": 0}, "memory_budget=0 is not allowed"),
        ({"memory_budget": "1GB"}, "memory_budget='1GB' is not allowed"),
        ({"prior": "flat"}, r"prior='flat'.*Allowed: .*Posterior"),
        ({"prior": 1.0}, r"prior=1\.0.*prior_precision="),
    ],
)
def test_each_wrong_argument_is_named_with_what_is_allowed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        bk.Laplace(mlp(), gaussian(), **options)


def test_wrong_kinds_of_model_and_likelihood_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"model=.* must be an nn\.Module"):
        bk.Laplace(lambda x: x, gaussian())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"likelihood=MSELoss\(\) must be one of"):
        bk.Laplace(mlp(), nn.MSELoss())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        bk.Laplace(nn.DataParallel(mlp()), gaussian())


def test_a_wrapped_model_is_taken_by_its_own_names() -> None:
    wrapped = torch.compile(mlp(), backend="eager")
    laplace = fitted(wrapped, gaussian(), batches(X, Y))
    assert set(laplace.posterior().blocks) == {"0", "2"}
    assert_close(laplace.log_marginal_likelihood(), fit_net("mlp").log_marginal_likelihood(), **TIGHT)


def test_progress_is_silent_where_it_was_asked_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    laplace = bk.Laplace(mlp(), gaussian()).fit(batches(X, Y), progress=False)
    laplace.update(batches(X, Y), progress=False).optimize_prior_precision()
    assert capsys.readouterr() == ("", "")
    laplace.fit(batches(X, Y)).update(batches(X, Y))
    assert capsys.readouterr().err.count("laplace: ") >= 2


def test_the_provenance_says_how_it_was_made() -> None:
    laplace = fit_net(
        "mlp", structure="kron", damping="factored", fisher="empirical", sharing="reduce", temperature=0.2
    )
    made = laplace.posterior().provenance
    assert (made.method, made.structure, made.damping, made.fisher) == ("Laplace", "kron", "factored", "empirical")
    assert (made.sharing, made.temperature, made.num_data) == ("reduce", 0.2, 11)
    assert fit_net("mlp", structure="dense", damping="factored").posterior().provenance.damping == "exact"


def test_the_likelihood_is_a_copy() -> None:
    likelihood = Gaussian("learned").double()
    laplace = fitted(mlp(), likelihood, batches(X, Y)).optimize_prior_precision(noise=True)
    assert likelihood.noise_scale == 1
    assert laplace.posterior().likelihood.noise_scale != 1
    assert all(parameter.grad is None for parameter in likelihood.parameters())


def test_noise_that_is_set_after_the_fit_is_that_of_the_next_fit() -> None:
    """The curvature of the fit is that of its own noise, and so are the evidence, updates and the posterior."""
    expected = fitted(mlp(), Gaussian(0.5), batches(X, Y)).update(batches(X, Y), progress=False)
    laplace = fitted(mlp(), Gaussian(0.5), batches(X, Y))
    laplace.likelihood.set_noise_scale(5.0)
    laplace.update(batches(X, Y), progress=False)
    assert laplace.posterior().likelihood.noise_scale == 0.5
    assert torch.equal(laplace.log_marginal_likelihood(), expected.log_marginal_likelihood())
    again = laplace.fit(batches(X, Y), progress=False)
    assert again.posterior().likelihood.noise_scale == 5
    fresh = fitted(mlp(), Gaussian(5.0), batches(X, Y))
    assert torch.equal(again.log_marginal_likelihood(), fresh.log_marginal_likelihood())


# What may be set, and what was settled


def test_prior_and_temperature_may_be_set() -> None:
    laplace, expected = fit_net("mlp"), fit_net("mlp", prior_precision={"0": 100.0, "2": 3.0}, temperature=0.2)
    laplace.prior_precision, laplace.temperature = {"0": 100.0, "2": 3.0}, 0.2
    assert torch.equal(laplace.log_marginal_likelihood(), expected.log_marginal_likelihood())
    assert laplace.posterior().prior_precision == {"0": 100.0, "2": 3.0}
    laplace.prior_precision = 7.0
    assert laplace.posterior().prior_precision == {"0": 7.0, "2": 7.0}


@pytest.mark.parametrize(
    ("name", "value"), [("prior_precision", -1.0), ("prior_precision", {"1": 2.0}), ("temperature", 0.0)]
)
def test_what_could_not_be_passed_cannot_be_set(name: str, value: Any) -> None:
    laplace = fit_net("mlp")
    before = laplace.log_marginal_likelihood()
    with pytest.raises(ArgumentError, match=name):
        setattr(laplace, name, value)
    assert torch.equal(laplace.log_marginal_likelihood(), before)


def test_the_precision_of_a_prior_that_is_a_posterior_cannot_be_set() -> None:
    laplace = bk.Laplace(mlp(), Gaussian(0.5), prior=fit_net("mlp", damping="factored").posterior(), damping="factored")
    assert laplace.prior_precision == {}
    with pytest.raises(ArgumentError, match="where the prior is a posterior"):
        laplace.prior_precision = 2.0


@pytest.mark.parametrize("name", ["model", "likelihood", "structure", "fisher", "num_data", "prior"])
def test_what_a_fit_was_made_with_is_settled(name: str) -> None:
    laplace = fit_net("mlp")
    before = getattr(laplace, name)
    with pytest.raises(AttributeError, match=f"{name} is settled .*Make a new one"):
        setattr(laplace, name, "other")
    assert getattr(laplace, name) is before


# Divergence and files


def taken(structure: str, form: str) -> str:
    """The form of a prior, or the next coarser one that the structure can add."""
    forms = ["weight", "parameter", "layer"]
    for finer in forms[forms.index(form) :] if form in forms else []:
        laplace = fit_net("mlp", structure=structure)
        laplace = fit_net("mlp", structure=structure, prior_precision=prior_forms(laplace.layers)[finer])
        try:
            laplace.posterior()
        except ArgumentError:
            continue
        return finer
    return "model"


@pytest.mark.parametrize("form", ["model", "parameter", "weight"])
@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "twice"])
def test_the_divergence_from_the_prior_is_that_of_dense_gaussians(name: str, structure: str, form: str) -> None:
    """And the posterior comes back from a file with its prior: the same divergence and predictions, to the bit."""
    prior = prior_forms(fit_net(name).layers)[taken(structure, form)]
    posterior = fit_net(name, structure=structure, prior_precision=prior).posterior()
    priors = dense_priors(prior, posterior.layers)
    expected = torch.zeros(()).double()
    means = {layer: own.matrix(posterior.mean).flatten(-2) for layer, own in posterior.layers.items()}
    covariances = {layer: torch.linalg.inv(block.to_dense()) for layer, block in posterior.blocks.items()}
    if posterior.blocks.links:  # all layers are one block
        means, priors = {"": torch.cat(list(means.values()))}, {"": torch.block_diag(*priors.values())}
        covariances = {"": dense_covariance(posterior.blocks)}
    for layer, mean in means.items():
        q = MultivariateNormal(mean, covariances[layer])
        p = MultivariateNormal(torch.zeros_like(mean), precision_matrix=priors[layer])
        expected = expected + kl_divergence(q, p).sum()
    assert_close(posterior.kl(), expected, **CLOSE)


@pytest.mark.parametrize("form", ["model", "layer", "parameter", "weight"])
@pytest.mark.parametrize("structure", NAMES)
def test_posteriors_come_back_from_files_with_their_prior(structure: str, form: str, tmp_path: Any) -> None:
    """The same blocks, divergence and predictions, to the bit; the tuned noise included."""
    laplace = fit_net("mlp", structure=structure).optimize_prior_precision(noise=True)
    form = taken(structure, form)
    laplace = fit_net("mlp", structure=structure, prior_precision=prior_forms(laplace.layers)[form])
    posterior = laplace.posterior()
    posterior.save(tmp_path / "p.safetensors")
    loaded = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
    assert torch.equal(loaded.kl(), posterior.kl())
    assert loaded.provenance == posterior.provenance
    assert torch.equal(loaded.predict(X).covariance, posterior.predict(X).covariance)
    assert loaded.prior_precision.keys() == posterior.prior_precision.keys()
    for name, value in posterior.prior_precision.items():
        assert same(value, loaded.prior_precision[name])
        assert isinstance(value, Tensor) == (form in {"parameter", "weight"})


def test_a_tuned_noise_comes_back_from_files(tmp_path: Any) -> None:
    for noise in ("learned", torch.tensor(0.7, dtype=torch.float64)):
        posterior = (
            fitted(mlp(), Gaussian(noise).double(), batches(X, Y)).optimize_prior_precision(noise=True).posterior()
        )
        posterior.save(tmp_path / "p.safetensors")
        loaded = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
        assert torch.equal(loaded.predict(X).variance, posterior.predict(X).variance)
        assert torch.equal(loaded.likelihood.noise_scale, posterior.likelihood.noise_scale)


def test_tied_words_and_their_tokens_come_back_from_files(tmp_path: Any) -> None:
    for name in NETS:
        posterior = fit_net(name).posterior()
        posterior.save(tmp_path / "p.safetensors")
        loaded = bk.Posterior.load(tmp_path / "p.safetensors", NETS[name].make())
        assert torch.equal(loaded.kl(), posterior.kl())


# Other dtypes, and real data


@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("name", ["mlp", "classifier", "cnn", "words"])
def test_models_in_bfloat16_have_finite_posteriors_in_single_precision(name: str, structure: str) -> None:
    """Statistics and blocks are in float32; evidence, tuning and both predictions are finite."""
    net = NETS[name]
    x = net.x.bfloat16() if net.x.is_floating_point() else net.x
    y = net.y.bfloat16() if net.y.is_floating_point() else net.y
    model = net.make().bfloat16()
    laplace = fitted(model, net.likelihood().bfloat16(), batches(x, y), structure=structure)
    assert torch.isfinite(laplace.optimize_prior_precision().log_marginal_likelihood())
    posterior = laplace.posterior()
    for block in posterior.blocks.values():
        assert {value.dtype for value in block.state.values()} == {torch.float32}
        assert bool((torch.linalg.eigvalsh(block.to_dense()) > 0).all())
    for method in ("linearized", "sampling"):
        prediction = posterior.predict(x, method, num_samples=4, generator=rng(0))
        log_prob = prediction.log_prob(y)
        assert torch.isfinite(log_prob).all()
    reference = fit_net(name, structure=structure).log_marginal_likelihood(1.0)
    if structure not in ESTIMATES:  # of data that are rounded there is another estimate
        assert float(laplace.log_marginal_likelihood(1.0)) == pytest.approx(float(reference), rel=0.02)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def diabetes() -> tuple[nn.Module, Likelihood, Tensor, Tensor]:
    x, y = (torch.as_tensor(array[:60], dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, Gaussian("learned"), x / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)


def digits() -> tuple[nn.Module, Likelihood, Tensor, Tensor]:
    x, y = (torch.as_tensor(array[:60]) for array in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 10))
    return model, Categorical(), x.reshape(-1, 1, 8, 8).float() / 16, y


@pytest.mark.parametrize("make", [diabetes, digits])
@pytest.mark.parametrize(("structure", "damping"), FAMILIES)
def test_every_structure_goes_from_real_data_to_predictions(structure: str, damping: str, make: Any) -> None:
    """Fit, evidence, tuning and prediction after some training; tuning raises the evidence."""
    model, likelihood, x, y = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        likelihood(model(x), y).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    is_regression = isinstance(likelihood, Gaussian)
    laplace = bk.Laplace(model, likelihood, structure=structure, damping=damping).fit(loader, progress=False)
    before = laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision(noise=is_regression)
    after = laplace.log_marginal_likelihood()
    assert math.isfinite(before)
    assert after > before
    posterior = laplace.posterior()
    assert math.isfinite(posterior.kl())
    assert posterior.kl() > 0
    prediction = posterior.predict(x)
    assert torch.isfinite(prediction.log_prob(y)).all()
    spread = prediction.epistemic_variance if is_regression else prediction.entropy
    assert bool((spread > 0).all())
    assert torch.isfinite(posterior.predict(x, "sampling", num_samples=3, generator=rng(0)).log_prob(y)).all()


def test_a_belief_about_the_noise_stays_what_it_is() -> None:
    """Its expected precision is in the Fisher, and the posterior's copy holds it."""
    likelihood = Gaussian(GammaNoise(6.0, 3.0)).double()
    posterior = fitted(mlp(), likelihood, batches(X, Y)).posterior()
    known = fitted(mlp(), Gaussian(torch.tensor(2.0**-0.5, dtype=torch.float64)), batches(X, Y)).posterior()
    for name, block in posterior.blocks.items():
        assert_close(block.to_dense(), known.blocks[name].to_dense(), rtol=1e-6, atol=1e-6)
    assert_close(posterior.kl(), known.kl(), rtol=1e-5, atol=0)
