"""Statistics of columns in parts: they add up to those of all columns at once, whatever the parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import SHARING_KINDS, Rows, Statistics, find_layers
from tests.helpers import TIGHT, pull_back, randn, rng, seeded, unit_gradients
from tests.random_rows import SEEDS, dense_rows, tied_rows, words

COLUMNS = 5


def masked(rows: Rows) -> Rows:
    """The rows with the second example left out, and of the third all positions but one."""
    shared = rows.inputs.shape[-2]
    mask = torch.tensor([[True] * shared, [False] * shared, [True] + [False] * (shared - 1)])
    transposed = None if rows.transposed is None else masked(rows.transposed)
    gradients = rows.gradients * mask.unsqueeze(-1)
    return replace(rows, gradients=gradients, mask=mask, examples=2.0, transposed=transposed)


ROWS = {
    "one position": dense_rows(COLUMNS, shared=1),
    "positions": dense_rows(COLUMNS),
    "stacked": dense_rows(COLUMNS, blocks=(2,)),
    "words": Rows(words(3, 4, 2), randn(COLUMNS, 3, 4, 2, seed=1)),
    "tied": tied_rows(COLUMNS, sparse=False),
    "tied to words": tied_rows(COLUMNS),
}
ROWS |= {f"{name}, masked": masked(rows) for name, rows in ROWS.items() if name != "stacked"}


def part(rows: Rows, start: int, stop: int) -> Rows:
    """Some columns of rows, as a pass over them alone would give them; what share they are is not known there."""
    transposed = None if rows.transposed is None else part(rows.transposed, start, stop)
    return replace(rows, gradients=rows.gradients[start:stop], transposed=transposed)


def assert_same(actual: Statistics, expected: Statistics) -> None:
    assert actual.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        assert_close(actual.sums[name], value, **TIGHT)
        assert actual.counts[name] == pytest.approx(expected.counts[name], rel=1e-12)
        assert_close(actual.mean(name), expected.mean(name), **TIGHT)


@pytest.mark.parametrize(
    ("cuts", "shares"),
    [([1], [0.2, 0.8]), ([2, 3], [0.4, 0.2, 0.4]), ([1, 2, 3, 4], [0.2] * 5), ([2], [1, 0]), ([1, 3], [0, 1, 0])],
    ids=str,
)
@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("structure", structures.available())
@pytest.mark.parametrize("name", ROWS)
def test_parts_of_the_columns_add_up_to_all_of_them(name, structure, sharing, cuts, shares):
    """Gradients are summed over columns; inputs, and the counts of both, are not, and go by the share."""
    rows, measure = ROWS[name], structures.get(structure, damping="exact", sharing=sharing).measure
    total = None
    for start, stop, share in zip([0, *cuts], [*cuts, COLUMNS], shares, strict=True):
        own = measure(replace(part(rows, start, stop), share=share))
        total = own if total is None else total + own
    assert_same(total, measure(rows))


@given(share=st.floats(0.01, 1), sparse=st.booleans(), has_mask=st.booleans(), seed=SEEDS)
def test_counts_go_by_the_share(share, sparse, has_mask, seed):
    """Of what weighs, in every form that rows take."""
    inputs = words(3, 4, 2, seed=seed) if sparse else randn(3, 4, 5, seed=seed)
    rows = Rows(inputs, randn(2, 3, 4, 2, seed=seed))
    rows = masked(rows) if has_mask else rows
    own = replace(rows, share=share)
    assert own.num_examples == pytest.approx(share * rows.num_examples)
    assert own.num_rows == pytest.approx(share * rows.num_rows)
    assert own.pooled().share == own.to(torch.float32).share == share
    assert own.pooled().num_examples == pytest.approx(share * rows.num_examples)


class Tied(nn.Module):
    """A tiny language model, whose output layer is its embedding, with a normalisation and positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 3), nn.LayerNorm(3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight
        self.positions = nn.Parameter(torch.zeros(4, 3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm((self.embed(words) + self.positions).tanh()))


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("name", structures.available())
def test_a_pass_in_parts_is_a_pass_at_once(name, sharing):
    """Through a pull-back, for every block of a model: tied weights, a normalisation's, a bare parameter's."""
    model, inputs = seeded(Tied()), torch.randint(6, (3, 4), generator=rng(0))
    passed = pull_back(model, inputs)
    columns, layers = unit_gradients(passed.output), find_layers(model)[0]
    own = {
        layer: structures.get(name, damping="exact", sharing=sharing).for_layer(found)
        for layer, found in layers.items()
    }
    total: dict[str, Statistics] = {}
    for some in columns.split(7):
        for layer, rows in passed.rows(some).items():
            measured = own[layer].measure(replace(rows, share=len(some) / len(columns)))
            total[layer] = total[layer] + measured if layer in total else measured
    assert total.keys() == layers.keys()
    for layer, rows in passed.rows(columns).items():
        assert_same(total[layer], own[layer].measure(rows))


def test_columns_within_a_budget_are_at_least_one_and_in_proportion():
    """Three copies of what the layers put out, in bytes of the output's dtype, for each column."""
    model, inputs = seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))), randn(4, 3, seed=1)
    passed = pull_back(model, inputs)
    column = 3 * 4 * (5 + 2) * 8
    assert [passed.columns_within(budget) for budget in (1, column, 2 * column - 1, 10 * column)] == [1, 1, 1, 10]
    single = pull_back(model.float(), inputs.float())
    assert single.columns_within(column) == 2


def test_a_fit_in_parts_is_a_fit_at_once():
    """Of tied weights, whose transposed uses are counted by the same share."""
    inputs = torch.randint(6, (6, 4), generator=rng(0))
    batches = [(inputs, torch.randint(6, (6, 4), generator=rng(1)))]
    variances = []
    for budget in (1 << 30, 1):
        laplace = bk.Laplace(seeded(Tied()), bk.likelihoods.Categorical(), num_data=6, memory_budget=budget)
        posterior = laplace.fit(batches, progress=False).posterior()
        variances.append({name: block.marginal_variance() for name, block in posterior.blocks.items()})
    for name, expected in variances[0].items():
        assert_close(variances[1][name], expected, **TIGHT)


@pytest.mark.parametrize("structure", ["smw", "skfac", "mfac"])
@pytest.mark.parametrize("sizes", [(60,), (7, 5, 9)], ids=str)
def test_windows_are_of_batches_whatever_the_budget(structure, sizes):
    """Where a batch has more columns than there is room for, and where the oldest batch leaves in part."""
    kind = type(structures.get(structure, damping="exact", sharing="expand"))
    batches = [(randn(size, 3, seed=size), torch.randint(4, (size,), generator=rng(size))) for size in sizes]
    precisions = []
    for budget in (1 << 30, 1):
        laplace = bk.Laplace(
            seeded(nn.Linear(3, 4)), bk.likelihoods.Categorical(), structure=kind(50), memory_budget=budget
        )
        (block,) = laplace.fit(batches, progress=False).posterior().blocks.values()
        precisions.append(block.to_dense())
    assert torch.equal(*precisions)
