"""The meter: each training forward counts once, nothing else counts, and the caller's backward pass never notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bayes_kfac import structures
from bayes_kfac.curvature import (
    EXAMPLEWISE_KINDS,
    FISHER_KINDS,
    Meter,
    Rows,
    Statistics,
    find_layers,
    output_gradients,
    recursive_rows,
)
from bayes_kfac.curvature.pullback import Call, PullBack
from bayes_kfac.curvature.statistics import kronecker_factors
from bayes_kfac.errors import ArgumentError, UnsupportedModelError
from bayes_kfac.likelihoods import Categorical
from tests.helpers import assert_same_statistics, pull_back, randn, rng, seeded

CLASSES = 3


class Plain(nn.Module):
    """A model whose output is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu_())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class InDictionary(Plain):
    """A model whose output is a dictionary, as in many libraries."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits(x)}


class Checkpointed(Plain):
    """A model that keeps no activations."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.logits, x, use_reentrant=False)


class Partly(Plain):
    """A model with a layer that runs in training only by chance: here, never."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)


class Bare(nn.Module):
    """A model that calls no module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT


def logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


INPUTS = randn(8, 4, seed=1)
TARGETS = torch.randint(CLASSES, (8,), generator=rng(2))
likelihood = Categorical()

#: With these, the root's output is enough; with the others, the call of the likelihood tells.
SETTINGS = [
    pytest.param(Plain, "exact", id="tensor-exact"),
    pytest.param(InDictionary, "exact", id="dictionary-exact"),
    pytest.param(Plain, "empirical", id="tensor-empirical"),
    pytest.param(InDictionary, "empirical", id="dictionary-empirical"),
]


def expected(fisher: str, inputs: Tensor = INPUTS, targets: Tensor = TARGETS) -> dict[str, Statistics]:
    """The statistics of one batch, measured by hand."""
    model = seeded(Plain())
    gradients = output_gradients(likelihood, model(inputs), fisher, target=targets, generator=rng(0))
    passed = pull_back(model, inputs)
    rows = recursive_rows(passed, gradients) if fisher == "recursive" else passed.rows(gradients)
    return {name: kronecker_factors(own, "expand") for name, own in rows.items()}


def assert_same(actual: dict[str, Statistics], wanted: dict[str, Statistics]) -> None:
    assert set(actual) == set(wanted)
    for name, statistics in wanted.items():
        assert_same_statistics(actual[name], statistics)


MakeMeter = Callable[..., Meter]


@pytest.fixture
def make() -> Iterator[MakeMeter]:
    """Build and attach a meter; detach it at the end."""
    meters = []

    def build(model: nn.Module, fisher: str, *, num_data: int = 1000) -> Meter:
        seeded(model)
        measure = lambda rows: {name: kronecker_factors(own, "expand") for name, own in rows.items()}  # noqa: E731
        layers = find_layers(model)[0]
        meter = Meter(model, likelihood, layers, measure, fisher=fisher, num_data=lambda: num_data, generator=rng(0))
        meter.attach()
        meters.append(meter)
        return meter

    yield build
    for meter in meters:
        meter.detach()


# Once for each training forward


@pytest.mark.parametrize("kind", [Plain, InDictionary])
@pytest.mark.parametrize("fisher", FISHER_KINDS)
def test_a_training_step_is_measured_once(make, kind, fisher):
    meter = make(kind(), fisher)
    likelihood(logits(meter.model(INPUTS)), TARGETS).backward()
    assert_same(meter.statistics, expected(fisher))


def test_a_tensor_output_is_measured_with_any_loss(make):
    meter = make(Plain(), "exact")
    nn.functional.cross_entropy(meter.model(INPUTS), TARGETS).backward()
    assert_same(meter.statistics, expected("exact"))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
@pytest.mark.parametrize(
    "call",
    [
        lambda output: likelihood(output, TARGETS),
        lambda output: likelihood(output, target=TARGETS),
        lambda output: likelihood(output=output, target=TARGETS),
        lambda output: likelihood(target=TARGETS, output=output),
    ],
    ids=["positional", "mixed", "keywords", "keywords reversed"],
)
def test_the_likelihood_may_be_called_in_any_style(make, kind, fisher, call):
    meter = make(kind(), fisher)
    call(logits(meter.model(INPUTS))).backward()
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_a_second_loss_on_one_forward_does_not_count_again(make, kind, fisher):
    meter = make(kind(), fisher)
    output = logits(meter.model(INPUTS))
    (likelihood(output, TARGETS) + likelihood(output, TARGETS)).backward()
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_every_training_forward_counts(make, kind, fisher):
    meter = make(kind(), fisher)
    for _ in range(3):
        likelihood(logits(meter.model(INPUTS)), TARGETS).backward()
    assert_same(meter.statistics, {name: one * 3 for name, one in expected(fisher).items()})


def test_attaching_starts_from_nothing_and_detaching_keeps_what_was_measured(make):
    meter = make(Plain(), "exact")
    meter.model(INPUTS)
    meter.detach()
    assert_same(meter.statistics, expected("exact"))
    meter.model(INPUTS)
    assert_same(meter.statistics, expected("exact"))
    meter.attach()
    assert meter.statistics == {}


def test_layers_that_did_not_run_have_no_statistics(make):
    meter = make(Partly(), "exact")
    meter.model(INPUTS)
    assert set(meter.statistics) == {"first", "second"}


def test_mc_is_reproducible_through_its_generator(make):
    first, again = make(Plain(), "mc"), make(Plain(), "mc")
    for global_seed, meter in enumerate((first, again)):
        torch.manual_seed(global_seed)
        meter.model(INPUTS)
    assert_same(again.statistics, first.statistics)


# What never counts


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_forwards_in_eval_mode_never_count(make, kind, fisher):
    meter = make(kind(), fisher)
    meter.model.eval()
    likelihood(logits(meter.model(INPUTS)), TARGETS).backward()
    assert meter.statistics == {}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_forwards_without_gradients_never_count(make, kind, fisher, context):
    meter = make(kind(), fisher)
    with context():
        likelihood(logits(meter.model(INPUTS)), TARGETS)
    assert meter.statistics == {}


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_monitoring_between_steps_does_not_count(make, kind, fisher):
    meter = make(kind(), fisher)
    with torch.no_grad():
        likelihood(logits(meter.model(INPUTS + 1)), TARGETS)
    likelihood(logits(meter.model(INPUTS)), TARGETS).backward()
    with torch.no_grad():
        likelihood(logits(meter.model(INPUTS + 2)), TARGETS)
    meter.model.eval()
    likelihood(logits(meter.model(INPUTS + 3)), TARGETS).backward()
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_a_forward_that_raised_leaves_nothing_behind(make, kind, fisher):
    meter = make(kind(), fisher)
    handle = meter.model.second.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meter.model(INPUTS + 1)
    handle.remove()
    likelihood(logits(meter.model(INPUTS)), TARGETS).backward()
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_a_validation_pass_after_a_forward_that_raised_does_not_count(make, kind, fisher):
    meter = make(kind(), fisher)
    handle = meter.model.second.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meter.model(INPUTS)
    handle.remove()
    with torch.no_grad():
        likelihood(logits(meter.model(INPUTS)), TARGETS)
    assert meter.statistics == {}


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_logging_the_loss_of_a_detached_output_does_not_count(make, kind, fisher):
    meter = make(kind(), fisher)
    output = logits(meter.model(INPUTS))
    likelihood(output.detach(), TARGETS)
    likelihood(output, TARGETS).backward()
    likelihood(output.detach(), TARGETS)
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_layers_that_checkpointing_runs_again_count_once(make, fisher):
    """The backward pass repeats their forward pass, hooks and all."""
    meter = make(Checkpointed(), fisher)
    output = meter.model(INPUTS)
    likelihood(output, TARGETS).backward()
    likelihood(output.detach(), TARGETS)
    assert_same(meter.statistics, expected(fisher))


def test_nothing_is_measured_after_detach(make):
    meter = make(InDictionary(), "empirical")
    output = meter.model(INPUTS)
    meter.detach()
    likelihood(output["logits"], TARGETS).backward()
    assert meter.statistics == {}


def test_a_forward_that_is_paused_does_not_count(make):
    """Data that the gradient is of, and not the Fisher."""
    meter = make(Plain(), "exact")
    with meter.paused():
        likelihood(meter.model(INPUTS + 1), TARGETS).backward()
    assert meter.statistics == {}
    likelihood(meter.model(INPUTS), TARGETS).backward()
    assert_same(meter.statistics, expected("exact"))


def test_what_is_taken_is_taken_once(make):
    meter = make(Plain(), "exact")
    likelihood(meter.model(INPUTS), TARGETS).backward()
    assert_same(meter.take(), expected("exact"))
    assert meter.statistics == meter.take() == {}


# What the call of the likelihood tells


MASK = torch.tensor([True, False, True, True, False, True, True, False])


@pytest.mark.parametrize("kind", [Plain, InDictionary])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_examples_outside_of_the_mask_do_not_count(make, kind, fisher, by_keyword):
    """As if they had not been in the batch; what was measured without the mask is replaced."""
    meter = make(kind(), fisher)
    output = logits(meter.model(INPUTS))
    (likelihood(output, TARGETS, mask=MASK) if by_keyword else likelihood(output, TARGETS, MASK)).backward()
    assert_same(meter.statistics, expected(fisher, INPUTS[MASK], TARGETS[MASK]))


def test_a_batch_that_is_masked_as_a_whole_adds_nothing(make):
    meter = make(Plain(), "exact")
    likelihood(meter.model(INPUTS), TARGETS).backward()
    likelihood(meter.model(INPUTS + 1), TARGETS, torch.zeros(8, dtype=torch.bool)).backward()
    assert_same(meter.statistics, expected("exact"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_output_that_the_loop_flattens_has_tokens_for_examples(make, fisher):
    """The likelihood's call decides what one example is."""

    class Tokens(Plain):
        def logits(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    inputs, targets = INPUTS.unflatten(0, (2, 4)), TARGETS.unflatten(0, (2, 4))
    meter = make(Tokens(), fisher)
    likelihood(meter.model(inputs).flatten(0, 1), targets.flatten()).backward()
    assert_same(meter.statistics, expected(fisher))


def test_an_output_without_a_name_is_found_by_the_likelihoods_call(make):
    """Two tensors, of which none stands out."""

    class Pair(Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x).relu()
            return hidden, self.second(hidden)

    meter = make(Pair(), "exact")
    _, output = meter.model(INPUTS)
    assert meter.statistics == {}
    likelihood(output, TARGETS).backward()
    assert_same(meter.statistics, expected("exact"))


# What the loop makes of outputs before the likelihood sees them


@pytest.mark.parametrize("kind", [Plain, Bare])
@pytest.mark.parametrize("fisher", FISHER_KINDS[:2])
def test_outputs_of_several_calls_may_be_concatenated_in_any_order(make, kind, fisher):
    meter = make(kind(), fisher)
    for x, y in zip(INPUTS.split(4), TARGETS.split(4), strict=True):
        likelihood(meter.model(x), y).backward()
    apart = meter.take()
    meter.generator.manual_seed(0)
    order = torch.tensor([6, 2, 3, 0, 1, 4, 5, 7])
    likelihood(torch.cat([meter.model(x) for x in INPUTS.split(4)])[order], TARGETS[order]).backward()
    assert_same(meter.statistics, apart)


@pytest.mark.parametrize(
    "select",
    [lambda output: output[:3], lambda output: output[MASK], lambda output: output[[5, 1, 1]]],
    ids=["slice", "mask", "index"],
)
def test_some_examples_of_an_output_are_measured_with_the_others(make, select):
    meter = make(Plain(), "exact")
    likelihood(select(meter.model(INPUTS)), select(TARGETS)).backward()
    assert_same(meter.statistics, expected("exact"))


@pytest.mark.parametrize(
    "combine",
    [
        lambda model: model(INPUTS) - model(INPUTS + 1),
        lambda model: model(INPUTS + model(INPUTS).mean()),
        lambda model: torch.cat([model(INPUTS), 2 * model(INPUTS + 1)]),
        lambda model: torch.cat([model(INPUTS), model(INPUTS + 1)]).unflatten(0, (2, 8)).mean(0),
    ],
    ids=["difference", "one after another", "another scale", "mean"],
)
@pytest.mark.parametrize("kind", [Plain, InDictionary, Bare])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_function_of_several_calls_is_refused(make, kind, fisher, combine):
    """Each of them was measured by itself, and the likelihood's output is none of theirs."""
    meter = make(kind(), fisher)
    output = combine(lambda inputs: logits(meter.model(inputs)))
    with pytest.raises(UnsupportedModelError, match=r"2 calls of the model went into.*into one module"):
        likelihood(output, TARGETS.repeat(len(output) // 8))


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(
    "combine",
    [
        lambda output: output.unflatten(0, (4, 2)).mean(1),
        lambda output: output[:4] - output[4:],
        lambda output: 2 * output[:4],
    ],
    ids=["bags", "pairs", "weighted"],
)
def test_an_output_that_is_made_of_other_examples_is_refused(make, fisher, combine):
    meter = make(Plain(), fisher)
    output = combine(meter.model(INPUTS))
    with pytest.raises(UnsupportedModelError, match=r"shape \(4, 3\) that was made of one of shape \(8, 3\)"):
        likelihood(output, TARGETS[:4])


# Parameters and modules of other kinds


@pytest.mark.parametrize("fisher", EXAMPLEWISE_KINDS)
def test_a_model_of_bare_parameters_is_measured(fisher):
    model = seeded(Bare())
    layers = find_layers(model)[0]
    own = structures.get("diagonal", damping="exact", sharing="expand")
    meter = Meter(
        model,
        likelihood,
        layers,
        lambda rows: {name: own.measure(each) for name, each in rows.items()},
        fisher=fisher,
        num_data=lambda: 1000,
    )
    meter.attach()
    likelihood(model(INPUTS), TARGETS).backward()
    meter.detach()
    statistics = meter.statistics["matrix"]
    assert dict(statistics.counts) == {"fisher": 8}
    if fisher != "mc":
        root = output_gradients(likelihood, model(INPUTS), fisher, target=TARGETS)
        squares = torch.einsum("cnk,ni->cnki", root, INPUTS).square().sum((0, 1))
        assert_close(statistics.sums["fisher"].flatten(), squares.flatten())


def test_the_first_forward_pass_is_checked_to_be_complete(make, monkeypatch):
    """And further ones are not, which would cost a backward pass each."""

    class Beside(Plain):
        def logits(self, x: Tensor) -> Tensor:
            return super().logits(x) + self.first(x) @ self.second.weight.mT

    meter = make(Beside(), "exact")
    with pytest.raises(UnsupportedModelError, match="'second'"):
        likelihood(meter.model(INPUTS), TARGETS)
    checks = []
    meter = make(Plain(), "exact")
    monkeypatch.setattr(PullBack, "check_complete", lambda *arguments: checks.append(arguments))
    for _ in range(3):
        likelihood(meter.model(INPUTS), TARGETS).backward()
    assert len(checks) == 1


# Invariances of the training loop


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
@pytest.mark.parametrize(
    "scaled",
    [lambda loss: loss * 1024.0, lambda loss: loss * len(INPUTS), lambda loss: loss / 4, lambda loss: loss * 0.0],
    ids=["grad scaler", "reduction sum", "accumulation", "zero"],
)
def test_statistics_do_not_depend_on_the_losss_scale(make, kind, fisher, scaled):
    meter = make(kind(), fisher)
    scaled(likelihood(logits(meter.model(INPUTS)), TARGETS)).backward()
    assert_same(meter.statistics, expected(fisher))


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [2, 3, 3]])
def test_statistics_do_not_depend_on_gradient_accumulation(make, kind, fisher, sizes):
    meter = make(kind(), fisher)
    for x, y in zip(INPUTS.split(sizes), TARGETS.split(sizes), strict=True):
        (likelihood(logits(meter.model(x)), y) / len(sizes)).backward()
    assert_same(meter.statistics, expected(fisher))


def test_statistics_are_single_precision_under_autocast():
    """The forward pass may be in bfloat16; products in bfloat16 would not be positive definite."""
    model, seen = seeded(Plain()).float(), []

    def measure(rows: Mapping[str, Rows]) -> dict[str, Statistics]:
        seen.extend(rows.values())
        return {name: kronecker_factors(own, "expand") for name, own in rows.items()}

    meter = Meter(model, likelihood, find_layers(model)[0], measure, fisher="exact", num_data=lambda: 1000)
    meter.attach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(INPUTS.float())
    meter.detach()
    assert output.dtype == torch.bfloat16
    for statistics, rows in zip(meter.statistics.values(), seen, strict=True):
        assert_same_statistics(statistics, kronecker_factors(rows, "expand"), rtol=0, atol=0)
        assert {value.dtype for value in statistics.sums.values()} == {torch.float32}
    for name, reference in expected("exact").items():
        for statistic in ("input", "gradient"):
            close = {"rtol": 0.05, "atol": 0.05 * float(reference.mean(statistic).abs().max())}
            assert_close(meter.statistics[name].mean(statistic).double(), reference.mean(statistic), **close)


# Guest manners


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_forward_pass_is_let_go_with_its_graph(make, fisher, monkeypatch):
    """Over many micro-batches, what is kept of them would pile up."""
    original, made = Call.of, []

    def of(*arguments: Any) -> Call:
        call = original(*arguments)
        made.append(ref(call))
        return call

    monkeypatch.setattr(Call, "of", of)
    meter = make(Plain(), fisher)
    for _ in range(3):
        loss = likelihood(meter.model(INPUTS), TARGETS)
        assert sum(call() is not None for call in made) == 2
        loss.backward()
        assert not any(call() for call in made)
    assert len(made) == 6
    assert_same(meter.statistics, {name: one * 3 for name, one in expected(fisher).items()})


@pytest.mark.parametrize("fisher", FISHER_KINDS)
@pytest.mark.parametrize("kind", [Plain, InDictionary])
def test_the_users_backward_is_as_without_a_meter(make, kind, fisher):
    alone = seeded(kind())
    likelihood(logits(alone(INPUTS)), TARGETS).backward()
    meter = make(kind(), fisher)
    output = meter.model(INPUTS)
    loss = likelihood(logits(output), TARGETS)
    assert meter.statistics
    assert all(parameter.grad is None for parameter in meter.model.parameters())
    loss.backward()
    for parameter, reference in zip(meter.model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)


def test_gradients_that_are_there_already_are_left_alone(make):
    meter = make(Plain(), "exact")
    for parameter in meter.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    meter.model(INPUTS)
    assert all(bool((parameter.grad == 7).all()) for parameter in meter.model.parameters())


def test_hooks_are_there_between_attach_and_detach_only(make):
    meter = make(Plain(), "exact")

    def hooks() -> int:
        modules = [*meter.model.modules(), likelihood]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    likelihood(meter.model(INPUTS), TARGETS).backward()
    meter.detach()
    assert hooks() == 0
    meter.attach()
    assert hooks() == 5  # a layer's each, before and after the model, before the likelihood
    meter.detach()
    assert hooks() == 0


@pytest.mark.parametrize(("kind", "fisher"), SETTINGS)
def test_a_batch_larger_than_the_data_set_is_an_error(make, kind, fisher):
    meter = make(kind(), fisher, num_data=7)
    with pytest.raises(ArgumentError, match=r"num_data=7 is smaller than a batch of 8 .* num_data=len\(train_set\)"):
        likelihood(logits(meter.model(INPUTS)), TARGETS)
    meter.take()
    likelihood(logits(meter.model(INPUTS[:7])), TARGETS[:7])
    assert_same(meter.statistics, expected(fisher, INPUTS[:7], TARGETS[:7]))


def test_an_unknown_fisher_is_an_error_that_lists_the_known(make):
    with pytest.raises(ArgumentError, match="'mc', 'exact', 'empirical'"):
        make(Plain(), "true")
