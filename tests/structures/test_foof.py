"""FOOF: K-FAC with a multiple of the identity on the output side."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import linalg, structures
from bayes_kfac.curvature import SHARING_KINDS, Rows, output_gradients
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.structures import BlockSpec, KroneckerStructure, MatrixNormalGaussian
from tests.fishers import IN, KINDS, OUT, error, fisher_of, get
from tests.helpers import TIGHT, block_fishers, dense_kron, randn, record, seeded

FOOF, KRON = get("foof"), get("kron")


def factors(name: str, rows: Rows, sharing: str = "expand") -> tuple[torch.Tensor, torch.Tensor]:
    structure = get(name, sharing)
    assert isinstance(structure, KroneckerStructure)
    return structure.factors(structure.measure(rows))


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tied" not in kind])
def test_the_input_side_is_kfacs_and_the_output_side_its_mean(kind, sharing):
    """``c = tr G / out``, kept as a diagonal."""
    rows = KINDS[kind]()
    (A, c), (expected, G) = factors("foof", rows, sharing), factors("kron", rows, sharing)
    assert_close(A, expected, **TIGHT)
    assert c.shape == (*G.shape[:-2], 1, OUT)
    assert_close(c, (linalg.trace(G) / OUT)[..., None, None].expand_as(c), **TIGHT)


@pytest.mark.parametrize("kind", ["tied", "tied to words"])
def test_tied_weights_have_the_trace_of_both_uses(kind):
    """``c I ⊗ A + H ⊗ c' I`` as one product of its partial traces, ``H`` of the transposed use's inputs."""
    rows = KINDS[kind]()
    sums = KRON.measure(rows)
    A, G, H, B = (
        linalg.dense(sums.mean(name)) for name in ("input", "gradient", "transposed_input", "transposed_gradient")
    )
    c, other = torch.trace(G) / OUT, torch.trace(B) / IN
    eye_in, eye_out = torch.eye(IN).double(), torch.eye(OUT).double()
    whole = (c * torch.kron(eye_out, A) + other * torch.kron(H, eye_in)).reshape(OUT, IN, OUT, IN)
    left, right = torch.einsum("oipi->op", whole), torch.einsum("oioj->ij", whole)
    assert_close(fisher_of(FOOF, rows), torch.kron(left, right) / torch.trace(right), **TIGHT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tied" not in kind])
def test_no_other_multiple_of_the_identity_is_nearer_to_kfac(kind):
    rows = KINDS[kind]()
    (A, c), (_, G) = factors("foof", rows), factors("kron", rows)
    A, c = linalg.dense(A), linalg.dense(c)
    product = dense_kron(G, A)
    best = error(dense_kron(c, A), product)
    assert all(error(factor * dense_kron(c, A), product) > best for factor in (0.98, 1.02))


def test_the_step_is_the_papers_up_to_its_size():
    """``V (A + λI)⁻¹ / c`` with ``λ = γ/c``."""
    rows, gamma, V = KINDS["one position"](), 0.3, randn(OUT, IN, seed=5)
    A, c = factors("foof", rows)
    (gaussian,) = FOOF.gaussians([BlockSpec("layer", FOOF.measure(rows), 1.0, gamma)])
    damped = A + gamma / c[0, 0] * torch.eye(IN).double()
    assert_close(gaussian.solve(V), V @ torch.linalg.inv(damped) / c[0, 0], **TIGHT)


@pytest.mark.parametrize("prior", [0.03, 3.0, 300.0])
def test_the_optimal_matrix_normal_is_the_exact_posterior(prior):
    """By Cholesky factorisations alone: the damped product is a product."""
    spec = BlockSpec("layer", FOOF.measure(KINDS["one position"]()), 20.0, prior)
    (exact,) = FOOF.gaussians([spec])
    (optimal,) = structures.get("foof", damping="optimal", sharing="expand").gaussians([spec])
    assert isinstance(optimal, MatrixNormalGaussian)
    assert optimal.scale_tril_row.shape == (1, OUT)
    assert_close(optimal.to_dense(), exact.to_dense(), **TIGHT)


def test_a_vocabulary_of_outputs_costs_its_length():
    """No factor of 30,000 × 30,000, neither of the statistics nor of the Gaussian."""
    rows = Rows(randn(4, 1, IN, seed=0).float(), randn(1, 4, 1, 30_000, seed=1).float())
    statistics = FOOF.measure(rows)
    assert statistics.sums["gradient"].shape == (1, 30_000)
    for damping in structures.DAMPING_KINDS:
        structure = structures.get("foof", damping=damping, sharing="expand")
        (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 20.0, 1.0)])
        assert all(tensor.numel() <= 30_000 * IN for tensor in gaussian.state.values())
        assert bool(torch.isfinite(gaussian.sample(randn(30_000, IN, seed=2).float())).all())


def test_an_output_layer_with_equal_noise_is_exact():
    model, x = seeded(nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT))), randn(9, IN, seed=3)
    columns = output_gradients(Gaussian(0.5).double(), model(x), "exact")
    expected = block_fishers(model, x, 4 * torch.eye(OUT).double().expand(9, OUT, OUT))
    assert_close(fisher_of(FOOF, record(model, x, columns)["2"]), expected["2"], **TIGHT)


def test_a_posterior_knows_the_noise():
    """Literally ``G = I`` would make it as wide for a noise of ten as for a noise of one."""
    model, x = seeded(nn.Sequential(nn.Linear(IN, OUT))), randn(9, IN, seed=3)
    blocks = [
        bk.Laplace(model, Gaussian(noise).double(), structure="foof", prior_precision=1e-9 / noise**2)
        .fit([(x, randn(9, OUT, seed=4))], progress=False)
        .posterior()
        .blocks["0"]
        for noise in (1.0, 10.0)
    ]
    assert_close(blocks[1].marginal_variance(), 100 * blocks[0].marginal_variance(), **TIGHT)
