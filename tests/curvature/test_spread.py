"""Which layers mix examples: found once for each kind of output, and right for every batch after that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.batches import call
from bayes_kfac.curvature import PullBack, Recorder, Rows, find_layers
from tests.helpers import TIGHT, in_block, parameter_jacobians, randn, rng, seeded, unit_gradients


class Positions(nn.Module):
    """Words, and positions that are looked up once for all examples."""

    def __init__(self, *, unsqueezed: bool) -> None:
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(6, 3), nn.Embedding(5, 3), nn.Linear(3, 2)
        self.unsqueezed = unsqueezed

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1])
        hidden = self.words(words) + self.positions(places[None] if self.unsqueezed else places)
        return self.head(hidden.tanh()).mean(1)


class MeetsLater(nn.Module):
    """Examples are alone in their first layer and their last, and see each other in between."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.before(x).tanh())
        return self.after((hidden + hidden.mean(0)).tanh())


class Sequences(nn.Module):
    """Of the same layers, an output for each token, or for each sequence: tokens meet where sequences do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, *, tokens: bool) -> Tensor:
        hidden = self.embed(x).tanh()
        hidden = hidden + hidden.mean(1, keepdim=True)
        return self.head(hidden).flatten(0, 1) if tokens else self.head(hidden).mean((1, 2))


def attached(model: nn.Module) -> Recorder:
    return Recorder(find_layers(model)[0])


def rows_of(recorder: Recorder, model: nn.Module, inputs: Any) -> dict[str, Rows]:
    """The rows of one forward pass, as the recorder sees them after those before."""
    recorder.attach()
    try:
        output = call(model, inputs)
        return recorder.rows(output, unit_gradients(output))
    finally:
        recorder.detach()


def assert_are_jacobians(rows: dict[str, Rows], model: nn.Module, inputs: Any) -> None:
    expected = parameter_jacobians(model, inputs)
    layers = find_layers(model)[0]
    assert rows.keys() == layers.keys()
    for name, own in rows.items():
        assert_close(own.jacobians().movedim(-3, 0), in_block(layers[name], expected), **TIGHT)


def count_probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of all probes from now on."""
    probe, sizes = PullBack.probe, []

    def counted(self: PullBack) -> set[str]:
        sizes.append(len(self.output))
        return probe(self)

    monkeypatch.setattr(PullBack, "probe", counted)
    return sizes


# Once


def test_a_model_is_probed_on_its_first_batch_of_several(monkeypatch):
    """A batch of one tells nothing, and its answer is not kept; that of two serves all further batches."""
    sizes = count_probes(monkeypatch)
    model = seeded(MeetsLater())
    recorder = attached(model)
    for batch in (1, 2, 5, 1, 3):
        inputs = randn(batch, 3, seed=batch)
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert sizes == [1, 2]


def test_a_model_is_not_probed_where_it_does_not_matter(monkeypatch):
    sizes = count_probes(monkeypatch)
    model, inputs = seeded(MeetsLater()), randn(4, 3, seed=1)
    recorder = attached(model)
    recorder.attach()
    output = model(inputs)
    rows = recorder.rows(output, unit_gradients(output), coupled=True)
    recorder.detach()
    assert sizes == []
    assert rows["before"].inputs.shape == (4, 1, 4)
    assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert sizes == [4]


def test_an_output_without_a_graph_is_not_probed(monkeypatch):
    sizes = count_probes(monkeypatch)
    model = seeded(MeetsLater())
    recorder = attached(model)
    recorder.attach()
    with torch.no_grad():
        output = model(randn(4, 3, seed=1))
    assert recorder.rows(output, unit_gradients(output)) == {}
    recorder.detach()
    assert sizes == []


@pytest.mark.parametrize("first", ["tokens", "sequences"])
def test_outputs_of_different_kinds_are_probed_apart(monkeypatch, first):
    """The answer for tokens would make of sequences' rows too much, that for sequences of tokens' rows nonsense."""
    sizes = count_probes(monkeypatch)
    model, x = seeded(Sequences()), randn(4, 5, 3, seed=1)
    recorder = attached(model)
    order = [True, False] if first == "tokens" else [False, True]
    for tokens in order * 2:
        inputs = {"x": x, "tokens": tokens}
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert len(sizes) == 2


def test_recorders_do_not_share_what_they_found(monkeypatch):
    sizes = count_probes(monkeypatch)
    for _ in range(2):
        model = seeded(MeetsLater())
        rows_of(attached(model), model, randn(4, 3, seed=1))
    assert sizes == [4, 4]


# And right


def test_only_the_layers_in_which_examples_meet_are_apart():
    """``after`` has its rows in their places, one for each example; the others have those of all examples."""
    model = seeded(MeetsLater())
    recorder = attached(model)
    for _ in range(2):
        rows = rows_of(recorder, model, randn(4, 3, seed=1))
        assert {name: own.inputs.shape[-2] for name, own in rows.items()} == {"before": 4, "between": 4, "after": 1}


@pytest.mark.parametrize("unsqueezed", [True, False])
@pytest.mark.parametrize("first", [2, 3, 5, 10])
def test_what_was_found_on_one_batch_holds_for_batches_of_other_sizes(first, unsqueezed):
    """Five positions do not fit two examples, and must not be taken for the examples of a batch of five."""
    model = seeded(Positions(unsqueezed=unsqueezed))
    recorder = attached(model)
    for batch in (first, 5, 1, 2, 10, 3):
        words = torch.randint(6, (batch, 5), generator=rng(batch))
        assert_are_jacobians(rows_of(recorder, model, words), model, words)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("one", [0, 1, 3])
def test_any_two_examples_that_meet_are_found(size, one):
    """Whatever their places: the last with each of the others, and with itself alone where it is that one."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x).tanh()
            seen = torch.zeros_like(hidden)
            seen[-1] = hidden[min(one, size - 1)]
            return hidden + seen

    model, inputs = seeded(Pair()), randn(size, 3, seed=1)
    rows = rows_of(attached(model), model, inputs)
    assert_are_jacobians(rows, model, inputs)
    assert rows["layer"].inputs.shape[-2] == (1 if one >= size - 1 else size)
