"""Priors of every form: each structure adds their precision exactly, or says that it cannot; and the spectrum of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Rows, Statistics
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import (
    BlockGaussian,
    BlockSpec,
    DenseGaussian,
    DiagonalGaussian,
    KroneckerEigenGaussian,
    LowRankGaussian,
    MatrixNormalGaussian,
    Prior,
    Structure,
    UnitWiseGaussian,
)
from tests.helpers import dense_kron, randn, random_spd
from tests.posteriors import FAMILIES
from tests.random_rows import dense_rows, tied_rows, words

OUT, IN, SCALE = 3, 4, 20.0
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def get(name: str, damping: str) -> Structure:
    return structures.get(name, damping=damping, sharing="expand")


@pytest.fixture(params=FAMILIES, ids="-".join)
def structure(request: pytest.FixtureRequest) -> Structure:
    return get(*request.param)


def positive(*shape: int, seed: int = 3) -> Tensor:
    return 0.2 + randn(*shape, seed=seed).square()


def cholesky(*shape: int, seed: int) -> Tensor:
    return torch.linalg.cholesky(random_spd(*shape, seed=seed))


#: Each prior of a block ``(*blocks, out, in)``; what it is in a dense form follows from its kind.
PRIORS: dict[str, Callable[[tuple[int, ...]], Prior]] = {
    "number": lambda blocks: 0.7,
    "tensor": lambda blocks: torch.tensor(0.7, dtype=torch.float64),
    "columns": lambda blocks: positive(IN),
    "columns of a block": lambda blocks: positive(*blocks, 1, IN),
    "blocks": lambda blocks: positive(*blocks, 1, 1),
    "equal rows": lambda blocks: positive(1, IN).expand(*blocks, OUT, IN),
    "rows": lambda blocks: positive(OUT, 1),
    "weights": lambda blocks: positive(*blocks, OUT, IN),
    "matrix normal": lambda blocks: MatrixNormalGaussian(cholesky(*blocks, OUT, seed=4), cholesky(*blocks, IN, seed=5)),
    "matrix normal, a diagonal row": lambda blocks: MatrixNormalGaussian(
        positive(*blocks, 1, OUT), cholesky(*blocks, IN, seed=5)
    ),
    "matrix normal, a diagonal column": lambda blocks: MatrixNormalGaussian(
        cholesky(*blocks, OUT, seed=4), positive(*blocks, 1, IN)
    ),
    "dense": lambda blocks: DenseGaussian(cholesky(*blocks, OUT * IN, seed=6).unflatten(-2, (OUT, IN))),
    "diagonal": lambda blocks: DiagonalGaussian(positive(*blocks, OUT, IN)),
    "unit-wise": lambda blocks: UnitWiseGaussian(cholesky(*blocks, OUT, IN, seed=6)),
    "eigen": lambda blocks: KroneckerEigenGaussian(
        randn(*blocks, OUT, OUT, seed=7), randn(*blocks, IN, IN, seed=8), positive(*blocks, OUT, IN)
    ),
    "low rank": lambda blocks: LowRankGaussian.of(
        [randn(*blocks, 2, OUT, IN, seed=9)], [positive(*blocks, OUT, IN)], ["prior"]
    )[0],
}
BY_COLUMN = {"number", "tensor", "columns", "columns of a block", "blocks", "equal rows"}
ALLOWED = {
    "kron": BY_COLUMN | {name for name in PRIORS if name.startswith("matrix normal")},
    "diagonal": BY_COLUMN | {"rows", "weights", "diagonal"},
    "dense": set(PRIORS),
    "unit_wise": BY_COLUMN | {"rows", "weights", "diagonal", "unit-wise"},
    "sketchy": BY_COLUMN,
    "smw": BY_COLUMN | {"rows", "weights", "diagonal", "low rank"},
}
ROWS: dict[str, Callable[[], Rows]] = {
    "plain": lambda: dense_rows(2, (), 10, 2, in_=IN, out=OUT),
    "stacked": lambda: dense_rows(2, (2,), 10, 2, in_=IN, out=OUT),
    "words": lambda: Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1)),
    "tied to words": lambda: tied_rows(batch=10, size=OUT, width=IN),
}


#: Every structure with every damping and every prior that it takes, and those that it does not.
TAKEN = [(*names, prior) for names in FAMILIES for prior in PRIORS if prior in ALLOWED[names[0]]]
REFUSED = [(*names, prior) for names in FAMILIES for prior in PRIORS if prior not in ALLOWED[names[0]]]
#: Those that have the eigenvalues at hand.
SPECTRAL = {"dense", "diagonal", "kron"}
EXACT = [case for case in TAKEN if case[1] == "exact"]
with_cases = pytest.mark.parametrize(("name", "damping", "prior"), TAKEN)


def blocks_of(rows: Rows) -> tuple[int, ...]:
    return rows.gradients.shape[1:-3]


def dense_prior(prior: Prior, blocks: tuple[int, ...]) -> Tensor:
    """Its precision, ``[*blocks, out·in, out·in]``."""
    if isinstance(prior, BlockGaussian):
        return prior.to_dense()
    each = torch.as_tensor(prior, dtype=torch.float64).expand(*blocks, OUT, IN)
    return torch.diag_embed(each.flatten(-2))


def dense_fisher(structure: Structure, statistics: Statistics) -> Tensor:
    """One example's Fisher as the structure takes it, ``[*blocks, out·in, out·in]``."""
    if structure.name == "smw":
        return statistics.mean_columns("fisher").to_dense()
    if structure.name == "dense":
        return statistics.mean("fisher").flatten(-3, -2)
    if structure.name == "unit_wise":
        fisher = statistics.mean("fisher")
        each = [torch.block_diag(*units) for units in fisher.reshape(-1, *fisher.shape[-3:])]
        return torch.stack(each).reshape(*fisher.shape[:-3], *each[0].shape)
    if structure.name == "diagonal":
        return torch.diag_embed(statistics.mean("fisher").flatten(-2))
    A, G = (factor(statistics, name) for name in ("input", "gradient"))
    product = dense_kron(G, A)
    if "transposed_input" not in statistics.counts:
        return product
    H, B = (factor(statistics, f"transposed_{name}") for name in ("input", "gradient"))
    whole = (product + dense_kron(H, B)).reshape(OUT, IN, OUT, IN)
    left, right = torch.einsum("aibi->ab", whole), torch.einsum("aiaj->ij", whole)
    return torch.kron(left, right) / torch.trace(right)


def factor(statistics: Statistics, name: str) -> Tensor:
    """The average of one factor, written out."""
    if name in statistics.columns:
        return statistics.mean_columns(name).to_dense()
    return linalg.dense(statistics.mean(name))


def build(structure: Structure, rows: str, name: str, **changes: object) -> tuple[BlockSpec, BlockGaussian]:
    measured = ROWS[rows]()
    spec = BlockSpec("layer", structure.measure(measured), SCALE, PRIORS[name](blocks_of(measured)))
    spec = replace(spec, **changes)
    (gaussian,) = structure.gaussians([spec])
    return spec, gaussian


def whitened_by(spec: BlockSpec, prior: Prior, blocks: tuple[int, ...]) -> tuple[BlockSpec, Tensor]:
    """The block with its factors in white coordinates, written out, and the map from there, ``[*blocks, s, s]``."""
    if isinstance(prior, MatrixNormalGaussian):
        row, column = linalg.dense(prior.scale_tril_row), linalg.dense(prior.scale_tril_column)
    else:
        each = torch.as_tensor(prior, dtype=torch.float64).expand(*blocks, OUT, IN)
        row, column = torch.eye(OUT).double().expand(*blocks, OUT, OUT), torch.diag_embed(each[..., 0, :].rsqrt())
    sums = {}
    for name, root in (("input", column), ("gradient", row)):
        sums[name] = root.mT @ linalg.dense(spec.statistics.sums[name]) @ root
    statistics = Statistics(sums, spec.statistics.counts)
    return replace(spec, statistics=statistics, prior=1.0), dense_kron(row.contiguous(), column.contiguous())


# What is built


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "damping", "prior"), EXACT)
def test_the_priors_precision_is_added_exactly(name, damping, prior, rows):
    """``P = data_scale · F̄ + P₀``, but for the two matrix normals of K-FAC."""
    structure = get(name, damping)
    spec, gaussian = build(structure, rows, prior)
    expected = SCALE * dense_fisher(structure, spec.statistics) + dense_prior(spec.prior, gaussian.shape[:-2])
    assert_close(gaussian.to_dense(), expected, **CLOSE)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(expected).logabsdet, **CLOSE)
    noise = torch.eye(OUT * IN).double().reshape(-1, *[1] * len(gaussian.shape[:-2]), OUT, IN)
    B = gaussian.sample(noise.expand(-1, *gaussian.shape)).flatten(-2).movedim(0, -1)
    assert_close(B @ B.mT, torch.linalg.inv(expected), **CLOSE)
    assert_close(gaussian.marginal_variance().flatten(-2), (B @ B.mT).diagonal(dim1=-2, dim2=-1), **CLOSE)


@pytest.mark.parametrize("damping", ["factored", "optimal"])
@pytest.mark.parametrize("rows", ["plain", "stacked", "words"])
@pytest.mark.parametrize("prior", sorted(ALLOWED["kron"]))
def test_a_matrix_normal_is_that_of_white_coordinates_brought_back(damping, rows, prior):
    """What a prior of ``I`` gives there; a second refresh starts warm from the first, in coordinates of its own."""
    structure = get("kron", damping)
    spec, gaussian = build(structure, rows, prior)
    blocks = gaussian.shape[:-2]
    white_spec, back = whitened_by(spec, spec.prior, blocks)
    (white,) = structure.gaussians([white_spec])
    inverse = torch.linalg.inv(back)
    expected = inverse.mT @ white.to_dense() @ inverse
    tolerance = CLOSE if damping == "factored" else {"rtol": 1e-5, "atol": 1e-5}
    assert isinstance(gaussian, MatrixNormalGaussian)
    assert_close(gaussian.to_dense(), expected, **tolerance)
    warm = gaussian
    for _ in range(10):
        (warm,) = structure.gaussians([replace(spec, previous=warm)])
    assert_close(warm.to_dense(), expected, **tolerance)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("prior", sorted(ALLOWED["kron"]))
def test_the_optimal_matrix_normal_spends_its_variance_exactly(rows, prior):
    """``tr(P Σ) = out · in`` for the exact ``P`` with this prior, as at the optimum of ``KL(q ‖ p)``."""
    optimal = get("kron", "optimal")
    spec, gaussian = build(optimal, rows, prior)
    P = SCALE * dense_fisher(optimal, spec.statistics) + dense_prior(spec.prior, gaussian.shape[:-2])
    trace = (P @ torch.linalg.inv(gaussian.to_dense())).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(trace, torch.full_like(trace, OUT * IN), **CLOSE)


@pytest.mark.parametrize("rows", ROWS)
@with_cases
def test_without_data_the_gaussian_is_the_prior(name, damping, prior, rows):
    structure = get(name, damping)
    spec, gaussian = build(structure, rows, prior, data_scale=1e-20)
    expected = dense_prior(spec.prior, gaussian.shape[:-2])
    assert_close(gaussian.to_dense(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rows", ROWS)
@with_cases
def test_a_prior_is_not_changed_by_what_is_built_on_it(name, damping, prior, rows):
    structure = get(name, damping)
    blocks = blocks_of(ROWS[rows]())
    made = PRIORS[prior](blocks)
    before = dense_prior(made, blocks).clone()
    _, gaussian = build(structure, rows, prior, prior=made)
    spec = BlockSpec("layer", structure.measure(ROWS[rows]()), SCALE, made)
    structure.gaussians([replace(spec, previous=gaussian)])
    structure.information(spec)(torch.tensor(SCALE, dtype=torch.float64))
    assert torch.equal(dense_prior(made, blocks), before)


@pytest.mark.parametrize(("name", "damping", "prior"), REFUSED)
def test_a_prior_that_cannot_be_added_exactly_is_refused(name, damping, prior):
    """By the layer's name, with what it is, and what could be; by the Gaussian and by its information alike."""
    structure = get(name, damping)
    spec = BlockSpec("encoder.3", structure.measure(ROWS["plain"]()), SCALE, PRIORS[prior](()))
    gaussian = isinstance(spec.prior, BlockGaussian)
    what = f"a {spec.prior.kind} Gaussian" if gaussian else "precisions of single weights"
    remedy = {
        (
            "kron",
            True,
        ): r"a posterior with damping='factored' or 'optimal', or Posterior\.nearest_matrix_normal\(\) of it",
        ("kron", False): "one precision for each column of a block, or structure='diagonal'",
        ("diagonal", True): "precisions, or a posterior of structure='diagonal'",
        ("unit_wise", True): "precisions, or a posterior of structure='unit_wise' or 'diagonal'",
        ("sketchy", True): "one precision for each column of a block",
        ("sketchy", False): "one precision for each column of a block, or structure='diagonal'",
        ("smw", True): "precisions, or a posterior of structure='diagonal' or of a low-rank structure",
    }[name, gaussian]
    message = f"layer 'encoder.3' is {what}, which structure='{name}' cannot add exactly. Allowed: {remedy}"
    for attempt in (lambda: structure.gaussians([spec]), lambda: structure.information(spec)):
        with pytest.raises(ArgumentError, match=message):
            attempt()


@pytest.mark.parametrize("prior", sorted(BY_COLUMN | {"weights"}))
def test_kl_with_precisions_of_single_weights(structure, prior):
    """The divergence from a prior of any precisions, by torch's dense Gaussians."""
    _, gaussian = build(structure, "stacked", "number")
    made, mean = PRIORS[prior]((2,)), randn(2, OUT, IN, seed=9)
    q = torch.distributions.MultivariateNormal(mean.flatten(-2), precision_matrix=gaussian.to_dense())
    p = torch.distributions.MultivariateNormal(torch.zeros_like(q.loc), precision_matrix=dense_prior(made, (2,)))
    assert_close(gaussian.kl(mean, made), torch.distributions.kl_divergence(q, p), **CLOSE)


# The information


@pytest.mark.parametrize("rows", ROWS)
@with_cases
def test_the_information_gives_the_log_determinant_at_every_scale(name, damping, prior, rows):
    """``log det P = log det P₀ + log det(I + data_scale · F̃)``, exactly, whatever ``damping`` says."""
    structure = get(name, damping)
    spec, gaussian = build(structure, rows, prior)
    blocks = gaussian.shape[:-2]
    information = structure.information(spec)
    fisher, prior_precision = dense_fisher(structure, spec.statistics), dense_prior(spec.prior, blocks)
    for scale in (0.1, SCALE, 1000.0):
        expected = torch.linalg.slogdet(scale * fisher + prior_precision).logabsdet
        found = information(torch.tensor(scale, dtype=torch.float64))
        assert_close(torch.linalg.slogdet(prior_precision).logabsdet.sum() + found, expected.sum(), **CLOSE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "damping", "prior"), [case for case in TAKEN if case[0] in SPECTRAL])
def test_a_spectrum_has_an_eigenvalue_for_each_weight(name, damping, prior, rows):
    structure = get(name, damping)
    spec, gaussian = build(structure, rows, prior)
    blocks = gaussian.shape[:-2]
    spectrum = structure.spectrum(spec)
    assert spectrum.shape[: len(blocks)] == blocks
    assert spectrum[(0,) * len(blocks)].numel() == OUT * IN
    assert bool((spectrum >= 0).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(), (IN,), (1, IN)], ids=["one", "columns", "row of columns"])
def test_the_information_is_differentiable_in_the_priors_precisions(structure, rows, shape):
    """For the evidence: its derivatives are finite differences'."""
    statistics = structure.measure(ROWS[rows]())

    def evidence(precision: Tensor) -> Tensor:
        return structure.information(BlockSpec("layer", statistics, SCALE, precision))(
            torch.tensor(SCALE, dtype=torch.float64)
        )

    assert torch.autograd.gradcheck(evidence, positive(*shape).requires_grad_())


@pytest.mark.parametrize("rows", ROWS)
def test_the_information_is_of_the_datas_scale_over_the_priors(structure, rows):
    measured = structure.measure(ROWS[rows]())
    one, ten = (structure.information(BlockSpec("layer", measured, SCALE, prior)) for prior in (0.3, 3.0))
    scale = torch.tensor(SCALE, dtype=torch.float64)
    assert_close(one(scale), ten(10 * scale), **CLOSE)


def test_the_information_of_nothing_is_zero(structure):
    rows = ROWS["stacked"]()
    statistics = structure.measure(Rows(rows.inputs * 0, rows.gradients * 0))
    assert not structure.information(BlockSpec("layer", statistics, SCALE, 0.7))(
        torch.tensor(SCALE, dtype=torch.float64)
    )


def test_a_chain_of_tasks_adds_up():
    """The posterior of one task is the prior of the next: of two tasks alike the data count twice."""
    dense = get("dense", "exact")
    statistics = dense.measure(ROWS["plain"]())
    (first,) = dense.gaussians([BlockSpec("layer", statistics, SCALE, 0.7)])
    (second,) = dense.gaussians([BlockSpec("layer", statistics, SCALE, first)])
    (both,) = dense.gaussians([BlockSpec("layer", statistics, 2 * SCALE, 0.7)])
    assert_close(second.to_dense(), both.to_dense(), **CLOSE)
    diagonal = get("diagonal", "exact")
    measured = diagonal.measure(ROWS["plain"]())
    (first,) = diagonal.gaussians([BlockSpec("layer", measured, SCALE, 0.7)])
    (second,) = diagonal.gaussians([BlockSpec("layer", measured, SCALE, first)])
    assert_close(second.precision, 2 * SCALE * measured.mean("fisher") + 0.7, **CLOSE)


def test_a_prior_in_another_dtype_takes_the_blocks():
    """Of a float64 fit whose prior is written in torch's default, float32."""
    kron = get("kron", "exact")
    (gaussian,) = kron.gaussians([BlockSpec("layer", kron.measure(ROWS["plain"]()), SCALE, torch.tensor(0.5))])
    (expected,) = kron.gaussians([BlockSpec("layer", kron.measure(ROWS["plain"]()), SCALE, 0.5)])
    assert {tensor.dtype for tensor in gaussian.state.values()} == {torch.float64}
    assert_close(gaussian.to_dense(), expected.to_dense(), **CLOSE)
    assert math.isfinite(float(gaussian.logdet()))
