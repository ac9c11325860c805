"""A small vision transformer on Fashion-MNIST.

``python examples/vit.py`` trains for a minute and a half on one core; ``--smoke`` only tries it out. The class token
and the positions belong to no module: bare parameters have a posterior too. ``nn.TransformerEncoderLayer`` works as it
is, without dropout: the noise on the weights takes its place.
"""

from __future__ import annotations

import torch
from _common import Progress, arguments, fashion_mnist, show_classification
from torch import Tensor, nn

import bayes_kfac as bk


class ViT(nn.Module):
    """A transformer over patches; a class token collects what the head reads."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3, patch: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (28 // patch) ** 2, width))
        layers = [
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 1, 28, 28]`` to ``[batch, classes]``."""
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.layers(tokens + self.positions)[:, 0])


def main() -> None:
    """Train, predict, print."""
    options = arguments(__doc__, steps=600)
    train, test, batch = (64, 32, 16) if options.smoke else (60_000, 1_000, 64)
    x, y = fashion_mnist("train", train, smoke=options.smoke)
    model, likelihood = ViT(), bk.likelihoods.Categorical()
    optimizer = bk.NoisyKFAC(
        model,
        likelihood,
        num_data=train,
        lr=0.1,
        prior_precision=100.0,  # a standard deviation of 0.1, about that of the weights at the start
        temperature=0.1,  # 100 000 weights on 60 000 images: at 1 the KL would leave less to learn
        extrinsic_damping=1e-3,
        statistics_decay=0.95,  # a short run: the curvature remembers 20 steps
        inverse_every=20,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress(optimizer, options.steps)
    for _ in range(options.steps):
        index = torch.randint(train, (batch,))
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss = likelihood(model(x[index]), y[index])
            loss.backward()
        optimizer.step()
        schedule.step()
        progress(loss)

    posterior = optimizer.posterior()
    x, y = fashion_mnist("t10k", test, smoke=options.smoke)
    draws = posterior.sample(16)  # the same sixteen networks for all parts of the test set
    show_classification(torch.cat([posterior.predict(part, draws=draws).probs for part in x.split(100)]), y)


if __name__ == "__main__":
    main()
