"""Tuning: the one maximum of a concave evidence from anywhere, and the best of a grid judged value by value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import BayesianRidge
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, NonFiniteError
from bayes_kfac.laplace import tuning
from bayes_kfac.likelihoods import Categorical, Gaussian
from tests.helpers import randn, rng, seeded
from tests.laplace.oracles import NETS, X, Y, batches, fishers, fit_net, fitted, gaussian, mlp
from tests.posteriors import FAMILY_NAMES

PER = ["model", "layer", "parameter"]


def by_group(laplace: bk.Laplace, per: str) -> dict[str, list[str]]:
    """The parameters that share a precision."""
    if per == "model":
        return {"": [key for layer in laplace.layers.values() for key in layer.parameters]}
    if per == "layer":
        return {name: list(layer.parameters) for name, layer in laplace.layers.items()}
    return {key: [key] for layer in laplace.layers.values() for key in layer.parameters}


def precisions(laplace: bk.Laplace) -> dict[str, Tensor]:
    """The precision of each weight, by parameter."""
    return {
        key: value
        for name, layer in laplace.layers.items()
        for key, value in layer.tensors(laplace.prior_precision[name].double().expand(layer.shape)).items()
    }


def found(laplace: bk.Laplace, per: str) -> dict[str, float]:
    """The precision of each group, which all its weights must have."""
    values = {}
    for group, keys in by_group(laplace, per).items():
        every = torch.cat([precisions(laplace)[key].flatten() for key in keys])
        assert bool((every == every[0]).all())
        values[group] = float(every[0])
    return values


def as_prior(laplace: bk.Laplace, per: str, values: Iterable[Tensor]) -> dict[str, Tensor]:
    groups = zip(by_group(laplace, per).values(), values, strict=True)
    return {key: value for keys, value in groups for key in keys}


# Concavity


CONCAVE = {(name, s): fit_net(name, structure=s) for name in ("mlp", "cnn", "twice") for s in FAMILY_NAMES}
LOGS = st.floats(-12, 12, allow_nan=False)


@settings(max_examples=10)
@given(st.lists(LOGS, min_size=16, max_size=16), st.sampled_from(sorted(CONCAVE)), st.sampled_from(PER))
def test_the_evidence_is_concave_in_the_logarithms(logs: list[float], key: tuple[str, str], per: str) -> None:
    """Of all precisions and of the noise's scale: the middle of two points is never below the mean of their values."""
    laplace = CONCAVE[key]
    groups = len(by_group(laplace, per))

    def value(log_priors: Tensor, log_scale: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood(as_prior(laplace, per, log_priors.exp()), noise_scale=log_scale.exp())

    first, second = torch.tensor(logs, dtype=torch.float64).reshape(2, 8)
    ends = [value(point[:groups], point[-1] / 4) for point in (first, second)]
    middle = (first + second) / 2
    slack = 1e-12 * sum(abs(end) for end in ends)
    assert value(middle[:groups], middle[-1] / 4) >= (ends[0] + ends[1]) / 2 - slack


# The maximum


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "twice", "tied to words"])
def test_the_gradient_vanishes_at_the_optimum(name: str, structure: str, per: str) -> None:
    """And each group is at MacKay's fixed point ``δ ‖M‖² = γ``, the number of its well-determined parameters."""
    laplace = fit_net(name, structure=structure, temperature=0.8).optimize_prior_precision(per=per)
    values = found(laplace, per)
    logs = torch.tensor(list(values.values()), dtype=torch.float64).log().requires_grad_()
    value = laplace.log_marginal_likelihood(as_prior(laplace, per, logs.exp()))
    (gradient,) = torch.autograd.grad(value, logs)
    assert gradient.abs().max() < 1e-4
    posterior_variance = {}
    data = fishers(laplace)
    by_weight = precisions(laplace)
    for layer_name, layer in laplace.layers.items():
        prior = layer.matrix({key: by_weight[key] for key in layer.parameters})
        covariance = torch.linalg.inv(11 / 0.8 * data[layer_name] + torch.diag_embed(prior.flatten(-2)))
        posterior_variance |= layer.tensors(covariance.diagonal(dim1=-2, dim2=-1).reshape(layer.shape))
    named = dict(laplace.model.named_parameters())
    for group, keys in by_group(laplace, per).items():
        well_determined = sum(float((1 - values[group] * posterior_variance[key]).sum()) for key in keys)
        norm = sum(float(named[key].detach().square().sum()) for key in keys)
        assert values[group] * norm == pytest.approx(well_determined, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("per", PER)
def test_the_optimum_does_not_depend_on_the_start(per: str, structure: str, dtype: torch.dtype) -> None:
    """From 1e-12, which is outside of the bounds, to 1e12; a second search stays where the first ended."""
    laplace = fitted(mlp().to(dtype), gaussian().to(dtype), batches(X.to(dtype), Y.to(dtype)), structure=structure)
    expected = found(laplace.optimize_prior_precision(per=per), per)
    assert found(laplace.optimize_prior_precision(per=per), per) == pytest.approx(expected, rel=1e-4)
    for start in (1e-12, 1e-6, 1e6, 1e12) if per == "model" else (1e-12, 1e6):
        laplace.prior_precision = {name: torch.tensor(start, dtype=torch.float64) for name in laplace.layers}
        assert found(laplace.optimize_prior_precision(per=per), per) == pytest.approx(expected, rel=1e-4)


def test_far_starts_of_real_data_in_single_precision_find_the_optimum() -> None:
    """Pixels that are always dark leave factors singular, and their rounding must not lead the search astray.

    From precisions at the ends of what is allowed, where the evidence is all but linear in the logarithms.
    """
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    x, optimizer = x.float() / 16, torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    laplace = fitted(model, Categorical(), [(x, y)])
    results = []
    for start in (1.0, 1e-10):
        laplace.prior_precision = {name: torch.tensor(start, dtype=torch.float64) for name in laplace.layers}
        results.append(found(laplace.optimize_prior_precision(per="parameter"), "parameter"))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["norm", "twice"])
def test_noise_and_prior_have_one_optimum_from_anywhere(name: str, structure: str) -> None:
    """Of known and of learned noise, whatever it was when the data were measured; both gradients vanish."""
    net = NETS[name]
    results = []
    for scale, start in ((0.7, 1.0), (1e-2, 1e-3), (30.0, 1e4)):
        for likelihood in (Gaussian(torch.tensor(scale, dtype=torch.float64)), learned(scale)):
            laplace = fitted(net.make(), likelihood, batches(net.x, net.y), structure=structure, prior_precision=start)
            laplace.optimize_prior_precision(noise=True)
            results.append({**found(laplace, "layer"), "noise": float(laplace.posterior().likelihood.noise_scale)})
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4)
    logs = torch.tensor(list(results[0].values()), dtype=torch.float64).log().requires_grad_()
    prior = dict(zip(laplace.layers, logs[:-1].exp(), strict=True))
    value = laplace.log_marginal_likelihood(prior, noise_scale=logs[-1].exp())
    (gradient,) = torch.autograd.grad(value, logs)
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize("measured", [0.3, 1.0])
def test_noise_is_found_in_single_precision_far_below_what_it_was_measured_at(measured: float) -> None:
    """Residuals of 4e-4, whose squares float32 would round away in the sum of the losses."""
    x, noise = randn(500, 3, seed=0), 4e-4 * randn(500, 1, seed=1)
    y = x.sum(1, keepdim=True) + noise
    weight = torch.linalg.lstsq(x, y).solution.mT
    results = []
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(3, 1, bias=False).to(dtype)
        with torch.no_grad():
            model.weight.copy_(weight)
        laplace = fitted(model, Gaussian(measured), [(x.to(dtype), y.to(dtype))])
        results.append(float(laplace.optimize_prior_precision(noise=True).posterior().likelihood.noise_scale))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[1] == pytest.approx(4e-4, rel=0.1)


def learned(scale: float) -> nn.Module:
    return Gaussian(bk.likelihoods.noise.LearnedNoise(torch.tensor(scale, dtype=torch.float64)))


def test_a_tuned_noise_is_in_the_posterior_and_in_the_evidence() -> None:
    """Blocks and predictions are those of a fit with this noise from scratch; a later search starts there."""
    laplace = fit_net("mlp").optimize_prior_precision(noise=True)
    posterior = laplace.posterior()
    scale = posterior.likelihood.noise_scale.clone()
    again = fitted(mlp(), Gaussian(scale), batches(X, Y), prior_precision=dict(laplace.prior_precision))
    assert abs(float(scale) - 0.7) > 1e-2
    for name, block in again.posterior().blocks.items():
        assert_close(posterior.blocks[name].to_dense(), block.to_dense(), rtol=1e-9, atol=1e-9)
    assert_close(posterior.predict(X).covariance, again.posterior().predict(X).covariance, rtol=1e-9, atol=1e-9)
    assert_close(laplace.log_marginal_likelihood(), again.log_marginal_likelihood(), rtol=1e-9, atol=0)
    assert_close(
        laplace.log_marginal_likelihood(noise_scale=0.7),
        fit_net("mlp").log_marginal_likelihood(dict(laplace.prior_precision)),
        rtol=1e-9,
        atol=0,
    )
    before = laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision()  # the prior alone: the noise stays
    assert torch.equal(laplace.posterior().likelihood.noise_scale, scale)
    assert laplace.log_marginal_likelihood() >= before - 1e-9


def test_another_fit_forgets_the_noise_and_an_update_keeps_it() -> None:
    laplace = fit_net("mlp").optimize_prior_precision(noise=True)
    tuned = laplace.posterior().likelihood.noise_scale.clone()
    laplace.update(batches(X, 10 * Y), progress=False)
    assert torch.equal(laplace.posterior().likelihood.noise_scale, tuned)
    with pytest.raises(ArgumentError, match="yielded no example"):
        laplace.fit([], progress=False)
    assert torch.equal(laplace.posterior().likelihood.noise_scale, tuned)  # a fit that failed changes nothing
    laplace.fit(batches(X, 10 * Y), progress=False)
    fresh = fitted(mlp(), gaussian(), batches(X, 10 * Y), prior_precision=dict(laplace.prior_precision))
    assert torch.equal(laplace.posterior().likelihood.noise_scale, fresh.posterior().likelihood.noise_scale)
    assert torch.equal(laplace.log_marginal_likelihood(), fresh.log_marginal_likelihood())


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["norm", "words", "classifier"])
def test_finer_groups_have_no_less_evidence(name: str, structure: str) -> None:
    """``per="model" ≤ "layer" ≤ "parameter"``, and each no less than the start."""
    laplace = fit_net(name, structure=structure)
    values = [float(laplace.log_marginal_likelihood())]
    values += [float(laplace.optimize_prior_precision(per=per).log_marginal_likelihood()) for per in PER]
    assert values == pytest.approx(sorted(values), abs=1e-8)
    assert values[1] > values[0]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_weights_that_are_zero_do_not_break_it(structure: str, per: str) -> None:
    """Their evidence grows with their precision for ever: it ends at the largest allowed, the others are fine."""
    model = mlp()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    laplace = fitted(model, gaussian(), batches(X, Y), structure=structure).optimize_prior_precision(per=per)
    values = found(laplace, per)
    assert all(math.isfinite(value) and 0 < value <= 1.0001e10 for value in values.values())
    assert math.isfinite(laplace.log_marginal_likelihood())
    assert torch.isfinite(laplace.posterior().predict(X).covariance).all()
    if per == "layer":
        assert values["0"] > 1e4
        alone = fitted(model, gaussian(), batches(X, Y), structure=structure, subset=["2"]).optimize_prior_precision()
        assert values["2"] == pytest.approx(found(alone, "layer")["2"], rel=1e-3)


def test_the_start_is_the_present_prior_in_each_of_its_forms() -> None:
    laplace = fit_net(
        "mlp", structure="diagonal", prior_precision={"0.weight": randn(4, 3, seed=1).exp(), "0.bias": 0.1, "2": 1e3}
    )
    expected = found(fit_net("mlp", structure="diagonal").optimize_prior_precision(), "layer")
    assert found(laplace.optimize_prior_precision(), "layer") == pytest.approx(expected, rel=1e-4)


# Bayesian linear regression


def test_prior_and_noise_are_those_of_bayesian_ridge() -> None:
    """The fixed point of scikit-learn's evidence maximisation, with its Gamma priors all but taken away.

    Of a linear model without bias on centred data, at the most probable weights of each round.
    """
    generator = rng(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-0.4], [0.2]], dtype=torch.float64)
    y = y + 0.5 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    ridge = BayesianRidge(
        alpha_1=1e-12, alpha_2=1e-12, lambda_1=1e-12, lambda_2=1e-12, tol=1e-12, max_iter=1000, fit_intercept=False
    ).fit(x.numpy(), y[:, 0].numpy())
    model = nn.Linear(3, 1, bias=False).double()
    for structure in ("dense", "kron"):
        precision, noise_precision = 1.0, 1.0
        for _ in range(200):
            matrix = noise_precision * x.T @ x + precision * torch.eye(3, dtype=torch.float64)
            with torch.no_grad():
                model.weight.copy_(torch.linalg.solve(matrix, noise_precision * x.T @ y).T)
            laplace = fitted(model, gaussian(), [(x, y)], structure=structure, prior_precision=precision)
            laplace.optimize_prior_precision(per="model", noise=True)
            before = (precision, noise_precision)
            precision = float(laplace.prior_precision["(root)"])
            noise_precision = float(laplace.posterior().likelihood.noise_scale) ** -2
            if (precision, noise_precision) == pytest.approx(before, rel=1e-7):
                break
        assert precision == pytest.approx(ridge.lambda_, rel=1e-5)
        assert noise_precision == pytest.approx(ridge.alpha_, rel=1e-5)
        assert_close(model.weight[0].detach(), torch.as_tensor(ridge.coef_), rtol=1e-5, atol=1e-7)


# Validation


GRID = [1e-3, 1e-1, 1.0, 10.0, 1e3]


def validation() -> tuple[bk.Laplace, list[tuple[Tensor, Tensor]]]:
    """A classifier with noisy labels, trained for a while, and data in batches of unequal size."""
    x = torch.randn(260, 2, generator=rng(0), dtype=torch.float64)
    y = (x + 0.2 * torch.randn(260, 2, generator=rng(1), dtype=torch.float64) > 0).sum(1)
    model = seeded(nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 3)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:60]), y[:60]).backward()
        optimizer.step()
    laplace = fitted(model, Categorical(), batches(x[:60], y[:60], 20), damping="factored")
    return laplace, list(zip(x[60:].split([7, 90, 103]), y[60:].split([7, 90, 103]), strict=True))


def nll_by_hand(laplace: bk.Laplace, loader: list[Any], prior: Any, temperature: float) -> float:
    """The mean over examples, not over batches, of minus the log of the probit's probability."""
    options = {"damping": "factored", "prior_precision": prior, "temperature": temperature}
    posterior = bk.Laplace(laplace.model, Categorical(), **options)
    posterior._fitted = laplace._fitted
    total = 0.0
    for x, y in loader:
        output = posterior.posterior().output(x)
        variance = output.covariance.diagonal(dim1=-2, dim2=-1)
        log_probs = (output.mean / (1 + math.pi / 8 * variance).sqrt()).log_softmax(-1)
        total -= float(log_probs.gather(1, y[:, None]).sum())
    return total / 200


def test_validation_takes_the_least_loss_of_each_values_own_posterior() -> None:
    """Nothing is carried over from one value to the next: in any order of the grid the same one is best."""
    laplace, loader = validation()
    by_hand = {value: nll_by_hand(laplace, loader, value, 1.0) for value in GRID}
    best = min(by_hand, key=by_hand.__getitem__)
    assert best not in {GRID[0], GRID[-1]}
    assert len({round(value, 4) for value in by_hand.values()}) == len(GRID)
    for grid in (GRID, GRID[::-1], [10.0, 1e-3, 1e3, 1.0, 0.1], iter(GRID), tuple(GRID)):
        laplace.optimize_prior_precision("validation", loader=loader, grid=grid, progress=False, link="probit")
        assert {name: float(value) for name, value in laplace.prior_precision.items()} == {"0": best, "2": best}
    assert set(laplace.posterior().prior_precision.values()) == {best}


@pytest.mark.parametrize("split", [[200], [1] * 5 + [195], [50] * 4, [0, 200, 0]])
def test_the_loss_is_a_mean_over_examples(split: list[int]) -> None:
    """Batches of unequal size weigh by their examples, and empty ones not at all."""
    laplace, loader = validation()
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    again = list(zip(x.split(split), y.split(split), strict=True))
    found_nll = tuning.mean_nll(laplace.posterior(), again, {"link": "probit"})
    assert found_nll == pytest.approx(nll_by_hand(laplace, loader, 1.0, 1.0), rel=1e-12)


def test_the_temperature_is_that_of_the_least_loss() -> None:
    laplace, loader = validation()
    by_hand = {value: nll_by_hand(laplace, loader, 1.0, value) for value in GRID}
    best = min(by_hand, key=by_hand.__getitem__)
    for grid in (GRID, GRID[::-1]):
        assert laplace.optimize_temperature(loader, grid=grid, progress=False, link="probit") is laplace
        assert laplace.temperature == laplace.posterior().provenance.temperature == best
    assert best != 1.0
    block, at_one = (fit.posterior().blocks["0"].to_dense() for fit in (laplace, validation()[0]))
    assert not torch.allclose(block, at_one)


def test_a_temperature_is_chosen_at_the_present_prior() -> None:
    laplace, loader = validation()
    laplace.prior_precision = {name: 0.01 * value for name, value in laplace.prior_precision.items()}
    by_hand = {value: nll_by_hand(laplace, loader, 0.01, value) for value in GRID}
    at_one = {value: nll_by_hand(laplace, loader, 1.0, value) for value in GRID}
    assert min(by_hand, key=by_hand.__getitem__) != min(at_one, key=at_one.__getitem__)
    laplace.optimize_temperature(loader, grid=GRID, progress=False, link="probit")
    assert laplace.temperature == min(by_hand, key=by_hand.__getitem__)
    assert {float(value) for value in laplace.prior_precision.values()} == {0.01}


def test_the_loader_is_read_again_for_each_value() -> None:
    """A ``DataLoader`` serves; a generator that is used up is an error, not a mean over nothing."""
    laplace, loader = validation()
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    passes: list[int] = []

    class Counting(list):
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            return super().__iter__()

    laplace.optimize_prior_precision("validation", loader=Counting(loader), grid=GRID, progress=False, link="probit")
    assert len(passes) == len(GRID)
    best = dict(laplace.prior_precision)
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    laplace.optimize_prior_precision("validation", loader=data, grid=GRID, progress=False, link="probit")
    assert laplace.prior_precision == best
    with pytest.raises(ArgumentError, match=r"yielded no example.*DataLoader"):
        laplace.optimize_prior_precision("validation", loader=iter(loader), grid=GRID, progress=False)
    assert laplace.prior_precision == best


def test_the_default_grid_is_21_values_from_1e_minus_4_to_1e4() -> None:
    grid = tuning.values_of(None)
    assert len(grid) == 21
    assert grid == pytest.approx([10.0 ** (-4 + 0.4 * k) for k in range(21)])
    laplace, loader = validation()
    laplace.optimize_prior_precision("validation", loader=loader, progress=False, link="probit")
    assert float(laplace.prior_precision["0"]) in [pytest.approx(value) for value in grid]


def test_the_way_to_predict_is_passed_on() -> None:
    """Link, method and generator reach ``predict``; what it does not know is its error."""
    laplace, loader = validation()
    for options in ({"link": "mc", "num_samples": 5, "generator": rng(0)}, {"method": "sampling", "num_samples": 3}):
        if "method" in options:
            with pytest.raises(TypeError, match="method"):
                laplace.optimize_prior_precision("validation", loader=loader, **options)
            laplace.optimize_temperature(loader, grid=GRID, progress=False, **options)
        else:
            laplace.optimize_prior_precision("validation", loader=loader, grid=GRID, progress=False, **options)
    with pytest.raises(ArgumentError, match="link='logit'"):
        laplace.optimize_prior_precision("validation", loader=loader, grid=GRID, progress=False, link="logit")


def test_progress_over_the_grid_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    laplace, loader = validation()
    laplace.optimize_prior_precision("validation", loader=loader, grid=GRID, progress=False, link="probit")
    laplace.optimize_temperature(loader, grid=GRID, progress=False, link="probit")
    assert capsys.readouterr() == ("", "")
    laplace.optimize_prior_precision("validation", loader=loader, grid=GRID, link="probit")
    assert "nll=" in capsys.readouterr().err


# Wrong calls


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "evidence"}, r"method='evidence' is unknown\. Allowed: 'marginal_likelihood', 'validation'"),
        ({"per": "weight"}, r"per='weight' is unknown\. Allowed: 'model', 'layer', 'parameter'"),
        ({"method": "validation"}, r"method='validation' needs loader="),
        ({"method": "validation", "loader": [(X, Y)], "noise": True}, "leaves noise=False"),
        ({"method": "validation", "loader": [(X, Y)], "grid": []}, r"grid=\[\] is empty"),
        ({"method": "validation", "loader": [(X, Y)], "grid": 3}, r"grid=3 is no collection.*\[3\]"),
        ({"method": "validation", "loader": [(X, Y)], "grid": [1.0, -2.0]}, r"-2\.0.*out of range"),
        ({"method": "validation", "loader": [(X, Y)], "grid": ["one"]}, "'one' is not a number"),
        ({"method": "validation", "loader": []}, "yielded no example"),
        ({"method": "validation", "loader": [(X, Y, torch.ones(11, dtype=torch.bool))]}, "yields masks"),
        ({"method": "validation", "loader": [X]}, "loader yielded a Tensor"),
        ({"method": "validation", "loader": [(X, Y)], "per": "weight"}, "per='weight' is unknown"),
        ({"loader": [(X, Y)]}, "loader=.* for method='validation'"),
        ({"grid": [1.0]}, "grid=.* for method='validation'"),
        ({"link": "probit"}, "arguments of predict are for method='validation'"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(options: dict[str, Any], match: str) -> None:
    """And the prior stays what it was."""
    laplace = fit_net("mlp", prior_precision=0.3)
    with pytest.raises(ArgumentError, match=match):
        laplace.optimize_prior_precision(**{"progress": False, **options})
    assert {float(value) for value in laplace.prior_precision.values()} == {0.3}


def test_wrong_temperature_grids_are_named() -> None:
    laplace = fit_net("mlp")
    for grid, match in (
        (3, "grid=3 is no collection"),
        ([], r"grid=\[\] is empty"),
        ([0.0], r"temperature=0\.0 is out of range"),
    ):
        with pytest.raises(ArgumentError, match=match):
            laplace.optimize_temperature([(X, Y)], grid=grid, progress=False)
    assert laplace.temperature == 1.0


@pytest.mark.parametrize("loader", [None, 3])
def test_validation_data_that_are_none_are_named(loader: Any) -> None:
    laplace = fit_net("mlp")
    with pytest.raises(ArgumentError, match=f"loader={loader} is not iterable. Allowed: a DataLoader"):
        laplace.optimize_temperature(loader, progress=False)
    assert laplace.temperature == 1.0


@pytest.mark.parametrize("name", ["mlp", "classifier"])
@pytest.mark.parametrize("tune", ["prior", "temperature"])
def test_validation_data_with_nan_are_an_error(tune: str, name: str) -> None:
    """Not a grid of which every value is as good as the first."""
    laplace, x = fit_net(name), X.clone()
    x[3] = torch.nan
    loader, options = [(x, NETS[name].y)], {"progress": False, **({"link": "probit"} if name == "classifier" else {})}

    def optimize() -> None:
        if tune == "prior":
            laplace.optimize_prior_precision("validation", loader=loader, **options)
        else:
            laplace.optimize_temperature(loader, **options)

    # a regression's Gaussian is refused by torch itself, with or without the checks that Pyro turns off
    with pytest.raises((bk.errors.NonFiniteError, ValueError, torch.linalg.LinAlgError)):
        optimize()
    assert float(laplace.prior_precision["0"]) == laplace.temperature == 1.0


def test_a_value_whose_predictions_are_not_finite_is_never_the_best() -> None:
    """Wherever it stands in the grid; comparisons with NaN are false."""
    losses = {"bad": math.nan, "best": 0.5, "worse": 0.7}
    for order in (["bad", "worse", "best"], ["best", "bad", "worse"], ["worse", "best", "bad"]):
        assert tuning.least({name: losses[name] for name in order}) == "best"
    with pytest.raises(bk.errors.NonFiniteError, match="At no value of the grid"):
        tuning.least({"bad": math.nan, "worst": math.inf})


@pytest.mark.parametrize("size", [0.0, 1e-9])
@pytest.mark.parametrize("per", ["model", "layer", "parameter"])
def test_no_noise_is_found_where_the_targets_are_the_models_own_outputs(per: str, size: float) -> None:
    """The evidence has no maximum there: an error that says so, and the fit as it was; also up to rounding."""
    model = seeded(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = randn(30, 2, seed=8)
    y = model(x).detach() + size * randn(30, 1, seed=9)
    likelihood = Gaussian(torch.tensor(0.7, dtype=torch.float64))
    laplace = bk.Laplace(model, likelihood, prior_precision=2.0).fit([(x, y)], progress=False)
    before, evidence = dict(laplace.prior_precision), laplace.log_marginal_likelihood()
    with pytest.raises(NonFiniteError, match=r"as the noise's scale goes to 0.*Nothing was changed.*noise=False"):
        laplace.optimize_prior_precision(noise=True, per=per)
    assert laplace.prior_precision == before
    assert torch.equal(laplace.log_marginal_likelihood(), evidence)
    assert float(laplace.posterior().likelihood.noise_scale) == pytest.approx(0.7)
