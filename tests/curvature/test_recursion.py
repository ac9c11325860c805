"""The recursive Fisher (KFRA) against the published recursion, written out in matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Meter, Rows, find_layers, kronecker_factors, recursion, recursive_rows
from bayes_kfac.errors import ArgumentError, NonFiniteError, UnsupportedModelError
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.helpers import TIGHT, pull_back, randn, rng, seeded
from tests.random_rows import dense_rows

BATCH, IN, OUT = 7, 4, 3
X = randn(BATCH, IN, seed=1)
LIKELIHOODS = {"gaussian": Gaussian(0.5), "categorical": Categorical()}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return seeded(
        nn.Sequential(nn.Linear(IN, 6), activation(), nn.Linear(6, 5, bias=False), activation(), nn.Linear(5, OUT))
    )


def factors(
    model: nn.Module,
    likelihood: Likelihood = LIKELIHOODS["gaussian"],
    x: Tensor = X,
    *,
    mask: Tensor | None = None,
    recursive: bool = True,
    **options: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors of each layer, recursive or exact."""
    passed = pull_back(model, x, **options)
    columns = likelihood.fisher_root(passed.output.detach())
    if mask is not None:
        columns = columns * mask.reshape(1, *mask.shape, *[1] * (columns.ndim - 1 - mask.ndim))
    rows = (recursive_rows if recursive else type(passed).rows)(passed, columns, mask)
    statistics = {name: kronecker_factors(own, "expand") for name, own in rows.items()}
    return {name: (own.mean("input"), own.mean("gradient")) for name, own in statistics.items()}


def assert_same_factors(one: dict[str, tuple[Tensor, Tensor]], other: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert list(one) == list(other)
    for name, (A, G) in other.items():
        assert_close(one[name][0], A, **TIGHT)
        assert_close(one[name][1], G, **TIGHT)


def published(model: nn.Module, likelihood: Likelihood, x: Tensor, *, average_first: bool) -> dict[str, Tensor]:
    """``H_l = B_l W_{l+1}ᵀ H_{l+1} W_{l+1} B_l`` by explicit matrices: of averages (KFRA), or averaged (KFLR)."""
    pre, slopes, z = {}, {}, x
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            z = pre[name] = module(z).detach()
        else:
            leaf = z.requires_grad_()
            z = module(leaf)
            slopes[name] = torch.autograd.grad(z.sum(), leaf)[0]
            z = z.detach()
    root = likelihood.fisher_root(z)
    H = torch.einsum("cni,cnj->nij", root, root)
    found = {}
    for last, name in zip([None, *reversed(pre)], reversed(pre), strict=False):
        if last is not None:
            W, B = model.get_submodule(last).weight.detach(), torch.diag_embed(slopes[str(int(last) - 1)])
            H = B @ W.mT @ H @ W @ B
        found[name] = H.mean(0)
        if average_first:
            H = H.mean(0).expand_as(H)
    return {name: found[name] for name in pre}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("columns", [2, 64])
def test_it_is_the_published_recursion(activation, kind, columns, monkeypatch):
    """G of three layers is KFRA's, whole or a few columns at a time, and A is the inputs' second moment."""
    monkeypatch.setattr(recursion, "COLUMNS", columns)
    model, likelihood = mlp(ACTIVATIONS[activation]), LIKELIHOODS[kind]
    found = factors(model, likelihood)
    expected = published(model, likelihood, X, average_first=True)
    assert list(found) == list(expected)
    for name, G in expected.items():
        assert_close(found[name][1], G, **TIGHT)
    exact = factors(model, likelihood, recursive=False)
    for name, (A, _) in exact.items():
        assert_close(found[name][0], A, **TIGHT)
    assert (found["0"][1] - exact["0"][1]).norm() > 0.01 * exact["0"][1].norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_exact_fisher_is_the_recursion_of_each_example(activation, kind):
    """KFLR: G of fisher='exact' is the average of what the recursion gives for each example alone."""
    model, likelihood = mlp(ACTIVATIONS[activation]), LIKELIHOODS[kind]
    for name, (_, G) in factors(model, likelihood, recursive=False).items():
        assert_close(G, published(model, likelihood, X, average_first=False)[name], **TIGHT)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_of_one_example_it_is_exact(kind):
    model, likelihood = mlp(), LIKELIHOODS[kind]
    for n in range(3):
        x = X[n : n + 1]
        assert_same_factors(factors(model, likelihood, x), factors(model, likelihood, x, recursive=False))


def test_of_a_linear_network_it_is_exact():
    """Where no Jacobian depends on the example the average may be taken first."""
    model = seeded(nn.Sequential(nn.Linear(IN, 6), nn.Linear(6, 2), nn.Linear(2, 5), nn.Linear(5, OUT)))
    assert_same_factors(factors(model), factors(model, recursive=False))


def test_the_last_layer_is_exact_even_below_a_nonlinear_output():
    """The average begins at the last layer's own outputs."""
    model = nn.Sequential(*mlp(), nn.Tanh(), nn.Softplus())
    assert_close(factors(model)["4"][1], factors(model, recursive=False)["4"][1], **TIGHT)


def test_masked_examples_are_as_if_they_were_not_there():
    model, keep = mlp(), torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    for kind in LIKELIHOODS.values():
        assert_same_factors(factors(model, kind, mask=keep), factors(model, kind, X[keep]))


def test_masked_outputs_have_no_curvature():
    """A mask of single outputs is that of the last layer's columns; examples that have one left weigh."""
    model, mask = nn.Sequential(*mlp(), nn.Unflatten(1, (OUT, 1))), torch.ones(BATCH, OUT).bool()
    mask[2, 1:] = mask[4] = False
    found = factors(model, mask=mask)
    G = mask.double().sum(0).div(0.5**2 * (BATCH - 1)).diag_embed()
    assert_close(found["4"][1], G, **TIGHT)
    without = torch.arange(BATCH) != 4
    assert_same_factors(found, factors(model, x=X[without], mask=mask[without]))


def test_words_convolutions_of_one_position_and_what_lies_between():
    """Of one example it is exact for any maps in the chain and anything without weights between them."""
    embedded = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, OUT))
    image = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ELU(), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Softmax(-1), nn.Linear(4, OUT)
    )
    frozen = mlp()
    frozen[2].requires_grad_(False)
    for model, x in [
        (seeded(embedded), torch.tensor([3])),
        (seeded(image), randn(1, 2, 3, 3, seed=2)),
        (frozen, X[:1]),
    ]:
        assert_same_factors(factors(model, x=x), factors(model, x=x, recursive=False))
    linear = seeded(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, OUT)))
    x = torch.arange(BATCH)
    assert_same_factors(factors(linear, x=x), factors(linear, x=x, recursive=False))


def test_low_precision_and_scalar_outputs():
    """A model in 16 bits has factors in 32; an output without a dimension of its own is one column."""
    model = nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    seeded(model)
    exact = factors(model, Bernoulli())
    low = factors(model.bfloat16(), Bernoulli(), X.bfloat16())
    for name, (_, G) in low.items():
        assert G.dtype == torch.float32
        assert_close(G.double(), exact[name][1], rtol=0.1, atol=0.02)


def test_an_autocast_region_changes_nothing():
    """The meter measures while the caller's region is open: moments and roots are not in 16 bits."""
    with torch.autocast("cpu", torch.bfloat16):
        passed = pull_back(mlp().float(), X.float())
        columns = Categorical().fisher_root(passed.output.detach())
        inside = recursive_rows(passed, columns)
    for name, rows in recursive_rows(passed, columns).items():
        assert rows.gradients.dtype == torch.float32
        assert torch.equal(inside[name].gradients, rows.gradients)


# What is no chain


class Residual(nn.Module):
    """A connection past the inner layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(IN, 5), nn.Linear(5, 5), nn.Linear(5, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.inner(h).tanh())


class Dead(Residual):
    """The residual branch has no gradient at these weights."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((h - 1e6).relu() + self.inner(h).tanh())


class Branches(Residual):
    """Two layers of one input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.inner(nn.functional.pad(x, (0, 1))))


class Again(Residual):
    """A module that is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.inner(self.first(x)).tanh()))


class Tied(Residual):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 5)
        self.other.weight, self.other.bias = self.inner.weight, self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.other(self.inner(self.first(x)).tanh()))


class Meeting(Residual):
    """Examples that see their mean."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.inner(h - h.mean(0)))


class Alone(nn.Module):
    """A parameter that no module multiplies with its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.last = nn.Parameter(torch.ones(IN)), nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.shift)


@pytest.mark.parametrize(
    ("kind", "x", "named"),
    [
        (Residual, X, "'first' is beside 'inner'"),
        (Dead, X, "'first' is beside 'inner'"),
        (Branches, X, "'first' is beside 'inner'"),
        (Again, X, "'inner' is used several times"),
        (Tied, X, "'inner' is used by several modules"),
        (Meeting, X, "'first' is where examples meet"),
        (Alone, X, "'shift' is no linear map"),
        (lambda: nn.Sequential(nn.Linear(IN, 5), nn.LayerNorm(5), nn.Linear(5, OUT)), X, "'1' is no linear map"),
        (lambda: nn.Sequential(nn.Linear(IN, OUT), nn.Flatten()), X.unsqueeze(1).expand(-1, 2, -1), "'0' has several"),
        (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten()), X.unsqueeze(1), "'0' has several positions"),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), nn.Flatten()), X.reshape(-1, 2, 2), "'0' has several"),
    ],
)
def test_what_is_no_chain_is_refused(kind, x, named):
    """The message names the layer and says what to do; a way past a layer counts even where its gradient is zero."""
    with pytest.raises(UnsupportedModelError, match=named) as refused:
        factors(seeded(kind()), x=x)
    assert "fisher='exact'" in str(refused.value)


def test_coupled_examples_are_refused():
    """Batch normalisation in training: in evaluation it is a map of each example."""
    model = seeded(nn.Sequential(nn.Linear(IN, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, OUT)))
    with pytest.raises(UnsupportedModelError, match="examples meet"):
        factors(model, coupled=True)
    factors(model.eval())


def test_a_skip_of_the_input_is_a_chain():
    """What does not depend on a layer may go past those above it."""

    class Dense(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(self.first(x).tanh() + x.sum(-1, keepdim=True))
            return self.last(h.tanh() * x.mean(-1, keepdim=True))

    model = seeded(Dense())
    for n in range(2):
        x = X[n : n + 1]
        assert_same_factors(factors(model, x=x), factors(model, x=x, recursive=False))


# Structures


def _same_moments(rows: Rows) -> Rows:
    """Rows whose gradients have the same second moment, and belong to other examples."""
    flat = rows.gradients.flatten(0, -2)
    rotation = torch.linalg.qr(randn(len(flat), len(flat), seed=5))[0]
    return Rows(rows.inputs, (rotation @ flat).reshape(rows.gradients.shape))


@pytest.mark.parametrize("name", [*structures.available(), *structures.preconditioners()])
def test_who_takes_it_reads_nothing_but_second_moments(name):
    """A structure that takes the recursive Fisher has the same statistics for all gradients of one second moment."""
    structure = structures.get(name, damping="exact", sharing="expand")
    if "recursive" not in structure.fishers:
        with pytest.raises(ArgumentError, match=r"fisher='recursive' does not go with"):
            structure.check_fisher("recursive")
        return
    structure.check_fisher("recursive")
    rows = dense_rows(2, (), 6, 1, in_=4, out=3)
    one, other = structure.measure(rows), structure.measure(_same_moments(rows))
    for statistic, total in one.sums.items():
        assert_close(other.sums[statistic], total, **TIGHT)
    for statistic, columns in one.columns.items():
        assert_close(other.columns[statistic].to_dense(), columns.to_dense(), **TIGHT)


def test_these_take_it():
    every = {name: structures.get(name, damping="exact", sharing="expand") for name in structures.available()}
    takes = {name for name, structure in every.items() if "recursive" in structure.fishers}
    assert takes == {"kron", "foof", "ingd", "ikfac", "singd", "kbfgs", "psgd", "sketchy"}


# In use


def data(num: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(num, IN, generator=rng(3), dtype=torch.float64)
    return x, (x[:, :1] > x[:, 1:2]).long().squeeze(-1)


@pytest.mark.parametrize("structure", ["kron", "foof"])
def test_noisy_training_learns(structure):
    x, y = data()
    model, likelihood = mlp(), Categorical()
    before = float(likelihood(model(x), y).detach())
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=len(x),
        lr=0.1,
        structure=structure,
        fisher="recursive",
        statistics_every=1,
        inverse_every=5,
        generator=rng(0),
    )
    for _ in range(60):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            likelihood(model(x), y).backward()
        optimizer.step()
    assert float(likelihood(model(x), y).detach()) < 0.6 * before
    assert optimizer.posterior().provenance.fisher == "recursive"


def metered(model: nn.Module, likelihood: Likelihood) -> Meter:
    measure = lambda rows: {name: kronecker_factors(own, "expand") for name, own in rows.items()}  # noqa: E731
    return Meter(model, likelihood, find_layers(model)[0], measure, fisher="recursive", num_data=lambda: BATCH)


def test_training_measures_it_under_masks():
    """The meter's statistics are the recursion's of the batch without what is masked."""
    x, y = data(BATCH)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    model, likelihood = mlp(), Categorical()
    expected = factors(model, likelihood, x[keep])
    meter = metered(model, likelihood)
    meter.attach()
    for _ in range(2):  # the first is checked
        likelihood(model(x), y, mask=keep).backward()
    meter.detach()
    for name, (A, G) in expected.items():
        measured = meter.statistics[name]
        assert measured.counts["gradient"] == 10
        assert_close(measured.mean("input"), A, **TIGHT)
        assert_close(measured.mean("gradient"), G, **TIGHT)


def test_weights_used_without_a_call_are_found():
    """That the calls account for the whole gradient is checked for the recursion too."""

    class Past(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(self.first(x))
            return self.last(h @ self.inner.weight.mT)

    model, likelihood = seeded(Past()), Categorical()
    meter = metered(model, likelihood)
    meter.attach()
    with pytest.raises(UnsupportedModelError, match=r"'inner'.*do not account"):
        model(X)
    meter.detach()


def test_data_that_hold_nan_are_found_as_ever():
    x, y = data(BATCH)
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        bk.Laplace(mlp(), Categorical(), fisher="recursive").fit([(x, y)], progress=False)
    model, likelihood = mlp(), Categorical()
    optimizer = bk.NaturalGradient(model, likelihood, num_data=BATCH, fisher="recursive")
    with optimizer.sampled_params():
        likelihood(model(x), y).backward()
    with pytest.raises(NonFiniteError, match="statistic holds NaN"):
        optimizer.step()


def test_natural_gradient_learns():
    x, y = data()
    model, likelihood = mlp(), Categorical()
    before = float(likelihood(model(x), y).detach())
    optimizer = bk.NaturalGradient(model, likelihood, num_data=len(x), lr=0.1, fisher="recursive")
    for _ in range(30):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            likelihood(model(x), y).backward()
        optimizer.step()
    assert float(likelihood(model(x), y).detach()) < 0.6 * before


def test_laplace_of_batches_of_one_is_exact():
    """The recursion averages over a batch: of single examples the posterior and the evidence are the exact ones."""
    x, y = data(12)
    model, likelihood = mlp(), Categorical()
    singles = [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]
    exact = bk.Laplace(model, likelihood).fit([(x, y)], progress=False)
    alone = bk.Laplace(model, likelihood, fisher="recursive").fit(singles, progress=False)
    whole = bk.Laplace(model, likelihood, fisher="recursive").fit([(x, y)], progress=False)
    assert_close(alone.log_marginal_likelihood(), exact.log_marginal_likelihood(), **TIGHT)
    assert abs(float(whole.log_marginal_likelihood() - exact.log_marginal_likelihood())) > 1e-4
    for name, block in alone.posterior().blocks.items():
        assert_close(block.to_dense(), exact.posterior().blocks[name].to_dense(), rtol=1e-8, atol=1e-8)


def test_laplace_refuses_structures_and_models():
    with pytest.raises(ArgumentError, match="structure='dense'"):
        bk.Laplace(mlp(), Categorical(), structure="dense", fisher="recursive")
    laplace = bk.Laplace(seeded(Residual()), Categorical(), fisher="recursive")
    with pytest.raises(UnsupportedModelError, match="'first' is beside 'inner'"):
        laplace.fit([data()], progress=False)
    last = bk.Laplace(seeded(Residual()), Categorical(), subset="last_layer", fisher="recursive")
    last.fit([data()], progress=False)
