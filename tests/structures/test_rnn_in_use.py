"""Recurrent networks with chains: their positions are in the order of time; training, Laplace fits and prediction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Rows
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import ChainGaussian, KroneckerEigenGaussian, MatrixNormalGaussian
from tests.curvature.modules.cases import Model
from tests.helpers import TIGHT, randn, record, rng, seeded
from tests.posteriors import dense_covariances, dense_function_covariance, dense_output_covariance

BATCH, TIME, IN, HIDDEN = 3, 5, 2, 4
INPUTS = randn(BATCH, TIME, IN, seed=1)
CHAINS = {"rnn_chain_1": KroneckerEigenGaussian, "rnn_chain_2": ChainGaussian}


@pytest.fixture(params=list(CHAINS))
def structure(request: pytest.FixtureRequest) -> str:
    return request.param


# The order of time


class Elman(nn.Module):
    """A recurrence written out, that keeps its pre-activations: the same function as ``nn.RNN`` with a head."""

    def __init__(self, source: nn.Module, *, backwards: bool) -> None:
        super().__init__()
        self.source = source
        self.suffix = "l0_reverse" if backwards else "l0"
        self.states: list[Tensor] = []
        self.activations: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        weights = {
            name: getattr(self.source, f"{name}_{self.suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        state, outputs = x.new_zeros(len(x), HIDDEN), {}
        self.states, self.activations = [state] * TIME, [state] * TIME
        for t in reversed(range(TIME)) if "reverse" in self.suffix else range(TIME):
            self.states[t] = state
            activation = x[:, t] @ weights["weight_ih"].mT + weights["bias_ih"] + weights["bias_hh"]
            activation = activation + state @ weights["weight_hh"].mT
            self.activations[t] = activation
            outputs[t] = state = activation.tanh()
        return torch.stack([outputs[t] for t in range(TIME)], dim=1)


@pytest.mark.parametrize("backwards", [False, True])
def test_rows_of_a_recurrence_are_in_the_order_of_time(backwards):
    """Inputs and gradients of every step, by autograd of the recurrence written out; either direction."""
    source = seeded(nn.RNN(IN, HIDDEN, batch_first=True, bidirectional=True))
    head, written_out = seeded(nn.Linear(HIDDEN, 1)), Elman(source, backwards=backwards)
    part = slice(HIDDEN, None) if backwards else slice(HIDDEN)
    model = Model(lambda model, x: model.head(model.rnn(x)[0][..., part].sum(1)), rnn=source, head=head)
    output = head(written_out(INPUTS).sum(1))
    gradients = torch.stack(torch.autograd.grad(output.sum(), written_out.activations), dim=1)
    rows = record(model, INPUTS)
    for kind, inputs in (("ih", INPUTS), ("hh", torch.stack(written_out.states, dim=1))):
        found = rows[f"rnn.{kind}_{written_out.suffix}"]
        assert_close(found.inputs[..., :-1], inputs, **TIGHT)
        assert_close(found.gradients[0], gradients, **TIGHT)


def in_a_loop(cell: nn.Module) -> Callable[..., Tensor]:
    """All states of a cell that is called step by step."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        state, states = None, []
        for step in x.unbind(1):
            state = model.rnn(step, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, dim=1)

    return run


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: getattr(nn, kind)(IN, HIDDEN, batch_first=True) for kind in ("RNN", "LSTM", "GRU")},
    **{kind: lambda kind=kind: getattr(nn, kind)(IN, HIDDEN) for kind in ("RNNCell", "LSTMCell", "GRUCell")},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_the_lag_of_states_is_that_of_the_recurrence(structure, name):
    """``Σ_t h_t h_{t−1}ᵀ`` of the states that the module itself gives, whole sequences and cells in a loop alike."""
    rnn = seeded(RECURRENT[name]())
    run = in_a_loop(rnn) if name.endswith("Cell") else (lambda model, x: model.rnn(x)[0])
    model = Model(lambda model, x: model.head(run(model, x)[:, -1]), rnn=rnn, head=seeded(nn.Linear(HIDDEN, 1)))
    (rows,) = (rows for key, rows in record(model, INPUTS).items() if ".hh" in key)
    with torch.no_grad():
        outputs = run(model, INPUTS)
    states = torch.cat([torch.zeros(BATCH, 1, HIDDEN).double(), outputs[:, :-1]], dim=1)
    statistics = structures.get(structure, damping="factored", sharing="expand").measure(rows)
    expected = torch.einsum("nti,ntj->ij", states[:, 1:], states[:, :-1])
    assert_close(statistics.sums["lagged_input"][:-1, :-1], expected, **TIGHT)
    assert statistics.counts["input"] / statistics.counts["gradient"] == TIME
    gradients = rows.gradients[0]
    expected = torch.einsum("nti,ntj->ij", gradients[:, 1:], gradients[:, :-1])
    assert_close(statistics.sums["lagged_gradient"], expected, **TIGHT)


@pytest.mark.parametrize("flattened", [False, True])
def test_a_linear_layer_over_time_is_a_chain(structure, flattened):
    """Also where ``[batch, time]`` is flattened before it."""

    def function(model: nn.Module, x: Tensor) -> Tensor:
        return model.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if flattened else model.layer(x)

    rows = record(Model(function, layer=seeded(nn.Linear(IN, 2))), INPUTS)["layer"]
    statistics = structures.get(structure, damping="factored", sharing="expand").measure(rows)
    expected = torch.einsum("nti,ntj->ij", INPUTS[:, 1:], INPUTS[:, :-1])
    assert_close(statistics.sums["lagged_input"][:-1, :-1], expected, **TIGHT)


def test_padding_of_a_recurrence_changes_nothing(structure):
    """A batch of padded sequences with a mask is measured as the sequences are one by one."""
    rnn, head, lengths = seeded(nn.GRU(IN, HIDDEN, batch_first=True)), seeded(nn.Linear(HIDDEN, 1)), [5, 2, 4]
    model = Model(lambda model, x: model.head(model.rnn(x)[0]).squeeze(-1), rnn=rnn, head=head)
    mask = torch.arange(TIME) < torch.tensor(lengths)[:, None]
    measure = structures.get(structure, damping="factored", sharing="expand").measure
    together = record(model, INPUTS, randn(1, BATCH, TIME, seed=2) * mask, mask=mask)
    for name, rows in together.items():
        alone = None
        for n, length in enumerate(lengths):
            gradients = randn(1, BATCH, TIME, seed=2)[:, n : n + 1, :length]
            own = measure(record(model, INPUTS[n : n + 1, :length], gradients)[name])
            alone = own if alone is None else alone + own
        for key, value in measure(rows).sums.items():
            assert_close(value, alone.sums[key], **TIGHT)
        assert dict(measure(rows).counts) == dict(alone.counts)


# Training


class Counter(nn.Module):
    """A recurrent network that says after each step how much it has seen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).squeeze(-1)


def sums(num: int = 128, time: int = 8) -> tuple[Tensor, Tensor]:
    """Signs, and their sums so far that fade by a tenth at each step."""
    signs = torch.randint(0, 2, (num, time), generator=rng(0)).float() * 2 - 1
    faded = [signs[:, 0]]
    for step in signs[:, 1:].unbind(1):
        faded.append(0.9 * faded[-1] + step)
    return signs.unsqueeze(-1), torch.stack(faded, dim=1) / 2


def train(structure: str, kind: str, steps: int = 120, **options) -> tuple[bk.NoisyNaturalGradient, list[float]]:
    x, y = sums()
    optimizer = bk.NoisyNaturalGradient(
        seeded(Counter(kind)).float(),
        bk.likelihoods.Gaussian(0.3),
        num_data=len(x),
        lr=0.1,
        structure=structure,
        statistics_every=1,
        inverse_every=5,
        generator=rng(0),
        **options,
    )
    history = []
    for _ in range(steps):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss = optimizer.likelihood(optimizer.model(x), y)
            loss.backward()
        optimizer.step()
        history.append(loss.item())
    return optimizer, history


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_noisy_training_of_a_recurrent_network_learns_to_count(structure, kind):
    optimizer, history = train(structure, kind)
    x, y = sums()
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    posterior = optimizer.posterior()
    assert type(posterior.blocks["rnn.hh_l0"]) is CHAINS[structure]
    assert type(posterior.blocks["head"]) is CHAINS[structure]
    assert (posterior.predict(x).mean - y).square().mean() < 0.3 * y.var()


def test_samples_of_a_trained_posterior_have_its_covariance(structure):
    """By four thousand draws of the weights of the recurrence, to five standard errors."""
    optimizer, _ = train(structure, "GRU", steps=20)
    posterior = optimizer.posterior()
    (name,) = (name for name in posterior.blocks if ".ih" in name)
    layer, count = posterior.layers[name], 4000
    draws = posterior.sample(count, generator=rng(0)).values
    drawn = torch.stack([layer.matrix({key: value[n] for key, value in draws.items()}) for n in range(count)])
    away = (drawn - layer.matrix(posterior.mean)).flatten(1).double()
    covariance = dense_covariances(posterior)[name].double()
    white = away @ torch.linalg.cholesky(torch.linalg.inv(covariance))
    found = white.mT @ white / count - torch.eye(len(covariance))
    assert float(found.abs().max()) < 5 * (2 / count) ** 0.5


# Laplace fits and prediction


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, (x, y) = Counter("GRU").double(), sums(32, 5)
    x, y = x.double(), y.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model, x, y


def test_a_laplace_fit_predicts_as_its_dense_gaussians(structure, fitted):
    """Linearised, in closed form; the joint covariance of several sequences too."""
    model, x, y = fitted
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure, fisher="exact")
    posterior = laplace.fit(DataLoader(TensorDataset(x, y), batch_size=10), progress=False).posterior()
    assert {type(block) for block in posterior.blocks.values()} == {CHAINS[structure]}
    mean, covariance = dense_output_covariance(posterior, x[:4])
    prediction = posterior.predict(x[:4])
    assert_close(prediction.mean, mean, **TIGHT)
    assert_close(prediction.epistemic_variance.flatten(1), covariance.diagonal(dim1=-2, dim2=-1), rtol=1e-8, atol=1e-10)
    joint = posterior.function_covariance(x[:3], x[3:5])
    expected = dense_function_covariance(posterior, x[:3], x[3:5])
    assert_close(joint.reshape(expected.shape), expected, rtol=1e-8, atol=1e-10)


def test_batches_of_a_laplace_fit_do_not_matter(structure, fitted):
    model, x, y = fitted
    blocks = []
    for batch_size in (7, 32):
        laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure, fisher="exact")
        blocks.append(laplace.fit(DataLoader(TensorDataset(x, y), batch_size), progress=False).posterior().blocks)
    for name, block in blocks[0].items():
        assert_close(block.to_dense(), blocks[1][name].to_dense(), rtol=1e-8, atol=1e-8)


def test_the_evidence_of_a_chain_improves_by_tuning(structure, fitted):
    model, x, y = fitted
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure, fisher="exact")
    laplace.fit([(x, y)], progress=False)
    before = laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision(progress=False)
    assert laplace.log_marginal_likelihood() > before + 1


def test_a_chain_is_nearer_to_the_fisher_of_a_recurrent_network_than_independent_time(fitted):
    """Of a trained network, whose Fisher is the dense one: blocks that see time have half to two thirds the error."""
    model, x, y = fitted

    def precisions(name: str) -> dict[str, Tensor]:
        laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=name, fisher="exact", prior_precision=1e-4)
        blocks = laplace.fit([(x, y)], progress=False).posterior().blocks
        return {key: block.to_dense() for key, block in blocks.items()}

    truth, found = precisions("dense"), {name: precisions(name) for name in ("kron", *CHAINS)}
    errors = {
        name: {key: float((P - truth[key]).norm() / truth[key].norm()) for key, P in own.items()}
        for name, own in found.items()
    }
    for key in ("rnn.ih_l0", "rnn.hh_l0"):
        assert errors["rnn_chain_2"][key] < errors["rnn_chain_1"][key] < 0.7 * errors["kron"][key]


def test_the_posterior_of_one_task_is_the_prior_of_the_next(structure, fitted):
    """As the nearest matrix normals; as it is, it is refused with this remedy."""
    model, x, y = fitted
    first = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure).fit([(x, y)], progress=False)
    old = first.posterior()
    with pytest.raises(ArgumentError, match=r"nearest_matrix_normal\(\)"):
        bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure, prior=old).fit(
            [(x, y)], progress=False
        ).posterior()
    prior = old.nearest_matrix_normal()
    second = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure, prior=prior)
    both = second.fit([(x, y)], progress=False).posterior()
    assert bool(torch.isfinite(second.log_marginal_likelihood()))
    for name, block in both.blocks.items():
        assert bool((block.marginal_variance() < prior.blocks[name].marginal_variance()).all())


def test_a_layer_after_time_stays_a_matrix_normal(structure):
    """A head on the last state is used once: nothing is paid for it."""
    rnn, head = nn.GRU(IN, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 1)
    model = seeded(Model(lambda model, x: model.head(model.rnn(x)[0][:, -1]), rnn=rnn, head=head))
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure)
    posterior = laplace.fit([(INPUTS, randn(BATCH, 1, seed=2))], progress=False).posterior()
    assert type(posterior.blocks["head"]) is MatrixNormalGaussian
    assert type(posterior.blocks["rnn.hh_l0"]) is CHAINS[structure]


def test_a_posterior_of_chains_comes_back_from_its_file(structure, fitted, tmp_path):
    model, x, y = fitted
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.3), structure=structure)
    posterior = laplace.fit([(x, y)], progress=False).posterior()
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", Counter("GRU").double())
    assert torch.equal(again.predict(x).variance, posterior.predict(x).variance)


def test_one_example_at_a_time_is_a_chain_too(structure):
    """Rows of a lone sequence."""
    rows = Rows(randn(1, 6, 3, seed=0), randn(1, 1, 6, 2, seed=1))
    statistics = structures.get(structure, damping="factored", sharing="expand").measure(rows)
    assert statistics.counts == {"input": 6.0, "gradient": 1.0, "lagged_input": 6.0, "lagged_gradient": 1.0}
