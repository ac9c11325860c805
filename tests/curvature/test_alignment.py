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
    """A batch of one is not asked, as all rows are its own; the first, second, fourth, ... of others are."""
    sizes = count_probes(monkeypatch)
    model = seeded(MeetsLater())
    recorder = attached(model)
    for batch in (1, 2, 5, 1, 3, 4, 6, 7, 2, 8, 9):
        inputs = randn(batch, 3, seed=batch)
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)
    assert sizes == [2, 5, 4, 8]


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
    assert sorted(sizes) == [4, 4, 20, 20, 20]  # rows that are several examples' are looked at every time


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


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 9, 66])
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


# Another way in every batch


class EarlyExit(nn.Module):
    """Easy examples leave after the first layer; hard ones, in which the first element is positive, go through another.

    They do so all together or, with ``split``, in the same layer as the easy ones, one kind after the other.
    """

    def __init__(self, *, split: bool) -> None:
        super().__init__()
        self.stem, self.deep, self.head, self.split = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), split

    def forward(self, x: Tensor) -> Tensor:
        hidden, hard = self.stem(x).tanh(), x[:, 0, 0] > 0
        out = hidden.clone()
        for chosen in (hard, ~hard) if self.split else (hard,):
            if chosen.any():
                out[chosen] = self.deep(hidden[chosen]).tanh()
        return self.head(out).mean(1)


@pytest.mark.parametrize("split", [False, True])
def test_a_part_of_the_batch_is_not_taken_for_the_whole_of_those_before(split):
    """Two of four examples with two positions each: the rows would fit four."""
    model = seeded(EarlyExit(split=split))
    recorder = attached(model)
    inputs = randn(4, 2, 3, seed=1)
    for hard in ([1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]):
        inputs[:, 0, 0] = inputs[:, 0, 0].abs() * (2 * torch.tensor(hard) - 1)
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)


class Stack(nn.Module):
    """The nodes of several graphs in one batch, each graph with a mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, nodes: Tensor, owner: Tensor, sizes: Tensor) -> Tensor:
        total = nodes.new_zeros(len(sizes), 4).index_add(0, owner, self.before(nodes).tanh())
        return self.after(total / sizes.unsqueeze(1))


def stack(sizes: list[int], seed: int) -> dict[str, Tensor]:
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return {"nodes": randn(sum(sizes), 3, seed=seed), "owner": owner, "sizes": torch.tensor(sizes)}


def test_graphs_are_told_apart_in_every_batch():
    """As many nodes each time, and in the first batches as many in each graph; in the last one node is elsewhere."""
    model = seeded(Stack())
    recorder = attached(model)
    for seed, sizes in enumerate([[2] * 9, [2] * 9, [1, 4, 1] * 3, [2] * 9, [2] * 9, [2, 3, 1] + [2] * 6]):
        inputs = stack(sizes, seed)
        assert_are_jacobians(rows_of(recorder, model, inputs), model, inputs)


def test_rows_of_a_stack_are_brought_to_their_examples():
    """In their order, filled up with zeros that a mask leaves out; nodes without gradient go with those before."""
    model, inputs = seeded(Stack()), stack([1, 3, 2], seed=1)
    with torch.no_grad():
        model.before.weight.copy_(randn(4, 3, seed=2))
        inputs["nodes"][2] *= 1e4  # where the tangent has no slope in double precision
    rows = rows_of(attached(model), model, inputs)["before"]
    assert torch.equal(rows.mask, torch.arange(3) < torch.tensor([[1], [3], [2]]))
    assert not rows.gradients[:, 1, 1].any()
    assert_close(rows.inputs[rows.mask][:, :3], inputs["nodes"], **TIGHT)
    assert not rows.inputs[~rows.mask].any()
    assert rows.num_rows == 6


def test_rows_of_a_stack_weigh_with_their_examples():
    """Three nodes of the largest graph are not the three targets of a mask."""
    model, inputs = seeded(Stack()), stack([1, 3, 2], seed=1)
    model.after = nn.Linear(4, 3).double()
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    recorder = attached(model)
    recorder.attach()
    output = model(**inputs)
    rows = recorder.rows(output, unit_gradients(output) * mask, mask=mask)["before"]
    recorder.detach()
    assert torch.equal(rows.mask, torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool())


def test_examples_in_another_order_are_brought_into_that_of_the_output():
    """As sequences that are sorted by length; the rows have the output's batch, in an order that changes."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0, 0].argsort()
            return self.after(self.before(x[order]).tanh()[order.argsort()]).mean(1)

    model = seeded(Sorted())
    recorder = attached(model)
    for seed in range(7):
        x = randn(5, 4, 3, seed=seed)
        rows = rows_of(recorder, model, x)
        assert_are_jacobians(rows, model, x)
        assert_close(rows["before"].inputs[..., :3], x, **TIGHT)


def test_half_precision_tells_examples_apart_although_it_rounds_small_numbers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 8).reshape(2, 4) * 1e-6)
    recorder = attached(model)
    recorder.attach()
    pull_back = recorder.pull_back(model(randn(30, 3, seed=1).half()))
    recorder.detach()
    assert all(pull_back.known_ways.values())


def test_gradients_that_vanish_over_time_do_not_hide_whose_they_are():
    """Roundings of the smallest numbers add up over the steps; each example would be pulled back by itself."""
    model = seeded(nn.GRU(2, 16)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    recorder = attached(model)
    recorder.attach()
    pull_back = recorder.pull_back(model(randn(400, 8, 2, seed=0).float())[0][-1])
    recorder.detach()
    assert all(pull_back.known_ways.values())


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


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("times", [(1, 1, 2, 4, 3), (2, 1, 4, 1, 2, 2, 6)])
def test_time_is_first_whatever_lengths_came_before(flat, times):
    """One step of each example lies either way, and as many steps as examples have the output's batch."""
    model = seeded(TimeFirst(flat=flat))
    recorder = attached(model)
    for seed, time in enumerate(times):
        inputs = randn(2, time, 3, seed=seed)
        rows = rows_of(recorder, model, inputs)
        assert_are_jacobians(rows, model, inputs)
        assert_close(rows["before"].inputs[..., :3], inputs, **TIGHT)


class Normalized(nn.Module):
    """Another model's output, normalised over the batch, and beside it other features that are."""

    def __init__(self, model: nn.Module, *, behind: bool) -> None:
        super().__init__()
        self.model, self.aside, self.norm, self.behind = model, nn.Linear(2, 2), nn.BatchNorm1d(2), behind

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        output, aside = self.model(x), self.aside(features)
        return self.norm(output + aside) if self.behind else output + self.norm(aside)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("make", [lambda: TimeFirst(flat=False), lambda: TimeFirst(flat=True), Siamese])
def test_batch_normalisation_leaves_rows_with_their_examples(make, behind):
    model = seeded(Normalized(make(), behind=behind))
    recorder = attached(model)
    for time in (2, 2, 2) if isinstance(model.model, Siamese) else (5, 10, 3, 4):
        x = randn(5, time, 3, seed=time)
        recorder.attach()
        output = model(x, randn(5, 2, seed=2))
        rows = recorder.rows(output, unit_gradients(output), coupled=True)
        recorder.detach()
        assert_close(rows["model.before"].inputs[..., :3], x, **TIGHT)
        assert rows["model.after"].inputs.shape[:-1] == (5, 1)


def test_positions_are_not_examples_beside_batch_normalisation():
    """Five positions, looked up once for all of five examples."""

    class Beside(Positions):
        def __init__(self) -> None:
            super().__init__(unsqueezed=False)
            self.norm = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, words: Tensor) -> Tensor:
            return super().forward(words) + self.norm(words[:, :2].double())

    model, words = seeded(Beside()), torch.randint(6, (5, 5), generator=rng(1))
    recorder = attached(model)
    recorder.attach()
    output = model(words)
    rows = recorder.rows(output, unit_gradients(output), coupled=True)
    recorder.detach()
    assert_are_jacobians(rows, model, words)


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
