"""What a fit takes of the data: each statistic is the dense formula's, however the data come and are pulled back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac.curvature.modules import ConvAdapter
from bayes_kfac.likelihoods import Categorical
from tests.helpers import (
    TIGHT,
    assert_same_statistics,
    block_fishers,
    matrices,
    parameter_jacobians,
    randn,
    rng,
    seeded,
)
from tests.laplace.oracles import (
    LIKELIHOODS,
    NETS,
    X,
    Y,
    batches,
    classes,
    dense_fisher,
    fit_net,
    fitted,
    gaussian,
    mlp,
)
from tests.posteriors import FAMILY_NAMES


def assert_same_measurement(actual: bk.Laplace, expected: bk.Laplace, **tolerance: float) -> None:
    own, other = actual._fitted.measurement, expected._fitted.measurement
    assert own is not None
    assert other is not None
    assert set(own.statistics) == set(other.statistics)
    for name, statistics in own.statistics.items():
        counts = {key: pytest.approx(count, rel=1e-12) for key, count in other.statistics[name].counts.items()}
        assert dict(statistics.counts) == counts
        expected_sums = replace(other.statistics[name], counts=statistics.counts)
        assert_same_statistics(statistics, expected_sums, **tolerance)
    assert_close(own.nll, other.nll, **(tolerance or TIGHT))
    assert (own.num_examples, own.num_targets) == (other.num_examples, other.num_targets)


# The exact Fisher


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_the_posterior_is_the_generalised_gauss_newton_of_torch_func(kind: str, structure: str) -> None:
    """``P = (N/τ) mean_n Jᵀ F J + δ I`` with Jacobians of torch.func, or its diagonal."""
    case = LIKELIHOODS[kind]
    model, y = mlp(case.outputs), case.targets(11)
    laplace = fitted(model, case.make(), batches(X, y), structure=structure, prior_precision=0.3, temperature=0.4)
    expected = block_fishers(model, X, case.fisher(model(X).detach()))
    for name, block in laplace.posterior().blocks.items():
        fisher = expected[name] if structure == "dense" else torch.diag(expected[name].diagonal())
        precision = 11 / 0.4 * fisher + 0.3 * torch.eye(len(fisher), dtype=torch.float64)
        assert_close(block.to_dense(), precision, **TIGHT)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_kronecker_factors_are_those_of_the_formula(kind: str) -> None:
    """``A`` and ``G`` of both layers of an MLP, from its own equations."""
    case = LIKELIHOODS[kind]
    model, y = mlp(case.outputs), case.targets(11)
    laplace = fitted(model, case.make(), batches(X, y), prior_precision=0.3, temperature=0.4)
    weight, one = model[2].weight.detach(), torch.ones(11, 1, dtype=torch.float64)
    hidden = (X @ model[0].weight.detach().T + model[0].bias.detach()).tanh()
    output_fisher = case.fisher(hidden @ weight.T + model[2].bias.detach())
    back = weight * (1 - hidden.square())[:, None, :]  # [n, outputs, hidden]
    inputs = {"0": torch.cat([X, one], 1), "2": torch.cat([hidden, one], 1)}
    G = {"0": back.mT @ output_fisher @ back, "2": output_fisher}
    for name, block in laplace.posterior().blocks.items():
        A = inputs[name].T @ inputs[name] / 11
        product = torch.kron(G[name].mean(0), A)
        assert_close(block.to_dense(), 11 / 0.4 * product + 0.3 * torch.eye(len(product)).double(), **TIGHT)


def test_one_dense_block_of_the_whole_model_is_its_true_precision() -> None:
    """A model that is one layer has no blocks to leave apart: the Hessian of the negative log joint, by autograd."""
    model = seeded(nn.Sequential(nn.Linear(3, 3)))
    y = LIKELIHOODS["categorical"].targets(11)
    laplace = fitted(model, Categorical(), batches(X, y), structure="dense", prior_precision=0.6)

    def joint(matrix: Tensor) -> Tensor:
        output = X @ matrix[:, :3].T + matrix[:, 3]
        return nn.functional.cross_entropy(output, y, reduction="sum") + 0.3 * matrix.square().sum()

    at = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    hessian = torch.autograd.functional.hessian(joint, at).reshape(12, 12)
    assert_close(laplace.posterior().blocks["0"].to_dense(), hessian, **TIGHT)


# The empirical and the sampled Fisher


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_empirical_fisher_is_the_mean_of_the_targets_outer_products(kind: str) -> None:
    case = LIKELIHOODS[kind]
    model, y = mlp(case.outputs), case.targets(11)
    laplace = fitted(model, case.make(), batches(X, y), structure="dense", fisher="empirical", prior_precision=0.3)
    layers = laplace.layers
    total = {name: torch.zeros(()).double() for name in layers}
    for x_n, y_n in zip(X.split(1), y.split(1), strict=True):
        gradients = torch.autograd.grad(case.log_likelihood(model(x_n), y_n), list(model.parameters()))
        named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
        for name, layer in layers.items():
            g = layer.matrix(named).flatten()
            total[name] = total[name] + g[:, None] * g
    for name, block in laplace.posterior().blocks.items():
        assert_close(block.to_dense(), total[name] + 0.3 * torch.eye(len(total[name])).double(), **TIGHT)


def test_the_three_fishers_differ() -> None:
    found = [
        fit_net("classifier", fisher=kind, generator=rng(0)).posterior().blocks["0"].to_dense()
        for kind in ("exact", "mc", "empirical")
    ]
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    assert not torch.allclose(found[0], found[2], rtol=1e-3)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_sampled_targets_give_the_exact_fisher_in_expectation(kind: str, structure: str) -> None:
    """Twenty thousand draws leave about a percent."""
    case = LIKELIHOODS[kind]
    model, y = mlp(case.outputs), case.targets(11)
    exact = fitted(model, case.make(), batches(X, y), structure=structure)
    many = [(X.repeat(200, 1), y.repeat(200, *[1] * (y.ndim - 1)))] * 10
    sampled = fitted(model, case.make(), many, structure=structure, fisher="mc", generator=rng(0))
    assert exact._fitted is not None
    assert sampled._fitted is not None
    for name, statistics in exact._fitted.measurement.statistics.items():
        for key in statistics.sums:
            expected, found = statistics.mean(key), sampled._fitted.measurement.statistics[name].mean(key)
            assert (found - expected).norm() < 0.04 * expected.norm()


def test_a_generator_decides_the_sampled_targets() -> None:
    def found(seed: int) -> Tensor:
        torch.manual_seed(seed + 7)  # must not matter
        return fit_net("classifier", fisher="mc", generator=rng(seed)).posterior().blocks["0"].to_dense()

    assert torch.equal(found(0), found(0))
    assert not torch.equal(found(0), found(1))


# However the data come


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", NETS)
def test_the_split_into_batches_does_not_matter(name: str, structure: str) -> None:
    """Nor does the examples' order; a batch of one is like any other."""
    net = NETS[name]
    expected = fitted(net.make(), net.likelihood(), [(net.x, net.y)], structure=structure)
    order = torch.randperm(11, generator=rng(0))
    for loader in (batches(net.x, net.y, 1), batches(net.x[order], net.y[order], 4)):
        assert_same_measurement(fitted(net.make(), net.likelihood(), loader, structure=structure), expected)


@dataclass
class Example:
    """A batch as a dataclass."""

    input: Tensor
    target: Tensor


def test_the_kind_of_loader_does_not_matter() -> None:
    """A ``DataLoader``, a list, a generator that runs once, mappings, dataclasses, a mask that masks nothing."""
    expected = fit_net("mlp")
    loaders: dict[str, Any] = {
        "loader": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=rng(0)),
        "tuple": tuple(batches(X, Y)),
        "generator": (batch for batch in batches(X, Y)),
        "lists": [[x, y] for x, y in batches(X, Y)],
        "tuples of arguments": [((x,), y) for x, y in batches(X, Y)],
        "mappings": [{"input": x, "labels": y} for x, y in batches(X, Y)],
        "dataclasses": [Example(x, y) for x, y in batches(X, Y)],
        "masks": [(x, y, torch.ones(len(x), dtype=torch.bool)) for x, y in batches(X, Y)],
        "mappings with masks": [
            {"input": x, "target": y, "mask": torch.ones(y.shape, dtype=torch.bool)} for x, y in batches(X, Y)
        ],
    }
    for loader in loaders.values():
        assert_same_measurement(fitted(mlp(), gaussian(), loader), expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", NETS)
def test_the_memory_budget_does_not_matter(name: str, structure: str, sharing: str) -> None:
    """Columns pulled back one at a time, or by twos and a rest, sum to what they are together."""
    net = NETS[name]
    expected = fit_net(name, structure=structure, sharing=sharing)
    assert_same_measurement(fit_net(name, structure=structure, sharing=sharing, memory_budget=1), expected)
    seen: list[int] = []
    model = net.make()
    laplace = bk.Laplace(model, net.likelihood(), structure=structure, sharing=sharing)
    pull_backs = laplace._recorder.pull_back
    laplace._recorder.pull_back = lambda *args, **options: _by_twos(pull_backs(*args, **options), seen)  # type: ignore[method-assign]
    assert_same_measurement(laplace.fit(batches(net.x, net.y), progress=False), expected)
    check, *parts = seen
    assert check == 1  # that the layers account for the gradient, once
    assert max(parts) == min(2, sum(parts[: parts.index(min(parts)) + 1]))


def _by_twos(pull_back: Any, seen: list[int]) -> Any:
    """The same, in parts of at most two columns."""
    object.__setattr__(pull_back, "columns_within", lambda budget: 2)
    rows = pull_back.rows

    def counted(columns: Tensor, mask: Tensor | None = None) -> Any:
        seen.append(len(columns))
        return rows(columns, mask)

    object.__setattr__(pull_back, "rows", counted)
    return pull_back


class Products(TorchDispatchMode):
    """Counts the matrix products of more than nothing by the shape of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and args[0].numel():
            self.shapes[tuple(result.shape)] += 1
        return result


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_inputs_are_multiplied_once_whatever_the_budget(sharing: str) -> None:
    """They are the same for all columns: with many classes, or a small budget, they would be most of a fit."""
    model, data = seeded(nn.Linear(6, 5)), [(randn(7, 6, seed=0), torch.randint(5, (7,), generator=rng(0)))]
    with Products() as products:
        fitted(model, Categorical(), data, sharing=sharing, memory_budget=1)
    assert products.shapes[5, 5] == 5  # one for each column
    assert products.shapes[7, 7] == 1  # 6 inputs and the 1 of the bias


def test_patches_are_made_once_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each batch, in the probe and the check of the first as well."""
    made: list[int] = []
    input_rows = ConvAdapter.input_rows

    def counted(self: ConvAdapter, inputs: Tensor) -> Tensor:
        made.append(len(inputs))
        return input_rows(self, inputs)

    monkeypatch.setattr(ConvAdapter, "input_rows", counted)
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5)))
    data = [(randn(size, 1, 4, 4, seed=size), torch.randint(5, (size,), generator=rng(0))) for size in (6, 7)]
    fitted(model, Categorical(), data, memory_budget=1)
    assert made == [6, 7]


def test_a_small_budget_bounds_the_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One column at a time for the smallest, all at once by default."""
    from bayes_kfac.curvature import PullBack

    seen: list[int] = []
    rows = PullBack.rows

    def counted(self: PullBack, columns: Tensor, mask: Tensor | None = None) -> Any:
        seen.append(len(columns))
        return rows(self, columns, mask)

    monkeypatch.setattr(PullBack, "rows", counted)
    fit_net("positions", memory_budget=1)
    assert set(seen) == {1}
    seen.clear()
    fit_net("positions")
    check, *parts = seen
    assert check == 1  # that the layers account for the gradient, once
    assert set(parts) == {6}


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", NETS)
def test_single_precision_is_double_precision_to_its_rounding(name: str, structure: str) -> None:
    net = NETS[name]
    x = net.x.float() if net.x.is_floating_point() else net.x
    y = net.y.float() if net.y.is_floating_point() else net.y
    single = fitted(net.make().float(), net.likelihood().float(), batches(x, y), structure=structure)
    double = fit_net(name, structure=structure)
    assert single._fitted is not None
    assert double._fitted is not None
    for layer, own in single._fitted.measurement.statistics.items():
        expected = matrices(double._fitted.measurement.statistics[layer])
        for key, value in matrices(own).items():
            assert value.dtype == torch.float32
            assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-4)
    assert_close(single.log_marginal_likelihood(), double.log_marginal_likelihood(), rtol=1e-4, atol=0)


# Masks


def test_examples_that_are_masked_are_as_if_they_were_not_there() -> None:
    """Statistics, log-likelihood and counts; what the masked targets hold does not matter, NaN included."""
    for structure in FAMILY_NAMES:
        expected = fitted(mlp(), gaussian(), batches(X[:7], Y[:7]), structure=structure)
        mask = torch.arange(11) < 7
        y = torch.where(mask[:, None], Y, torch.nan)
        actual = fitted(mlp(), gaussian(), [(X, y, mask)], structure=structure)
        assert_same_measurement(actual, expected)


def positions() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    net = NETS["positions"]
    mask = torch.rand(net.y.shape, generator=rng(3)) < 0.6
    mask[0], mask[1] = True, False
    return net.make(), net.x, net.y, mask


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_masked_positions_leave_nothing_in(fisher: str) -> None:
    """The dense Fisher of a sequence model is that of the positions that weigh; the rest has no gradient."""
    model, x, y, mask = positions()
    laplace = fitted(model, Categorical(), [(x, torch.where(mask, y, 10**6), mask)], structure="dense", fisher=fisher)
    measurement = laplace._fitted.measurement
    assert measurement is not None
    examples = int(mask.any(1).sum())
    assert measurement.num_examples == examples < len(x)
    assert measurement.num_targets == float(mask.sum())
    output = model(x).detach()
    logs = output.log_softmax(-1)
    assert_close(-measurement.nll, logs.gather(-1, y[..., None])[..., 0][mask].sum(), **TIGHT)
    derivatives = {k: v.unflatten(1, output.shape[1:]) for k, v in parameter_jacobians(model, x).items()}
    probs = output.softmax(-1)
    one_hot = nn.functional.one_hot(y, 2).double()
    for name, layer in laplace.layers.items():
        total = torch.zeros(()).double()
        for n in range(len(x)):
            J = torch.stack(
                [
                    torch.stack(
                        [layer.matrix({k: v[n, t, c] for k, v in derivatives.items()}).flatten() for c in range(2)]
                    )
                    for t in range(3)
                ]
            )  # [positions, classes, size]
            J = J * mask[n][:, None, None]
            if fisher == "exact":
                for t in range(3):
                    F = torch.diag(probs[n, t]) - probs[n, t][:, None] * probs[n, t]
                    total = total + J[t].T @ F @ J[t]
            else:
                g = ((probs[n] - one_hot[n])[..., None] * J).sum((0, 1))
                total = total + g[:, None] * g
        assert_close(dense_fisher(measurement.statistics[name]), total / examples, **TIGHT)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_what_masked_targets_hold_does_not_matter(structure: str, fisher: str) -> None:
    model, x, y, mask = positions()
    found = [
        fitted(
            model,
            Categorical(),
            [(x, torch.where(mask, y, other), mask)],
            structure=structure,
            fisher=fisher,
            generator=rng(5),
        )
        for other in (0, 1, -(10**9))
    ]
    for laplace in found[1:]:
        assert_same_measurement(laplace, found[0])


# How many examples


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_num_data_scales_all_sums_alike(structure: str) -> None:
    """A tenth of the data with ``num_data`` of all of it is ten copies of the tenth."""
    copies = fitted(mlp(), gaussian(), batches(X, Y) * 10, structure=structure)
    scaled = fitted(mlp(), gaussian(), batches(X, Y), structure=structure, num_data=110)
    assert_same_measurement(scaled, copies)
    assert_close(scaled.log_marginal_likelihood(), copies.log_marginal_likelihood(), **TIGHT)
    assert scaled.posterior().provenance.num_data == 110
    for name, block in scaled.posterior().blocks.items():
        assert_close(block.to_dense(), copies.posterior().blocks[name].to_dense(), **TIGHT)


def test_num_data_may_be_less_than_what_is_yielded() -> None:
    """Augmented data are passed several times and count once."""
    once = fit_net("mlp")
    augmented = fitted(mlp(), gaussian(), batches(X, Y) * 3, num_data=11)
    assert_same_measurement(augmented, once)


# Data that are wrong


@pytest.mark.parametrize("loader", [[], iter([]), [(X[:0], Y[:0])], [(X, Y, torch.zeros(11, dtype=torch.bool))]])
def test_a_loader_without_examples_is_an_error_that_says_what_to_pass(loader: Any) -> None:
    with pytest.raises(bk.errors.ArgumentError, match=r"loader=.* yielded no example.*DataLoader") as caught:
        fitted(mlp(), gaussian(), loader)
    assert len(str(caught.value)) < 200, "the data themselves are no message"


def test_a_generator_that_is_used_up_is_named() -> None:
    loader = (batch for batch in batches(X, Y))
    laplace = fitted(mlp(), gaussian(), loader)
    with pytest.raises(bk.errors.ArgumentError, match="used up"):
        laplace.fit(loader, progress=False)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_data_with_nan_are_an_error_that_names_what_holds_it(structure: str) -> None:
    x, y = X.clone(), Y.clone()
    x[4, 1] = torch.nan
    y[3, 0] = torch.nan
    with pytest.raises(bk.errors.NonFiniteError, match="negative log-likelihood is nan"):
        fitted(mlp(), gaussian(), batches(X, y), structure=structure)
    for size in (11, 5, 4, 1):  # whether it comes with the first batch or later
        with pytest.raises(bk.errors.NonFiniteError, match="Check the data"):
            fitted(mlp(), gaussian(), batches(x, Y, size), structure=structure)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_a_fit_that_failed_on_nan_leaves_nothing_to_the_next(structure: str, sharing: str) -> None:
    """What was learned of the model from outputs that are NaN, such as which examples meet, is forgotten."""
    net = NETS["positions"]
    expected = fit_net("positions", structure=structure, sharing=sharing)
    laplace = bk.Laplace(net.make(), net.likelihood(), structure=structure, sharing=sharing)
    x = net.x.clone()
    x[2] = torch.nan
    with pytest.raises(bk.errors.NonFiniteError):
        laplace.fit(batches(x, net.y), progress=False)
    assert_same_measurement(laplace.fit(batches(net.x, net.y), progress=False), expected)


def test_statistics_that_overflow_name_layer_and_statistic() -> None:
    """The log-likelihood is finite where the loss is flat, and the curvature alone is infinite."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).float()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(bk.errors.NonFiniteError, match=r"Layer '0': the 'input' statistic"):
        fitted(model, bk.likelihoods.Bernoulli(), [(torch.full((2, 1), 1e30), torch.ones(2, 1))])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (X, "Tensor"),
        ((X,), "tuple"),
        ({"input": X}, "fields"),
        ((X, Y, None, None), "tuple"),
    ],
)
def test_batches_of_another_form_are_named(batch: Any, match: str) -> None:
    with pytest.raises(bk.errors.ArgumentError, match=rf"loader yielded.*{match}.*Allowed"):
        fitted(mlp(), gaussian(), [batch])


@pytest.mark.parametrize(
    ("target", "match"), [(Y[:, 0], "must be equal"), (Y.long(), "floating point"), (Y[:5], "must be equal")]
)
def test_targets_that_do_not_fit_are_refused(target: Tensor, match: str) -> None:
    with pytest.raises(bk.errors.TargetError, match=match):
        fitted(mlp(), gaussian(), [(X, target)])


def test_masks_that_are_not_boolean_are_refused() -> None:
    with pytest.raises(bk.errors.TargetError, match="must be boolean"):
        fitted(mlp(), gaussian(), [(X, Y, torch.ones(11))])


class Forgetful(nn.Module):
    """One of its layers never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(3, 2), nn.Linear(3, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_layers_that_never_run_are_named_with_the_remedy(structure: str) -> None:
    model = seeded(Forgetful())
    with pytest.raises(bk.errors.UsageError, match=r"\['idle', 'unused'\].*subset="):
        fitted(model, gaussian(), batches(X, Y), structure=structure)
    laplace = fitted(model, gaussian(), batches(X, Y), structure=structure, subset=["used"])
    assert set(laplace.posterior().blocks) == {"used"}


class Heads(nn.Module):
    """A body and a head for each task; a batch has one task, or each example one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(2, 3), nn.ModuleList([nn.Linear(3, 2, bias=False) for _ in range(2)])

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        if len(task.unique()) == 1:
            return self.heads[int(task[0])](hidden)
        return torch.stack([head(hidden) for head in self.heads], 1)[torch.arange(len(x)), task]


@pytest.mark.parametrize("structure", ["dense", "diagonal", "unit_wise", "tkfac"])
def test_a_layer_that_only_some_batches_use_has_their_examples_alone(structure: str) -> None:
    """Whether tasks are apart or mixed; the evidence too."""
    model, lik = seeded(Heads()).double(), bk.likelihoods.Gaussian(0.5)
    x, y = randn(9, 2, seed=0), randn(9, 2, seed=1)
    task = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0])
    apart = [({"x": x[task == own], "task": task[task == own]}, y[task == own]) for own in range(2)]
    mixed = [({"x": x, "task": task}, y)]
    fits = [bk.Laplace(model, lik, structure=structure).fit(batches, progress=False) for batches in (apart, mixed)]
    assert_same_measurement(*fits, **TIGHT)
    assert_close(*(fit.log_marginal_likelihood() for fit in fits), **TIGHT)
    if structure == "dense":
        hidden = model.body(x[task == 0]).tanh()
        moment = hidden.mT @ hidden / 0.5**2 + torch.eye(3).double()
        assert_close(fits[0].posterior().blocks["heads.0"].to_dense(), torch.block_diag(moment, moment), **TIGHT)


class Graphs(nn.Module):
    """Nodes of several graphs in one batch; those whose first element is positive go through one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.some, self.after = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, nodes: Tensor, owner: Tensor, sizes: Tensor) -> Tensor:
        hidden, chosen = self.before(nodes).tanh(), nodes[:, 0] > 0
        hidden = hidden.index_add(0, chosen.nonzero()[:, 0], self.some(hidden[chosen]).tanh())
        return self.after(hidden.new_zeros(len(sizes), 3).index_add(0, owner, hidden) / sizes.unsqueeze(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diagonal"])
def test_the_split_of_graphs_into_batches_does_not_matter(structure: str, sharing: str) -> None:
    """Nor that nodes are not equally many, and that some graphs have none in a layer."""
    nodes, y, sizes = randn(20, 2, seed=0), randn(8, 2, seed=1), torch.tensor([1, 2, 3, 4, 2, 4, 1, 3])
    nodes[0, 0], nodes[1, 0] = -1.0, 1.0
    model, fits = seeded(Graphs()), []
    for size in (1, 2, 4, 8):
        parts = zip(nodes.split([int(part.sum()) for part in sizes.split(size)]), sizes.split(size), strict=True)
        inputs = [
            {"nodes": own, "owner": torch.arange(len(part)).repeat_interleave(part), "sizes": part}
            for own, part in parts
        ]
        data = list(zip(inputs, y.split(size), strict=True))
        laplace = bk.Laplace(model, bk.likelihoods.Gaussian(0.5), structure=structure, sharing=sharing)
        fits.append(laplace.fit(data, progress=False))
    for fit in fits[1:]:
        assert_close(fit.log_marginal_likelihood(), fits[0].log_marginal_likelihood(), **TIGHT)
        if structure != "ekfac":  # its basis is that of each fit
            assert_same_measurement(fit, fits[0], **TIGHT)


def test_weights_used_without_their_module_are_refused() -> None:
    """The rows that hooks see would be a part of the gradient only."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.layer.weight.mT

    with pytest.raises(bk.errors.UnsupportedModelError, match=r"Layer 'layer'.*do not account"):
        fitted(seeded(Hidden()), gaussian(), [(X, randn(11, 3, seed=3))])


@pytest.mark.parametrize(
    "make", [lambda: classes(11, count=3, seed=1)[:, None], lambda: classes(11, count=3, seed=1).double()]
)
def test_class_targets_of_the_wrong_shape_or_dtype_are_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(bk.errors.TargetError, match="class indices"):
        fitted(mlp(3), Categorical(), [(X, make())])
