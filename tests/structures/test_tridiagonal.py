"""Block-tridiagonal K-FAC against the paper's formulas, written with ``torch.kron``; and which layers it links."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics, find_layers
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import BlockSpec, JointGaussian, MatrixNormalGaussian, Prior, Structure
from tests.helpers import TIGHT, assert_same_statistics, randn, record, seeded
from tests.joints import as_vector, dense_covariance, unit_values

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
DATA_SCALE = 20.0
NAMES = ("0", "2", "4")
SHAPES = {"0": (3, 4), "2": (2, 4), "4": (2, 3)}


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)))


def tridiagonal(sharing: str = "expand") -> Structure:
    return structures.get("tridiagonal", damping="factored", sharing=sharing)


def chained(model: nn.Module, sharing: str = "expand") -> dict[str, Structure]:
    return tridiagonal(sharing).for_layers(find_layers(model)[0])


def measured(model: nn.Module, x: Tensor, sharing: str = "expand") -> dict[str, Statistics]:
    return structures.measure(chained(model, sharing), record(model, x))


def specs(
    statistics: Mapping[str, Statistics], prior: Prior | Mapping[str, Prior] = 0.7, data_scale: float = DATA_SCALE
) -> list[BlockSpec]:
    priors = prior if isinstance(prior, Mapping) else dict.fromkeys(statistics, prior)
    return [BlockSpec(name, own, data_scale, priors[name]) for name, own in statistics.items()]


def built(**options) -> JointGaussian:
    model = mlp()
    return structures.build(chained(model), specs(measured(model, randn(40, 3, seed=1)), **options))


def factors(model: nn.Module, x: Tensor) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor]]:
    """``A_lm = E[a_l a_mᵀ]`` and ``G_lm = E[Σ_c g_l g_mᵀ]`` of all pairs of layers, from the rows."""
    rows = record(model, x)
    a = {name: own.inputs.squeeze(-2) for name, own in rows.items()}
    g = {name: own.gradients.squeeze(-2) for name, own in rows.items()}
    pairs = [(left, right) for left in rows for right in rows]
    return (
        {(left, right): a[left].mT @ a[right] / len(x) for left, right in pairs},
        {(left, right): torch.einsum("cno,cnp->op", g[left], g[right]) / len(x) for left, right in pairs},
    )


def damped(A: Tensor, G: Tensor, prior: float = 0.7, data_scale: float = DATA_SCALE) -> tuple[Tensor, Tensor]:
    gamma = prior / data_scale
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    return A + pi * gamma**0.5 * torch.eye(len(A)).double(), G + gamma**0.5 / pi * torch.eye(len(G)).double()


# The paper's formulas


def test_it_is_the_papers_gaussian():
    """``F̂⁻¹ = Ξᵀ Λ Ξ`` with explicit Kronecker products, of damped factors and at the data's scale."""
    model, x = mlp(), randn(40, 3, seed=1)
    A, G = factors(model, x)
    for name in NAMES:
        A[name, name], G[name, name] = damped(A[name, name], G[name, name])
    size = {name: math.prod(shape) for name, shape in SHAPES.items()}
    start = {"0": 0, "2": size["0"], "4": size["0"] + size["2"]}
    Xi = torch.eye(sum(size.values()), dtype=torch.float64)
    Lambda = torch.zeros_like(Xi)
    for left, right in (("0", "2"), ("2", "4"), ("4", "")):
        own = slice(start[left], start[left] + size[left])
        precision = torch.kron(G[left, left], A[left, left])
        if right:
            psi_A = A[left, right] @ torch.linalg.inv(A[right, right])
            psi_G = G[left, right] @ torch.linalg.inv(G[right, right])
            Xi[own, start[right] : start[right] + size[right]] = -torch.kron(psi_G, psi_A)
            precision -= torch.kron(psi_G @ G[right, right] @ psi_G.mT, psi_A @ A[right, right] @ psi_A.mT)
        Lambda[own, own] = torch.linalg.inv(precision)
    assert_close(dense_covariance(built()), Xi.mT @ Lambda @ Xi / DATA_SCALE, **CLOSE)


def dense_fisher(model: nn.Module, x: Tensor, *, is_damped: bool) -> Tensor:
    """``F_lm = G_lm ⊗ A_lm`` over all pairs of layers."""
    A, G = factors(model, x)
    if is_damped:
        for name in NAMES:
            A[name, name], G[name, name] = damped(A[name, name], G[name, name])
    return torch.cat([torch.cat([torch.kron(G[l, m], A[l, m]) for m in NAMES], dim=1) for l in NAMES])  # noqa: E741


def on_three_diagonals() -> Tensor:
    layer = torch.cat([torch.full((math.prod(shape),), i) for i, shape in enumerate(SHAPES.values())])
    return (layer[:, None] - layer).abs() <= 1


def test_the_precision_has_all_blocks_on_three_diagonals():
    """The damped Fisher's, exactly; and the covariance has no others."""
    model, x = mlp(), randn(40, 3, seed=1)
    covariance, here = dense_covariance(built()), on_three_diagonals()
    precision = torch.linalg.inv(covariance) / DATA_SCALE
    assert_close(precision[here], dense_fisher(model, x, is_damped=True)[here], **CLOSE)
    assert_close(covariance[~here], torch.zeros_like(covariance[~here]), **CLOSE)
    joint = built()
    assert_close(as_vector(joint.multiply(unit_values(joint))).mT / DATA_SCALE, precision, **CLOSE)


def test_without_damping_it_has_the_fishers_blocks():
    """The undamped inverse reproduces all tri-diagonal blocks of the Fisher."""
    model, x = mlp(), randn(40, 3, seed=1)
    covariance, here = dense_covariance(built(prior=1e-18, data_scale=1.0)), on_three_diagonals()
    precision = torch.linalg.inv(covariance)
    assert_close(precision[here], dense_fisher(model, x, is_damped=False)[here], rtol=1e-6, atol=1e-7)


def test_it_is_nearer_to_the_fisher_than_independent_blocks():
    """As Gaussians of gradients, ``N(0, F)``: of all chains of layers it is the nearest."""
    model, x = mlp(), randn(40, 3, seed=1)
    fisher = dense_fisher(model, x, is_damped=True) * DATA_SCALE
    joint = built()
    alone = JointGaussian({name: block.as_prior() for name, block in joint.items()})
    zeros = torch.zeros(len(fisher), dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(zeros, fisher)
    chain, independent = (
        torch.distributions.kl_divergence(
            p, torch.distributions.MultivariateNormal(zeros, torch.linalg.inv(dense_covariance(own)))
        )
        for own in (joint, alone)
    )
    assert 0 < chain < 0.8 * independent


def test_the_nearest_independent_blocks_are_those_of_kfac():
    joint = built()
    kron = structures.get("kron", damping="factored", sharing="expand")
    plain = kron.gaussians(specs(measured(mlp(), randn(40, 3, seed=1))))
    for nearest, own in zip(joint.as_prior().values(), plain, strict=True):
        assert_close(nearest.to_dense(), own.to_dense(), **CLOSE)
        assert nearest.kind == "matrix_normal"


# Priors


@pytest.mark.parametrize("kind", ["columns", "gaussian", "of each layer"])
def test_priors_of_other_forms_are_damping_in_their_own_coordinates(kind):
    """The chain of whitened weights under a unit prior, brought back."""
    model = mlp()
    statistics = measured(model, randn(40, 3, seed=1))
    roots = {
        name: {
            "columns": (torch.eye(out), torch.linspace(0.5, 2, in_).diag()),
            "gaussian": (torch.tril(randn(out, out, seed=3)) + 2 * torch.eye(out), torch.eye(in_) * 0.7),
            "of each layer": (torch.eye(out), torch.eye(in_) * (1 + int(name))),
        }[kind]
        for name, (out, in_) in SHAPES.items()
    }
    roots = {name: tuple(root.double() for root in pair) for name, pair in roots.items()}
    priors: dict[str, Prior] = {
        name: {
            "columns": column.diagonal().pow(-2).expand(SHAPES[name]),
            "gaussian": MatrixNormalGaussian(row, column),
            "of each layer": float(column[0, 0] ** -2),
        }[kind]
        for name, (row, column) in roots.items()
    }
    white = {}
    for name, own in statistics.items():
        row, column = roots[name]
        sums = {"input": column.mT @ own.sums["input"] @ column, "gradient": row.mT @ own.sums["gradient"] @ row}
        for key in own.sums.keys() - sums.keys():
            side, to = key.split(" × ")
            left, right = (roots[layer][side == "input"] for layer in (name, to))
            sums[key] = left.mT @ own.sums[key] @ right
        white[name] = Statistics(sums, own.counts)
    joint, expected = (
        structures.build(chained(model), specs(own, prior)) for own, prior in ((statistics, priors), (white, 1.0))
    )
    back = torch.block_diag(*(torch.kron(*roots[name]) for name in NAMES))
    assert_close(dense_covariance(joint), back @ dense_covariance(expected) @ back.mT, **CLOSE)


def test_priors_that_cannot_be_added_are_refused():
    statistics = measured(mlp(), randn(40, 3, seed=1))
    prior = {name: randn(*shape, seed=1).exp() for name, shape in SHAPES.items()}
    with pytest.raises(ArgumentError, match="cannot add exactly"):
        structures.build(chained(mlp()), specs(statistics, prior))


# The evidence


def test_the_correlation_is_what_the_joint_log_determinant_has_beside_the_blocks():
    model = mlp()
    statistics, joint = measured(model, randn(40, 3, seed=1)), built()
    correlation = structures.correlation(chained(model), specs(statistics))
    expected = joint.logdet() - sum(block.logdet() for block in joint.as_prior().values())
    assert_close(correlation(torch.tensor(DATA_SCALE, dtype=torch.float64)), expected, **CLOSE)
    assert expected < -0.1
    for scale in (1e-12, 1e12):
        far = correlation(torch.tensor(scale, dtype=torch.float64))
        assert torch.isfinite(far)
        assert (far > -1e-3) == (scale < 1)  # without data nothing is correlated


def test_the_correlation_under_the_prior_of_an_earlier_task():
    model, statistics = mlp(), measured(mlp(), randn(40, 3, seed=1))
    prior = {
        name: MatrixNormalGaussian(torch.tril(randn(o, o, seed=3)) + 2 * torch.eye(o), torch.eye(i).double() * 0.7)
        for name, (o, i) in SHAPES.items()
    }
    joint = structures.build(chained(model), specs(statistics, prior))
    expected = joint.logdet() - joint.as_prior().logdet()
    correlation = structures.correlation(chained(model), specs(statistics, prior))
    assert_close(correlation(torch.tensor(DATA_SCALE, dtype=torch.float64)), expected, **CLOSE)


def test_the_correlation_is_differentiable_in_scale_and_priors():
    model = mlp()
    statistics = measured(model, randn(40, 3, seed=1))

    def correlation(scale: Tensor, *priors: Tensor) -> Tensor:
        return structures.correlation(chained(model), specs(statistics, dict(zip(NAMES, priors, strict=True))))(scale)

    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (20.0, 0.7, 1.3, 0.2)]
    assert torch.autograd.gradcheck(correlation, values)


# What is linked


def conv_then_linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2))


def with_normalisation() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))


def with_words() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


def with_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 2)
    )


@pytest.mark.parametrize(
    ("make", "linked", "correlated"),
    [
        (mlp, {"0": "2", "2": "4"}, {"0", "2"}),
        (conv_then_linear, {"0": "3", "3": "5"}, {"3"}),
        (with_normalisation, {"0": "3"}, {"0"}),
        (with_words, {"2": "4"}, {"2"}),
        (with_groups, {"3": "4"}, {"3"}),
    ],
)
def test_consecutive_layers_with_one_position_are_linked(make, linked, correlated):
    """Over a normalisation, which has a structure of its own, but not over an embedding or several blocks."""
    model = seeded(make())
    x = {
        conv_then_linear: randn(30, 1, 4, 4, seed=1),
        with_words: torch.arange(60).reshape(30, 2) % 7,
        with_groups: randn(30, 2, 4, 4, seed=1),
    }.get(make, randn(30, 3, seed=1))
    own = chained(model)
    assert {name: kind.linked_to for name, kind in own.items() if kind.linked_to} == linked
    assert {name for name, kind in own.items() if "→" in kind.label} == set(linked)
    joint = structures.build(own, specs(measured(model, x)))
    assert set(joint.links) == correlated
    kron = structures.get("kron", damping="factored", sharing="expand").for_layers(find_layers(model)[0])
    plain = structures.build(kron, specs(structures.measure(kron, record(model, x))))
    for name, block in joint.items():
        if not joint.is_linked(name):
            assert_close(block.to_dense(), plain[name].to_dense(), rtol=0, atol=0)


def test_a_layer_alone_is_kfacs():
    rows = Rows(randn(9, 1, 4, seed=0), randn(2, 9, 1, 3, seed=1))
    kron = structures.get("kron", damping="factored", sharing="expand")
    (own,), (plain,) = (
        kind.gaussians([BlockSpec("0", kind.measure(rows), 5.0, 1.0)]) for kind in (tridiagonal(), kron)
    )
    assert_close(own.to_dense(), plain.to_dense(), rtol=0, atol=0)
    assert_same_statistics(tridiagonal().measure(rows), kron.measure(rows))


def test_layers_that_never_meet_are_kfacs():
    """Cross statistics of zero: the blocks, and the evidence."""
    model = mlp()
    statistics = measured(model, randn(40, 3, seed=1))
    apart = {
        name: replace(own, sums={key: value * (" × " not in key) for key, value in own.sums.items()})
        for name, own in statistics.items()
    }
    joint = structures.build(chained(model), specs(apart))
    assert not joint.links
    for name, block in joint.items():
        assert_close(block.to_dense(), built().as_prior()[name].to_dense(), **CLOSE)
    assert structures.correlation(chained(model), specs(apart))(torch.tensor(DATA_SCALE)) == 0


# Statistics


def test_products_are_of_the_rows():
    model, x = mlp(), randn(40, 3, seed=1)
    statistics = measured(model, x)
    A, G = factors(model, x)
    for name, to in (("0", "2"), ("2", "4")):
        assert_close(statistics[name].mean(f"input × {to}"), A[name, to], **TIGHT)
        assert_close(statistics[name].mean(f"gradient × {to}"), G[name, to], **TIGHT)


def test_products_add_over_batches_and_columns_and_obey_masks():
    model, x = mlp(), randn(40, 3, seed=1)
    own, rows = chained(model), record(model, x)
    whole = structures.measure(own, rows)
    parts = [structures.measure(own, record(model, part)) for part in x.split([13, 27])]
    columns = [
        structures.measure(own, {n: replace(r, gradients=r.gradients[c : c + 1], share=0.5) for n, r in rows.items()})
        for c in range(2)
    ]
    mask = torch.arange(40) < 13
    masked = {
        name: replace(r, gradients=r.gradients * mask[:, None, None], mask=mask[:, None], examples=13.0)
        for name, r in rows.items()
    }
    for name, expected in whole.items():
        assert_same_statistics(parts[0][name] + parts[1][name], expected)
        assert_same_statistics(columns[0][name] + columns[1][name], expected)
        assert_same_statistics(structures.measure(own, masked)[name], parts[0][name])


def test_positions_are_pooled_with_reduce_and_not_paired_without():
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    rows = record(model, randn(20, 5, 3, seed=1))
    pooled = structures.measure(chained(model, "reduce"), rows)
    a, b = (rows[name].inputs.mean(-2) for name in ("0", "2"))
    g, h = (rows[name].gradients.sum(-2) for name in ("0", "2"))
    assert_close(pooled["0"].mean("input × 2"), a.mT @ b / 20, **TIGHT)
    assert_close(pooled["0"].mean("gradient × 2"), torch.einsum("cno,cnp->op", g, h) / 20, **TIGHT)
    apart = structures.measure(chained(model), rows)["0"]
    assert not apart.sums["input × 2"].any()
    assert apart.sums["gradient × 2"].shape == (4, 2)


def test_a_layer_that_was_not_used_leaves_zeros_of_the_same_names():
    """Identity, full and half measurements blend and add."""
    model = mlp()
    own, rows, layers = chained(model), record(model, randn(9, 3, seed=1)), find_layers(model)[0]
    whole = structures.measure(own, rows)
    some = structures.measure(own, {name: rows[name] for name in ("0", "4")})
    for name in ("0", "4"):
        identity = own[name].identity(layers[name].shape, rows[name].gradients)
        for other in (some[name], identity):
            assert {k: v.shape for k, v in other.sums.items()} == {k: v.shape for k, v in whole[name].sums.items()}
            assert other.counts.keys() == whole[name].counts.keys()
    assert not some["0"].sums["input × 2"].any()


def test_statistics_follow_a_layer_to_another_neighbour():
    model = mlp()
    whole = chained(model)
    model[2].requires_grad_(False)
    rest = chained(model)
    assert rest["0"].linked_to == "4"
    model[2].requires_grad_(True)
    own = measured(model, randn(9, 3, seed=1))["0"]
    moved = rest["0"].adapted(own)
    assert set(moved.sums) == {"input", "gradient", "input × 4", "gradient × 4"}
    assert moved.sums["input × 4"].shape == (4, 3)
    assert not moved.sums["input × 4"].any()
    assert torch.equal(moved.sums["input"], own.sums["input"])
    assert whole["0"].adapted(own) is own
    assert set(tridiagonal().adapted(own).sums) == {"input", "gradient"}
    plain = tridiagonal().measure(Rows(randn(3, 1, 4, seed=0), randn(1, 3, 1, 3, seed=1)))
    assert set(whole["0"].adapted(plain).sums) == set(own.sums)


@pytest.mark.parametrize("idle", NAMES)
def test_a_layer_that_some_batches_left_out_is_not_more_than_certain(idle):
    """Sums over the geometric mean of counts go with the means of both, where correlations are all but 1."""
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Identity(), nn.Linear(2, 2)))
    own, first = chained(model), measured(model, randn(20, 3, seed=1))
    rows = {name: r for name, r in record(model, 3 * randn(60, 3, seed=2)).items() if name != idle}
    more = structures.measure(own, rows)
    statistics = {name: first[name] + more[name] if name in more else first[name] for name in first}
    for prior in (1.0, 1e-9):
        joint = structures.build(own, specs(statistics, prior))
        assert all(link.kept == 1 for link in joint.links.values())
        assert set(joint.links) == {"0", "2"}


def test_correlations_above_one_are_scaled_down_visibly():
    """Averages of unlike data: the diagonal blocks stay what they are."""
    model = mlp()
    statistics = measured(model, randn(40, 3, seed=1))
    statistics["0"] = replace(
        statistics["0"],
        sums={key: value * (3.0 if " × " in key else 1.0) for key, value in statistics["0"].sums.items()},
    )
    joint = structures.build(chained(model), specs(statistics))
    assert joint.links["0"].kept < 0.9
    assert joint.links["2"].kept == 1
    assert bool((torch.linalg.eigvalsh(dense_covariance(joint)) > 0).all())
    size = math.prod(SHAPES["0"])
    precision = as_vector(joint.multiply(unit_values(joint))).mT[:size, :size]
    assert_close(precision, built().as_prior()["0"].to_dense(), **CLOSE)


def test_in_single_precision_it_is_the_same_rounded():
    model, x = mlp(), randn(40, 3, seed=1)
    single = {name: own.map(Tensor.float) for name, own in measured(model, x).items()}
    joint = structures.build(chained(model), specs(single))
    assert {t.dtype for block in joint.values() for t in block.state.values()} == {torch.float32}
    assert {t.dtype for link in joint.links.values() for t in link.state.values()} == {torch.float32}
    values = {name: randn(*shape, seed=2) for name, shape in SHAPES.items()}
    solved = joint.solve({name: own.float() for name, own in values.items()})
    assert_close(as_vector(solved).double(), as_vector(built().solve(values)), rtol=1e-4, atol=1e-5)


def test_an_almost_linear_network_has_a_finite_gaussian():
    """Where one layer's change is undone by the next, correlations are 1 up to the damping."""
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    statistics = {name: own.map(Tensor.float) for name, own in measured(model, randn(40, 3, seed=1)).items()}
    for prior in (1.0, 1e-6, 1e-12):
        joint = structures.build(chained(model), specs(statistics, prior, 1e5))
        assert joint.links["0"].kept > 0.999
        assert all(bool(torch.isfinite(v).all() and (v > 0).all()) for v in joint.marginal_variance().values())
        value = {name: own.to_dense().new_ones(own.shape) for name, own in joint.items()}
        assert all(bool(torch.isfinite(own).all()) for own in joint.solve(value).values())
    wide, narrow = (as_vector(own.marginal_variance()).sum() for own in (joint, joint.as_prior()))
    assert wide > narrow


def test_damping_is_factored_whatever_is_asked():
    for damping in structures.DAMPING_KINDS:
        own = structures.get("tridiagonal", damping=damping, sharing="expand")
        assert own.damping == "factored"
        assert own.label == "tridiagonal/factored"
