"""Batches and outputs of every kind, and accumulation over several forward passes, give the plain loop's numbers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, TargetError
from tests.helpers import rng, seeded
from tests.training.loops.plain import (
    BATCHES,
    EXAMPLES,
    MASK,
    SAME,
    Batch,
    N,
    Net,
    X,
    assert_same,
    gaussian,
    make,
    train,
)

# Batches and outputs


class ModelOutput(OrderedDict):
    """As in Hugging Face's libraries: a dictionary whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass
class DataclassOutput:
    """Logits among other tensors."""

    hidden: Tensor
    logits: Tensor


class TupleOutput(NamedTuple):
    """Logits among other tensors."""

    hidden: Tensor
    logits: Tensor


@dataclasses.dataclass
class DataclassBatch:
    """A batch by names."""

    inputs: Tensor
    labels: Tensor


class TupleBatch(NamedTuple):
    """A batch in order."""

    inputs: Tensor
    target: Tensor


OUTPUTS = {
    "dict": lambda output: {"hidden": output * 2, "logits": output},
    "dataclass": lambda output: DataclassOutput(output * 2, output),
    "ModelOutput": lambda output: ModelOutput(loss=output.sum(), hidden=output * 2, logits=output),
    "named tuple": lambda output: TupleOutput(output * 2, output),
    "single tensor in a tuple": lambda output: (output, None, 3),
}
LOADERS = {
    "dict": lambda x, y: {"inputs": x, "target": y},
    "dataclass": DataclassBatch,
    "ModelOutput": lambda x, y: ModelOutput(labels=y, inputs=x),
    "named tuple": TupleBatch,
    "single tensor in a tuple": lambda x, y: [x, y],
}


def logits_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind_train_as_tensors_do(kind, fisher):
    optimizer = make(Net(OUTPUTS[kind]), fisher=fisher)
    train(optimizer, model=lambda x: logits_of(optimizer.model(inputs=x)))
    assert_same(optimizer, train(make(Net(), fisher=fisher)))


@pytest.mark.parametrize("kind", LOADERS)
def test_fit_and_predict_take_batches_and_outputs_of_every_kind(kind):
    """One epoch of ``fit`` is the plain loop, and predictions are those of the model that returns tensors."""
    loader = [LOADERS[kind](x, y) for x, y in BATCHES]
    options = {"num_data": N, "lr": 0.05, "fisher": "exact", "statistics_every": 3, "inverse_every": 3}
    posterior = bk.fit(Net(OUTPUTS[kind]), gaussian(), loader, epochs=1, progress=False, generator=rng(7), **options)
    expected = train(make(Net())).posterior()
    for method in ("linearized", "sampling"):
        prediction = posterior.predict({"inputs": X}, method, generator=rng(1))
        reference = expected.predict(X, method, generator=rng(1))
        assert_close(prediction.mean, reference.mean, **SAME)
        assert_close(prediction.epistemic_variance, reference.epistemic_variance, **SAME)


def test_an_output_in_which_nothing_stands_out_needs_the_likelihood_and_says_so_elsewhere():
    """The loop picks the tensor, so that training works; ``fit`` and ``predict`` cannot know, and say what to do."""
    optimizer = make(Net(lambda output: (output, output * 2)))
    train(optimizer, model=lambda x: optimizer.model(x)[0])
    assert_same(optimizer, train(make(Net())))
    with pytest.raises(ArgumentError, match="Wrap the model in a module"):
        optimizer.posterior().predict(X)
    with pytest.raises(ArgumentError, match="Wrap the model in a module"):
        bk.fit(Net(lambda output: (output, output * 2)), gaussian(), BATCHES, epochs=1, num_data=N, progress=False)


# Accumulation, and several forward passes in one context


def test_an_output_that_is_no_tensor_is_refused_by_the_likelihood() -> None:
    model, likelihood, (x, y) = seeded(Net()), gaussian(), BATCHES[0]
    optimizer = bk.NoisyKFAC(model, likelihood, num_data=N)
    with optimizer.sampled_params():
        output = ModelOutput(logits=model(x))
        with pytest.raises(TargetError, match=r"output of type ModelOutput must be a tensor.*model\(x\)\.logits"):
            likelihood(output, y)
        likelihood(output.logits, y).backward()
    optimizer.step()


def test_contexts_on_parts_of_a_batch_at_one_sample_are_the_whole_batch():
    """Gradient accumulation over three contexts of unequal size, the noise of each being that of the whole batch's."""
    optimizer, expected = make(Net()), make(Net())
    for index, (x, y) in enumerate(BATCHES):
        for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
            optimizer.generator.manual_seed(index)
            with optimizer.sampled_params():
                loss = optimizer.likelihood(optimizer.model(x[part]), y[part])
                (loss * len(x[part]) / EXAMPLES).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.generator.manual_seed(index)
        train(expected, [(x, y)])
    assert_same(optimizer, expected)


def parts_of(batch: Batch, mask: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    tensors = batch if mask is None else (*batch, mask)
    return zip(*(tensor.split([3, 5]) for tensor in tensors), strict=True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize(("wrap", "fisher"), [(None, "exact"), (None, "empirical"), (lambda o: (o, o), "exact")])
def test_all_forward_passes_may_come_before_all_losses(wrap, fisher, mask):
    """Each loss finds the forward pass that it belongs to; evaluations in between are in nobody's way."""
    together, apart = make(Net(wrap), fisher=fisher), make(Net(wrap), fisher=fisher)

    def output(optimizer: bk.NoisyKFAC, x: Tensor) -> Tensor:
        made = optimizer.model(x)
        return made if wrap is None else made[0]

    for batch in BATCHES:
        with together.sampled_params():
            together.zero_grad()
            outputs = [output(together, x) for x, *_ in parts_of(batch, mask)]
            with torch.no_grad():
                together.likelihood(output(together, batch[0] * 3), batch[1])
            together.model.eval()
            together.likelihood(output(together, batch[0] * 5), batch[1])
            together.model.train()
            losses = [
                together.likelihood(made, *rest)
                for made, (_, *rest) in zip(outputs, parts_of(batch, mask), strict=True)
            ]
            sum(reversed(losses)).backward()
        together.step()
        with apart.sampled_params():
            apart.zero_grad()
            for x, *rest in parts_of(batch, mask):
                apart.likelihood(output(apart, x), *rest).backward()
        apart.step()
    assert_same(together, apart)


def test_a_likelihood_that_serves_another_model_too_leaves_the_statistics_alone():
    """A teacher's or a second student's loss through the same likelihood, masked or not, is no measurement."""
    optimizer, other = make(Net()), seeded(Net(), 3)
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output, foreign = optimizer.model(x), other(x)
            loss = optimizer.likelihood(output, y) + optimizer.likelihood(foreign, y, MASK)
            (loss + optimizer.likelihood(foreign, y)).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net())))


def test_micro_batches_in_one_context_do_not_pile_up_activations():
    """A backward pass frees what was kept of its forward pass, although the context is still open."""
    optimizer, kept = make(Net()), []
    optimizer.model.act.register_forward_hook(lambda module, args, output: kept.append(output.untyped_storage()))
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x), y).backward()
        weak = StorageWeakRef(kept.pop())
        assert weak.expired()
        loss = optimizer.likelihood(optimizer.model(x), y)
        weak = StorageWeakRef(kept.pop())
        assert not weak.expired()
        loss.backward()
