"""What users do at the edges: nothing is lost or left half changed, and errors say what is allowed."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import likelihoods
from bayes_kfac.errors import ArgumentError, TargetError, UnsupportedModelError, UsageError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 3, generator=GENERATOR), torch.randn(16, 2, generator=GENERATOR)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def fitted(model: nn.Module | None = None, likelihood: Any = None, **options: Any) -> bk.Laplace:
    likelihood = likelihood or likelihoods.Gaussian(0.5)
    return bk.Laplace(model or net(), likelihood, **options).fit([(X, Y)], progress=False)


def step(optimizer: bk.NoisyNaturalGradient, target: torch.Tensor = Y) -> None:
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(X), target).backward()
    optimizer.step()


# -- the likelihood's own parameters


def test_a_noise_that_is_unfrozen_or_replaced_is_trained() -> None:
    likelihood = likelihoods.Gaussian("learned").requires_grad_(False)
    optimizer = bk.NoisyKFAC(net(), likelihood, num_data=16)
    step(optimizer)
    assert float(likelihood.noise_scale) == 1
    likelihood.requires_grad_(True)
    step(optimizer)
    assert float(likelihood.noise_scale) != 1
    likelihood.noise = likelihoods.LearnedNoise(0.5)
    step(optimizer)
    assert float(likelihood.noise_scale) != 0.5
    assert likelihood.noise.log_scale in {p for group in optimizer.param_groups for p in group["params"]}


def test_a_noise_that_comes_where_there_was_none_is_refused() -> None:
    likelihood = likelihoods.Gaussian(0.5)
    optimizer = bk.NoisyKFAC(net(), likelihood, num_data=16)
    likelihood.noise = likelihoods.LearnedNoise(0.5)
    with pytest.raises(UsageError, match="Make a new optimizer"):
        step(optimizer)


@pytest.mark.parametrize("others", ["error", "diagonal", "deterministic"])
def test_a_likelihood_that_the_model_holds_is_trained_once(others: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.likelihood = net(), likelihoods.Gaussian("learned")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    model = Model()
    optimizer = bk.NoisyKFAC(model, model.likelihood, num_data=16, others=others)
    step(optimizer)
    assert abs(float(model.likelihood.noise.log_scale.detach())) == pytest.approx(0.01, rel=1e-4)  # Adam's first step


def test_a_mask_inside_of_the_model_is_refused() -> None:
    likelihood = likelihoods.Gaussian(0.5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.body(x)
            return {"loss": likelihood(out, target, mask=target[:, 0] > 0), "logits": out}

    model = Model()
    optimizer = bk.NoisyKFAC(model, likelihood, num_data=16)
    with pytest.raises(UnsupportedModelError, match="Call it in the loop"), optimizer.sampled_params():
        model(X, Y)


# -- the optimizer


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.nan), ("lr", -1.0), ("momentum", 1.5), ("prior_precision", -1.0), ("statistics_decay", "a")],
)
def test_options_that_are_set_on_the_way_are_checked_before_a_step(name: str, value: Any) -> None:
    optimizer = bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16)
    step(optimizer)
    before = [p.clone() for p in optimizer.model.parameters()]
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ArgumentError, match=rf"param_groups\[0\]\['{name}'\]"):
        step(optimizer)
    for now, then in zip(optimizer.model.parameters(), before, strict=True):
        assert torch.equal(now, then)
    assert optimizer.steps == 1
    bad = optimizer.state_dict()
    optimizer.param_groups[0][name] = good
    with pytest.raises(ArgumentError, match=name):
        optimizer.load_state_dict(bad)
    step(optimizer)
    assert optimizer.steps == 2


def test_a_length_that_rounds_below_zero_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a step may seem to lead uphill where the prior decides; its length was NaN, and then every weight."""
    optimizer = bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16)
    step(optimizer)
    monkeypatch.setattr(type(optimizer._blocks), "squared_length", lambda *_: torch.tensor(-1e-3))
    step(optimizer)
    assert float(optimizer.clip_factor) == 1
    assert all(bool(p.isfinite().all()) for p in optimizer.model.parameters())


def test_a_closure_may_return_anything_for_one_sample_and_numbers_for_several() -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(X), Y).backward()
        return answer

    optimizer, answer = bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16), None
    assert optimizer.step(closure) is None
    answer = {"loss": 1.0}
    assert optimizer.step(closure) == answer
    assert optimizer.steps == 2
    optimizer = bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16, num_samples=2)
    with pytest.raises(ArgumentError, match="closure returned dict"):
        optimizer.step(closure)
    assert optimizer.steps == 0
    with pytest.raises(ArgumentError, match="closure=5"):
        optimizer.step(5)


def test_the_state_of_another_devices_generator_changes_nothing() -> None:
    def make() -> bk.NoisyKFAC:
        return bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16, generator=torch.Generator())

    optimizer, other = make(), make()
    step(optimizer)
    state = optimizer.state_dict()
    state["bayes_kfac"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as long as one of CUDA
    with pytest.raises(ArgumentError, match="generator="):
        other.load_state_dict(state)
    assert other.steps == 0
    with other.sampled_params(), pytest.raises(UsageError, match="load_state_dict"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", ["model", "likelihood", "structure", "generator"])
def test_what_an_optimizers_parts_hold_on_to_is_settled(name: str) -> None:
    optimizer = bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16)
    with pytest.raises(AttributeError, match=f"{name} is settled"):
        setattr(optimizer, name, getattr(optimizer, name))


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ({"params": []}, "a list of groups"),
        ("a", "a list of groups"),
        (3, "a list of groups"),
        ([{"lr": 1.0}], r"groups\[0\] is"),
        ([None], r"groups\[0\] is None"),
        ([{"params": nn.Linear(1, 1)}], "a Linear for params"),
        ([{"params": [("weight", nn.Parameter(torch.ones(1)))]}], "in its params"),
    ],
)
def test_groups_that_are_none_are_named(groups: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        bk.NoisyKFAC(net(), likelihoods.Gaussian(0.5), num_data=16, groups=groups)


def test_fit_goes_past_batches_without_any_target() -> None:
    nothing = torch.zeros(16, dtype=torch.bool)
    loader = [(X, Y, nothing), (X, Y, ~nothing)]
    options: dict[str, Any] = {"num_data": 16, "epochs": 1, "progress": False}
    posterior = bk.fit(net(), likelihoods.Gaussian(0.5), loader, **options)
    assert posterior.predict(X).mean.shape == (16, 2)
    with pytest.raises(ArgumentError, match="scheduler='cosine'"):
        bk.fit(net(), likelihoods.Gaussian(0.5), loader, scheduler="cosine", **options)


# -- outputs in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit", [-9.0, -7.0, 7.0, 9.0])
def test_the_fisher_of_small_probabilities_survives_outputs_in_16_bits(dtype: torch.dtype, logit: float) -> None:
    from bayes_kfac.curvature.fisher import output_gradients

    probability = torch.tensor(logit, dtype=torch.float64).sigmoid()
    true = float(probability * (1 - probability))
    output = torch.full((200_000, 1), logit, dtype=dtype)
    own = {"generator": torch.Generator().manual_seed(0)}
    for kind, tolerance in (("exact", 0.01), ("mc", 0.4)):
        gradients = output_gradients(likelihoods.Bernoulli(), output, kind, **(own if kind == "mc" else {}))
        assert gradients.dtype == dtype
        assert float(gradients.double().square().mean()) == pytest.approx(true, rel=tolerance)


def test_counts_and_precise_targets_have_a_fisher_in_float16() -> None:
    from bayes_kfac.curvature.fisher import output_gradients

    output = torch.zeros(8, 1, dtype=torch.float16)
    for likelihood in (likelihoods.Poisson(), likelihoods.Gaussian(0.003)):
        for kind in ("mc", "exact"):
            assert bool(output_gradients(likelihood, output, kind).isfinite().all())


def test_the_fisher_of_a_binary_target_is_even_in_its_logit() -> None:
    roots = likelihoods.Bernoulli().fisher_root(torch.tensor([[17.0], [-17.0]]))[0]
    assert_close(roots[0], roots[1])
    assert float(roots[0]) > 0


# -- Laplace and predictions


def test_what_a_laplace_was_made_with_is_not_set_in_vain() -> None:
    laplace = bk.Laplace(net(), likelihoods.Gaussian(0.5))
    for name in ("damping", "sharing", "subset", "others"):
        with pytest.raises(AttributeError, match=f"{name} is settled"):
            setattr(laplace, name, "optimal")
    with pytest.raises(ArgumentError, match="generator=3"):
        laplace.generator = 3
    with pytest.raises(ArgumentError, match="memory_budget"):
        laplace.memory_budget = 0
    with pytest.raises(ArgumentError, match="trainer=3"):
        bk.Laplace.from_trainer(3, [(X, Y)])


@pytest.mark.parametrize("value", [1e-50, 1e50])
def test_a_prior_that_the_dtype_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"prior_precision.*float32"):
        bk.Laplace(net(), likelihoods.Gaussian(0.5), prior_precision=value)
    assert bk.Laplace(net().double(), likelihoods.Gaussian(0.5), prior_precision=value).prior_precision["0"] == value


def test_tuning_names_wrong_arguments_and_data() -> None:
    laplace = fitted()
    with pytest.raises(ArgumentError, match=r"noise=0\.5"):
        laplace.optimize_prior_precision(noise=0.5)
    with pytest.raises(ArgumentError, match="temperature"):
        laplace.optimize_temperature([(X, Y)], grid=["a"], progress=False)
    with pytest.raises(TargetError, match="NaN"):
        laplace.optimize_prior_precision("validation", loader=[(X, Y * math.nan)], progress=False)
    with pytest.raises(TargetError, match="NaN"):
        laplace.posterior().predict(X, "sampling").log_prob(Y * math.nan)
    assert laplace.temperature == 1


def test_what_is_made_in_inference_mode_may_be_differentiated_afterwards(tmp_path: Any) -> None:
    laplace = fitted()
    with torch.inference_mode():
        laplace.log_marginal_likelihood()
        posterior = laplace.posterior()
        posterior.save(tmp_path / "posterior.safetensors")
        again = bk.Posterior.load(tmp_path / "posterior.safetensors", net())
        draws = posterior.sample(3)
    laplace.optimize_prior_precision()
    inputs = X.clone().requires_grad_()
    total = posterior.predict(inputs).variance.sum() + again.predict(inputs).mean.sum()
    (total + posterior.predict(inputs, draws=draws).variance.sum()).backward()
    assert inputs.grad is not None


def test_layers_that_the_output_does_not_depend_on_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.spare = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    with pytest.raises(UsageError, match="layers spare"):
        fitted(Model(), subset="last_layer")


def test_one_example_is_no_batch() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match="a single example"):
        bk.Laplace(model, likelihoods.Gaussian(0.5)).fit(list(zip(X, Y, strict=True)), progress=False)
    with pytest.raises(ArgumentError, match="a single example"):
        fitted(model).posterior().predict(X[0])
    with pytest.raises(ArgumentError, match="a single example"):
        bk.fit(model, likelihoods.Gaussian(0.5), list(zip(X, Y, strict=True)), num_data=16, epochs=1, progress=False)
    labels = torch.arange(16) % 2
    with pytest.raises(ArgumentError, match="a single example"):
        bk.Laplace(model, likelihoods.Categorical()).fit(list(zip(X, labels, strict=True)), progress=False)


def test_quantiles_of_counts_are_nan_where_the_prediction_is() -> None:
    counts = (Y[:, :1] > 0).float()
    laplace = bk.Laplace(nn.Linear(3, 1), likelihoods.Poisson()).fit([(X, counts)], progress=False)
    prediction = laplace.posterior().predict(torch.full((1, 3), math.nan))
    assert all(bool(end.isnan().all()) for end in prediction.interval(0.9))


@pytest.mark.parametrize("noise", [0.5, likelihoods.GammaNoise(6.0, 6.0)])
@pytest.mark.parametrize("figure", ["log_prob", "cdf", "quantile"])
def test_figures_of_a_mixture_have_gradients_in_the_inputs(noise: Any, figure: str) -> None:
    model, x, y = net().double(), X[:2].double(), Y[:2].double()
    likelihood = likelihoods.Gaussian(noise).double()
    laplace = bk.Laplace(model, likelihood).fit([(X.double(), Y.double())], progress=False)
    posterior = laplace.posterior()
    draws = posterior.sample(8, generator=torch.Generator().manual_seed(0))

    def value(inputs: torch.Tensor) -> torch.Tensor:
        prediction = posterior.predict(inputs, draws=draws)
        return getattr(prediction, figure)(0.3 if figure == "quantile" else y)

    assert torch.autograd.gradcheck(value, x.clone().requires_grad_(), rtol=1e-3, atol=1e-5)


def test_a_module_that_is_replaced_after_a_prediction_is_refused() -> None:
    model = net()
    posterior = fitted(model).posterior()
    posterior.predict(X)
    model[2] = nn.Linear(4, 2)
    with pytest.raises(UnsupportedModelError):
        posterior.predict(X)


def test_functions_that_share_no_weight_are_independent() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return self.heads[int(head)](x)

    first, second = torch.tensor(0), torch.tensor(1)
    laplace = bk.Laplace(Heads(), likelihoods.Gaussian(0.5))
    posterior = laplace.fit([((X, head), Y) for head in (first, second)], progress=False).posterior()
    assert_close(posterior.function_covariance((X, first), (X[:3], second)), torch.zeros(16, 3, 2, 2))
    assert bool((posterior.function_covariance((X, first), (X[:3], first)) != 0).any())


def test_the_laplace_bridge_thinks_nothing_impossible() -> None:
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        model.bias.zero_()
    data = torch.linspace(-1, 1, 30)[:, None], torch.arange(30) % 3
    posterior = bk.Laplace(model, likelihoods.Categorical()).fit([data], progress=False).posterior()
    prediction = posterior.predict(torch.tensor([[80.0]]), link="laplace_bridge")
    assert bool((prediction.alpha > 0).all())
    assert bool(prediction.log_prob(torch.tensor([2])).isfinite().all())


# -- where gradients vanish


@pytest.mark.parametrize("structure", ["kron", "kbfgs", "ikfac", "foof", "skfac"])
@pytest.mark.parametrize("damping", ["factored", "optimal"])
def test_factors_of_very_unequal_size_leave_the_prior(structure: str, damping: str) -> None:
    """A ratio of traces beyond float32 is no error: where no gradient arrives the posterior is the prior."""
    torch.manual_seed(0)
    layers = [module for _ in range(24) for module in (nn.Linear(8, 8), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(8, 1))
    data = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.randn(32, 1)
    try:
        laplace = bk.Laplace(model, likelihoods.Gaussian(1.0), structure=structure, damping=damping)
    except ArgumentError:
        pytest.skip("a structure has its own dampings")
    variance = laplace.fit([data], progress=False).posterior().blocks["0"].marginal_variance()
    assert_close(variance, torch.ones_like(variance))


def test_what_is_for_reading_may_be_copied_pickled_and_given_back() -> None:
    laplace = fitted()
    for own in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        found = own(laplace.prior_precision)
        assert type(found) is dict
        assert found == laplace.prior_precision
    laplace.prior_precision = laplace.prior_precision
    with pytest.raises(TypeError, match="Set the attribute as a whole"):
        laplace.prior_precision["0"] = torch.ones(())
