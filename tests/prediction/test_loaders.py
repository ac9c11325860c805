"""Predictions over a ``DataLoader``, and posteriors that are moved, copied or pickled: they predict what they did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bayes_kfac import Mixture, Posterior
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian
from bayes_kfac.prediction import Draws
from tests.curvature.modules.cases import Model
from tests.helpers import randn, rng, seeded
from tests.posteriors import FAMILIES, random_posterior
from tests.prediction.models import MODELS, posterior_of

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
X, Y = randn(7, 3, seed=1), randn(7, 2, seed=2)


def net() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def keywords() -> nn.Module:
    return seeded(Model(lambda m, words, scale: m.layer(words.tanh()) * scale, layer=nn.Linear(3, 2)))


class Dictionaries(Dataset):
    """Examples as dictionaries of tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class Plain(Dataset):
    """Examples as tensors, without a tuple around them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        return X[index]


SCALE, LABELS, MASK = randn(7, 1, seed=3), torch.tensor([0, 1, 1, 0, 1, 0, 0]), torch.tensor([True] * 6 + [False])
#: Each with the model that takes its batches, and the same inputs as one batch.
LOADERS: dict[str, tuple[Callable[[], nn.Module], Dataset, Any]] = {
    "inputs and targets": (net, TensorDataset(X, Y), X),
    "inputs alone in a list": (net, TensorDataset(X), X),
    "inputs alone": (net, Plain(), X),
    "inputs, targets and masks": (net, TensorDataset(X, Y, MASK), X),
    "dictionaries with labels": (
        keywords,
        Dictionaries(words=X, labels=LABELS, scale=SCALE),
        {"words": X, "scale": SCALE},
    ),
    "dictionaries with targets and masks": (
        keywords,
        Dictionaries(words=X, target=Y, mask=MASK, scale=SCALE),
        {"words": X, "scale": SCALE},
    ),
    "dictionaries without": (keywords, Dictionaries(words=X, scale=SCALE), {"words": X, "scale": SCALE}),
}


class Differences(TorchDispatchMode):
    """Counts differences of at least so many elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.sub.Tensor and result.numel() >= self.size
        return result


@pytest.mark.parametrize("name", LOADERS)
def test_over_a_loader_is_over_the_whole(name):
    """In batches of three, the last of one; whatever stands for the targets is left aside."""
    build, dataset, inputs = LOADERS[name]
    posterior = random_posterior(build(), Gaussian(0.5))
    loader = DataLoader(dataset, batch_size=3)
    whole, found = posterior.predict(inputs), posterior.predict(loader, progress=False)
    assert type(found) is type(whole)
    assert found.source == whole.source
    assert_close(found.mean, whole.mean, **CLOSE)
    assert_close(found.covariance, whole.covariance, **CLOSE)
    assert_close(found.log_prob(Y), whole.log_prob(Y), **CLOSE)
    diagonal = posterior.predict(loader, output_covariance="diagonal", progress=False)
    assert_close(diagonal.variance, whole.variance, **CLOSE)
    draws = posterior.sample(4, generator=rng(0))
    for method in ("linearized", "sampling"):
        whole, found = (posterior.predict(x, method, draws=draws, progress=False) for x in (inputs, loader))
        assert_close(found.outputs, whole.outputs, **CLOSE)
        assert found.source == whole.source


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda likelihood: type(likelihood).__name__)
def test_classes_over_a_loader(likelihood):
    posterior = random_posterior(net(), likelihood)
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=3)
    whole, found = posterior.predict(X, link="probit"), posterior.predict(loader, link="probit", progress=False)
    assert_close(found.probs, whole.probs, **CLOSE)
    sampled = posterior.predict(loader, "sampling", num_samples=5, generator=rng(0), progress=False)
    expected = posterior.predict(X, "sampling", num_samples=5, generator=rng(0))
    assert_close(sampled.probs, expected.probs, **CLOSE)


def test_sampling_over_a_loader_takes_one_set_of_draws():
    """The same functions for every batch: two batches alike have outputs alike."""
    posterior = random_posterior(net(), Gaussian(0.5))
    loader = DataLoader(TensorDataset(torch.cat([X[:3], X[:3]])), batch_size=3)
    outputs = posterior.predict(loader, "sampling", num_samples=5, generator=rng(0), progress=False).outputs
    assert torch.equal(outputs[:, :3], outputs[:, 3:])


def test_draws_are_prepared_once_for_all_batches_of_a_loader():
    """How far all draws of a weight are from the mean is as often computed for many batches as for one."""
    posterior = random_posterior(net(), Gaussian(0.5))
    draws, counts = posterior.sample(100, generator=rng(0)), []
    for size in (7, 1):
        with Differences(100 * 8) as large:
            posterior.predict(DataLoader(TensorDataset(X), size), "linearized", draws=draws, progress=False)
        counts.append(large.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_batches_without_examples_are_skipped_and_alone_refused(method):
    posterior = random_posterior(net(), Gaussian(0.5))
    loader = DataLoader([X[:0], X[:4], X[:0], X[4:]], batch_size=None)
    whole, found = (posterior.predict(x, method, generator=rng(0), progress=False) for x in (X, loader))
    assert_close(found.variance, whole.variance, **CLOSE)
    with pytest.raises(ArgumentError, match="inputs hold no example"):
        posterior.predict(X[:0], method)
    for whose in (posterior, Mixture([posterior])):
        with pytest.raises(ArgumentError, match="inputs=<DataLoader> yielded no example"):
            whose.predict(DataLoader(TensorDataset(X[:0])), method, progress=False)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("inputs", lambda posterior, loader: posterior.output(loader)),
        ("inputs", lambda posterior, loader: posterior.function_samples(loader, 2)),
        ("inputs", lambda posterior, loader: posterior.function_covariance(loader)),
        ("others", lambda posterior, loader: posterior.function_covariance(X, loader)),
    ],
    ids=["output", "function_samples", "function_covariance", "others"],
)
def test_where_a_batch_is_wanted_a_loader_is_refused(name, call):
    with pytest.raises(ArgumentError, match=rf"{name}=<DataLoader> is for predict\(\) alone.*one batch after another"):
        call(random_posterior(net(), Gaussian(0.5)), DataLoader(TensorDataset(X, Y), batch_size=3))


def test_parts_of_a_loaders_batches():
    posterior = random_posterior(net(), Gaussian(0.5))
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    found = posterior.predict(loader, memory_budget=1, progress=False)
    assert_close(found.covariance, posterior.predict(X).covariance, **CLOSE)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_on_stderr_and_only_where_it_is_asked_for(progress, capsys):
    posterior = random_posterior(net(), Gaussian(0.5))
    posterior.predict(DataLoader(TensorDataset(X, Y), batch_size=3), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("predict" in err and "3/3" in err) == progress
    assert progress or err == ""


def test_a_batch_of_tensors_shows_no_progress_bar(capsys):
    random_posterior(net(), Gaussian(0.5)).predict(X, progress=True)
    assert capsys.readouterr() == ("", "")


# Moved, copied, pickled


def through_pickle(posterior: Posterior) -> Posterior:
    return pickle.loads(pickle.dumps(posterior))


def to_and_back(posterior: Posterior) -> Posterior:
    return posterior.to(torch.float32).to(torch.float64)


def results(posterior: Posterior, inputs: Any) -> list[Tensor]:
    draws = posterior.sample(3, generator=rng(0))
    return [
        posterior.predict(inputs).covariance,
        posterior.predict(inputs, output_covariance="diagonal", memory_budget=1).variance,
        posterior.function_covariance(inputs),
        posterior.function_samples(inputs, draws=draws),
        posterior.predict(inputs, draws=draws).outputs,
    ]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "bags", "recurrent"])
def test_a_copy_predicts_the_same_and_stands_on_its_own(name, copied, used):
    """Whether or not it had been used before; the one's model is not the other's."""
    posterior, inputs = posterior_of(MODELS[name])
    if used:
        results(posterior, inputs)
    other = copied(posterior) if name in {"cnn", "bags"} or copied is copy.deepcopy else copy.deepcopy(posterior)
    expected = results(posterior, inputs)
    for found, value in zip(results(other, inputs), expected, strict=True):
        assert torch.equal(found, value)
    assert other.model is not posterior.model
    with torch.no_grad():
        for value in other.mean.values():
            value.zero_()
        for block in other.blocks.values():
            for tensor in block.state.values():
                tensor.mul_(2)
    for found, value in zip(results(posterior, inputs), expected, strict=True):
        assert torch.equal(found, value)
    assert not torch.allclose(results(other, inputs)[0], expected[0])


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
def test_a_pickled_posterior_of_every_structure(structure, damping):
    posterior = random_posterior(net(), Gaussian(0.5), structure=structure, damping=damping)
    for found, value in zip(results(through_pickle(posterior), X), results(posterior, X), strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
def test_a_moved_posterior_predicts_in_its_new_precision(structure, damping):
    """All of it: nothing of the one it was made from, which had been used, is left in its linearised model."""
    posterior = random_posterior(net(), Gaussian(0.5), structure=structure, damping=damping)
    expected = results(posterior, X)
    draws = posterior.sample(3, generator=rng(0))
    single = posterior.to(torch.float32)
    functions = single.function_samples(
        X.float(), draws=Draws({name: value.float() for name, value in draws.values.items()})
    )
    assert functions.dtype == torch.float32
    assert_close(functions.double(), expected[3], rtol=1e-4, atol=1e-4)
    for found, value in zip(
        (
            single.predict(X.float()).covariance,
            single.predict(X.float(), output_covariance="diagonal", memory_budget=1).variance,
            single.function_covariance(X.float()),
        ),
        expected,
        strict=False,
    ):
        assert found.dtype == torch.float32
        assert_close(found.double(), value, rtol=1e-4, atol=1e-5)
    back = to_and_back(posterior)
    assert_close(back.predict(X).covariance, expected[0], rtol=1e-4, atol=1e-5)
    assert back.predict(X).covariance.dtype == torch.float64


def test_the_nearest_matrix_normals_predictions_are_its_own():
    """Blocks, linearised model and provenance are new; the first posterior keeps its own."""
    posterior = random_posterior(net(), Gaussian(0.5), damping="exact")
    before = results(posterior, X)
    nearest = posterior.nearest_matrix_normal()
    assert {block.kind for block in nearest.blocks.values()} == {"matrix_normal"}
    assert nearest.provenance.damping == "optimal"
    optimal = random_posterior(net(), Gaussian(0.5), damping="optimal")
    for found, value in zip(results(nearest, X)[:3], results(optimal, X)[:3], strict=True):
        assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results(nearest, X)[0], before[0], rtol=1e-4, atol=1e-4)
    for found, value in zip(results(posterior, X), before, strict=True):
        assert torch.equal(found, value)
