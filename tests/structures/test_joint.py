"""The Gaussian over all layers: every ability equals that of the dense Gaussian ``T diag(Λ) Tᵀ``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics, find_layers
from bayes_kfac.structures import (
    BlockGaussian,
    BlockSpec,
    DenseGaussian,
    DiagonalGaussian,
    JointGaussian,
    KroneckerEigenGaussian,
    Link,
    MatrixNormalGaussian,
)
from tests.helpers import TIGHT, randn, random_spd, rng
from tests.joints import as_vector, dense_covariance, unit_values

SHAPES = {"a": (3, 2), "b": (2, 4), "c": (4, 3), "d": (1, 5)}


def matrix_normal(out: int, in_: int, seed: int) -> BlockGaussian:
    return MatrixNormalGaussian(*(torch.linalg.cholesky(random_spd(n, seed=seed + n)) for n in (out, in_)))


def blocks() -> dict[str, BlockGaussian]:
    """One of each kind."""
    volume = randn(3, 3, seed=5), randn(2, 2, seed=6)
    log_volume = 2 * volume[0].det().abs().log() + 3 * volume[1].det().abs().log()
    return {
        "a": KroneckerEigenGaussian(*volume, randn(3, 2, seed=7).square() + 0.1, log_volume),
        "b": matrix_normal(2, 4, seed=0),
        "c": _dense(4, 3),
        "d": DiagonalGaussian(randn(1, 5, seed=8).square() + 0.2),
    }


def _dense(out: int, in_: int) -> BlockGaussian:
    rows = Rows(randn(30, 1, in_, seed=1), randn(1, 30, 1, out, seed=2))
    structure = structures.get("dense", damping="exact", sharing="expand")
    (gaussian,) = structure.gaussians([BlockSpec("c", structure.measure(rows), 4.0, 1.0)])
    assert isinstance(gaussian, DenseGaussian)
    return gaussian


def link(name: str, to: str, seed: int) -> Link:
    (out, in_), (out_next, in_next) = SHAPES[name], SHAPES[to]
    row, column = randn(out, out_next, seed=seed), randn(in_, in_next, seed=seed + 1)
    return Link(to, row, column, torch.ones((), dtype=torch.float64))


LINKS = {
    "independent": {},
    "chain": {"a": ("b", 10), "b": ("c", 12), "c": ("d", 14)},
    "a pair": {"b": ("c", 12)},
    "over a layer": {"a": ("c", 10), "c": ("d", 14)},
    "two to one": {"a": ("c", 10), "b": ("c", 12)},
}


@pytest.fixture(params=LINKS)
def gaussian(request: pytest.FixtureRequest) -> JointGaussian:
    return JointGaussian(blocks(), {name: link(name, *rest) for name, rest in LINKS[request.param].items()})


@pytest.fixture
def chain() -> JointGaussian:
    return JointGaussian(blocks(), {name: link(name, *rest) for name, rest in LINKS["chain"].items()})


def random_values(*leading: int, seed: int) -> dict[str, Tensor]:
    return {name: randn(*leading, *shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


def rows_of(names: str, *, batch: int = 3, columns: int = 2, shared: int = 1, seed: int = 0) -> dict[str, Rows]:
    return {
        name: Rows(
            randn(batch, shared, SHAPES[name][1], seed=seed + 2 * i),
            randn(columns, batch, shared, SHAPES[name][0], seed=seed + 2 * i + 1),
        )
        for i, name in enumerate(names)
    }


def jacobians(rows: dict[str, Rows]) -> Tensor:
    """``[batch, columns, weights]``; zero for layers without rows."""
    columns, batch = next(iter(rows.values())).gradients.shape[:2]
    zeros = {name: torch.zeros(columns, batch, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return as_vector({**zeros, **{name: own.jacobians() for name, own in rows.items()}}).movedim(0, 1)


# The Gaussian


def test_sample_is_a_linear_map_whose_square_is_the_covariance(gaussian):
    B = as_vector(gaussian.sample(unit_values(gaussian))).mT
    assert_close(B @ B.mT, dense_covariance(gaussian), **TIGHT)


def test_whiten_is_the_adjoint_of_sample(gaussian):
    B = as_vector(gaussian.sample(unit_values(gaussian))).mT
    assert_close(as_vector(gaussian.whiten(unit_values(gaussian))).mT, B.mT, **TIGHT)


def test_solve_is_the_covariance_and_multiply_its_inverse(gaussian):
    covariance = dense_covariance(gaussian)
    assert_close(as_vector(gaussian.solve(unit_values(gaussian))).mT, covariance, **TIGHT)
    assert_close(
        as_vector(gaussian.multiply(unit_values(gaussian))).mT, torch.linalg.inv(covariance), rtol=1e-9, atol=1e-9
    )


def test_maps_take_any_leading_dimensions_and_are_differentiable(gaussian):
    value = random_values(5, 2, seed=3)
    for function in (gaussian.sample, gaussian.whiten, gaussian.solve, gaussian.multiply):
        whole = function(value)
        alone = function({name: own[3, 1] for name, own in value.items()})
        for name, own in whole.items():
            assert_close(own[3, 1], alone[name], **TIGHT)

    def through(*own: Tensor) -> Tensor:
        return as_vector(gaussian.multiply(dict(zip(SHAPES, own, strict=True))))

    assert torch.autograd.gradcheck(through, [own[0, 0].requires_grad_() for own in value.values()])


@pytest.mark.parametrize("function", ["sample", "whiten", "solve", "multiply"])
def test_layers_that_are_missing_are_zero(chain, function):
    """A layer without a gradient, or that a forward pass did not use."""
    value = random_values(seed=3)
    for missing in SHAPES:
        zeros = {**value, missing: torch.zeros_like(value[missing])}
        some = {name: own for name, own in value.items() if name != missing}
        expected = getattr(chain, function)(zeros)
        for name, own in getattr(chain, function)(some).items():
            assert_close(own, expected[name], **TIGHT)


def test_logdet_is_of_the_precision(gaussian):
    assert_close(gaussian.logdet(), -torch.linalg.slogdet(dense_covariance(gaussian)).logabsdet, **TIGHT)


def test_marginal_variances_are_the_diagonal_of_the_covariance(gaussian):
    variances = gaussian.marginal_variance()
    assert {name: own.shape for name, own in variances.items()} == SHAPES
    assert_close(as_vector(variances), dense_covariance(gaussian).diagonal(), **TIGHT)


def test_kl_is_torchs_between_dense_gaussians(gaussian):
    """Under priors of a layer and of single weights."""
    priors = {"a": 0.3, "b": 2.0, "c": randn(4, 3, seed=9).exp(), "d": 1.0}
    means = random_values(seed=4)
    precision = as_vector(
        {name: torch.as_tensor(priors[name], dtype=torch.float64).expand(s) for name, s in SHAPES.items()}
    )
    covariance = dense_covariance(gaussian)
    q = torch.distributions.MultivariateNormal(as_vector(means), covariance)
    p = torch.distributions.MultivariateNormal(torch.zeros_like(precision), precision_matrix=precision.diag())
    assert_close(gaussian.kl(means, priors), torch.distributions.kl_divergence(q, p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", ["abcd", "abd", "bc", "d", "a", "c"])
@pytest.mark.parametrize(("shared", "columns"), [(1, 1), (1, 3), (3, 2)])
def test_whitened_rows_give_the_covariance_of_outputs(gaussian, names, shared, columns):
    """``J P⁻¹ Jᵀ`` within examples and between them, whichever layers a forward pass used."""
    rows = rows_of(names, shared=shared, columns=columns)
    others = rows_of("abcd", shared=shared, columns=2, batch=2, seed=30)
    J, K, covariance = jacobians(rows), jacobians(others), dense_covariance(gaussian)
    white, theirs = gaussian.whitened(rows), gaussian.whitened(others)
    within = sum(own.covariance() for own in white.values())
    assert_close(within, J @ covariance @ J.mT, rtol=1e-9, atol=1e-9)
    assert_close(sum(own.variance() for own in white.values()), within.diagonal(dim1=-2, dim2=-1), **TIGHT)
    between = sum(own.between(theirs[name]) for name, own in white.items() if name in theirs)
    assert_close(between, torch.einsum("nci,ij,mdj->nmcd", J, covariance, K), rtol=1e-9, atol=1e-9)


def test_rows_of_an_output_layer_that_all_examples_share(chain):
    """Unit gradients are kept once for all examples; through a link they are the next layer's, each with its input."""
    rows = rows_of("abc")
    unit = torch.eye(1, dtype=torch.float64).reshape(1, 1, 1, 1).expand(1, 3, 1, 1)
    rows = {name: Rows(own.inputs, own.gradients[:1]) for name, own in rows.items()}
    rows["d"] = Rows(randn(3, 1, 5, seed=20), unit)
    J = jacobians(rows)
    within = sum(own.covariance() for own in chain.whitened(rows).values())
    assert_close(within, J @ dense_covariance(chain) @ J.mT, rtol=1e-9, atol=1e-9)


def test_a_block_is_its_layer_given_the_layers_before_it(chain):
    covariance, start = dense_covariance(chain), 0
    for block in chain.values():
        stop = start + math.prod(block.shape)
        given, own = covariance[:start, :start], covariance[start:stop, start:stop]
        across = covariance[start:stop, :start]
        conditional = own - across @ torch.linalg.solve(given, across.mT)
        assert_close(conditional, torch.linalg.inv(block.to_dense()), rtol=1e-8, atol=1e-8)
        start = stop


# As a mapping


def test_without_links_it_is_its_blocks():
    own = blocks()
    joint = JointGaussian(own)
    assert dict(joint) == own
    assert list(joint) == list(SHAPES)
    assert len(joint) == 4
    assert JointGaussian.of(joint) is joint
    assert not any(joint.is_linked(name) for name in joint)
    noise = joint.standard_normal(rng(0), (2,))
    for name, sampled in joint.sample(noise).items():
        assert torch.equal(sampled, own[name].sample(noise[name]))


def test_links_of_layers_that_are_gone_are_left_out(chain):
    """As where a layer was frozen in mid-training, until the next refresh."""
    rest = JointGaussian({name: chain[name] for name in "abd"}, chain.links)
    assert set(rest.links) == {"a"}
    assert [name for name in rest if rest.is_linked(name)] == ["a", "b"]


def test_it_moves_as_a_whole(chain):
    single = chain.to(torch.float32)
    assert {link.row.dtype for link in single.links.values()} == {torch.float32}
    value = random_values(seed=3)
    solved = single.solve({name: own.float() for name, own in value.items()})
    assert_close(as_vector(solved).double(), as_vector(chain.solve(value)), rtol=1e-3, atol=1e-4)


# Building


def test_building_keeps_the_order_and_mixes_structures():
    kinds = {"0": "kron", "1": "diagonal", "2": "kron"}
    named = {name: structures.get(kind, damping="exact", sharing="expand") for name, kind in kinds.items()}
    rows = {name: Rows(randn(9, 1, 3, seed=1), randn(1, 9, 1, 2, seed=2)) for name in kinds}
    measured = structures.measure(named, rows)
    assert isinstance(measured["0"], Statistics)
    specs = [BlockSpec(name, own, 3.0, 1.0) for name, own in measured.items()]
    built = structures.build(named, specs)
    assert list(built) == ["0", "1", "2"]
    assert not built.links
    assert [block.kind for block in built.values()] == ["kron_eigen", "diagonal", "kron_eigen"]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert structures.correlation(named, specs)(scale) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", structures.available())
def test_rows_of_16_bits_are_measured_in_float32(name, dtype):
    """In bfloat16 a sum of 1000 ones would stop at 256."""
    structure = structures.get(name, damping="factored", sharing="expand")
    half = Rows(torch.ones(1000, 1, 2, dtype=dtype), torch.ones(1, 1000, 1, 3, dtype=dtype))
    found, expected = (
        structures.measure({"a": structure}, {"a": rows})["a"] for rows in (half, half.to(torch.float32))
    )
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert_close(one, other, rtol=0, atol=0)


def test_so_are_those_of_linked_layers():
    layers, _ = find_layers(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 2)))
    chain = structures.get("tridiagonal", damping="factored", sharing="expand").for_layers(layers)
    half = {
        name: Rows(torch.ones(1000, 1, in_, dtype=torch.bfloat16), torch.ones(1, 1000, 1, out, dtype=torch.bfloat16))
        for name, (out, in_) in zip(layers, ((3, 2), (2, 4)), strict=True)
    }
    sums = [value for own in structures.measure(chain, half).values() for value in own.sums.values()]
    assert len(sums) == 6
    assert all(bool((value == 1000.0).all()) for value in sums)
