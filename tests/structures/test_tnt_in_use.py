"""Tensors in whole models: which layers have modes, and their Laplace fits, predictions, training and files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.curvature import find_layers
from bayes_kfac.structures.tnt import TensorModesStructure, TensorNormalStructure
from tests.fishers import fisher_of
from tests.helpers import TIGHT, block_fishers, randn, record, rng, seeded
from tests.posteriors import DAMPING_KINDS, dense_output_covariance

with_dampings = pytest.mark.parametrize("damping", DAMPING_KINDS)


class Patches(nn.Module):
    """A transformer's stem: patches without bias, in groups, a class token, positions, a gain and a scalar gate."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2, groups=1, bias=False)
        self.mix = nn.Conv2d(4, 4, (1, 2), groups=2, padding=(0, 1), bias=False)
        self.token, self.positions = nn.Parameter(torch.empty(1, 1, 4)), nn.Parameter(torch.empty(1, 7, 4))
        self.gain, self.gate, self.cube = (nn.Parameter(torch.empty(shape)) for shape in ((4,), (), (7, 2, 2)))
        self.norm, self.hidden, self.head = nn.LayerNorm(4), nn.Conv1d(4, 3, 3, padding=1), nn.Linear(21, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.patches(x).tanh()).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.norm(x * self.gain + self.gate * x.sin() + x * self.cube.flatten(1))
        return self.head(self.hidden(x.mT.tanh()).tanh().flatten(1))


X, Y = randn(24, 2, 4, 4, seed=1), randn(24, 2, seed=2)
MODES = {
    "token": ((4,), ()),
    "positions": ((7, 4), ()),
    "gain": ((4,), ()),
    "gate": ((1,), ()),
    "cube": ((7, 2, 2), ()),
    "patches": ((4,), (2, 4)),
    "mix": ((2,), (2, 2)),
}
OTHERS = {"norm": "dense", "hidden": "tnt", "head": "tnt"}


def laplace(damping: str, **options: object) -> bk.Laplace:
    likelihood = bk.likelihoods.Gaussian(0.5).double()
    fitted = bk.Laplace(seeded(Patches()), likelihood, structure="tnt", damping=damping, fisher="exact", **options)
    return fitted.fit(list(zip(X.split(8), Y.split(8), strict=True)), progress=False)


def test_every_layer_has_the_modes_of_its_weights():
    """Of parameters their own, of convolutions outputs × channels × kernel; what is a matrix is TKFAC."""
    layers, _ = find_layers(Patches())
    found = TensorNormalStructure(damping="exact").for_layers(layers)
    tensors = {name: own.modes for name, own in found.items() if isinstance(own, TensorModesStructure)}
    assert tensors == MODES
    assert {name: own.name for name, own in found.items() if name not in tensors} == OTHERS
    assert {own.damping for own in found.values()} == {"exact"}
    assert len({own.label for own in found.values()}) == 2


@pytest.mark.parametrize(
    ("module", "modes"),
    [
        (nn.Conv2d(3, 4, (2, 5), bias=False), ((4,), (3, 10))),
        (nn.Conv1d(6, 4, 3, groups=2, bias=False), ((2,), (3, 3))),
        (nn.Conv3d(2, 4, 2, bias=False), ((4,), (2, 8))),
        (nn.ConvTranspose2d(3, 4, 2, bias=False), ((4,), (3, 4))),
        (nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), ((2,), (3, 3))),
        (nn.Conv2d(3, 4, 1, bias=False), ((4,), (3,))),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), ((2,), (9,))),
        (nn.Conv2d(1, 4, 1, bias=False), ((4,), (1,))),
        (nn.Conv2d(3, 4, 2), ((4,), (13,))),
        (nn.ConvTranspose2d(3, 4, 2), ((4,), (13,))),
        (nn.Linear(3, 4), ((4,), (4,))),
        (nn.Embedding(3, 4), ((4,), (3,))),
        (nn.LayerNorm(5), ((1,), (2,))),
    ],
    ids=str,
)
def test_modes_of_modules(module, modes):
    """They divide a block's elements in their order: each slice of a convolution's block is one of its weight."""
    (layer,) = find_layers(nn.Sequential(module))[0].values()
    assert layer.adapter.modes == modes
    if len(modes[1]) == 2:
        groups = layer.shape[0] if len(layer.shape) == 3 else 1
        weight = module.weight.detach()
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        expected = weight.reshape(groups, *modes[0], *modes[1])
        assert torch.equal(layer.values().reshape(groups, *modes[0], *modes[1]), expected)


def test_a_frozen_bias_leaves_a_tensor():
    module = nn.Conv2d(3, 4, 2)
    module.bias.requires_grad_(False)
    (layer,) = find_layers(nn.Sequential(module))[0].values()
    assert layer.adapter.modes == ((4,), (3, 4))
    module.bias.requires_grad_(True)
    module.weight.requires_grad_(False)
    (layer,) = find_layers(nn.Sequential(module))[0].values()
    assert layer.adapter.modes == ((4,), (1,))


def test_the_fisher_of_a_models_tensors():
    """Against torch.func's Jacobians: exact for vectors, and the trace for all."""
    model = seeded(Patches())
    layers, _ = find_layers(model)
    expected = block_fishers(model, X, 4 * torch.eye(2, dtype=torch.float64).expand(len(X), 2, 2))
    columns = bk.curvature.output_gradients(bk.likelihoods.Gaussian(0.5).double(), model(X), "exact")
    found = TensorNormalStructure(damping="exact").for_layers(layers)
    for name, rows in record(model, X, columns).items():
        mine = fisher_of(found[name], rows)
        assert_close(*(f.diagonal(dim1=-2, dim2=-1).sum(-1) for f in (mine, expected[name])), **TIGHT)
        if name in MODES and len(sum(MODES[name], ())) == 1:
            assert_close(mine, expected[name], **TIGHT)


@with_dampings
def test_linearised_predictions_of_a_laplace_fit_are_the_dense_ones(damping):
    posterior = laplace(damping, prior_precision=1.3).posterior()
    kinds = {name: block.kind for name, block in posterior.blocks.items() if name in MODES}
    assert set(kinds.values()) == {"tensor_eigen" if damping == "exact" else "tensor_normal"}
    if damping != "exact":
        assert posterior.distribution("positions").covariance_matrix.shape == (28, 28)
    mean, covariance = dense_output_covariance(posterior, X[:3])
    prediction = posterior.predict(X[:3])
    assert_close(prediction.mean, mean, rtol=1e-9, atol=1e-9)
    assert_close(prediction.epistemic_covariance, covariance, rtol=1e-9, atol=1e-9)


def test_the_evidence_is_that_of_the_dense_precisions():
    """What two priors differ by: the log-likelihood and what it is of are the same."""
    found, expected = [], []
    for precision in (1.3, 0.2):
        fitted, total = laplace("exact", prior_precision=precision), 0.0
        for name, block in fitted.posterior().blocks.items():
            mean = fitted.layers[name].values()
            total -= 0.5 * precision * float(mean.square().sum()) - 0.5 * mean.numel() * math.log(precision)
            total -= 0.5 * float(torch.logdet(block.to_dense()).sum())
        found.append(fitted.log_marginal_likelihood().item())
        expected.append(total)
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1], rel=1e-10)
    fitted.optimize_prior_precision(progress=False)
    assert fitted.log_marginal_likelihood() > found[1]


@with_dampings
def test_an_earlier_posterior_is_the_prior_of_the_next_task(damping):
    first = laplace(damping, prior_precision=1.3).posterior()
    first = first.nearest_matrix_normal() if damping == "exact" else first
    second = laplace(damping, prior=first).posterior()
    assert all((second.blocks[name].logdet() > block.logdet()).all() for name, block in first.blocks.items())


@with_dampings
def test_tensors_train_save_and_resume(damping, tmp_path):
    """Noisily; the posterior comes back from its file, and training from its checkpoint, bit for bit."""

    def trainer() -> bk.NoisyNaturalGradient:
        likelihood = bk.likelihoods.Gaussian(0.5).double()
        return bk.NoisyNaturalGradient(
            seeded(Patches()), likelihood, num_data=24, lr=0.05, structure="tnt", damping=damping, generator=rng(0)
        )

    def train(optimizer: bk.NoisyNaturalGradient, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                loss = optimizer.likelihood(optimizer.model(X), X[:, :, 0, 0])
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    optimizer = trainer()
    losses = train(optimizer, 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    resumed = trainer()
    resumed.model.load_state_dict(optimizer.model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(optimizer, 3) == train(resumed, 3)
    posterior = optimizer.posterior()
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", Patches().double())
    assert torch.equal(posterior.predict(X[:3]).variance, again.predict(X[:3]).variance)
    assert "tnt" in str(again.summary())
    assert "diagonal" not in str(again.summary())
