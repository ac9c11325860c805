"""Kronecker factors equal those of curvlinops, an independent K-FAC (Dangel et al. 2025, arXiv:2501.19183).

What is the same: ``A`` averages over examples and positions (``expand``) or is that of the mean position
(``reduce``), a bias is a last column of ones (their ``separate_weight_and_bias=False``), a kernel is flattened to
channels × kernel.

What differs is one number ``c``, the same for every layer, with ``G_theirs = c · G_ours``. It follows from their loss.
Ours is the mean over examples of ``Σ_t g gᵀ`` with ``g`` of one example's summed negative log-likelihood. Theirs sums
over the ``N`` examples of all batches where the loss's reduction is ``"sum"``: ``c = N``. Where it is ``"mean"`` they
undo the mean over examples, but not that over the ``L`` loss terms of an example; and losses that average over the
``C`` outputs too (``MSELoss``, ``BCEWithLogitsLoss``) keep that mean. So ``c = 1 / L`` for the cross-entropy, else
``c = 1 / (L C)``. ``MSELoss`` is the Gaussian with noise variance 1/2.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from bayes_kfac.curvature import Recorder, Statistics, find_layers, kronecker_factors, output_gradients
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.helpers import randn, rng, seeded

curvlinops = pytest.importorskip("curvlinops")

#: Two batches of different sizes: averages over a data set weigh every example the same.
SIZES = (5, 3)
CLASSES = 4
#: The noise scale whose Gaussian is ``MSELoss``, in float64: a Python number would be kept in float32.
HALF = torch.tensor(0.5, dtype=torch.float64).sqrt()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def vgg() -> nn.Module:
    """Pairs of 3×3 convolutions with in-place activations, pooled, and a classifier of two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 7),
        nn.ReLU(inplace=True),
        nn.Linear(7, CLASSES),
    )


def alexnet() -> nn.Module:
    """A large strided kernel first, overlapping pools, dilation, unequal sides, an adaptive pool."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding="same"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(10, CLASSES),
    )


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 with a strided shortcut; batch normalisation in training."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride=2, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.relu(self.norm2(self.conv2(hidden)) + self.norm3(self.shortcut(x)), inplace=True)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        BasicBlock(4, 5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


class Mixer(nn.Module):
    """Patches by a convolution; linear layers across tokens, and across channels."""

    def __init__(self, width: int = 5, tokens: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class ViT(nn.Module):
    """One block of a vision transformer with a class token and a fused projection."""

    def __init__(self, width: int = 6, tokens: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(tokens + 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1) + self.positions
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).movedim((2, 3), (0, 2))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


def separable() -> nn.Module:
    """A depthwise and a grouped convolution after one of one group."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def tokenwise() -> nn.Module:
    """A loss term at every token."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES))


NETWORKS = {"vgg": vgg, "alexnet": alexnet, "resnet": resnet, "mixer": Mixer, "vit": ViT}
Batches = list[tuple[Tensor, Tensor]]


def images(target: Callable[[int], Tensor], dtype: torch.dtype = torch.float64) -> Batches:
    return [(randn(size, 3, 8, 8, seed=size).to(dtype), target(size)) for size in SIZES]


def classes(size: int) -> Tensor:
    return torch.randint(CLASSES, (size,), generator=rng(size))


def ours(model: nn.Module, likelihood: Likelihood, data: Batches, fisher: str, sharing: str) -> dict[str, Statistics]:
    """The statistics of each layer, added over batches."""
    total: dict[str, Statistics] = {}
    for x, y in data:
        recorder = Recorder(find_layers(model)[0])
        recorder.attach()
        output = model(x)
        rows = recorder.rows(output, output_gradients(likelihood, output, fisher, target=y), coupled=True)  # batch norm
        recorder.detach()
        for name, one in rows.items():
            batch = kronecker_factors(one, sharing)
            total[name] = total[name] + batch if name in total else batch
    return total


def theirs(model: nn.Module, loss: nn.Module, data: Batches, fisher: str, sharing: str) -> dict[str, dict[str, Tensor]]:
    """``A`` and ``G`` of each of their layers, weight and bias together."""
    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        [parameter for module in supported for parameter in module.parameters()],
        data,
        fisher_type={"exact": "type-2", "empirical": "empirical"}[fisher],
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    found = {
        name: {"input": state["input_covariances"][name], "gradient": factor}
        for name, factor in state["gradient_covariances"].items()
    }
    assert len(found) == len(supported)
    return found


def compare(model: nn.Module, likelihood: Likelihood, loss: nn.Module, data: Batches, c: float, *case: str) -> None:
    """Every factor of theirs is ours, times ``c`` for the gradients'."""
    own, tolerance = ours(model, likelihood, data, *case), TOLERANCE[data[0][0].dtype]
    for name, factors in theirs(model, loss, data, *case).items():
        for side, factor in factors.items():
            expected = own[name].mean(side) * (c if side == "gradient" else 1)
            assert torch.linalg.matrix_norm(expected) > 1e-6, f"nothing to compare in {name}"
            error = torch.linalg.matrix_norm(factor - expected) / torch.linalg.matrix_norm(expected)
            assert error < tolerance, f"{name}, {side}: off by {float(error):.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_factors_of_classifiers_equal_theirs(network, fisher, sharing, dtype):
    """With the mean cross-entropy and one loss term for each example ``c = 1``: nothing is left to account for."""
    model = seeded(NETWORKS[network]()).to(dtype)
    compare(model, Categorical(), nn.CrossEntropyLoss(), images(classes, dtype), 1.0, fisher, sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    ("likelihood", "loss", "mean_constant", "target"),
    [
        (Categorical(), nn.CrossEntropyLoss, 1.0, classes),
        (Gaussian(HALF), nn.MSELoss, 1 / CLASSES, lambda size: randn(size, CLASSES, seed=size)),
        (Bernoulli(), nn.BCEWithLogitsLoss, 1 / CLASSES, lambda size: (randn(size, CLASSES, seed=size) > 0).double()),
    ],
    ids=["categorical", "gaussian", "bernoulli"],
)
def test_the_constant_is_that_of_their_loss_and_reduction(likelihood, loss, mean_constant, target, fisher, sharing):
    model, data = seeded(vgg()), images(target)
    compare(model, likelihood, loss(reduction="mean"), data, mean_constant, fisher, sharing)
    compare(model, likelihood, loss(reduction="sum"), data, sum(SIZES), fisher, sharing)


@pytest.mark.parametrize(("fisher", "sharing"), [("exact", "expand"), ("empirical", "expand"), ("empirical", "reduce")])
def test_factors_of_a_network_with_a_loss_term_at_every_token_equal_theirs(fisher, sharing):
    """The fourth case is one where they do something else: see the next test."""
    data = [(randn(size, 5, 3, seed=size), randn(size, 5, CLASSES, seed=size + 9)) for size in SIZES]
    model, likelihood = seeded(tokenwise()), Gaussian(HALF)
    compare(model, likelihood, nn.MSELoss(reduction="mean"), data, 1 / (5 * CLASSES), fisher, sharing)
    compare(model, likelihood, nn.MSELoss(reduction="sum"), data, sum(SIZES), fisher, sharing)


def test_their_exact_fisher_of_many_tokens_has_cross_terms_in_reduce_and_ours_has_none():
    """They pull one column back for all tokens at once, as if what is said of two tokens were the same variable.

    With ``g_ct`` of output ``c`` and token ``t``, theirs is ``Σ_c (Σ_t g_ct)(Σ_t g_ct)ᵀ``; tokens are independent given
    the output, which makes it ``Σ_ct g_ct g_ctᵀ``.
    """
    data = [(randn(size, 5, 3, seed=size), randn(size, 5, CLASSES, seed=size + 9)) for size in SIZES]
    model = seeded(tokenwise())
    factors = theirs(model, nn.MSELoss(reduction="sum"), data, "exact", "reduce")["0"]
    slopes = [(1 - model[1](model[0](x)).square()).detach() for x, _ in data]
    g = torch.cat([2**0.5 * model[2].weight.detach()[:, None, None] * slope for slope in slopes], dim=1)
    assert_close(factors["gradient"], torch.einsum("cnti,cnuj->ij", g, g))
    own = ours(model, Gaussian(HALF), data, "exact", "reduce")["0"]
    assert_close(own.sums["gradient"], torch.einsum("cnti,cntj->ij", g, g))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_each_group_of_a_convolution_has_a_diagonal_block_of_their_factor(fisher, sharing):
    """They keep one block for all groups: ``A`` of the groups' mean input, ``G`` across groups.

    Ours is a block for each group, the groups' covariances left out; so the rest of the network is compared in full,
    ``G`` on the diagonal blocks, and ``A`` where it is the same thing: where all groups see the same.
    """
    model, data = seeded(separable()), images(classes)
    with torch.no_grad():  # the channels come in equal pairs, so that the two groups of the last convolution agree
        for layer in (model[0], model[2]):
            layer.weight[3:], layer.bias[3:] = layer.weight[:3], layer.bias[:3]
    own = ours(model, Categorical(), data, fisher, sharing)
    for name, factors in theirs(model, nn.CrossEntropyLoss(), data, fisher, sharing).items():
        groups = getattr(model[int(name)], "groups", 1)
        A, G = (own[name].mean(side) for side in ("input", "gradient"))
        A, G = (A, G) if groups > 1 else (A[None], G[None])
        size = G.shape[-1]
        for group in range(groups):
            place = slice(group * size, (group + 1) * size)
            assert_close(factors["gradient"][place, place], G[group], rtol=1e-9, atol=1e-12)
            if groups < 3:
                assert_close(factors["input"], A[group], rtol=1e-9, atol=1e-12)
