"""Expected improvement against quadrature and BoTorch, Thompson sampling against the joint Gaussian it draws from."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac import Posterior
from bayes_kfac.active import Committee, loop
from bayes_kfac.active.optimizing import ExpectedImprovement, ThompsonSampling, _log_standard_improvement
from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.sklearn import BayesianMLPRegressor
from tests.helpers import randn, rng, seeded
from tests.posteriors import dense_function_covariance, dense_mean, random_posterior

POOL = 7


def posterior_of(outputs: int = 1) -> Posterior:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))
    return random_posterior(model, Gaussian(0.4), damping="exact")


def pool() -> Tensor:
    return randn(POOL, 3, seed=1)


def view(mean: list[float], stddev: list[float]) -> SimpleNamespace:
    mean_, stddev_ = torch.tensor(mean), torch.tensor(stddev)
    return SimpleNamespace(mean=mean_, epistemic_variance=stddev_.square())


# Expected improvement


def log_improvement(z: float) -> float:
    """By an integral over the improvement, its exponential taken out: ``log φ(z) + log ∫ t exp(z t − t²/2) dt``."""
    from scipy.integrate import quad

    scale = max(1.0, abs(z)) if z < 0 else 1.0  # for z far below the integrand lives within 1/|z|
    value, _ = quad(lambda t: t * math.exp(z * t / scale - 0.5 * (t / scale) ** 2), 0, 60 + 2 * max(z, 0), epsabs=0)
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(value / scale**2)


@given(st.floats(-300, 20))
def test_logarithm_of_the_standard_improvement_is_that_of_its_integral(z):
    found = float(_log_standard_improvement(torch.tensor(z, dtype=torch.float64)))
    assert found == pytest.approx(log_improvement(z), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("edge", [-1.0, -100.0])
def test_the_ways_to_it_meet(edge):
    around = torch.tensor([edge * (1 - 1e-12), edge * (1 + 1e-12)], dtype=torch.float64)
    left, right = _log_standard_improvement(around)
    assert_close(left, right, rtol=1e-11, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what BoTorch imports
def test_it_is_botorchs():
    from botorch.acquisition.analytic import _log_ei_helper

    z = torch.cat([torch.linspace(-1e3, 30, 500), torch.tensor([-1e8, -1e5, 1e4])]).double()
    assert_close(_log_standard_improvement(z), _log_ei_helper(z), rtol=1e-10, atol=1e-10)


def test_it_is_the_mean_of_draws():
    own, generator = posterior_of(), rng(0)
    prediction = own.predict(pool())
    for goal, sign in (("maximize", 1), ("minimize", -1)):
        best = float(prediction.mean.mean())
        draws = prediction.output.sample(200_000, generator).squeeze(-1)
        gains = (sign * (draws - best)).clamp(min=0)
        found = ExpectedImprovement(best, goal).scores(prediction).exp()
        assert bool(((found - gains.mean(0)).abs() < 5 * gains.std(0) / 200_000**0.5).all())


def test_noise_is_no_improvement():
    one, other = posterior_of(), posterior_of()
    other.likelihood.set_noise_scale(10.0)
    acquisition = ExpectedImprovement(0.3, "minimize")
    assert_close(*(acquisition.scores(acquisition.look(own, pool())) for own in (one, other)))


def test_far_candidates_are_still_told_apart():
    """Where the expectation itself is 0 in float64."""
    scores = ExpectedImprovement(100.0, "maximize").scores(view([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]))
    assert bool((scores.exp() == 0).all())
    assert bool(torch.isfinite(scores).all())
    assert scores.argsort().tolist() == [0, 1, 2]
    assert ExpectedImprovement(100.0, "maximize").select(view([0.0, 1.0, 2.0], [1.0] * 3), 2).tolist() == [2, 1]


def test_a_candidate_that_is_known_improves_by_what_it_is_better():
    scores = ExpectedImprovement(1.0, "minimize").scores(view([0.25, 1.0, 3.0], [0.0, 0.0, 0.0]))
    assert_close(scores[0].exp(), torch.tensor(0.75, dtype=torch.float64))
    assert scores[1].exp() < 1e-100
    assert scores[2].exp() == 0


def test_both_goals_mirror_each_other():
    up = ExpectedImprovement(0.5, "maximize").scores(view([0.1, 0.9, -3.0], [0.3, 0.2, 1.0]))
    down = ExpectedImprovement(-0.5, "minimize").scores(view([-0.1, -0.9, 3.0], [0.3, 0.2, 1.0]))
    assert_close(up, down)


def test_best_is_set_anew():
    acquisition, own = ExpectedImprovement(0.0, "maximize"), view([0.1, 0.9], [0.3, 0.2])
    before = acquisition.scores(own)
    acquisition.best = 0.5
    assert bool((acquisition.scores(own) < before).all())


def regressor_of_sklearns(noise: float = 0.0) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor

    inputs = randn(9, 3, seed=2).double().numpy()
    return GaussianProcessRegressor(alpha=1e-6 + noise, optimizer=None).fit(inputs, np.sin(inputs.sum(1)))


def test_regressors_with_standard_deviations_drop_in():
    """Jones's expected improvement of the mean and the standard deviation that scikit-learn's regressor gives."""
    own, candidates = regressor_of_sklearns(), pool().double()
    mean, stddev = own.predict(candidates.numpy(), return_std=True)
    z = (mean - 0.2) / stddev
    expected = stddev * (stats.norm.pdf(z) + z * stats.norm.cdf(z))
    acquisition = ExpectedImprovement(0.2, "maximize")
    assert_close(acquisition.scores(acquisition.look(own, candidates)).exp(), torch.as_tensor(expected))


def test_bayesian_regressors_drop_in_in_the_units_of_the_data():
    """The estimator's epistemic variance, not that of a noisy target."""
    inputs, candidates = randn(20, 3, seed=2).double(), pool().double()
    own = BayesianMLPRegressor((4,), max_iter=5, random_state=0).fit(inputs.numpy(), 100 + inputs.sum(1).numpy())
    prediction = own.predict_distribution(candidates.numpy())
    acquisition = ExpectedImprovement(101.0, "minimize")
    assert_close(acquisition.scores(acquisition.look(own, candidates)), acquisition.scores(prediction))
    assert abs(float(acquisition.look(own, candidates).mean.mean()) - 100) < 10


def test_a_committee_drops_in():
    own = Committee([regressor_of_sklearns(noise) for noise in (0.0, 0.1, 1.0)])
    means = torch.as_tensor(np.stack([each.predict(pool().double().numpy()) for each in own.members]))
    acquisition = ExpectedImprovement(0.2, "maximize")
    expected = acquisition.scores(SimpleNamespace(mean=means.mean(0), epistemic_variance=means.var(0, correction=0)))
    assert_close(acquisition.scores(acquisition.look(own, pool().double())), expected)


def test_best_is_set_anew_in_a_loop():
    """Each round picks what improves most on the best label so far, by scikit-learn's regressor."""
    from sklearn.gaussian_process import GaussianProcessRegressor

    grid = torch.linspace(-2, 2, 41, dtype=torch.float64).unsqueeze(1)
    targets = torch.sin(2 * grid[:, 0]) - grid[:, 0] ** 2 / 4
    acquisition = ExpectedImprovement(float(targets[:2].max()), "maximize")
    learner, predictor = GaussianProcessRegressor(alpha=1e-6, optimizer=None), None
    for state in loop(grid, targets, acquisition, learner, initial=[0, 1], rounds=8, progress=False):
        if predictor is not None:
            rest = torch.ones(len(grid), dtype=torch.bool)
            rest[state.labelled[:-1]] = False
            scores = acquisition.scores(acquisition.look(predictor, grid))
            assert int(state.chosen) == int(scores.masked_fill(~rest, -torch.inf).argmax())
        acquisition.best, predictor = float(state.data.targets.max()), state.predictor
    assert acquisition.best == pytest.approx(float(targets.max()), abs=1e-3)


# Thompson sampling


def test_functions_are_drawn_jointly():
    """The covariance between candidates is that of the linearised model, and so is the mean."""
    own = posterior_of()
    functions = ThompsonSampling("maximize", num_samples=40_000).look(own, pool(), generator=rng(0))
    K = dense_function_covariance(own, pool(), pool())[..., 0, 0]
    spread = (K.diagonal().outer(K.diagonal()) + K**2).sqrt() / 200  # of an empirical covariance of so many draws
    assert bool(((torch.cov(functions.T) - K).abs() < 5 * spread).all())
    error = functions.mean(0) - dense_mean(own, pool()).squeeze(-1)
    assert bool((error.abs() < 5 * K.diagonal().sqrt() / 200).all())


def test_scores_are_how_often_a_candidate_is_the_optimum():
    functions = torch.tensor([[1.0, 2, 3], [3, 1, 2], [0, 1, 2], [5, 4, 6]])
    acquisition = ThompsonSampling("maximize", num_samples=4)
    assert acquisition.scores(functions).tolist() == [0.25, 0, 0.75]


def test_each_pick_is_the_best_of_its_function_that_is_left():
    functions = torch.tensor([[1.0, 2, 3], [3, 1, 4], [0, 1, 2]])
    acquisition = ThompsonSampling("maximize", num_samples=3)
    kept = functions.clone()
    assert acquisition.select(functions, 3).tolist() == [2, 0, 1]
    assert_close(functions, kept)


def test_the_goal_turns_functions_around():
    own = posterior_of()
    up, down = (ThompsonSampling(goal).look(own, pool(), generator=rng(0)) for goal in ("maximize", "minimize"))
    assert_close(up, -down)
    draws = own.sample(64, generator=rng(0))
    assert_close(up, own.function_samples(pool(), draws=draws).squeeze(-1))


def test_the_same_generator_gives_the_same_picks():
    acquisition, own = ThompsonSampling("minimize"), posterior_of()
    one, other, third = (
        acquisition.select(acquisition.look(own, pool(), generator=rng(seed)), 4).tolist() for seed in (0, 0, 3)
    )
    assert one == other
    assert len(set(one)) == 4
    assert one != third


def test_a_loader_and_an_array_see_the_same_functions():
    own, acquisition = posterior_of(), ThompsonSampling("maximize", num_samples=5)
    loader = DataLoader(TensorDataset(pool(), pool()), batch_size=3)
    whole, *others = (acquisition.look(own, inputs, generator=rng(0)) for inputs in (pool(), loader, pool().numpy()))
    for functions in others:
        assert_close(functions, whole)
    improvement = ExpectedImprovement(0.0, "maximize")
    assert_close(*(improvement.scores(improvement.look(own, inputs)) for inputs in (pool(), loader)))


# What is refused


def test_refuses_arguments_that_are_none():
    for make in (lambda goal: ExpectedImprovement(0.0, goal), ThompsonSampling):
        with pytest.raises(ArgumentError, match=r"goal='up' is unknown. Allowed: 'minimize', 'maximize'"):
            make("up")
    for best in (math.nan, math.inf, "low", None):
        with pytest.raises(ArgumentError, match=r"best=.*Allowed: a finite number"):
            ExpectedImprovement(best, "maximize")
    with pytest.raises(ArgumentError, match="num_samples=0"):
        ThompsonSampling("maximize", num_samples=0)


def test_refuses_several_outputs():
    own = posterior_of(outputs=2)
    acquisition = ExpectedImprovement(0.0, "maximize")
    with pytest.raises(ArgumentError, match=r"The target has 2 outputs. Allowed: 1"):
        acquisition.scores(acquisition.look(own, pool()))
    with pytest.raises(ArgumentError, match=r"The target has 2 outputs. Allowed: 1"):
        ThompsonSampling("maximize").look(own, pool())
    classes = random_posterior(seeded(nn.Sequential(nn.Linear(3, 3))), Categorical())
    with pytest.raises(ArgumentError, match=r"The target has 3 outputs"):
        acquisition.scores(acquisition.look(classes, pool(), generator=rng(0)))


def test_refuses_more_picks_than_there_are():
    functions = torch.randn(3, 5, generator=rng(0))
    with pytest.raises(ArgumentError, match=r"count=4 is more than the 3 functions .*num_samples=4"):
        ThompsonSampling("maximize").select(functions, 4)
    with pytest.raises(ArgumentError, match="count=6 is more than the 5 candidates"):
        ThompsonSampling("maximize").select(functions, 6)


@pytest.mark.parametrize("acquisition", [ExpectedImprovement(0.0, "maximize"), ThompsonSampling("maximize")])
def test_refuses_candidates_that_are_no_numbers(acquisition):
    """Which would be picked first: NaN is the greatest of all."""
    broken = pool()
    broken[[2, 4]] = torch.nan
    for inputs in (broken, DataLoader(TensorDataset(broken), batch_size=3)):
        with pytest.raises(NonFiniteError, match=f"2 of {POOL} scores are NaN, the first that of candidate 2"):
            acquisition.select(acquisition.look(posterior_of(), inputs), 1)


def test_refuses_predictors_that_predict_nothing():
    with pytest.raises(ArgumentError, match="A Linear has neither predict nor predict_proba"):
        ExpectedImprovement(0.0, "maximize").look(nn.Linear(3, 1), pool())


def test_refuses_regressors_that_do_not_know_how_sure_they_are():
    from sklearn.linear_model import LinearRegression

    own = LinearRegression().fit(pool().numpy(), pool().sum(1).numpy())
    acquisition = ExpectedImprovement(0.0, "maximize")
    with pytest.raises(
        UsageError, match=r"ExpectedImprovement needs epistemic_variance, which predict alone.*return_std"
    ):
        acquisition.scores(acquisition.look(own, pool()))


def test_refuses_predictors_that_draw_no_functions():
    with pytest.raises(ArgumentError, match="predictor is a SimpleNamespace, which draws no functions"):
        ThompsonSampling("maximize").look(SimpleNamespace(predict=None), pool())
