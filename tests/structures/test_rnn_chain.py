"""K-FAC along a chain of positions: both options against dense sums over pairs, and against simulated chains."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Rows, Statistics
from bayes_kfac.errors import ArgumentError, BayesKfacWarning
from bayes_kfac.structures import (
    BlockGaussian,
    BlockSpec,
    ChainGaussian,
    DenseGaussian,
    KroneckerEigenGaussian,
    MatrixNormalGaussian,
    Structure,
)
from tests.helpers import TIGHT, assert_same_statistics, dense_kron, randn, random_spd, rng
from tests.random_rows import SEEDS, dense_rows, tied_rows, words
from tests.structures.test_chain import contraction

OUT, IN = 3, 4
SCALE, PRIOR = 30.0, 2.0
OPTIONS = ["rnn_chain_1", "rnn_chain_2"]


def get(name: str, sharing: str = "expand", damping: str = "factored") -> Structure:
    return structures.get(name, damping=damping, sharing=sharing)


@pytest.fixture(params=OPTIONS)
def chain(request: pytest.FixtureRequest) -> Structure:
    return get(request.param)


def sqrtm(matrix: Tensor, power: float = 0.5) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT


def statistics_of(length: float, *blocks: int, symmetric: bool = False, norm: float = 0.8, seed: int = 0) -> Statistics:
    """Statistics of ten chains, whose sides are of very different size and correlated at will."""
    sums = {}
    for side, size, scale, factor in (("input", IN, 10 * length * 5.0, 1), ("gradient", OUT, 10 * 0.2, 2)):
        whole = random_spd(*blocks, size, seed=seed + factor)
        lag = contraction(*blocks, size=size, norm=norm, seed=seed + 10 * factor)
        lag = linalg.symmetrize(lag) if symmetric else lag
        sums[side] = scale * whole
        sums[f"lagged_{side}"] = scale * sqrtm(whole) @ lag @ sqrtm(whole)
    counts = dict.fromkeys(("input", "lagged_input"), 10.0 * length) | dict.fromkeys(
        ("gradient", "lagged_gradient"), 10.0
    )
    return Statistics(sums, counts)


def build(structure: Structure, statistics: Statistics, data_scale: float = SCALE, prior=PRIOR) -> BlockGaussian:
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, data_scale, prior)])
    return gaussian


def damped(statistics: Statistics, data_scale: float = SCALE, prior: float = PRIOR) -> tuple[Tensor, Tensor]:
    """``A + π√γ I`` and ``G + √γ/π I`` of one block, written out."""
    A, G = statistics.mean("input"), statistics.mean("gradient")
    root_gamma = math.sqrt(prior / data_scale)
    pi = math.sqrt((torch.trace(A) / len(A)) / (torch.trace(G) / len(G)))
    return A + pi * root_gamma * torch.eye(len(A)).double(), G + root_gamma / pi * torch.eye(len(G)).double()


def correlated(statistics: Statistics, data_scale: float = SCALE, prior: float = PRIOR) -> tuple[Tensor, Tensor]:
    """``V₀``, of all positions together, and ``Ψ = V₁ V₀⁻¹``, from damped factors."""
    A, G = damped(statistics, data_scale, prior)
    V0 = torch.kron(G, A)
    return V0, torch.kron(statistics.mean("lagged_gradient"), statistics.mean("lagged_input")) @ torch.linalg.inv(V0)


def summed(V0: Tensor, Psi: Tensor, length: float) -> Tensor:
    """``Σ_{|d|<T} (1 − |d|/T) Ψᵈ V₀``, one distance at a time."""
    total, lagged, distance = V0, Psi @ V0, 1
    while distance < length:
        total = total + (1 - distance / length) * (lagged + lagged.mT)
        lagged, distance = Psi @ lagged, distance + 1
    return total


def endless(V0: Tensor, Psi: Tensor) -> Tensor:
    """The limit of :func:`summed`."""
    half = torch.linalg.solve(torch.eye(len(V0)).double() - Psi, V0)
    return half + half.mT - V0


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


# The matrices that they stand for


@pytest.mark.parametrize("length", [1.0, 2.0, 5.0, 5.4, 40.0])
def test_option_1_is_the_sum_over_all_pairs_of_positions(length):
    """Exactly, for a finite chain whose correlation is symmetric in the damped coordinates."""
    statistics = statistics_of(length, symmetric=True)
    expected = SCALE * summed(*correlated(statistics), length)
    assert_close(build(get("rnn_chain_1"), statistics).to_dense(), expected, **TIGHT)


def test_option_1_makes_correlation_symmetric():
    statistics = statistics_of(6.0)
    lags = {name: linalg.symmetrize(value) for name, value in statistics.sums.items()}
    symmetric = Statistics(lags, statistics.counts)
    option = get("rnn_chain_1")
    assert_close(build(option, statistics).to_dense(), build(option, symmetric).to_dense(), **TIGHT)


@pytest.mark.parametrize("norm", [0.3, 0.8, 0.99])
def test_option_2_is_the_sum_over_an_endless_chain(norm):
    """With any correlation, symmetric or not."""
    statistics = statistics_of(9.0, norm=norm)
    expected = SCALE * endless(*correlated(statistics))
    assert_close(build(get("rnn_chain_2"), statistics).to_dense(), expected, rtol=1e-8, atol=1e-8)


def test_option_2_is_what_finite_chains_tend_to():
    """The error falls as ``1/T``."""
    statistics = statistics_of(9.0)
    found = build(get("rnn_chain_2"), statistics).to_dense() / SCALE
    errors = [relative_error(found, summed(*correlated(statistics), length)) for length in (10, 100, 1000)]
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.01)


def test_the_options_agree_on_long_symmetric_chains():
    one, two = (build(get(name), statistics_of(1e6, symmetric=True)).to_dense() for name in OPTIONS)
    assert relative_error(one, two) < 1e-5


def test_option_1_solves_and_samples_as_published():
    """``U = L_G [(L_Gᵀ V L_A) ∘ γ(ψ_G ψ_Aᵀ)] L_Aᵀ`` and samples ``L_G [√γ ∘ ε] L_Aᵀ``, in terms of one position."""
    length = 7
    statistics, V = statistics_of(float(length), symmetric=True), randn(OUT, IN, seed=5)
    A, G = damped(statistics)
    sides = []
    for factor, name in ((G / length, "lagged_gradient"), (A, "lagged_input")):
        lag = statistics.mean(name) / (length if name == "lagged_gradient" else 1)
        root = sqrtm(factor, -0.5)
        psi, E = torch.linalg.eigh(linalg.symmetrize(root @ lag @ root))
        sides.append((root @ E, psi))
    (L_G, psi_G), (L_A, psi_A) = sides
    x = torch.outer(psi_G, psi_A)
    gamma = (1 - x) ** 2 / (length * (1 - x**2) - 2 * x * (1 - x**length))
    U = L_G @ ((L_G.mT @ V @ L_A) * gamma) @ L_A.mT
    gaussian = build(get("rnn_chain_1"), statistics)
    assert isinstance(gaussian, KroneckerEigenGaussian)
    assert_close(gaussian.solve(V) * SCALE, U, **TIGHT)
    root = torch.kron(L_G, L_A) * gamma.sqrt().flatten()
    assert_close(root @ root.mT, torch.linalg.inv(gaussian.to_dense()) * SCALE, **TIGHT)


def test_option_2_solves_and_samples_as_published():
    """By the paper's steps, ``Z ↦ Z − P_G Z P_Aᵀ`` and so on, from a singular value decomposition."""
    length = 7.0
    statistics, V = statistics_of(length), randn(OUT, IN, seed=5)
    A, G = damped(statistics)
    sides = []
    for factor, lag in (
        (G / length, statistics.mean("lagged_gradient") / length),
        (A, statistics.mean("lagged_input")),
    ):
        root = sqrtm(factor, -0.5)
        _, sigma, E = torch.linalg.svd(root @ lag @ root)
        sides.append((lag.mT @ torch.linalg.inv(factor), root @ E.mT, sigma.square()))
    (P_G, K_G, mu_G), (P_A, K_A, mu_A) = sides
    D = 1 - torch.outer(mu_G, mu_A)
    Z = K_G @ ((K_G.mT @ (V - P_G @ V @ P_A.mT) @ K_A) / D) @ K_A.mT
    gaussian = build(get("rnn_chain_2"), statistics)
    assert isinstance(gaussian, ChainGaussian)
    assert_close(gaussian.solve(V) * SCALE, (Z - P_G.mT @ Z @ P_A) / length, **TIGHT)
    noise = torch.eye(OUT * IN).double().reshape(-1, OUT, IN)
    drawn = K_G @ (noise / D.sqrt()) @ K_A.mT
    root = ((drawn - P_G.mT @ drawn @ P_A) / length**0.5).flatten(1).mT
    assert_close(root @ root.mT, torch.linalg.inv(gaussian.to_dense()) * SCALE, **TIGHT)


def test_without_correlation_both_are_kron_with_factored_damping(chain):
    """Lags of zero; one position; nothing but the prior."""
    statistics = statistics_of(6.0, 2, norm=0.0)
    expected = build(get("kron"), statistics)
    assert_close(build(chain, statistics).to_dense(), expected.to_dense(), **TIGHT)
    rows = dense_rows(shared=1)
    once = build(chain, chain.measure(rows))
    assert isinstance(once, MatrixNormalGaussian)
    assert torch.equal(once.to_dense(), build(get("kron"), get("kron").measure(rows)).to_dense())


def test_independent_time_is_kron():
    """``F ≈ T (G₀ ⊗ A₀)`` with factors of one position: the paper's third option, under its older name."""
    rows = dense_rows(shared=6, batch=8)
    A0 = torch.einsum("nti,ntj->ij", rows.inputs, rows.inputs) / (8 * 6)
    G0 = torch.einsum("cnto,cntp->op", rows.gradients, rows.gradients) / (8 * 6)
    found = build(get("kron", damping="exact"), get("kron").measure(rows)).to_dense()
    prior = PRIOR * torch.eye(len(found), dtype=torch.float64)
    assert_close(found, SCALE * 6 * torch.kron(G0, A0) + prior, **TIGHT)


@pytest.mark.parametrize("damping", structures.DAMPING_KINDS)
def test_damping_is_factored_whatever_is_asked(damping):
    for name in OPTIONS:
        assert get(name, damping=damping).damping == "factored"


@pytest.mark.parametrize("prior", ["columns", "matrix normal"])
def test_priors_enter_in_the_coordinates_in_which_they_are_white(chain, prior):
    statistics = statistics_of(6.0)
    if prior == "columns":
        given: Tensor | BlockGaussian = 0.2 + randn(IN, seed=3).square()
        row, column = torch.eye(OUT).double(), torch.diag(given.rsqrt())
    else:
        row, column = (torch.linalg.cholesky(random_spd(size, seed=size)) for size in (OUT, IN))
        given = MatrixNormalGaussian(row, column)
    white = {
        name: root.mT @ statistics.sums[name] @ root
        for side, root in (("input", column), ("gradient", row))
        for name in (side, f"lagged_{side}")
    }
    inverse = torch.linalg.inv(dense_kron(row, column))
    expected = inverse.mT @ build(chain, Statistics(white, statistics.counts), prior=1.0).to_dense() @ inverse
    assert_close(build(chain, statistics, prior=given).to_dense(), expected, rtol=1e-9, atol=1e-9)


def test_priors_that_are_no_kronecker_product_are_refused_by_name(chain):
    prior = DenseGaussian(torch.eye(OUT * IN).double().reshape(OUT, IN, OUT * IN))
    spec = BlockSpec("encoder.hh", statistics_of(6.0), SCALE, prior)
    for attempt in (lambda: chain.gaussians([spec]), lambda: chain.information(spec)):
        with pytest.raises(
            ArgumentError, match=f"layer 'encoder.hh' is a dense Gaussian, which structure='{chain.name}'"
        ):
            attempt()


def test_the_prior_rules_where_there_are_few_data(chain):
    """The precision never falls below the prior's on the diagonal, whatever cancels along the chain."""
    statistics = statistics_of(6.0, norm=0.999)
    for scale in (1e-3, 1.0, 1e3):
        variance = build(chain, statistics, data_scale=scale).marginal_variance()
        assert bool((variance <= 1 / PRIOR * (1 + 1e-6)).all())


# Statistics


def lagged_by_hand(rows: Rows) -> dict[str, Tensor]:
    """The sums over neighbours, one pair at a time."""
    *_, batch, shared, in_ = rows.inputs.shape
    sums = {"lagged_input": torch.zeros(in_, in_), "lagged_gradient": torch.zeros(*[rows.gradients.shape[-1]] * 2)}
    sums = {name: value.double() for name, value in sums.items()}
    for n in range(batch):
        for t in range(shared - 1):
            if rows.mask is None or bool(rows.mask[n, t] and rows.mask[n, t + 1]):
                sums["lagged_input"] += torch.outer(rows.inputs[n, t + 1], rows.inputs[n, t])
            for column in rows.gradients:
                sums["lagged_gradient"] += torch.outer(column[n, t + 1], column[n, t])
    return sums


@pytest.mark.parametrize("masked", [False, True])
def test_lagged_statistics_are_sums_over_neighbours(chain, masked):
    """Of each column by itself; masked positions are nobody's neighbours."""
    rows = dense_rows(columns=3, batch=4, shared=5)
    if masked:
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
        rows = replace(rows, mask=mask, examples=3.0)
    statistics = chain.measure(rows)
    for name, value in lagged_by_hand(rows).items():
        assert_close(statistics.sums[name], value, **TIGHT)
    expected = get("kron").measure(rows)
    assert_same_statistics(
        Statistics({n: statistics.sums[n] for n in expected.sums}, {n: statistics.counts[n] for n in expected.counts}),
        expected,
    )
    assert statistics.counts["input"] / statistics.counts["gradient"] == (10 / 3 if masked else 5)


def test_columns_may_come_in_parts(chain):
    rows = dense_rows(columns=4, blocks=(2,), shared=5)
    whole = chain.measure(rows)
    parts = [chain.measure(replace(rows, gradients=part, share=len(part) / 4)) for part in rows.gradients.split([1, 3])]
    assert_same_statistics(parts[0] + parts[1], whole)


def test_padding_changes_nothing(chain):
    """Sequences of unequal length, padded and masked, are those sequences: of any inputs beyond their ends."""
    lengths = [5, 2, 3]
    rows = dense_rows(batch=3, shared=5)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rows = replace(rows, gradients=rows.gradients * mask[..., None], mask=mask, examples=3.0)
    padded = chain.measure(rows)
    alone = [
        chain.measure(Rows(rows.inputs[n : n + 1, :length], rows.gradients[:, n : n + 1, :length]))
        for n, length in enumerate(lengths)
    ]
    assert_same_statistics(padded, alone[0] + alone[1] + alone[2])


@given(seed=SEEDS, length=st.integers(2, 12), batch=st.integers(1, 3))
def test_the_correlations_of_a_chain_are_within_bounds(seed, length, batch):
    """Zeros beyond the ends: ``A₀^(-1/2) A₁ A₀^(-1/2)`` is a contraction, and its symmetric part a stricter one."""
    statistics = get("rnn_chain_1").measure(dense_rows(batch=batch, shared=length, seed=seed % 10**6))
    for side in ("input", "gradient"):
        values, vectors = torch.linalg.eigh(statistics.sums[side])
        kept = values > 1e-9 * values.max()
        root = vectors[:, kept] * values[kept].rsqrt()
        lag = root.mT @ statistics.sums[f"lagged_{side}"] @ root
        assert float(torch.linalg.matrix_norm(lag, 2)) <= 1 + 1e-9
        assert (
            float(torch.linalg.eigvalsh(linalg.symmetrize(lag)).abs().max()) <= math.cos(math.pi / (length + 1)) + 1e-9
        )


def test_a_chain_is_the_same_in_both_directions_and_another_in_disorder(chain):
    rows = dense_rows(batch=20, shared=6)
    smooth = replace(rows, inputs=rows.inputs.cumsum(-2), gradients=rows.gradients.cumsum(-2))

    def precision(order: list[int]) -> Tensor:
        taken = Rows(smooth.inputs[..., order, :], smooth.gradients[..., order, :])
        return build(chain, chain.measure(taken)).to_dense()

    forth = precision([0, 1, 2, 3, 4, 5])
    assert_close(precision([5, 4, 3, 2, 1, 0]), forth, rtol=1e-8, atol=1e-8)
    assert relative_error(precision([3, 0, 5, 2, 4, 1]), forth) > 0.1


@pytest.mark.parametrize("rows", ["words", "tied", "tied to words"])
def test_where_correlation_cannot_be_kept_the_block_is_kron(chain, rows):
    """A vocabulary has no dense lag; uses of both kinds have no common chain."""
    measured = {
        "words": Rows(words(10, 4, 2, size=IN), randn(2, 10, 4, OUT, seed=1)),
        "tied": tied_rows(sparse=False),
        "tied to words": tied_rows(),
    }[rows]
    statistics = chain.measure(measured)
    assert_same_statistics(statistics, get("kron").measure(measured))
    assert torch.equal(build(chain, statistics).to_dense(), build(get("kron"), statistics).to_dense())
    spec, scale = BlockSpec("layer", statistics, 1.0, 1.0), torch.tensor(5.0).double()
    assert torch.equal(chain.information(spec)(scale), get("kron").information(spec)(scale))


def test_positions_that_are_reduced_have_no_chain():
    rows = dense_rows(shared=5)
    for name in OPTIONS:
        reduced = get(name, sharing="reduce")
        kron = get("kron", sharing="reduce")
        assert_same_statistics(reduced.measure(rows), kron.measure(rows))
        found = build(reduced, reduced.measure(rows))
        assert torch.equal(found.to_dense(), build(kron, kron.measure(rows)).to_dense())


def test_lags_that_do_not_belong_to_their_factors_are_counted_in_a_warning(chain):
    """They cannot be measured; the Gaussian is finite all the same."""
    statistics = statistics_of(6.0, symmetric=True)
    sums = {name: value * (30 if name == "lagged_input" else 1) for name, value in statistics.sums.items()}
    with pytest.warns(BayesKfacWarning, match=r"[1-4] of 4 correlations along the chain in layer are far beyond 1"):
        gaussian = build(chain, Statistics(sums, statistics.counts), data_scale=1e6)
    value = randn(OUT, IN, seed=0)
    assert bool(torch.isfinite(gaussian.sample(value)).all())
    assert bool(torch.isfinite(gaussian.logdet()))
    assert_close(gaussian.multiply(gaussian.solve(value)), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dead", ["inputs", "gradients"])
def test_a_block_without_a_fisher_is_the_priors(chain, dead):
    """One of a stack; the other's side has lags that are not small beside the damping."""
    rows = dense_rows(blocks=(2,))
    part = getattr(rows, dead).clone()
    part[..., 0, :, :, :] = 0
    rows = replace(rows, **{dead: part})
    gaussian = build(chain, chain.measure(rows), data_scale=1e4)
    assert_close(gaussian.to_dense()[0], PRIOR * torch.eye(6, dtype=torch.float64), **TIGHT)
    alone = Rows(rows.inputs[1], rows.gradients[:, 1])
    assert_close(gaussian.to_dense()[1], build(chain, chain.measure(alone), data_scale=1e4).to_dense(), **TIGHT)


@pytest.mark.parametrize("data_scale", [1e2, 1e6, 1e10])
def test_rounding_alone_is_nothing_to_warn_of(chain, data_scale):
    """Inputs of a low rank in single precision, at dampings that are above rounding, or lost in it."""
    inputs = dense_rows(batch=64, shared=32, in_=20, out=8).inputs.cumsum(-2) @ randn(20, 200, seed=2)
    gradients = randn(1, 64, 32, 8, seed=3).cumsum(-2) @ randn(8, 60, seed=4)
    statistics = chain.measure(Rows(inputs.float(), gradients.float()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaussian = build(chain, statistics, data_scale, prior=1.0)
    assert bool((gaussian.marginal_variance() > 0).all())


def test_chains_without_noise_stay_finite_in_single_precision(chain):
    """A signal that is the same at every position and nothing else, at a damping far below rounding."""
    rows = dense_rows(batch=5, shared=1, seed=3)
    rows = Rows(rows.inputs.float().repeat(1, 50, 1), rows.gradients.float().repeat(1, 1, 50, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaussian = build(chain, chain.measure(rows), data_scale=1e12, prior=1e-3)
    assert bool(torch.isfinite(gaussian.sample(torch.ones(2, 3))).all())
    assert bool((gaussian.marginal_variance() > 0).all())
    assert bool(torch.isfinite(gaussian.logdet()))


# The evidence


def test_the_information_without_correlation_is_that_of_kron(chain):
    spec = BlockSpec("layer", statistics_of(6.0, 2, norm=0.0), 1.0, 0.7)
    for scale in (0.1, 10.0, 1e4):
        found, expected = (structure.information(spec)(torch.tensor(scale)) for structure in (chain, get("kron")))
        assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_information_is_exact_where_the_data_rule_and_where_the_prior_does(option):
    statistics = statistics_of(6.0, symmetric=True)
    information = get(option).information(BlockSpec("layer", statistics, 1.0, 1.0))
    scale = 1e12
    V0 = torch.kron(statistics.mean("gradient"), statistics.mean("input"))
    Psi = torch.kron(statistics.mean("lagged_gradient"), statistics.mean("lagged_input")) @ torch.linalg.inv(V0)
    fisher = summed(V0, Psi, 6.0) if option == "rnn_chain_1" else endless(V0, Psi)
    expected = torch.linalg.slogdet(scale * fisher).logabsdet
    assert_close(information(torch.tensor(scale).double()), expected, rtol=0, atol=1e-4)
    assert float(information(torch.tensor(1e-12).double()).abs()) < 1e-4


def test_what_correlation_adds_is_the_log_determinant_over_krons(chain):
    """Of the Gaussians that are built, both with factored damping."""
    statistics = statistics_of(6.0, 2)
    spec = BlockSpec("layer", statistics, 1.0, 1.0)
    for scale in (0.1, 10.0, 1e3):
        added = chain.information(spec)(torch.tensor(scale)) - get("kron").information(spec)(torch.tensor(scale))
        logdets = [build(structure, statistics, scale, 1.0).logdet().sum() for structure in (chain, get("kron"))]
        assert_close(added, logdets[0] - logdets[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_information_is_differentiable_in_scale_and_prior(chain, blocks):
    statistics = statistics_of(6.0, *blocks)

    def information(scale: Tensor, precision: Tensor) -> Tensor:
        return chain.information(BlockSpec("layer", statistics, 1.0, precision))(scale)

    for shape in ((), (IN,)):
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        precision = (0.2 + randn(*shape, seed=3).square()).requires_grad_()
        assert torch.autograd.gradcheck(information, (scale, precision))


@pytest.mark.parametrize("dead", ["inputs", "gradients"])
def test_the_information_of_a_dead_block_is_nothing_and_has_a_gradient(chain, dead):
    rows = dense_rows(blocks=(2,))
    rows = replace(rows, **{dead: getattr(rows, dead) * 0})
    precision = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    total = chain.information(BlockSpec("layer", chain.measure(rows), 1.0, precision))(torch.tensor(5.0))
    assert_close(total, torch.zeros_like(total), **TIGHT)
    (slope,) = torch.autograd.grad(total, precision)
    assert bool(torch.isfinite(slope).all())


# Simulated chains


def simulate(transition: Tensor, num_chains: int, length: int, seed: int) -> Tensor:
    """Stationary chains ``x_{t+1} = Φ x_t + noise`` of unit covariance, ``[num_chains, length, size]``."""
    size = len(transition)
    noise_root = torch.linalg.cholesky(torch.eye(size).double() - transition @ transition.mT)
    noise = torch.randn(length, num_chains, size, generator=rng(seed), dtype=torch.float64)
    states = [noise[0]]
    for step in noise[1:]:
        states.append(states[-1] @ transition.mT + step @ noise_root.mT)
    return torch.stack(states, dim=1)


def transitions(*, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Of inputs and gradients; those that are not symmetric turn as they go."""
    if symmetric:
        Q = torch.linalg.qr(randn(3, 3, seed=1))[0]
        return Q @ torch.diag(torch.tensor([0.9, 0.6, -0.2]).double()) @ Q.mT, torch.diag(
            torch.tensor([0.9, 0.5]).double()
        )
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]]).double()
    return 0.9 * torch.block_diag(turn, torch.ones(1, 1).double()), 0.9 * turn


def simulated_rows(*, symmetric: bool, num_chains: int, length: int) -> Rows:
    """Independent chains of inputs and gradients, mixed so that their covariances are not the identity."""
    Phi_A, Phi_G = transitions(symmetric=symmetric)
    mix_A, mix_G = (sqrtm(random_spd(size, seed=size)) for size in (3, 2))
    inputs, gradients = simulate(Phi_A, num_chains, length, 0) @ mix_A, simulate(Phi_G, num_chains, length, 1) @ mix_G
    return Rows(inputs, gradients.unsqueeze(0))


def test_the_statistics_of_a_simulated_chain_are_its_own():
    """``C₀`` is the covariance, and ``C₁ = (T−1)/T Φ`` of it: there are ``T − 1`` pairs, and ``T`` positions."""
    rows = simulated_rows(symmetric=False, num_chains=20_000, length=10)
    statistics = get("rnn_chain_2").measure(rows)
    Phi_A, Phi_G = transitions(symmetric=False)
    for side, Phi, size, positions in (("input", Phi_A, 3, 1), ("gradient", Phi_G, 2, 10)):
        mix = sqrtm(random_spd(size, seed=size))
        assert_close(statistics.mean(side) / positions, mix @ mix, rtol=0, atol=0.03)
        assert_close(statistics.mean(f"lagged_{side}") / positions, 0.9 * mix @ Phi @ mix, rtol=0, atol=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_fisher_of_a_simulated_chain_is_nearer_than_that_of_independent_time(symmetric):
    """To ``E[vec J vec Jᵀ]`` itself; option 2 also where correlation turns, of which option 1 knows half."""
    length = 40
    rows = simulated_rows(symmetric=symmetric, num_chains=20_000, length=length)
    J = rows.jacobians()[0].flatten(-2)
    truth = J.mT @ J / len(J)
    errors = {}
    for name in ("kron", *OPTIONS):
        structure = get(name)
        gaussian = build(structure, structure.measure(rows), data_scale=1e8, prior=1e-8)
        errors[name] = relative_error(gaussian.to_dense() / 1e8, truth)
    assert errors["kron"] > 0.4
    assert errors["rnn_chain_2"] < 0.1 * errors["kron"]
    assert errors["rnn_chain_1"] < (0.2 if symmetric else 1.0) * errors["kron"]
