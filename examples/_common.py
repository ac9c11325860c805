"""What the examples share: arguments, data, and the lines that they print."""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import bayes_kfac as bk

#: Where a user gets each file.
SOURCES = {
    "cifar10": "torchvision.datasets.CIFAR10, saved by numpy.savez as images (uint8, [N, 3, 32, 32]) and labels",
    "fashion_mnist": "the file of that name that torchvision.datasets.FashionMNIST downloads",
    "citation": "Cora with the split of Planetoid, from github.com/tkipf/gcn, saved by numpy.savez",
    "tinyshakespeare": "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn, compressed by gzip",
    "olivetti_faces": "sklearn.datasets.fetch_olivetti_faces, saved by numpy.savez as X (uint8, [400, 64, 64])",
}


def arguments(description: str, steps: int) -> argparse.Namespace:
    """The arguments of every example; the seed is set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"steps of training (default {steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (default 0)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on little data, made up where it is missing")
    parsed = parser.parse_args()
    parsed.steps = parsed.steps or (3 if parsed.smoke else steps)
    torch.manual_seed(parsed.seed)
    return parsed


# -- what is printed --------------------------------------------------------------------------------------------------


def print_elbo(moment: str, nll: float, optimizer: bk.NoisyKFAC) -> None:
    """Print the negative ELBO of one example: its NLL, plus its share of the KL.

    A temperature below 1 makes the KL count that much less: what is printed is what is trained.
    """
    kl, weight = float(optimizer.kl()) / optimizer.num_data, optimizer.temperature
    factor = "" if weight == 1 else f"{weight:g}·"
    print(f"{moment}   NLL {nll:.3f} + {factor}KL {kl:.3f} = negative ELBO {nll + weight * kl:.3f} nats", flush=True)


class Progress:
    """Prints the negative ELBO at the first step and ten times after, with the mean NLL since the last time."""

    def __init__(self, optimizer: bk.NoisyKFAC, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.step, self.losses, self.start = 0, [], time.perf_counter()

    def __call__(self, loss: Tensor) -> None:
        """Take note of one step's loss."""
        self.step += 1
        self.losses.append(loss.item())
        if self.step == 1 or self.step % max(1, self.steps // 10) == 0:
            moment = f"step {self.step:4d} of {self.steps} {time.perf_counter() - self.start:4.0f} s"
            print_elbo(moment, sum(self.losses) / len(self.losses), self.optimizer)
            self.losses.clear()


def show(**figures: tuple[float, str]) -> None:
    """Print figures beside what they mean."""
    for name, (value, meaning) in figures.items():
        print(f"{name.replace('_', ' '):24s}{float(value):8.3f}   {meaning}")


def show_classification(probs: Tensor, labels: Tensor) -> None:
    """Print the usual figures of predicted class probabilities, ``[..., classes]``."""
    probs, labels = probs.flatten(0, -2), labels.flatten()
    show(
        test_accuracy=(bk.metrics.accuracy(probs, labels), "how often the most probable class is the right one"),
        test_NLL=(bk.metrics.categorical_nll(probs, labels), "nats for the right class; guessing costs log(classes)"),
        test_ECE=(bk.metrics.expected_calibration_error(probs, labels), "gap between confidence and accuracy"),
    )


# -- data -------------------------------------------------------------------------------------------------------------


def find(name: str, *, smoke: bool) -> Path | None:
    """A data file; ``None`` where a smoke run has to go without it."""
    folder = Path(os.environ.get("BAYES_KFAC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if (folder / name).exists():
        return folder / name
    if smoke:
        print(f"{name} is not there: random numbers of its shape stand in for it.")
        return None
    raise SystemExit(
        f"{name} is missing from the folder that the environment variable BAYES_KFAC_DATA names; it is "
        f"{SOURCES[name.split('/', maxsplit=1)[0]]}."
    )


def cifar10(name: str, size: int, *, smoke: bool) -> tuple[Tensor, Tensor]:
    """Standardised images ``[size, 3, 32, 32]`` and labels from ``"data_batch_1"`` to ``"test_batch"``."""
    path = find(f"cifar10/{name}.npz", smoke=smoke)
    if path is None:
        return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
    with np.load(path, allow_pickle=False) as file:
        labels = file["labels"][:size]
        if "images" in file:
            images = file["images"][:size]
        else:  # differences along both axes, and to the green channel, modulo 256
            images = file["delta"][:, :size].cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
            images[0] += images[1]
            images[2] += images[1]
            images = images.transpose(1, 0, 2, 3)
    return (torch.from_numpy(images.copy()).float() / 255 - 0.47) / 0.25, torch.from_numpy(labels).long()


def fashion_mnist(name: str, size: int, *, smoke: bool) -> tuple[Tensor, Tensor]:
    """Standardised images ``[size, 1, 28, 28]`` and labels of ``"train"`` or ``"t10k"``."""
    images = find(f"fashion_mnist/{name}-images-idx3-ubyte.gz", smoke=smoke)
    if images is None:
        return torch.randn(size, 1, 28, 28), torch.randint(10, (size,))
    with gzip.open(images) as file:
        pixels = torch.frombuffer(bytearray(file.read(16 + size * 784)[16:]), dtype=torch.uint8)
    labels = find(f"fashion_mnist/{name}-labels-idx1-ubyte.gz", smoke=False)
    with gzip.open(labels) as file:
        classes = torch.frombuffer(bytearray(file.read(8 + size)[8:]), dtype=torch.uint8)
    return (pixels.reshape(size, 1, 28, 28) / 255 - 0.29) / 0.35, classes.long()


def shakespeare(*, smoke: bool) -> tuple[Tensor, Tensor, str]:
    """Character indices of the first 90 % and of the rest, and the alphabet."""
    path = find("tinyshakespeare/input.txt.gz", smoke=smoke)
    if path is None:
        text = "".join(chr(97 + i) for i in torch.randint(26, (5000,)).tolist())
    else:
        text = gzip.decompress(path.read_bytes()).decode()
    alphabet = "".join(sorted(set(text)))
    indices = torch.tensor([alphabet.index(character) for character in text])
    cut = len(indices) * 9 // 10
    return indices[:cut], indices[cut:], alphabet


def excerpts(text: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Random excerpts ``[count, length]`` of a text, and the same one character on."""
    rows = text.unfold(0, length + 1, 1)[torch.randint(len(text) - length, (count,))]
    return rows[:, :-1], rows[:, 1:]


def cora(*, smoke: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Features ``[nodes, words]``, the graph's edges ``[2, edges]``, labels, and masks of the split's three parts."""
    path = find("citation/cora.npz", smoke=smoke)
    if path is None:
        nodes = 200
        masks = {part: torch.arange(nodes) % 3 == i for i, part in enumerate(("train", "val", "test"))}
        return (torch.rand(nodes, 50) < 0.1).float(), torch.randint(nodes, (2, 800)), torch.randint(7, (nodes,)), masks
    with np.load(path, allow_pickle=False) as file:
        data = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files}
    nodes, words = data["feat_shape"].tolist()
    features = torch.zeros(nodes, words)
    features[torch.arange(nodes).repeat_interleave(data["feat_indptr"].diff()), data["feat_indices"]] = 1.0
    masks = {part: torch.zeros(nodes, dtype=torch.bool) for part in ("train", "val", "test")}
    for part, mask in masks.items():
        mask[data[f"{part}_idx"]] = True
    return features, data["edges"].reshape(-1, 2).T, data["labels"], masks


def faces(*, smoke: bool) -> Tensor:
    """Faces ``[400, 1, 64, 64]`` with values from 0 to 1, ten of each person, one after another."""
    path = find("olivetti_faces/olivetti.npz", smoke=smoke)
    if path is None:
        return torch.rand(400, 1, 64, 64)
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["X"]).unsqueeze(1).float() / 255
