"""Factorisations: right where plain LAPACK is right, stubborn where it gives up, and clear where nothing helps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bayes_kfac import linalg
from bayes_kfac.errors import BayesKfacError, NotPositiveDefiniteError
from tests.helpers import TIGHT, dense_kron, randn, random_spd, rng

NAN, INF = math.nan, math.inf


def rank_deficient(size: int, rank: int) -> torch.Tensor:
    """A float32 Gram matrix of few examples, as in the first steps of training."""
    inputs = torch.randn(rank, size, generator=rng(0))
    return inputs.T @ inputs


# Small tools


def test_symmetrize_keeps_the_symmetric_part_only():
    matrix = randn(2, 3, 3, seed=0)
    assert_close(linalg.symmetrize(matrix), (matrix + matrix.transpose(1, 2)) / 2, **TIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_in_any_tensor(value):
    tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.zeros(0)]
    assert linalg.all_finite(tensors)
    assert linalg.all_finite([])
    tensors[1][1, 0] = value
    assert not linalg.all_finite(tensors)
    assert not linalg.all_finite([torch.tensor([math.inf, -math.inf])])


def test_numbers_whose_sum_overflows_are_finite():
    assert linalg.all_finite([torch.full((4,), 3e38)])


def test_trace_is_of_each_matrix():
    matrix = randn(2, 3, 3, seed=0)
    assert_close(linalg.trace(matrix), torch.stack([torch.trace(one) for one in matrix]), **TIGHT)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_add_to_diagonal_adds_to_the_diagonal_of_a_copy(stack):
    matrix = random_spd(*stack, 3, seed=0)
    before, value = matrix.clone(), randn(*stack, seed=1)
    result = linalg.add_to_diagonal(matrix, value)
    assert_close(result, before + value[..., None, None] * torch.eye(3, dtype=torch.float64), **TIGHT)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_kron_equals_torch_kron_for_rectangular_matrices(stack):
    left, right = randn(*stack, 2, 3, seed=0), randn(*stack, 4, 5, seed=1)
    assert_close(linalg.kron(left, right), dense_kron(left, right), **TIGHT)


# Diagonal factors, kept as one row


def pair(*stack: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A positive diagonal factor of size 3 as it is kept, ``[*stack, 1, 3]``, and as matrices."""
    row = 0.1 + randn(*stack, 1, 3, seed=seed).square()
    return row, torch.diag_embed(row.squeeze(-2))


@pytest.mark.parametrize("stack", [(), (2,), (2, 4)])
def test_every_function_of_a_factor_takes_a_diagonal_one(stack):
    """What comes out is the same function of the matrix, diagonal where that is."""
    row, matrix = pair(*stack)
    value = randn(*stack, 3, 3, seed=1)
    scalar = randn(*stack, seed=2).square()
    assert linalg.is_diagonal(row)
    assert not linalg.is_diagonal(matrix)
    assert_close(linalg.left_product(row, value), matrix @ value, **TIGHT)
    assert_close(linalg.right_product(value, row), value @ matrix, **TIGHT)
    assert torch.equal(linalg.dense(row), matrix)
    assert torch.equal(linalg.dense(linalg.transpose(row)), matrix.mT)
    assert_close(linalg.dense(linalg.gram(row)), matrix @ matrix.mT, **TIGHT)
    assert torch.equal(linalg.diagonal(row), matrix.diagonal(dim1=-2, dim2=-1))
    assert_close(linalg.trace(row), linalg.trace(matrix), **TIGHT)
    assert_close(linalg.dense(linalg.add_to_diagonal(row, scalar)), linalg.add_to_diagonal(matrix, scalar), **TIGHT)
    assert_close(linalg.dense(linalg.plus(row, row)), 2 * matrix, **TIGHT)
    assert_close(linalg.plus(value, row), value + matrix, **TIGHT)
    assert_close(linalg.dense(linalg.inverse_cholesky(row, ["words"])), torch.linalg.inv(matrix).sqrt(), **TIGHT)
    values, vectors = linalg.eigh(row, ["words"])
    assert torch.equal(values, matrix.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(linalg.dense(vectors), torch.eye(3, dtype=torch.float64).expand_as(matrix))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_the_same_functions_of_a_dense_factor_are_those_of_matrices(stack):
    factor, value = randn(*stack, 3, 3, seed=0), randn(*stack, 3, 3, seed=1)
    assert torch.equal(linalg.left_product(factor, value), factor @ value)
    assert torch.equal(linalg.right_product(value, factor), value @ factor)
    assert torch.equal(linalg.transpose(factor), factor.mT)
    assert torch.equal(linalg.gram(factor), factor @ factor.mT)
    assert torch.equal(linalg.diagonal(factor), factor.diagonal(dim1=-2, dim2=-1))
    assert linalg.dense(factor) is factor


def factors(size: int, forms: str, *stack: int, seed: int = 0) -> list[torch.Tensor]:
    """Factors of one size, each dense (``"d"``) or kept as its diagonal (``"-"``); of both signs."""
    shapes = {"d": (size, size), "-": (1, size)}
    return [randn(*stack, *shapes[form], seed=seed + i) for i, form in enumerate(forms)]


SIZES, STACKS, FACTOR_SEEDS = st.integers(2, 5), st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 2**31 - 1)


@given(size=SIZES, stack=STACKS, seed=FACTOR_SEEDS, forms=st.sampled_from(["dd", "d-", "-d", "--"]))
def test_a_congruence_is_the_roots_transpose_times_the_factor_times_the_root(size, stack, seed, forms):
    """``Rᵀ F R`` in every combination of forms; ``F`` need not be symmetric, and ``R`` is not."""
    factor, root = factors(size, forms, *stack, seed=seed)
    result = linalg.congruence(factor, root)
    assert linalg.is_diagonal(result) == (forms == "--")
    expected = linalg.dense(root).mT @ linalg.dense(factor) @ linalg.dense(root)
    assert_close(linalg.dense(result), expected, **TIGHT)


@given(size=SIZES, stack=STACKS, seed=FACTOR_SEEDS, forms=st.sampled_from(["dd", "d-", "-d", "--"]))
def test_a_product_of_factors_is_that_of_their_matrices_in_this_order(size, stack, seed, forms):
    left, right = factors(size, forms, *stack, seed=seed)
    result = linalg.product(left, right)
    assert linalg.is_diagonal(result) == (forms == "--")
    assert_close(linalg.dense(result), linalg.dense(left) @ linalg.dense(right), **TIGHT)


@given(size=SIZES, stack=STACKS, seed=FACTOR_SEEDS, forms=st.sampled_from(["dd", "d-", "-d", "--"]))
def test_a_quotient_of_factors_times_its_divisor_is_the_dividend(size, stack, seed, forms):
    left, right = factors(size, forms, *stack, seed=seed)
    eye = torch.eye(size, dtype=torch.float64)
    left = left.tril(-1) + (0.5 + left.abs()) * eye if forms[0] == "d" else 0.5 + left.abs()
    result = linalg.quotient(left, right)
    assert linalg.is_diagonal(result) == (forms == "--")
    assert_close(linalg.dense(linalg.product(left, result)), linalg.dense(right), rtol=1e-9, atol=1e-9)


@given(
    size=SIZES,
    stack=STACKS,
    seed=FACTOR_SEEDS,
    form=st.sampled_from("d-"),
    transposed=st.booleans(),
    leading=st.sampled_from([(), (4,), (4, 1)]),
    columns=st.integers(1, 4),
)
def test_left_solve_is_the_inverse_of_a_triangular_factor(size, stack, seed, form, transposed, leading, columns):
    """Or of its transpose; of values with leading dimensions of their own."""
    (factor,) = factors(size, form, *stack, seed=seed)
    eye = torch.eye(size, dtype=torch.float64)
    factor = factor.tril(-1) + (0.5 + factor.abs()) * eye if form == "d" else 0.5 + factor.abs()
    value = randn(*leading, *stack, size, columns, seed=seed + 1)
    matrix = linalg.dense(factor)
    expected = torch.linalg.solve(matrix.mT if transposed else matrix, value)
    assert_close(linalg.left_solve(factor, value, transposed=transposed), expected, rtol=1e-9, atol=1e-9)


def test_left_solve_reads_the_lower_triangle_only():
    """What a Cholesky factorisation may have left above it does not matter."""
    factor, value = torch.linalg.cholesky(random_spd(3, seed=0)), randn(3, 2, seed=1)
    for transposed in (False, True):
        clean = linalg.left_solve(factor, value, transposed=transposed)
        assert torch.equal(linalg.left_solve(factor + randn(3, 3, seed=2).triu(1), value, transposed=transposed), clean)


@given(size=SIZES, stack=STACKS, seed=FACTOR_SEEDS, form=st.sampled_from("d-"))
def test_a_triangular_root_is_the_cholesky_factor_of_the_roots_square(size, stack, seed, form):
    (root,) = factors(size, form, *stack, seed=seed)
    root = root + 0.5 * torch.eye(size, dtype=torch.float64) if form == "d" else root
    lower = linalg.triangular_root(root)
    matrix, result = linalg.dense(root), linalg.dense(lower)
    assert linalg.is_diagonal(lower) == (form == "-")
    assert torch.equal(result, result.tril())
    assert bool((linalg.diagonal(lower) >= 0).all())
    assert_close(result @ result.mT, matrix @ matrix.mT, **TIGHT)


def test_the_triangular_root_of_a_cholesky_factor_is_itself():
    factor = torch.linalg.cholesky(random_spd(2, 4, seed=0))
    assert_close(linalg.triangular_root(factor), factor, **TIGHT)


@pytest.mark.parametrize("form", "d-")
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_root_of_a_power_is_one_of_the_squares_power(stack, form):
    (root,) = factors(3, form, *stack)
    square = linalg.dense(linalg.gram(root))
    assert_close(linalg.dense(linalg.gram(linalg.root_of_power(root, 1.0))), square, **TIGHT)
    half = linalg.dense(linalg.gram(linalg.root_of_power(root, 0.5)))
    assert_close(half @ half, square, **TIGHT)


def test_a_root_of_a_power_keeps_the_small_eigenvalues_in_float32():
    """A covariance with eigenvalues from 1 to 1e-9; written out in float32 it has lost the last."""
    basis, values = torch.linalg.qr(randn(9, 9, seed=0))[0], torch.logspace(0, -9, 9, dtype=torch.float64)
    root = linalg.triangular_root(basis * values.sqrt()).float()
    half = linalg.root_of_power(root, 0.5)
    assert half.dtype == torch.float32
    found = (basis.mT @ half.double()).square().sum(-1)
    assert_close(found, values.sqrt(), rtol=0.01, atol=0.0)


@given(size=SIZES, seed=FACTOR_SEEDS, forms=st.sampled_from(["dd", "d-", "-d", "--"]))
def test_functions_of_two_factors_leave_them_alone(size, seed, forms):
    left, right = factors(size, forms, 2, seed=seed)
    before = left.clone(), right.clone()
    linalg.congruence(left, right), linalg.product(left, right), linalg.triangular_root(left)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_of_size_one_both_forms_of_a_factor_are_one():
    factor, value = torch.tensor([[4.0]]), torch.tensor([[3.0]])
    assert not linalg.is_diagonal(factor)
    assert linalg.left_product(factor, value).item() == linalg.right_product(value, factor).item() == 12
    assert linalg.inverse_cholesky(factor, ["word"]).item() == 0.5
    assert linalg.product(factor, value).item() == linalg.left_product(factor, value).item()
    assert linalg.congruence(factor, value).item() == 36
    assert linalg.left_solve(factor, value).item() == linalg.left_solve(factor, value, transposed=True).item() == 0.75
    assert linalg.triangular_root(-factor).item() == 4


def test_a_diagonal_factor_is_not_changed():
    row, _ = pair(2)
    before = row.clone()
    linalg.add_to_diagonal(row, torch.ones(2).double())
    linalg.inverse_cholesky(row, ["words"])
    linalg.eigh(row, ["words"])
    assert torch.equal(row, before)


def test_eigh_clamps_the_elements_of_a_diagonal_factor_at_zero():
    values, _ = linalg.eigh(torch.tensor([[-1e-9, 2.0, 1.0]]), ["words"])
    assert torch.equal(values, torch.tensor([0.0, 2.0, 1.0]))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("factorise", [linalg.inverse_cholesky, linalg.eigh])
def test_a_diagonal_factor_with_nan_is_an_error_that_names_its_layer(factorise, value):
    rows = torch.ones(2, 1, 3)
    rows[1, 0, 2] = value
    with pytest.raises(NotPositiveDefiniteError, match=r"for 'words': the matrix holds NaN or infinity"):
        factorise(rows, ["first", "words"])


def test_a_diagonal_factor_that_is_not_positive_is_an_error_that_names_its_layer():
    rows = torch.tensor([[[1.0, 2.0]], [[1.0, 0.0]]])
    with pytest.raises(NotPositiveDefiniteError, match=r"for 'words'.*smallest diagonal element is 0.*prior_precision"):
        linalg.inverse_cholesky(rows, ["first", "words"])


# Cholesky


@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
def test_cholesky_of_a_well_conditioned_matrix_is_lapacks(stack):
    matrix = random_spd(*stack, 4, seed=0)
    factor = linalg.cholesky(matrix, ["layer"])
    assert torch.equal(factor, torch.linalg.cholesky(matrix))


def test_cholesky_succeeds_where_float32_rounding_makes_plain_cholesky_fail():
    matrix = rank_deficient(64, 8)
    assert torch.linalg.cholesky_ex(matrix).info != 0
    factor = linalg.cholesky(matrix, ["layer"])
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.tril())
    assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-4 * float(matrix.trace()))


def test_cholesky_goes_to_float64_where_float32_fails_with_jitter_too(monkeypatch):
    matrix, tried = rank_deficient(64, 8), []

    def only_float64(attempt):
        tried.append(attempt.dtype)
        factor, info = plain(attempt)
        return factor, info if attempt.dtype == torch.float64 else torch.ones_like(info)

    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", only_float64)
    factor = linalg.cholesky(matrix, ["layer"])
    assert tried[:3] == [torch.float32, torch.float32, torch.float64]
    assert factor.dtype == torch.float32
    assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-4)


def test_cholesky_reads_the_symmetric_part():
    """Rounding leaves factors slightly asymmetric; neither triangle is preferred."""
    matrix = random_spd(4, seed=0)
    skew = 1e-3 * (randn(4, 4, seed=1).triu(1))
    assert_close(linalg.cholesky(matrix + skew - skew.T, ["layer"]), torch.linalg.cholesky(matrix), **TIGHT)


def test_cholesky_does_not_change_its_argument():
    matrix = rank_deficient(64, 8)
    before = matrix.clone()
    linalg.cholesky(matrix, ["layer"])
    assert torch.equal(matrix, before)


def test_the_error_names_the_layers_that_failed_and_only_those():
    good, bad = random_spd(3, seed=0), -torch.eye(3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite") as caught:
        linalg.cholesky(torch.stack([good, bad, good, bad]), ["first", "second", "third", "fourth"])
    message = str(caught.value)
    assert "'second', 'fourth'" in message
    assert "first" not in message
    assert "third" not in message
    assert "prior_precision" in message
    assert "NaN" not in message


def test_the_error_names_a_layer_with_stacked_blocks_once():
    blocks = torch.stack([random_spd(3, seed=0), -torch.eye(3, dtype=torch.float64)])
    with pytest.raises(NotPositiveDefiniteError, match="for 'conv2' in"):
        linalg.cholesky(torch.stack([random_spd(2, 3, seed=1), blocks]), ["conv1", "conv2"])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [(0, 0), (2, 1)])
@pytest.mark.parametrize("factorise", [linalg.cholesky, linalg.inverse_cholesky, linalg.eigh])
def test_the_error_says_nan_where_there_is_nan(factorise, value, where):
    matrix = random_spd(3, seed=0)
    matrix[where] = value
    matrix[where[::-1]] = value
    with pytest.raises(NotPositiveDefiniteError, match=r"'decoder\.0': the matrix holds NaN or infinity"):
        factorise(matrix.unsqueeze(0), ["decoder.0"])


def test_the_error_is_arithmetic_and_the_librarys_own():
    with pytest.raises(BayesKfacError) as caught:
        linalg.cholesky(-torch.eye(2)[None], ["layer"])
    assert isinstance(caught.value, ArithmeticError)


# Inverse roots


@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_inverse_cholesky_is_a_lower_root_of_the_inverse(stack, size):
    precision = random_spd(*stack, size, seed=size)
    root = linalg.inverse_cholesky(precision, ["layer"])
    assert torch.equal(root, root.tril())
    assert bool((root.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert_close(root @ root.mT, torch.linalg.inv(precision), **TIGHT)
    assert_close(root, torch.linalg.cholesky(torch.linalg.inv(precision)), **TIGHT)


def test_inverse_cholesky_of_an_ill_conditioned_float32_matrix_is_finite():
    root = linalg.inverse_cholesky(rank_deficient(64, 8), ["layer"])
    assert root.dtype == torch.float32
    assert bool(torch.isfinite(root).all())


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("damping", ["row", "matrix"])
def test_a_damped_inverse_root_is_that_of_the_sum(stack, damping):
    factor, (row, matrix) = random_spd(*stack, 3, seed=0), pair(*stack)
    root = linalg.damped_inverse_cholesky(factor, ["layer"], row if damping == "row" else matrix)
    assert torch.equal(root, linalg.inverse_cholesky(factor + matrix, ["layer"]))
    assert_close(linalg.damped_inverse_cholesky(row, ["layer"], row), linalg.inverse_cholesky(2 * row, ["layer"]))


@pytest.mark.parametrize("damping", ["row", "matrix"])
@pytest.mark.parametrize("scale", [1e8, 1e10, 1e14])
def test_damping_counts_where_float32_rounding_outweighs_it(scale, damping):
    """Where there is no data its variance is not exceeded, nor lost but for the rounding that narrows it."""
    inputs = torch.randn(8, 32, generator=rng(0))
    row = torch.logspace(-2, 2, 32)[None]
    factor = (inputs.T @ inputs) * row.sqrt() * row.sqrt().mT * scale
    assert torch.linalg.cholesky_ex((factor + torch.diag(row[0])).flip(-2, -1)).info > 0
    root = linalg.damped_inverse_cholesky(factor, ["layer"], row if damping == "row" else torch.diag(row[0]))
    assert root.dtype == torch.float32
    assert torch.equal(root, root.tril())
    white = (root * row.mT.sqrt()).double()  # in the coordinates in which the damping is one
    covariance = white @ white.mT
    assert torch.linalg.eigvalsh(covariance)[-1] < 1.001
    basis = torch.linalg.svd(inputs.double()).Vh
    assert ((basis[8:] @ white).square().sum(-1)).mean() > 0.2
    exact = (basis[:8].mT * (1 / (1 + scale * torch.linalg.svdvals(inputs.double()) ** 2))) @ basis[:8]
    x = inputs.double()
    # that little of the root, whose largest element is about one, is its own rounding
    assert_close((x @ white).square().sum(-1), ((x @ exact) * x).sum(-1), rtol=0.01, atol=1e-12)


@pytest.mark.parametrize("damping", ["row", "matrix"])
@pytest.mark.parametrize("share", [0.4, 0.9, 0.99, 0.9999, 1.1])
def test_rounding_that_cancels_the_damping_is_left_out(share, damping):
    """A negative eigenvalue near ``-D`` leaves almost nothing of a direction's precision, though no root fails."""
    basis = torch.linalg.qr(torch.randn(40, 40, generator=rng(0), dtype=torch.float64))[0]
    row = torch.logspace(-5, -3, 40, dtype=torch.float64)[None]
    white = torch.logspace(2, 6, 40, dtype=torch.float64).index_fill(0, torch.tensor([0]), -share)
    factor = ((basis * white) @ basis.mT) * row.sqrt() * row.sqrt().mT
    matrix = row if damping == "row" else torch.diag(row[0])
    covariance = linalg.gram(linalg.damped_inverse_cholesky(factor, ["layer"], matrix) * row.mT.sqrt())
    largest = torch.linalg.eigvalsh(covariance)[-1]
    assert_close(largest, torch.tensor(1 / (1 - share) if share < 0.5 else 1.0).double(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["factor", "damping"])
def test_a_damped_inverse_root_of_what_is_not_finite_is_an_error_that_names_the_layer(place, value):
    tensors = {"factor": random_spd(2, 3, seed=0), "damping": torch.ones(2, 1, 3, dtype=torch.float64)}
    tensors[place][1, 0, 0] = value
    with pytest.raises(NotPositiveDefiniteError, match=r"failed for 'second'.*NaN or infinity"):
        linalg.damped_inverse_cholesky(tensors["factor"], ["first", "second"], tensors["damping"])


# Eigendecompositions


@pytest.mark.parametrize("stack", [(), (3,)])
def test_eigh_reconstructs_with_eigenvectors_as_columns(stack):
    matrix = random_spd(*stack, 4, seed=0)
    values, vectors = linalg.eigh(matrix, ["layer"])
    assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, matrix, **TIGHT)
    assert_close(vectors.mT @ vectors, torch.eye(4, dtype=torch.float64).expand_as(matrix), **TIGHT)
    assert bool((values.diff(dim=-1) >= 0).all())


def test_eigh_clamps_rounding_below_zero():
    matrix = rank_deficient(64, 8)
    assert bool((torch.linalg.eigvalsh(matrix) < 0).any())
    values, vectors = linalg.eigh(matrix, ["layer"])
    assert values.dtype == vectors.dtype == torch.float32
    assert bool((values >= 0).all())
    assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-4)


# Batching by shape


def test_map_by_shape_calls_once_for_each_shape_and_keeps_the_order():
    shapes = [(2, 2), (3, 3), (2, 2), (2, 3, 3), (3, 3), (2, 2)]
    matrices = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    names = list("abcdef")
    calls = []

    def double_and_name(stack, members):
        calls.append((tuple(stack.shape), list(members)))
        return 2 * stack, torch.tensor([ord(member) for member in members])

    results = linalg.map_by_shape(double_and_name, matrices, names)
    assert calls == [((3, 2, 2), ["a", "c", "f"]), ((2, 3, 3), ["b", "e"]), ((1, 2, 3, 3), ["d"])]
    for matrix, name, (doubled, letter) in zip(matrices, names, results, strict=True):
        assert torch.equal(doubled, 2 * matrix)
        assert letter == ord(name)


def test_map_by_shape_keeps_dtypes_apart():
    matrices = [torch.eye(2), torch.eye(2, dtype=torch.float64), torch.eye(2)]
    results = linalg.map_by_shape(lambda stack, _: (stack,), matrices, ["a", "b", "c"])
    assert [result.dtype for (result,) in results] == [torch.float32, torch.float64, torch.float32]


def test_map_by_shape_stacks_what_else_there_is_and_tells_its_shapes_apart():
    matrices, others = [torch.eye(2)] * 3, [torch.zeros(2), torch.zeros(3), torch.ones(2)]
    seen = []

    def shape(stack, names, other):
        seen.append((stack.shape, names, other.shape))
        return (other,)

    results = linalg.map_by_shape(shape, matrices, ["a", "b", "c"], others)
    assert seen == [((2, 2, 2), ["a", "c"], (2, 2)), ((1, 2, 2), ["b"], (1, 3))]
    assert all(torch.equal(result, other) for (result,), other in zip(results, others, strict=True))


def test_map_by_shape_of_nothing_is_nothing():
    assert linalg.map_by_shape(lambda stack, _: (stack,), [], []) == []
