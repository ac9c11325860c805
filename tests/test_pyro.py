"""Posteriors in Pyro: the guide is the posterior to rounding, whatever the structure, the layers and the model."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac.distributions import BlockNormal, MatrixNormal
from bayes_kfac.errors import ArgumentError, TargetError, UsageError
from bayes_kfac.prediction import Draws
from bayes_kfac.pyro import generative_model
from tests.helpers import randn, rng, seeded
from tests.joints import dense_covariance
from tests.posteriors import STRUCTURES, random_posterior

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NOISE = 0.5


@pytest.fixture(autouse=True)
def _pyro_starts_anew() -> Iterator[None]:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield
    pyro.clear_param_store()


def mlp() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def posterior_of(model: nn.Module | None = None, **options: Any) -> bk.Posterior:
    return random_posterior(model or mlp(), bk.likelihoods.Gaussian(torch.tensor(NOISE).double()), **options)


def linked() -> bk.Posterior:
    """Three layers, each correlated with the next."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    loader = DataLoader(TensorDataset(*data()), batch_size=10)
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(NOISE), structure="tridiagonal", prior_precision=1.3)
    posterior = laplace.fit(loader, progress=False).posterior()
    assert set(posterior.blocks.links) == {"0", "2"}
    return posterior


def data(size: int = 20) -> tuple[Tensor, Tensor]:
    return randn(size, 3, seed=1), randn(size, 2, seed=2)


def made_random(network: nn.Module) -> nn.Module:
    """A copy whose parameters are Pyro's samples, as its documentation does it."""
    network = copy.deepcopy(network)
    to_pyro_module_(network)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros_like(value), 1.3**-0.5).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    return network


class Regression(PyroModule):
    """A model of one's own: a network under a prefix, and a noise scale that is random too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = made_random(network)
        self.scale = PyroSample(dist.LogNormal(torch.tensor(-1.0).double(), 0.5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean, scale = self.net(x), self.scale
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, scale).to_event(1), obs=y)
        return mean


# The guide is the posterior


def sigma_points(posterior: bk.Posterior) -> dict[str, Tensor]:
    """Blocks at ``mean ± √d B e_i``, over which a quadratic function has the mean that it has over the posterior."""
    sizes = {name: torch.Size(block.shape).numel() for name, block in posterior.blocks.items()}
    total = sum(sizes.values())
    noise = math.sqrt(total) * torch.cat([torch.eye(total), -torch.eye(total)]).double()
    parts = dict(zip(sizes, noise.split(list(sizes.values()), dim=1), strict=True))
    drawn = posterior.blocks.sample(
        {name: part.unflatten(1, posterior.blocks[name].shape) for name, part in parts.items()}
    )
    return {name: posterior.layers[name].matrix(posterior.mean) + own for name, own in drawn.items()}


def mean_log_ratio(posterior: bk.Posterior, model: Callable[..., Any], x: Tensor) -> Tensor:
    """``E[log q − log p]`` of the weights, by Pyro's own sums over the guide's and the model's sites."""
    guide = posterior.to_pyro_guide(model)
    blocks = sigma_points(posterior)
    ratios = []
    for index in range(len(next(iter(blocks.values())))):
        values = {f"{name}_block": own[index] for name, own in blocks.items()}
        drawn = poutine.trace(poutine.condition(guide, data=values)).get_trace(x)
        prior = poutine.trace(poutine.replay(poutine.block(model, hide=["obs"]), drawn)).get_trace(x)
        ratios.append(drawn.log_prob_sum() - prior.log_prob_sum())
    return torch.stack(ratios).mean()


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES)
def test_log_ratio_to_the_prior_is_the_kl(structure: str, damping: str) -> None:
    """The auxiliary sites and the Deltas together have the right density: its mean is ``posterior.kl()`` exactly."""
    posterior = posterior_of(
        seeded(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))), structure=structure, damping=damping
    )
    ratio = mean_log_ratio(posterior, generative_model(posterior), randn(1, 2, seed=3))
    assert_close(ratio, posterior.kl(), **CLOSE)


def test_log_ratio_to_the_prior_is_the_kl_where_layers_are_linked() -> None:
    posterior = linked()
    assert_close(mean_log_ratio(posterior, generative_model(posterior), data()[0]), posterior.kl(), **CLOSE)


def kinds_of_layers() -> nn.Sequential:
    """A grouped convolution, norms, a transposed convolution; inputs ``[batch, 2, 5]``."""
    return seeded(
        nn.Sequential(
            nn.Conv1d(2, 4, 2, groups=2),
            nn.GroupNorm(2, 4),
            nn.ConvTranspose1d(4, 3, 2),
            nn.Flatten(),
            nn.Linear(15, 2),
        )
    )


def test_log_ratio_to_the_prior_is_the_kl_for_all_kinds_of_layers() -> None:
    posterior = posterior_of(kinds_of_layers())
    x = randn(2, 2, 5, seed=3)
    assert_close(mean_log_ratio(posterior, generative_model(posterior), x), posterior.kl(), **CLOSE)


@pytest.mark.parametrize("make", [posterior_of, linked], ids=["independent", "linked"])
def test_log_density_is_that_of_the_dense_gaussian(make: Callable[[], bk.Posterior]) -> None:
    """At weights that the guide drew itself, in the order of the layers."""
    posterior, (x, y) = make(), data()
    trace = poutine.trace(posterior.to_pyro_guide(generative_model(posterior))).get_trace(x, y)
    weights = {name: trace.nodes[name]["value"] for name in posterior.mean}
    away = [(layer.matrix(weights) - layer.matrix(posterior.mean)).flatten() for layer in posterior.layers.values()]
    covariance = dense_covariance(posterior.blocks)
    expected = MultivariateNormal(torch.zeros(len(covariance)).double(), covariance).log_prob(torch.cat(away))
    assert_close(trace.log_prob_sum(), expected, **CLOSE)


@pytest.mark.parametrize("make", [posterior_of, linked], ids=["independent", "linked"])
def test_draws_have_the_posteriors_moments(make: Callable[[], bk.Posterior]) -> None:
    """Of all weights of all layers together: the mean and, entry by entry, the dense covariance."""
    posterior, (x, _) = make(), data()
    guide = posterior.to_pyro_guide(generative_model(posterior))
    drawn = Predictive(guide, num_samples=4000, parallel=True)(x)
    weights = torch.cat(
        [
            (
                torch.vmap(layer.matrix)({key: drawn[key] for key in layer.parameters}) - layer.matrix(posterior.mean)
            ).flatten(1)
            for layer in posterior.layers.values()
        ],
        dim=1,
    )
    covariance = dense_covariance(posterior.blocks)
    variance = covariance.diagonal()
    assert (weights.mean(0).abs() < 4.5 * (variance / 4000).sqrt()).all()
    error = ((variance[:, None] * variance + covariance**2) / 4000).sqrt()
    assert ((weights.T @ weights / 4000 - covariance).abs() < 5 * error).all()


def test_sites_are_matrix_normals_where_blocks_are() -> None:
    posterior = posterior_of(damping="factored")
    trace = poutine.trace(posterior.to_pyro_guide(generative_model(posterior))).get_trace(data()[0])
    for name in posterior.layers:
        site, own = trace.nodes[f"{name}_block"]["fn"], posterior.distribution(name)
        assert isinstance(site, MatrixNormal)
        assert torch.equal(site.loc, own.loc)
        assert torch.equal(site.scale_tril_row, own.scale_tril_row)
        assert torch.equal(site.scale_tril_column, own.scale_tril_column)
    exact = posterior_of(damping="exact")
    trace = poutine.trace(exact.to_pyro_guide(generative_model(exact))).get_trace(data()[0])
    assert isinstance(trace.nodes["0_block"]["fn"], BlockNormal)
    nearest = exact.nearest_matrix_normal()
    trace = poutine.trace(nearest.to_pyro_guide(generative_model(nearest))).get_trace(data()[0])
    assert isinstance(trace.nodes["0_block"]["fn"], MatrixNormal)


def test_a_diagonal_side_is_not_written_out() -> None:
    """The vocabulary's side of an embedding stays a diagonal."""
    network = seeded(nn.Sequential(nn.Embedding(50, 3), nn.Flatten(), nn.Linear(6, 1)))
    tokens = torch.randint(0, 50, (20, 2), generator=rng(0))
    loader = DataLoader(TensorDataset(tokens, randn(20, 1, seed=1)), batch_size=10)
    posterior = bk.Laplace(network, bk.likelihoods.Gaussian(NOISE)).fit(loader, progress=False).posterior()
    guide = posterior.to_pyro_guide(generative_model(posterior))
    trace = poutine.trace(guide).get_trace(tokens)
    assert isinstance(trace.nodes["0_block"]["fn"], BlockNormal)
    assert max(value.numel() for value in guide.state_dict().values()) < 50 * 50
    assert_close(mean_log_ratio(posterior, generative_model(posterior), tokens), posterior.kl(), **CLOSE)


# In Pyro's machinery


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_elbo_is_the_expected_log_likelihood_less_the_kl(elbo: Callable[..., Any]) -> None:
    """Of a network that is affine in its weights, both in closed form; to 4 standard errors of the draws."""
    posterior, (x, y) = posterior_of(nn.Linear(3, 2).double(), num_data=20), data()
    model = generative_model(posterior)
    guide = posterior.to_pyro_guide(model)
    output = posterior.output(x)
    residuals = ((y - output.mean) ** 2 + output.variance).sum() / NOISE**2
    closed = -0.5 * residuals - y.numel() * math.log(NOISE * math.sqrt(2 * math.pi)) - posterior.kl()
    particles = torch.tensor([-elbo().loss(model, guide, x, y) for _ in range(400)], dtype=torch.float64)
    assert (particles.mean() - closed).abs() < 4 * particles.std() / 400**0.5


@pytest.mark.parametrize("make", [posterior_of, linked], ids=["independent", "linked"])
def test_predictive_is_the_sampled_prediction(make: Callable[[], bk.Posterior]) -> None:
    """Under the draws that the guide made, ``posterior.predict`` has the same outputs."""
    posterior, (x, y) = make(), data()
    model = Regression(posterior.model)
    drawn = Predictive(posterior.to_pyro_guide(model, prefix="net."), num_samples=30)(x)
    outputs = Predictive(model, posterior_samples=drawn, return_sites=["_RETURN", "obs"])(x)
    draws = Draws({name: drawn[f"net.{name}"] for name in posterior.mean})
    assert_close(outputs["_RETURN"], posterior.predict(x, draws=draws).outputs, **CLOSE)
    assert outputs["obs"].shape == (30, *y.shape)


def test_predictive_with_the_guide_has_the_predictions_moments() -> None:
    posterior, (x, _) = posterior_of(nn.Linear(3, 2).double()), data()
    model = generative_model(posterior)
    drawn = Predictive(model, guide=posterior.to_pyro_guide(model), num_samples=800, return_sites=["obs"])(x)["obs"]
    closed = posterior.predict(x)
    assert ((drawn.mean(0) - closed.mean).abs() < 4.5 * closed.stddev / 800**0.5).all()
    assert ((drawn.std(0) / closed.stddev).log().abs() < 4.5 / 1600**0.5).all()


def batched(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A linear model written for draws in front: in plates of its own, on the left of the data's."""
    zero = torch.zeros(2, 3, dtype=torch.float64)
    weight = pyro.sample("weight", dist.Normal(zero, 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(zero[:, 0], 1.0).to_event(1))
    mean = torch.einsum("...oi,ni->...no", weight.squeeze(-3) if weight.dim() > 3 else weight, x)
    mean = mean + (bias if bias.dim() > 2 else bias.unsqueeze(-2))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("obs", dist.Normal(mean, NOISE).to_event(1), obs=y)
    return mean


def test_predictive_in_parallel() -> None:
    posterior, (x, _) = posterior_of(nn.Linear(3, 2).double()), data()
    guide = posterior.to_pyro_guide(batched)
    drawn = Predictive(guide, num_samples=7, parallel=True)(x)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "(root)_block": (7, 2, 4),
        "weight": (7, 2, 3),
        "bias": (7, 2),
    }
    outputs = Predictive(batched, guide=guide, num_samples=7, parallel=True, return_sites=["_RETURN", "obs"])(x)
    assert outputs["obs"].shape == (7, 20, 2)
    assert outputs["_RETURN"].var(0).min() > 0


def test_shapes_are_those_of_pyros_own_guides() -> None:
    """In a plate of particles around model and guide."""
    posterior, (x, y) = posterior_of(nn.Linear(3, 2).double()), data()
    ours, theirs = posterior.to_pyro_guide(batched), AutoNormal(batched)
    shapes = []
    for guide in (ours, theirs):
        with pyro.plate("particles", 6, dim=-2):
            shapes.append({name: tuple(value.shape) for name, value in guide(x, y).items()})
    assert shapes[0] == shapes[1]
    one = torch.tensor([Trace_ELBO().loss(batched, ours, x, y) for _ in range(300)])
    many = Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1).loss(batched, ours, x, y)
    assert abs(one.mean() - many) < 4 * one.std() * (2 / 300) ** 0.5


def test_sites_may_be_in_plates_of_their_own() -> None:
    """Weights that are independent under the prior, written with plates: the same draws, densities and shapes."""
    posterior, (x, _) = posterior_of(nn.Linear(3, 2).double(), prior_precision=1.3), data()
    scale = torch.tensor(1.3**-0.5, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("out", 2, dim=-1):
            pyro.sample("weight", dist.Normal(torch.zeros(3).double(), scale).to_event(1))
            pyro.sample("bias", dist.Normal(torch.zeros(()).double(), scale))

    posterior_log_ratio = mean_log_ratio(posterior, model, x)
    assert_close(posterior_log_ratio, posterior.kl(), **CLOSE)
    guide = posterior.to_pyro_guide(model)
    with pyro.plate("particles", 6, dim=-3):
        values = guide(x)
    assert (values["weight"].shape, values["bias"].shape) == ((6, 1, 2, 3), (6, 1, 2))
    drawn = Predictive(guide, num_samples=5, parallel=True)(x)
    assert (drawn["weight"].shape, drawn["bias"].shape) == ((5, 2, 3), (5, 2))
    assert_close(torch.cat([drawn["weight"], drawn["bias"].unsqueeze(-1)], -1), drawn["(root)_block"].reshape(5, 2, 4))


def test_other_sites_are_left_to_other_guides_and_are_all_that_trains() -> None:
    """In an ``AutoGuideList``: the noise's scale is learned, and nothing of the posterior moves."""
    posterior, (x, y) = posterior_of(), data()
    model = Regression(posterior.model)
    guide = AutoGuideList(model)
    guide.append(posterior.to_pyro_guide(model))
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    assert guide(x, y).keys() == {"scale", *(f"net.{name}" for name in posterior.mean)}
    before = {name: value.clone() for name, value in guide[0].state_dict().items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    start = guide.median(x, y)["scale"]
    for _ in range(30):
        svi.step(x, y)
    assert guide.median(x, y)["scale"] > start + 0.1  # the posterior is around random weights: the noise is large
    assert not list(guide[0].parameters())
    assert all(name.startswith("AutoGuideList.1.") for name in pyro.get_param_store())
    assert all(torch.equal(before[name], value) for name, value in guide[0].state_dict().items())
    assert set(guide.quantiles([0.1, 0.9], x, y)) == set(guide.median(x, y))
    assert copy.deepcopy(guide)(x, y).keys() == guide(x, y).keys()


# Names, sites and shapes of the model


def test_prefix_is_found_or_given() -> None:
    posterior, (x, _) = posterior_of(), data()
    for model, prefix in [(made_random(posterior.model), ""), (Regression(posterior.model), "net.")]:
        expected = {prefix + name for name in posterior.mean}
        assert posterior.to_pyro_guide(model)(x).keys() == expected
        assert posterior.to_pyro_guide(model, prefix=prefix)(x).keys() == expected


@pytest.mark.filterwarnings("ignore:.*random_module.*:FutureWarning")
def test_names_of_the_old_random_module() -> None:
    posterior, (x, _) = posterior_of(), data()
    priors = {name: dist.Normal(torch.zeros_like(own), 1.0).to_event(own.dim()) for name, own in posterior.mean.items()}

    def model(x: Tensor) -> Tensor:
        return pyro.random_module("module", copy.deepcopy(posterior.model), priors)()(x)

    assert posterior.to_pyro_guide(model)(x).keys() == {f"module$$${name}" for name in posterior.mean}


def test_two_networks_in_one_model_need_the_prefix() -> None:
    posterior, (x, _) = posterior_of(), data()
    model = PyroModule()
    model.first, model.second = made_random(posterior.model), made_random(posterior.model)
    both = pyro.nn.pyro_method(lambda self, x: self.first(x) + self.second(x)).__get__(model)
    with pytest.raises(ArgumentError, match=r"more than once.*'first\.', 'second\.'.*Pass prefix="):
        posterior.to_pyro_guide(both)(x)
    guide = AutoGuideList(both)
    for prefix in ("first.", "second."):
        guide.append(posterior.to_pyro_guide(both, prefix=prefix))
    assert len(guide(x)) == 8


def test_a_number_that_ends_alike_is_no_prefix() -> None:
    """``10.weight`` is not ``0.weight`` with the prefix 1."""
    posterior = posterior_of(nn.Sequential(nn.Linear(3, 2)).double())

    def model() -> None:
        for number in range(11):
            pyro.sample(f"{number}.weight", dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2))
            pyro.sample(f"{number}.bias", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    assert posterior.to_pyro_guide(model)().keys() == {"0.weight", "0.bias"}


def test_a_prefix_that_is_not_there_names_what_is() -> None:
    posterior, (x, _) = posterior_of(), data()
    guide = posterior.to_pyro_guide(Regression(posterior.model), prefix="network.")
    for _ in range(2):  # the second call looks again, and is no half-made guide
        with pytest.raises(
            ArgumentError, match=r"prefix='network\.'.*no site named 'network\.0\.weight'.*'net\.0\.weight'"
        ):
            guide(x)


def test_a_parameter_that_is_not_random_in_the_model_is_refused() -> None:
    posterior, (x, _) = posterior_of(), data()
    model = made_random(posterior.model)
    model[2].bias = nn.Parameter(torch.zeros(2).double())
    with pytest.raises(ArgumentError, match=r"no site named '2\.bias'.*PyroSample"):
        posterior.to_pyro_guide(model)(x)


def test_other_shapes_are_refused() -> None:
    posterior, (x, _) = posterior_of(), data()
    wide = made_random(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double())
    with pytest.raises(ArgumentError, match=r"'0\.weight' has shape \(5, 3\), but .* shape \(4, 3\)"):
        posterior.to_pyro_guide(wide)(x)

    def in_the_datas_plate(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, value in posterior.mean.items():
                pyro.sample(name, dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim()))

    with pytest.raises(ArgumentError, match=r"has shape \(20, 4, 3\).*outside of plates over the data"):
        posterior.to_pyro_guide(in_the_datas_plate)(x)


def test_a_constrained_site_is_refused() -> None:
    posterior, (x, _) = posterior_of(), data()
    model = made_random(posterior.model)
    model[0].weight = PyroSample(dist.HalfNormal(torch.ones(4, 3).double()).to_event(2))
    with pytest.raises(ArgumentError, match=r"support of site '0\.weight'.*prior over all real numbers"):
        posterior.to_pyro_guide(model)(x)


def test_a_network_that_became_a_pyro_module_itself_is_refused() -> None:
    posterior = posterior_of()
    to_pyro_module_(posterior.model)
    posterior.model[0].weight = PyroSample(dist.Normal(torch.zeros(4, 3).double(), 1.0).to_event(2))
    with pytest.raises(UsageError, match=r"no parameter '0\.weight' any more.*copy\.deepcopy\(network\)"):
        posterior.to_pyro_guide(posterior.model)


def tied() -> nn.Sequential:
    network = seeded(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    network[2].weight = network[0].weight
    return network


def test_tied_weights_are_one_site() -> None:
    """In the model that is made for them; one in which they are drawn twice is refused."""
    posterior, (x, _) = posterior_of(tied()), data()
    model = generative_model(posterior)
    assert posterior.to_pyro_guide(model)(x).keys() == {"0.weight", "0.bias", "2.bias"}
    assert_close(mean_log_ratio(posterior, model, x), posterior.kl(), **CLOSE)
    with pytest.raises(ArgumentError, match=r"'2\.weight' is tied to '0\.weight'"):
        posterior.to_pyro_guide(made_random(tied()))(x)


def test_parameters_without_a_block_are_points() -> None:
    """What is deterministic in the posterior is so in the guide, although it is random in the model."""
    network = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    loader = DataLoader(TensorDataset(*data()), batch_size=10)
    network(data()[0])
    network.eval()
    laplace = bk.Laplace(network, bk.likelihoods.Gaussian(NOISE), subset="last_layer").fit(loader, progress=False)
    posterior = laplace.posterior()
    guide = posterior.to_pyro_guide(made_random(network))
    first, second = guide(data()[0]), guide(data()[0])
    for name in posterior.mean.keys() & first.keys():
        assert torch.equal(first[name], second[name]) == (not name.startswith("2."))
    assert torch.equal(first["1.weight"], posterior.mean["1.weight"])
    assert guide.quantiles([0.1, 0.9], data()[0])["0.weight"].shape == (2, 4, 3)


# Medians, copies and files


def test_median_and_quantiles() -> None:
    """Those of each weight's own Gaussian, links included."""
    for posterior in (posterior_of(damping="exact"), linked()):
        x, _ = data()
        guide = posterior.to_pyro_guide(Regression(posterior.model))
        median, quantiles = guide.median(x), guide.quantiles([0.1, 0.5, 0.9], x)
        variances = posterior.blocks.marginal_variance()
        for name, layer in posterior.layers.items():
            for key, variance in layer.tensors(variances[name]).items():
                marginal = dist.Normal(posterior.mean[key], variance.sqrt())
                expected = marginal.icdf(torch.tensor([0.1, 0.5, 0.9]).double().reshape(-1, *[1] * variance.dim()))
                assert_close(quantiles[f"net.{key}"], expected, rtol=1e-6, atol=1e-6)
                assert torch.equal(median[f"net.{key}"], posterior.mean[key])
        median["net.0.weight"].zero_()
        assert torch.equal(guide.median(x)["net.0.weight"], posterior.mean["0.weight"])


@pytest.mark.parametrize("wrong", [[1.5], [0.1, 0.0], 1.0, torch.tensor([0.5, torch.nan])])
def test_quantiles_are_of_probabilities(wrong: Any) -> None:
    posterior = posterior_of()
    with pytest.raises(ArgumentError, match=r"^quantiles=.* is out of range\. Allowed: numbers between 0 and 1"):
        posterior.to_pyro_guide(Regression(posterior.model)).quantiles(wrong, data()[0])


@pytest.mark.parametrize("make", [posterior_of, linked], ids=["independent", "linked"])
def test_state_dict_carries_the_posterior(make: Callable[[], bk.Posterior]) -> None:
    posterior, (x, _) = make(), data()
    other = copy.copy(posterior)._with(
        blocks=posterior.blocks.map(torch.zeros_like), mean={k: v + 1 for k, v in posterior.mean.items()}
    )
    model = generative_model(posterior)
    guide, fresh = posterior.to_pyro_guide(model), other.to_pyro_guide(model)
    fresh.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(1)
    expected = guide(x)
    pyro.set_rng_seed(1)
    assert_close(fresh(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("called", [False, True])
def test_copies(called: bool) -> None:
    """A deep copy is a guide of the same model; neither it nor pickling takes anything from the guide."""
    posterior, (x, _) = posterior_of(), data()
    guide = posterior.to_pyro_guide(Regression(posterior.model))
    if called:
        guide(x)
    copied, pickled = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    guide.means.get_buffer("0.weight").zero_()
    assert torch.equal(copied.median(x)["net.0.weight"], posterior.mean["0.weight"])
    assert torch.equal(guide.median(x)["net.0.weight"], torch.zeros(4, 3).double())
    if called:
        assert torch.equal(pickled.median(x)["net.0.weight"], posterior.mean["0.weight"])
        assert pickled(x).keys() == guide(x).keys()
    else:
        with pytest.raises(UsageError, match=r"pickled before its first call.*to_pyro_guide\(model\)"):
            pickled(x)


def test_the_guide_is_the_posterior_as_it_was() -> None:
    posterior, (x, _) = posterior_of(), data()
    guide = posterior.to_pyro_guide(generative_model(posterior))
    expected = posterior.mean["0.weight"].clone()
    posterior.mean["0.weight"].zero_()
    assert torch.equal(guide.median(x)["0.weight"], expected)


def test_moves_to_another_dtype() -> None:
    posterior, (x, _) = posterior_of(damping="exact"), data()
    guide = posterior.to_pyro_guide(generative_model(posterior)).float()
    single = posterior.to(torch.float32)
    guide.prototype_trace = None
    guide._model = single.to_pyro_guide(generative_model(single))._model
    trace = poutine.trace(guide).get_trace(x.float())
    assert {trace.nodes[name]["value"].dtype for name in ("0.weight", "2.bias", "0_block")} == {torch.float32}


def test_draws_are_not_rounded_under_autocast() -> None:
    posterior = posterior_of(mlp().float())
    guide = posterior.to_pyro_guide(generative_model(posterior))
    guide(data()[0].float())
    pyro.set_rng_seed(1)
    expected = guide()
    pyro.set_rng_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(guide(), expected, rtol=0, atol=0)


# The model that a posterior approximates


def test_generative_model_is_prior_and_likelihood() -> None:
    """For any batch, the log-likelihood of ``num_data`` examples, tempered."""
    posterior, (x, y) = posterior_of(num_data=100), data()
    posterior.provenance = type(posterior.provenance)(**{**vars(posterior.provenance), "temperature": 0.5})
    weights = next(iter(posterior.sample(1, generator=rng(0))))
    model = poutine.condition(generative_model(posterior), data=weights)
    trace = poutine.trace(model).get_trace(x, y)
    scale = torch.tensor(1.3, dtype=torch.float64).rsqrt()
    prior = sum(dist.Normal(torch.zeros_like(scale), scale).log_prob(own).sum() for own in weights.values())
    output = torch.func.functional_call(posterior.model, weights, x)
    nll = posterior.likelihood(output, y)
    assert_close(trace.log_prob_sum(), prior - 100 / 0.5 * nll, **CLOSE)
    assert_close(trace.nodes["_RETURN"]["value"], output, **CLOSE)
    predicted = poutine.trace(model).get_trace(x)
    assert predicted.nodes["obs"]["scale"] == 1.0
    assert predicted.nodes["obs"]["value"].shape == y.shape


@pytest.mark.parametrize(
    ("likelihood", "outputs", "target"),
    [
        (bk.likelihoods.Categorical(), 3, torch.arange(20) % 3),
        (bk.likelihoods.Bernoulli(), 1, (torch.arange(20) % 2).double()[:, None]),
        (bk.likelihoods.Poisson(), 1, (torch.arange(20) % 4).double()[:, None]),
        (bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(6.0, 6.0)), 2, randn(20, 2, seed=2)),
        (bk.likelihoods.Gaussian(torch.tensor([0.5, 2.0])), 2, randn(20, 2, seed=2)),
    ],
    ids=["categorical", "bernoulli", "poisson", "gamma", "scales"],
)
def test_generative_model_of_each_likelihood(likelihood: Any, outputs: int, target: Tensor) -> None:
    network = seeded(nn.Linear(3, outputs))
    posterior, (x, _) = random_posterior(network, likelihood, num_data=20), data()
    model = generative_model(posterior)
    trace = poutine.trace(model).get_trace(x, target)
    trace.compute_log_prob()
    output = trace.nodes["_RETURN"]["value"]
    expected = posterior.likelihood.distribution(output).log_prob(target).reshape(20, -1).sum(1)
    assert_close(trace.nodes["obs"]["log_prob"], expected.detach(), check_dtype=False, **CLOSE)
    drawn = Predictive(model, guide=posterior.to_pyro_guide(model), num_samples=4)(x)
    assert drawn["obs"].shape == (4, *target.shape)


def test_generative_model_refuses_targets_that_would_broadcast() -> None:
    posterior, (x, y) = posterior_of(nn.Linear(3, 1).double()), data()
    with pytest.raises(TargetError, match="shape"):
        generative_model(posterior)(x, y[:, 0])


def test_generative_model_refuses_what_is_no_posterior_and_no_data() -> None:
    posterior, (x, y) = posterior_of(), data()
    with pytest.raises(ArgumentError, match=r"posterior is a Laplace.*\.posterior\(\)"):
        generative_model(bk.Laplace(mlp(), bk.likelihoods.Gaussian(NOISE)))
    with pytest.raises(TargetError, match=r"shape \(0, 2\) holds no example"):
        generative_model(posterior)(x[:0], y[:0])


def test_generative_model_has_a_precision_for_each_weight() -> None:
    posterior = posterior_of(nn.Linear(3, 2).double(), structure="diagonal")
    precision = 0.5 + torch.rand(2, 4, generator=rng(0)).double()
    posterior.prior_precision = {"(root)": precision}
    trace = poutine.trace(generative_model(posterior)).get_trace(data()[0])
    assert_close(trace.nodes["weight"]["fn"].base_dist.scale, precision[:, :3].rsqrt(), **CLOSE)
    assert_close(trace.nodes["bias"]["fn"].base_dist.scale, precision[:, 3].rsqrt(), **CLOSE)
    assert_close(mean_log_ratio(posterior, generative_model(posterior), data()[0]), posterior.kl(), **CLOSE)


def test_generative_model_leaves_the_network_as_it_was() -> None:
    """In training mode, its buffers and weights unchanged, although predictions are of evaluation mode."""
    network = seeded(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    posterior, (x, y) = posterior_of(network), data()
    before = copy.deepcopy(network.state_dict())
    network.train()
    model = poutine.condition(generative_model(posterior), data=dict(posterior.mean))
    assert torch.equal(model(x, y), model(x))
    assert network.training
    assert network[1].training
    assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_generative_model_needs_a_prior_that_is_known() -> None:
    posterior = posterior_of()
    posterior.prior_precision.pop("2")
    with pytest.raises(UsageError, match="prior is centred at zero"):
        generative_model(posterior)


def test_generative_model_refuses_a_distribution_that_pyro_has_not() -> None:
    class Odd(torch.distributions.Normal):
        pass

    posterior = posterior_of()
    posterior.likelihood.distribution = lambda output: Odd(output, 1.0)  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match=r"Odd, is none of pyro\.distributions"):
        generative_model(posterior)(data()[0])


def test_nuts_on_the_generative_model_finds_an_exact_laplace_posterior() -> None:
    """Where the network is linear the dense Laplace posterior at the mode is the posterior."""
    network = nn.Linear(3, 1).double()
    x, y = data()
    y = y[:, :1]
    design = torch.cat([x, torch.ones(20, 1).double()], 1)
    mode = torch.linalg.solve(design.T @ design / NOISE**2 + torch.eye(4).double(), design.T @ y / NOISE**2)
    with torch.no_grad():
        network.weight.copy_(mode[:3].T)
        network.bias.copy_(mode[3])
    laplace = bk.Laplace(network, bk.likelihoods.Gaussian(NOISE), structure="dense", prior_precision=1.0)
    posterior = laplace.fit([(x, y)], progress=False).posterior()
    chain = MCMC(NUTS(generative_model(posterior)), num_samples=200, warmup_steps=50, disable_progbar=True)
    chain.run(x, y)
    drawn = torch.cat([chain.get_samples()["weight"][:, 0], chain.get_samples()["bias"]], 1)
    variance = posterior.blocks.marginal_variance()["(root)"][0]
    effective = torch.cat([chain.diagnostics()["weight"]["n_eff"][0], chain.diagnostics()["bias"]["n_eff"]])
    assert ((drawn.mean(0) - mode[:, 0]).abs() < 4 * (variance / effective).sqrt()).all()
    assert (drawn.var(0) / variance).log().abs().mean() < 0.35
