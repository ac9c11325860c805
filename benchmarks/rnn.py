"""A recurrent network on characters: what correlation along time is worth to the trainer, per step and per second.

``python benchmarks/rnn.py`` trains a GRU or LSTM on pieces of Tiny Shakespeare with each structure, and with Adam, and
writes ``benchmarks/results/rnn/<model>-<seed>.json``: the loss in nats a character on training and held-out text
against steps and seconds, with versions, machine and seed. All start at the same weights and see the same batches.
``kron`` is K-FAC with independent time. Seconds are of training alone.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import keep
from torch import Tensor, nn
from tqdm import tqdm

import bayes_kfac as bk

HERE = Path(__file__).resolve().parent
METHODS = ("adam", "kron", "rnn_chain_1", "rnn_chain_2")
STEP_SIZES = {"adam": 3e-3}
STEP_SIZE = 0.1


class Characters(nn.Module):
    """Characters, a recurrence, and the next character.

    Args:
        kind: ``"GRU"`` or ``"LSTM"``.
        symbols: The size of the alphabet.
        width: The size of a character's embedding.
        hidden: The size of the state.
    """

    def __init__(self, kind: str, symbols: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.rnn = getattr(nn, kind)(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, time, symbols]`` of the characters that follow ``x``, ``[batch, time]``."""
        return self.head(self.rnn(self.embedding(x))[0])


def text() -> Tensor:
    """All characters as numbers, or one clear sentence."""
    for folder in (os.environ.get("BAYES_KFAC_DATA"), HERE.parent.parent / "shared" / "data"):
        path = Path(folder) / "tinyshakespeare" / "input.txt.gz" if folder else None
        if path is not None and path.is_file():
            characters = gzip.decompress(path.read_bytes()).decode()
            numbers = {character: number for number, character in enumerate(sorted(set(characters)))}
            return torch.tensor([numbers[character] for character in characters])
    raise SystemExit(
        "No data: set BAYES_KFAC_DATA to a folder with tinyshakespeare/input.txt.gz, from github.com/karpathy/char-rnn."
    )


def pieces(characters: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pieces of a text and the characters that follow, each ``[pieces, length]``."""
    count = (len(characters) - 1) // length
    return characters[: count * length].reshape(count, length), characters[1 : count * length + 1].reshape(
        count, length
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Places of examples, in a new order at each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def train(method: str, options: argparse.Namespace, data: dict[str, tuple[Tensor, Tensor]], symbols: int) -> list[Any]:
    """One run.

    Args:
        method: One of :data:`METHODS`.
        options: The command line's.
        data: Pieces to ``train`` and to ``test`` on.
        symbols: The size of the alphabet.

    Returns:
        The figures at each evaluation.
    """
    torch.manual_seed(options.seed)
    model = Characters(options.model, symbols, options.width, options.hidden)
    (x, y), likelihood = data["train"], bk.likelihoods.Categorical()
    lr = options.lr or STEP_SIZES.get(method, STEP_SIZE)
    if method == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    else:
        optimizer = bk.NoisyNaturalGradient(
            model,
            likelihood,
            num_data=len(x),
            lr=lr,
            structure=method,
            temperature=options.temperature,
            extrinsic_damping=options.damping,
            statistics_every=options.statistics_every,
            inverse_every=options.inverse_every,
            kl_clip=options.kl_clip,
            generator=torch.Generator().manual_seed(options.seed),
        )
    figures, seconds, losses = [], 0.0, []
    places = batches(len(x), options.batch, options.seed)
    for step in tqdm(range(1, options.steps + 1), desc=method, unit="step", disable=None):
        place = next(places)
        start = time.perf_counter()
        if isinstance(optimizer, bk.NoisyNaturalGradient):
            with optimizer.sampled_params():
                loss = backward(model, optimizer, likelihood, x[place], y[place])
        else:
            loss = backward(model, optimizer, likelihood, x[place], y[place])
        optimizer.step()
        seconds += time.perf_counter() - start
        losses.append(loss / x.shape[1])
        if step % options.evaluate_every == 0:
            recent = sum(losses[-options.evaluate_every :]) / options.evaluate_every
            figures.append({"step": step, "seconds": seconds, "train": recent, "test": evaluate(model, *data["test"])})
    return figures


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, likelihood: nn.Module, x: Tensor, y: Tensor) -> float:
    """The gradient of a batch; returns its loss, of one example."""
    optimizer.zero_grad()
    loss = likelihood(model(x), y)
    loss.backward()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Nats a character, at the mean of the weights."""
    parts = zip(x.split(256), y.split(256), strict=True)
    return sum(nn.functional.cross_entropy(model(x).mT, y, reduction="sum").item() for x, y in parts) / y.numel()


def main() -> None:
    """Run what is asked for; print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("GRU", "LSTM"), default="GRU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--length", type=int, default=32, help="characters in a piece")
    parser.add_argument("--pieces", type=int, default=8192, help="pieces to train on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--lr", type=float, default=None, help=f"default: {STEP_SIZES}, else {STEP_SIZE}")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--damping", type=float, default=0.01, help="of the trainer's step, beyond the prior's")
    parser.add_argument("--kl-clip", type=float, default=1e-2)
    parser.add_argument("--statistics-every", type=int, default=5)
    parser.add_argument("--inverse-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rnn")
    options = parser.parse_args()
    characters = text()
    edge = len(characters) * 9 // 10
    train_x, train_y = pieces(characters[:edge], options.length)
    test_x, test_y = pieces(characters[edge:], options.length)
    data = {
        "train": (train_x[: options.pieces], train_y[: options.pieces]),
        "test": (test_x[:1024], test_y[:1024]),
    }
    runs = {method: train(method, options, data, int(characters.max()) + 1) for method in options.methods}
    print("| method | train | test | ms a step |\n|---|---|---|---|")
    for method, figures in runs.items():
        if figures:
            last = figures[-1]
            pace = 1000 * last["seconds"] / last["step"]
            print(f"| {method} | {last['train']:.3f} | {last['test']:.3f} | {pace:.1f} |")
            assert math.isfinite(last["test"])
    settings = {name: value for name, value in vars(options).items() if name != "results"}
    keep(options.results / f"{options.model.lower()}-{options.seed}.json", {"settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
