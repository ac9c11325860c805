"""The posterior: a snapshot, a Gaussian with a divergence and densities, and what it says to wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.curvature import Statistics, find_layers
from bayes_kfac.distributions import MatrixNormal
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Bernoulli, Categorical, GammaNoise, Gaussian, Likelihood
from bayes_kfac.prediction import BernoulliPrediction, CategoricalPrediction, GaussianPrediction, MixturePrediction
from tests.helpers import block, randn, rng, seeded
from tests.posteriors import DAMPING_KINDS, dense_covariances, random_posterior

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
METHODS = ["linearized", "sampling"]


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))


def cnn() -> nn.Module:
    return seeded(nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)))


def scramble(module: nn.Module) -> None:
    """Give every parameter and floating-point buffer another value, in place."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(-2).add_(1)


# As it is printed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Categorical(), Bernoulli()])
def test_what_is_printed_is_shapes_and_origin(likelihood: Likelihood, method: str) -> None:
    """A line for any number of examples, and no numbers of theirs."""
    posterior = random_posterior(mlp(), likelihood.double())
    assert repr(posterior).startswith("Posterior(layers=['0', '2'], Provenance(method=")
    shown = repr(posterior.predict(randn(1000, 3, seed=1), method, num_samples=2))
    assert shown.startswith(("Gaussian", "Mixture", "Categorical", "Bernoulli"))
    assert f"(mean of shape (1000, 2), Source(method='{method}'" in shown
    assert "\n" not in shown


# A snapshot


@pytest.mark.parametrize("method", METHODS)
def test_later_training_does_not_change_it(method: str) -> None:
    """Weights, buffers and the likelihood's own parameters are the posterior's, to the last bit."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))).train()
    likelihood = Gaussian("learned").double()
    posterior = random_posterior(model, likelihood)
    x, y = randn(5, 3, seed=1), randn(5, 2, seed=2)

    def results() -> list[Tensor]:
        prediction = posterior.predict(x, method, num_samples=4, generator=rng(0))
        return [prediction.mean, prediction.covariance, prediction.log_prob(y), posterior.kl()]

    before = results()
    likelihood(model(x), y).backward()
    scramble(model)
    scramble(likelihood)
    assert all(torch.equal(old, new) for old, new in zip(before, results(), strict=True))


def test_the_callers_likelihood_is_left_alone() -> None:
    """The posterior's copy asks for no gradients; the original goes on learning."""
    likelihood = Gaussian("learned")
    posterior = random_posterior(mlp(), likelihood)
    assert posterior.likelihood is not likelihood
    assert all(parameter.requires_grad for parameter in likelihood.parameters())
    assert not any(parameter.requires_grad for parameter in posterior.likelihood.parameters())


def test_changing_the_posterior_does_not_change_the_model() -> None:
    model = mlp()
    weight = model[0].weight.detach().clone()
    posterior = random_posterior(model, Gaussian(0.5))
    for value in posterior.mean.values():
        value.zero_()
    assert torch.equal(model[0].weight, weight)


# The Gaussian


def dense_kl(posterior: bk.Posterior) -> Tensor:
    """``KL(q ‖ p)`` by torch's multivariate normals, block by block."""
    total = torch.zeros((), dtype=torch.float64)
    for name, covariance in dense_covariances(posterior).items():
        mean = block(posterior.layers[name], posterior.mean).flatten(-2)
        prior = MultivariateNormal(
            torch.zeros_like(mean), torch.eye(mean.shape[-1]).double() / posterior.prior_precision[name]
        )
        total = total + kl_divergence(MultivariateNormal(mean, covariance), prior).sum()
    return total


@pytest.mark.parametrize("damping", DAMPING_KINDS)
@pytest.mark.parametrize("make", [mlp, cnn])
def test_kl_is_the_dense_gaussians(make: Callable[[], nn.Module], damping: str) -> None:
    """Also with groups, and a prior precision of each layer's own."""
    posterior = random_posterior(make(), Gaussian(0.5), damping=damping)
    posterior.prior_precision = {name: 0.7 + 2.0 * index for index, name in enumerate(posterior.blocks)}
    assert posterior.kl().shape == ()
    assert_close(posterior.kl(), dense_kl(posterior), **CLOSE)
    assert not posterior.kl().requires_grad


def test_kl_includes_the_likelihoods_own() -> None:
    """A Gamma belief about the noise has a divergence too."""
    noise = GammaNoise(6.0, 6.0).double()
    with torch.no_grad():
        noise.log_rate.sub_(1.0)
    posterior = random_posterior(mlp(), Gaussian(noise))
    assert noise.kl() > 0.1
    assert_close(posterior.kl(), dense_kl(posterior) + noise.kl().detach(), **CLOSE)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_kl_of_the_prior_is_zero(damping: str) -> None:
    """No data and a mean of zero: the posterior is the prior."""
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    factors = {"input": torch.zeros(4, 4).double(), "gradient": torch.zeros(2, 2).double()}
    spec = bk.structures.BlockSpec("(root)", Statistics(factors, {"input": 1.0, "gradient": 1.0}), 20.0, 1.7)
    gaussians = bk.structures.get("kron", damping=damping, sharing="expand").gaussians([spec])
    provenance = random_posterior(model, Gaussian(0.5)).provenance
    posterior = bk.Posterior(
        model, Gaussian(0.5), {"(root)": gaussians[0]}, prior_precision={"(root)": 1.7}, provenance=provenance
    )
    assert_close(posterior.kl(), torch.zeros((), dtype=torch.float64), rtol=0.0, atol=1e-12)
    assert_close(dense_covariances(posterior)["(root)"], torch.eye(8).double() / 1.7, **CLOSE)


@pytest.mark.parametrize("damping", ["factored", "optimal"])
def test_distribution_is_the_layers_matrix_normal(damping: str) -> None:
    """Mean ``[weight, bias]``, and the log-density of the dense Gaussian over its rows laid end to end."""
    model = mlp()
    posterior = random_posterior(model, Gaussian(0.5), damping=damping)
    scramble(model)
    for name, covariance in dense_covariances(posterior).items():
        distribution = posterior.distribution(name)
        mean = block(posterior.layers[name], posterior.mean)
        assert isinstance(distribution, MatrixNormal)
        assert distribution.batch_shape == ()
        assert_close(distribution.mean, mean, rtol=0.0, atol=0.0)
        value = mean + randn(3, *mean.shape, seed=5)
        expected = MultivariateNormal(mean.flatten(), covariance).log_prob(value.flatten(1))
        assert_close(distribution.log_prob(value), expected, **CLOSE)


def test_distribution_of_groups_is_a_batch() -> None:
    posterior = random_posterior(cnn(), Gaussian(0.5))
    distribution = posterior.distribution("0")
    mean, covariance = block(posterior.layers["0"], posterior.mean), dense_covariances(posterior)["0"]
    assert (distribution.batch_shape, distribution.event_shape) == ((2,), (2, 3))
    value = mean + randn(*mean.shape, seed=5)
    expected = MultivariateNormal(mean.flatten(1), covariance).log_prob(value.flatten(1))
    assert_close(distribution.log_prob(value), expected, **CLOSE)


def test_exact_damping_has_no_matrix_normal() -> None:
    posterior = random_posterior(mlp(), Gaussian(0.5), damping="exact")
    with pytest.raises(ArgumentError, match=r"layer '0' \(damping='exact'\) is not a matrix normal.*'optimal'"):
        posterior.distribution("0")


def test_unknown_layer_says_what_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"layer='1' is unknown. Allowed: '0', '2'"):
        random_posterior(mlp(), Gaussian(0.5)).distribution("1")


# Predictions


@pytest.mark.parametrize(
    ("likelihood", "method", "kind"),
    [
        (Gaussian(0.5), "linearized", GaussianPrediction),
        (Gaussian(0.5), "sampling", MixturePrediction),
        (Categorical(), "linearized", CategoricalPrediction),
        (Categorical(), "sampling", CategoricalPrediction),
        (Bernoulli(), "linearized", BernoulliPrediction),
        (Bernoulli(), "sampling", BernoulliPrediction),
    ],
)
def test_predictions_say_where_they_came_from(likelihood: Likelihood, method: str, kind: type) -> None:
    """Method, number of draws (``None`` in closed form), and how the posterior was made."""
    posterior = random_posterior(mlp(), likelihood, damping="optimal")
    prediction = posterior.predict(randn(5, 3, seed=1), method, num_samples=6, generator=rng(0))
    assert type(prediction) is kind
    assert prediction.source.method == method
    assert prediction.source.num_samples == (None if kind is GaussianPrediction else 6)
    assert prediction.source.posterior == posterior.provenance
    assert prediction.source.posterior.damping == "optimal"
    assert prediction.mean.shape == (5, 2)
    assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance, rtol=0.0, atol=0.0)


def test_linearised_is_the_default() -> None:
    posterior, x = random_posterior(mlp(), Gaussian(0.5)), randn(5, 3, seed=1)
    assert torch.equal(posterior.predict(x).covariance, posterior.predict(x, "linearized").covariance)


def test_draws_imply_sampling() -> None:
    posterior, x = random_posterior(mlp(), Gaussian(0.5)), randn(5, 3, seed=1)
    prediction = posterior.predict(x, draws=posterior.sample(5, generator=rng(0)), num_samples=64)
    assert (prediction.source.method, prediction.source.num_samples) == ("sampling", 5)
    assert len(prediction.outputs) == 5


def test_noise_of_a_belief_reaches_both_methods() -> None:
    """Gamma noise: the expected variance in closed form, Student-t components under draws."""
    posterior = random_posterior(mlp(), Gaussian(GammaNoise(5.0, 1.0)).double())
    x, y = randn(5, 3, seed=1), randn(5, 2, seed=2)
    expected = torch.full((5, 2), 0.25, dtype=torch.float64)
    assert_close(posterior.predict(x).aleatoric_variance, expected, rtol=1e-6, atol=0.0)
    draws = posterior.sample(3, generator=rng(0))
    prediction = posterior.predict(x, draws=draws)
    assert_close(prediction.aleatoric_variance, expected, rtol=1e-6, atol=0.0)
    density = posterior.likelihood.noise.distribution(prediction.outputs).log_prob(y).sum(-1).exp().mean(0)
    assert_close(prediction.log_prob(y), density.log(), **CLOSE)
    assert not prediction.log_prob(y).requires_grad


class TwoInputs(nn.Module):
    """``last(left) + scale · right``."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(left) + scale * right


@pytest.mark.parametrize("method", METHODS)
def test_inputs_may_be_a_tuple_or_a_dictionary(method: str) -> None:
    """Both are passed on as they are, with arguments that are no tensors among them."""
    posterior = random_posterior(seeded(TwoInputs()), Gaussian(0.5))
    left, right = randn(5, 3, seed=1), randn(5, 2, seed=2)
    options: dict[str, Any] = {"method": method, "num_samples": 4}
    positional = posterior.predict((left, right), generator=rng(0), **options)
    keywords = posterior.predict({"right": right, "left": left}, generator=rng(0), **options)
    scaled = posterior.predict({"right": right, "left": left, "scale": 3.0}, generator=rng(0), **options)
    assert torch.equal(positional.mean, keywords.mean)
    assert_close(scaled.mean, positional.mean + 2 * right, **CLOSE)
    assert_close(scaled.covariance, positional.covariance, **CLOSE)


class Wrapped(nn.Module):
    """A model in the style of those that return dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor, name: str = "logits") -> dict[str, Tensor]:
        output = self.last(x)
        return {name: output, "hidden": x.tanh()}


@pytest.mark.parametrize("method", METHODS)
def test_an_output_is_found_in_a_dictionary_by_its_name(method: str) -> None:
    model = seeded(Wrapped())
    x = randn(5, 3, seed=1)
    alone = random_posterior(model.last, Gaussian(0.5)).predict(x, method, num_samples=4, generator=rng(0))
    wrapped = random_posterior(model, Gaussian(0.5)).predict(x, method, num_samples=4, generator=rng(0))
    assert torch.equal(wrapped.mean, alone.mean)
    assert torch.equal(wrapped.covariance, alone.covariance)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_which_none_stands_out_are_refused(method: str) -> None:
    posterior = random_posterior(seeded(Wrapped()), Gaussian(0.5))
    with pytest.raises(ArgumentError, match=r"returned dict.*Wrap the model"):
        posterior.predict({"x": randn(5, 3, seed=1), "name": "first"}, method)


def test_draws_with_the_linearized_method_are_draws_of_the_affine_model() -> None:
    """``f(x) + J(x) (w − M)`` with torch.func's Jacobians, the same functions at every call."""
    model, x = mlp(), randn(5, 3, seed=1)
    posterior = random_posterior(model, Gaussian(0.5))
    draws = posterior.sample(7, generator=rng(0))
    outputs = posterior.predict(x, "linearized", draws=draws).outputs

    def forward(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, x)

    jacobians = torch.func.jacrev(forward)(dict(posterior.mean))
    for index, draw in enumerate(draws):
        expected = model(x).detach()
        for name, value in draw.items():
            expected = expected + (jacobians[name] * (value - posterior.mean[name])).flatten(2).sum(-1)
        assert_close(outputs[index], expected, **CLOSE)
    assert_close(outputs[:, 2:3], posterior.predict(x[2:3], "linearized", draws=draws).outputs, rtol=0, atol=1e-12)


def test_unknown_method_says_what_there_is() -> None:
    posterior = random_posterior(mlp(), Gaussian(0.5))
    with pytest.raises(ArgumentError, match=r"method='laplace' is unknown. Allowed: 'linearized', 'sampling'"):
        posterior.predict(randn(5, 3, seed=1), "laplace")


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True, None])
def test_number_of_samples_is_checked(num_samples: Any) -> None:
    """By both methods, although the closed form draws none, and by ``sample``."""
    posterior = random_posterior(mlp(), Gaussian(0.5))
    for method in METHODS:
        with pytest.raises(ArgumentError, match=r"num_samples=.*integer >= 1"):
            posterior.predict(randn(5, 3, seed=1), method, num_samples=num_samples)
    with pytest.raises(ArgumentError, match=r"num_samples=.*integer >= 1"):
        posterior.sample(num_samples)


# Summary


def test_summary_says_what_becomes_of_each_parameter() -> None:
    """One row each: its block and structure, or that it is deterministic or frozen, and why."""
    model = seeded(
        nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.PReLU(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 2))
    )
    model[4].bias.requires_grad_(False)
    summary = random_posterior(model, Gaussian(0.5), damping="optimal").summary()
    rows = {row.parameter: row for row in summary.rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert (rows["0.weight"].block, rows["0.weight"].structure) == ("0", "kron/optimal 2×2×3")
    assert (rows["0.bias"].block, rows["0.bias"].shape) == ("0", "4")
    assert rows["1.weight"].block == "-"
    assert rows["1.weight"].structure == "deterministic"
    assert "PReLU has no adapter" in rows["1.weight"].why
    assert (rows["2.bias"].block, rows["2.bias"].structure) == ("2", "dense/exact 3×1×2")
    assert rows["4.weight"].structure == "kron/optimal 2×12"
    assert "frozen" in rows["4.bias"].why
    text = str(summary)
    assert len(text.splitlines()) == 2 + len(rows)
    for word in (
        "parameter",
        "block",
        "structure",
        "why",
        "kron/optimal 2×2×3",
        "deterministic",
        "requires_grad=False",
    ):
        assert word in text


def test_summary_knows_layers_without_a_block() -> None:
    """Trainable, with an adapter, but not in this posterior: that is not frozen."""
    whole = random_posterior(mlp(), Gaussian(0.5))
    part = bk.Posterior(
        whole.model, Gaussian(0.5), {"2": whole.blocks["2"]}, prior_precision={"2": 1.3}, provenance=whole.provenance
    )
    rows = {row.parameter: row for row in part.summary().rows}
    assert rows["2.weight"].block == "2"
    for name in ("0.weight", "0.bias"):
        assert (rows[name].structure, rows[name].block) == ("deterministic", "-")
        assert "no block in this posterior" in rows[name].why


# Another likelihood


def test_with_a_noise_chosen_afterwards_only_the_noise_is_another() -> None:
    """The weights' Gaussian stays; the posterior itself, and the likelihood that was given, stay what they are."""
    posterior, x = random_posterior(mlp(), Gaussian(0.5)), randn(4, 3, seed=1)
    given = Gaussian("learned").double()
    other = posterior.with_likelihood(given)
    before, after = posterior.predict(x), other.predict(x)
    assert_close(after.aleatoric_variance, torch.ones(4, 2).double())
    assert_close(before.aleatoric_variance, torch.full((4, 2), 0.25).double())
    assert_close((after.mean, after.epistemic_variance), (before.mean, before.epistemic_variance), rtol=0, atol=0)
    scramble(given)
    assert_close(other.predict(x).aleatoric_variance, after.aleatoric_variance, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in other.likelihood.parameters())
    assert all(parameter.requires_grad for parameter in given.parameters())


def test_a_likelihood_of_another_kind_is_refused() -> None:
    posterior = random_posterior(mlp(), Gaussian(0.5))
    with pytest.raises(ArgumentError, match=r"likelihood=Categorical\(\) is not allowed\. Allowed: a Gaussian"):
        posterior.with_likelihood(Categorical())
    with pytest.raises(ArgumentError, match=r"likelihood=0\.5 is not allowed"):
        posterior.with_likelihood(0.5)  # type: ignore[arg-type]


# Dtypes


def test_to_float64_moves_everything() -> None:
    """A float32 posterior in float64 predicts the same to float32's precision, and float64 inputs are welcome."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)).train()
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    posterior = random_posterior(model, Gaussian("learned"))
    x = randn(5, 3, seed=1)
    before = posterior.predict(x.float())
    assert before.covariance.dtype == torch.float32
    moved = posterior.to(torch.float64)
    after = moved.predict(x)
    assert after.mean.dtype == after.covariance.dtype == after.variance.dtype == torch.float64
    assert_close(after.mean, before.mean.double(), rtol=1e-5, atol=1e-5)
    assert_close(after.covariance, before.covariance.double(), rtol=1e-4, atol=1e-5)
    assert_close(moved.kl(), posterior.kl().double(), rtol=1e-5, atol=1e-4)
    assert moved.mean["1.num_batches_tracked"].dtype == torch.int64
    assert all(value.dtype == torch.float64 for value in moved.sample(2).values.values())
    assert next(moved.likelihood.parameters()).dtype == torch.float64
    assert moved.provenance == posterior.provenance
    assert moved.distribution("0").loc.dtype == torch.float64


def test_to_leaves_the_first_posterior_as_it_was() -> None:
    posterior = random_posterior(mlp().float(), Gaussian("learned"))
    x = randn(5, 3, seed=1).float()
    before = posterior.predict(x)
    moved = posterior.to(torch.float64)
    assert moved is not posterior
    assert torch.equal(posterior.predict(x).covariance, before.covariance)
    assert all(value.dtype == torch.float32 for value in posterior.mean.values())


@pytest.mark.parametrize("target", ["cpu", torch.device("cpu")])
def test_to_a_device(target: str | torch.device) -> None:
    posterior = random_posterior(cnn(), Categorical(), damping="exact")
    x = randn(5, 2, 3, seed=1)
    moved = posterior.to(target)
    assert torch.equal(moved.predict(x, generator=rng(0)).logits, posterior.predict(x, generator=rng(0)).logits)


@pytest.mark.parametrize("target", [torch.float64, torch.device("meta")], ids=str)
def test_to_takes_the_priors_precisions_along(target: torch.dtype | torch.device) -> None:
    """Those of single weights, without which there is no divergence from the prior."""
    model = seeded(nn.Linear(3, 2)).float()
    given = random_posterior(model, Gaussian(0.5), structure="diagonal")
    precision = 0.5 + randn(2, 4, seed=1).float().square()
    posterior = bk.Posterior(
        model, Gaussian(0.5), given.blocks, prior_precision={"(root)": precision}, provenance=given.provenance
    )
    before = posterior.kl()
    moved = posterior.to(target)
    assert moved.prior_precision["(root)"].dtype == moved.kl().dtype == moved.mean["weight"].dtype
    assert moved.prior_precision["(root)"].device == moved.kl().device == moved.device
    if isinstance(target, torch.dtype):
        assert_close(moved.kl(), before.to(target), rtol=1e-5, atol=1e-5)
    assert posterior.prior_precision["(root)"] is precision


# A posterior over some of the layers


def test_layers_without_a_block_are_constants() -> None:
    """Blocks of some layers only: the others stay at their mean under both methods."""
    model = mlp()
    whole = random_posterior(model, Gaussian(0.5))
    part = bk.Posterior(
        model, Gaussian(0.5), {"2": whole.blocks["2"]}, prior_precision={"2": 1.3}, provenance=whole.provenance
    )
    x = randn(5, 3, seed=1)
    hidden = model[1](model[0](x)).detach()
    alone = random_posterior(nn.Sequential(model[2]), Gaussian(0.5), seed=2).predict(hidden)
    assert_close(part.predict(x).covariance, alone.covariance, **CLOSE)
    assert set(part.sample(3).values) == {"2.weight"}
    assert (whole.predict(x).variance > part.predict(x).variance).all()


# From training to predictions


@pytest.mark.parametrize("damping", ["exact", "optimal"])
def test_noisy_kfac_on_linear_regression_is_exact_bayes(damping: str) -> None:
    """Its posterior is the textbook one: mean ``P⁻¹Xᵀy/σ²``, covariance ``P⁻¹`` with ``P = XᵀX/σ² + δI``.

    With one output the curvature is a Kronecker product exactly; antithetic samples leave the mean's gradient exact,
    and a step of size 1 is then Newton's.
    """
    x, sigma, delta = randn(12, 3, seed=0), 0.5, 1.7
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.3 + sigma * randn(12, 1, seed=1)
    model = seeded(nn.Linear(3, 1))
    likelihood = bk.likelihoods.Gaussian(torch.tensor(sigma, dtype=torch.float64))
    optimizer = bk.NoisyKFAC(
        model,
        likelihood,
        num_data=12,
        lr=1.0,
        prior_precision=delta,
        damping=damping,
        fisher="exact",
        momentum=0.0,
        statistics_every=1,
        inverse_every=1,
        num_samples=2,
        antithetic=True,
        warmup=False,
        kl_clip=None,
        generator=rng(2),
    )
    for _ in range(10):
        for _ in range(2):
            with optimizer.sampled_params():
                likelihood(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    posterior = optimizer.posterior()
    design = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    precision = design.T @ design / sigma**2 + delta * torch.eye(4, dtype=torch.float64)
    mean = torch.linalg.solve(precision, design.T @ y / sigma**2)
    new = torch.cat([randn(5, 3, seed=3), torch.ones(5, 1, dtype=torch.float64)], dim=1)
    prediction = posterior.predict(new[:, :3])
    assert_close(prediction.mean, new @ mean, rtol=1e-6, atol=1e-6)
    variance = (new @ torch.linalg.inv(precision) * new).sum(1, keepdim=True)
    assert_close(prediction.epistemic_variance, variance, rtol=1e-6, atol=0.0)
    assert_close(prediction.variance, variance + sigma**2, rtol=1e-6, atol=0.0)
    dense = kl_divergence(
        MultivariateNormal(mean.squeeze(-1), torch.linalg.inv(precision)),
        MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() / delta),
    )
    assert_close(posterior.kl(), dense, rtol=1e-5, atol=0.0)
    assert posterior.provenance.num_data == 12
    assert posterior.provenance.damping == damping
    scramble(model)
    assert_close(posterior.predict(new[:, :3]).mean, prediction.mean, rtol=0.0, atol=0.0)


def test_blocks_and_layers_have_the_same_names() -> None:
    model = cnn()
    posterior = random_posterior(model, Gaussian(0.5))
    layers, _ = find_layers(model)
    assert list(posterior.blocks) == list(posterior.layers) == list(layers)


def test_distribution_says_why_a_normalisation_has_none() -> None:
    posterior = random_posterior(seeded(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))), Gaussian(0.5))
    with pytest.raises(ArgumentError, match=r"layer .1. .* is not a matrix normal\. Blocks of this kind are always"):
        posterior.distribution("1")
