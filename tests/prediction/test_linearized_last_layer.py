"""A posterior over the last layer: its output is the model's, and the trunk below it is only ever run forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.curvature import PullBack
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.structures import Whitened
from bayes_kfac.structures.whitened import WhitenedRows
from tests.helpers import randn, rng, seeded
from tests.posteriors import FAMILIES, random_posterior

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Trunk(nn.Module):
    """A trunk under ``no_grad`` that nothing could be differentiated through: it rounds, sorts and looks up."""

    def __init__(self, head: nn.Module, *, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.table, self.head = nn.Linear(3, 4), nn.Embedding(8, 4), head
        self.last = last

    def hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x).mul(4).round().div(4)
            return hidden.sort(-1).values + self.table(hidden.argmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(self.hidden(x))
        return output if self.last is None else self.last(output)


class Chain(nn.Module):
    """A trunk that could be differentiated through."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def over(model: nn.Module, layer: str, structure: str = "kron", damping: str = "factored") -> Posterior:
    """A posterior over one layer of a model, the others' weights being constants without saying so."""
    whole = random_posterior(model, Gaussian(0.5), structure=structure, damping=damping, rows=None)
    return Posterior(
        model,
        Gaussian(0.5),
        {layer: whole.blocks[layer]},
        prior_precision={layer: 1.3},
        provenance=whole.provenance,
    )


def head_covariance(posterior: Posterior, hidden: Tensor, others: Tensor) -> Tensor:
    """``(I ⊗ h̃) P⁻¹ (I ⊗ h̃')ᵀ``, written out for a linear layer."""
    (block,) = posterior.blocks.values()
    covariance = torch.linalg.inv(block.to_dense())
    rows = [torch.cat([h, torch.ones(len(h), 1).double()], dim=1) for h in (hidden, others)]
    J, K = (torch.einsum("co,ni->ncoi", torch.eye(block.shape[-2]).double(), a).flatten(2) for a in rows)
    return torch.einsum("nci,ij,mdj->nmcd", J, covariance, K)


@pytest.fixture
def backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many edges each backward pass goes to."""
    grad, passes = torch.autograd.grad, []

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(inputs))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return passes


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
def test_it_equals_the_dense_one_without_a_backward_pass(structure, damping, backward_passes):
    """But for the first call's check that nothing is missed, which goes to the layer's own weights and no further."""
    torch.manual_seed(0)
    model = seeded(Trunk(nn.Linear(4, 3)))
    model.first.requires_grad_(False)
    model.table.requires_grad_(False)
    posterior = random_posterior(model, Gaussian(0.5), structure=structure, damping=damping)
    assert set(posterior.blocks) == {"head"}
    x, y = randn(5, 3, seed=1), randn(2, 3, seed=2)
    posterior.predict(y)
    assert len(backward_passes) == 1
    del backward_passes[:]
    joint = head_covariance(posterior, model.hidden(x), model.hidden(x))
    within = joint.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    prediction = posterior.predict(x)
    assert_close(prediction.mean, model(x).detach(), **CLOSE)
    assert_close(prediction.epistemic_covariance, within, **CLOSE)
    diagonal = posterior.predict(x, output_covariance="diagonal").epistemic_variance
    assert_close(diagonal, within.diagonal(dim1=-2, dim2=-1), **CLOSE)
    between = head_covariance(posterior, model.hidden(x), model.hidden(y))
    assert_close(posterior.function_covariance(x, y), between, **CLOSE)
    assert_close(posterior.function_covariance(x), joint, **CLOSE)
    draws = posterior.sample(3, generator=rng(0))
    functions = posterior.function_samples(x, draws=draws)
    assert_close(functions, posterior.predict(x, draws=draws).outputs, **CLOSE)  # affine in these weights as it is
    assert backward_passes == []


def test_the_trunk_is_not_in_the_graph():
    """Its weights require gradients in the model, and have no posterior: they are constants."""
    model = seeded(Chain())
    posterior = over(model, "head")
    seen = []
    model.trunk.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    x = randn(5, 3, seed=1)
    hidden = model.trunk(x).detach()
    del seen[:]
    assert_close(
        posterior.predict(x).epistemic_covariance,
        head_covariance(posterior, hidden, hidden).diagonal(dim1=0, dim2=1).movedim(-1, 0),
        **CLOSE,
    )
    assert seen
    assert not any(seen)


def test_an_activation_after_the_last_layer_is_differentiated(backward_passes):
    """The layer's output is not the model's then: one pass for all columns."""
    model = seeded(Trunk(nn.Linear(4, 3), last=nn.Softplus()))
    model.first.requires_grad_(False)
    model.table.requires_grad_(False)
    posterior = random_posterior(model, Gaussian(0.5))
    x = randn(5, 3, seed=1)
    posterior.predict(x)
    del backward_passes[:]
    hidden = model.hidden(x)
    slope = model.head(hidden).sigmoid().detach()
    joint = head_covariance(posterior, hidden, hidden) * slope[:, None, :, None] * slope[None, :, None, :]
    assert_close(posterior.function_covariance(x), joint, **CLOSE)
    assert backward_passes == [1]


def test_gradients_of_the_last_layer_take_one_examples_memory(monkeypatch):
    """The unit vectors are the same for all examples, and stay so on the way into the structure."""
    seen: list[Whitened] = []
    covariance = WhitenedRows.covariance

    def noted(self: WhitenedRows) -> Tensor:
        seen.append(self)
        return covariance(self)

    monkeypatch.setattr(WhitenedRows, "covariance", noted)
    model = seeded(Chain())
    for damping in ("factored", "exact"):
        over(model, "head", damping=damping).predict(randn(5, 3, seed=1))
        assert seen[-1].gradients.shape == (3, 1, 1, 3)
        assert seen[-1].inputs.shape == (5, 1, 5)


def test_an_edge_that_is_the_outputs_own_has_the_gradients_as_they_are():
    """Beside edges below it, in their order, once or twice."""
    x = randn(4, 3, seed=1).requires_grad_()
    hidden = x.tanh()
    output = hidden * 2
    pulled = PullBack({}, [], output)
    gradients = randn(2, 4, 3, seed=2)
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in (output, hidden, output, x)]
    own, below, again, leaf = pulled._pull_back(edges, gradients)
    assert own is gradients
    assert again is gradients
    assert_close(below, 2 * gradients, **CLOSE)
    assert_close(leaf, 2 * gradients * (1 - x.tanh().square()).detach(), **CLOSE)
    assert pulled._pull_back([x], gradients)[0].shape == (2, 4, 3)


def test_outputs_of_which_one_is_another_layers():
    """An output with several parts from one operation: the number of the output counts, not the operation alone."""
    x = randn(4, 6, seed=1).requires_grad_()
    left, right = (x * 3).split(3, dim=1)
    gradients = randn(2, 4, 3, seed=2)
    edge_left, edge_right = (torch.autograd.graph.get_gradient_edge(tensor) for tensor in (left, right))
    found = PullBack({}, [], left)._pull_back([edge_right, edge_left], gradients)
    assert found[1] is gradients
    assert found[0] is None or not found[0].any()
