"""How rows lie and which layers mix examples: found on few batches, and right for every batch after that."""

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

    def counted(self: PullBack, **options: Any) -> Any:
        sizes.append(len(self.output))
        return probe(self, **options)

    monkeypatch.setattr(PullBack, "probe", counted)
    return sizes


# Once


def test_a_model_is_probed_on_its_first_batches_of_several(monkeypatch):
    """A batch of one tells nothing, and its answer is not kept; the first, second, fourth, ... of others are asked."""
    sizes = count_probes(monkeypatch)
    model = seeded(MeetsLater())
    recorder = attached(model)
    for batch in (1, 2, 5, 1, 3, 4, 6, 7, 2, 8, 9):
        inputs = randn(batch, 3, seed=batch)
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert sizes == [1, 2, 5, 4, 8]


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


def test_a_layer_that_the_output_does_not_depend_on_is_no_reason_to_probe_again(monkeypatch):
    """As the head for another task; where it is in the output, the next look finds how its rows lie."""

    class Pooled(MeetsLater):
        def forward(self, x: Tensor, *, pooled: bool = False) -> Tensor:
            hidden = self.before(x).tanh()
            aside = self.between(hidden + hidden.mean(0))
            return self.after(aside if pooled else hidden)

    sizes = count_probes(monkeypatch)
    model, x = seeded(Pooled()), randn(4, 3, seed=1)
    recorder = attached(model)
    for _ in range(7):
        rows_of(recorder, model, x)
    assert len(sizes) == 3
    inputs = {"x": x, "pooled": True}
    assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)


def test_passes_between_two_looks_read_nothing_back(monkeypatch):
    """Whether the output is finite is asked where a probe is due; on a GPU each answer waits for all that runs."""
    asked = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: asked.append(tensor) or isfinite(tensor))
    model = seeded(MeetsLater())
    recorder = attached(model)
    for _ in range(7):
        rows_of(recorder, model, randn(4, 3, seed=1))
    assert len(asked) == 3


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
    for tokens in order * 3:
        inputs = {"x": x, "tokens": tokens}
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert len(sizes) == 4


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


class Graph(nn.Module):
    """Nodes that see their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.after(edges @ self.before(x).tanh())


@pytest.mark.parametrize("first", ["alone", "together"])
def test_nodes_meet_whatever_graph_came_first(first):
    """Where nodes have no neighbours they do not meet, which says nothing of other graphs."""
    model = seeded(Graph())
    recorder = attached(model)
    graphs = {"alone": torch.eye(4).double(), "together": randn(4, 4, seed=2)}
    for edges in (graphs[first], graphs["together"], graphs["together"], graphs["alone"]):
        inputs = {"x": randn(4, 3, seed=1), "edges": edges}
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)


def test_gradients_of_zero_tell_nothing():
    """Behind a head that is zero at first nobody seems to meet."""
    model = seeded(MeetsLater())
    with torch.no_grad():
        model.after.weight.zero_()
    recorder = attached(model)
    rows_of(recorder, model, randn(4, 3, seed=1))
    with torch.no_grad():
        model.after.weight.copy_(randn(2, 4, seed=3))
    for _ in range(3):
        rows = rows_of(recorder, model, randn(4, 3, seed=1))
        assert_are_jacobians(rows, model, randn(4, 3, seed=1))


# Batch second


class TimeFirst(nn.Module):
    """Sees ``[batch, time, 3]`` as ``[time, batch, 3]``, flattened or not."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.before, self.after, self.flat = nn.Linear(3, 4), nn.Linear(4, 2), flat

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.transpose(0, 1)
        hidden = self.before(sequence.flatten(0, 1) if self.flat else sequence).tanh()
        return self.after(hidden.reshape(*sequence.shape[:2], 4).mean(0))


class Siamese(nn.Module):
    """Two inputs, one after another in one batch of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.before(torch.cat([x[:, 0], x[:, 1]])).tanh().chunk(2)
        return self.after(first * second)


def test_gradients_of_zero_do_not_rule_out_that_time_is_first():
    model = seeded(TimeFirst(flat=True))
    recorder = attached(model)
    weight = model.after.weight.detach().clone()
    x = randn(3, 6, 3, seed=1)  # three and six steps fit either way
    for value in (torch.zeros_like(weight), weight):
        with torch.no_grad():
            model.after.weight.copy_(value)
        rows = rows_of(recorder, model, x)
    assert rows["before"].inputs.shape == (3, 6, 4)
    assert_close(rows["before"].inputs[..., :3], x, **TIGHT)


@pytest.mark.parametrize(
    ("make", "time"),
    [(lambda: TimeFirst(flat=False), 4), (lambda: TimeFirst(flat=True), 4), (Siamese, 2)],
    ids=["time first", "flattened", "siamese"],
)
def test_rows_with_the_batch_behind_are_brought_to_their_examples(make, time):
    """One position for each step of each example, and no gradient of one example pulled back by itself."""
    model = seeded(make())
    recorder = attached(model)
    for batch in (5, 1, 4, 8, 3):
        inputs = randn(batch, time, 3, seed=batch)
        rows = rows_of(recorder, model, inputs)
        assert_are_jacobians(rows, model, inputs)
        assert rows["before"].inputs.shape == (batch, time, 4)
        for example in range(batch):
            positions = inputs[example]
            assert_close(rows["before"].inputs[example, :, :3], positions, **TIGHT)


def test_padding_of_a_layer_that_is_used_again_weighs_nothing():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.layer(x).tanh()
            return self.head(x)

    mask = torch.arange(4) < torch.tensor([[1], [3], [4]])
    model = seeded(Twice())
    recorder = attached(model)
    recorder.attach()
    output = model(randn(3, 4, 3, seed=1))
    rows = recorder.rows(output, unit_gradients(output) * mask.unsqueeze(-1), mask=mask)
    recorder.detach()
    assert torch.equal(rows["layer"].mask, torch.cat([mask, mask], dim=1))
    assert torch.equal(rows["head"].mask, mask)
