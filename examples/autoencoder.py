"""A convolutional autoencoder on faces, with noise that is learned.

``python examples/autoencoder.py`` trains for a minute on one core; ``--smoke`` only tries it out. The likelihood
of a picture is a Gaussian for each of its 4096 pixels. The spread of a prediction has two parts, one of the noise and
one of the weights, and says how far from the truth the model expects to be.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from _common import Progress, arguments, faces, show
from torch import nn

import bayes_kfac as bk


def autoencoder(width: int = 8, code: int = 32) -> nn.Sequential:
    """``[batch, 1, 64, 64]`` to the same, through ``code`` numbers."""
    channels = [1, width, 2 * width, 4 * width, 4 * width]
    down, up = [], []
    for few, many in pairwise(channels):
        down += [nn.Conv2d(few, many, 4, stride=2, padding=1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(many, few, 4, stride=2, padding=1), *up]
    corner = (channels[-1], 4, 4)
    features = math.prod(corner)
    middle = [nn.Flatten(), nn.Linear(features, code), nn.Linear(code, features), nn.Unflatten(1, corner)]
    return nn.Sequential(*down, *middle, *up)


def main() -> None:
    """Train, predict, print."""
    options = arguments(__doc__, steps=600)
    images = faces(smoke=options.smoke)
    is_test = torch.arange(len(images)) % 10 == 9  # one of the ten pictures of each person
    train, test = images[~is_test][: 32 if options.smoke else None], images[is_test]
    model, likelihood = autoencoder(), bk.likelihoods.Gaussian("learned")
    optimizer = bk.NoisyKFAC(
        model,
        likelihood,
        num_data=len(train),
        lr=0.1,
        prior_precision=10.0,
        kl_clip=0.1,  # a limit for an example, which is 4096 pixels here
        statistics_decay=0.95,  # a short run, and a Fisher that grows as the noise falls: remember 20 steps
        inverse_every=20,
        deterministic_lr=0.03,  # the noise's, which falls from 1 to 0.06
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress(optimizer, options.steps)
    for _ in range(options.steps):
        x = train[torch.randint(len(train), (32,))]
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss = likelihood(model(x), x)
            loss.backward()
        optimizer.step()
        schedule.step()
        progress(loss)

    prediction = optimizer.posterior().predict(test, method="sampling", num_samples=32)
    error = bk.metrics.root_mean_squared_error(prediction.mean, test)
    show(
        test_RMSE=(error, "of reconstructed pixels between 0 and 1, in pictures not seen"),
        predictive_std=(prediction.variance.mean().sqrt(), "what the model expects it to be"),
        noise_std=(prediction.aleatoric_variance.mean().sqrt(), "the part of the noise"),
        weights_std=(prediction.epistemic_variance.mean().sqrt(), "the part of the weights"),
    )


if __name__ == "__main__":
    main()
