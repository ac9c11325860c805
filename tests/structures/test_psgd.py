"""PSGD's covariance is where its own iteration leads, by its own criterion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import BlockSpec, MatrixNormalGaussian, PSGDStructure
from tests.helpers import TIGHT, randn, random_spd
from tests.random_rows import dense_rows, words

OUT, IN = 3, 4
SCALE, PRIOR = 30.0, 2.0
CRITERIA = ["newton", "whitening"]


def spec_of(A: Tensor, G: Tensor, scale: float = SCALE, prior: object = PRIOR) -> BlockSpec:
    statistics = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    return BlockSpec("layer", statistics, scale, prior)


def build(criterion: str, spec: BlockSpec) -> MatrixNormalGaussian:
    (gaussian,) = PSGDStructure(criterion=criterion).gaussians([spec])
    assert isinstance(gaussian, MatrixNormalGaussian)
    return gaussian


def factors() -> tuple[Tensor, Tensor]:
    return random_spd(IN, seed=0), random_spd(OUT, seed=1)


def exact(A: Tensor, G: Tensor) -> Tensor:
    return SCALE * torch.kron(G, A) + PRIOR * torch.eye(OUT * IN, dtype=torch.float64)


def eigenvalue_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


def preconditioner(criterion: str, gaussian: MatrixNormalGaussian) -> tuple[Tensor, Tensor]:
    """``P_G`` and ``P_A`` with ``P_G ⊗ P_A = P``: the covariance, or its root."""
    sides = [root @ root.T for root in (gaussian.scale_tril_row, gaussian.scale_tril_column)]
    return tuple(sides if criterion == "newton" else map(eigenvalue_root, sides))


def criterion_of(criterion: str, P: Tensor, H: Tensor) -> Tensor:
    """``E[hᵀ P h + vᵀ P⁻¹ v]``: of ``h = H v``, or of gradients with ``E[h hᵀ] = H``."""
    moment = H @ H if criterion == "newton" else H
    return torch.trace(P @ moment) + torch.trace(torch.linalg.inv(P))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_published_iteration_leads_there(criterion):
    """``Q ← Q − μ triu(Q T Qᵀ − Q⁻ᵀ Q⁻¹) Q / ‖·‖`` for each side in turn, with the expectations of ``h`` and ``v``."""
    A, G = factors()
    H = exact(A, G)
    T = (H @ H if criterion == "newton" else H).reshape(OUT, IN, OUT, IN)
    Q = {"G": torch.eye(OUT, dtype=torch.float64), "A": torch.eye(IN, dtype=torch.float64)}
    for _ in range(1500):
        for side, other, moments in (("G", "A", "aibj,ij->ab"), ("A", "G", "aibj,ab->ij")):
            P = Q[other].T @ Q[other]
            push = Q[side] @ torch.einsum(moments, T, P) @ Q[side].T
            pull = torch.trace(torch.linalg.inv(P)) * torch.linalg.inv(Q[side] @ Q[side].T)
            Q[side] = Q[side] - 0.5 * (push - pull).triu() @ Q[side] / (push + pull).norm()
    P = torch.kron(Q["G"].T @ Q["G"], Q["A"].T @ Q["A"])
    covariance = torch.linalg.inv(build(criterion, spec_of(A, G)).to_dense())
    assert_close(covariance, P if criterion == "newton" else P @ P, rtol=1e-8, atol=1e-10)


def test_sampled_pairs_lead_near_it():
    """By the criterion's gradient from random ``v`` and ``h = H v``, one pair at a time, with a decaying step."""
    A, G = factors()
    H = exact(A, G)
    Q_G, Q_A = torch.eye(OUT, dtype=torch.float64) * 0.3, torch.eye(IN, dtype=torch.float64) * 0.3
    pairs = randn(4000, OUT * IN, seed=3)
    for step, v in enumerate(pairs):
        h = (H @ v).reshape(OUT, IN)
        image = Q_G @ h @ Q_A.T
        back = torch.linalg.inv(Q_G).T @ v.reshape(OUT, IN) @ torch.linalg.inv(Q_A)
        gradients = image @ image.T - back @ back.T, image.T @ image - back.T @ back
        sizes = image.square().sum() + back.square().sum()
        rate = 0.3 / (1 + step / 100)
        Q_G, Q_A = (Q - rate * gradient.triu() @ Q / sizes for Q, gradient in zip((Q_G, Q_A), gradients, strict=True))
    P, found = torch.kron(Q_G.T @ Q_G, Q_A.T @ Q_A), build("newton", spec_of(A, G))
    target = criterion_of("newton", torch.linalg.inv(found.to_dense()), H)
    assert target < criterion_of("newton", P, H) < 1.1 * target


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_kronecker_product_nearby_has_less_of_its_criterion(criterion):
    A, G = factors()
    H, sides = exact(A, G), preconditioner(criterion, build(criterion, spec_of(A, G)))
    least = criterion_of(criterion, torch.kron(*sides), H)
    for seed in range(20):
        roots = [
            torch.linalg.cholesky(P) @ (torch.eye(len(P)) + 0.02 * randn(*P.shape, seed=seed + len(P))) for P in sides
        ]
        assert criterion_of(criterion, torch.kron(*(root @ root.T for root in roots)), H) > least


@pytest.mark.parametrize("criterion", CRITERIA)
def test_both_terms_are_equal_at_the_optimum(criterion):
    """``E[hᵀ P h] = E[vᵀ P⁻¹ v]``: the scale is right by PSGD's measure."""
    A, G = factors()
    P = torch.kron(*preconditioner(criterion, build(criterion, spec_of(A, G))))
    H = exact(A, G)
    moment = H @ H if criterion == "newton" else H
    assert_close(torch.trace(P @ moment), torch.trace(torch.linalg.inv(P)), **TIGHT)


def test_it_is_another_matrix_normal_than_k_facs():
    """Each is nearest by its own measure, and neither by the other's."""
    A, G = factors()
    spec, H = spec_of(A, G), exact(A, G)
    (optimal,) = structures.get("kron", damping="optimal", sharing="expand").gaussians([spec])
    covariances = {name: torch.linalg.inv(build(name, spec).to_dense()) for name in CRITERIA}
    covariances["optimal"] = torch.linalg.inv(optimal.to_dense())

    def divergence(covariance: Tensor) -> Tensor:
        return torch.trace(H @ covariance) - torch.logdet(covariance)

    by_kl = {name: float(divergence(covariance)) for name, covariance in covariances.items()}
    by_psgd = {name: float(criterion_of("newton", covariance, H)) for name, covariance in covariances.items()}
    assert min(by_kl, key=by_kl.get) == "optimal"
    assert min(by_psgd, key=by_psgd.get) == "newton"
    assert max(by_kl, key=by_kl.get) == "newton"  # the gradients' is between the two
    assert max(by_psgd, key=by_psgd.get) == "optimal"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("constant", ["A", "G"])
def test_where_a_factor_is_a_multiple_of_the_identity_it_is_exact(criterion, constant):
    """The damped product is then a product itself."""
    A, G = factors()
    A, G = (2 * torch.eye(IN, dtype=torch.float64), G) if constant == "A" else (A, 2 * torch.eye(OUT).double())
    assert_close(build(criterion, spec_of(A, G)).to_dense(), exact(A, G), **TIGHT)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_words_and_stacks_and_priors_by_column(criterion):
    """A diagonal side stays a row, and each block and column has its own scale."""
    rows = Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1))
    structure = PSGDStructure(criterion=criterion)
    prior = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    spec = BlockSpec("layer", structure.measure(rows), SCALE, prior)
    gaussian = build(criterion, spec)
    assert gaussian.scale_tril_column.shape == (1, IN)
    sums = {"input": torch.diag(spec.statistics.sums["input"][0]), "gradient": spec.statistics.sums["gradient"]}
    dense = replace(spec, statistics=Statistics(sums, spec.statistics.counts))
    assert_close(gaussian.to_dense(), build(criterion, dense).to_dense(), **TIGHT)
    (without,) = structure.gaussians([replace(spec, data_scale=1e-20)])
    assert_close(without.to_dense(), torch.diag(prior.repeat(OUT)), rtol=0, atol=1e-8)
    stacked = structure.measure(dense_rows(2, (2,), 10, 2, in_=IN, out=OUT))
    assert build(criterion, BlockSpec("layer", stacked, SCALE, PRIOR)).shape == (2, OUT, IN)


def test_options_are_kept_and_checked():
    again = PSGDStructure(criterion="whitening").configured(damping="exact", sharing="reduce")
    assert again.options == {"criterion": "whitening"}
    with pytest.raises(ArgumentError, match="criterion='adam' is unknown"):
        PSGDStructure(criterion="adam")
