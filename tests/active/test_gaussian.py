"""Closed-form information about a regression: equal to determinants of dense joint covariances, pick after pick."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import Posterior
from bayes_kfac.active.base import Gains, greedy
from bayes_kfac.active.gaussian import GaussianGains, GaussianPredictiveGains
from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.likelihoods.noise import GammaNoise
from tests.helpers import in_block, randn, rng, seeded
from tests.joints import as_vector, dense_covariance
from tests.posteriors import FAMILIES, dense_derivatives, dense_function_covariance, random_posterior

CLOSE = {"rtol": 1e-8, "atol": 1e-8}
POOL, TARGETS, PICKS = 6, 4, 3


def mlp(outputs: int) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def pool() -> Tensor:
    return randn(POOL, 3, seed=1)


def targets() -> Tensor:
    return randn(TARGETS, 3, seed=2)


@cache
def linked() -> Posterior:
    x = randn(40, 3, seed=5)
    laplace = bk.Laplace(mlp(2), Gaussian([0.5, 0.8]), structure="tridiagonal", prior_precision=1.3)
    laplace.fit([(x, x[:, :2].sin())], progress=False)
    made = laplace.posterior()
    assert made.blocks.links
    return made


@cache
def trained(noise: str) -> Posterior:
    """By noisy natural gradient, at a temperature."""
    x = randn(40, 3, seed=5)
    scale = {"learned": "learned", "gamma": GammaNoise(6.0, 6.0)}[noise]
    loader = DataLoader(TensorDataset(x, x[:, :2].sin()), batch_size=10)
    options: dict[str, Any] = {"temperature": 0.5, "generator": rng(0), "progress": False}
    return bk.fit(mlp(2), Gaussian(scale).double(), loader, epochs=4, **options)


@cache
def by_family(structure: str, damping: str, outputs: int) -> Posterior:
    noise = torch.tensor(0.4 if outputs == 1 else [0.3, 0.5, 0.9], dtype=torch.float64)
    return random_posterior(mlp(outputs), Gaussian(noise), structure=structure, damping=damping)


POSTERIORS = {
    **{f"{name}-{damping}-{c}": (by_family, name, damping, c) for name, damping in FAMILIES for c in (1, 3)},
    "linked": (linked,),
    "learned noise": (trained, "learned"),
    "gamma noise": (trained, "gamma"),
}


@pytest.fixture(params=POSTERIORS)
def posterior(request: pytest.FixtureRequest) -> Posterior:
    make, *arguments = POSTERIORS[request.param]
    return make(*arguments)


@pytest.fixture
def simple() -> Posterior:
    return by_family("kron", "exact", 1)


class Dense:
    """The joint covariance of noisy targets at all inputs, written out, over the noise's."""

    def __init__(self, posterior: Posterior, inputs: Tensor) -> None:
        if posterior.blocks.links:
            derivatives = dense_derivatives(posterior, inputs)
            J = as_vector({name: in_block(layer, derivatives) for name, layer in posterior.layers.items()})
            K = torch.einsum("nci,ij,mdj->nmcd", J, dense_covariance(posterior.blocks), J)
        else:
            K = dense_function_covariance(posterior, inputs, inputs)
        n, _, self.outputs, _ = K.shape
        prediction = posterior.predict(inputs[:1])
        scale = prediction.aleatoric_variance[0].sqrt().repeat(n)  # of what predictions call noise
        self.matrix = K.transpose(1, 2).reshape(n * self.outputs, -1) / scale / scale[:, None]
        self.matrix = self.matrix + torch.eye(len(self.matrix))

    def half_logdet(self, examples: list[int]) -> Tensor:
        """``½ log det`` of the block of some examples: their information about the weights."""
        at = [example * self.outputs + output for example in examples for output in range(self.outputs)]
        return 0.5 * torch.logdet(self.matrix[at][:, at])

    def gains(self, picked: list[int], size: int) -> Tensor:
        before = self.half_logdet(picked) if picked else torch.zeros(())
        return torch.stack([self.half_logdet([*picked, i]) - before for i in range(size)])

    def predictive_gains(self, picked: list[int], size: int) -> Tensor:
        """The mean over the examples from ``size`` on of ``I(y; y* | picked)``, by four determinants each."""
        entropy = self.half_logdet(picked) if picked else torch.zeros(())

        def information(i: int, t: int) -> Tensor:
            both = self.half_logdet([*picked, i]) + self.half_logdet([*picked, t])
            return both - entropy - self.half_logdet([*picked, i, t])

        others = range(size, len(self.matrix) // self.outputs)
        return torch.stack([torch.stack([information(i, t) for t in others]).mean() for i in range(size)])


# Against dense determinants


def test_information_about_weights_is_that_of_determinants(posterior):
    """Pick after pick, of picked candidates only where they are not picked yet: no determinant holds one twice."""
    dense, gains = Dense(posterior, pool()), GaussianGains(posterior, pool())
    picked: list[int] = []
    for index in (2, 0, 5):
        others = [i for i in range(POOL) if i not in picked]
        assert_close(gains.scores[others], dense.gains(picked, POOL)[others], **CLOSE)
        gains.add(index)
        picked.append(index)
    assert gains.scores.shape == (POOL,)


def test_information_about_predictions_is_that_of_determinants(posterior):
    dense = Dense(posterior, torch.cat([pool(), targets()]))
    gains = GaussianPredictiveGains(posterior, pool(), targets())
    picked: list[int] = []
    for index in (1, 4, 3):
        others = [i for i in range(POOL) if i not in picked]
        assert_close(gains.scores[others], dense.predictive_gains(picked, POOL)[others], **CLOSE)
        gains.add(index)
        picked.append(index)


def test_a_second_label_is_a_further_example_at_the_same_input(posterior):
    """The score of a picked candidate is that of its copy, which has a noise of its own."""
    twice = torch.cat([pool(), pool()[:1]])
    dense, gains = Dense(posterior, twice), GaussianGains(posterior, pool())
    gains.add(0)
    assert_close(gains.scores[0], dense.gains([0], POOL + 1)[-1], **CLOSE)
    predictive = GaussianPredictiveGains(posterior, pool(), targets())
    predictive.add(0)
    dense = Dense(posterior, torch.cat([twice, targets()]))
    assert_close(predictive.scores[0], dense.predictive_gains([0], POOL + 1)[-1], **CLOSE)


def test_for_one_output_it_is_the_variance_in_units_of_the_noise(simple):
    variance = simple.predict(pool()).epistemic_variance[:, 0]
    assert_close(GaussianGains(simple, pool()).scores, 0.5 * torch.log1p(variance / 0.4**2), **CLOSE)


def test_information_about_predictions_at_many_copies_is_at_most_that_about_weights(posterior):
    """``I(y; y*) ≤ I(y; w)``: of what is learned about the weights, a prediction needs a part."""
    weights, predictions = GaussianGains(posterior, pool()), GaussianPredictiveGains(posterior, pool(), targets())
    for index in (3, 1):
        assert bool((predictions.scores <= weights.scores + 1e-12).all())
        weights.add(index)
        predictions.add(index)


# Against draws


def test_information_about_weights_is_that_of_draws(simple):
    """``E log p(y | w) − E log p(y)`` of two candidates, with ``p(y)`` as a mean over functions."""
    x, scale = pool()[:2], 0.4
    gains = GaussianGains(simple, x)
    total = gains.scores[0].clone()
    gains.add(0)
    total += gains.scores[1]
    functions = simple.function_samples(x, 3000, generator=rng(1)).squeeze(-1)
    y = functions + scale * torch.randn(functions.shape, generator=rng(2), dtype=torch.float64)
    given_weights = Normal(functions, scale).log_prob(y).sum(-1)
    terms = given_weights - log_evidence(y, functions, scale)
    assert abs(terms.mean() - total) < 4 * terms.std() / len(terms) ** 0.5


def test_information_about_predictions_is_that_of_draws(simple):
    """``E log p(y, y*) / (p(y) p(y*))`` with each density as a mean over functions."""
    inputs, scale = torch.cat([pool()[:1], targets()[:1]]), 0.4
    (found,) = GaussianPredictiveGains(simple, pool()[:1], targets()[:1]).scores
    assert found > 0.01
    functions = simple.function_samples(inputs, 3000, generator=rng(1)).squeeze(-1)
    y = functions + scale * torch.randn(functions.shape, generator=rng(2), dtype=torch.float64)
    alone = [log_evidence(y[:, [i]], functions[:, [i]], scale) for i in range(2)]
    terms = log_evidence(y, functions, scale) - alone[0] - alone[1]
    assert abs(terms.mean() - found) < 4 * terms.std() / len(terms) ** 0.5


def log_evidence(y: Tensor, functions: Tensor, scale: float) -> Tensor:
    """The log of the mean density of ``[draws, examples]`` over functions other than their own."""
    densities = Normal(functions, scale).log_prob(y.unsqueeze(1)).sum(-1)
    densities.fill_diagonal_(-torch.inf)
    return densities.logsumexp(1) - torch.tensor(len(y) - 1.0).log()


# Greedy batches


@pytest.mark.parametrize("outputs", [1, 3])
def test_greedy_is_as_good_as_it_must_be(outputs):
    """The first pick is the best; a batch has at least ``1 − 1/e`` of what the best batch has."""
    own = by_family("kron", "exact", outputs)
    dense = Dense(own, pool())
    picked = greedy(GaussianGains(own, pool()), PICKS).tolist()
    assert len(set(picked)) == PICKS
    assert picked[0] == int(torch.stack([dense.half_logdet([i]) for i in range(POOL)]).argmax())
    best = max(dense.half_logdet(list(batch)) for batch in itertools.combinations(range(POOL), PICKS))
    assert (1 - 1 / torch.e) * best <= dense.half_logdet(picked) <= best + 1e-12


def test_greedy_is_the_best_where_candidates_are_independent():
    """A linear model sees each unit vector by a weight of its own: gains never change, and the largest are the best."""
    model = seeded(nn.Sequential(nn.Linear(5, 1, bias=False)))
    own = random_posterior(model, Gaussian(0.5), structure="diagonal", damping="exact")
    x = torch.eye(5, dtype=torch.float64)
    dense = Dense(own, x)
    found = greedy(GaussianGains(own, x), 3)
    best = max(itertools.combinations(range(5), 3), key=lambda batch: float(dense.half_logdet(list(batch))))
    assert sorted(found.tolist()) == list(best)
    assert_close(found, GaussianGains(own, x).scores.topk(3).indices)


def test_batches_avoid_what_top_scores_repeat(simple):
    """Five copies of the best candidate: its scores fill a batch by themselves, the batch by joint information not."""
    scores = GaussianGains(simple, pool()).scores
    best = int(scores.argmax())
    crowded = torch.cat([pool(), pool()[best].expand(5, 3)])
    gains = GaussianGains(simple, crowded)
    assert set(gains.scores.topk(4).indices.tolist()) <= {best, *range(POOL, POOL + 5)}
    picked = crowded[greedy(gains, 4)]
    assert len(picked.unique(dim=0)) > 1
    dense = Dense(simple, crowded)
    assert dense.half_logdet(greedy(GaussianGains(simple, crowded), 4).tolist()) > dense.half_logdet([6, 7, 8, 9])


# Invariances


@given(st.permutations(range(POOL)), st.sampled_from([1, 3]))
def test_gains_only_fall_and_do_not_depend_on_the_order(order, outputs):
    """Submodular: more picks leave less to gain; the sum over picks is the batch's, in any order."""
    own = by_family("kron", "exact", outputs)
    gains, total = GaussianGains(own, pool()), torch.zeros((), dtype=torch.float64)
    before = gains.scores
    for index in order:
        total += gains.scores[index]
        gains.add(index)
        assert bool((gains.scores <= before + 1e-10).all())
        assert gains.scores[index] < before[index]
        before = gains.scores
    assert_close(total, Dense(own, pool()).half_logdet(list(range(POOL))), **CLOSE)


@given(st.permutations(range(POOL)))
def test_scores_go_with_their_candidates(order):
    own = by_family("kron", "exact", 3)
    for make in (lambda x: GaussianGains(own, x), lambda x: GaussianPredictiveGains(own, x, targets())):
        plain, permuted = make(pool()), make(pool()[order])
        plain.add(order[2])
        permuted.add(2)
        assert_close(permuted.scores, plain.scores[order], **CLOSE)


@pytest.mark.parametrize("budget", [1, 700, 1500, 5000])
def test_pieces_make_no_difference(budget):
    own = by_family("kron", "exact", 3)

    def after(**options: Any) -> list[Tensor]:
        weights = GaussianGains(own, pool(), **options)
        predictions = GaussianPredictiveGains(own, pool(), targets(), **options)
        found = []
        for index in (4, 0):
            found += [weights.scores, predictions.scores]
            weights.add(index)
            predictions.add(index)
        return [*found, weights.scores, predictions.scores]

    for pieces, whole in zip(after(memory_budget=budget), after(), strict=True):
        assert_close(pieces, whole, **CLOSE)


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_loaders_are_pools_and_targets(simple, budget):
    """With targets in their batches or without, the last batch smaller than the others."""
    loader = DataLoader(TensorDataset(pool(), randn(POOL, 1, seed=9)), batch_size=4)
    others = DataLoader(targets(), batch_size=3)
    for mine, plain in [
        (GaussianGains(simple, loader, memory_budget=budget), GaussianGains(simple, pool())),
        (
            GaussianPredictiveGains(simple, loader, others, memory_budget=budget),
            GaussianPredictiveGains(simple, pool(), targets()),
        ),
    ]:
        assert_close(greedy(mine, 4), greedy(plain, 4))
        assert_close(mine.scores, plain.scores, **CLOSE)


def test_inputs_are_what_the_model_is_called_with():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left * right).tanh().unsqueeze(1)  # outputs of any shape, here [batch, 1, 2]

    own = random_posterior(seeded(Two()), Gaussian([[0.3, 0.6]]))
    left, right = pool(), randn(POOL, 3, seed=8)
    plain = greedy(GaussianGains(own, (left, right)), 3)
    assert_close(greedy(GaussianGains(own, {"left": left, "right": right}), 3), plain)
    predictive = GaussianPredictiveGains(own, (left, right), (targets(), targets()), memory_budget=100)
    assert bool((predictive.scores > 0).all())


# Rounding


@pytest.mark.parametrize("outputs", [1, 3])
def test_float32_stays_sound_among_near_duplicates(outputs):
    """A noise whose variance is below the rounding of the kernel: downdates cancel all digits of float32.

    Gains stay finite and are not negative, and the batch is nearly as good as that of float64.
    """
    model = mlp(outputs)
    exact = random_posterior(model, Gaussian(1e-5), prior_precision=0.1)
    crowd = pool().repeat(5, 1) + 1e-6 * randn(5 * POOL, 3, seed=4)
    dense = Dense(exact, crowd)
    single = exact.to(torch.float32)
    weights = GaussianGains(single, crowd.float())
    predictions = GaussianPredictiveGains(single, crowd.float(), targets().float())
    picked = []
    for _ in range(POOL):
        scores = weights.scores.clone()
        scores[picked] = -torch.inf
        picked.append(int(scores.argmax()))
        weights.add(picked[-1])
        predictions.add(picked[-1])
        for gains in (weights, predictions):
            assert bool(torch.isfinite(gains.scores).all())
            assert bool((gains.scores >= 0).all())
    model.double()
    best = dense.half_logdet(greedy(GaussianGains(exact, crowd), POOL).tolist())
    assert dense.half_logdet(picked) > 0.95 * best


def test_one_that_was_picked_has_little_left(simple):
    gains = GaussianGains(simple, torch.cat([pool(), pool()[:1]]))
    first = gains.scores[-1].clone()
    gains.add(0)
    assert gains.scores[-1] < first
    assert gains.scores[-1] <= 0.5 * torch.log(torch.tensor(2.0)) + 1e-12  # one noisy label's worth, however unsure


def test_predictive_gains_of_the_pool_itself(simple):
    """Of a candidate with its own copy among the targets: ``−½ log(1 − (C / (1 + C))²)``."""
    C = simple.predict(pool()[:1]).epistemic_variance[0, 0] / 0.4**2
    (found,) = GaussianPredictiveGains(simple, pool()[:1], pool()[:1]).scores
    assert_close(found, -0.5 * torch.log1p(-((C / (1 + C)) ** 2)), **CLOSE)


# What is refused


def make(kind: str, posterior: Posterior, inputs: Any, **options: Any) -> Gains:
    if kind == "weights":
        return GaussianGains(posterior, inputs, **options)
    return GaussianPredictiveGains(posterior, inputs, targets(), **options)


@pytest.mark.parametrize("kind", ["weights", "predictions"])
class TestRefuses:
    """Each error names what was wrong and what to do; nothing was picked then."""

    def test_other_likelihoods(self, kind):
        own = random_posterior(mlp(3), Categorical())
        with pytest.raises(ArgumentError, match=r"likelihood is Categorical. Allowed: Gaussian"):
            make(kind, own, pool())

    def test_loaders_that_shuffle(self, kind, simple):
        with pytest.raises(ArgumentError, match=r"inputs=DataLoader\(shuffle=True\).*shuffle=False"):
            make(kind, simple, DataLoader(pool(), batch_size=2, shuffle=True))

    def test_empty_pools(self, kind, simple):
        for empty in (pool()[:0], DataLoader(TensorDataset(pool()[:0]), batch_size=2)):
            with pytest.raises(ArgumentError, match=r"at least one"):
                make(kind, simple, empty)

    def test_models_without_a_posterior(self, kind):
        with pytest.raises(ArgumentError, match=r"posterior is a Sequential. Allowed: a Posterior"):
            make(kind, mlp(1), pool())  # type: ignore[arg-type]

    def test_inputs_that_are_not_finite(self, kind, simple):
        """Which would be picked first: NaN is the greatest of all scores."""
        broken = pool()
        broken[[2, 4]] = torch.nan
        with pytest.raises(NonFiniteError, match="2 of 6 examples of inputs is not finite, first at index 2"):
            make(kind, simple, broken)

    @pytest.mark.parametrize("index", [-1, POOL, 1.0])
    def test_others_than_candidates(self, kind, index, simple):
        gains = make(kind, simple, pool())
        before = gains.scores.clone()
        with pytest.raises(ArgumentError, match=rf"index={index} .*Allowed: (0 to 5|an integer >= 0)"):
            gains.add(index)
        assert_close(gains.scores, before)

    def test_pools_that_change_between_passes(self, kind, simple):
        """Such as by random transforms: nothing is picked then."""

        class Noisy(torch.utils.data.Dataset[Tensor]):
            def __len__(self) -> int:
                return POOL

            def __getitem__(self, index: int) -> Tensor:
                return randn(3, seed=next(seeds)) * 3

        seeds = itertools.count()
        gains = make(kind, simple, DataLoader(Noisy(), batch_size=2))
        before = gains.scores.clone()
        with pytest.raises(UsageError, match=r"Candidate 2 of inputs had the variance .*random transforms"):
            gains.add(2)
        assert_close(gains.scores, before)

    def test_examples_that_depend_on_each_other(self, kind):
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x - x.mean(0))

        gains = make(kind, random_posterior(seeded(Centred()), Gaussian(0.4)), pool())
        with pytest.raises(UsageError, match="depend on each other"):
            gains.add(1)

    def test_budgets_that_are_none(self, kind, simple):
        with pytest.raises(ArgumentError, match="memory_budget=0"):
            make(kind, simple, pool(), memory_budget=0)
