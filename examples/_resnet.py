"""A small ResNet for 32 × 32 images, with any normalisation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, inputs, height, width]`` to ``[batch, outputs, height / stride, width / stride]``."""
        return (self.shortcut(x) + self.body(x)).relu()


def resnet(norm: Callable[[int], nn.Module], width: int = 16, classes: int = 10) -> nn.Sequential:
    """Nine layers: a stem, three blocks of ``width``, ``2 width`` and ``4 width`` channels, and the head.

    Args:
        norm: Makes the normalisation of so many channels.
        width: Channels of the stem.
        classes: Outputs.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(),
        Block(width, width, 1, norm),
        Block(width, 2 * width, 2, norm),
        Block(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
