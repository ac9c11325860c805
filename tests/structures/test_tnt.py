"""TNT: a tensor normal's factors against explicit Kronecker products, its dampings, and tensors in whole models."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Modes, Rows
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import (
    BlockGaussian,
    BlockSpec,
    DiagonalGaussian,
    TensorNormalGaussian,
    gaussian_from_state,
    whitened,
)
from bayes_kfac.structures.tnt import TensorModesStructure
from tests.fishers import error, exact_fisher, fisher_of
from tests.helpers import TIGHT, assert_same_statistics, randn, random_spd, rng
from tests.posteriors import DAMPING_KINDS
from tests.random_rows import dense_rows

#: Modes of one to four, on one side or both, with their rows.
TENSORS: dict[str, tuple[Modes, Rows]] = {
    "vector": (((5,), ()), dense_rows(2, (), 6, 1, in_=1, out=5)),
    "embedding": (((2, 3), ()), dense_rows(2, (), 6, 1, in_=1, out=6)),
    "cube": (((2, 3, 2), ()), dense_rows(2, (), 6, 1, in_=1, out=12)),
    "convolution": (((3,), (2, 4)), dense_rows(2, (), 6, 3, in_=8, out=3)),
    "groups": (((3,), (2, 4)), dense_rows(2, (2,), 6, 3, in_=8, out=3)),
    "kernels": (((2,), (2, 2, 3)), dense_rows(2, (), 6, 3, in_=12, out=2)),
}
DATA_SCALE, PRIOR = 20.0, 0.7
with_tensors = pytest.mark.parametrize("tensor", TENSORS)
with_dampings = pytest.mark.parametrize("damping", DAMPING_KINDS)


def tnt(modes: Modes, damping: str = "exact") -> TensorModesStructure:
    return TensorModesStructure(modes, damping=damping)


def built(tensor: str, damping: str = "exact", prior: object = PRIOR) -> BlockGaussian:
    modes, rows = TENSORS[tensor]
    structure = tnt(modes, damping)
    (gaussian,) = structure.gaussians([BlockSpec("layer", structure.measure(rows), DATA_SCALE, prior)])
    return gaussian


def moments(modes: Modes, rows: Rows) -> list[Tensor]:
    """``U_i = E[mat_i(J) mat_i(J)ᵀ]``, one mode after the other."""
    J = rows.jacobians().movedim(0, -4).flatten(-4, -3).flatten(-2)
    J = J.unflatten(-1, (*modes[0], *modes[1])).movedim(rows.gradients.ndim - 4, 0)  # the examples first
    examples, first = rows.gradients.shape[-3], rows.gradients.ndim - 4
    found = []
    for mode in range(len(modes[0]) + len(modes[1])):
        matrix = J.movedim(first + 1 + mode, first + 1).flatten(first + 2) if J.ndim > first + 2 else J.unsqueeze(-1)
        found.append((matrix @ matrix.mT).sum(0) / examples)
    return found


def kron(matrices: list[Tensor]) -> Tensor:
    """``torch.kron`` of all modes, of each block."""
    if matrices[0].ndim == 2:
        return reduce(torch.kron, matrices)
    return torch.stack([kron(list(own)) for own in zip(*matrices, strict=True)])


def fisher(modes: Modes, rows: Rows) -> Tensor:
    """``⊗ U_i / (tr F)^(k−1)``."""
    own = moments(modes, rows)
    trace = linalg.trace(own[0])[..., None, None]
    return kron(own) / trace ** (len(own) - 1)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


# The Fisher


@with_tensors
def test_the_fisher_is_the_kronecker_product_of_all_modes(tensor):
    modes, rows = TENSORS[tensor]
    assert_close(fisher_of(tnt(modes), rows), fisher(modes, rows), **TIGHT)


@with_tensors
def test_the_trace_and_all_partial_traces_are_exact(tensor):
    """Of each mode, summed over all others."""
    modes, rows = TENSORS[tensor]
    sizes = (*modes[0], *modes[1])
    found, exact = (
        matrix.unflatten(-1, sizes).unflatten(-1 - len(sizes), sizes)
        for matrix in (fisher_of(tnt(modes), rows), exact_fisher(rows))
    )
    names = "abcdefg"[: len(sizes)]
    for mode, name in enumerate(names):
        other = names[:mode] + "z" + names[mode + 1 :]
        assert_close(*(torch.einsum(f"...{names}{other}->...{name}z", each) for each in (found, exact)), **TIGHT)


def test_of_one_mode_it_is_the_fisher_itself():
    modes, rows = TENSORS["vector"]
    assert_close(fisher_of(tnt(modes), rows), exact_fisher(rows), **TIGHT)


@with_dampings
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_of_two_modes_it_is_tkfac(damping, blocks):
    """In every damping, although the scale of a factor is nothing to it."""
    rows = dense_rows(2, blocks, 6, 2, in_=4, out=3)
    mine, theirs = (
        structure.gaussians([BlockSpec("layer", structure.measure(rows), DATA_SCALE, PRIOR)])[0]
        for structure in (tnt(((3,), (4,)), damping), structures.get("tkfac", damping=damping, sharing="expand"))
    )
    # a flip-flop ends where its own progress does
    close = {"rtol": 1e-5, "atol": 1e-5} if damping == "optimal" else TIGHT
    assert_close(mine.to_dense(), theirs.to_dense(), **close)
    assert_close(mine.logdet(), theirs.logdet(), **close)
    if damping == "factored":
        assert_close(mine.sample(randn(5, *mine.shape, seed=3)), theirs.sample(randn(5, *mine.shape, seed=3)), **TIGHT)


def test_more_modes_keep_less_of_what_is_no_product():
    """From the whole Fisher by TKFAC to a mode for each dimension; data that are products lose nothing."""
    rows = TENSORS["kernels"][1]
    splits: list[Modes] = [((2,), (12,)), ((2,), (4, 3)), ((2,), (2, 2, 3))]
    found = [error(fisher_of(tnt(modes), rows), exact_fisher(rows)) for modes in splits]
    assert found == sorted(found)
    vectors = [randn(1, size, seed=size) for size in (2, 5, 3)]
    product = Rows(torch.kron(vectors[1], vectors[2]).reshape(1, 1, 15), vectors[0].reshape(1, 1, 1, 2))
    assert_close(fisher_of(tnt(((2,), (5, 3))), product), exact_fisher(product), **TIGHT)


# Measuring


@with_tensors
def test_batches_add_up_and_pieces_too(tensor, monkeypatch):
    modes, rows = TENSORS[tensor]
    structure = tnt(modes)
    whole = structure.measure(rows)
    halves = zip(rows.inputs.split([2, 4], -3), rows.gradients.split([2, 4], -3), strict=True)
    first, second = (structure.measure(Rows(*half)) for half in halves)
    assert_same_statistics(first + second, whole)
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    assert_same_statistics(structure.measure(rows), whole)


def test_columns_add_up_by_their_share():
    modes, rows = TENSORS["convolution"]
    parts = [tnt(modes).measure(replace(rows, gradients=rows.gradients[c : c + 1], share=0.5)) for c in range(2)]
    assert_same_statistics(parts[0] + parts[1], tnt(modes).measure(rows))


@with_tensors
def test_the_identity_is_measured_as_itself(tensor):
    """Its names and shapes are those of what is measured, and its Gaussian is isotropic."""
    modes, rows = TENSORS[tensor]
    structure, shape = tnt(modes), rows.jacobians().movedim(-3, 0).shape[2:]
    identity, measured = structure.identity(shape, rows.gradients), structure.measure(rows)
    assert {n: v.shape for n, v in identity.sums.items()} == {n: v.shape for n, v in measured.sums.items()}
    assert identity.counts.keys() == measured.counts.keys()
    whole = fisher_of(structure, identity)
    assert_close(whole, eye(whole.shape[-1]).expand_as(whole), **TIGHT)


@with_tensors
@with_dampings
def test_without_curvature_there_is_the_prior(tensor, damping):
    modes, rows = TENSORS[tensor]
    structure = tnt(modes, damping)
    statistics = structure.measure(Rows(rows.inputs, rows.gradients * 0))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, DATA_SCALE, PRIOR)])
    whole = gaussian.to_dense()
    assert_close(whole, PRIOR * eye(whole.shape[-1]).expand_as(whole), **TIGHT)


# How the prior enters


@with_tensors
def test_exactly_damped_it_is_the_sum(tensor):
    modes, rows = TENSORS[tensor]
    whole = fisher(modes, rows)
    assert_close(built(tensor).to_dense(), DATA_SCALE * whole + PRIOR * eye(whole.shape[-1]), **TIGHT)


@with_tensors
def test_factored_damping_shares_the_prior_equally(tensor):
    """``N ⊗ (m^(1/k) V_i + γ^(1/k) I)`` with ``γ = δ/N``; of one mode there is nothing to share."""
    modes, rows = TENSORS[tensor]
    own = moments(modes, rows)
    order, size = len(own), rows.gradients.shape[-1] * rows.inputs.shape[-1]
    mean = linalg.trace(own[0])[..., None, None] / size
    damped = [mean ** (1 / order) * U * U.shape[-1] / linalg.trace(U)[..., None, None] for U in own]
    share = (PRIOR / DATA_SCALE) ** (1 / order)
    expected = DATA_SCALE * kron([U + share * eye(U.shape[-1]).expand_as(U) for U in damped])
    assert_close(built(tensor, "factored").to_dense(), expected, **TIGHT)
    if order == 1:
        assert_close(built(tensor).to_dense(), expected, **TIGHT)


@with_tensors
def test_the_optimal_tensor_normal_is_stationary_and_nearer_than_the_factored(tensor):
    """In ``KL(q ‖ p)``: each mode's covariance is the best given the others, against any change of it."""
    exact, optimal, factored = (built(tensor, damping) for damping in ("exact", "optimal", "factored"))
    precision = exact.to_dense()
    assert isinstance(optimal, TensorNormalGaussian)

    def divergence(gaussian: BlockGaussian) -> Tensor:
        covariance = torch.linalg.inv(gaussian.to_dense())
        return 0.5 * ((precision * covariance).sum((-2, -1)) + gaussian.logdet()).sum()

    assert divergence(optimal) <= divergence(factored) + 1e-9
    for name, root in optimal.roots.items():
        change = torch.zeros_like(root, requires_grad=True)
        moved = TensorNormalGaussian(**{**optimal.roots, name: root + change})
        (slope,) = torch.autograd.grad(divergence(moved), change)
        assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)


@with_tensors
def test_the_spectrum_is_the_fishers(tensor):
    """Over the prior, and differentiable in it."""
    modes, rows = TENSORS[tensor]
    structure = tnt(modes)
    prior = torch.tensor(PRIOR, dtype=torch.float64, requires_grad=True)
    spec = BlockSpec("layer", structure.measure(rows), DATA_SCALE, prior)
    values = structure.spectrum(spec)
    expected = torch.linalg.eigvalsh(fisher(modes, rows)) / PRIOR
    assert_close(values.detach().sort(-1).values, expected, **TIGHT)
    (slope,) = torch.autograd.grad(structure.information(spec)(torch.tensor(DATA_SCALE).double()), prior)
    found = DATA_SCALE * values.detach()
    assert_close(slope, -(found / (1 + found)).sum() / PRIOR, **TIGHT)


@with_dampings
def test_one_precision_for_each_block(damping):
    modes, rows = TENSORS["groups"]
    prior = torch.tensor([0.5, 2.0], dtype=torch.float64)
    whole = built("groups", damping, prior[:, None, None])
    for block in range(2):
        structure = tnt(modes, damping)
        own = structure.measure(Rows(rows.inputs[block], rows.gradients[:, block]))
        (alone,) = structure.gaussians([BlockSpec("layer", own, DATA_SCALE, prior[block])])
        assert_close(whole.to_dense()[block], alone.to_dense(), rtol=1e-8, atol=1e-8)


@with_tensors
def test_an_earlier_tensor_normal_is_added_exactly(tensor):
    modes, rows = TENSORS[tensor]
    roots = {
        name: torch.linalg.cholesky(random_spd(*rows.gradients.shape[1:-3], size, seed=size))
        for name, size in tnt(modes).sizes.items()
    }
    prior = TensorNormalGaussian(**roots)
    expected = DATA_SCALE * fisher(modes, rows) + prior.to_dense()
    assert_close(built(tensor, prior=prior).to_dense(), expected, **TIGHT)
    spec = BlockSpec("layer", tnt(modes).measure(rows), 1.0, prior)
    total = tnt(modes).information(spec)(torch.tensor(DATA_SCALE).double())
    assert_close(total, torch.logdet(expected).sum() + -prior.logdet().sum(), **TIGHT)


@pytest.mark.parametrize(
    "prior",
    [
        torch.rand(3, 8, generator=rng(0)).double(),
        torch.rand(8, generator=rng(0)).double(),
        DiagonalGaussian(torch.ones(3, 8).double()),
        TensorNormalGaussian(row_0=eye(3), column_0=eye(4), column_1=eye(2)),
    ],
    ids=["weights", "columns", "diagonal", "other modes"],
)
@with_dampings
def test_other_priors_are_refused(prior, damping):
    with pytest.raises(ArgumentError, match=r"structure='tnt' cannot add exactly. Allowed: one precision for a block"):
        built("convolution", damping, prior)


def test_an_exact_posterior_is_no_prior_but_the_nearest_tensor_normal_is():
    exact = built("convolution")
    with pytest.raises(ArgumentError, match=r"a tensor_eigen Gaussian, which structure='tnt' cannot"):
        built("convolution", prior=exact)
    assert_close(exact.as_prior().to_dense(), built("convolution", "optimal").to_dense(), **TIGHT)
    built("convolution", prior=exact.as_prior())


# The Gaussians


@with_tensors
@with_dampings
def test_every_ability_is_that_of_the_dense_precision(tensor, damping):
    gaussian = built(tensor, damping)
    _, rows = TENSORS[tensor]
    P, (out, in_) = gaussian.to_dense(), gaussian.shape[-2:]
    C, value = torch.linalg.inv(P), randn(4, *gaussian.shape, seed=3)
    vec = value.flatten(-2).unsqueeze(-1)
    units = eye(out * in_).reshape(-1, *[1] * (len(gaussian.shape) - 2), out, in_).expand(-1, *gaussian.shape)
    B = gaussian.sample(units).flatten(-2).movedim(0, -1)
    assert_close(B @ B.mT, C, **TIGHT)
    assert_close(gaussian.whiten(units).flatten(-2).movedim(0, -1), B.mT, **TIGHT)
    assert_close(gaussian.multiply(value), (P @ vec).reshape(value.shape), **TIGHT)
    assert_close(gaussian.solve(value), (C @ vec).reshape(value.shape), **TIGHT)
    assert_close(gaussian.logdet(), torch.logdet(P), **TIGHT)
    assert_close(gaussian.marginal_variance(), C.diagonal(dim1=-2, dim2=-1).unflatten(-1, (out, in_)), **TIGHT)
    J = rows.jacobians().flatten(-2)
    expected = torch.einsum("c...ni,...ij,d...nj->...ncd", J, C, J)
    expected = expected.sum(0) if expected.ndim == 4 else expected
    found = gaussian.whitened(rows.inputs, rows.gradients)
    assert_close(found.covariance(), expected, **TIGHT)
    assert_close(found.variance(), expected.diagonal(dim1=-2, dim2=-1), **TIGHT)


@with_tensors
@with_dampings
def test_the_state_is_tensors_in_any_order_and_dtype(tensor, damping):
    gaussian = built(tensor, damping)
    state = dict(sorted(gaussian.state.items(), reverse=True))
    again = gaussian_from_state(gaussian.kind, {name: value.clone() for name, value in state.items()})
    assert torch.equal(again.to_dense(), gaussian.to_dense())
    single = gaussian.to(torch.float32)
    assert single.shape == gaussian.shape
    assert {value.dtype for value in single.state.values()} == {torch.float32}
    assert_close(single.to(torch.float64).to_dense(), gaussian.to_dense(), rtol=1e-4, atol=1e-4)


@with_tensors
def test_powers_of_a_tensor_normal(tensor):
    gaussian = built(tensor, "factored")
    half = gaussian.to_power(0.5).to_dense()
    assert_close(half @ half, gaussian.to_dense(), **TIGHT)


@with_tensors
def test_powers_in_an_orthogonal_basis(tensor):
    """As one precision for a block leaves it; with another prior there is no closed form."""
    half = built(tensor).to_power(0.5).to_dense()
    assert_close(half @ half, built(tensor).to_dense(), **TIGHT)
    blocks = TENSORS[tensor][1].gradients.shape[1:-3]
    roots = {n: randn(*blocks, s, s, seed=s) for n, s in tnt(TENSORS[tensor][0]).sizes.items()}
    with pytest.raises(ArgumentError, match="a tensor_eigen Gaussian has no powers"):
        built(tensor, prior=TensorNormalGaussian(**roots)).to_power(0.5)


@with_tensors
def test_a_tensor_normal_is_a_matrix_normal(tensor):
    """Of its two sides written out; what is diagonal in a basis is none."""
    for damping in ("factored", "optimal"):
        gaussian = built(tensor, damping)
        roots = gaussian.matrix_normal_roots
        assert roots is not None
        assert all(torch.equal(root, root.tril()) for root in roots)
        assert_close(torch.linalg.inv(linalg.kron(*map(linalg.gram, roots))), gaussian.to_dense(), **TIGHT)
    assert built(tensor).matrix_normal_roots is None


def test_many_modes_keep_their_order():
    """Names are counted, not spelled: ``row_10`` comes after ``row_9``."""
    roots = {f"row_{place}": random_spd(1 + place // 10, seed=place) for place in range(11)}
    gaussian = TensorNormalGaussian(**dict(sorted(roots.items())))
    assert list(gaussian.roots) == [f"row_{place}" for place in range(11)]
