"""Statistics: the formulas, what they are exact for, and what they must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import SHARING_KINDS, Rows, Statistics, output_gradients
from bayes_kfac.curvature.statistics import kronecker_factors
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.helpers import TIGHT, assert_same_statistics, block_fishers, dense_kron, randn, record, seeded
from tests.random_rows import tied_rows, written_out

SCALE = 0.7


def gaussian() -> Likelihood:
    return Gaussian(torch.tensor(SCALE, dtype=torch.float64))


def random_rows(columns: int, blocks: tuple[int, ...], batch: int, shared: int, *, seed: int = 0) -> Rows:
    return Rows(randn(*blocks, batch, shared, 3, seed=seed), randn(columns, *blocks, batch, shared, 2, seed=seed + 1))


def measure(model: nn.Module, likelihood: Likelihood, inputs: Tensor, sharing: str) -> dict[str, Statistics]:
    """The statistics of the exact Fisher of every layer on one batch."""
    gradients = output_gradients(likelihood, model(inputs), "exact")
    return {name: kronecker_factors(rows, sharing) for name, rows in record(model, inputs, gradients).items()}


def dense_fishers(model: nn.Module, likelihood: Likelihood, inputs: Tensor) -> dict[str, Tensor]:
    root = output_gradients(likelihood, model(inputs), "exact").flatten(2)
    return block_fishers(model, inputs, torch.einsum("cni,cnj->nij", root, root))


def assert_exact(model: nn.Module, likelihood: Likelihood, inputs: Tensor, sharing: str) -> None:
    """``G ⊗ A`` is the dense Fisher of every layer."""
    expected = dense_fishers(model, likelihood, inputs)
    statistics = measure(model, likelihood, inputs, sharing)
    assert set(statistics) == set(expected)
    for name, one in statistics.items():
        assert_close(dense_kron(one.mean("gradient"), one.mean("input")), expected[name], **TIGHT)


def zero_like(statistics: Statistics) -> Statistics:
    return statistics * 0.0


# The formulas


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("blocks", [(), (2,)])
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_kronecker_factors_are_the_documented_sums(columns, blocks, shared, sharing):
    """Plain loops over columns, examples and positions."""
    batch = 5
    rows = random_rows(columns, blocks, batch, shared)
    inputs, gradients = rows.inputs.reshape(-1, batch, shared, 3), rows.gradients.reshape(columns, -1, batch, shared, 2)
    A = torch.zeros(len(inputs), 3, 3, dtype=torch.float64)
    G = torch.zeros(len(inputs), 2, 2, dtype=torch.float64)
    for b in range(len(inputs)):
        for n in range(batch):
            if sharing == "expand":
                for t in range(shared):
                    A[b] += torch.outer(inputs[b, n, t], inputs[b, n, t]) / (batch * shared)
                    for c in range(columns):
                        G[b] += torch.outer(gradients[c, b, n, t], gradients[c, b, n, t]) / batch
            else:
                a = sum(inputs[b, n, t] for t in range(shared)) / shared
                A[b] += torch.outer(a, a) / batch
                for c in range(columns):
                    g = sum(gradients[c, b, n, t] for t in range(shared))
                    G[b] += torch.outer(g, g) / batch
    statistics = kronecker_factors(rows, sharing)
    assert_close(statistics.mean("input"), A.reshape(*blocks, 3, 3), **TIGHT)
    assert_close(statistics.mean("gradient"), G.reshape(*blocks, 2, 2), **TIGHT)


@pytest.mark.parametrize(("sharing", "input_terms"), [("expand", 20), ("reduce", 5)])
def test_counts_are_the_numbers_of_terms(sharing, input_terms):
    statistics = kronecker_factors(random_rows(3, (2,), batch=5, shared=4), sharing)
    assert dict(statistics.counts) == {"input": input_terms, "gradient": 5}


def test_sums_are_fp32_for_half_precision_rows():
    """In bfloat16 a sum of 1 and 2000 times 1 would stop at 256."""
    ones = torch.ones(2001, 1, 2, dtype=torch.bfloat16)
    statistics = kronecker_factors(Rows(ones, ones[None]), "expand")
    for name in ("input", "gradient"):
        assert statistics.sums[name].dtype == torch.float32
        assert torch.equal(statistics.sums[name], torch.full((2, 2), 2001.0))


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_summed_as_if_they_were_fp32(sharing, dtype):
    rows = random_rows(2, (), batch=64, shared=3)
    half = Rows(rows.inputs.to(dtype), rows.gradients.to(dtype))
    single = Rows(half.inputs.float(), half.gradients.float())
    assert_same_statistics(kronecker_factors(half, sharing), kronecker_factors(single, sharing), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_keep_single_and_double_precision(dtype):
    rows = random_rows(2, (), batch=4, shared=3)
    statistics = kronecker_factors(Rows(rows.inputs.to(dtype), rows.gradients.to(dtype)), "expand")
    assert {value.dtype for value in statistics.sums.values()} == {dtype}


# What Kronecker factors are exact for


LINEAR_NETWORKS = {
    "one layer": (lambda: nn.Sequential(nn.Linear(3, 2)), (7, 3)),
    "two layers": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)), (7, 3)),
    "three layers": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)), (7, 3)),
}


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("network", LINEAR_NETWORKS)
def test_exact_on_deep_linear_networks(network, sharing):
    """Output gradients of a linear network are the same at every input, whatever the inputs are."""
    build, shape = LINEAR_NETWORKS[network]
    assert_exact(seeded(build()), gaussian(), randn(*shape, seed=1), sharing)


@pytest.mark.parametrize(
    ("likelihood", "outputs"), [(gaussian(), 3), (Categorical(), 3), (Bernoulli(), 2)], ids=["g", "c", "b"]
)
@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_exact_with_one_datum_for_any_network_and_likelihood(likelihood, outputs, sharing):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, outputs))
    assert_exact(seeded(model), likelihood, randn(1, 3, seed=1), sharing)


def test_exact_for_a_convolution_with_one_datum_and_one_position():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    assert_exact(seeded(model), Categorical(), randn(1, 2, 3, 3, seed=1), "expand")


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_exact_for_a_convolution_whose_kernel_covers_the_input(sharing):
    assert_exact(
        seeded(nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Flatten(), nn.Linear(3, 2))),
        gaussian(),
        randn(6, 2, 3, 2, seed=1),
        sharing,
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 2)), (5, 4, 3)),
        (nn.Sequential(nn.Conv1d(2, 3, 3, padding=1)), (5, 2, 6)),
        (nn.Sequential(nn.Conv2d(2, 3, 2, stride=2, bias=False)), (4, 2, 4, 6)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), (3, 4, 5, 4)),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 1)), (4, 2, 6)),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)), (5, 4, 3)),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (5, 2, 3, 3)),
        (nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), (4, 2, 4, 3)),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1)), (4, 2, 2, 3)),
    ],
    ids=[
        "linear over time",
        "conv1d",
        "conv2d",
        "grouped",
        "conv and 1x1",
        "deep linear over time",
        "deep linear on images",
        "conv and two 1x1",
        "conv transpose and 1x1",
    ],
)
def test_expand_is_exact_where_every_position_has_its_own_target(model, shape):
    """The number of positions |T| enters exactly once: not dropped, not doubled."""
    assert_exact(seeded(model), gaussian(), randn(*shape, seed=1), "expand")


class Pooled(nn.Module):
    """Linear over positions, then one output: the setting of ``reduce``."""

    def __init__(self, layer: nn.Module, pool: str) -> None:
        super().__init__()
        self.layer, self.pool, self.head = layer, pool, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        positions = hidden.flatten(1, -2) if hidden.shape[-1] == 3 else hidden.flatten(2).mT
        return self.head(positions.mean(1) if self.pool == "mean" else positions.sum(1))


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 6, 4)),
        (nn.Conv2d(2, 3, 2), (5, 2, 5, 5)),
        (nn.Conv1d(2, 3, 3, bias=False), (5, 2, 8)),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 3)), (5, 6, 4)),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (5, 2, 3, 4)),
        (nn.Sequential(nn.Conv2d(2, 4, 2, stride=2), nn.Conv2d(4, 5, 1, groups=1), nn.Conv2d(5, 3, 1)), (5, 2, 4, 4)),
    ],
    ids=["linear", "conv2d", "conv1d", "deep over time", "deep linear on images", "deep on images"],
)
def test_reduce_is_exact_for_pooled_linear_networks(layer, shape, pool):
    assert_exact(seeded(Pooled(layer, pool)), gaussian(), randn(*shape, seed=1), "reduce")


def test_expand_is_not_reduce_where_positions_are_pooled():
    """The two settings differ, so that the tests above can tell them apart."""
    model, inputs = seeded(Pooled(nn.Linear(4, 3), "mean")), randn(5, 6, 4, seed=1)
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(model, gaussian(), inputs, "expand")


# Weights that are used several times


class Loop(nn.Module):
    """A layer that is called at every step of a loop over time; its weight, or all of it, may be tied to another's."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.layers[i % len(self.layers)](step) for i, step in enumerate(x.unbind(1))]
        return self.head(torch.stack(steps, dim=1).tanh())


class Unrolled(Loop):
    """The same function in one call over all steps."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[0](x).tanh())


def alike(count: int, *names: str) -> list[nn.Linear]:
    """Linear layers with these parameters in common."""
    layers = [nn.Linear(4, 3) for _ in range(count)]
    for layer in layers[1:]:
        for name in names:
            setattr(layer, name, getattr(layers[0], name))
    return layers


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("modules", [1, 2, 4])
def test_steps_of_a_loop_and_tied_modules_are_positions(modules, sharing):
    """One module that is called four times, or several with the same parameters, is one call on what they saw."""
    inputs = randn(5, 4, 4, seed=1)
    loop, unrolled = seeded(Loop(*alike(modules, "weight", "bias"))), seeded(Unrolled(nn.Linear(4, 3)))
    actual, expected = (measure(model, gaussian(), inputs, sharing) for model in (loop, unrolled))
    assert set(actual) == set(expected) == {"layers.0", "head"}
    for name, statistics in expected.items():
        assert_same_statistics(actual[name], statistics)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_calls_on_different_numbers_of_positions_are_laid_side_by_side(sharing):
    """As if the module had been called once on both."""

    class Twice(nn.Module):
        def __init__(self, *, at_once: bool) -> None:
            super().__init__()
            self.layer, self.at_once = nn.Linear(4, 3), at_once

        def forward(self, x: Tensor) -> Tensor:
            both = x.split([4, 2], dim=1)
            first, second = self.layer(x).split([4, 2], dim=1) if self.at_once else map(self.layer, both)
            return first.tanh().mean(1) + 3 * second.tanh().sum(1)

    inputs = randn(5, 6, 4, seed=1)
    apart, joint = (measure(seeded(Twice(at_once=once)), gaussian(), inputs, sharing) for once in (False, True))
    assert_same_statistics(apart["layer"], joint["layer"])


def test_biases_of_tied_weights_count_their_own_uses():
    """Two modules with one weight: it has the positions of both, each bias those of its module."""
    statistics = measure(seeded(Loop(*alike(2, "weight"))), gaussian(), randn(5, 4, 4, seed=1), "expand")
    counts = {name: dict(one.counts) for name, one in statistics.items()}
    assert counts["layers.0"] == {"input": 20, "gradient": 5}
    assert counts["layers.0.bias"] == counts["layers.1.bias"] == {"input": 10, "gradient": 5}
    for name in ("layers.0.bias", "layers.1.bias"):
        assert_close(statistics[name].mean("input"), torch.ones(1, 1, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_words_give_the_factors_of_their_one_hot_rows(sharing):
    """The frequencies of words on the input side, as one row."""
    model = seeded(nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 2)))
    inputs = torch.tensor([[0, 1], [1, 1]])
    statistics = measure(model, gaussian(), inputs, sharing)["0"]
    rows = record(model, inputs, output_gradients(gaussian(), model(inputs), "exact"))["0"]
    dense = kronecker_factors(replace(rows, inputs=rows.inputs.dense()), sharing)
    assert dict(statistics.counts) == dict(dense.counts)
    assert_close(statistics.mean("gradient"), dense.mean("gradient"), **TIGHT)
    assert_close(statistics.mean("input")[0], dense.mean("input").diagonal(), **TIGHT)
    frequencies = [0.25, 0.75, 0, 0, 0] if sharing == "expand" else [0.125, 0.625, 0, 0, 0]
    assert_close(statistics.mean("input"), torch.tensor([frequencies], dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_transposed_uses_have_factors_of_their_own_on_the_other_sides(sharing):
    """An embedding's frequencies meet the output layer's gradients, so that both are kept as one row."""
    rows = tied_rows()
    statistics = kronecker_factors(rows, sharing)
    own = kronecker_factors(replace(rows, transposed=None), sharing)
    lookup = kronecker_factors(rows.transposed, sharing)
    assert_close(statistics.mean("input"), own.mean("input"), **TIGHT)
    assert_close(statistics.mean("gradient")[0], own.mean("gradient").diagonal(), **TIGHT)
    assert_close(statistics.mean("transposed_input"), lookup.mean("input"), **TIGHT)
    assert_close(statistics.mean("transposed_gradient"), lookup.mean("gradient"), **TIGHT)
    dense = kronecker_factors(written_out(rows), sharing)
    assert dict(dense.counts) == dict(statistics.counts)
    for name, value in dense.sums.items():
        kept = statistics.sums[name]
        assert_close(kept[0] if len(kept) < len(value) else kept, value.diagonal() if len(kept) < len(value) else value)


# Masks


class Steps(nn.Module):
    """Position-wise over time, on sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).tanh()))


class Recurrent(Steps):
    """Padding comes after all that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


class Attending(Steps):
    """Padding is left out by a mask of its own, here for the lengths of the test."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        padding = None if len(x) == 1 else ~padding_mask()
        return self.head(self.attention(hidden, hidden, hidden, key_padding_mask=padding)[0])


LENGTHS = (5, 2, 4)


def padding_mask() -> Tensor:
    return torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("structure", ["kron", "diagonal", "dense"])
@pytest.mark.parametrize("kind", [Steps, Recurrent, Attending])
def test_padded_positions_weigh_nothing(kind, structure, sharing):
    """The statistics are those of the examples as they are without padding, one by one."""
    model, inputs, mask = seeded(kind()), randn(3, 5, 3, seed=1), padding_mask()
    own = structures.get(structure, damping="exact", sharing=sharing)

    def measured(x: Tensor, mask: Tensor | None = None) -> dict[str, Statistics]:
        gradients = output_gradients(Categorical(), model(x), "exact", mask=mask)
        return {name: own.measure(rows) for name, rows in record(model, x, gradients, mask=mask).items()}

    padded = measured(inputs, mask)
    parts = [measured(inputs[n : n + 1, :length]) for n, length in enumerate(LENGTHS)]
    for name, statistics in padded.items():
        assert_same_statistics(statistics, parts[0][name] + parts[1][name] + parts[2][name])


class BackInTime(Steps):
    """Only the direction that begins at the end is read; padding comes before all that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True, bidirectional=True, proj_size=2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][..., 2:])


def test_a_recurrence_that_goes_back_in_time_has_its_steps_in_the_masks_order():
    """Its first call is the last position."""
    model, inputs, mask = seeded(BackInTime()), randn(3, 5, 3, seed=1), padding_mask().flip(1)
    gradients = output_gradients(Categorical(), model(inputs), "exact", mask=mask)
    rows = record(model, inputs, gradients, mask=mask)
    for name in ("rnn.ih_l0_reverse", "rnn.hh_l0_reverse", "rnn.hr_l0_reverse"):
        parts = []
        for n, length in enumerate(LENGTHS):
            alone = inputs[n : n + 1, 5 - length :]
            root = output_gradients(Categorical(), model(alone), "exact")
            parts.append(kronecker_factors(record(model, alone, root)[name], "expand"))
        assert_same_statistics(kronecker_factors(rows[name], "expand"), parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_an_example_that_is_masked_as_a_whole_is_not_there(sharing):
    """An unlabelled one adds neither to sums nor to counts."""
    model, inputs = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), randn(6, 3, seed=1)
    mask = torch.tensor([True, False, True, True, False, True])

    def measured(x: Tensor, mask: Tensor | None = None) -> dict[str, Statistics]:
        gradients = output_gradients(Categorical(), model(x), "exact", mask=mask)
        rows = record(model, x, gradients, mask=mask)
        return {name: kronecker_factors(one, sharing) for name, one in rows.items()}

    for name, statistics in measured(inputs, mask).items():
        assert_same_statistics(statistics, measured(inputs[mask])[name])


# Invariances


NETWORKS = {
    "mlp": (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (8, 3)),
    "convolutions": (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 2)),
        (8, 2, 5, 5),
    ),
    "time": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (8, 3, 3)),
}


@pytest.fixture(params=NETWORKS)
def model_and_inputs(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    model, shape = NETWORKS[request.param]
    return seeded(model), randn(*shape, seed=1)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [3, 1, 4], [1] * 8])
def test_statistics_add_over_any_split_of_a_batch(model_and_inputs, sharing, sizes):
    """A mean gradient in place of a sum, or a count that is missed, depends on the split."""
    model, inputs = model_and_inputs
    parts = [measure(model, gaussian(), part, sharing) for part in inputs.split(sizes)]
    for name, expected in measure(model, gaussian(), inputs, sharing).items():
        total = parts[0][name]
        for part in parts[1:]:
            total += part[name]
        assert_same_statistics(total, expected)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_statistics_do_not_depend_on_the_order_of_examples(model_and_inputs, sharing):
    model, inputs = model_and_inputs
    shuffled = measure(
        model, gaussian(), inputs[torch.randperm(8, generator=torch.Generator().manual_seed(0))], sharing
    )
    for name, expected in measure(model, gaussian(), inputs, sharing).items():
        assert_same_statistics(shuffled[name], expected)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_averages_do_not_change_when_the_data_are_seen_twice(model_and_inputs, sharing):
    model, inputs = model_and_inputs
    twice = measure(model, gaussian(), torch.cat([inputs, inputs]), sharing)
    for name, once in measure(model, gaussian(), inputs, sharing).items():
        for statistic in ("input", "gradient"):
            assert_close(twice[name].mean(statistic), once.mean(statistic), **TIGHT)
            assert twice[name].counts[statistic] == 2 * once.counts[statistic]


def test_expand_does_not_depend_on_how_positions_are_spread_over_examples():
    """Positions with targets of their own are examples: G of one long example is the sum over its positions."""
    model, inputs = seeded(nn.Sequential(nn.Linear(3, 2))), randn(8, 3, 3, seed=1)
    over_time = measure(model, gaussian(), inputs, "expand")["0"]
    flat = measure(model, gaussian(), inputs.flatten(0, 1), "expand")["0"]
    assert_close(over_time.mean("input"), flat.mean("input"), **TIGHT)
    assert_close(over_time.mean("gradient"), 3 * flat.mean("gradient"), **TIGHT)


# Arithmetic


def test_sums_and_counts_add_and_scale_together():
    first = Statistics({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}, {"a": 2.0, "b": 4.0})
    second = Statistics({"a": torch.tensor([5.0, 7.0]), "b": torch.tensor(11.0)}, {"a": 6.0, "b": 1.0})
    total = first + second * 0.5
    assert_close(total.sums["a"], torch.tensor([3.5, 5.5]))
    assert_close(total.sums["b"], torch.tensor(8.5))
    assert dict(total.counts) == {"a": 5.0, "b": 4.5}
    assert_close(total.mean("a"), torch.tensor([0.7, 1.1]))


def test_arithmetic_leaves_its_operands_alone():
    first, second = (kronecker_factors(random_rows(2, (), 4, 2, seed=seed), "expand") for seed in (0, 2))
    before = {name: value.clone() for name, value in first.sums.items()}
    first + second, first * 3, first.moving_average(second, 0.9)
    for name, value in before.items():
        assert torch.equal(first.sums[name], value)
    assert dict(first.counts) == {"input": 8, "gradient": 4}


def test_decay_is_the_weight_of_the_old():
    """``s ← decay s + (1 − decay) b`` on sums and on counts, written out."""
    batches = [kronecker_factors(random_rows(2, (), size, 3, seed=size), "expand") for size in (4, 5, 9)]
    decay = 0.95
    running = batches[0]
    sums = {name: value.clone() for name, value in running.sums.items()}
    counts = dict(running.counts)
    for batch in batches[1:]:
        running = running.moving_average(batch, decay)
        for name, value in batch.sums.items():
            sums[name] = 0.95 * sums[name] + 0.05 * value
            counts[name] = 0.95 * counts[name] + 0.05 * batch.counts[name]
    for name, value in sums.items():
        assert_close(running.sums[name], value, **TIGHT)
        assert running.counts[name] == pytest.approx(counts[name], rel=1e-12)
        assert_close(running.mean(name), value / counts[name], **TIGHT)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_after_one_update_from_nothing_the_average_is_the_batchs(decay):
    batch = kronecker_factors(random_rows(2, (), 4, 3), "expand")
    running = zero_like(batch).moving_average(batch, decay)
    for name in batch.sums:
        assert_close(running.mean(name), batch.mean(name), **TIGHT)


def test_a_moving_average_from_nothing_is_debiased():
    """After k updates batch i has the weight ``decay^(k−i)`` among weights that sum to one: Adam's correction."""
    batches = [kronecker_factors(random_rows(2, (), 6, 3, seed=seed), "expand") for seed in range(4)]
    decay = 0.9
    running = zero_like(batches[0])
    for batch in batches:
        running = running.moving_average(batch, decay)
    weights = [decay ** (3 - i) * (1 - decay) / (1 - decay**4) for i in range(4)]
    assert sum(weights) == pytest.approx(1)
    for name in running.sums:
        expected = sum(weight * batch.mean(name) for weight, batch in zip(weights, batches, strict=True))
        assert_close(running.mean(name), expected, **TIGHT)


def test_a_small_last_batch_weighs_less_in_a_moving_average():
    """Averages are of examples, not of batches: an odd last batch does not speak as loud as a full one."""
    full, last = (kronecker_factors(random_rows(1, (), size, 1, seed=size), "expand") for size in (9, 1))
    running = full.moving_average(last, 0.5)
    assert_close(running.mean("input"), (full + last).mean("input"), **TIGHT)


def test_a_long_memory_does_not_add_up_rounding():
    """What is the same in every batch, as the bias's input is, stays what it is; factors stay positive but for ε.

    Fed to float32 sums, the bias's own moment came to rest at 1 - 3e-5, and an input that is a combination of the
    others with the bias had a variance of -2e-5.
    """
    generator, decay = torch.Generator().manual_seed(0), 0.999
    running, size = None, 16
    direction = torch.tensor([1.0, -1.0, 0.5, 1.0])  # no input has a part along it
    for _ in range(12_000):
        inputs = torch.ones(size, 4)
        inputs[:, :2] = torch.rand(size, 2, generator=generator)
        inputs[:, 2] = 2 * (inputs[:, 1] - inputs[:, 0] - 1)
        batch = Statistics({"input": inputs.mT @ inputs}, {"input": float(size)})
        running = batch * (1 - decay) if running is None else running.moving_average(batch, decay)
    factor = running.mean("input").double()
    assert factor[3, 3] == 1
    assert abs(float(direction.double() @ factor @ direction.double())) < 3e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_names_the_sums_that_are(value):
    statistics = Statistics({"a": torch.ones(2), "b": torch.tensor([1.0, value])}, {"a": 1.0, "b": 1.0})
    assert statistics.non_finite() == ["b"]
    assert kronecker_factors(random_rows(1, (), 2, 1), "expand").non_finite() == []
