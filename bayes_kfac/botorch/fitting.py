"""From data to a linearised surrogate: the network's weights, the precision of their prior, and the noise.

The weights are the mode under a prior ``N(0, I/δ)`` and noise ``σ``. At the mode the linearised model is a Gaussian process
of kernel ``J Jᵀ / δ``, whose evidence for the training data is exact (all layers together, no Kronecker factors), and tells
``δ`` and ``σ``; weights and these two are found in turn. A Kronecker approximation would not do here: it counts more
directions than there are data, and takes what a network fits for noise where data are few.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac.curvature import find_covered
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import LinearizedModel
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, MatrixNormalGaussian

BATCH_SIZE = 256
#: How many targets the evidence is taken of; of more, a part.
MAX_TARGETS = 500
#: Values to choose from, for outcomes of unit variance, and the medians and scales of log-normal priors over them. They
#: matter where data are few; like those of BoTorch's Gaussian processes they keep away from the ends.
PRECISIONS = torch.logspace(-2, 2, 61, dtype=torch.float64)
NOISE_SCALES = torch.logspace(-3, 0.5, 61, dtype=torch.float64)
MEDIAN_PRECISION, SPREAD_PRECISION = 1.0, 1.0
MEDIAN_NOISE_SCALE, SPREAD_NOISE_SCALE = 0.1, 1.5


class _FromUnitCube(nn.Module):
    """From the unit cube to mean 0 and variance 1, of uniform inputs."""

    def forward(self, X: Tensor) -> Tensor:
        return math.sqrt(12) * (X - 0.5)


def default_network(d: int, m: int, like: Tensor) -> nn.Sequential:
    """Two hidden layers of 50 tanh units, for inputs in the unit cube.

    Args:
        d: The number of inputs.
        m: The number of outputs.
        like: Of the dtype and on the device that the network shall have.

    Returns:
        The network.
    """
    network = nn.Sequential(
        _FromUnitCube(), nn.Linear(d, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, m)
    )
    return network.to(like)


def fit_prior(
    network: nn.Module,
    X: Tensor,
    Y: Tensor,
    *,
    prior_precision: float | None,
    noise_scale: float | None,
    steps: int,
) -> Posterior:
    """Find the mode of the weights, with the precision of their prior and the noise where they are not given.

    Args:
        network: The network; trained in place.
        X: Inputs, ``n x d``.
        Y: Targets, ``n x m``.
        prior_precision: ``δ``, or ``None``.
        noise_scale: ``σ``, or ``None``.
        steps: Steps of Adam, of which the last quarter follows the choice of ``δ`` and ``σ``.

    Returns:
        The prior, moved to the mode, with the likelihood: what data are to be added to.
    """
    precisions = PRECISIONS if prior_precision is None else torch.tensor([prior_precision], dtype=torch.float64)
    noise_scales = NOISE_SCALES if noise_scale is None else torch.tensor([noise_scale], dtype=torch.float64)
    delta = MEDIAN_PRECISION if prior_precision is None else prior_precision
    sigma = MEDIAN_NOISE_SCALE if noise_scale is None else noise_scale
    last = steps // 4
    _train(network, X, Y, delta, sigma, steps - last)
    delta, sigma = _most_evident(network, X, Y, precisions, noise_scales)
    _train(network, X, Y, delta, sigma, last)
    return _prior(network, Gaussian(Y.new_tensor(sigma)), delta)


def _train(network: nn.Module, X: Tensor, Y: Tensor, delta: float, sigma: float, steps: int) -> None:
    """Move the weights towards ``argmin ‖y − f‖² / 2σ² + δ ‖w‖² / 2``, by Adam."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    loader = DataLoader(TensorDataset(X, Y), batch_size=min(BATCH_SIZE, len(X)), shuffle=len(X) > BATCH_SIZE)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    was_training = network.training
    network.train()
    for _, (inputs, targets) in zip(range(steps), _forever(loader), strict=False):
        optimizer.zero_grad()
        fit = (network(inputs) - targets).square().sum() / len(targets) / sigma**2
        length = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
        (0.5 * (fit + delta / len(X) * length)).backward()
        optimizer.step()
        schedule.step()
    network.train(was_training)


def _forever(loader: DataLoader[tuple[Tensor, ...]]) -> object:
    while True:
        yield from loader


@torch.no_grad()
def _most_evident(
    network: nn.Module, X: Tensor, Y: Tensor, precisions: Tensor, noise_scales: Tensor
) -> tuple[float, float]:
    """Where the evidence times the priors is greatest: ``log N(y − f(x) + J M; 0, J Jᵀ/δ + σ² I)``, in its eigenbasis."""
    some = (
        torch.randperm(len(X), device=X.device)[: max(1, MAX_TARGETS // Y.shape[1])] if Y.numel() > MAX_TARGETS else ...
    )
    X, Y = X[some], Y[some]
    prior = _prior(network, Gaussian(1.0), 1.0)
    linearized = LinearizedModel(prior.model, prior.mean, prior.layers, prior.blocks)
    features = linearized.features(X)
    kernel = features.covariance(features).squeeze(0).transpose(1, 2).flatten(2).flatten(0, 1).double()
    at_zero = {name: -layer.matrix(prior.mean).unsqueeze(0) for name, layer in prior.layers.items()}
    targets = (Y - linearized.draws(X, at_zero).squeeze(0)).flatten().double()
    values, vectors = torch.linalg.eigh(kernel)
    squares = (vectors.mT @ targets).square()

    delta, sigma = (grid.to(X.device) for grid in (precisions[:, None], noise_scales[None, :]))
    variances = values.clamp(min=0) / delta.unsqueeze(-1) + sigma.unsqueeze(-1) ** 2  # [δ, σ, targets]
    evidence = -0.5 * (squares / variances + variances.log()).sum(-1)
    evidence = evidence - 0.5 * ((delta / MEDIAN_PRECISION).log() / SPREAD_PRECISION) ** 2
    evidence = evidence - 0.5 * ((sigma / MEDIAN_NOISE_SCALE).log() / SPREAD_NOISE_SCALE) ** 2
    row, column = divmod(int(evidence.argmax()), evidence.shape[1])
    return float(precisions[row]), float(noise_scales[column])


def _prior(network: nn.Module, likelihood: Gaussian, delta: float) -> Posterior:
    """``N(M, I/δ)`` around the network's weights."""
    layers, _ = find_covered(network, [p for p in network.parameters() if p.requires_grad], "error")
    blocks: dict[str, BlockGaussian] = {}
    for name, layer in layers.items():
        *stack, out, in_ = layer.shape
        ones = layer.like.detach().new_ones(*stack, 1, out), layer.like.detach().new_ones(*stack, 1, in_)
        blocks[name] = MatrixNormalGaussian(ones[0], ones[1] / math.sqrt(delta))
    provenance = Provenance("prior", "kron", "exact", "exact", "expand", temperature=1.0, num_data=0)
    return Posterior(
        network, likelihood, blocks, prior_precision=dict.fromkeys(layers, delta), provenance=provenance, layers=layers
    )
