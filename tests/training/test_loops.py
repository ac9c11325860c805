"""Every kind of training loop gives the numbers of the plain loop, or an error that names the way round.

The plain loop is ``with sampled_params(): zero_grad(); likelihood(model(x), y).backward()`` and ``step()``. A loop of
another shape is right if mean, statistics and posterior after some steps are those of the plain one from equal seeds.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, TargetError, UnsupportedModelError, UsageError
from bayes_kfac.structures import BlockGaussian
from bayes_kfac.training.state import BlockState
from tests.helpers import randn, rng, seeded

N, SIGMA, EXAMPLES = 64, 0.5, 8
#: Float64 numbers that differ in the order of their sums only.
SAME = {"rtol": 1e-9, "atol": 1e-9}

Batch = tuple[Tensor, Tensor]
BATCHES: list[Batch] = [(randn(EXAMPLES, 3, seed=i), randn(EXAMPLES, 2, seed=50 + i)) for i in range(5)]
X = randn(4, 3, seed=99)


class Net(nn.Module):
    """Two layers, whose output may be wrapped and whose activation may be another module."""

    def __init__(
        self, wrap: Callable[[Tensor], Any] | None = None, activation: nn.Module | None = None, hidden: int = 5
    ) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(3, hidden), activation or nn.Tanh(), nn.Linear(hidden, 2)
        self.wrap = wrap
        seeded(self)

    def forward(self, inputs: Tensor) -> Any:
        output = self.head(self.act(self.body(inputs)))
        return output if self.wrap is None else self.wrap(output)


class ImageNet(nn.Module):
    """Convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, 2)
        )
        seeded(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def gaussian(scale: Any = SIGMA) -> bk.likelihoods.Gaussian:
    return bk.likelihoods.Gaussian(scale).double()


def make(model: nn.Module, likelihood: bk.likelihoods.Likelihood | None = None, **options: Any) -> bk.NoisyKFAC:
    """An optimizer that is random in its weight samples only, by its generator."""
    defaults = {"num_data": N, "lr": 0.05, "fisher": "exact", "statistics_every": 3, "inverse_every": 3}
    options = {**defaults, "generator": rng(7), **options}
    return bk.NoisyKFAC(model, gaussian() if likelihood is None else likelihood, **options)


def train(optimizer: bk.NoisyKFAC, batches: Iterable[Batch] = BATCHES, model: Any = None) -> bk.NoisyKFAC:
    """The plain loop."""
    model = optimizer.model if model is None else model
    for x, y in batches:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
    return optimizer


def assert_means(actual: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    pairs = zip(actual.named_parameters(), expected.named_parameters(), strict=True)
    for (name, mean), (_, reference) in pairs:
        assert_close(mean, reference, **tolerance or SAME, msg=lambda text, name=name: f"{name}: {text}")


def assert_blocks(actual: Mapping[str, BlockState], expected: Mapping[str, BlockState], **tolerance: float) -> None:
    """Statistics and the Gaussians that are sampled from are the same."""
    assert list(actual) == list(expected)
    for name, state in expected.items():
        mine = actual[name].statistics
        assert dict(mine.counts) == pytest.approx(dict(state.statistics.counts), rel=1e-9), name
        for key in state.statistics.sums:
            assert_close(mine.mean(key), state.statistics.mean(key), **tolerance or SAME)
        assert_gaussians(actual[name].posterior, state.posterior, **tolerance)


def assert_gaussians(actual: BlockGaussian, expected: BlockGaussian, **tolerance: float) -> None:
    for key, value in expected.state.items():
        assert_close(actual.state[key], value, **tolerance or SAME)


def assert_same(actual: bk.NoisyKFAC, expected: bk.NoisyKFAC, **tolerance: float) -> None:
    """Mean, statistics and posterior are the same, block for block."""
    assert actual.steps == expected.steps
    assert_means(actual.model, expected.model, **tolerance)
    assert_blocks(actual.blocks, expected.blocks, **tolerance)
    posterior = actual.posterior()
    for name, block in expected.posterior().blocks.items():
        assert_gaussians(posterior.blocks[name], block, **tolerance)


def assert_identical(actual: bk.NoisyKFAC, expected: bk.NoisyKFAC) -> None:
    """The same to the last bit."""
    assert_same(actual, expected, rtol=0, atol=0)


def bare_of_hooks(*modules: nn.Module) -> bool:
    parts = [part for module in modules for part in module.modules()]
    return not any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts)


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


MASK = torch.tensor([True, False, True, True, False, True, True, True])


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


# Mixed precision


def float_net() -> nn.Module:
    return Net().float()


def float_batches(count: int = len(BATCHES)) -> list[Batch]:
    return [(x.float(), y.float()) for x, y in BATCHES[:count]]


def train_mixed(optimizer: bk.NoisyKFAC, dtype: torch.dtype | None, scaler: Any, batches: Sequence[Batch]) -> None:
    for x, y in batches:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype) if dtype else nullcontext():
                output = optimizer.model(x)
            loss = optimizer.likelihood(output.float(), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # a power of two changes no digit where the exponent has room for it; half precision's has not always
    [(None, 0.0), (torch.bfloat16, 0.0), (torch.float16, 1e-4)],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_gradient_scaler_is_taken_out_again(dtype, tolerance):
    scaled, plain = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    train_mixed(scaled, dtype, torch.amp.GradScaler("cpu", init_scale=2.0**10), float_batches())
    train_mixed(plain, dtype, None, float_batches())
    assert_same(scaled, plain, rtol=tolerance, atol=tolerance)
    for state in scaled.blocks.values():
        assert {value.dtype for value in state.statistics.sums.values()} == {torch.float32}


def test_autocast_measures_what_float32_does_to_its_precision():
    """Statistics of a bfloat16 forward pass are those of the float32 one to about its three digits."""
    mixed, plain = make(float_net(), gaussian().float(), lr=0.0), make(float_net(), gaussian().float(), lr=0.0)
    train_mixed(mixed, torch.bfloat16, None, float_batches(3))
    train_mixed(plain, None, None, float_batches(3))
    for name, state in plain.blocks.items():
        for key in state.statistics.sums:
            mine, reference = mixed.blocks[name].statistics.mean(key), state.statistics.mean(key)
            # the noise of the second step comes from the first one's statistics: a few roundings of 2⁻⁸ add up
            assert torch.linalg.norm(mine - reference) < 0.03 * torch.linalg.norm(reference)
    gradients = [optimizer.blocks["body"].statistics.mean("gradient") for optimizer in (mixed, plain)]
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("clear", ["inside", "outside", "outside, to zero"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(clear):
    """The loss overflows on one batch; afterwards all is as if the batch had never come."""
    optimizer, expected = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def one(batch: Batch, factor: float) -> None:
        x, y = batch
        with optimizer.sampled_params():
            if clear == "inside":
                optimizer.zero_grad()
            scaler.scale(optimizer.likelihood(optimizer.model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if clear != "inside":
            optimizer.zero_grad(set_to_none=clear == "outside")

    batches = float_batches()
    for batch in batches[:2]:
        one(batch, 1.0)
    before = optimizer.generator.get_state()
    one(batches[2], torch.finfo(torch.float32).max)
    assert optimizer.steps == 2
    optimizer.generator.set_state(before)  # the noise that was drawn for it is spent
    for batch in batches[3:]:
        one(batch, 1.0)
    train(expected, batches[:2] + batches[3:])
    assert_identical(optimizer, expected)


def test_one_autocast_region_around_the_whole_loop_serves_no_stale_weights():
    """Autocast keeps the casts of weights; each sample, and the mean after each step, is cast anew."""
    inside, outside = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in float_batches():
            with inside.sampled_params():
                inside.zero_grad()
                inside.likelihood(inside.model(x).float(), y).backward()
                body = inside.model.body
                perturbed = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
                assert torch.equal(body(x), perturbed)
            at_mean = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
            assert torch.equal(body(x), at_mean)
            assert not torch.equal(at_mean, perturbed)
            inside.step()
            moved = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
            assert torch.equal(body(x), moved)
            assert not torch.equal(at_mean, moved)
    train_mixed(outside, torch.bfloat16, None, float_batches())
    assert_identical(inside, outside)


# Memory formats, checkpointing, changes in place


def image_batches() -> list[Batch]:
    return [(randn(6, 3, 5, 5, seed=i), randn(6, 2, seed=50 + i)) for i in range(3)]


def test_channels_last_changes_nothing():
    model = ImageNet().to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in image_batches()]
    optimizer = train(make(model), batches)
    assert model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(optimizer, train(make(ImageNet()), image_batches()))


class Checkpointed(Net):
    """A net that runs all of it, or only its body, under activation checkpointing."""

    def __init__(self, *, whole: bool, use_reentrant: bool) -> None:
        super().__init__()
        self.whole, self.use_reentrant = whole, use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        run = partial(checkpoint, use_reentrant=self.use_reentrant)
        inputs = inputs.requires_grad_(self.use_reentrant)  # without this torch itself would refuse
        if self.whole:
            return run(super().forward, inputs)
        return self.head(run(lambda x: self.act(self.body(x)), inputs))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing_changes_nothing(whole, fisher):
    optimizer = train(make(Checkpointed(whole=whole, use_reentrant=False), fisher=fisher))
    assert_same(optimizer, train(make(Net(), fisher=fisher)))


@pytest.mark.parametrize("whole", [True, False])
def test_reentrant_checkpointing_is_an_error_that_names_the_way_round(whole):
    batches = [(x.clone(), y) for x, y in BATCHES]
    with pytest.raises(UsageError, match="use_reentrant=False"):
        train(make(Checkpointed(whole=whole, use_reentrant=True)), batches)


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
def test_activations_in_place_change_nothing(positions):
    """Over positions a layer's output is a view, which autograd takes out of the graph when it is written to."""
    batches = [(randn(EXAMPLES, *positions, 3, seed=i), randn(EXAMPLES, *positions, 2, seed=50 + i)) for i in range(4)]
    optimizer = train(make(Net(activation=nn.ReLU(inplace=True))), batches)
    assert_same(optimizer, train(make(Net(activation=nn.ReLU())), batches))


class ChangesInput(Net):
    """A model that writes into the input of a layer after the layer has read it."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.act(self.body(inputs))
        output = self.head(hidden)
        hidden.add_(1.0)
        return output


def test_an_input_that_is_changed_after_the_call_is_an_error_that_names_the_layer():
    with pytest.raises(UsageError, match="input of layer 'head' was changed in place"):
        train(make(ChangesInput()))


# Compilation


def compiled_root(model: Net, **options: Any) -> nn.Module:
    return torch.compile(model, **options)


def compiled_in_place(model: Net, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def compiled_part(model: Net, **options: Any) -> nn.Module:
    model.body = torch.compile(model.body, **options)
    return model


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", [compiled_root, compiled_in_place, compiled_part])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_train_to_the_same_numbers(how, backend):
    """Steps that measure run uncompiled, the others compiled; both with the sample of the moment."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = how(Net(), backend=counting)
    optimizer = make(model, statistics_every=5)
    train(optimizer, BATCHES[:3], model)
    assert not graphs  # steps 0, 1 and 2 are measured
    train(optimizer, BATCHES[3:], model)
    assert graphs
    expected = train(make(Net(), statistics_every=5))
    if how is not compiled_part:  # its parameters have the names that torch.compile() gave them
        assert_same(optimizer, expected)
    for mean, reference in zip(optimizer.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(mean, reference, **SAME)
    prediction, reference = optimizer.posterior().predict(X), expected.posterior().predict(X)
    assert_close(prediction.epistemic_variance, reference.epistemic_variance, **SAME)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", [compiled_root, compiled_in_place, compiled_part])
def test_the_posterior_of_a_compiled_model_loads_into_a_plain_one(how, tmp_path):
    model = how(Net(), backend="eager")
    posterior = train(make(model), model=model).posterior()
    if how is not compiled_part:  # its parameters have the names that torch.compile() gave them, but not in the file
        assert not any("_orig_mod" in name for name in (*posterior.mean, *posterior.layers, str(posterior.summary())))
    posterior.save(tmp_path / "posterior.safetensors")
    for same in (Net(), how(Net(), backend="eager")):
        loaded = bk.Posterior.load(tmp_path / "posterior.safetensors", same)
        assert_close(loaded.predict(X).mean, posterior.predict(X).mean, rtol=0, atol=0)
        assert_close(loaded.predict(X).epistemic_variance, posterior.predict(X).epistemic_variance, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductors_code_trains_to_the_same_numbers():
    """The backend that users have; a quarter of a minute where its cache is cold."""
    with torch._inductor.config.patch(compile_threads=1):
        model = compiled_root(Net())
        optimizer = train(make(model, statistics_every=5), model=model)
    assert_same(optimizer, train(make(Net(), statistics_every=5)))


# Forward passes that are no training


def test_evaluations_teachers_and_metrics_inside_the_context_never_count():
    """A loop full of other forward passes, of the model and of its moving average, is the plain loop."""
    optimizer = make(Net())
    model, likelihood = optimizer.model, optimizer.likelihood
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    logged = []
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            with torch.no_grad():
                model(x * 3)
                target = teacher(x)
            model.eval()
            logged.append(likelihood(model(x * 5), y).item())
            model.train()
            output = model(x)
            logged.append(likelihood(output.detach(), target).item())
            likelihood(output, y).backward()
            logged.append((output - y).square().mean().item())
            with torch.inference_mode():
                logged.append(likelihood(model(x), y).item())
        optimizer.step()
        teacher.update_parameters(model)
        logged.append(likelihood(model(x), y).item())
    assert_identical(optimizer, train(make(Net())))
    assert bare_of_hooks(model, teacher, likelihood)


# Several optimizers


class HeadOnly(Net):
    """The head of the net, on features."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


def test_a_bayesian_head_beside_adamw_is_the_head_on_the_features_of_the_moment():
    model, features = Net(), []
    head = make(model, params=model.head.parameters())
    adam = torch.optim.AdamW(model.body.parameters(), lr=1e-2)
    for x, y in BATCHES:
        with head.sampled_params():
            head.zero_grad()
            adam.zero_grad()
            features.append(model.act(model.body(x)).detach())
            head.likelihood(model(x), y).backward()
        head.step()
        adam.step()
    alone = HeadOnly()
    assert not torch.equal(model.body.weight, alone.body.weight)
    alone.body.load_state_dict(model.body.state_dict())
    expected = make(alone, params=alone.head.parameters())
    assert_same(head, train(expected, [(f, y) for f, (_, y) in zip(features, BATCHES, strict=True)]))
    constant = [row.parameter for row in head.summary().rows if row.why == "not among params="]
    assert constant == ["body.weight", "body.bias"]


@pytest.mark.parametrize("share_likelihood", [True, False])
def test_two_optimizers_with_nested_contexts_are_one_with_two_layers(share_likelihood):
    """One generator for both draws the noise in the order in which one optimizer draws it for its layers."""
    model, generator, likelihood = Net(), rng(7), gaussian()
    options = {"generator": generator, "kl_clip": None}  # the clip is one number for all layers of an optimizer
    body = make(model, likelihood, params=model.body.parameters(), **options)
    head = make(model, likelihood if share_likelihood else gaussian(), params=model.head.parameters(), **options)
    for x, y in BATCHES:
        with body.sampled_params(), head.sampled_params():
            model.zero_grad()
            likelihood(model(x), y).backward()
        head.step()
        body.step()
    expected = train(make(Net(), kl_clip=None))
    assert_means(model, expected.model)
    assert_blocks({**body.blocks, **head.blocks}, expected.blocks)


# The loops of Lightning and Accelerate


class LightningShaped:
    """The part of a Lightning module and its trainer that touches optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], training_step: Callable[[Batch], Tensor]) -> None:
        self.optimizers, self.training_step = optimizers, training_step

    def fit(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            for optimizer in self.optimizers:
                others = self.toggle(optimizer)
                optimizer.step(closure=partial(self.closure, optimizer, batch))
                for parameter in others:
                    parameter.requires_grad_(True)

    def closure(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        loss = self.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        return loss

    def toggle(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Freeze the parameters of all other optimizers, as ``toggle_optimizer`` does."""
        mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        groups = [group for other in self.optimizers for group in other.param_groups]
        others = [parameter for group in groups for parameter in group["params"] if parameter not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        return others


def head_and_body() -> tuple[Net, bk.NoisyKFAC, torch.optim.Optimizer]:
    model = Net()
    head = make(model, gaussian("learned"), params=model.head.parameters())
    return model, head, torch.optim.AdamW(model.body.parameters(), lr=1e-2)


def test_a_lightning_shaped_loop_is_the_plain_one():
    """Closures, and the other optimizer's parameters frozen in turns, as in a GAN."""
    model, head, adam = head_and_body()
    LightningShaped([head, adam], lambda batch: head.likelihood(model(batch[0]), batch[1])).fit(BATCHES)
    twin, expected, twin_adam = head_and_body()
    for batch in BATCHES:
        train(expected, [batch])
        twin_adam.zero_grad()
        expected.likelihood(twin(batch[0]), batch[1]).backward()
        twin_adam.step()
    assert_same(head, expected)
    assert_close(head.likelihood.noise_scale, expected.likelihood.noise_scale, **SAME)


class Accelerated:
    """As Accelerate wraps an optimizer: ``step`` and ``zero_grad`` do nothing while gradients are accumulated."""

    def __init__(self, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.optimizer, self.every, self.seen = optimizer, every, 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.every).backward()
        self.seen += 1

    @property
    def sync_gradients(self) -> bool:
        return self.seen % self.every == 0

    def step(self) -> None:
        if self.sync_gradients:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.sync_gradients:
            self.optimizer.zero_grad()


def test_an_accelerate_shaped_loop_is_the_plain_one_on_whole_batches():
    optimizer, expected = make(Net()), make(Net())
    wrapped = Accelerated(optimizer, every=2)
    for index, (x, y) in enumerate(BATCHES):
        for micro in zip(x.split(4), y.split(4), strict=True):
            optimizer.generator.manual_seed(index)
            with optimizer.sampled_params():
                wrapped.backward(optimizer.likelihood(optimizer.model(micro[0]), micro[1]))
            wrapped.step()
            wrapped.zero_grad()
        expected.generator.manual_seed(index)
        train(expected, [(x, y)])
    assert_same(optimizer, expected)


# Copies


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("damping", ["factored", "optimal", "exact"])
def test_a_copy_in_mid_training_trains_on_to_the_same_bits(copied, damping):
    """The copy has its own model, likelihood, generator and schedule; neither of the two notices the other."""
    likelihood = gaussian(bk.likelihoods.GammaNoise(2.0, 2.0))
    options = {"others": "deterministic", "damping": damping, "num_samples": 2, "antithetic": True}
    optimizer = make(Net(activation=nn.PReLU()), likelihood, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(optimizer: bk.NoisyKFAC, schedule: Any, batches: list[Batch]) -> None:
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = optimizer.likelihood(optimizer.model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()

    run(optimizer, schedule, BATCHES[:3])
    other, other_schedule = copied((optimizer, schedule))
    assert other.model is not optimizer.model
    run(other, other_schedule, BATCHES[3:])
    run(optimizer, schedule, BATCHES[3:])
    assert_identical(other, optimizer)
    assert torch.equal(other.likelihood.noise_scale, optimizer.likelihood.noise_scale)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert torch.equal(other.generator.get_state(), optimizer.generator.get_state())


class Sequences(nn.Module):
    """A recurrence and attention, whose forward passes are written out while they are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(3, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.recurrence(inputs)
        return self.head(self.attention(hidden, hidden, hidden)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_model_in_training_is_copied_without_a_trace_of_its_optimizer(copied):
    batches = [(randn(4, 3, 3, seed=i), randn(4, 3, 2, seed=50 + i)) for i in range(2)]
    optimizer = train(make(Sequences()), batches)
    twin = copied(optimizer.model)
    assert bare_of_hooks(optimizer.model, twin, optimizer.likelihood)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    train(optimizer, batches)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert torch.equal(twin(batches[0][0]), copied(twin)(batches[0][0]))


# Moves


def test_a_model_that_becomes_float64_goes_on_in_float64():
    """Statistics, posterior, momentum and Adam's moments follow; the numbers are those of float64 throughout."""

    def trained(first: torch.dtype) -> bk.NoisyKFAC:
        # a generator gives the same numbers in both dtypes to blocks of less than 16 weights
        model, likelihood = Net(activation=nn.PReLU(), hidden=3).to(first), gaussian("learned").to(first)
        options = {"others": "deterministic", "extrinsic_damping": 0.1, "statistics_every": 100, "inverse_every": 100}
        optimizer = make(model, likelihood, **options)
        train(optimizer, [(x.to(first), y.to(first)) for x, y in BATCHES[:3]])
        model.double()
        likelihood.double()
        return train(optimizer, BATCHES[3:4])  # a step on which nothing is made anew

    moved, expected = trained(torch.float32), trained(torch.float64)
    for state in moved.blocks.values():
        gaussians = [*state.posterior.state.values(), *state.preconditioner.state.values()]
        assert {t.dtype for t in [*state.statistics.sums.values(), *gaussians, state.momentum]} == {torch.float64}
    # three steps in float32, through factorisations of condition numbers of about a hundred
    assert_same(moved, expected, rtol=1e-4, atol=1e-5)
    assert_close(moved.likelihood.noise_scale, expected.likelihood.noise_scale, rtol=1e-4, atol=0)


def test_a_model_that_becomes_bfloat16_keeps_its_curvature_in_float32():
    model, likelihood = Net(activation=nn.PReLU()).float(), gaussian("learned").float()
    optimizer = train(make(model, likelihood, others="deterministic"), float_batches(3))
    model.to(torch.bfloat16)
    before = model.head.weight.detach().clone()
    train(optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in BATCHES])
    assert not torch.equal(model.head.weight, before)
    for state in optimizer.blocks.values():
        tensors = [*state.statistics.sums.values(), *state.posterior.state.values(), state.momentum]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_move_to_where_the_model_is_leaves_the_state_alone():
    optimizer = train(make(Net()))
    blocks = optimizer.blocks
    optimizer.model.to("cpu", torch.float64)
    with optimizer.sampled_params():
        assert optimizer.blocks is blocks


# Freezing and unfreezing


def test_what_is_frozen_from_the_start_is_what_params_leaves_out():
    model = Net()
    model.body.requires_grad_(False)
    optimizer, other = make(model), Net()
    expected = make(other, params=other.head.parameters())
    assert_same(train(optimizer), train(expected))


def test_a_frozen_layer_stays_as_it_was_and_goes_on_with_its_old_state():
    model = Net()
    optimizer = train(make(model, statistics_every=1), BATCHES[:2])
    frozen, before = [p.detach().clone() for p in model.body.parameters()], optimizer.blocks["body"]
    model.body.requires_grad_(False)
    train(optimizer, BATCHES[2:4])
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.body.parameters(), strict=True))
    assert list(optimizer.posterior().blocks) == ["head"]
    assert [row.structure for row in optimizer.summary().rows] == ["constant"] * 2 + ["kron/factored 2×6"] * 2
    # the posterior's variance is the head's alone: J P⁻¹ Jᵀ with J = [h 1] for each output
    with torch.no_grad():
        features = functional.pad(model.act(model.body(X)), (0, 1), value=1.0)
    covariance = torch.linalg.inv(optimizer.posterior().blocks["head"].to_dense()).reshape(2, 6, 2, 6)
    variance = torch.stack([((features @ covariance[o, :, o]) * features).sum(-1) for o in range(2)], dim=-1)
    assert_close(optimizer.posterior().predict(X).epistemic_variance, variance, **SAME)
    model.body.requires_grad_(True)
    train(optimizer, BATCHES[4:])
    decay, after = optimizer.param_groups[0]["statistics_decay"], optimizer.blocks["body"]
    assert after.statistics.counts["gradient"] == pytest.approx(
        before.statistics.counts["gradient"] * decay + EXAMPLES * (1 - decay)
    )
    assert after.momentum_weight == pytest.approx(0.9 * before.momentum_weight + 0.1)
    assert not torch.equal(frozen[0], model.body.weight)


def test_a_layer_that_is_unfrozen_later_joins_with_statistics_at_its_first_step():
    """Although none are due then; its hyper-parameters are the defaults, those of groups are not touched."""
    model = Net()
    model.body.requires_grad_(False)
    groups = [{"params": model.head.parameters(), "prior_precision": 9.0}]
    optimizer = make(model, statistics_every=100, prior_precision=2.0, groups=groups, warmup=False)
    train(optimizer, BATCHES[:3])
    model.body.requires_grad_(True)
    assert not optimizer.statistics_schedule.is_due(optimizer.steps)
    x, y = BATCHES[3]
    with optimizer.sampled_params():
        assert optimizer.is_measuring
        optimizer.zero_grad()
        optimizer.likelihood(model(x), y).backward()
        head = model.head.weight.detach().clone()
        hidden = model.act(model.body(x)).detach()
    optimizer.step()
    # G of the body is Σ_c of what 1/σ for each output sends back through head and tanh
    backward = ((1 - hidden**2).unsqueeze(1) * head) / SIGMA
    gram = torch.einsum("nci,ncj->ij", backward, backward) / EXAMPLES
    assert_close(optimizer.blocks["body"].statistics.mean("gradient"), gram, **SAME)
    posterior = optimizer.posterior()
    assert posterior.prior_precision == {"body": 2.0, "head": 9.0}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    train(optimizer, BATCHES[4:])
    assert not torch.equal(model.body.weight, Net().body.weight)


def test_a_group_holds_for_a_layer_that_is_frozen_as_yet():
    model = Net()
    model.body.requires_grad_(False)
    groups = [{"params": model.body.parameters(), "lr": 0.0, "prior_precision": 9.0}]
    optimizer = train(make(model, groups=groups))
    model.body.requires_grad_(True)
    train(optimizer)
    assert torch.equal(model.body.weight, Net().body.weight)
    assert optimizer.posterior().prior_precision == {"body": 9.0, "head": 1.0}


def test_a_checkpoint_knows_the_state_of_frozen_layers(tmp_path):
    """Saved while the body is frozen, loaded into new objects, unfrozen: the run that went on, bit for bit."""

    def half(*, resumed: bool) -> bk.NoisyKFAC:
        optimizer = make(Net(), statistics_every=1)
        if not resumed:
            train(optimizer, BATCHES[:2])
        optimizer.model.body.requires_grad_(False)
        return optimizer

    optimizer, other = half(resumed=False), half(resumed=True)
    train(optimizer, BATCHES[2:4])
    torch.save([optimizer.state_dict(), optimizer.model.state_dict()], tmp_path / "checkpoint.pt")
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(states[0])
    other.model.load_state_dict(states[1])
    for each in (optimizer, other):
        each.model.body.requires_grad_(True)
        train(each, BATCHES[4:])
    assert_identical(other, optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    ],
    ids=["StepLR", "LambdaLR"],
)
def test_schedules_hold_for_layers_that_join_later(schedule):
    """Their groups are there from the start: a schedule knows no others."""
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    model.body.requires_grad_(False)
    groups = [{"params": model.head.parameters(), "lr": 0.04}]
    optimizer = make(model, others="deterministic", deterministic_lr=0.03, groups=groups)
    scheduler = schedule(optimizer)
    for _ in range(2):
        train(optimizer, BATCHES[:2])
        scheduler.step()
        model.requires_grad_(True)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0125, 0.0075])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]


@pytest.mark.parametrize(
    ("others", "structure"), [("deterministic", "deterministic"), ("diagonal", "diagonal/exact 1×1")]
)
def test_what_is_unfrozen_later_follows_the_policy_for_others(others, structure):
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    likelihood = gaussian(
        bk.likelihoods.GammaNoise(2.0, 2.0)
    )  # it has a KL term, which frozen parameters take no part in
    optimizer = train(make(model, likelihood, others=others), BATCHES[:2])
    before = model.act.weight.detach().clone()
    assert optimizer.summary().rows[2].structure == "constant"
    model.act.requires_grad_(True)
    train(optimizer, BATCHES[2:])
    assert optimizer.summary().rows[2].structure == structure
    assert ("act.weight" in optimizer.posterior().blocks) == (others == "diagonal")
    assert not torch.equal(model.act.weight, before)
    model.act.requires_grad_(False)
    moved = model.act.weight.detach().clone()
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad(set_to_none=False)  # a gradient of zero would be enough for Adam's momentum to go on
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
    assert torch.equal(model.act.weight, moved)


def test_unfreezing_what_no_block_covers_is_an_error_by_default():
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    optimizer = train(make(model))
    model.act.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"act\.weight: PReLU has no adapter"):
        train(optimizer)
    model.act.requires_grad_(False)
    train(optimizer)


@pytest.mark.parametrize(("part", "shape"), [("bias", (2, 5)), ("weight", (2, 1))])
def test_one_of_weight_and_bias_may_be_frozen_alone(part, shape):
    """It is a constant, the block is the other's; whole again, the block goes on with its old state."""
    model = Net()
    optimizer = train(make(model, statistics_every=1), BATCHES[:2])
    whole, parameter = optimizer.blocks["head"], getattr(model.head, part)
    parameter.requires_grad_(False)
    frozen = parameter.detach().clone()
    train(optimizer, BATCHES[2:4])
    assert torch.equal(parameter, frozen)
    alone = list(optimizer.layers)[-1]
    assert optimizer.posterior().blocks[alone].shape == shape
    assert [row.structure for row in optimizer.summary().rows if row.parameter == f"head.{part}"] == ["constant"]
    counts = optimizer.blocks[alone].statistics.counts["gradient"]
    assert counts == pytest.approx((1 - 0.99**2) * EXAMPLES)  # two steps of its own, from nothing
    parameter.requires_grad_(True)
    train(optimizer, BATCHES[4:])
    assert optimizer.blocks["head"].posterior.shape == (2, 6)
    assert optimizer.blocks["head"].momentum_weight == pytest.approx(0.9 * whole.momentum_weight + 0.1)
    assert not torch.equal(parameter, frozen)


def test_a_model_frozen_after_training_keeps_its_variance():
    """For deployment all is frozen; the posterior of before and the one of after, saved and loaded, are the same."""
    optimizer = train(make(Net(activation=nn.PReLU()), others="diagonal"))
    before = optimizer.posterior().predict(X).epistemic_variance
    optimizer.model.requires_grad_(False)
    assert before.min() > 0
    assert_close(optimizer.posterior().predict(X).epistemic_variance, before, rtol=0, atol=0)
    with pytest.raises(UnsupportedModelError, match="no layer with a curvature block"):
        train(optimizer)


# What no block covers


class Odd(nn.Module):
    """Parameters of every kind outside the blocks: a PReLU, a bilinear form, a parametrized weight, a bare one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.form = nn.Linear(3, 4), nn.PReLU(4), nn.Bilinear(4, 3, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.zeros(2))
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.normed(self.form(self.act(self.body(inputs)), inputs)) * self.scale.exp()


def test_the_diagonal_policy_has_the_squares_of_each_examples_own_gradient():
    """For the exact Fisher, of the Jacobians of each output over σ, one at a time."""
    model = Odd()
    optimizer = make(model, others="diagonal", warmup=False)
    x, y = BATCHES[0]
    train(optimizer, [(x, y)])
    # without warm-up the first sample is the mean, from which the statistics were taken
    original = Odd()
    alone = [name for name in optimizer.layers if name != "body"]
    assert len(alone) == 7
    fisher = {name: torch.zeros_like(original.get_parameter(name)) for name in alone}
    for output in original(x).flatten():
        gradients = torch.autograd.grad(output, [original.get_parameter(name) for name in alone], retain_graph=True)
        for name, gradient in zip(alone, gradients, strict=True):
            fisher[name] += (gradient / SIGMA).square() / EXAMPLES
    for name in alone:
        assert_close(optimizer.blocks[name].statistics.mean("fisher"), fisher[name].reshape(-1, 1), **SAME)
    train(optimizer)
    assert optimizer.posterior().predict(X).epistemic_variance.min() > 0


def test_the_deterministic_policy_is_adam_on_the_same_gradients():
    """Step for step, at the samples of the others; what is a bare parameter has a block of its own all the same."""
    model = Odd()
    optimizer = make(model, others="deterministic", deterministic_lr=0.02)
    names = [row.parameter for row in optimizer.summary().rows if row.structure == "deterministic"]
    assert len(names) == 6
    estimates = [model.get_parameter(name) for name in names]
    twins = [estimate.detach().clone() for estimate in estimates]
    adam = torch.optim.Adam(twins, lr=0.02)
    for batch in BATCHES:
        train(optimizer, [batch])
        for twin, estimate in zip(twins, estimates, strict=True):
            twin.grad = estimate.grad.clone()
        adam.step()
    for twin, estimate in zip(twins, estimates, strict=True):
        assert_close(estimate, twin, rtol=0, atol=0)
    assert set(optimizer.posterior().blocks) == {"body", "scale"}


class Bare(nn.Module):
    """A model of bare parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.matrix + self.offset


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_model_of_bare_parameters_has_their_diagonal_fisher(fisher):
    optimizer = make(Bare(), fisher=fisher, warmup=False)
    x, y = BATCHES[0]
    residuals = (Bare()(x).detach() - y) / SIGMA**2 if fisher == "empirical" else torch.full_like(y, 1 / SIGMA)
    train(optimizer, [(x, y)])
    matrix = (x.unsqueeze(-1) * residuals.unsqueeze(1)).square().mean(0)
    assert_close(optimizer.blocks["matrix"].statistics.mean("fisher"), matrix.reshape(-1, 1), **SAME)
    assert_close(
        optimizer.blocks["offset"].statistics.mean("fisher"), residuals.square().mean(0).reshape(-1, 1), **SAME
    )


# Masks


class PerToken(Net):
    """The same two layers at each position, one by one."""

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        return super().forward(inputs)


class Recurrent(nn.Module):
    """A recurrence from left to right: what comes after the end of a sequence reaches none of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        return self.head(self.recurrence(inputs)[0])


class Attentive(nn.Module):
    """Attention to the valid steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        attended, _ = self.attention(hidden, hidden, hidden, key_padding_mask=~valid)
        return self.head(self.norm(hidden + attended))


LENGTHS = (4, 1, 3, 2)
VALID = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)
LIKELIHOODS = {
    "NaN": (gaussian, lambda seed: randn(4, 4, 2, seed=seed), float("nan")),
    "-100": (bk.likelihoods.Categorical, lambda seed: torch.randint(2, (4, 4), generator=rng(seed)), -100),
    "NaN, Bernoulli": (
        bk.likelihoods.Bernoulli,
        lambda seed: torch.randint(2, (4, 4, 2), generator=rng(seed)).double(),
        float("nan"),
    ),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("filler", LIKELIHOODS)
@pytest.mark.parametrize("kind", [PerToken, Recurrent, Attentive])
def test_padded_sequences_are_their_valid_steps_one_sequence_at_a_time(kind, filler, sharing, fisher):
    """What fills the padding is in no loss and no statistic: neither inputs of 100 nor targets that are no numbers."""
    likelihood, draw, nothing = LIKELIHOODS[filler]
    padded, apart = (make(kind(), likelihood(), sharing=sharing, fisher=fisher) for _ in range(2))
    for seed in range(3):
        x, y = randn(4, 4, 3, seed=seed), draw(seed)
        with apart.sampled_params():
            apart.zero_grad()
            for sequence, target, length in zip(x, y, LENGTHS, strict=True):
                valid = torch.ones(1, length, dtype=torch.bool)
                output = apart.model(sequence[None, :length], valid)
                (apart.likelihood(output, target[None, :length]) / len(LENGTHS)).backward()
        apart.step()
        x[~VALID], y[~VALID] = 100.0, nothing
        with padded.sampled_params():
            padded.zero_grad()
            padded.likelihood(padded.model(x, VALID), y, VALID).backward()
        padded.step()
    assert_same(padded, apart)


def test_labelled_nodes_are_the_examples_and_num_data_counts_them():
    """Of a graph's nodes only some have labels; without edges they alone are the batch."""
    optimizer = make(Net(), num_data=5)
    x, y = BATCHES[0]
    labelled = torch.tensor([True, False, True, False, True, False, False, True])
    for _ in range(3):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            targets = torch.where(labelled.unsqueeze(1), y, torch.nan)
            optimizer.likelihood(optimizer.model(x), targets, labelled).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net(), num_data=5), [(x[labelled], y[labelled])] * 3))


def test_a_batch_without_any_label_moves_the_mean_towards_the_prior_and_measures_nothing():
    optimizer = train(make(Net(), statistics_every=1, momentum=0.0), BATCHES[:2])
    statistics = {name: state.statistics for name, state in optimizer.blocks.items()}
    x, y = BATCHES[2]
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y * torch.nan, torch.zeros(EXAMPLES, dtype=torch.bool)).backward()
        assert all(not parameter.grad.any() for parameter in optimizer.model.parameters())
    optimizer.step()
    assert all(state.statistics is statistics[name] for name, state in optimizer.blocks.items())
    # and the next average is the one after a step without a measurement
    twin = train(make(Net(), statistics_every=1, momentum=0.0), BATCHES[:2])
    counts = twin.blocks["head"].statistics.counts["gradient"]
    train(optimizer, BATCHES[3:4])
    now = optimizer.blocks["head"].statistics.counts["gradient"]
    assert now == pytest.approx(counts * 0.99**2 + EXAMPLES * (1 - 0.99**2))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (MASK.double(), "must be boolean"),
        (MASK[:3], "must have the leading dimensions"),
        (MASK.expand(3, EXAMPLES), "must have the leading dimensions"),
        (torch.ones(EXAMPLES, 2, 1, dtype=torch.bool), "must have the leading dimensions"),
    ],
)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_masks_that_do_not_fit_are_named(fisher, mask, match):
    optimizer = make(Net(), fisher=fisher)
    x, y = BATCHES[0]
    with optimizer.sampled_params(), pytest.raises(TargetError, match=match):
        optimizer.likelihood(optimizer.model(x), y, mask)


# Unlabelled examples, selections, tokens as examples


def hand_statistics(model: Net, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and the exact ``G`` of the two layers at the weights of the moment."""
    with torch.no_grad():
        hidden = model.act(model.body(x))
        rows = {name: functional.pad(a, (0, 1), value=1.0) for name, a in {"body": x, "head": hidden}.items()}
        back = ((1 - hidden**2).unsqueeze(1) * model.head.weight) / SIGMA
    identity = torch.eye(2).double() / SIGMA**2
    grams = {"body": torch.einsum("nci,ncj->ij", back, back) / len(x), "head": identity}
    return {name: (a.mT @ a / len(x), grams[name]) for name, a in rows.items()}


def assert_hand_statistics(optimizer: bk.NoisyKFAC, expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (A, G) in expected.items():
        assert_close(optimizer.blocks[name].statistics.mean("input"), A, **SAME)
        assert_close(optimizer.blocks[name].statistics.mean("gradient"), G, **SAME)


def test_unlabelled_examples_enter_the_fisher_and_nothing_else():
    """The Fisher is of both batches together, the gradient of the labelled one; where none is due none is measured."""
    optimizer, expected = make(Net(), statistics_every=100, warmup=False), make(Net())
    x, y = BATCHES[0]
    more = randn(20, 3, seed=5)
    for step in range(4):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            assert optimizer.is_measuring == (step < 3)
            if optimizer.is_measuring:
                optimizer.model(more)
                hand = hand_statistics(optimizer.model, torch.cat([more, x]))
            optimizer.likelihood(optimizer.model(x), y).backward()
            gradients = [parameter.grad.clone() for parameter in optimizer.model.parameters()]
            expected.model.load_state_dict(optimizer.model.state_dict())
            expected.model.zero_grad()
            expected.likelihood(expected.model(x), y).backward()
            for gradient, parameter in zip(gradients, expected.model.parameters(), strict=True):
                assert_close(gradient, parameter.grad, rtol=0, atol=0)
        optimizer.step()
        if step == 0:
            assert_hand_statistics(optimizer, hand)
    assert optimizer.blocks["body"].statistics.counts["input"] == pytest.approx((1 - 0.99**3) * 28)


def test_the_fisher_may_be_of_another_batch_than_the_gradient():
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    other = randn(3, 3, seed=5)
    with optimizer.sampled_params():
        optimizer.model(other)
        with optimizer.unmeasured():
            optimizer.likelihood(optimizer.model(x), y).backward()
        hand = hand_statistics(optimizer.model, other)
    optimizer.step()
    assert_hand_statistics(optimizer, hand)
    with optimizer.sampled_params(), optimizer.unmeasured():
        optimizer.likelihood(optimizer.model(x), y).backward()
    with pytest.raises(UsageError, match="No curvature statistics were measured"):
        optimizer.step()


def test_a_loss_on_a_selection_of_the_examples_leaves_the_fisher_to_all_of_them():
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x)[MASK], y[MASK]).backward()
        hand = hand_statistics(optimizer.model, x)
    optimizer.step()
    assert_hand_statistics(optimizer, hand)


def test_a_loss_on_some_of_the_outputs_is_the_smaller_model():
    """The columns of the output that are in no loss are not in the Fisher either."""
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x)[:, :1], y[:, :1]).backward()
    optimizer.step()
    assert_close(optimizer.blocks["head"].statistics.mean("gradient"), torch.diag(torch.tensor([4.0, 0.0]).double()))


@pytest.mark.parametrize("count", [5, 6, 16])
def test_a_selection_of_tokens_is_refused_with_the_way_round(count):
    """Which example a selected token belongs to cannot be known, whether or not numbers happen to divide."""
    optimizer = make(Net())
    x, y = randn(8, 4, 3, seed=0), randn(8, 4, 2, seed=1)
    chosen = (torch.arange(32) < count).reshape(8, 4)
    way_round = "a mask to the likelihood rather than a selection"
    with optimizer.sampled_params(), pytest.raises(UnsupportedModelError, match=way_round):
        optimizer.likelihood(optimizer.model(x)[chosen], y[chosen])


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tokens_as_examples_are_a_batch_of_tokens(fisher):
    """Without interaction of positions: mean, counts, ``A`` and ``G`` of the flattened data set."""
    sequences = [(randn(2, 4, 3, seed=i), randn(2, 4, 2, seed=50 + i)) for i in range(4)]
    optimizer = make(Net(), fisher=fisher)
    for x, y in sequences:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(optimizer.model(x).flatten(0, 1), y.flatten(0, 1)).backward()
        optimizer.step()
    flat = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in sequences]
    assert_same(optimizer, train(make(Net(), fisher=fisher), flat))


def test_tokens_as_examples_have_the_sequences_factors_but_for_the_count():
    """One sequence's ``G`` sums over its tokens, one token's does not: the same sums, over ``T`` times as many."""
    x, y = randn(2, 4, 3, seed=0), randn(2, 4, 2, seed=1)
    statistics = []
    for flat in (False, True):
        optimizer = make(Net(), warmup=False)
        with optimizer.sampled_params():
            output, target = optimizer.model(x), y
            if flat:
                output, target = output.flatten(0, 1), y.flatten(0, 1)
            optimizer.likelihood(output, target).backward()
        optimizer.step()
        statistics.append(optimizer.blocks["body"].statistics)
    sequence, token = statistics
    assert_close(token.mean("input"), sequence.mean("input"), **SAME)
    assert_close(token.mean("gradient"), sequence.mean("gradient") / 4, **SAME)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_tokens_that_see_each_other_share_the_fisher_of_their_sequence(structure):
    """Given the weights tokens are independent, so that the sequence's Fisher is the sum of its tokens'."""
    x, y = randn(2, 3, 3, seed=0), randn(2, 3, 2, seed=1)
    statistics = []
    for flat in (False, True):
        optimizer = bk.NoisyNaturalGradient(
            Sequences(), gaussian(), num_data=N, fisher="exact", structure=structure, warmup=False
        )
        with optimizer.sampled_params():
            output, target = optimizer.model(x), y
            if flat:
                output, target = output.flatten(0, 1), y.flatten(0, 1)
            optimizer.likelihood(output, target).backward()
        optimizer.step()
        statistics.append({name: state.statistics.mean("fisher") for name, state in optimizer.blocks.items()})
    sequence, token = statistics
    assert len(token) == 5
    for name, fisher in token.items():
        assert_close(fisher, sequence[name] / 3, **SAME)


# Exceptions


class StopError(Exception):
    """What goes wrong."""


@pytest.mark.parametrize("place", ["before", "forward", "between", "backward", "after"])
@pytest.mark.parametrize("second", [False, True], ids=["first context", "second context"])
def test_an_exception_leaves_everything_as_it_was(place, second):
    """Wherever it comes, the step is then taken as if the failed context had never been entered."""
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)
    model = optimizer.model

    def stop(*_: Any) -> None:
        raise StopError

    def context(optimizer: bk.NoisyKFAC, batch: Batch, fails: str = "") -> None:
        handle = optimizer.model.head.register_forward_hook(stop) if fails == "forward" else None
        try:
            with optimizer.sampled_params():
                if fails == "before":
                    stop()
                loss = optimizer.likelihood(optimizer.model(batch[0]), batch[1])
                if fails == "backward":
                    loss.grad_fn.next_functions[0][0].register_hook(stop)
                if fails == "between":
                    stop()
                loss.backward()
                if fails == "after":
                    stop()
        finally:
            if handle:
                handle.remove()

    for batch in BATCHES[:2]:
        for each in (optimizer, expected):
            each.zero_grad()
            context(each, batch)
            context(each, batch)
            each.step()
    for each in (optimizer, expected):
        each.zero_grad()
        if second:
            context(each, BATCHES[2])
    before = optimizer.generator.get_state()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    blocks = optimizer.blocks
    with pytest.raises(StopError):
        context(optimizer, BATCHES[3], place)
    optimizer.generator.set_state(before)
    assert optimizer.blocks is blocks
    assert bare_of_hooks(model, optimizer.likelihood)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    for each in (optimizer, expected):
        for _ in range(2 - second):
            context(each, BATCHES[2])
        each.step()
    assert_identical(optimizer, expected)


def test_a_closure_that_raises_leaves_the_next_step_as_it_would_have_been():
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)

    def closure(optimizer: bk.NoisyKFAC, batch: Batch, failures: list[bool]) -> Tensor:
        optimizer.zero_grad()
        loss = optimizer.likelihood(optimizer.model(batch[0]), batch[1])
        loss.backward()
        if failures.pop():
            raise StopError
        return loss

    before = optimizer.generator.get_state()
    with pytest.raises(StopError):
        optimizer.step(partial(closure, optimizer, BATCHES[0], [True, False]))
    optimizer.generator.set_state(before)
    for each in (optimizer, expected):
        for batch in BATCHES:
            each.step(partial(closure, each, batch, [False, False]))
    assert_identical(optimizer, expected)


def test_misuse_inside_the_context_does_not_end_the_step():
    """``step()``, ``posterior()`` and ``kl()`` inside are refused; those outside are then what they would have been."""
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)
    for x, y in BATCHES:
        for _ in range(2):
            with optimizer.sampled_params():
                optimizer.likelihood(optimizer.model(x), y).backward()
                for misuse in (optimizer.step, optimizer.posterior, optimizer.kl):
                    with pytest.raises(UsageError, match=r"inside sampled_params\(\)"):
                        misuse()
            with expected.sampled_params():
                expected.likelihood(expected.model(x), y).backward()
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
    assert_identical(optimizer, expected)
