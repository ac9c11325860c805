"""Linearised predictions within a memory budget: in parts where a batch can be taken apart, and nowhere else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

from bayes_kfac import Posterior
from bayes_kfac.curvature import COPIES, PullBack
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Gaussian
from tests.helpers import randn, rng, seeded
from tests.posteriors import FAMILIES, dense_function_covariance, dense_mean, random_posterior
from tests.prediction.models import MODELS, WHOLE, posterior_of

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TINY = 1


@contextmanager
def batch_sizes(model: nn.Module) -> Iterator[list[int]]:
    """The first dimension of the first tensor of every call of a model."""
    sizes: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        sizes.append(len(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield sizes
    handle.remove()


def everything(posterior: Posterior, inputs: Any, budget: int | None = None) -> dict[str, Tensor]:
    """All that a linearised model can say."""
    options = {} if budget is None else {"memory_budget": budget}
    draws = posterior.sample(3, generator=rng(0))
    full, diagonal = (posterior.predict(inputs, output_covariance=kind, **options) for kind in ("full", "diagonal"))
    return {
        "mean": full.mean,
        "covariance": full.epistemic_covariance,
        "mean beside variances": diagonal.mean,
        "variance": diagonal.epistemic_variance,
        "joint": posterior.function_covariance(inputs, **options),
        "samples": posterior.function_samples(inputs, draws=draws, **options),
        "outputs": posterior.predict(inputs, "linearized", draws=draws, **options).outputs,
    }


def assert_dense(posterior: Posterior, inputs: Any, found: dict[str, Tensor]) -> None:
    joint, mean = dense_function_covariance(posterior, inputs, inputs), dense_mean(posterior, inputs)
    within = joint.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    assert_close(found["joint"], joint, **CLOSE)
    assert_close(found["covariance"], within, **CLOSE)
    assert_close(found["variance"], within.diagonal(dim1=-2, dim2=-1).reshape(mean.shape), **CLOSE)
    assert_close(found["mean"], mean, **CLOSE)
    assert_close(found["mean beside variances"], mean, **CLOSE)
    assert_close(found["samples"], found["outputs"], **CLOSE)


# In parts


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_budget_gives_what_a_large_one_does(name):
    """Example by example, and variances output by output; and both are the dense ones."""
    posterior, inputs = posterior_of(MODELS[name])
    whole = everything(posterior, inputs)
    with batch_sizes(posterior.model) as sizes:
        parts = everything(posterior, inputs, TINY)
    assert set(sizes) == {1}
    assert_dense(posterior, inputs, whole)
    for key, value in whole.items():
        assert_close(parts[key], value, msg=lambda text, key=key: f"{key}: {text}", **CLOSE)


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
def test_parts_of_every_structure(structure, damping):
    posterior, inputs = posterior_of(MODELS["transformer"], structure=structure, damping=damping)
    parts = everything(posterior, inputs, TINY)
    assert_dense(posterior, inputs, parts)
    for key, value in everything(posterior, inputs).items():
        assert_close(parts[key], value, **CLOSE)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 9])
def test_a_part_is_as_large_as_the_budget_allows(step):
    """The layers' outputs, three times over, for each output's gradient and for the pass itself."""
    posterior, inputs = posterior_of(MODELS["mlp"])
    example = (5 + 4 + 2) * 8
    budget = step * COPIES * example * (2 + 1)
    posterior.predict(inputs)
    for size, expected in ((budget, step), (budget - 1, max(step - 1, 1))):
        with batch_sizes(posterior.model) as sizes:
            posterior.predict(inputs, memory_budget=size)
        assert sizes == [min(expected, 5 - start) for start in range(0, 5, expected)]


def test_a_budget_counts_what_layers_put_out_under_draws():
    """As much again for each draw: many draws of a convolution are more than its gradients."""
    posterior, inputs = posterior_of(MODELS["mlp"])
    draws, example = posterior.sample(20, generator=rng(0)), (5 + 4 + 2) * 8
    posterior.predict(inputs)
    budget = 2 * COPIES * example * (2 + 20 + 1)
    for functions in (posterior.function_samples, partial(posterior.predict, method="linearized")):
        with batch_sizes(posterior.model) as sizes:
            functions(inputs, draws=draws, memory_budget=budget)
        assert sizes == [2, 2, 1]


def test_by_default_a_batch_goes_through_at_once():
    posterior, inputs = posterior_of(MODELS["mlp"])
    everything(posterior, inputs)
    with batch_sizes(posterior.model) as sizes:
        everything(posterior, inputs)
    assert set(sizes) == {5}


def test_sizes_are_measured_once_for_each_kind_of_example():
    """By a pass of one example and one of two; longer sequences are another kind."""
    posterior, _ = posterior_of(MODELS["sequence outputs"])
    with batch_sizes(posterior.model) as sizes:
        for length in (4, 4, 6, 4, 6):
            posterior.predict(randn(5, length, 3, seed=1))
    assert sizes == [1, 2, 5, 5, 1, 2, 5, 5, 5]


def test_a_batch_of_one_says_nothing_of_whether_batches_can_be_taken_apart():
    posterior, x = posterior_of(MODELS["mlp"])
    posterior.predict(x[:1])
    with batch_sizes(posterior.model) as sizes:
        posterior.predict(x, memory_budget=TINY)
    assert sizes == [1, 2, *[1] * 5]


def test_the_covariance_of_inputs_with_themselves_takes_one_pass():
    posterior, x = posterior_of(MODELS["mlp"])
    posterior.predict(x)
    with batch_sizes(posterior.model) as sizes:
        posterior.function_covariance(x)
        posterior.function_covariance(x, x)
        assert sizes == [5, 5]
        posterior.function_covariance(x, x.clone())
    assert sizes == [5] * 4


def test_a_budget_counts_what_a_longer_sequence_takes():
    posterior, _ = posterior_of(MODELS["sequence outputs"])
    example = COPIES * (2 * 4 * 4) * 8 * (4 * 4 + 1)
    with batch_sizes(posterior.model) as sizes:
        posterior.predict(randn(4, 4, 3, seed=1), memory_budget=2 * example)
        del sizes[:]
        posterior.predict(randn(4, 4, 3, seed=1), memory_budget=2 * example)
        assert sizes == [2, 2]
        posterior.predict(randn(4, 8, 3, seed=1), memory_budget=2 * example)
    assert sizes[2:] == [1, 2, 1, 1, 1, 1]


def test_variances_are_computed_for_as_many_outputs_at_a_time_as_fit(monkeypatch):
    """For a thousand classes: first the batch is taken apart, then the outputs of an example."""
    posterior, inputs = posterior_of(MODELS["sequence outputs"])
    whole = posterior.predict(inputs, output_covariance="diagonal").epistemic_variance
    columns, rows = [], PullBack.rows

    def noted(self: PullBack, output_gradients: Tensor, *args: Any) -> Any:
        columns.append(output_gradients.shape[:2])
        return rows(self, output_gradients, *args)

    monkeypatch.setattr(PullBack, "rows", noted)
    example = COPIES * (2 * 4 * 4) * 8
    parts = posterior.predict(inputs, output_covariance="diagonal", memory_budget=example * (5 + 1))
    assert_close(parts.epistemic_variance, whole, **CLOSE)
    assert columns == [(5, 1), (5, 1), (5, 1), (1, 1)] * 5
    del columns[:]
    posterior.predict(inputs, output_covariance="diagonal", memory_budget=example * (16 + 1) * 3)
    assert columns == [(16, 3), (16, 2)]


@pytest.mark.parametrize("name", ["mlp", "cnn", "sequence outputs", "transformer"])
def test_variances_alone_are_the_diagonal_of_the_covariance(name):
    posterior, inputs = posterior_of(MODELS[name], damping="exact")
    full = posterior.predict(inputs)
    for budget in (1 << 30, TINY):
        diagonal = posterior.predict(inputs, output_covariance="diagonal", memory_budget=budget)
        assert_close(diagonal.epistemic_variance, full.epistemic_variance, **CLOSE)
        assert_close(diagonal.variance, full.variance, **CLOSE)
        off = diagonal.covariance - torch.diag_embed(diagonal.covariance.diagonal(dim1=-2, dim2=-1))
        assert not off.any()


def test_joint_covariances_in_parts_of_either_side():
    posterior, inputs = posterior_of(MODELS["cnn"])
    others = randn(7, 2, 4, 4, seed=2)
    expected = dense_function_covariance(posterior, inputs, others)
    for budget in (TINY, COPIES * (4 * 16 + 4 * 16 + 3) * 8 * 4 * 3, 1 << 30):
        assert_close(posterior.function_covariance(inputs, others, memory_budget=budget), expected, **CLOSE)
        flipped = posterior.function_covariance(others, inputs, memory_budget=budget)
        assert_close(flipped, expected.transpose(0, 1).mT, **CLOSE)


def test_parts_are_differentiable():
    posterior, inputs = posterior_of(MODELS["mlp"])
    gradients = []
    for budget in (TINY, 1 << 30):
        x = inputs.clone().requires_grad_()
        prediction = posterior.predict(x, memory_budget=budget)
        joint = posterior.function_covariance(x, memory_budget=budget)
        (prediction.mean.sum() + prediction.covariance.sin().sum() + joint.cos().sum()).backward()
        gradients.append(x.grad)
    assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("budget", [0, -1, 1.5, None, True])
def test_a_budget_is_a_number_of_bytes(budget):
    posterior, inputs = posterior_of(MODELS["mlp"])
    for call in (posterior.predict, posterior.function_covariance):
        with pytest.raises(ArgumentError, match=r"memory_budget=.*integer >= 1"):
            call(inputs, memory_budget=budget)


# And nowhere else


@pytest.mark.parametrize("name", WHOLE)
def test_a_batch_that_is_one_computation_is_not_taken_apart(name):
    """Examples that depend on each other, and arguments of which not all have the batch first."""
    posterior, inputs = posterior_of(WHOLE[name])
    found = everything(posterior, inputs, TINY)
    assert_dense(posterior, inputs, found)
    with batch_sizes(posterior.model) as sizes:
        again = everything(posterior, inputs, TINY)
    first = len(next(iter(tree_leaves(inputs))))
    assert set(sizes) == {first}
    for key, value in found.items():
        assert torch.equal(again[key], value)


@pytest.mark.parametrize("name", [*MODELS, *WHOLE])
def test_a_batch_of_one_is_not_taken_apart(name):
    case = {**MODELS, **WHOLE}[name]
    posterior, inputs = posterior_of(case)
    if name == "graph, a buffer":
        posterior.model.adjacency, posterior.mean["adjacency"] = (torch.ones(1, 1).double(),) * 2
    one = (
        (inputs[0][:2], inputs[1][:1])
        if name == "flat bags"
        else (
            (inputs[0][:1], inputs[1][:1, :1])
            if name == "graph, an argument"
            else tree_map_only(Tensor, lambda leaf: leaf[:1] if leaf.ndim else leaf, inputs)
        )
    )
    assert_dense(posterior, one, everything(posterior, one, TINY))


def test_a_model_that_says_no_to_parts_in_any_way_is_run_as_a_whole():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 5, "compiled for five"
            return self.layer(x).tanh()

    posterior, x = random_posterior(seeded(Fixed()), Gaussian(0.5)), randn(5, 3, seed=1)
    assert_dense(posterior, x, everything(posterior, x, TINY))


# Nothing is kept


class Token:
    """Something whose end can be noticed."""


class Marked(torch.autograd.Function):
    """The identity, whose node in the graph holds a token."""

    tokens: ClassVar[list[weakref.ref[Token]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        token = Token()
        ctx.token = token
        Marked.tokens.append(weakref.ref(token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class WithMark(nn.Module):
    """A model whose graphs can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Marked.apply(self.first(x).tanh()))


def living_graphs() -> int:
    gc.collect()
    return sum(token() is not None for token in Marked.tokens)


@pytest.mark.parametrize("budget", [TINY, 1 << 30])
def test_no_graph_outlives_a_call(budget):
    """Nor an error within it; what was made of inputs that require gradients holds its own."""
    posterior, x = random_posterior(seeded(WithMark()), Gaussian(0.5)), randn(5, 3, seed=1)
    Marked.tokens.clear()
    found = everything(posterior, x, budget)
    assert Marked.tokens
    assert living_graphs() == 0
    assert all(value.grad_fn is None for value in found.values())
    assert not posterior.linearized._recorder.calls
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        posterior.predict(x[:, :2])
    assert living_graphs() == 0
    leaf = x.clone().requires_grad_()
    found = everything(posterior, leaf, budget)
    assert living_graphs() > 0
    del found
    assert living_graphs() == 0
