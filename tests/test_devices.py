"""On another device than the CPU all works and gives the CPU's numbers, and steps in between wait for no number.

Scenarios run here on the CPU, and on :mod:`tests.other_device` in a process that is made for it.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import active
from bayes_kfac.errors import NonFiniteError
from bayes_kfac.pyro import generative_model
from bayes_kfac.sklearn import BayesianMLPRegressor
from tests import other_device
from tests.posteriors import STRUCTURES

SAME = {"rtol": 1e-12, "atol": 1e-12}
EXAMPLES = 24

LIKELIHOODS: dict[str, Callable[[], bk.likelihoods.Likelihood]] = {
    "gaussian": lambda: bk.likelihoods.Gaussian([0.5, 0.7, 0.6, 0.8]),
    "learned": lambda: bk.likelihoods.Gaussian("learned"),
    "gamma": lambda: bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise()),
    "heteroscedastic": bk.likelihoods.HeteroscedasticGaussian,
    "categorical": bk.likelihoods.Categorical,
    "bernoulli": bk.likelihoods.Bernoulli,
    "poisson": bk.likelihoods.Poisson,
}


def network() -> nn.Module:
    """Shared weights, normalisation and a layer without weights to share: 4 outputs of images of 6 x 6."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(),
        nn.Linear(5, 4),
    ).double()  # fmt: skip


def data(likelihood: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(EXAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    targets = {"categorical": y.argmax(1), "bernoulli": (y > 0).double(), "poisson": y.exp().floor()}
    return x, targets.get(likelihood, y[:, :2] if likelihood == "heteroscedastic" else y)


def on(device: str, likelihood: str) -> tuple[nn.Module, bk.likelihoods.Likelihood, list[tuple[Tensor, Tensor]]]:
    """A model, a likelihood and four batches."""
    x, y = data(likelihood)
    batches = list(zip(x.to(device).split(6), y.to(device).split(6), strict=True))
    return network().to(device), LIKELIHOODS[likelihood]().double().to(device), batches


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(3)


def trained(device: str, likelihood: str = "gaussian", steps: int = 7, **options: Any) -> bk.NoisyNaturalGradient:
    model, noise, batches = on(device, likelihood)
    defaults = {"num_data": EXAMPLES, "lr": 0.02, "statistics_every": 3, "inverse_every": 4}
    optimizer = bk.NoisyNaturalGradient(model, noise, **defaults | {"generator": generator(device)} | options)
    for step in range(steps):
        take(optimizer, *batches[step % 4])
    return optimizer


def take(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x), y).backward()
    optimizer.step()


def fitted(device: str, likelihood: str = "gaussian", **options: Any) -> bk.Laplace:
    model, noise, batches = on(device, likelihood)
    return bk.Laplace(model, noise, **options).fit(batches, progress=False)


def said(prediction: Any, y: Tensor) -> dict[str, Tensor]:
    """Everything of a prediction that is a tensor."""
    return {"log_prob": prediction.log_prob(y)} | {
        name: value
        for name in dir(prediction)
        if not name.startswith("_") and isinstance(value := getattr(prediction, name, None), Tensor)
    }


def train(device: str, structure: str, damping: str) -> dict[str, Tensor]:
    optimizer = trained(device, structure=structure, damping=damping)
    return {**optimizer.posterior().mean, "kl": optimizer.posterior().kl()}


def train_and_predict(device: str, likelihood: str) -> Any:
    optimizer = trained(device, likelihood)
    x, y = (part.to(device) for part in data(likelihood))
    drawn = optimizer.posterior().predict(x, method="sampling", num_samples=5, generator=generator(device))
    return said(drawn, y), dict(optimizer.likelihood.named_parameters())


def fit_and_predict(device: str, likelihood: str) -> Any:
    laplace = fitted(device, likelihood).optimize_prior_precision()
    x, y = (part.to(device) for part in data(likelihood))
    posterior = laplace.posterior()
    return laplace.log_marginal_likelihood(), said(posterior.predict(x), y), posterior.function_covariance(x[:3])


def fit(device: str, structure: str, damping: str) -> Any:
    laplace = fitted(device, structure=structure, damping=damping, generator=generator(device))
    return laplace.log_marginal_likelihood(), laplace.posterior().predict(data("gaussian")[0].to(device)).covariance


def tune(device: str) -> Any:
    laplace = fitted(device, "categorical", subset="last_layer")
    _, _, batches = on(device, "categorical")
    laplace.optimize_prior_precision(method="validation", loader=batches, progress=False)
    laplace.optimize_temperature(batches, progress=False)
    return dict(laplace.prior_precision), laplace.temperature


def resume(device: str) -> Any:
    """A checkpoint that was written on the CPU goes on, on the device, as it would have there."""
    before = trained("cpu", "learned", steps=6, generator=None, num_samples=1)
    model, noise, batches = on(device, "learned")
    model.load_state_dict(before.model.state_dict())
    noise.load_state_dict(before.likelihood.state_dict())
    optimizer = bk.NoisyNaturalGradient(model, noise, num_data=EXAMPLES, generator=generator(device))
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    for x, y in batches:
        take(optimizer, x, y)
    return optimizer.posterior().mean


def save(device: str) -> Any:
    """A posterior that was trained on the device is read from its file on the CPU, and moved there."""
    posterior = trained(device).posterior()
    with TemporaryDirectory() as folder:
        posterior.save(Path(folder, "posterior"))
        loaded = bk.Posterior.load(Path(folder, "posterior"), network())
    x = data("gaussian")[0]
    return loaded.predict(x).covariance, posterior.to("cpu").predict(x).covariance


def loaders(device: str) -> Any:
    """Loaders on the CPU serve training, fits, updates and predictions on the device."""
    loader = DataLoader(TensorDataset(*data("gaussian")), batch_size=6)
    model, noise, _ = on(device, "gaussian")
    options = {"generator": generator(device), "progress": False}
    posterior = bk.fit(model, noise, loader, epochs=3, tune="marginal_likelihood", **options)
    laplace = bk.Laplace(model, noise, prior=posterior.nearest_matrix_normal()).fit(loader, progress=False)
    laplace.update(loader, progress=False)
    return laplace.log_marginal_likelihood(), laplace.posterior().predict(loader, progress=False).variance


def mix(device: str) -> Any:
    x, y = (part.to(device) for part in data("categorical"))
    mixture = bk.Mixture([fitted(device, "categorical").posterior(), fitted(device, "categorical").posterior()])
    return said(mixture.predict(x), y)


def link(device: str, name: str) -> Any:
    x = data("categorical")[0].to(device)
    posterior = fitted(device, "categorical").posterior()
    return posterior.predict(x, link=name, generator=generator(device)).probs


def draw(device: str) -> Any:
    posterior, x = fitted(device).posterior(), data("gaussian")[0].to(device)
    functions = posterior.function_samples(x, 4, generator=generator(device))
    return functions, posterior.sample(3, generator=generator(device)).values


def guide(device: str) -> Any:
    posterior = fitted(device).posterior()
    pyro.set_rng_seed(0)
    return posterior.to_pyro_guide(generative_model(posterior))(data("gaussian")[0].to(device))


def estimate(device: str) -> Any:
    x, y = (part.flatten(1).numpy() for part in data("gaussian"))
    estimator = BayesianMLPRegressor(device=device, max_iter=3, random_state=0).fit(x, y)
    return estimator.predict(x, return_std=True)


def select(device: str) -> Any:
    posterior, pool = fitted(device).posterior(), data("gaussian")[0].to(device)
    predictive = active.GaussianPredictiveGains(posterior, pool, pool[:5])
    return active.GaussianGains(posterior, pool).scores, predictive.scores, active.greedy(predictive, 3)


def reads(device: str, likelihood: str) -> list[int]:
    """How many numbers each step reads back, of 20 after the first 12 of a training that measures every tenth."""
    optimizer = trained(device, likelihood, steps=12, statistics_every=10, inverse_every=10)
    batches, counts = on(device, likelihood)[2], []
    for step in range(20):
        before = len(other_device.READS)
        take(optimizer, *batches[step % 4])
        counts.append(len(other_device.READS) - before)
    return counts


def spoil(device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int, str]:
    """A batch of NaN in a step that does not measure: the mean before and after it, the step that fails, the error."""
    optimizer = trained(device, "learned", steps=12, statistics_every=10, inverse_every=10)
    batches = on(device, "learned")[2]
    before = {name: value.clone() for name, value in optimizer.posterior().mean.items()}
    take(optimizer, batches[0][0], batches[0][1] * torch.nan)
    after = {name: value.clone() for name, value in optimizer.posterior().mean.items()}
    while True:
        try:
            take(optimizer, *batches[1])
        except NonFiniteError as error:
            at = optimizer.steps
            take(optimizer, *batches[1])  # it goes on
            assert all(value.isfinite().all() for value in optimizer.posterior().mean.values())
            assert optimizer.likelihood.noise_scale.isfinite()
            return before, after, at, str(error)


SCENARIOS: list[tuple[Any, ...]] = [
    *((train, *pair) for pair in dict(STRUCTURES).items()),
    *((fit, *pair) for pair in dict(STRUCTURES).items()),
    *((train_and_predict, name) for name in LIKELIHOODS),
    *((fit_and_predict, name) for name in LIKELIHOODS),
    *((link, name) for name in ("mc", "probit", "extended_probit", "laplace_bridge", "laplace_bridge_norm")),
    *((scenario,) for scenario in (tune, resume, save, loaders, mix, draw, guide, estimate, select)),
]


def there(scenario: Callable[..., Any], *arguments: str) -> Any:
    """What a scenario gives on the other device, brought back."""
    return _near(scenario(other_device.NAME, *arguments))


def _near(results: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), results)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin) as executor:
        yield executor


def _begin() -> None:
    torch.set_num_threads(1)
    other_device.pretend()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda it: "-".join([it[0].__name__, *it[1:]]))
def test_numbers_are_those_of_the_cpu(elsewhere: Executor, scenario: tuple[Any, ...]) -> None:
    run, *arguments = scenario
    assert_close(elsewhere.submit(there, run, *arguments).result(), _near(run("cpu", *arguments)), **SAME)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "learned"])
def test_steps_that_do_not_measure_wait_for_no_number(elsewhere: Executor, likelihood: str) -> None:
    counts = elsewhere.submit(there, reads, likelihood).result()
    assert [step for step, count in enumerate(counts, start=12) if count] == [20, 30]


def test_gradients_that_are_not_finite_change_no_weight_and_are_reported_with_the_next_measurement(
    elsewhere: Executor,
) -> None:
    before, after, at, message = elsewhere.submit(there, spoil).result()
    assert_close(after, before, rtol=0, atol=0)
    assert at == 20
    assert message.startswith("The gradients of a step since curvature was last measured held NaN, infinity")
