"""The matrix normal against SciPy, against dense Gaussians, and against what must hold for any Gaussian."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from bayes_kfac.distributions import MatrixNormal
from bayes_kfac.errors import ArgumentError, NotPositiveDefiniteError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(1, 1), (1, 4), (4, 1), (2, 3), (5, 3)]


def random_tril(generator: torch.Generator, *shape: int) -> Tensor:
    """Lower triangular matrices ``[*shape, shape[-1]]`` with a diagonal in ``[0.5, 1.5]``."""
    lower = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64).tril(-1) / shape[-1]
    return lower + torch.diag_embed(0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64))


def random_parameters(seed: int, n: int, p: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, n, p, generator=generator, dtype=torch.float64)
    return loc, random_tril(generator, *batch, n), random_tril(generator, *batch, p)


def random_matrix_normal(seed: int, n: int, p: int, batch: tuple[int, ...] = ()) -> MatrixNormal:
    return MatrixNormal(*random_parameters(seed, n, p, batch))


def random_covariance(seed: int, size: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """A covariance with its eigenvalues, spread evenly on a log scale, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)
    covariance = (vectors * values) @ vectors.T
    return (covariance + covariance.T) / 2, values, vectors


def dense(d: MatrixNormal) -> MultivariateNormal:
    """The same distribution over the rows laid end to end; of one matrix, not a batch."""
    row, column = d.scale_tril_row, d.scale_tril_column
    return MultivariateNormal(d.loc.flatten(), covariance_matrix=torch.kron(row @ row.T, column @ column.T))


# Against references


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_scipy_log_prob_and_entropy(n: int, p: int) -> None:
    d = random_matrix_normal(0, n, p)
    reference = stats.matrix_normal(d.loc.numpy(), d.covariance_matrix_row.numpy(), d.covariance_matrix_column.numpy())
    values = torch.randn(7, n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(d.log_prob(values), torch.from_numpy(reference.logpdf(values.numpy()).reshape(7)), **TIGHT)
    assert_close(d.entropy().item(), float(reference.entropy()), **TIGHT)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_dense_gaussian(n: int, p: int) -> None:
    d = random_matrix_normal(2, n, p)
    reference = dense(d)
    values = torch.randn(4, n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(d.log_prob(values), reference.log_prob(values.flatten(1)), **TIGHT)
    assert_close(d.entropy(), reference.entropy(), **TIGHT)
    assert_close(d.variance, reference.variance.reshape(n, p), **TIGHT)
    assert_close(d.stddev, reference.stddev.reshape(n, p), **TIGHT)
    assert_close(d.covariance_matrix, reference.covariance_matrix, **TIGHT)
    assert_close(d.mean, d.loc)
    assert_close(d.mode, d.loc)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_kl_matrix_normal_equals_dense(n: int, p: int) -> None:
    a, b = random_matrix_normal(4, n, p), random_matrix_normal(5, n, p)
    assert_close(kl_divergence(a, b), kl_divergence(dense(a), dense(b)), **TIGHT)


@pytest.mark.parametrize("make", [lambda *a: dist.Normal(*a).to_event(2), lambda *a: Independent(Normal(*a), 2)])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_kl_diagonal_equals_dense(n: int, p: int, make: Callable[..., Independent[Normal]]) -> None:
    d = random_matrix_normal(6, n, p)
    generator = torch.Generator().manual_seed(7)
    loc = torch.randn(n, p, dtype=torch.float64, generator=generator)
    scale = 0.3 + torch.rand(n, p, dtype=torch.float64, generator=generator)
    reference = MultivariateNormal(loc.flatten(), scale_tril=torch.diag(scale.flatten()))
    assert_close(kl_divergence(d, make(loc, scale)), kl_divergence(dense(d), reference), **TIGHT)


def test_kl_isotropic_prior() -> None:
    d = random_matrix_normal(8, 3, 2)
    prior = dist.Normal(0.0, 0.7).expand([3, 2]).to_event(2)
    U, V = d.covariance_matrix_row, d.covariance_matrix_column
    expected = 0.5 * (
        (U.trace() * V.trace() + d.loc.square().sum()) / 0.7**2
        - 6
        - 2 * U.logdet()
        - 3 * V.logdet()
        + 6 * math.log(0.7**2)
    )
    # The prior is of float32, so its 0.7 is not ours.
    assert_close(kl_divergence(d, prior), expected, rtol=1e-6, atol=1e-6)


def test_kl_is_the_expected_log_ratio() -> None:
    a, b = random_matrix_normal(9, 2, 2), random_matrix_normal(10, 2, 2)
    torch.manual_seed(0)
    x = a.sample((200_000,))
    assert_close(kl_divergence(a, b), (a.log_prob(x) - b.log_prob(x)).mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_keeps_its_digits_where_distributions_are_close(dtype: torch.dtype) -> None:
    n, p, shift = 60, 50, 2.0**-10
    loc, row, column = (x.to(dtype) for x in random_parameters(11, n, p))
    a, b = MatrixNormal(loc, row, column), MatrixNormal(loc, row * (1 + shift), column)
    t = -2 * math.log1p(shift)
    assert_close(kl_divergence(a, b).item(), 0.5 * n * p * (math.expm1(t) - t), rtol=1e-3, atol=0)
    unit = MatrixNormal(torch.zeros_like(loc), torch.eye(n, dtype=dtype) * (1 + shift), torch.eye(p, dtype=dtype))
    prior = dist.Normal(torch.zeros_like(loc), 1.0).to_event(2)
    assert_close(kl_divergence(unit, prior).item(), 0.5 * n * p * (math.expm1(-t) + t), rtol=1e-3, atol=0)


# Sizes and conditioning


def test_width_1000() -> None:
    n = p = 1000
    generator = torch.Generator().manual_seed(12)
    A, B, D = (torch.randn(n, p, dtype=torch.float64, generator=generator) for _ in range(3))
    U, V = A @ A.T / n + 0.1 * torch.eye(n), B @ B.T / p + 0.1 * torch.eye(p)
    log_prob = MatrixNormal.from_covariance(torch.zeros_like(D), U, V).log_prob(D)
    distance = (torch.linalg.solve(U, D) * torch.linalg.solve(V, D.T).T).sum()
    log_det = p * torch.linalg.slogdet(U).logabsdet + n * torch.linalg.slogdet(V).logabsdet
    assert torch.isfinite(log_prob)
    assert_close(log_prob, -0.5 * (n * p * math.log(2 * math.pi) + log_det + distance), rtol=1e-10, atol=0)


@pytest.mark.parametrize("source", ["covariance", "precision"])
def test_condition_1e8(source: str) -> None:
    n, p, condition = 40, 30, 1e8
    U, u, Q = random_covariance(13, n, condition)
    V, v, R = random_covariance(14, p, condition)
    generator = torch.Generator().manual_seed(15)
    loc, X = (torch.randn(n, p, dtype=torch.float64, generator=generator) for _ in range(2))
    if source == "covariance":
        d = MatrixNormal.from_covariance(loc, U, V)
    else:
        u, v = 1 / u, 1 / v
        d = MatrixNormal.from_precision(loc, U, V)
    variances = torch.outer(u, v)
    distance = ((Q.T @ (X - loc) @ R).square() / variances).sum()
    log_det = variances.log().sum()
    relative = {"rtol": 1e-6, "atol": 0.0}
    assert_close(d.log_prob(X), -0.5 * (n * p * math.log(2 * math.pi) + log_det + distance), **relative)
    assert_close(d.entropy(), 0.5 * (n * p * (1 + math.log(2 * math.pi)) + log_det), **relative)
    assert_close(d.variance, torch.outer((Q.square() * u).sum(1), (R.square() * v).sum(1)), **relative)

    prior = dist.Normal(torch.zeros_like(loc), 0.5).to_event(2)
    trace = 4 * (variances.sum() + loc.square().sum())
    kl = 0.5 * (trace - n * p - log_det + n * p * math.log(0.25))
    assert_close(kl_divergence(d, prior), kl, **relative)

    unit = MatrixNormal(torch.zeros_like(loc), 0.5 * torch.eye(n).double(), torch.eye(p).double())
    inverse_trace = 0.25 * (1 / variances).sum() + ((Q.T @ loc @ R).square() / variances).sum()
    kl = 0.5 * (inverse_trace - n * p + log_det - n * p * math.log(0.25))
    assert_close(kl_divergence(unit, d), kl, **relative)


# Sampling


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_sampling_map_is_exact(n: int, p: int) -> None:
    d = random_matrix_normal(16, n, p)
    basis = torch.eye(n * p, dtype=torch.float64).reshape(n * p, n, p)
    B = (d._transform(basis) - d.loc).flatten(1).T
    U, V = d.covariance_matrix_row, d.covariance_matrix_column
    assert_close(B @ B.T, torch.kron(U, V), rtol=1e-12, atol=1e-12)
    assert_close(d._transform(torch.zeros(n, p, dtype=torch.float64)), d.loc, rtol=0, atol=0)


def test_samples_are_the_map_of_standard_normals() -> None:
    d = random_matrix_normal(17, 3, 2, (4,))
    torch.manual_seed(0)
    sample = d.rsample((5,))
    torch.manual_seed(0)
    assert_close(sample, d._transform(torch.randn(5, 4, 3, 2, dtype=torch.float64)), rtol=0, atol=0)


def test_whitening_undoes_the_map() -> None:
    d = random_matrix_normal(18, 4, 3, (2,))
    eps = torch.randn(6, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(19))
    assert_close(d._whiten(d._transform(eps)), eps, **TIGHT)


def test_sample_moments() -> None:
    d = random_matrix_normal(20, 2, 3)
    torch.manual_seed(0)
    flat = d.sample((200_000,)).flatten(1)
    assert_close(flat.mean(0), d.loc.flatten(), rtol=0, atol=0.03)
    assert_close(flat.T.cov(), d.covariance_matrix, rtol=0, atol=0.1)


@pytest.mark.parametrize("seed", [torch.manual_seed, pyro.set_rng_seed])
def test_seeds_reproduce_samples(seed: Callable[[int], object]) -> None:
    d = random_matrix_normal(21, 3, 2)
    seed(0)
    first = d.sample((2,))
    second = d.sample((2,))
    seed(0)
    assert torch.equal(d.sample((2,)), first)
    assert not torch.equal(first, second)


def test_sample_carries_no_gradient_and_rsample_does() -> None:
    loc, row, column = (x.requires_grad_() for x in random_parameters(22, 3, 2))
    d = MatrixNormal(loc, row, column)
    assert d.has_rsample
    assert not d.sample().requires_grad
    assert d.rsample().requires_grad
    assert d().requires_grad


# Shapes


@pytest.mark.parametrize(
    ("loc", "row", "column", "expected"),
    [
        ((), (), (), ()),
        ((4,), (), (), (4,)),
        ((), (4,), (), (4,)),
        ((), (), (4,), (4,)),
        ((5, 1), (4,), (), (5, 4)),
        ((4,), (5, 1), (6, 1, 1), (6, 5, 4)),
    ],
)
def test_batch_shapes_broadcast(
    loc: tuple[int, ...], row: tuple[int, ...], column: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    n, p = 3, 2
    generator = torch.Generator().manual_seed(23)
    d = MatrixNormal(
        torch.randn(*loc, n, p, dtype=torch.float64, generator=generator),
        random_tril(generator, *row, n),
        random_tril(generator, *column, p),
    )
    assert d.batch_shape == expected
    assert d.event_shape == (n, p)
    assert d.shape() == (*expected, n, p)
    for name in ("loc", "mean", "mode", "variance", "stddev"):
        assert getattr(d, name).shape == (*expected, n, p), name
    assert d.scale_tril_row.shape == d.covariance_matrix_row.shape == (*expected, n, n)
    assert d.scale_tril_column.shape == d.covariance_matrix_column.shape == (*expected, p, p)
    assert d.covariance_matrix.shape == (*expected, n * p, n * p)
    assert d.entropy().shape == expected
    x = d.sample((7, 8))
    assert x.shape == (7, 8, *expected, n, p)
    assert d.log_prob(x).shape == (7, 8, *expected)
    assert d.log_prob(torch.zeros(n, p, dtype=torch.float64)).shape == expected
    assert d.sample((0,)).shape == (0, *expected, n, p)
    prior = dist.Normal(torch.zeros(n, p), 1.0).to_event(2)
    assert kl_divergence(d, d).shape == kl_divergence(d, prior).shape == expected


def test_batch_equals_loop() -> None:
    n, p = 3, 2
    generator = torch.Generator().manual_seed(24)
    loc = torch.randn(5, 1, n, p, dtype=torch.float64, generator=generator)
    row, column = random_tril(generator, 4, n), random_tril(generator, 5, 1, p)
    d = MatrixNormal(loc, row, column)
    other = random_matrix_normal(25, n, p, (4,))
    x = torch.randn(6, 5, 4, n, p, dtype=torch.float64, generator=generator)
    scale = 0.5 + torch.rand(4, n, p, dtype=torch.float64, generator=generator)
    log_prob, entropy, variance = d.log_prob(x), d.entropy(), d.variance
    kl, kl_reverse = kl_divergence(d, other), kl_divergence(other, d)
    kl_prior = kl_divergence(d, dist.Normal(0.5, scale).to_event(2))
    assert kl.shape == kl_reverse.shape == kl_prior.shape == (5, 4)
    for i in range(5):
        for j in range(4):
            one = MatrixNormal(loc[i, 0], row[j], column[i, 0])
            other_one = MatrixNormal(other.loc[j], other.scale_tril_row[j], other.scale_tril_column[j])
            assert_close(log_prob[:, i, j], one.log_prob(x[:, i, j]), **TIGHT)
            assert_close(entropy[i, j], one.entropy(), **TIGHT)
            assert_close(variance[i, j], one.variance, **TIGHT)
            assert_close(d.covariance_matrix[i, j], one.covariance_matrix, **TIGHT)
            assert_close(kl[i, j], kl_divergence(one, other_one), **TIGHT)
            assert_close(kl_reverse[i, j], kl_divergence(other_one, one), **TIGHT)
            assert_close(kl_prior[i, j], kl_divergence(one, dist.Normal(0.5, scale[j]).to_event(2)), **TIGHT)


def test_expand() -> None:
    d = random_matrix_normal(26, 3, 2, (4,))
    e = d.expand([6, 5, 4])
    assert type(e) is MatrixNormal
    assert e.batch_shape == (6, 5, 4)
    assert e.event_shape == (3, 2)
    assert e.loc.data_ptr() == d.loc.data_ptr()
    assert e.scale_tril_row.shape == (6, 5, 4, 3, 3)
    assert e.scale_tril_column.shape == (6, 5, 4, 2, 2)
    x = e.sample()
    assert x.shape == (6, 5, 4, 3, 2)
    assert len({tuple(draw.flatten().tolist()) for draw in x.flatten(0, 2)}) == 6 * 5 * 4
    assert_close(e.log_prob(x), d.log_prob(x), **TIGHT)
    assert_close(e.entropy(), d.entropy().expand(6, 5, 4), **TIGHT)
    assert_close(e.variance, d.variance.expand(6, 5, 4, 3, 2), **TIGHT)
    assert_close(kl_divergence(e, d), torch.zeros(6, 5, 4, dtype=torch.float64))
    assert d.expand_by([5]).batch_shape == (5, 4)


@pytest.mark.parametrize("validate_args", [True, False])
def test_expand_keeps_validation(validate_args: bool) -> None:
    d = MatrixNormal(*random_parameters(27, 3, 2), validate_args=validate_args)
    assert d.expand([5])._validate_args is validate_args


def test_expand_fills_a_given_instance() -> None:
    class Scaled(MatrixNormal):
        def __init__(self, loc: Tensor, row: Tensor, column: Tensor, factor: float) -> None:
            self.factor = factor
            super().__init__(loc, factor * row, column)

        def expand(self, batch_shape: torch.Size, _instance: MatrixNormal | None = None) -> MatrixNormal:
            new = self._get_checked_instance(Scaled, _instance)
            new.factor = self.factor
            return super().expand(batch_shape, new)

    e = Scaled(*random_parameters(28, 3, 2), 2.0).expand([5])
    assert type(e) is Scaled
    assert e.factor == 2.0
    assert e.batch_shape == (5,)


def test_many_samples_do_not_copy_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch broadcasts by copying: a thousand samples would need a thousand copies of a layer's factors.
    solve = torch.linalg.solve_triangular
    right_hand_sides = []

    def spy(factor: Tensor, rhs: Tensor, *, upper: bool) -> Tensor:
        right_hand_sides.append(tuple(rhs.shape))
        return solve(factor, rhs, upper=upper)

    monkeypatch.setattr(torch.linalg, "solve_triangular", spy)
    d = random_matrix_normal(43, 3, 2).expand([4])
    assert d.log_prob(d.sample((7,))).shape == (7, 4)
    assert right_hand_sides == [(3, 2 * 7 * 4), (2, 3 * 7 * 4)]


# Pyro


def test_pyro_sample_in_a_plate() -> None:
    parameters = random_parameters(29, 3, 2)

    def model() -> Tensor:
        with pyro.plate("layers", 4):
            return pyro.sample("weight", MatrixNormal(*parameters))

    trace = pyro.poutine.trace(model).get_trace()
    value = trace.nodes["weight"]["value"]
    assert value.shape == (4, 3, 2)
    assert_close(trace.log_prob_sum(), MatrixNormal(*parameters).log_prob(value).sum(), **TIGHT)


def test_pyro_infers_a_mean() -> None:
    loc, row, column = random_parameters(30, 2, 2)
    prior = MatrixNormal(loc, row, column)

    def model() -> None:
        pyro.sample("weight", prior)

    def guide() -> None:
        mean = pyro.param("mean", lambda: torch.zeros(2, 2, dtype=torch.float64))
        pyro.sample("weight", MatrixNormal(mean, row, column))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.TraceMeanField_ELBO())
    for _ in range(300):
        svi.step()
    assert_close(pyro.param("mean").detach(), loc, rtol=0, atol=1e-2)
    pyro.clear_param_store()


def test_to_event() -> None:
    d = random_matrix_normal(31, 3, 2, (5, 4))
    e = d.to_event(1)
    assert e.batch_shape == (5,)
    assert e.event_shape == (4, 3, 2)
    x = d.sample()
    assert_close(e.log_prob(x), d.log_prob(x).sum(-1), **TIGHT)
    prior = dist.Normal(torch.zeros(5, 4, 3, 2), 1.0)
    assert_close(kl_divergence(e, prior.to_event(3)), kl_divergence(d, prior.to_event(2)).sum(-1), **TIGHT)


def test_mask() -> None:
    d = random_matrix_normal(32, 3, 2, (4,))
    mask = torch.tensor([True, False, True, False])
    x = d.sample()
    assert_close(d.mask(mask).log_prob(x), d.log_prob(x) * mask, **TIGHT)
    other = random_matrix_normal(33, 3, 2, (4,))
    assert_close(kl_divergence(d.mask(mask), other.mask(mask)), kl_divergence(d, other) * mask, **TIGHT)


# Gradients


def matrix_normal_of(loc: Tensor, row: Tensor, column: Tensor) -> MatrixNormal:
    """The distribution for factors that gradcheck has nudged above the diagonal too."""
    return MatrixNormal(loc, row.tril(), column.tril())


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(
    "quantity",
    [
        lambda d: d.log_prob(torch.ones(3, 3, 2, dtype=torch.float64).cumsum(0).unsqueeze(1)),
        lambda d: d.entropy(),
        lambda d: d.variance,
        lambda d: d._transform(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)),
        lambda d: kl_divergence(d, dist.Normal(0.1, 0.5 * torch.ones(3, 2).double()).to_event(2)),
        lambda d: kl_divergence(d, random_matrix_normal(34, 3, 2)),
        lambda d: kl_divergence(random_matrix_normal(34, 3, 2), d),
    ],
    ids=["log_prob", "entropy", "variance", "rsample", "kl-diagonal", "kl-forward", "kl-reverse"],
)
def test_gradients(quantity: Callable[[MatrixNormal], Tensor], batch: tuple[int, ...]) -> None:
    parameters = [x.requires_grad_() for x in random_parameters(35, 3, 2, batch)]
    assert torch.autograd.gradcheck(lambda *args: quantity(matrix_normal_of(*args)), parameters)


def test_jacobians_of_a_sample_in_all_parameters() -> None:
    def sample(*parameters: Tensor) -> Tensor:
        torch.manual_seed(0)
        return MatrixNormal(*parameters).rsample()

    jacobians = torch.autograd.functional.jacobian(sample, random_parameters(36, 3, 2))
    assert_close(jacobians[0].reshape(6, 6), torch.eye(6, dtype=torch.float64))
    assert [bool(jacobian.any()) for jacobian in jacobians] == [True, True, True]


@pytest.mark.parametrize("make", [MatrixNormal.from_covariance, MatrixNormal.from_precision])
def test_gradients_through_the_classmethods(make: Callable[..., MatrixNormal]) -> None:
    def log_prob(loc: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # Symmetric products, so that gradcheck's nudges stay legal.
        return make(loc, row @ row.T, column @ column.T).log_prob(torch.ones(3, 2, dtype=torch.float64))

    assert torch.autograd.gradcheck(log_prob, [x.requires_grad_() for x in random_parameters(37, 3, 2)])


# Other constructors


@pytest.mark.parametrize("batch", [(), (4,), (5, 4)])
def test_from_covariance_and_from_precision_agree(batch: tuple[int, ...]) -> None:
    d = random_matrix_normal(38, 4, 3, batch)
    U, V = d.covariance_matrix_row, d.covariance_matrix_column
    for other in (
        MatrixNormal.from_covariance(d.loc, U, V),
        MatrixNormal.from_precision(d.loc, torch.linalg.inv(U), torch.linalg.inv(V)),
    ):
        assert other.batch_shape == batch
        assert_close(other.scale_tril_row, d.scale_tril_row, rtol=1e-8, atol=1e-8)
        assert_close(other.scale_tril_column, d.scale_tril_column, rtol=1e-8, atol=1e-8)


def test_classmethods_pass_validate_args_and_class() -> None:
    class Named(MatrixNormal):
        pass

    eye = torch.eye(2)
    for make in (Named.from_covariance, Named.from_precision):
        for validate_args in (True, False):
            d = make(torch.zeros(2, 2), eye, eye, validate_args)
            assert type(d) is Named
            assert d._validate_args is validate_args


# dtypes, copies, text


def test_float32() -> None:
    double = random_matrix_normal(39, 4, 3)
    single = MatrixNormal(double.loc.float(), double.scale_tril_row.float(), double.scale_tril_column.float())
    x = single.sample((5,))
    assert x.dtype == single.entropy().dtype == single.variance.dtype == torch.float32
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    assert single.log_prob(x).dtype == torch.float32
    assert_close(single.log_prob(x), double.log_prob(x.double()), **close)
    assert_close(single.entropy(), double.entropy(), **close)
    prior = dist.Normal(torch.zeros(4, 3), 1.0).to_event(2)
    assert kl_divergence(single, prior).dtype == torch.float32
    assert_close(kl_divergence(single, prior), kl_divergence(double, prior), **close)


def test_deepcopy_and_repr() -> None:
    d = random_matrix_normal(40, 3, 2)
    x = d.sample()
    assert torch.equal(copy.deepcopy(d).log_prob(x), d.log_prob(x))
    assert repr(d) == (
        "MatrixNormal(loc: torch.Size([3, 2]), scale_tril_row: torch.Size([3, 3]), "
        "scale_tril_column: torch.Size([2, 2]))"
    )


# Errors


@pytest.mark.parametrize(
    ("loc", "row", "column", "message"),
    [
        ((3,), (3, 3), (2, 2), r"loc has shape \(3,\)"),
        ((0, 2), (0, 0), (2, 2), r"loc has shape \(0, 2\)"),
        ((3, 2), (2, 2), (2, 2), r"ROW has shape \(2, 2\), but loc of shape \(3, 2\) has 3 rows.*\[\.\.\., 3, 3\]"),
        ((3, 2), (3, 3), (3, 3), r"COLUMN has shape \(3, 3\), but loc of shape \(3, 2\) has 2 columns"),
        ((3, 2), (3,), (2, 2), r"ROW has shape \(3,\)"),
        ((3, 2), (3, 3), (2, 1), r"COLUMN has shape \(2, 1\)"),
        ((4, 3, 2), (5, 3, 3), (2, 2), r"do not broadcast: loc \(4, 3, 2\), ROW \(5, 3, 3\), COLUMN \(2, 2\)"),
    ],
)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MatrixNormal, "scale_tril"),
        (MatrixNormal.from_covariance, "covariance"),
        (MatrixNormal.from_precision, "precision"),
    ],
)
@pytest.mark.parametrize("validate_args", [True, False])
def test_shape_errors(
    make: Callable[..., MatrixNormal],
    name: str,
    loc: tuple[int, ...],
    row: tuple[int, ...],
    column: tuple[int, ...],
    message: str,
    validate_args: bool,
) -> None:
    expected = message.replace("ROW", f"{name}_row").replace("COLUMN", f"{name}_column")
    with pytest.raises(ArgumentError, match=expected):
        make(torch.zeros(loc), torch.ones(row), torch.ones(column), validate_args=validate_args)


def test_dtypes_must_agree() -> None:
    with pytest.raises(ArgumentError, match=r"scale_tril_column is torch.float64 on cpu, but loc is torch.float32"):
        MatrixNormal(torch.zeros(2, 2), torch.eye(2), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("loc", torch.full((2, 2), math.nan)),
        ("scale_tril_row", torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        ("scale_tril_row", torch.tensor([[1.0, 0.0], [0.5, 0.0]])),
        ("scale_tril_column", torch.tensor([[-1.0, 0.0], [0.5, 1.0]])),
        ("scale_tril_column", torch.tensor([[1.0, 0.0], [math.nan, 1.0]])),
    ],
)
def test_values_are_validated(argument: str, value: Tensor) -> None:
    arguments = {"loc": torch.zeros(2, 2), "scale_tril_row": torch.eye(2), "scale_tril_column": torch.eye(2)}
    arguments[argument] = value
    with pytest.raises(ValueError, match=rf"Expected parameter {argument} .*of shape \(2, 2\)"):
        MatrixNormal(**arguments)
    MatrixNormal(**arguments, validate_args=False)


def test_log_prob_validates_its_value() -> None:
    d = random_matrix_normal(41, 3, 2, (4,))
    with pytest.raises(ValueError, match="must match event_shape"):
        d.log_prob(torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match="not broadcastable"):
        d.log_prob(torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full((3, 2), math.nan))


@pytest.mark.parametrize(
    ("make", "name"), [(MatrixNormal.from_covariance, "covariance"), (MatrixNormal.from_precision, "precision")]
)
def test_matrices_are_validated(make: Callable[..., MatrixNormal], name: str) -> None:
    loc, eye = torch.zeros(2, 2), torch.eye(2)
    with pytest.raises(ArgumentError, match=rf"{name}_row of shape \(2, 2\) is not symmetric"):
        make(loc, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), eye)
    with pytest.raises(ArgumentError, match=rf"{name}_column of shape \(2, 2\) is not symmetric and finite"):
        make(loc, eye, torch.full((2, 2), math.nan))
    with pytest.raises(NotPositiveDefiniteError, match=f"{name}_row"):
        make(loc, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), eye)


def test_kl_rejects_what_it_cannot_do() -> None:
    d = random_matrix_normal(42, 3, 2)
    ones = torch.ones(4, 3, 2)
    with pytest.raises(ArgumentError, match=r"two event dimensions.*to_event\(2\)"):
        kl_divergence(d, dist.Normal(0.0, ones).to_event(3))
    with pytest.raises(ArgumentError, match="two event dimensions"):
        kl_divergence(d, dist.Normal(0.0, ones).to_event(1))
    with pytest.raises(ArgumentError, match="Laplace"):
        kl_divergence(d, dist.Laplace(0.0, ones).to_event(2))
    with pytest.raises(ArgumentError, match=r"Normal\) got event shapes \(3, 2\) and \(2, 3\)"):
        kl_divergence(d, dist.Normal(0.0, torch.ones(2, 3)).to_event(2))
    with pytest.raises(ArgumentError, match=r"MatrixNormal\) got event shapes \(3, 2\) and \(2, 3\)"):
        kl_divergence(d, random_matrix_normal(42, 2, 3))
    with pytest.raises(NotImplementedError):
        kl_divergence(d, dist.Normal(0.0, ones))
    with pytest.raises(NotImplementedError):
        kl_divergence(d, dense(d))


# Properties

few = settings(deadline=None, max_examples=30)
sizes = st.integers(1, 4)


def arrays(*shape: int, low: float = -1.0, high: float = 1.0) -> st.SearchStrategy[Tensor]:
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high)).map(torch.from_numpy)


@st.composite
def trils(draw: st.DrawFn, size: int) -> Tensor:
    return draw(arrays(size, size)).tril(-1) + torch.diag(draw(arrays(size, low=0.5, high=2.0)))


@st.composite
def matrix_normals(draw: st.DrawFn, n: int, p: int) -> MatrixNormal:
    return MatrixNormal(draw(arrays(n, p)), draw(trils(n)), draw(trils(p)))


@few
@given(st.data(), sizes, sizes)
def test_property_log_prob_equals_dense(data: st.DataObject, n: int, p: int) -> None:
    d = data.draw(matrix_normals(n, p))
    x = data.draw(arrays(n, p, low=-3, high=3))
    reference = MultivariateNormal(d.loc.flatten(), scale_tril=torch.kron(d.scale_tril_row, d.scale_tril_column))
    assert_close(d.log_prob(x), reference.log_prob(x.flatten()), **TIGHT)


@few
@given(st.data(), sizes, sizes)
def test_property_kl_is_zero_of_equals_and_never_negative(data: st.DataObject, n: int, p: int) -> None:
    a, b = data.draw(matrix_normals(n, p)), data.draw(matrix_normals(n, p))
    prior = dist.Normal(data.draw(arrays(n, p)), data.draw(arrays(n, p, low=0.1, high=3.0))).to_event(2)
    assert_close(kl_divergence(a, a), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)
    assert kl_divergence(a, b) >= 0
    assert kl_divergence(a, prior) >= 0


@few
@given(st.data(), sizes, sizes)
def test_property_affine_invariance(data: st.DataObject, n: int, p: int) -> None:
    """``Y = A X Bᵀ + C`` keeps divergences, and log densities up to the log Jacobian determinant."""
    A, B, C = data.draw(trils(n)), data.draw(trils(p)), data.draw(arrays(n, p))

    def transform(d: MatrixNormal) -> MatrixNormal:
        return MatrixNormal(A @ d.loc @ B.T + C, A @ d.scale_tril_row, B @ d.scale_tril_column)

    a, b = data.draw(matrix_normals(n, p)), data.draw(matrix_normals(n, p))
    x = data.draw(arrays(n, p, low=-3, high=3))
    log_jacobian = p * A.diagonal().log().sum() + n * B.diagonal().log().sum()
    assert_close(transform(a).log_prob(A @ x @ B.T + C) + log_jacobian, a.log_prob(x), **TIGHT)
    assert_close(kl_divergence(transform(a), transform(b)), kl_divergence(a, b), **TIGHT)
