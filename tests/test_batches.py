"""What batches, inputs and outputs may look like, and what is said of those that may not."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from bayes_kfac.batches import Batch, call, count_examples, expect_output_tensor, inputs_of, output_tensor, unpack
from bayes_kfac.errors import ArgumentError

INPUTS, TARGET = torch.ones(3, 2), torch.arange(3)
MASK = torch.tensor([True, False, True])


@dataclass
class Labelled:
    """A batch of a library that uses dataclasses."""

    words: Tensor
    labels: Tensor


Pair = namedtuple("Pair", ["x", "y"])


# Batches


@pytest.mark.parametrize("batch", [(INPUTS, TARGET), [INPUTS, TARGET], Pair(INPUTS, TARGET)])
def test_a_pair_is_inputs_and_target(batch):
    inputs, target, mask = unpack(batch)
    assert inputs is INPUTS
    assert target is TARGET
    assert mask is None


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_triple_has_a_mask(kind):
    assert unpack(kind((INPUTS, TARGET, MASK))) == Batch(INPUTS, TARGET, MASK)


@pytest.mark.parametrize("inputs", [(INPUTS, INPUTS), {"left": INPUTS}])
def test_inputs_of_a_pair_may_be_several(inputs):
    assert unpack((inputs, TARGET)).inputs is inputs


def test_several_inputs_of_a_data_set_are_several_arguments_though_its_loader_makes_a_list_of_them():
    pairs = [((row, 2 * row), label) for row, label in zip(INPUTS, TARGET, strict=True)]
    (batch,) = DataLoader(pairs, batch_size=3)
    assert isinstance(batch[0], list)
    for inputs in (unpack(batch).inputs, inputs_of(batch, torch.device("cpu"))):
        assert_close(call(torch.add, inputs), 3 * INPUTS)


@pytest.mark.parametrize("name", ["target", "targets", "label", "labels"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_mapping_has_its_target_by_name_and_the_rest_is_for_the_model(kind, name):
    batch = kind({"words": INPUTS, name: TARGET, "types": MASK})
    assert unpack(batch) == Batch({"words": INPUTS, "types": MASK}, TARGET)
    assert set(batch) == {"words", name, "types"}  # the loader's batch is left alone


def test_a_mapping_may_have_a_mask():
    assert unpack({"words": INPUTS, "labels": TARGET, "mask": MASK}) == Batch({"words": INPUTS}, TARGET, MASK)


def test_a_dataclass_is_like_a_mapping():
    assert unpack(Labelled(INPUTS, TARGET)) == Batch({"words": INPUTS}, TARGET)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (INPUTS, "a Tensor"),
        ((INPUTS,), "a tuple"),
        ([INPUTS] * 4, "a list"),
        ({"words": INPUTS}, r"the fields \['words'\]"),
        ({"target": TARGET, "labels": TARGET}, r"the fields \['labels', 'target'\]"),
        ({}, "a dict"),
        (None, "a NoneType"),
    ],
)
def test_other_batches_are_errors_that_say_what_there_was(batch, what):
    with pytest.raises(ArgumentError, match=f"loader yielded {what}.*target, targets, label, labels"):
        unpack(batch)


def test_a_batch_moves_as_a_whole():
    """Whatever its inputs are made of; what is no tensor stays."""
    moved = Batch({"words": INPUTS, "more": [INPUTS, "text"], "scale": 2.0}, TARGET, MASK).to(torch.device("meta"))
    assert moved.inputs["words"].is_meta
    assert moved.inputs["more"][0].is_meta
    assert moved.inputs["more"][1] == "text"
    assert moved.inputs["scale"] == 2.0
    assert moved.target.is_meta
    assert moved.mask.is_meta
    assert Batch(INPUTS, TARGET).to(torch.device("meta")).mask is None


def test_examples_are_those_with_anything_that_weighs():
    assert count_examples(MASK) == 2
    assert count_examples(torch.tensor([[True, False], [False, False], [True, True]])) == 2
    assert count_examples(torch.zeros(3, 2, 2, dtype=torch.bool)) == 0


# Inputs without targets

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "batch",
    [
        INPUTS,
        [INPUTS],
        (INPUTS,),
        (INPUTS, TARGET),
        [INPUTS, TARGET],
        (INPUTS, TARGET, MASK),
        Pair(INPUTS, TARGET),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_inputs_of_a_batch_are_what_a_model_is_called_with(batch):
    """A tensor, one in a list as loaders make of it, or the first of those with targets."""
    assert inputs_of(batch, CPU) is INPUTS


@pytest.mark.parametrize(
    "batch",
    [
        {"words": INPUTS, "types": MASK},
        {"words": INPUTS, "types": MASK, "labels": TARGET},
        {"words": INPUTS, "types": MASK, "target": TARGET, "mask": MASK},
        [{"words": INPUTS, "types": MASK}],
        ({"words": INPUTS, "types": MASK}, TARGET),
    ],
)
def test_the_inputs_of_a_mapping_are_keywords(batch):
    """All of it but the target and its mask."""
    assert inputs_of(batch, CPU) == {"words": INPUTS, "types": MASK}


def test_the_inputs_of_a_dataclass_are_its_other_fields():
    assert inputs_of(Labelled(INPUTS, TARGET), CPU) == {"words": INPUTS}


def test_several_inputs_of_a_pair_stay_together():
    assert inputs_of(((INPUTS, MASK), TARGET), CPU) == (INPUTS, MASK)


def test_inputs_move_to_the_models_device_and_targets_do_not_matter():
    moved = inputs_of(({"words": INPUTS, "more": [INPUTS, "text"]}, "no tensor"), torch.device("meta"))
    assert moved["words"].is_meta
    assert moved["more"][0].is_meta
    assert moved["more"][1] == "text"
    assert inputs_of([INPUTS], torch.device("meta")).is_meta


# Calls


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (INPUTS, ((INPUTS,), {})),
        ((INPUTS, MASK), ((INPUTS, MASK), {})),
        ([INPUTS, MASK], (([INPUTS, MASK],), {})),
        ({"words": INPUTS}, ((), {"words": INPUTS})),
        ((), ((), {})),
    ],
)
def test_a_tuple_is_arguments_and_a_mapping_keywords(inputs, expected):
    assert call(lambda *args, **kwargs: (args, kwargs), inputs) == expected


def test_hooks_of_a_model_run_as_in_any_call():
    seen = []
    model = nn.Linear(2, 1)
    model.register_forward_hook(lambda *_: seen.append(True))
    assert call(model, INPUTS).shape == (3, 1)
    assert call(model, {"input": INPUTS}).shape == (3, 1)
    assert seen == [True, True]


# Outputs


@dataclass
class ModelOutput:
    """What a model of Hugging Face's returns, in spirit."""

    loss: Tensor | None
    logits: Tensor | None
    hidden: Tensor | None = None


OUTPUT, OTHER = torch.ones(3, 4), torch.zeros(3, 2)
Named = namedtuple("Named", ["output", "state"])


@pytest.mark.parametrize(
    "returned",
    [
        OUTPUT,
        {"logits": OUTPUT, "hidden": OTHER},
        {"output": OUTPUT, "hidden": OTHER},
        {"output": OTHER, "logits": OUTPUT},
        {"anything": OUTPUT},
        {"loss": OUTPUT.sum(), "scores": OUTPUT, "indices": TARGET, "text": "words"},
        {"logits": None, "output": OUTPUT},
        OrderedDict(logits=OUTPUT),
        ModelOutput(OUTPUT.sum(), OUTPUT, OTHER),
        ModelOutput(None, None, OUTPUT),
        Named(OUTPUT, OTHER),
        (OUTPUT, None),
        (TARGET, OUTPUT),
        [OUTPUT],
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_output_is_the_tensor_that_stands_out(returned):
    assert output_tensor(returned) is OUTPUT
    assert expect_output_tensor(returned) is OUTPUT


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (OUTPUT.sum(), "Tensor"),
        (None, "NoneType"),
        ((OUTPUT, OTHER), "tuple"),
        ({"left": OUTPUT, "right": OTHER}, "dict"),
        ((TARGET, None), "tuple"),
        (ModelOutput(OUTPUT.sum(), None), "ModelOutput"),
        ("logits", "str"),
        ([], "list"),
    ],
)
def test_where_none_stands_out_the_error_says_what_came_and_what_to_do(returned: Any, kind: str):
    assert output_tensor(returned) is None
    with pytest.raises(ArgumentError, match=f"returned {kind}.*'logits' or 'output'.*Wrap the model"):
        expect_output_tensor(returned)


def test_a_longer_named_tuple_goes_by_its_names():
    class Tokens(NamedTuple):
        input_ids: Tensor
        attention_mask: Tensor
        labels: Tensor

    ids, attended, labels = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2)
    batch = unpack(Tokens(ids, attended, labels))
    assert batch.inputs == {"input_ids": ids, "attention_mask": attended}
    assert batch.target is labels
    assert batch.mask is None
