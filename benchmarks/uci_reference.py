"""The paper's regression recipe written out plainly, without the library: the peer of ``uci.py --mode paper``.

The formulas and the order of the paper's code on the same splits: factors that start at the identity and are not
debiased, sampled noise precisions, samples in one batch. Splits and weight samples are two batch dimensions,
``[splits, samples, ...]``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from uci import DATA_SETS, HERE, Splits, load_splits, summary

LR, RATE, MOMENTUM, NOISE_LR, HIDDEN, SAMPLES, BATCH, TEST_SAMPLES = 1e-2, 1e-3, 0.9, 1e-3, 50, 10, 10, 100
PRIOR = 6.0


def inverse_root(matrix: Tensor) -> Tensor:
    """``R`` with ``R Rᵀ = matrix⁻¹``."""
    factor = torch.linalg.cholesky(matrix)
    eye = torch.eye(matrix.shape[-1]).expand_as(matrix)
    return torch.linalg.solve_triangular(factor, eye, upper=False).mT


def damped(A: Tensor, G: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Factored damping."""
    trace_A, trace_G = (matrix.diagonal(dim1=-2, dim2=-1).mean(-1) for matrix in (A, G))
    pi = (trace_A / trace_G).sqrt()[:, None, None]
    return A + pi * math.sqrt(gamma) * torch.eye(A.shape[-1]), G + math.sqrt(gamma) / pi * torch.eye(G.shape[-1])


def train(name: str, splits: Splits, seed: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Errors and log-likelihoods of each split."""
    generator = torch.Generator().manual_seed(seed)
    num_data, count, features = splits.train_x.shape
    gamma = 1 / num_data
    shapes = [(HIDDEN, features + 1), (1, HIDDEN + 1)]
    means = [(2 * torch.rand(count, o, i, generator=generator) - 1) * math.sqrt(6 / (o + i)) for o, i in shapes]
    start = [(torch.randn(count, n, n, generator=generator), n) for shape in shapes for n in (shape[1], shape[0])]
    factors = [torch.eye(n) + 0.01 * noise @ noise.mT for noise, n in start]
    factors = [(factors[0], factors[1]), (factors[2], factors[3])]
    momenta = [torch.zeros_like(mean) for mean in means]
    log_a, log_b = (torch.full((count,), math.log(PRIOR), requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([log_a, log_b], lr=NOISE_LR)
    columns, step, lr, rate = torch.arange(count), 0, LR, RATE
    one = torch.ones(count, SAMPLES, BATCH, 1)

    def roots() -> list[tuple[Tensor, Tensor]]:
        return [tuple(inverse_root(matrix) for matrix in damped(A, G, gamma)) for A, G in factors]

    def sample(current: list[tuple[Tensor, Tensor]], number: int) -> list[Tensor]:
        drawn = []
        for mean, (root_A, root_G) in zip(means, current, strict=True):
            noise = torch.randn(count, number, *mean.shape[1:], generator=generator)
            drawn.append(mean[:, None] + math.sqrt(1 / num_data) * root_G[:, None] @ noise @ root_A.mT[:, None])
        return drawn

    current = roots()
    for epoch in tqdm(range(epochs), desc=name):
        if epoch == epochs // 2:
            lr, rate = LR / 10, RATE / 10
        for rows in torch.rand(num_data, count, generator=generator).argsort(0).split(BATCH):
            x = splits.train_x[rows, columns].transpose(0, 1)[:, None].expand(-1, SAMPLES, -1, -1)
            y = splits.train_y[rows, columns].transpose(0, 1)[:, None]
            size = len(rows)
            weights = sample(current, SAMPLES)
            with torch.no_grad():
                shape = log_a.exp()[:, None].expand(-1, SAMPLES)
                precision = torch._standard_gamma(shape, generator=generator) / log_b.exp()[:, None]
            a_0 = torch.cat([x, one[:, :, :size]], -1)
            pre = a_0 @ weights[0].mT
            a_1 = torch.cat([pre.relu(), one[:, :, :size]], -1)
            output = a_1 @ weights[1].mT
            tau = precision[:, :, None, None]
            directions = []
            for residual in (tau * (output - y), tau.sqrt() * torch.randn(output.shape, generator=generator)):
                back = residual @ weights[1][..., :-1] * (pre > 0)
                directions.append((back, residual))
            (g_0, g_1), (s_0, s_1) = directions
            gradients, fresh = [], []
            for inputs, true, sampled in ((a_0, g_0, s_0), (a_1, g_1, s_1)):
                gradients.append((true.mT @ inputs).mean(1) / size)
                fresh.append([(rows_.mT @ rows_).mean(1) / size for rows_ in (inputs, sampled)])
            factors = [
                tuple((1 - rate) * old + rate * new for old, new in zip(pair, batch, strict=True))
                for pair, batch in zip(factors, fresh, strict=True)
            ]
            current = roots()
            step += 1
            for index, (root_A, root_G) in enumerate(current):
                pull = gradients[index] + gamma * weights[index].mean(1)
                momenta[index] = MOMENTUM * momenta[index] + (1 - MOMENTUM) * pull
                debiased = momenta[index] / (1 - MOMENTUM**step)
                means[index] = means[index] - lr * root_G @ root_G.mT @ debiased @ root_A @ root_A.mT
            adam.zero_grad()
            a, b = log_a.exp(), log_b.exp()
            error = (output - y).square().mean((1, 2, 3))
            data_term = 0.5 * (error * a / b - torch.digamma(a) + log_b)
            gammas = torch.distributions.Gamma(a, b, validate_args=False), torch.distributions.Gamma(PRIOR, PRIOR)
            (data_term + torch.distributions.kl_divergence(*gammas) / num_data).sum().backward()
            adam.step()
    weights = sample(current, TEST_SAMPLES)
    x = splits.test_x.transpose(0, 1)[:, None].expand(-1, TEST_SAMPLES, -1, -1)
    ones = torch.ones(*x.shape[:-1], 1)
    hidden = (torch.cat([x, ones], -1) @ weights[0].mT).relu()
    output = (torch.cat([hidden, ones], -1) @ weights[1].mT).squeeze(-1) * splits.scale[:, None]
    target = splits.test_y.squeeze(-1).T[:, None]
    with torch.no_grad():
        shape = log_a.exp()[:, None].expand(-1, TEST_SAMPLES)
        precision = torch._standard_gamma(shape, generator=generator) / log_b.exp()[:, None]
        stddev = splits.scale[:, None] / precision.sqrt()[..., None]
    density = torch.distributions.Normal(output, stddev).log_prob(target)
    log_likelihood = (density.logsumexp(1) - math.log(TEST_SAMPLES)).mean(1)
    return (output.mean(1) - target[:, 0]).square().mean(1).sqrt(), log_likelihood


def main() -> None:
    """Run the reference on the named data sets and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA_SETS), metavar="NAME")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "uci" / "reference")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.data:
        start = time.perf_counter()
        errors, densities = train(name, load_splits(name, arguments.splits), arguments.seed, arguments.epochs)
        seconds = time.perf_counter() - start
        result = {
            "data": name,
            "splits": arguments.splits,
            "seed": arguments.seed,
            "epochs": arguments.epochs,
            "rmse": errors.tolist(),
            "log_likelihood": densities.tolist(),
            "seconds": seconds,
        }
        print(f"{name:10s} {summary(result['rmse'])} {summary(result['log_likelihood'])} {seconds:.0f} s")
        if arguments.epochs == 1000:
            arguments.results.mkdir(parents=True, exist_ok=True)
            (arguments.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
