"""Earlier posteriors as priors: precisions add exactly, and tasks in sequence are the posterior of all their data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.structures import KroneckerEigenGaussian, MatrixNormalGaussian
from tests.helpers import TIGHT, randn, random_spd, seeded
from tests.laplace.oracles import (
    NETS,
    NOISE_SCALE,
    X,
    Y,
    batches,
    by_layer,
    evidence_by_hand,
    fishers,
    fit_net,
    fitted,
    gaussian,
    log_likelihood,
    mlp,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
#: Structures with the dampings of which a posterior can be a prior.
PRIORS = [("kron", "factored"), ("kron", "optimal"), ("dense", "exact"), ("diagonal", "exact")]


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def moved(name: str) -> nn.Module:
    """The net of ``NETS`` at other weights, where a second task has its mode."""
    return seeded(NETS[name].make(), seed=5)


def second_task(name: str, prior: bk.Posterior, **options: Any) -> bk.Laplace:
    """Other data of the same net: its own in another order and number."""
    net = NETS[name]
    loader = [(net.x[:7].flip(0), net.y[2:9])]
    return fitted(moved(name), net.likelihood(), loader, prior=prior, **options)


# Precisions add


@pytest.mark.parametrize(("structure", "damping"), PRIORS)
@pytest.mark.parametrize("name", NETS)
def test_the_new_precision_is_the_datas_plus_the_old_posteriors(name: str, structure: str, damping: str) -> None:
    """``P = N/τ F̄ + P_old`` to rounding, whatever net: words, groups, norms, tied weights and lone parameters."""
    old = fit_net(name, structure=structure, damping=damping, prior_precision=0.3).posterior()
    laplace = second_task(name, old, structure=structure, temperature=0.4)
    data = fishers(laplace)
    for layer, block in laplace.posterior().blocks.items():
        assert_close(block.to_dense(), 7 / 0.4 * data[layer] + old.blocks[layer].to_dense(), **CLOSE)


def test_a_sum_of_products_is_not_the_product_of_sums() -> None:
    """Adding factors, as it is often done, would be far off: the cross terms are not small."""
    old = fit_net("mlp", damping="factored").posterior()
    laplace = second_task("mlp", old)
    measurement = laplace._fitted.measurement
    assert measurement is not None
    for name, block in laplace.posterior().blocks.items():
        prior = old.blocks[name]
        assert isinstance(prior, MatrixNormalGaussian)
        A, G = (7**0.5 * measurement.statistics[name].mean(side) for side in ("input", "gradient"))
        row, column = (torch.linalg.inv(root @ root.T) for root in (prior.scale_tril_row, prior.scale_tril_column))
        dense = block.to_dense()
        assert_close(dense, torch.kron(G, A) + torch.kron(row, column), **CLOSE)
        assert (torch.kron(G + row, A + column) - dense).norm() > 0.1 * dense.norm()


def white(dense_prior_row: Tensor, dense_prior_column: Tensor, A: Tensor, G: Tensor) -> tuple[Tensor, ...]:
    """Roots of the prior's two covariances, lower triangular, and the factors in their coordinates."""
    rows, columns = (torch.linalg.cholesky(torch.linalg.inv(p)) for p in (dense_prior_row, dense_prior_column))
    return rows, columns, columns.T @ A @ columns, rows.T @ G @ rows


@pytest.mark.parametrize("damping", ["factored", "optimal"])
def test_the_other_dampings_take_the_prior_in_its_own_coordinates(damping: str) -> None:
    """Factored: ``(G' + √γ/π) ⊗ (A' + π√γ)`` where the prior is white, brought back; optimal: nearest in KL(q‖p)."""
    old = fit_net("mlp", damping="factored", prior_precision=0.3).posterior()
    laplace = second_task("mlp", old, damping=damping)
    measurement = laplace._fitted.measurement
    assert measurement is not None
    for name, block in laplace.posterior().blocks.items():
        prior = old.blocks[name]
        assert isinstance(prior, MatrixNormalGaussian)
        assert isinstance(block, MatrixNormalGaussian)
        A, G = (measurement.statistics[name].mean(side) for side in ("input", "gradient"))
        R, S = (torch.linalg.inv(root @ root.T) for root in (prior.scale_tril_row, prior.scale_tril_column))
        rows, columns, A_white, G_white = white(R, S, A, G)
        if damping == "factored":
            gamma = 1 / 7
            pi = ((A_white.trace() / len(A)) / (G_white.trace() / len(G))).sqrt()
            back_row, back_column = torch.linalg.inv(rows), torch.linalg.inv(columns)
            left = back_row.T @ (G_white + gamma**0.5 / pi * eye(len(G))) @ back_row
            right = back_column.T @ (A_white + pi * gamma**0.5 * eye(len(A))) @ back_column
            assert_close(block.to_dense(), 7 * torch.kron(left, right), **CLOSE)
        else:
            U, V = eye(len(G)), eye(len(A))
            for _ in range(2000):
                U = torch.linalg.inv((7 * (A @ V).trace() * G + (S @ V).trace() * R) / len(A))
                V = torch.linalg.inv((7 * (G @ U).trace() * A + (R @ U).trace() * S) / len(G))
            expected = torch.kron(torch.linalg.inv(U), torch.linalg.inv(V))
            assert_close(block.to_dense(), expected, rtol=2e-5, atol=2e-5)


def test_a_chain_of_tasks_adds_up() -> None:
    """Three tasks of a dense posterior are the sum of three Fishers and the first prior."""
    model, posterior, total = mlp(), None, {}
    for start in (0, 4, 8):
        options = {"prior": posterior} if posterior else {"prior_precision": 0.3}
        task = fitted(model, gaussian(), [(X[start : start + 3], Y[start : start + 3])], structure="dense", **options)
        posterior = task.posterior()
        total = {name: total.get(name, 0.3 * eye(len(F))) + 3 * F for name, F in fishers(task).items()}
    for name, block in posterior.blocks.items():
        assert_close(block.to_dense(), total[name], **CLOSE)


def test_a_prior_of_independent_weights_serves_dense_blocks() -> None:
    """A dense block can take any precision, so that of a diagonal or a Kronecker posterior too."""
    for structure, damping in (("diagonal", "exact"), ("kron", "factored"), ("kron", "exact")):
        old = fit_net("mlp", structure=structure, damping=damping).posterior()
        laplace = second_task("mlp", old, structure="dense")
        for name, block in laplace.posterior().blocks.items():
            assert_close(block.to_dense(), 7 * fishers(laplace)[name] + old.blocks[name].to_dense(), **CLOSE)


def test_data_added_to_a_task_keep_its_prior() -> None:
    old = fit_net("mlp", damping="factored").posterior()
    whole = fitted(moved("mlp"), gaussian(), batches(X, Y), prior=old)
    parts = fitted(moved("mlp"), gaussian(), batches(X[:5], Y[:5]), prior=old).update(
        batches(X[5:], Y[5:]), progress=False
    )
    for name, block in parts.posterior().blocks.items():
        assert_close(block.to_dense(), whole.posterior().blocks[name].to_dense(), **CLOSE)
    assert_close(parts.log_marginal_likelihood(), whole.log_marginal_likelihood(), **CLOSE)


# The evidence


@pytest.mark.parametrize(("structure", "damping"), PRIORS)
@pytest.mark.parametrize("name", NETS)
def test_the_evidence_knows_the_distance_from_the_old_mean(name: str, structure: str, damping: str) -> None:
    """``log p(D|M)/τ + log N(M; M_old, P_old⁻¹) − ½ log det P + d/2 log 2π``, dense; also at another temperature."""
    old = fit_net(name, structure=structure, damping=damping, prior_precision=0.3).posterior()
    laplace = second_task(name, old, structure=structure, temperature=0.4)
    net = NETS[name]
    away = {key: p.detach() - old.mean[key] for key, p in laplace.model.named_parameters()}
    assert max(float(value.abs().max()) for value in away.values()) > 0.1
    priors = {layer: block.to_dense() for layer, block in old.blocks.items()}
    likelihood = log_likelihood(laplace, net.x[:7].flip(0), net.y[2:9])
    for temperature, value in (
        (0.4, laplace.log_marginal_likelihood()),
        (2.0, laplace.log_marginal_likelihood(temperature=2.0)),
    ):
        by_hand = evidence_by_hand(
            likelihood, fishers(laplace), priors, by_layer(away, laplace.layers), 7 / temperature, temperature
        )
        assert_close(value, by_hand, **CLOSE)


@pytest.mark.parametrize(("structure", "damping"), PRIORS)
def test_the_evidence_is_differentiable_in_temperature_and_noise(structure: str, damping: str) -> None:
    laplace = second_task("mlp", fit_net("mlp", structure=structure, damping=damping).posterior(), structure=structure)

    def value(log_temperature: Tensor, log_scale: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood(temperature=log_temperature.exp(), noise_scale=log_scale.exp())

    assert gradcheck(value, [randn(seed=1).requires_grad_(), randn(seed=2).requires_grad_()])


def test_a_prior_that_is_a_posterior_has_nothing_to_tune_but_the_temperature() -> None:
    laplace = second_task("mlp", fit_net("mlp", damping="factored").posterior())
    for method in ("marginal_likelihood", "validation"):
        with pytest.raises(ArgumentError, match=r"prior= is a posterior.*Nothing to optimize"):
            laplace.optimize_prior_precision(method, loader=[(X, Y)] if method == "validation" else None)
    with pytest.raises(ArgumentError, match="prior_precision= cannot be changed where the prior is a posterior"):
        laplace.log_marginal_likelihood(2.0)
    laplace.optimize_temperature([(X, Y)], grid=[0.3, 3.0], progress=False)
    assert laplace.posterior().provenance.temperature in {0.3, 3.0}


def test_its_divergence_from_zero_is_refused(tmp_path: Any) -> None:
    """The prior is not centred at zero; also after a file, which does not hold the prior."""
    posterior = second_task("mlp", fit_net("mlp", damping="factored").posterior()).posterior()
    posterior.save(tmp_path / "p.safetensors")
    loaded = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
    for one in (posterior, loaded):
        with pytest.raises(UsageError, match="prior is centred at zero, but this one's was a posterior"):
            one.kl()
    assert torch.equal(loaded.predict(X).covariance, posterior.predict(X).covariance)


# Linear models, where all of it is exact


def regression(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(20, 3, seed=31)
    y = x @ randn(3, outputs, seed=32) + 0.5 * randn(20, outputs, seed=33) + 0.7
    return x, y, torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)


def train(model: nn.Module, loss: Any) -> None:
    """To the minimum of a quadratic, to rounding."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)


@pytest.mark.parametrize(("structure", "damping"), [("dense", "exact"), ("kron", "exact"), ("kron", "optimal")])
@pytest.mark.parametrize("outputs", [1, 2])
def test_two_tasks_in_sequence_are_the_posterior_of_their_data_together(
    structure: str, damping: str, outputs: int
) -> None:
    """The second mode minimises the mean loss plus ``penalty() / num_data``; mean, precision and evidences are exact.

    With one noise for all outputs ``G`` is a multiple of the identity, and so is the prior's: kron loses nothing in the
    sum, but a posterior of exact damping must be made a matrix normal first, which here it is already.
    """
    x, y, features = regression(outputs)
    likelihood, model = gaussian(), nn.Linear(3, outputs).double()

    def first_loss() -> Tensor:
        penalty = 0.3 * sum(p.square().sum() for p in model.parameters())
        return likelihood(model(x[:12]), y[:12]) + penalty / 12

    train(model, first_loss)
    first = fitted(model, likelihood, [(x[:12], y[:12])], structure=structure, damping=damping, prior_precision=0.6)
    old = first.posterior().nearest_matrix_normal()
    train(model, lambda: likelihood(model(x[12:]), y[12:]) + old.penalty() / 8)
    second = fitted(model, likelihood, [(x[12:], y[12:])], structure=structure, damping=damping, prior=old)
    posterior = second.posterior()
    precision = features.T @ features / NOISE_SCALE**2 + 0.6 * eye(4)
    mean = torch.linalg.solve(precision, features.T @ y / NOISE_SCALE**2).T
    layer = posterior.layers["(root)"]
    assert_close(layer.matrix(posterior.mean), mean, rtol=1e-8, atol=1e-8)
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if damping == "exact" else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(posterior.blocks["(root)"].to_dense(), torch.kron(eye(outputs), precision), **tolerance)
    if damping == "exact":  # log p(D₁) + log p(D₂ | D₁) = log p(D₁, D₂)
        covariance = NOISE_SCALE**2 * eye(20) + features @ features.T / 0.6
        joint = torch.distributions.MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(y.T).sum()
        both = first.log_marginal_likelihood() + second.log_marginal_likelihood()
        assert_close(both, joint, rtol=1e-8, atol=1e-8)


# The penalty


@pytest.mark.parametrize(("structure", "damping"), [*PRIORS, ("kron", "exact")])
@pytest.mark.parametrize("name", NETS)
def test_the_penalty_is_half_the_squared_distance_and_its_gradient(name: str, structure: str, damping: str) -> None:
    """``½ (w − M)ᵀ P (w − M)`` and ``P (w − M)`` for weights away from the mean; zero at it."""
    laplace = fit_net(name, structure=structure, damping=damping)
    posterior, model = laplace.posterior(), laplace.model
    assert posterior.penalty() == 0
    seeded(model, seed=5)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(posterior.penalty(), model.parameters()), strict=True)
    )
    total = torch.zeros(()).double()
    for layer_name, layer in posterior.layers.items():
        away = layer.matrix({key: p.detach() - posterior.mean[key] for key, p in layer.parameters.items()}).flatten(-2)
        product = torch.einsum("...ij,...j->...i", posterior.blocks[layer_name].to_dense(), away)
        total = total + 0.5 * (away * product).sum()
        assert_close(layer.matrix(gradients).flatten(-2), product, **CLOSE)
    assert_close(posterior.penalty().detach(), total, **CLOSE)


def test_the_penalty_leaves_the_weights_outside_of_the_subset_alone() -> None:
    laplace = fit_net("mlp", subset="last_layer")
    posterior, model = laplace.posterior(), laplace.model
    with torch.no_grad():
        model[0].weight.add_(1)
    assert posterior.penalty() == 0
    with torch.no_grad():
        model[2].bias.add_(1)
    posterior.penalty().backward()
    assert model[0].weight.grad is None
    assert model[2].bias.grad is not None


# Which posteriors can be priors


def test_a_sum_of_products_is_refused_as_a_prior_of_kron_with_the_remedy() -> None:
    """Of exact damping, before any data are seen; the nearest matrix normal is taken."""
    old = fit_net("mlp", damping="exact").posterior()
    with pytest.raises(ArgumentError, match=r"layer '0' is a kron_eigen.*nearest_matrix_normal\(\)"):
        bk.Laplace(mlp(), gaussian(), prior=old)
    nearest = old.nearest_matrix_normal()
    assert nearest.provenance.damping == "optimal"
    taken = second_task("mlp", nearest)
    for name, block in taken.posterior().blocks.items():
        assert_close(block.to_dense(), 7 * fishers(taken)[name] + nearest.blocks[name].to_dense(), **CLOSE)


@pytest.mark.parametrize("structure", ["kron", "dense"])
def test_independent_weights_take_only_independent_weights(structure: str) -> None:
    """The diagonal of another precision would not be its sum."""
    old = fit_net("mlp", structure=structure, damping="factored").posterior()
    with pytest.raises(ArgumentError, match=r"structure='diagonal' cannot add exactly.*structure='diagonal'"):
        bk.Laplace(mlp(), gaussian(), prior=old, structure="diagonal")
    if structure == "dense":
        with pytest.raises(ArgumentError, match=r"is a dense Gaussian.*structure='kron' cannot"):
            bk.Laplace(mlp(), gaussian(), prior=old, structure="kron")


def test_a_prior_of_other_layers_is_refused_by_their_names() -> None:
    old = fit_net("mlp", damping="factored", subset="last_layer").posterior()
    with pytest.raises(ArgumentError, match=r"prior= has other blocks than this model's subset: 0\. Allowed"):
        bk.Laplace(mlp(), gaussian(), prior=old)
    with pytest.raises(ArgumentError, match=r"other blocks than this model's subset: 2\."):
        bk.Laplace(mlp(3), gaussian(), prior=fit_net("mlp", damping="factored").posterior())
    with pytest.raises(ArgumentError, match=r"prior= and prior_precision= both.*Leave one"):
        bk.Laplace(mlp(), gaussian(), prior=old, prior_precision=1.0, subset="last_layer")
    bk.Laplace(mlp(), gaussian(), prior=old, subset="last_layer")


def test_a_prior_survives_a_file(tmp_path: Any) -> None:
    old = fit_net("mlp", damping="optimal").posterior()
    old.save(tmp_path / "p.safetensors")
    loaded = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
    here, there = second_task("mlp", old).posterior(), second_task("mlp", loaded).posterior()
    for name, block in here.blocks.items():
        assert torch.equal(block.to_dense(), there.blocks[name].to_dense())


@pytest.mark.parametrize(("structure", "damping"), PRIORS)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_prior_of_another_dtype_is_taken_in_the_models(
    structure: str, damping: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """A posterior in double precision is the prior of a task in single precision, and the other way round."""
    options = {"structure": structure, "damping": damping}

    def task(dtype: torch.dtype, **more: Any) -> bk.Laplace:
        return fitted(mlp().to(dtype), gaussian().to(dtype), batches(X.to(dtype), Y.to(dtype)), **options, **more)

    laplace = task(dtypes[1], prior=task(dtypes[0]).posterior())
    expected = task(torch.float64, prior=task(torch.float64).posterior())
    for name, block in laplace.posterior().blocks.items():
        assert {value.dtype for value in block.state.values()} == {dtypes[1]}
        assert_close(block.to_dense().double(), expected.posterior().blocks[name].to_dense(), rtol=1e-4, atol=1e-3)
    assert_close(laplace.log_marginal_likelihood(), expected.log_marginal_likelihood(), rtol=1e-4, atol=0)


# The nearest matrix normal


def kl(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q ‖ p)`` of zero-mean Gaussians from their precisions."""
    return 0.5 * ((p @ torch.linalg.inv(q)).trace() - len(p) + torch.logdet(q) - torch.logdet(p))


def sum_of_products(*, out: int, in_: int, seed: int, scale: float) -> KroneckerEigenGaussian:
    """The posterior of data on a prior that is a matrix normal, with bases that are not orthogonal."""
    roots = [torch.linalg.cholesky(random_spd(size, seed=seed + i)) for i, size in enumerate((out, in_))]
    eigen = [torch.linalg.eigh(random_spd(size, seed=seed + 2 + i)) for i, size in enumerate((out, in_))]
    precision = 1 + scale * eigen[0][0][:, None] * eigen[1][0]
    volume = in_ * torch.logdet(roots[0]) + out * torch.logdet(roots[1])
    return KroneckerEigenGaussian(roots[0] @ eigen[0][1], roots[1] @ eigen[1][1], precision, volume)


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 100), st.floats(-3, 4))
def test_the_projection_is_stationary_and_the_optimum(out: int, in_: int, seed: int, log_scale: float) -> None:
    """The gradient of ``KL(q ‖ p)`` by both roots vanishes, and no perturbation of them comes nearer."""
    p = sum_of_products(out=out, in_=in_, seed=seed, scale=10**log_scale)
    q, dense = p.nearest_matrix_normal(), p.to_dense()
    assert torch.equal(q.scale_tril_row.tril(), q.scale_tril_row)
    assert bool((q.scale_tril_row.diagonal() > 0).all())
    assert bool((q.scale_tril_column.diagonal() > 0).all())

    def divergence(row: Tensor, column: Tensor) -> Tensor:
        return kl(torch.kron(torch.linalg.inv(row @ row.T), torch.linalg.inv(column @ column.T)), dense)

    roots = [root.clone().requires_grad_() for root in (q.scale_tril_row, q.scale_tril_column)]
    least = divergence(*roots)
    for root, gradient in zip(roots, torch.autograd.grad(least, roots), strict=True):
        assert (root.detach().T @ gradient).abs().max() < 1e-6 * out * in_
    for step in range(6):
        moved_roots = [
            root.detach() @ torch.matrix_exp(0.05 * randn(len(root), len(root), seed=10 * step + i).tril())
            for i, root in enumerate(roots)
        ]
        assert divergence(*moved_roots) >= least - 1e-9


@pytest.mark.parametrize("name", NETS)
def test_the_projection_of_a_posterior_is_that_of_its_optimal_damping(name: str) -> None:
    """Both are the matrix normal nearest to ``G ⊗ A + γ I``; blocks that are none keep what they are."""
    exact = fit_net(name, damping="exact").posterior()
    optimal = fit_net(name, damping="optimal").posterior()
    nearest = exact.nearest_matrix_normal()
    for layer, block in nearest.blocks.items():
        assert_close(block.to_dense(), optimal.blocks[layer].to_dense(), rtol=1e-4, atol=1e-4)
        if not isinstance(exact.blocks[layer], KroneckerEigenGaussian):
            assert block is exact.blocks[layer]
    assert exact.provenance.damping == "exact", "the posterior itself stays what it is"
    assert any(isinstance(block, KroneckerEigenGaussian) for block in exact.blocks.values())
    x = NETS[name].x[:3]
    covariances = {
        one: posterior.output(x).covariance
        for one, posterior in (("nearest", nearest), ("optimal", optimal), ("exact", exact))
    }
    assert_close(covariances["nearest"], covariances["optimal"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(covariances["nearest"], covariances["exact"], rtol=1e-3)


def test_matrix_normals_are_their_own_projection() -> None:
    """Also one that comes as a sum, of a Fisher of nothing or in white coordinates of rank one."""
    for damping in ("factored", "optimal"):
        posterior = fit_net("mlp", damping=damping).posterior()
        nearest = posterior.nearest_matrix_normal()
        for name, block in nearest.blocks.items():
            assert torch.equal(block.to_dense(), posterior.blocks[name].to_dense())
    bases = [randn(size, size, seed=size) for size in (3, 4)]
    product = randn(3, seed=1).exp()[:, None] * randn(4, seed=2).exp()
    volume = 4 * torch.linalg.slogdet(bases[0])[1] + 3 * torch.linalg.slogdet(bases[1])[1]
    gaussian_block = KroneckerEigenGaussian(*bases, product, volume)
    assert_close(gaussian_block.nearest_matrix_normal().to_dense(), gaussian_block.to_dense(), **CLOSE)
    assert_close(gaussian_block.nearest_matrix_normal().logdet(), gaussian_block.logdet(), **TIGHT)


@pytest.mark.parametrize("name", ["cnn", "words", "tied to words"])
def test_projections_of_stacks_and_diagonal_sides_are_those_of_their_matrices(name: str) -> None:
    posterior = fit_net(name, damping="exact").posterior()
    dense: Mapping[str, Any] = posterior.nearest_matrix_normal().blocks
    for layer, block in posterior.blocks.items():
        assert isinstance(block, KroneckerEigenGaussian)
        P, Q = block.to_dense(), dense[layer].to_dense()
        for p, q in zip(P.reshape(-1, *P.shape[-2:]), Q.reshape(-1, *Q.shape[-2:]), strict=True):
            best = kl(q, p)
            size = block.shape[-2:]
            for seed in range(4):
                left, right = (torch.matrix_exp(0.05 * randn(n, n, seed=seed)) for n in size)
                other = torch.kron(left, right)
                assert kl(other.T @ q @ other, p) >= best - 1e-9
