"""The networks and data of ``laplace.py``, reproducible from a seed."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES = 5


class Attention(nn.Module):
    """One block of a transformer with one head, the mean over tokens, and a classifier."""

    def __init__(self, features: int, width: int, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width, bias=bias)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden, self.back = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)
        self.classifier = nn.Linear(width, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, features]`` to logits ``[batch, CLASSES]``."""
        x = self.embed(x)
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        x = self.norm(x + self.output(scores.softmax(-1) @ self.value(x)))
        return self.classifier((x + self.back(self.hidden(x).relu())).mean(1))


def mlp(features: int, *widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width, bias=bias), nn.ReLU()]
        features = width
    return nn.Sequential(*layers[:-1])


def cnn(bias: bool) -> nn.Sequential:
    """Two convolutions, one of them strided, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, CLASSES, bias=bias),
    )


def vgg16() -> nn.Sequential:
    """VGG16 for images of 32×32, without batch normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class Gpt(nn.Module):
    """Twelve blocks of a transformer of width 768 over embedded tokens, and a classifier of the last one."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.mixing = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mixed = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.hidden = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, width]`` to logits ``[batch, 10]``."""
        for mixing, mixed, hidden, back in zip(self.mixing, self.mixed, self.hidden, self.back, strict=True):
            parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixing(self.norm(x)).chunk(3, -1))
            attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + mixed(attended.transpose(1, 2).flatten(2))
            x = x + back(nn.functional.gelu(hidden(self.norm(x))))
        return self.classifier(self.norm(x)[:, -1])


class WithOne(nn.Module):
    """Appends a feature of 1: what a layer without a bias needs to be one with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., features]`` to ``[..., features + 1]``."""
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def biases_as_weights(model: nn.Sequential) -> nn.Sequential:
    """The same function by layers whose biases are weights of a feature that is 1."""
    layers: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Linear):
            layer = nn.Linear(module.in_features + 1, module.out_features, bias=False, dtype=module.weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(torch.cat([module.weight, module.bias[:, None]], dim=1))
            layers += [WithOne(), layer]
        else:
            layers.append(module)
    return nn.Sequential(*layers)


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Images ``[examples, 784]`` between 0 and 1 and labels of ``"train"`` or ``"t10k"``, or one clear sentence."""
    for folder in (os.environ.get("BAYES_KFAC_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"):
        if folder and (Path(folder) / "mnist").is_dir():
            break
    else:
        raise SystemExit("No data: set BAYES_KFAC_DATA to a folder with the four files of MNIST, mnist/*-ubyte.gz.")
    images, labels = (
        np.frombuffer(gzip.decompress((Path(folder) / "mnist" / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    x = torch.from_numpy(images[16:].reshape(-1, 784).copy()).float() / 255
    return x, torch.from_numpy(labels[8:].copy()).long()


class Batches:
    """A loader without a loader's cost: slices of tensors, wherever they lie."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.dataset = TensorDataset(x, y)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.dataset.tensors
        return zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)


def random_data(examples: int, shape: tuple[int, ...], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal inputs ``[examples, *shape]`` and uniform labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, *shape, generator=generator)
    return x, torch.randint(classes, (examples,), generator=generator)
