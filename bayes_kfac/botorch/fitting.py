"""From data to a linearised surrogate: the network's weights, the precision of their prior, and the noise.

The weights are the mode under a prior ``N(0, I/δ)`` and noise ``σ``. The linearised model is a Gaussian process of
kernel ``J Jᵀ / δ``, whose evidence for the training data is exact (all layers together, no Kronecker factors), and
tells ``δ`` and ``σ``; weights and these two are found in turn. A Kronecker approximation would not do here: it counts
more directions than there are data, and where data are few takes for noise what a network fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac import linalg
from bayes_kfac.botorch.base import naming_columns
from bayes_kfac.botorch.conditioning import as_matrix
from bayes_kfac.curvature import find_covered
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction.forward import evaluating, training
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, MatrixNormalGaussian

BATCH_SIZE = 256
#: How many targets the evidence is taken of; of more, a part. And how many Gauss-Newton steps are taken with.
MAX_TARGETS = 1000
MAX_POLISHES = 10
STEP_LENGTHS = tuple(0.5**power for power in range(8))
TOLERANCE = 1e-6
#: Values to choose from, for outcomes of unit variance, and log-normal priors over them by median and scale. They
#: matter where data are few. That of the noise is the one that BoTorch has for its Gaussian processes: with a wide one,
#: a dozen outcomes of six inputs are soon taken for nothing but noise.
PRECISIONS = torch.logspace(-2, 2, 61, dtype=torch.float64)
NOISE_SCALES = torch.logspace(-2, 0.5, 51, dtype=torch.float64)
MEDIAN_PRECISION, SPREAD_PRECISION = 1.0, 1.0
MEDIAN_NOISE_SCALE, SPREAD_NOISE_SCALE = math.exp(-2), 0.5


class _Angles(nn.Module):
    """Each coordinate of the unit cube as a point of the half circle, ``[batch, 2d]``.

    All points have one length then, and the variance of an untrained network is the same everywhere. Of the coordinates
    themselves it would be several times larger in the corners, and acquisitions would go there first, all 2^d of them.
    """

    def forward(self, X: Tensor) -> Tensor:
        return torch.cat([(math.pi * X).cos(), (math.pi * X).sin()], dim=-1)


def default_network(d: int, m: int, like: Tensor) -> nn.Sequential:
    """Two hidden layers of 50 tanh units, for inputs in the unit cube.

    Args:
        d: The number of inputs.
        m: The number of outputs.
        like: Of the dtype and on the device that the network shall have.

    Returns:
        The network.
    """
    network = nn.Sequential(_Angles(), nn.Linear(2 * d, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, m))
    return network.to(like)


def check_network(network: nn.Module, X: Tensor, Y: Tensor) -> None:
    """See that a network is for these data.

    Args:
        network: The network.
        X: Inputs, ``n x d``.
        Y: Targets, ``n x m``.

    Raises:
        ArgumentError: If it is no module, its weights are of another dtype, or it has another number of inputs or
            outputs.
    """
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"network={network!r} is not allowed. Allowed: a torch.nn.Module.")
    dtype = next((parameter.dtype for parameter in network.parameters()), X.dtype)
    if dtype != X.dtype:
        raise ArgumentError(f"network is {dtype}, but train_X is {X.dtype}. Pass network.to({X.dtype}).")
    with evaluating(network), torch.no_grad(), naming_columns(X):
        shape = tuple(network(X[:1]).shape)
    if shape != (1, Y.shape[1]):
        raise ArgumentError(
            f"network puts out shape {shape} for one input. Allowed: (1, {Y.shape[1]}), the outcomes of train_Y."
        )


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
        steps: Steps of Adam.

    Returns:
        The prior, moved to the mode, with the likelihood: what data are to be added to.
    """
    precisions = PRECISIONS if prior_precision is None else torch.tensor([prior_precision], dtype=torch.float64)
    noise_scales = NOISE_SCALES if noise_scale is None else torch.tensor([noise_scale], dtype=torch.float64)
    delta = MEDIAN_PRECISION if prior_precision is None else prior_precision
    sigma = MEDIAN_NOISE_SCALE if noise_scale is None else noise_scale
    _train(network, X, Y, delta, sigma, steps)
    if Y.numel() <= MAX_TARGETS:
        _polish(network, X, Y, delta, sigma)
    delta, sigma = _most_evident(network, X, Y, precisions, noise_scales)
    if Y.numel() <= MAX_TARGETS:
        _polish(network, X, Y, delta, sigma)
    else:
        _train(network, X, Y, delta, sigma, steps // 4)
    return _prior(network, Gaussian(Y.new_tensor(sigma)), delta)


def _train(network: nn.Module, X: Tensor, Y: Tensor, delta: float, sigma: float, steps: int) -> None:
    """Move the weights towards ``argmin ‖y − f‖² / 2σ² + δ ‖w‖² / 2``, by Adam."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    loader = DataLoader(TensorDataset(X, Y), batch_size=min(BATCH_SIZE, len(X)), shuffle=len(X) > BATCH_SIZE)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with training(network):
        for _, (inputs, targets) in zip(range(steps), _forever(loader), strict=False):
            optimizer.zero_grad()
            fit = (network(inputs) - targets).square().sum() / len(targets) / sigma**2
            length = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
            (0.5 * (fit + delta / len(X) * length)).backward()
            optimizer.step()
            schedule.step()


def _forever(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def _polish(network: nn.Module, X: Tensor, Y: Tensor, delta: float, sigma: float) -> None:
    """To the mode by Gauss-Newton steps: the mean of the linearised model's weights, ``Jᵀ C⁻¹ ỹ / δ``, again and again.

    What Adam leaves of residuals would be large against a small noise, and the posterior around it too sure of itself.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def loss() -> float:
        length = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
        return float((network(X) - Y).square().sum() / sigma**2 + delta * length)

    with evaluating(network):
        now = loss()
        for _ in range(MAX_POLISHES):
            kernel, targets = _linear_regression(network, X, Y)
            joint = linalg.add_to_diagonal(kernel / delta, kernel.new_tensor(sigma**2))
            weights = torch.cholesky_solve(targets.unsqueeze(-1), linalg.cholesky(joint, ["the training data"]))
            gradients = torch.autograd.grad(network(X), parameters, weights.to(Y).reshape(Y.shape) / delta)
            before, start = [parameter.detach().clone() for parameter in parameters], now
            for length in STEP_LENGTHS:
                with torch.no_grad():
                    for parameter, old, new in zip(parameters, before, gradients, strict=True):
                        parameter.copy_(old + length * (new - old))
                    now = loss()
                if now < start:
                    break
            else:
                with torch.no_grad():
                    for parameter, old in zip(parameters, before, strict=True):
                        parameter.copy_(old)
                return
            if start - now < TOLERANCE * start:
                return


@torch.no_grad()
def _linear_regression(network: nn.Module, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """The linearised network as a linear model of its weights: ``J Jᵀ``, and its targets ``y − f(x) + J M``."""
    prior = _prior(network, Gaussian(1.0), 1.0)
    linearized = prior.linearized
    features = linearized.features(X)
    kernel = as_matrix(features.covariance(features)).squeeze(0)
    at_zero = {name: -layer.matrix(prior.mean).unsqueeze(0) for name, layer in prior.layers.items()}
    targets = Y - linearized.draws(X, at_zero).squeeze(0)
    return kernel.double(), targets.flatten().double()


@torch.no_grad()
def _most_evident(
    network: nn.Module, X: Tensor, Y: Tensor, precisions: Tensor, noise_scales: Tensor
) -> tuple[float, float]:
    """Where the evidence times the priors is greatest: ``log N(ỹ; 0, J Jᵀ/δ + σ² I)``, in its eigenbasis."""
    if Y.numel() > MAX_TARGETS:
        some = torch.randperm(len(X), device=X.device)[: max(1, MAX_TARGETS // Y.shape[1])]
        X, Y = X[some], Y[some]
    kernel, targets = _linear_regression(network, X, Y)
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
