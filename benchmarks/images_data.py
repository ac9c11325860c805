"""Images for ``images.py``: reading, corrupting and augmenting them.

All images are ``uint8``, ``[examples, channels, height, width]``; a problem's own mean and standard deviation of each
channel are taken off when a batch is made. Corruptions are made here, from the test images, by plain tensor code.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
CLASSES = 10
SEVERITIES = range(1, 6)

#: Mean and standard deviation of each channel of the training images, pixels from 0 to 1.
MOMENTS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
#: What each data set's classifiers have never seen.
STRANGE = {
    "mnist": ("notmnist", "fashion_mnist"),
    "fashion_mnist": ("notmnist", "mnist"),
    "cifar10": ("notmnist", "fashion_mnist"),
}


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Attributes:
        pixels: ``uint8``, ``[examples, channels, height, width]``.
        labels: ``[examples]``.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getitem__(self, part: slice) -> Images:
        """Some of them."""
        return Images(self.pixels[part], self.labels[part])

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


# -- reading ----------------------------------------------------------------------------------------------------------


def folder(name: str) -> Path:
    """The folder of a data set, or one clear sentence."""
    for root in (os.environ.get("BAYES_KFAC_DATA"), HERE.parent.parent / "shared" / "data"):
        if root and (Path(root) / name).is_dir():
            return Path(root) / name
    raise SystemExit(
        f"No data: set BAYES_KFAC_DATA to a folder with {name}/. MNIST and Fashion-MNIST are the four idx files that "
        "torchvision downloads, notMNIST those of github.com/davidflanagan/notMNIST-to-MNIST, cifar10/ has "
        "data_batch_1.npz to data_batch_5.npz and test_batch.npz with arrays images ([N, 3, 32, 32]) and labels."
    )


@cache
def read(name: str, part: str) -> Images:
    """The ``"train"`` or ``"test"`` part of a data set, in the order of its files."""
    if name == "cifar10":
        names = ["test_batch"] if part == "test" else [f"data_batch_{number}" for number in range(1, 6)]
        batches = [read_cifar(folder(name) / f"{file}.npz") for file in names]
        return Images(torch.cat([one.pixels for one in batches]), torch.cat([one.labels for one in batches]))
    prefix = folder(name) / ("t10k" if part == "test" else "train")
    pixels, labels = read_idx(f"{prefix}-images-idx3-ubyte.gz"), read_idx(f"{prefix}-labels-idx1-ubyte.gz")
    return Images(pixels.unsqueeze(1), labels.long())


def read_idx(path: str) -> Tensor:
    """An idx file of bytes: two zeros, the type, the number of dimensions, their big-endian sizes, the values."""
    content = gzip.decompress(Path(path).read_bytes())
    sizes = np.frombuffer(content, ">u4", content[3], 4).astype(int).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy())


def read_cifar(path: Path) -> Images:
    """A batch of CIFAR-10, as ``images`` or as differences along both axes and to the green channel."""
    with np.load(path, allow_pickle=False) as file:
        labels = torch.from_numpy(file["labels"].astype(np.int64))
        if "images" in file:
            return Images(torch.from_numpy(file["images"]), labels)
        pixels = file["delta"].cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    pixels[0] += pixels[1]
    pixels[2] += pixels[1]
    return Images(torch.from_numpy(pixels.transpose(1, 0, 2, 3).copy()), labels)


def as_format(pixels: Tensor, like: Tensor) -> Tensor:
    """Images in the size and with the channels of others: resized, and grey ones repeated."""
    if pixels.shape[-2:] != like.shape[-2:]:
        resized = functional.interpolate(pixels.float(), like.shape[-2:], mode="bilinear", antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, like.shape[1], -1, -1)


def standardized(pixels: Tensor, name: str) -> Tensor:
    """What a network sees: pixels from 0 to 1, less a data set's mean, over its standard deviation."""
    mean, stddev = (torch.tensor(moment, device=pixels.device).view(-1, 1, 1) for moment in MOMENTS[name])
    return (pixels.float() / 255 - mean) / stddev


# -- augmentation -----------------------------------------------------------------------------------------------------


def augmented(pixels: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image at a random place of its zero-padded self, and mirrored or not."""
    count, _, height, width = pixels.shape
    places = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (count,), generator=generator).bool()
    rows = places[0, :, None] + torch.arange(height)
    columns = places[1, :, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = functional.pad(pixels, (padding,) * 4)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    index = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# -- corruptions: functions of pixels from 0 to 1, a severity's strength, and a generator -----------------------------


def noise(x: Tensor, stddev: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a standard deviation."""
    return x + stddev * torch.randn(x.shape, generator=generator)


def blur(x: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of a width in pixels; the border is repeated."""
    del generator
    radius = math.ceil(3 * width)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / width) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = functional.conv2d(functional.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return functional.conv2d(functional.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.mT, groups=x.shape[1])


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Less contrast around each image's own mean."""
    del generator
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + factor * (x - mean)


def rotation(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """A rotation to the left or to the right; zeros come in at the corners."""
    angle = math.radians(degrees) * _signs(len(x), generator)
    zero = torch.zeros_like(angle)
    rows = [torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def translation(x: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """A shift along both axes, each up or down by so many pixels; zeros come in."""
    signs = torch.stack([_signs(len(x), generator), _signs(len(x), generator)])
    steps = (signs * distance).long()
    margin = int(distance)
    rows = margin + steps[0, :, None] + torch.arange(x.shape[2])
    columns = margin + steps[1, :, None] + torch.arange(x.shape[3])
    padded = functional.pad(x, (margin,) * 4)
    index = torch.arange(len(x))[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pixelation(x: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """A smaller image, each of its pixels as large as it has to be."""
    del generator
    size = [round(fraction * length) for length in x.shape[-2:]]
    return functional.interpolate(functional.interpolate(x, size, mode="area"), x.shape[-2:], mode="nearest")


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (count,), generator=generator) - 1.0


#: Each corruption with its strength at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "blur": (blur, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "contrast": (contrast, (0.75, 0.5, 0.3, 0.2, 0.1)),
    "rotation": (rotation, (10.0, 20.0, 30.0, 45.0, 60.0)),
    "translation": (translation, (1.0, 2.0, 3.0, 4.0, 6.0)),
    "pixelation": (pixelation, (0.8, 0.65, 0.5, 0.4, 0.3)),
}


def corrupted(pixels: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted images, the same ones for the same seed.

    Args:
        pixels: The images, on the CPU.
        kind: One of :data:`CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Of noise and directions.

    Returns:
        ``uint8`` images of the same shape.
    """
    corrupt, strengths = CORRUPTIONS[kind]
    generator = torch.Generator().manual_seed(seed)
    found = corrupt(pixels.float() / 255, strengths[severity - 1], generator)
    return (255 * found).round().clamp(0, 255).to(torch.uint8)
