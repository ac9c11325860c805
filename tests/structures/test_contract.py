"""What every structure's Gaussians must do, for every damping: each ability equals its dense formula.

The suite runs over the registry: a new structure takes part by being registered, with every damping that makes a
difference to it. That ``to_dense`` is the matrix it stands for is each structure's own test.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import SHARING_KINDS, Rows, Statistics
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import BlockGaussian, BlockSpec, Structure, gaussian_from_state, standard_normal
from tests.helpers import TIGHT, matrices, randn, rng
from tests.posteriors import ESTIMATES, STRUCTURES, surveyed
from tests.random_rows import dense_rows, tied_rows, words, written_out

#: An iteration ends when all blocks of a call have converged, so that company changes a block by its tolerance.
COMPANY = {"optimal": {"rtol": 1e-4, "atol": 1e-5}}
BLOCKS = [(), (2,)]
OUT, IN = 3, 4
DATA_SCALE, PRIOR_PRECISION = 20.0, 0.7


@pytest.fixture(params=STRUCTURES, ids="-".join)
def structure(request: pytest.FixtureRequest) -> Structure:
    name, damping = request.param
    return structures.get(name, damping=damping, sharing="expand")


@pytest.fixture(params=BLOCKS, ids=["plain", "stacked"])
def blocks(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@pytest.fixture(params=["plain", "stacked", "words", "tied to words"])
def gaussian(structure: Structure, request: pytest.FixtureRequest) -> BlockGaussian:
    """One block, a stack of two, and blocks with a diagonal side: the inputs', or of tied weights the other."""
    rows = {
        "plain": lambda: rows_for(()),
        "stacked": lambda: rows_for((2,)),
        "words": lambda: Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1)),
        "tied to words": lambda: tied_rows(batch=10, size=OUT, width=IN),
    }[request.param]()
    (gaussian,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), DATA_SCALE, PRIOR_PRECISION)])
    return gaussian


def rows_for(blocks: tuple[int, ...], out: int = OUT, in_: int = IN, *, shared: int = 2, seed: int = 0) -> Rows:
    """Rows of ten examples and two columns, with features of unequal scale."""
    inputs = randn(*blocks, 10, shared, in_, seed=seed) * torch.linspace(0.5, 2, in_, dtype=torch.float64)
    gradients = randn(2, *blocks, 10, shared, out, seed=seed + 1) * torch.linspace(0.1, 1, out, dtype=torch.float64)
    return Rows(inputs, gradients)


def spec_for(
    structure: Structure, blocks: tuple[int, ...], out: int = OUT, in_: int = IN, *, name: str = "layer", seed: int = 0
) -> BlockSpec:
    return BlockSpec(name, surveyed(structure, rows_for(blocks, out, in_, seed=seed)), DATA_SCALE, PRIOR_PRECISION)


def covariance_of(gaussian: BlockGaussian) -> Tensor:
    return torch.linalg.inv(gaussian.to_dense())


def basis(gaussian: BlockGaussian) -> Tensor:
    """All unit matrices of one block, ``[out·in, *blocks, out, in]``; independent blocks get the same."""
    *leading, out, in_ = gaussian.shape
    units = torch.eye(out * in_, dtype=torch.float64).reshape(out * in_, *[1] * len(leading), out, in_)
    return units.expand(out * in_, *gaussian.shape)


def as_columns(images: Tensor) -> Tensor:
    """The images of :func:`basis` as the columns of a matrix, ``[*blocks, out·in, out·in]``."""
    return images.flatten(-2).movedim(0, -1)


# One Gaussian


def test_shape_is_the_blocks(structure, blocks):
    (gaussian,) = structure.gaussians([spec_for(structure, blocks)])
    assert gaussian.shape == (*blocks, OUT, IN)


def test_the_dense_precision_is_symmetric_and_positive_definite(gaussian):
    precision = gaussian.to_dense()
    assert precision.shape == (*gaussian.shape[:-2], OUT * IN, OUT * IN)
    assert_close(precision, precision.mT, **TIGHT)
    assert bool((torch.linalg.eigvalsh(precision) > 0).all())


def test_sample_is_a_linear_map_whose_square_is_the_covariance(gaussian):
    """Applied to basis vectors: ``B Bᵀ = P⁻¹``, without Monte Carlo."""
    B = as_columns(gaussian.sample(basis(gaussian)))
    assert_close(B @ B.mT, covariance_of(gaussian), **TIGHT)


def test_sample_is_linear_over_any_leading_dimensions(gaussian):
    noise = randn(5, 2, *gaussian.shape, seed=5)
    B = as_columns(gaussian.sample(basis(gaussian)))
    expected = (B @ noise.flatten(-2).unsqueeze(-1)).reshape(noise.shape)
    assert_close(gaussian.sample(noise), expected, **TIGHT)
    assert_close(gaussian.sample(noise[0, 0]), expected[0, 0], **TIGHT)


def test_solve_is_the_inverse_precision(gaussian):
    assert_close(as_columns(gaussian.solve(basis(gaussian))), covariance_of(gaussian), **TIGHT)


def test_solve_takes_any_leading_dimensions(gaussian):
    value = randn(5, 2, *gaussian.shape, seed=6)
    expected = torch.linalg.solve(gaussian.to_dense(), value.flatten(-2).unsqueeze(-1)).reshape(value.shape)
    assert_close(gaussian.solve(value), expected, **TIGHT)
    assert_close(gaussian.solve(value[0, 0]), expected[0, 0], **TIGHT)


def test_whiten_is_the_adjoint_of_sample(gaussian):
    """``⟨B ε, V⟩ = ⟨ε, Bᵀ V⟩`` for one ``B``: both maps take the same root, over any leading dimensions."""
    B = as_columns(gaussian.sample(basis(gaussian)))
    assert_close(as_columns(gaussian.whiten(basis(gaussian))), B.mT, **TIGHT)
    value = randn(5, 2, *gaussian.shape, seed=6)
    expected = (B.mT @ value.flatten(-2).unsqueeze(-1)).reshape(value.shape)
    assert_close(gaussian.whiten(value), expected, **TIGHT)
    assert_close(gaussian.whiten(value[0, 0]), expected[0, 0], **TIGHT)


def test_whitening_a_sample_gives_its_noise_a_white_metric(gaussian):
    """``Bᵀ P B = I``."""
    B = as_columns(gaussian.sample(basis(gaussian)))
    white = B.mT @ gaussian.to_dense() @ B
    assert_close(white, torch.eye(OUT * IN, dtype=torch.float64).expand_as(white), **TIGHT)


def test_multiply_is_the_precision_and_the_inverse_of_solve(gaussian):
    assert_close(as_columns(gaussian.multiply(basis(gaussian))), gaussian.to_dense(), **TIGHT)
    value = randn(5, 2, *gaussian.shape, seed=6)
    expected = (gaussian.to_dense() @ value.flatten(-2).unsqueeze(-1)).reshape(value.shape)
    assert_close(gaussian.multiply(value), expected, **TIGHT)
    assert_close(gaussian.multiply(value[0, 0]), expected[0, 0], **TIGHT)
    assert_close(gaussian.multiply(gaussian.solve(value)), value, **TIGHT)
    assert_close(gaussian.solve(gaussian.multiply(value)), value, **TIGHT)


def test_maps_are_differentiable(gaussian):
    """As the penalty of a posterior that is the prior of a new task."""
    value = randn(*gaussian.shape, seed=6).requires_grad_()
    for function in (gaussian.multiply, gaussian.solve, gaussian.whiten, gaussian.sample):
        assert torch.autograd.gradcheck(function, value)


def test_logdet_is_of_the_precision(gaussian):
    assert gaussian.logdet().shape == gaussian.shape[:-2]
    assert_close(gaussian.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **TIGHT)


def test_marginal_variance_is_the_diagonal_of_the_covariance(gaussian):
    expected = covariance_of(gaussian).diagonal(dim1=-2, dim2=-1).reshape(gaussian.shape)
    assert_close(gaussian.marginal_variance(), expected, **TIGHT)


def test_trace_covariance_is_of_each_block(gaussian):
    assert gaussian.trace_covariance().shape == gaussian.shape[:-2]
    assert_close(gaussian.trace_covariance(), covariance_of(gaussian).diagonal(dim1=-2, dim2=-1).sum(-1), **TIGHT)


@pytest.mark.parametrize("prior_precision", [0.3, 1.0, 5.0])
def test_kl_is_torchs_between_dense_gaussians(gaussian, prior_precision):
    mean = randn(*gaussian.shape, seed=7)
    size = OUT * IN
    q = torch.distributions.MultivariateNormal(mean.flatten(-2), precision_matrix=gaussian.to_dense())
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64) / prior_precision
    )
    kl = gaussian.kl(mean, prior_precision)
    assert kl.shape == gaussian.shape[:-2]
    assert_close(kl, torch.distributions.kl_divergence(q, prior), **TIGHT)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 2, 6])
@pytest.mark.parametrize("shared", [1, 2, 9])
def test_quad_is_jacobians_times_the_covariance(gaussian, batch, columns, shared):
    """Few uses take the way through Gram matrices, many the way through Jacobians; both are ``J P⁻¹ Jᵀ``."""
    blocks = gaussian.shape[:-2]
    inputs, gradients = randn(*blocks, batch, shared, IN, seed=8), randn(columns, *blocks, batch, shared, OUT, seed=9)
    J = torch.einsum("c...nto,...nti->...ncoi", gradients, inputs).flatten(-2)
    expected = J @ covariance_of(gaussian).unsqueeze(-3) @ J.mT
    quad = gaussian.quad(inputs, gradients)
    assert quad.shape == (batch, columns, columns)
    assert_close(quad, expected.sum(0) if blocks else expected, **TIGHT)


@pytest.mark.parametrize("columns", [1, 3])
def test_quad_of_words_is_that_of_the_rows_written_out(structure, columns):
    """Sparse rows meet the diagonal side that they were measured with; words occur several times in a row."""
    rows = Rows(words(10, 3, 2, size=IN), randn(columns, 10, 3, OUT, seed=1))
    (gaussian,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), DATA_SCALE, PRIOR_PRECISION)])
    assert_close(
        gaussian.whitened_rows(rows).covariance(), gaussian.whitened_rows(written_out(rows)).covariance(), **TIGHT
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_quad_of_tied_weights_is_that_of_their_jacobians(structure, sparse):
    """Uses as it is and transposed add up in each example's Jacobian."""
    rows = tied_rows(batch=10, size=OUT, width=IN, sparse=sparse)
    (gaussian,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), DATA_SCALE, PRIOR_PRECISION)])
    J = rows.jacobians().movedim(0, 1).flatten(-2)
    assert_close(gaussian.whitened_rows(rows).covariance(), J @ covariance_of(gaussian) @ J.mT, **TIGHT)


@pytest.mark.parametrize(("out", "in_"), [(1, 1), (1, 6), (6, 1), (5, 2)])
def test_quad_in_blocks_of_any_shape(structure, blocks, out, in_):
    (gaussian,) = structure.gaussians([spec_for(structure, blocks, out, in_)])
    for shared in (1, 4):
        inputs, gradients = randn(*blocks, 3, shared, in_, seed=8), randn(2, *blocks, 3, shared, out, seed=9)
        J = torch.einsum("c...nto,...nti->...ncoi", gradients, inputs).flatten(-2)
        expected = J @ covariance_of(gaussian).unsqueeze(-3) @ J.mT
        assert_close(gaussian.quad(inputs, gradients), expected.sum(0) if blocks else expected, **TIGHT)


# Saving and moving


def test_state_is_plain_tensors_that_rebuild_the_gaussian(gaussian):
    state = {name: tensor.clone() for name, tensor in gaussian.state.items()}
    assert all(type(tensor) is Tensor for tensor in state.values())
    rebuilt = gaussian_from_state(gaussian.kind, state)
    assert type(rebuilt) is type(gaussian)
    assert rebuilt.shape == gaussian.shape
    assert torch.equal(rebuilt.to_dense(), gaussian.to_dense())
    noise = randn(*gaussian.shape, seed=0)
    assert torch.equal(rebuilt.sample(noise), gaussian.sample(noise))


def test_to_another_dtype_is_the_same_gaussian_rounded(gaussian):
    single = gaussian.to(torch.float32)
    assert type(single) is type(gaussian)
    assert {tensor.dtype for tensor in single.state.values()} == {torch.float32}
    assert {tensor.dtype for tensor in gaussian.state.values()} == {torch.float64}
    value = randn(*gaussian.shape, seed=0)
    assert single.solve(value.float()).dtype == torch.float32
    assert_close(single.solve(value.float()).double(), gaussian.solve(value), rtol=1e-4, atol=1e-6)
    assert_close(single.logdet().double(), gaussian.logdet(), rtol=1e-5, atol=1e-5)
    assert_close(single.to(torch.float64).to_dense(), gaussian.to_dense(), rtol=1e-4, atol=1e-4)


def test_standard_normal_is_shaped_and_typed_like_the_block_and_obeys_its_generator(gaussian):
    noise = standard_normal(gaussian, rng(0), (5, 2))
    assert noise.shape == (5, 2, *gaussian.shape)
    assert noise.dtype == torch.float64
    assert standard_normal(gaussian.to(torch.float32), rng(0)).dtype == torch.float32
    assert torch.equal(noise, standard_normal(gaussian, rng(0), (5, 2)))
    assert not torch.equal(noise, standard_normal(gaussian, rng(1), (5, 2)))


# Building


def test_data_and_prior_scale_the_precision_together(structure, blocks):
    """``P = data_scale · F̄ + prior_precision · I``: noise has the scale ``sqrt(τ/N)``, not ``τ/N``."""
    spec = spec_for(structure, blocks)
    scaled = replace(spec, data_scale=100 * spec.data_scale, prior=100 * spec.prior)
    (gaussian,), (tighter,) = structure.gaussians([spec]), structure.gaussians([scaled])
    noise = randn(*gaussian.shape, seed=0)
    assert_close(tighter.to_dense(), 100 * gaussian.to_dense(), **TIGHT)
    assert_close(tighter.sample(noise), gaussian.sample(noise) / 10, **TIGHT)


def test_without_data_the_gaussian_is_the_prior(structure, blocks):
    (gaussian,) = structure.gaussians([replace(spec_for(structure, blocks), data_scale=1e-20)])
    prior = PRIOR_PRECISION * torch.eye(OUT * IN, dtype=torch.float64).expand(*blocks, -1, -1)
    assert_close(gaussian.to_dense(), prior, rtol=0, atol=1e-8)


def test_zero_statistics_give_the_prior(structure, blocks):
    """Layers behind dead units, or at the first step: no curvature, and no NaN."""
    rows = rows_for(blocks)
    statistics = surveyed(structure, Rows(rows.inputs * 0, rows.gradients * 0))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, DATA_SCALE, PRIOR_PRECISION)])
    prior = PRIOR_PRECISION * torch.eye(OUT * IN, dtype=torch.float64).expand(*blocks, -1, -1)
    assert_close(gaussian.to_dense(), prior, **TIGHT)


@pytest.mark.parametrize("dead", ["inputs", "gradients"])
def test_one_side_without_statistics_gives_a_finite_gaussian(structure, blocks, dead):
    rows = rows_for(blocks)
    rows = replace(rows, **{dead: getattr(rows, dead) * 0})
    (gaussian,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), DATA_SCALE, PRIOR_PRECISION)])
    assert bool(torch.isfinite(gaussian.to_dense()).all())
    assert bool((gaussian.marginal_variance() > 0).all())
    assert bool((gaussian.marginal_variance() <= 1 / PRIOR_PRECISION + 1e-10).all())


def test_building_does_not_change_the_statistics(structure, blocks):
    """A damping that is added in place to a running average would grow with every refresh."""
    spec = spec_for(structure, blocks)
    before = {name: value.clone() for name, value in matrices(spec.statistics).items()}
    (first,) = structure.gaussians([spec])
    (again,) = structure.gaussians([spec])
    assert torch.equal(first.to_dense(), again.to_dense())
    structure.gaussians([replace(spec, previous=first)])
    for name, value in before.items():
        assert torch.equal(matrices(spec.statistics)[name], value)


def test_building_does_not_change_the_previous_gaussian(structure, blocks):
    spec = spec_for(structure, blocks)
    (previous,) = structure.gaussians([spec_for(structure, blocks, seed=3)])
    before = {name: tensor.clone() for name, tensor in previous.state.items()}
    structure.gaussians([replace(spec, previous=previous)])
    for name, tensor in before.items():
        assert torch.equal(previous.state[name], tensor)


def test_blocks_built_together_are_those_built_one_by_one(structure):
    """Same-shape layers share batched calls; each keeps its own scales, and the order."""
    shapes = [((), 3, 4), ((), 2, 4), ((2,), 3, 4), ((), 3, 4), ((), 3, 2), ((2,), 3, 4)]
    specs = [
        replace(
            spec_for(structure, *shape, name=f"layer{i}", seed=10 * i),
            data_scale=DATA_SCALE * (i + 1),
            prior=PRIOR_PRECISION / (i + 1),
        )
        for i, shape in enumerate(shapes)
    ]
    together = structure.gaussians(specs)
    assert len(together) == len(specs)
    for spec, gaussian in zip(specs, together, strict=True):
        (alone,) = structure.gaussians([spec])
        assert gaussian.shape == alone.shape
        assert_close(gaussian.to_dense(), alone.to_dense(), **COMPANY.get(structure.damping, TIGHT))


def test_stacked_blocks_are_independent_blocks(structure):
    """Each block of a stack is the Gaussian of its own rows."""
    rows = rows_for((2,))
    (stacked,) = structure.gaussians([BlockSpec("layer", surveyed(structure, rows), DATA_SCALE, PRIOR_PRECISION)])
    for i in range(2):
        own = Rows(rows.inputs[i], rows.gradients[:, i])
        (alone,) = structure.gaussians([BlockSpec("layer", surveyed(structure, own), DATA_SCALE, PRIOR_PRECISION)])
        assert_close(stacked.to_dense()[i], alone.to_dense(), **COMPANY.get(structure.damping, TIGHT))


def test_building_nothing_gives_nothing(structure):
    assert structure.gaussians([]) == []


def test_the_identitys_gaussian_is_isotropic(structure, blocks):
    """Its precision is that of a Fisher of one: ``data_scale + prior_precision``, up to the damping's cross terms."""
    shape = (*blocks, OUT, IN)
    statistics = structure.identity(shape, torch.zeros((), dtype=torch.float64))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, DATA_SCALE, PRIOR_PRECISION)])
    assert gaussian.shape == shape
    dense = gaussian.to_dense()
    eye = torch.eye(OUT * IN, dtype=torch.float64).expand_as(dense)
    assert_close(dense, dense[..., :1, :1] * eye, **TIGHT)
    if structure.damping != "factored":
        assert_close(dense, (DATA_SCALE + PRIOR_PRECISION) * eye, **TIGHT)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("sides", ["none", "words", "tied", "tied to words"])
def test_the_identity_has_the_names_and_shapes_of_what_is_measured(structure, sides, sharing):
    """Warm-up blends the two."""
    structure = structures.get(structure.name, damping=structure.damping, sharing=sharing)
    rows = {
        "none": dense_rows(),
        "words": Rows(words(3, 2, 2), randn(2, 3, 2, 4, seed=1)),
        "tied": tied_rows(sparse=False),
        "tied to words": tied_rows(),
    }[sides]
    sparse_sides = frozenset({"words": {"input"}, "tied to words": {"gradient"}}.get(sides, set()))
    shape = rows.jacobians().shape[2:]
    identity = structure.identity(shape, rows.gradients, sparse_sides=sparse_sides, tied="tied" in sides)
    measured = surveyed(structure, rows)
    assert {n: v.shape for n, v in identity.sums.items()} == {n: v.shape for n, v in measured.sums.items()}
    assert {n: v.shape for n, v in matrices(identity).items()} == {n: v.shape for n, v in matrices(measured).items()}
    assert identity.counts.keys() == measured.counts.keys()
    assert {tensor.dtype for tensor in identity.tensors} == {torch.float64}
    (gaussian,) = structure.gaussians([BlockSpec("layer", identity, DATA_SCALE, PRIOR_PRECISION)])
    dense = gaussian.to_dense()
    assert_close(dense, dense[:1, :1] * torch.eye(len(dense), dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("sharing", SHARING_KINDS)
def test_measuring_gives_statistics_that_add(structure, blocks, sharing):
    structure = structures.get(structure.name, damping=structure.damping, sharing=sharing)
    whole = rows_for(blocks, shared=3)
    frame = surveyed(structure, whole).frame
    parts = [
        structure.measure(Rows(inputs, gradients), frame)
        for inputs, gradients in zip(whole.inputs.split([3, 7], -3), whole.gradients.split([3, 7], -3), strict=True)
    ]
    total, expected = parts[0] + parts[1], structure.measure(whole, frame)
    assert isinstance(total, Statistics)
    assert dict(total.counts) == dict(expected.counts)
    if structure.name in ESTIMATES:
        return
    for name, value in matrices(expected).items():
        assert_close(matrices(total)[name], value, **TIGHT)


def test_single_precision_statistics_give_a_single_precision_gaussian(structure, blocks):
    rows = rows_for(blocks)
    spec = spec_for(structure, blocks)
    single = surveyed(structure, Rows(rows.inputs.float(), rows.gradients.float()))
    (gaussian,), (double,) = structure.gaussians([replace(spec, statistics=single)]), structure.gaussians([spec])
    assert {tensor.dtype for tensor in gaussian.state.values()} == {torch.float32}
    assert_close(gaussian.marginal_variance().double(), double.marginal_variance(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("data_scale", [1e4, 1e6, 1e8, 1e10])
def test_features_that_add_up_to_the_bias_are_survived_in_single_precision(structure, data_scale):
    """Of ten examples in three classes: rounding is above the prior, along what the data leave open."""
    classes = torch.eye(3)[torch.arange(10) % 3]
    inputs = torch.cat([classes, randn(10, 1, seed=0).float(), torch.ones(10, 1)], dim=1)
    statistics = surveyed(structure, Rows(inputs.unsqueeze(1), randn(2, 10, 1, OUT, seed=1).float()))
    gaussian = None
    for _ in range(3):
        (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, data_scale, 1.0, gaussian)])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in gaussian.state.values())
    variance = gaussian.marginal_variance()
    assert bool((variance > 0).all())
    assert bool(torch.isfinite(variance).all())


# The registry


def test_every_structure_knows_its_name_and_keeps_its_options():
    assert {"dense", "diagonal", "kron"} <= set(structures.available())
    for name in structures.available():
        structure = structures.get(name, damping="factored", sharing="reduce")
        assert structure.name == name
        assert structure.sharing == "reduce"
        assert structure.damping in {"factored", "optimal", "exact"}
        again = structures.get(structure, damping="exact", sharing="expand")
        assert type(again) is type(structure)
        assert again.sharing == "expand"
        assert again.options == structure.options


def test_every_structure_says_what_it_is_in_words():
    for name in structures.available():
        card = structures.get(name, damping="exact", sharing="expand").card
        assert all(len(text) > 5 for text in (card.formula, card.captures, card.use, card.cost, card.source))


def test_renewing_a_frame_keeps_names_shapes_and_counts(structure, blocks):
    """What was measured goes on: sums in the new frame, as far as they can be known, in the place of the old."""
    rows = rows_for(blocks)
    before = structure.measure(rows)
    after = structure.reframed(before, "layer")
    again = structure.measure(rows, after.frame)
    for statistics in (after, again):
        assert {n: v.shape for n, v in matrices(statistics).items()} == {
            n: v.shape for n, v in matrices(before).items()
        }
        assert dict(statistics.counts) == dict(before.counts)
        assert {n: v.shape for n, v in statistics.frame.items()} == {n: v.shape for n, v in after.frame.items()}


def test_the_information_is_the_log_determinant_over_the_priors(structure, blocks):
    """As a function of the data's scale, which is that of the prior, inversely; the damping may bias it."""
    spec = spec_for(structure, blocks)
    information = structure.information(replace(spec, prior=1.0))
    scale = torch.tensor(DATA_SCALE / PRIOR_PRECISION, dtype=torch.float64, requires_grad=True)
    total = information(scale)
    (slope,) = torch.autograd.grad(total, scale)
    assert 0 < scale.item() * slope.item() < math.prod((*blocks, OUT, IN))  # directions that the data determine
    if structure.damping == "exact":
        (gaussian,) = structure.gaussians([spec])
        expected = gaussian.logdet().sum() - math.prod((*blocks, OUT, IN)) * math.log(PRIOR_PRECISION)
        assert_close(total, expected, **TIGHT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "kronn"}, "structure='kronn' is unknown. Allowed: .*'kron'"),
        ({"damping": "none"}, "damping='none' is unknown. Allowed: 'factored', 'optimal', 'exact'"),
        ({"sharing": "sum"}, "sharing='sum' is unknown. Allowed: 'expand', 'reduce'"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        structures.get(**{"structure": "kron", "damping": "factored", "sharing": "expand", **arguments})


def test_an_unknown_kind_of_gaussian_is_an_error_that_lists_the_known():
    with pytest.raises(ArgumentError, match="'matrix_normal'"):
        gaussian_from_state("normal", {})


def test_a_block_of_one_weight_is_a_scalar_gaussian(structure):
    """Everything reduces to school formulas."""
    (gaussian,) = structure.gaussians([spec_for(structure, (), 1, 1)])
    precision = gaussian.to_dense().item()
    one = torch.ones(1, 1, dtype=torch.float64)
    assert gaussian.solve(one).item() == pytest.approx(1 / precision)
    assert abs(gaussian.sample(one).item()) == pytest.approx(precision**-0.5)
    assert gaussian.logdet().item() == pytest.approx(math.log(precision))
    assert gaussian.kl(3 * one, 2.0).item() == pytest.approx(
        0.5 * (2 / precision + 2 * 9 - 1 + math.log(precision / 2))
    )
