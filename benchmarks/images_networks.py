"""The networks of ``images.py``; all give logits ``[batch, 10]``."""

from __future__ import annotations

from functools import partial

from images_data import CLASSES
from torch import Tensor, nn


def mlp(width: int = 256) -> nn.Sequential:
    """Two hidden layers, for 28 × 28 grey pixels."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def cnn() -> nn.Sequential:
    """Two strided convolutions of 16 and 32 channels and a linear layer, for 28 × 28 grey pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CLASSES),
    )


def vgg16(width: int = 32, *, batch_norm: bool = False) -> nn.Sequential:
    """VGG16 of the noisy K-FAC paper: half as wide, 32-64-128-256-256 channels, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for count, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        outputs = factor * width
        for _ in range(count):
            # no bias before a normalisation, which would take it off again
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(outputs)] * batch_norm
            layers.append(nn.ReLU())
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))
    for module in model:
        if isinstance(module, nn.Conv2d):  # thirteen layers deep, torch's own start lets the signal die
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, inputs, height, width]`` to ``[batch, outputs, height / stride, width / stride]``."""
        return (self.shortcut(x) + self.body(x)).relu()


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 with a 3 × 3 stem for 32 × 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


NETWORKS = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg16_narrow": partial(vgg16, width=16),
    "vgg16_bn_narrow": partial(vgg16, width=16, batch_norm=True),
    "vgg16": vgg16,
    "vgg16_bn": partial(vgg16, batch_norm=True),
    "resnet18_narrow": partial(resnet18, width=16),
    "resnet18": resnet18,
}
