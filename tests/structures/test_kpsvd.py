"""Nearest Kronecker products against the singular value decomposition of the dense rearranged Fisher. All float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Rows, SparseRows, Statistics
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import BlockSpec, MatrixNormalGaussian, Structure, TwoKroneckerGaussian
from bayes_kfac.structures.kpsvd import KPSVDStructure, TwoProductsStructure
from tests.helpers import TIGHT, dense_kron, randn, random_spd, record, rng, seeded
from tests.posteriors import surveyed
from tests.random_rows import tied_rows, words

OUT, IN = 3, 4
NAMES = ["kpsvd", "kpsvd_deflation", "kpsvd_lanczos", "kfac_corrected"]
TWO = NAMES[1:]


def get(name: str, damping: str = "factored", sharing: str = "expand") -> Structure:
    return structures.get(name, damping=damping, sharing=sharing)


def correlated(
    *blocks: int, out: int = OUT, in_: int = IN, batch: int = 60, shared: int = 1, columns: int = 2, seed: int = 0
) -> Rows:
    """Inputs and gradients that come from the same few causes, and whose sizes go together."""
    causes = randn(*blocks, batch, shared, 3, seed=seed)
    inputs = torch.tanh(causes @ randn(3, in_, seed=seed + 1)) + 0.3 * randn(*blocks, batch, shared, in_, seed=seed + 2)
    gradients = torch.tanh(causes @ randn(columns, *[1] * len(blocks), 1, 3, out, seed=seed + 3))
    gradients = gradients + 0.3 * randn(columns, *blocks, batch, shared, out, seed=seed + 4)
    return Rows(inputs, gradients * torch.linalg.vector_norm(causes, dim=-1, keepdim=True))


@cache
def trained() -> dict[str, Rows]:
    """The rows of a small network that was trained, for each output of its exact Fisher."""
    x = randn(120, 3, seed=0)
    y = torch.stack([torch.sin(2 * x[:, 0]) * x[:, 1], x.sum(-1).tanh()], -1)
    model = seeded(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return {name: rows for name, rows in record(model, x).items() if name != "4"}  # K-FAC is exact for the last


ROWS: dict[str, Callable[[], Rows]] = {
    "one position": lambda: correlated(out=6, in_=7),
    "positions": lambda: correlated(out=5, in_=6, shared=5),
    "blocks": lambda: correlated(2),
    "words": lambda: Rows(words(60, 2, 2, size=IN), randn(2, 60, 2, OUT, seed=1)),
    "tied": lambda: tied_rows(batch=60, size=OUT, width=IN, sparse=False),
    "tied to words": lambda: tied_rows(batch=60, size=OUT, width=IN),
    "a network's first layer": lambda: trained()["0"],
    "a network's second layer": lambda: trained()["2"],
}
#: Passes until nothing moves any more.
MANY = {"kpsvd": 30, "kpsvd_deflation": 100, "kpsvd_lanczos": 25, "kfac_corrected": 40}
CORRELATED = ["one position", "positions", "a network's first layer", "a network's second layer"]
with_rows = pytest.mark.parametrize("rows", ROWS)
with_structures = pytest.mark.parametrize("name", NAMES)


# The dense map


def dense_fisher(rows: Rows) -> Tensor:
    """``E[vec J vec Jᵀ]``, ``[*blocks, out·in, out·in]``."""
    J = rows.jacobians().flatten(-2).movedim(0, -3).flatten(-3, -2)
    return J.mT @ J / rows.num_examples


def rearranged(fisher: Tensor, out: int, in_: int, rows: Rows) -> Tensor:
    """``M`` with ``vec(Jᵀ V J) = M vec V`` on symmetric matrices, diagonal where sparse, ``[*blocks, in², out²]``."""
    M = fisher.unflatten(-1, (out, in_)).unflatten(-3, (out, in_))  # [*blocks, o, i, p, j]
    M = M.movedim((-3, -1), (-4, -3))  # [*blocks, i, j, o, p]
    M = (M + M.transpose(-4, -3)) / 2
    M = (M + M.transpose(-2, -1)) / 2
    other = rows.transposed
    if other is None and isinstance(rows.inputs, SparseRows):
        M = M * torch.eye(in_).double()[:, :, None, None]
    if other is not None and isinstance(other.inputs, SparseRows):
        M = M * torch.eye(out).double()
    return M.flatten(-2).flatten(-3, -2)


def map_of(rows: Rows) -> Tensor:
    return rearranged(dense_fisher(rows), rows.gradients.shape[-1], rows.inputs.shape[-1], rows)


def product(A: Tensor, G: Tensor) -> Tensor:
    """``G ⊗ A`` as a map."""
    A, G = linalg.dense(A), linalg.dense(G)
    return A.flatten(-2).unsqueeze(-1) * G.flatten(-2).unsqueeze(-2)


def approximation(structure: Structure, statistics: Statistics) -> Tensor:
    """What a structure takes the Fisher for, as a map."""
    assert isinstance(structure, structures.KroneckerStructure)
    total = product(*structure.factors(statistics))
    return total + product(*structure.second(statistics)) if isinstance(structure, TwoProductsStructure) else total


def truncated(M: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[..., :rank] * s[..., None, :rank]) @ Vh[..., :rank, :]


def best(name: str, M: Tensor, rows: Rows) -> Tensor:
    """What a structure's approximation converges to."""
    if name != "kfac_corrected":
        return truncated(M, 1 if name == "kpsvd" else 2)
    kfac = get("kron")
    first = product(*kfac.factors(kfac.measure(rows)))
    return first + truncated(M - first, 1)


def after(structure: Structure, rows: Rows, passes: int) -> Statistics:
    statistics = structure.measure(rows)
    for _ in range(passes - 1):
        statistics = structure.measure(rows, structure.reframed(statistics, "layer").frame)
    return statistics


def error(structure: Structure, rows: Rows, passes: int | None = None) -> Tensor:
    """The Frobenius norm of what is left over, relative to the Fisher's."""
    statistics = surveyed(structure, rows) if passes is None else after(structure, rows, passes)
    M = map_of(rows)
    return torch.linalg.matrix_norm(M - approximation(structure, statistics)) / torch.linalg.matrix_norm(M)


# Where the iterations go


@with_rows
@with_structures
def test_they_converge_to_the_singular_value_decomposition(name, rows):
    """The leading pair, the best rank two, and the best correction; of sparse sides on diagonals."""
    rows = ROWS[rows]()
    structure, M = get(name), map_of(rows)
    actual, expected = (
        approximation(structure, after(structure, rows, MANY[name])),
        best(name, M, rows),
    )
    assert_close(actual, expected, rtol=0, atol=1e-6 * float(M.abs().max()))


@pytest.mark.parametrize("rows", CORRELATED)
def test_after_a_fits_passes_they_are_nearly_there(rows):
    rows = ROWS[rows]()
    M = map_of(rows)
    excess = {}
    for name in NAMES:
        least = torch.linalg.matrix_norm(M - best(name, M, rows)) / torch.linalg.matrix_norm(M)
        excess[name] = float(error(get(name), rows) / least) - 1
    assert excess["kpsvd"] < 1e-3
    assert excess["kpsvd_deflation"] < 0.1
    assert excess["kpsvd_lanczos"] < 0.02
    assert excess["kfac_corrected"] < 0.03


@with_rows
def test_the_first_pass_of_kpsvd_shows_the_partial_traces_over_the_trace(rows):
    """TKFAC: ``E[JJᵀ] ⊗ E[JᵀJ] / tr F``."""
    rows = ROWS[rows]()
    structure = get("kpsvd")
    J = rows.jacobians()
    left = torch.einsum("c...noi,c...npi->...op", J, J) / rows.num_examples
    right = torch.einsum("c...noi,c...noj->...ij", J, J) / rows.num_examples
    trace = right.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    A, G = structure.factors(structure.measure(rows))
    left, right = (
        torch.diag_embed(dense.diagonal(dim1=-2, dim2=-1)) if linalg.is_diagonal(factor) else dense
        for dense, factor in ((left, G), (right, A))
    )
    assert_close(product(A, G), product(right, left) / trace, **TIGHT)


@pytest.mark.parametrize("rows", CORRELATED)
def test_the_nearer_the_more_products(rows):
    """KPSVD ≤ TKFAC, two ≤ one, and the correction ≤ K-FAC, with each example's own Jacobian as the measure."""
    rows = ROWS[rows]()
    one, two, lanczos = (error(get(name), rows) for name in NAMES[:3])
    assert one <= error(get("kpsvd"), rows, 1)
    assert one < error(get("kron"), rows)
    assert two < 0.95 * one
    assert lanczos < 0.95 * one
    assert error(get("kpsvd_lanczos"), rows, 8) <= (1 + 1e-6) * two
    assert error(get("kfac_corrected"), rows) < 0.95 * error(get("kron"), rows)


def golub_kahan(M: Tensor, start: Tensor, steps: int) -> Tensor:
    """The best rank two in the Krylov spaces of so many steps of Lanczos bidiagonalisation, fully reorthogonalised."""
    rows = [start / start.norm()]
    columns: list[Tensor] = []
    for _ in range(steps):
        for found, image in ((columns, M @ rows[-1]), (rows, None)):
            new = M.mT @ columns[-1] if image is None else image
            for _ in range(2):
                for old in found:
                    new = new - old * (old @ new)
            found.append(new / new.norm())
    Q, P = torch.stack(columns, -1), torch.stack(rows[:steps], -1)
    return Q @ truncated(Q.mT @ M @ P, 2) @ P.mT


@pytest.mark.parametrize("rows", CORRELATED)
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_passes_are_no_worse_than_as_many_products_of_lanczos(rows, steps):
    """The published algorithm takes two products, one after the other, for each step."""
    rows = ROWS[rows]()
    M = map_of(rows)
    start = torch.eye(rows.gradients.shape[-1]).double().flatten()
    published = torch.linalg.matrix_norm(M - golub_kahan(M, start, steps)) / torch.linalg.matrix_norm(M)
    assert error(get("kpsvd_lanczos"), rows, 2 * steps) <= 1.01 * published


@with_structures
def test_of_independent_sides_all_find_kfac(name):
    """Every input with every gradient: ``F = G ⊗ A``, with nothing for a second product."""
    a, g = randn(8, IN, seed=0), randn(9, OUT, seed=1)
    rows = Rows(a.repeat_interleave(9, 0).unsqueeze(1), g.repeat(8, 1)[None, :, None])
    structure = get(name)
    statistics = surveyed(structure, rows)
    assert_close(approximation(structure, statistics), map_of(rows), **TIGHT)
    if isinstance(structure, TwoProductsStructure):
        assert float(product(*structure.second(statistics)).abs().max()) < 1e-10
        spec = BlockSpec("layer", statistics, 20.0, 0.7)
        (gaussian,), (kfac,) = (
            get(one, "optimal").gaussians([replace(spec, statistics=own)])
            for one, own in ((name, statistics), ("kron", get("kron").measure(rows)))
        )
        assert_close(gaussian.to_dense(), kfac.to_dense(), rtol=1e-7, atol=1e-7)


@with_structures
@pytest.mark.parametrize("shared", [1, 3])
def test_one_example_is_enough(name, shared):
    """Of one position and column the Fisher is one product exactly, and the second zero."""
    rows = correlated(batch=1, shared=shared, columns=1)
    structure = get(name)
    statistics = surveyed(structure, rows)
    assert all(bool(torch.isfinite(value).all()) for value in statistics.sums.values())
    assert bool(torch.isfinite(approximation(structure, statistics)).all())
    if shared == 1:
        assert_close(approximation(structure, statistics), map_of(rows), **TIGHT)


@with_structures
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_blocks_with_one_row_or_column_are_exact(name, shape):
    """The map is then a vector."""
    rows = correlated(out=shape[0], in_=shape[1], shared=3)
    assert_close(approximation(get(name), surveyed(get(name), rows)), map_of(rows), **TIGHT)


def test_the_product_is_positive_and_keeps_what_its_frame_measures():
    """``⟨V ⊗ R, F⟩``, which at the beginning is the trace."""
    rows = correlated(shared=3)
    structure = get("kpsvd")
    for passes in (1, 2, 4):
        statistics = after(structure, rows, passes)
        A, G = structure.factors(statistics)
        assert bool((torch.linalg.eigvalsh(A) > 0).all() and (torch.linalg.eigvalsh(G) > 0).all())
        identity = {"row": torch.eye(OUT).double()[None] / OUT, "column": torch.eye(IN).double()[None] / IN}
        V, R = ((statistics.frame or identity)[side].flatten() for side in ("row", "column"))
        assert_close(R @ product(A, G) @ V, R @ map_of(rows) @ V, **TIGHT)


def test_the_sharing_matters_to_kfacs_factors_alone():
    rows = correlated(shared=3)
    for name in NAMES[:3]:
        expand, reduce = (surveyed(get(name, sharing=sharing), rows) for sharing in ("expand", "reduce"))
        assert_close(approximation(get(name), expand), approximation(get(name), reduce), **TIGHT)
    corrected, kfac = get("kfac_corrected", sharing="reduce"), get("kron", sharing="reduce")
    expected = kfac.factors(kfac.measure(rows))
    for actual, factor in zip(corrected.factors(surveyed(corrected, rows)), expected, strict=True):
        assert_close(actual, factor, **TIGHT)


# Frames


@with_rows
@with_structures
def test_frames_begin_with_a_positive_matrix_of_trace_one_and_go_on_traceless(name, rows):
    structure = get(name)
    frame = surveyed(structure, ROWS[rows]()).frame
    for stack in frame.values():
        trace = linalg.trace(stack)
        assert_close(trace[..., 0], torch.ones_like(trace[..., 0]), **TIGHT)
        assert_close(trace[..., 1:], torch.zeros_like(trace[..., 1:]), **TIGHT)
        assert bool((torch.linalg.eigvalsh(linalg.dense(stack[..., 0, :, :])) > -1e-12).all())
        assert torch.equal(linalg.dense(stack), linalg.dense(stack).mT)


@with_structures
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_identity_measures_the_same_in_every_frame(name, blocks):
    """So that the warm-up may blend it with statistics of any frame."""
    structure = get(name)
    frame = surveyed(structure, correlated(*blocks, shared=2)).frame
    inputs = torch.eye(IN).double()[:, None].expand(*blocks, IN, 1, IN)
    gradients = torch.eye(OUT).double().reshape(OUT, *[1] * len(blocks), 1, 1, OUT).expand(OUT, *blocks, IN, 1, OUT)
    assert_close(
        dense_fisher(Rows(inputs, gradients, examples=1.0))[..., :, :],
        torch.eye(OUT * IN).double().expand(*blocks, -1, -1),
    )
    measured = structure.measure(Rows(inputs, gradients, examples=1.0), frame)
    identity = structure.identity((*blocks, OUT, IN), inputs)
    for side in ("row", "column"):
        assert_close(measured.mean(side), identity.mean(side).expand_as(measured.sums[side]), **TIGHT)


@with_structures
def test_statistics_go_on_in_a_new_frame_as_the_fisher_that_is_known(name):
    """Exactly where a few products are the whole Fisher; else the approximation itself stays about the same."""
    structure = get(name)
    a, g = randn(8, IN, seed=0), randn(9, OUT, seed=1)
    simple = Rows(a.repeat_interleave(9, 0).unsqueeze(1), g.repeat(8, 1)[None, :, None])
    before = structure.measure(simple)
    again = structure.reframed(before, "layer")
    direct = structure.measure(simple, again.frame)
    for side in ("row", "column"):
        assert_close(again.sums[side], direct.sums[side], **TIGHT)
    rows = correlated(shared=2)
    before = surveyed(structure, rows)
    again = structure.reframed(before, "layer")
    old, new = (approximation(structure, statistics) for statistics in (before, again))
    assert torch.linalg.matrix_norm(new - old) < 0.02 * torch.linalg.matrix_norm(old)


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_first_product_stays_positive_in_a_new_frame(name):
    """What is approximated there is not to break a Cholesky factorisation; of few examples, in whatever pass."""
    structure = get(name)
    assert isinstance(structure, KPSVDStructure)
    for seed in range(10):
        rows = correlated(batch=3, shared=2, columns=1, seed=10 * seed)
        for passes in (1, 2, 3):
            again = structure.reframed(after(structure, rows, passes), "layer")
            for factor in structure.factors(again):
                values = torch.linalg.eigvalsh(factor)
                assert float(values[0]) >= -1e-12 * float(values[-1])


@with_structures
def test_nothing_measured_leaves_the_frame_and_what_comes_later_is_found(name):
    """A layer that is dead at first."""
    rows, structure = correlated(), get(name)
    dead = structure.measure(Rows(rows.inputs * 0, rows.gradients * 0))
    renewed = structure.reframed(dead, "layer")
    assert all(bool(torch.isfinite(value).all()) for value in (*renewed.frame.values(), *renewed.sums.values()))
    assert_close(renewed.frame["row"][0], torch.eye(OUT).double() / OUT, **TIGHT)
    statistics = structure.measure(rows, renewed.frame)
    for _ in range(30):
        statistics = structure.measure(rows, structure.reframed(statistics, "layer").frame)
    M = map_of(rows)
    assert_close(approximation(structure, statistics), best(name, M, rows), rtol=0, atol=1e-5 * float(M.abs().max()))


@pytest.mark.parametrize(("name", "excess"), [("kpsvd", 0.02), ("kpsvd_deflation", 0.1), ("kpsvd_lanczos", 0.01)])
@pytest.mark.parametrize("shared", [1, 3])
def test_a_moving_average_follows_the_running_fisher(name, excess, shared):
    """Over batches of a distribution that drifts, renewed every ten: its error exceeds the least one by so much."""
    structure = get(name)
    whole = correlated(out=5, in_=6, batch=600, shared=shared)
    statistics: Statistics | None = None
    M, found = torch.zeros(36, 25).double(), []
    for step in range(150):
        index = torch.randint(600, (20,), generator=rng(step))
        drift = 1 + 0.5 * torch.sin(torch.tensor(step / 50)) * torch.linspace(-1, 1, 6).double()
        rows = Rows(whole.inputs[index] * drift, whole.gradients[:, index])
        M = 0.95 * M + 0.05 * map_of(rows)
        if statistics is None:
            statistics = structure.measure(rows) * 0.05
        else:
            statistics = statistics.moving_average(structure.measure(rows, statistics.frame), 0.95)
        if step % 10 == 0:
            statistics = structure.reframed(statistics, "layer")
        if step >= 110 and step % 10 == 9:
            target = M / statistics.counts["row"] * 20
            error = torch.linalg.matrix_norm(approximation(structure, statistics) - target)
            found.append(
                float(error / torch.linalg.matrix_norm(target - truncated(target, 1 if name == "kpsvd" else 2)))
            )
    assert max(found) < 1 + excess


# The Gaussians


@pytest.mark.parametrize("damping", ["factored", "optimal"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", TWO)
def test_the_precision_is_the_damped_first_product_and_the_second(name, rows, damping):
    """``P = P₁ + N G₂ ⊗ A₂``, with ``P₁`` that of K-FAC for the first factors, where nothing is clamped."""
    rows = ROWS[rows]()
    structure, kron = get(name, damping), get("kron", damping)
    statistics = surveyed(structure, rows)
    spec = BlockSpec("layer", statistics, 20.0, 30.0)
    (gaussian,) = structure.gaussians([spec])
    A, G = structure.factors(statistics)
    kfac = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    (first,) = kron.gaussians([replace(spec, statistics=kfac)])
    A, G = (linalg.dense(factor).contiguous() for factor in structure.second(statistics))
    P = first.to_dense() + 20.0 * dense_kron(G, A)
    assert isinstance(gaussian, TwoKroneckerGaussian)
    clamped = gaussian.num_clamped > 0
    assert_close(gaussian.to_dense()[~clamped], P[~clamped], **TIGHT)
    assert bool((torch.linalg.eigvalsh(gaussian.to_dense()) > 0).all())


def kl_divergence(q: Tensor, p: Tensor) -> float:
    """``KL(q ‖ p)`` of two zero-mean Gaussians of these precisions, in nats for each weight."""
    trace = torch.trace(torch.linalg.solve(q, p))
    return 0.5 * float(trace - len(p) + torch.logdet(q) - torch.logdet(p)) / len(p)


@pytest.mark.parametrize("name", NAMES)
def test_posteriors_are_as_near_to_the_exact_ones_as_kfacs(name):
    """Also where two products are indefinite and the prior is weak; without the floor it was in the hundreds."""
    divergences: dict[str, list[float]] = {name: [], "kron": []}
    for rows in (ROWS[each]() for each in CORRELATED):
        for prior in (0.1, 10.0):
            exact = 200.0 * dense_fisher(rows)
            exact += prior * torch.eye(len(exact)).double()
            for one, found in divergences.items():
                structure = get(one, "optimal")
                (gaussian,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), 200.0, prior)])
                found.append(kl_divergence(gaussian.to_dense(), exact))
    mean = {one: sum(found) / len(found) for one, found in divergences.items()}
    assert max(divergences[name]) < 1
    assert mean[name] < 1.5 * mean["kron"]


@pytest.mark.parametrize("name", TWO)
def test_exact_damping_is_optimal_where_there_is_no_closed_form(name):
    structure = get(name, "exact")
    assert structure.damping == "optimal"
    assert structure.label == f"{name}/optimal"


@pytest.mark.parametrize("damping", structures.DAMPING_KINDS)
def test_one_product_is_damped_as_kfac_is(damping):
    rows, structure = correlated(), get("kpsvd", damping)
    statistics = surveyed(structure, rows)
    A, G = structure.factors(statistics)
    spec = BlockSpec("layer", statistics, 20.0, 0.7)
    kfac = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    (gaussian,), (expected,) = (
        structure.gaussians([spec]),
        get("kron", damping).gaussians([replace(spec, statistics=kfac)]),
    )
    assert type(gaussian) is type(expected)
    assert_close(gaussian.to_dense(), expected.to_dense(), **TIGHT)


@pytest.mark.parametrize("name", TWO)
def test_a_refresh_starts_from_the_last_one(name):
    """A few sweeps from the previous Gaussian's first product come to where many from scratch do."""
    structure = get(name, "optimal")
    spec = BlockSpec("layer", surveyed(structure, correlated()), 20.0, 0.7)
    (cold,) = structure.gaussians([spec])
    (warm,) = structure.gaussians([replace(spec, previous=cold)])
    assert_close(warm.to_dense(), cold.to_dense(), rtol=1e-5, atol=1e-5)
    (elsewhere,) = structure.gaussians([replace(spec, data_scale=5.0)])
    (near,) = structure.gaussians([replace(spec, previous=elsewhere)])
    assert not torch.equal(near.to_dense(), cold.to_dense())


@with_structures
@pytest.mark.parametrize("damping", ["factored", "optimal"])
def test_kronecker_priors_are_taken_and_others_refused(name, damping):
    """Those of K-FAC: a posterior of an earlier task, and precisions of columns; by each structure's own name."""
    structure = get(name, damping)
    statistics = surveyed(structure, correlated())
    prior = MatrixNormalGaussian(
        torch.linalg.cholesky(random_spd(OUT, seed=0)), torch.linalg.cholesky(random_spd(IN, seed=1))
    )
    spec = BlockSpec("encoder.3", statistics, 1e-12, prior)
    (gaussian,) = structure.gaussians([spec])
    assert_close(gaussian.to_dense(), prior.to_dense(), rtol=1e-4, atol=1e-4)
    by_column = torch.linspace(0.5, 2, IN).double()
    (gaussian,) = structure.gaussians([replace(spec, prior=by_column)])
    assert_close(gaussian.to_dense(), torch.diag(by_column.repeat(OUT)), rtol=1e-4, atol=1e-4)
    (earlier,) = get("dense").gaussians([BlockSpec("l", get("dense").measure(correlated()), 20.0, 0.7)])
    for refused in (earlier, torch.rand(OUT, IN).double() + 0.5):
        for attempt in (structure.gaussians, lambda specs: structure.spectrum(*specs)):
            with pytest.raises(ArgumentError, match=rf"'encoder.3' is .*structure='{name}' cannot add exactly"):
                attempt([replace(spec, prior=refused)])


# The evidence


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("prior", ["number", "matrix normal"])
def test_the_information_bounds_that_of_the_two_products(name, prior):
    """Hadamard: the diagonal in any orthonormal basis has no smaller determinant. The prior enters exactly."""
    structure, seen = get(name), 0
    priors = {
        "number": 0.7,
        "matrix normal": MatrixNormalGaussian(
            torch.linalg.cholesky(random_spd(OUT, seed=0)), torch.linalg.cholesky(random_spd(IN, seed=1))
        ),
    }
    P0 = priors[prior].to_dense() if prior == "matrix normal" else 0.7 * torch.eye(OUT * IN).double()
    for seed in range(8):
        statistics = surveyed(structure, correlated(shared=2, seed=10 * seed))
        F = sum(torch.kron(G, A) for A, G in (structure.factors(statistics), structure.second(statistics)))
        if float(torch.linalg.eigvalsh(F)[0]) < 0:
            continue
        seen += 1
        actual = structure.information(BlockSpec("layer", statistics, 1.0, priors[prior]))(torch.tensor(20.0).double())
        expected = torch.logdet(P0 + 20.0 * F) - torch.logdet(P0)
        assert 0 <= float(actual - expected) < 0.1 * float(expected)
    assert seen >= 3


@pytest.mark.parametrize("name", TWO)
def test_directions_that_the_second_product_takes_away_tell_nothing(name, monkeypatch):
    """No logarithm of a negative number: with a second product of less than minus the first, nothing is left."""
    structure = get(name)
    statistics = surveyed(structure, correlated(shared=2))
    A, G = structure.factors(statistics)
    monkeypatch.setattr(structure, "second", lambda _: (A, -2 * G))
    spec = BlockSpec("layer", statistics, 1.0, 0.7)
    assert not bool(structure.spectrum(spec).any())
    (gaussian,) = structure.gaussians([spec])
    assert bool((gaussian.marginal_variance() > 0).all())
    assert gaussian.state["num_clamped"] > 0


@with_structures
def test_the_information_is_differentiable_in_scale_and_prior(name):
    structure = get(name)
    statistics = surveyed(structure, correlated(shared=2))

    def information(scale: Tensor, prior: Tensor) -> Tensor:
        return structure.information(BlockSpec("layer", statistics, 1.0, prior))(scale)

    scale, prior = torch.tensor(20.0).double(), torch.linspace(0.5, 2, IN).double()
    assert torch.autograd.gradcheck(information, (scale.requires_grad_(), prior.requires_grad_()))


# Use


@with_structures
def test_a_laplace_fit_goes_by_the_fisher_of_all_data(name):
    """In several passes over batches, what as many over all rows at once give; and near to the best there is."""
    x = randn(90, 3, seed=0)
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    y = model(x).argmax(-1)
    laplace = bk.Laplace(model, bk.likelihoods.Categorical(), structure=name, damping="factored")
    laplace.fit(DataLoader(TensorDataset(x, y), batch_size=40), progress=False)
    logits = model(x).detach()
    p = logits.softmax(-1)
    roots = (torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)).movedim(-1, 0)
    rows = record(model, x, roots)["0"]
    structure = get(name)
    fitted = laplace._check_fitted().measurement.statistics["0"]
    expected = surveyed(structure, rows)
    M = map_of(rows)
    scale = float(M.abs().max())
    assert_close(approximation(structure, fitted), approximation(structure, expected), rtol=0, atol=1e-8 * scale)
    assert_close(approximation(structure, fitted), best(name, M, rows), rtol=0, atol=0.05 * scale)
    assert laplace.passes == structure.passes > 1
    more = DataLoader(TensorDataset(x[:30], y[:30]), batch_size=30)
    laplace.update(more, progress=False)
    assert laplace._check_fitted().measurement.num_examples == 120


def test_a_posteriors_count_of_clamped_directions_is_in_its_summary_and_file(tmp_path):
    x = randn(60, 3, seed=0)
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.1), structure="kpsvd_lanczos", prior_precision=1e-3)
    laplace.fit([(x, model(x).detach())], progress=False)
    posterior = laplace.posterior()
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", model)
    counts = [{name: int(b.state["num_clamped"]) for name, b in p.blocks.items()} for p in (posterior, again)]
    assert counts[0] == counts[1]
    assert max(counts[0].values()) > 0
    for name, count in counts[0].items():
        size = posterior.blocks[name].precision.numel()
        assert (f"{count} of {size} directions raised" in str(posterior.summary())) == (count > 0)


def test_kpsvd_structures_are_of_one_family():
    for name in NAMES:
        structure = get(name)
        assert isinstance(structure, KPSVDStructure)
        assert structure.passes >= 4
        statistics = structure.measure(correlated())
        assert statistics.sums["row"].shape == (structure.basis, OUT, OUT)
        assert statistics.sums["column"].shape == (structure.basis, IN, IN)
