"""The problems of ``images.py`` and one training run: resumable at every epoch, its seconds and losses kept."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from images_data import Images, augmented, read, standardized
from images_methods import CURVE_DRAWS, TRAINERS, Predictor, gradient_context, own_prediction, restore
from images_methods import settings as settings_of
from images_networks import NETWORKS
from torch import Tensor, nn

import bayes_kfac as bk

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Problem:
    """A data set, a network and how long to train.

    Attributes:
        data: The data set.
        network: One of ``NETWORKS``.
        epochs: Passes over the training part.
        batch_size: Images in a step.
        augment: Whether images are shifted and mirrored at random.
        train_images: The first so many of the training part, or all.
        curve_images: The first so many of what is looked at after every epoch, or all.
    """

    data: str
    network: str
    epochs: int
    batch_size: int
    augment: bool = False
    train_images: int | None = None
    curve_images: int | None = None


_NARROW = Problem("cifar10", "vgg16_narrow", 20, 128, train_images=10_000, curve_images=2000)

PROBLEMS = {
    "mnist-mlp": Problem("mnist", "mlp", 10, 256),
    "mnist-cnn": Problem("mnist", "cnn", 5, 128),
    "fashion-mlp": Problem("fashion_mnist", "mlp", 10, 256),
    "fashion-cnn": Problem("fashion_mnist", "cnn", 5, 128),
    "cifar10-vgg16-narrow": _NARROW,
    "cifar10-vgg16-narrow-augmented": replace(_NARROW, augment=True),
    "cifar10-vgg16-narrow-bn": replace(_NARROW, network="vgg16_bn_narrow"),
    "cifar10-vgg16-narrow-bn-augmented": replace(_NARROW, network="vgg16_bn_narrow", augment=True),
    "cifar10-resnet18-narrow": replace(_NARROW, network="resnet18_narrow", augment=True),
    "cifar10-vgg16": Problem("cifar10", "vgg16", 60, 128),
    "cifar10-vgg16-augmented": Problem("cifar10", "vgg16", 60, 128, augment=True),
    "cifar10-vgg16-bn": Problem("cifar10", "vgg16_bn", 60, 128),
    "cifar10-vgg16-bn-augmented": Problem("cifar10", "vgg16_bn", 60, 128, augment=True),
    "cifar10-resnet18": Problem("cifar10", "resnet18", 30, 128, augment=True),
}


@dataclass(frozen=True)
class Parts:
    """What is trained on, and what is looked at after every epoch: the test part, or the last training images."""

    train: Images
    held_out: Images


def parts(problem: Problem, holdout: int = 0, limit: int | None = None) -> Parts:
    """The parts of a problem.

    Args:
        problem: The problem.
        holdout: How many of the last training images are held out in the place of the test part.
        limit: Of each part the first so many only.

    Returns:
        The parts.
    """
    train, test = read(problem.data, "train"), read(problem.data, "test")
    if holdout:
        train, test = train[:-holdout], train[-holdout:]
    return Parts(train[: problem.train_images][:limit], test[:limit])


class Batches:
    """A loader of standardised images, in the order of their file."""

    def __init__(self, images: Images, data: str, batch_size: int = EVALUATION_BATCH) -> None:
        self.images, self.data, self.batch_size = images, data, batch_size

    def __len__(self) -> int:
        """The number of batches."""
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of images and labels."""
        for pixels, labels in zip(
            self.images.pixels.split(self.batch_size), self.images.labels.split(self.batch_size), strict=True
        ):
            yield standardized(pixels, self.data), labels


@dataclass(frozen=True)
class Trained:
    """A training run at its end.

    Attributes:
        model: The network, at the mean of its weights, in ``eval()``.
        optimizer: Its optimizer, with the posterior if there is one.
        seconds: Of training alone: of the process on a CPU, of the clock on a GPU.
        curve: After each epoch: seconds, and figures of the part that is held out.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: float
    curve: list[dict[str, float]]


def train(
    problem: Problem,
    method: str,
    seed: int,
    data: Parts,
    *,
    epochs: int,
    device: str,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> Trained:
    """Train, from the last checkpoint if there is one; the step size falls to zero along half a cosine.

    All methods start at the same weights and see the same batches in the same order.

    Args:
        problem: The problem.
        method: One of ``TRAINERS``.
        seed: Of weights, batches and draws.
        data: Its parts, on the device.
        epochs: Passes over the training part.
        device: Where.
        checkpoint: The file to go on from, written after every epoch.
        settings: Changes to the method's settings.

    Returns:
        The run.

    Raises:
        NonFiniteError: If training diverges.
    """
    torch.manual_seed(seed)
    model = NETWORKS[problem.network]().to(device)
    options = {**settings_of(problem.network, method, augment=problem.augment), **(settings or {})}
    optimizer = TRAINERS[method](model, len(data.train), options)
    step_sizes = [group["lr"] for group in optimizer.param_groups]
    per_epoch = math.ceil(len(data.train) / problem.batch_size)
    curve: list[dict[str, float]] = []
    saved = _load(checkpoint)
    if saved is not None and saved["settings"] == options:  # of other settings it is another run
        model.load_state_dict(saved["model"])
        restore(optimizer, saved["optimizer"], len(saved["curve"]) * per_epoch, device)
        curve = saved["curve"]
    for epoch in range(len(curve), epochs):
        # every epoch has a seed of its own: a run that was stopped goes on as if it had not been
        torch.manual_seed(1000 * seed + epoch)
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(data.train), generator=generator).to(device).split(problem.batch_size)
        model.train()
        start = clock(device)
        for number, index in enumerate(order):
            done = (epoch + number / per_epoch) / epochs
            for group, lr in zip(optimizer.param_groups, step_sizes, strict=True):
                group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * done))
            _step(model, optimizer, problem, data.train, index, generator)
        seconds = clock(device) - start + (curve[-1]["seconds"] if curve else 0.0)
        shown = data.held_out[: problem.curve_images]
        curve.append({"epoch": epoch + 1, "seconds": seconds, **_look(model, optimizer, problem, shown)})
        if checkpoint is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**state, "curve": curve, "settings": options})
    return Trained(model.eval(), optimizer, curve[-1]["seconds"], curve)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    images: Images,
    index: Tensor,
    generator: torch.Generator,
) -> None:
    pixels = images.pixels[index]
    x = standardized(augmented(pixels, generator) if problem.augment else pixels, problem.data)
    with gradient_context(optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), images.labels[index]).backward()
    optimizer.step()


def _look(model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem, images: Images) -> dict[str, float]:
    """Negative log-likelihood and accuracy of the network at the mean, and of the method's own prediction."""
    model.eval()
    mean = probabilities(lambda x: model(x).unsqueeze(0), images.pixels, problem.data)
    if not mean.isfinite().all():
        raise bk.errors.NonFiniteError("Training has diverged: the network's outputs are not finite.")
    own = mean
    if hasattr(optimizer, "sampled_params"):
        own = probabilities(own_prediction(model, optimizer, CURVE_DRAWS), images.pixels, problem.data)
    labels = images.labels.cpu()
    return {
        "nll": float(bk.metrics.categorical_nll(own, labels)),
        "accuracy": float(bk.metrics.accuracy(own, labels)),
        "nll_at_mean": float(bk.metrics.categorical_nll(mean, labels)),
    }


@torch.no_grad()
def probabilities(predict: Predictor, pixels: Tensor, data: str) -> Tensor:
    """Class probabilities of images, averaged over draws, in float64 on the CPU."""
    found = [
        predict(standardized(part, data)).double().softmax(-1).mean(0).cpu() for part in pixels.split(EVALUATION_BATCH)
    ]
    return torch.cat(found)


def clock(device: str) -> float:
    """Seconds: on a CPU those of the process, which other work on the machine does not lengthen."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _load(path: Path | None) -> dict[str, Any] | None:
    """A checkpoint on the CPU, if there is one."""
    return None if path is None or not path.exists() else torch.load(path, map_location="cpu", weights_only=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, or keep the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)
