"""The categorical likelihood against PyTorch, SciPy and full enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayes_kfac.errors import BayesKfacError, TargetError
from bayes_kfac.likelihoods import Categorical

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def data(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return output, torch.randint(shape[-1], shape[:-1], generator=generator)


def test_loss_is_cross_entropy() -> None:
    output, target = data(7, 4)
    assert_close(Categorical()(output, target), functional.cross_entropy(output, target), **TIGHT)


@pytest.mark.parametrize("shape", [(7, 3, 4), (7, 2, 3, 4)])
def test_loss_sums_over_positions(shape: tuple[int, ...]) -> None:
    """The classes are the *last* dimension, and an example's positions are summed: PyTorch's sum over the batch."""
    output, target = data(*shape)
    summed = functional.cross_entropy(output.reshape(-1, 4), target.reshape(-1), reduction="sum")
    assert_close(Categorical()(output, target), summed / 7, **TIGHT)
    log_probs = special.log_softmax(output.numpy(), axis=-1)
    chosen = np.take_along_axis(log_probs, target.numpy()[..., None], -1)[..., 0].reshape(7, -1).sum(1)
    assert_close(Categorical().negative_log_likelihood(output, target), torch.as_tensor(-chosen), **TIGHT)


def test_target_gradient_is_probability_minus_one_hot() -> None:
    output, target = data(7, 3, 4)
    expected = output.softmax(-1) - functional.one_hot(target, 4)
    assert_close(Categorical().target_gradient(output, target), expected, **TIGHT)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 6), scale=st.floats(0.1, 20.0))
def test_fisher_is_the_expectation_over_all_classes(seed: int, classes: int, scale: float) -> None:
    """``Σ_y p(y) g_y g_yᵀ`` by enumeration is ``diag(p) − p pᵀ`` and the root's outer products."""
    output = scale * data(3, classes, seed=seed)[0]
    probs = output.softmax(-1)
    likelihood = Categorical()
    expected = sum(
        probs[:, y, None, None] * torch.einsum("bi,bj->bij", gradient, gradient)
        for y in range(classes)
        for gradient in [likelihood.target_gradient(output, torch.full((3,), y))]
    )
    assert_close(expected, torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :], rtol=1e-9, atol=1e-12)
    columns = likelihood.fisher_root(output)
    assert_close(torch.einsum("cbi,cbj->bij", columns, columns), expected, rtol=1e-9, atol=1e-12)


class Made(TorchDispatchMode):
    """Keeps all results."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.results += tree_leaves(result := function(*args, **(kwargs or {})))
        return result


def test_columns_are_in_memory_once() -> None:
    """They are classes² numbers for each example: for many classes the largest there is in a fit."""
    with Made() as made:
        Categorical().fisher_root(data(4, 20)[0])
    large = {result.untyped_storage().data_ptr() for result in made.results if result.numel() == 4 * 20 * 20}
    assert len(large) == 1


def test_fisher_of_positions_is_block_diagonal() -> None:
    """Positions are independent given the logits: no column reaches over two of them."""
    output, _ = data(2, 3, 4)
    columns = Categorical().fisher_root(output)
    assert columns.shape == (12, 2, 3, 4)
    flat = columns.reshape(12, 2, 12)
    dense = torch.einsum("cbi,cbj->bij", flat, flat)
    for n in range(2):
        blocks = [torch.diag(p) - torch.outer(p, p) for p in output[n].softmax(-1)]
        assert_close(dense[n], torch.block_diag(*blocks), **TIGHT)


def test_sampled_targets_are_classes_at_their_probabilities() -> None:
    """Every sampled gradient is one example's, ``p − e_y`` for one class; classes come as often as they should."""
    output, _ = data(3, 2, 5)
    likelihood, count = Categorical(), 20_000
    samples = likelihood.sample_gradient(output, count, torch.Generator().manual_seed(2))
    one_hot = output.softmax(-1) - samples
    classes = one_hot.argmax(-1)
    assert_close(one_hot, functional.one_hot(classes, 5).double(), rtol=0.0, atol=1e-14)
    assert_close(samples[7], likelihood.target_gradient(output, classes[7]), **TIGHT)
    probs = output.softmax(-1)
    assert ((one_hot.mean(0) - probs).abs() <= 5 * (probs * (1 - probs) / count).sqrt()).all()


def test_sampled_gradients_of_a_certain_class_vanish() -> None:
    output = torch.tensor([[0.0, 1e4, 0.0]], dtype=torch.float64)
    samples = Categorical().sample_gradient(output, 100, torch.Generator().manual_seed(0))
    assert torch.equal(samples, torch.zeros_like(samples))


def test_distribution_is_the_softmax() -> None:
    output, _ = data(7, 3, 4)
    assert_close(
        Categorical().distribution(output).probs, torch.as_tensor(special.softmax(output.numpy(), -1)), **TIGHT
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integers_are_class_indices(dtype: torch.dtype) -> None:
    output, target = data(7, 4)
    assert_close(Categorical()(output, target.to(dtype)), functional.cross_entropy(output, target), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_targets_that_are_no_indices_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TargetError, match=r"class indices.*target\.long\(\)") as caught:
        Categorical()(torch.zeros(4, 3), torch.zeros(4, dtype=dtype))
    assert isinstance(caught.value, BayesKfacError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("output", "target"),
    [((4, 3), (4, 1)), ((4, 3), (3,)), ((4, 3), (4, 3)), ((4, 3, 5), (4,)), ((4, 3, 5), (4, 5)), ((4, 3), ())],
)
def test_targets_of_other_shapes_are_refused(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    """One-hot targets, column vectors, and PyTorch's own class dimension (the second) are all refused."""
    with pytest.raises(TargetError, match="classes along the logits' last dimension"):
        Categorical()(torch.zeros(output), torch.zeros(target, dtype=torch.int64))


def test_logits_without_classes_are_refused() -> None:
    with pytest.raises(TargetError, match="must be logits"):
        Categorical()(torch.zeros(4), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("index", [3, -1, -100])
def test_classes_that_do_not_exist_are_an_error(index: int) -> None:
    """Also -100, which PyTorch would leave out of the loss without a word: that is what masks are for."""
    with pytest.raises(TargetError, match=r"but the logits are of 3. Allowed: 0 to 2, .*Bernoulli.*target != -100"):
        Categorical()(torch.zeros(4, 3), torch.tensor([0, 1, 2, index]))


@pytest.mark.parametrize("target", [np.array([0, 2]), [0, 2], np.array(["a", "b"])])
def test_targets_that_are_no_tensor_are_refused(target: object) -> None:
    with pytest.raises(TargetError, match=r"must be a tensor: torch.as_tensor"):
        Categorical()(torch.zeros(2, 3), target)  # type: ignore[arg-type]
