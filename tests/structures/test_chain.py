"""The algebra of chains: their gain, Stein equations and determinants, against sums and dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.structures import MatrixNormalGaussian
from bayes_kfac.structures.chain import ChainGaussian, chain_gain, log_det_stein, solve_stein
from tests.helpers import TIGHT, dense_kron, randn

CORRELATIONS = torch.cat([torch.linspace(-1, 1, 41), 1 - torch.logspace(-12, -2, 6), -1 + torch.logspace(-12, -2, 6)])
CORRELATIONS = CORRELATIONS.double()
LENGTHS = [1.0, 2.0, 3.0, 5.0, 7.3, 64.0, 1000.0]


def contraction(*blocks: int, size: int, norm: float = 0.8, seed: int = 0) -> Tensor:
    """Random matrices whose largest singular value is ``norm``."""
    matrix = randn(*blocks, size, size, seed=seed)
    return norm * matrix / torch.linalg.matrix_norm(matrix, 2, keepdim=True)


def shift(size: int, norm: float) -> Tensor:
    """A nilpotent matrix that is as far from normal as can be: all its eigenvalues are zero."""
    return norm * torch.diag(torch.ones(size - 1, dtype=torch.float64), -1)


def by_summation(correlation: Tensor, length: float) -> Tensor:
    """``Σ_{|d|<T} (1 − |d|/T) x^|d|``, one term at a time."""
    total = torch.ones_like(correlation)
    distance = 1
    while distance < length:
        total = total + 2 * (1 - distance / length) * correlation**distance
        distance += 1
    return total


# The gain


@pytest.mark.parametrize("length", LENGTHS)
def test_the_gain_of_a_chain_is_the_sum_over_its_pairs(length):
    """Everywhere within [−1, 1], also between whole numbers of positions."""
    assert_close(chain_gain(CORRELATIONS, length), by_summation(CORRELATIONS, length), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [length for length in LENGTHS if length == int(length)])
def test_the_gain_is_the_published_function(length):
    """``γ(x) = (1 − x)² / (T (1 − x²) − 2x (1 − x^T))`` is that of the inverse of a sum over ``T`` positions."""
    x = torch.linspace(-0.95, 0.9, 30, dtype=torch.float64)
    gamma = (1 - x) ** 2 / (length * (1 - x**2) - 2 * x * (1 - x**length))
    assert_close(1 / (length * chain_gain(x, length)), gamma, **TIGHT)


@pytest.mark.parametrize("length", [length for length in LENGTHS if length == int(length)])
def test_the_gain_at_its_ends(length):
    """Positions that are all the same are worth ``T``, uncorrelated ones 1; those that alternate cancel in pairs."""
    gain = chain_gain(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), length)
    assert_close(gain, torch.tensor([length, 1.0, (length % 2) / length], dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_gain_is_accurate_in_single_precision(length):
    """Within the correlations that chains of this length have, ``cos²(π/(T+1))`` at most."""
    most = torch.cos(torch.tensor(torch.pi / (length + 1))).square()
    x = (torch.linspace(-1, 1, 101) * most).float()
    assert_close(chain_gain(x, length).double(), by_summation(x.double(), length), rtol=2e-3, atol=0)


def test_the_gain_is_differentiable():
    x = torch.tensor([-1.0, -0.5, 0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    for length in (1.0, 6.0, 6.4):
        assert torch.autograd.gradcheck(lambda value, length=length: chain_gain(value, length), x)


# Stein equations

SIDES = {
    "random": lambda: (contraction(size=3), contraction(size=4, seed=1)),
    "stacked": lambda: (contraction(2, size=3), contraction(2, size=4, seed=1)),
    "nilpotent": lambda: (shift(3, 0.9), shift(4, 0.9)),
    "nilpotent on one side": lambda: (shift(3, 0.9), contraction(size=4)),
    "zero": lambda: (torch.zeros(3, 3).double(), contraction(size=4)),
    "slow": lambda: (0.9999 * torch.eye(3).double(), 0.9999 * torch.eye(4).double()),
}


def dense_map(left: Tensor, right: Tensor) -> Tensor:
    """``I − L ⊗ R``."""
    product = dense_kron(left, right)
    return torch.eye(product.shape[-1], dtype=torch.float64) - product


@pytest.mark.parametrize("sides", SIDES)
def test_a_stein_equation_is_solved(sides):
    """By the equation itself, and by the dense inverse; over any leading dimensions."""
    left, right = SIDES[sides]()
    value = randn(5, *left.shape[:-2], 3, 4, seed=2)
    solution = solve_stein(left, right, value)
    scale = solution.abs().max()
    assert_close((solution - left @ solution @ right.mT) / scale, value / scale, **TIGHT)
    expected = torch.linalg.solve(dense_map(left, right), value.flatten(-2).unsqueeze(-1)).reshape(value.shape)
    assert_close(solution / scale, expected / scale, **TIGHT)


@pytest.mark.parametrize("sides", SIDES)
def test_the_determinant_of_a_stein_equation(sides):
    left, right = SIDES[sides]()
    expected = torch.linalg.slogdet(dense_map(left, right))
    assert bool((expected.sign > 0).all())
    assert_close(log_det_stein(left, right), expected.logabsdet, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sides", SIDES)
def test_the_determinant_is_differentiable(sides):
    """Also where eigenvalues coincide and have no eigenvectors of their own."""
    left, right = (side.requires_grad_() for side in SIDES[sides]())
    found = torch.autograd.grad(log_det_stein(left, right).sum(), (left, right))
    expected = torch.autograd.grad(torch.linalg.slogdet(dense_map(left, right)).logabsdet.sum(), (left, right))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-4 * max(1e-2, float(other.abs().max())))


# The Gaussian


def chain_gaussian(*blocks: int, norm: float = 0.8) -> ChainGaussian:
    """Any regular bases, lags and innovations, of which a structure makes no use."""
    K_G, K_A = randn(*blocks, 3, 3, seed=3), randn(*blocks, 4, 4, seed=4)
    log_volume = 4 * torch.linalg.slogdet(K_G).logabsdet + 3 * torch.linalg.slogdet(K_A).logabsdet
    M_G, M_A = contraction(*blocks, size=3, norm=norm), contraction(*blocks, size=4, norm=norm, seed=1)
    return ChainGaussian(K_G, K_A, M_G, M_A, 0.1 + randn(*blocks, 3, 4, seed=5).square(), log_volume)


@pytest.mark.parametrize("blocks", [(), (2,)])
@pytest.mark.parametrize("norm", [0.0, 0.8, 0.999])
def test_a_chains_gaussian_is_its_formula(blocks, norm):
    """``B = (K_G ⊗ K_A) (I − M_G ⊗ M_A) diag(Λ)^(-1/2)``, and all that follows from it."""
    gaussian = chain_gaussian(*blocks, norm=norm)
    B = dense_kron(gaussian.basis_row, gaussian.basis_column) @ dense_map(gaussian.lag_row, gaussian.lag_column)
    B = B * gaussian.innovation.flatten(-2).rsqrt().unsqueeze(-2)
    covariance = B @ B.mT
    noise = randn(5, *gaussian.shape, seed=6)
    assert_close(gaussian.sample(noise).flatten(-2), (B @ noise.flatten(-2).unsqueeze(-1)).squeeze(-1), **TIGHT)
    assert_close(gaussian.whiten(noise).flatten(-2), (B.mT @ noise.flatten(-2).unsqueeze(-1)).squeeze(-1), **TIGHT)
    assert_close(gaussian.multiply(gaussian.solve(noise)), noise, rtol=1e-7, atol=1e-7)
    assert_close(gaussian.logdet(), -torch.linalg.slogdet(covariance).logabsdet, rtol=1e-8, atol=1e-8)
    variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(gaussian.shape)
    assert_close(gaussian.marginal_variance(), variance, **TIGHT)
    assert_close(gaussian.to_dense() @ covariance, torch.eye(12).double().expand_as(covariance), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [1, 3])
def test_a_chains_whitened_rows_are_whitened_jacobians(shared):
    gaussian = chain_gaussian(2)
    inputs, gradients = randn(2, 5, shared, 4, seed=7), randn(3, 2, 5, shared, 3, seed=8)
    J = torch.einsum("cbnto,bnti->ncboi", gradients, inputs)
    whitened = gaussian.whitened(inputs, gradients)
    assert_close(whitened.covariance(), torch.einsum("ncboi,ndboi->ncd", *[gaussian.whiten(J)] * 2), **TIGHT)
    assert_close(whitened.variance(), gaussian.whiten(J).square().sum((2, 3, 4)), **TIGHT)
    products = whitened.between(gaussian.whitened(inputs[:, :2], gradients[:, :, :2]))
    expected = torch.einsum("ncboi,mdboi->nmcd", gaussian.whiten(J), gaussian.whiten(J[:2]))
    assert_close(products, expected, **TIGHT)


# The nearest matrix normal


def kl_divergence(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q ‖ p)`` of two zero-mean Gaussians of precisions ``q`` and ``p``."""
    trace = torch.linalg.solve(q, p).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace - p.shape[-1] + torch.logdet(q) - torch.logdet(p))


def endless_chain(left: Tensor, right: Tensor) -> ChainGaussian:
    """The Gaussian of a chain whose neighbours are correlated like this, in the bases in which ``Λ`` is diagonal."""
    sides = []
    for size, lag in ((3, left), (4, right)):
        mu, E = torch.linalg.eigh(lag.mT @ lag)
        sides.append((randn(size, size, seed=size) @ E, E.mT @ lag @ E, mu))
    (K_G, M_G, mu_G), (K_A, M_A, mu_A) = sides
    log_volume = 4 * torch.linalg.slogdet(K_G).logabsdet + 3 * torch.linalg.slogdet(K_A).logabsdet
    return ChainGaussian(K_G, K_A, M_G, M_A, 1 - mu_G.unsqueeze(-1) * mu_A.unsqueeze(-2), log_volume)


@pytest.mark.parametrize("sides", [name for name in SIDES if name != "slow"])
def test_the_nearest_matrix_normal_is_stationary_and_no_neighbour_is_nearer(sides):
    """Also where the lags have no basis of eigenvectors."""
    gaussian = endless_chain(*SIDES[sides]())
    nearest = gaussian.as_prior()
    assert isinstance(nearest, MatrixNormalGaussian)
    row, column = nearest.scale_tril_row, nearest.scale_tril_column
    for root in (row, column):
        assert torch.equal(root, root.tril())
        assert bool((root.diagonal(dim1=-2, dim2=-1) > 0).all())
    p, q = gaussian.to_dense(), nearest.to_dense()
    trace = torch.linalg.solve(q, p).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(trace, torch.full_like(trace, 12), rtol=1e-6, atol=0)
    best = kl_divergence(q, p)
    for seed in range(10):
        neighbour = MatrixNormalGaussian(
            row @ (torch.eye(3).double() + 0.01 * randn(3, 3, seed=seed).tril()),
            column @ (torch.eye(4).double() + 0.01 * randn(4, 4, seed=seed + 100).tril()),
        )
        assert bool((kl_divergence(neighbour.to_dense(), p) > best).all())


def test_a_chain_without_correlation_is_its_own_nearest():
    gaussian = endless_chain(torch.zeros(3, 3).double(), torch.zeros(4, 4).double())
    assert_close(gaussian.as_prior().to_dense(), gaussian.to_dense(), rtol=1e-6, atol=1e-6)
