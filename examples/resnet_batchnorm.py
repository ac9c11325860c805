"""A small ResNet with BatchNorm on 10 000 images of CIFAR-10, in a loop of your own.

``python examples/resnet_batchnorm.py`` trains for a minute and a half on one core; ``--smoke`` only tries it out. The
scale and shift of each BatchNorm get a posterior like every other weight: a 2 × 2 block for each channel. Its running
averages are no weights; they come from forward passes under sampled weights, and predictions use them as they are.
"""

from __future__ import annotations

import torch
from _common import Progress, arguments, cifar10, show_classification
from _resnet import resnet
from torch import nn

import bayes_kfac as bk


def main() -> None:
    """Train, predict, print."""
    options = arguments(__doc__, steps=600)
    train, test, batch = (64, 32, 16) if options.smoke else (10_000, 1_000, 64)
    x, y = cifar10("data_batch_1", train, smoke=options.smoke)
    model, likelihood = resnet(nn.BatchNorm2d), bk.likelihoods.Categorical()
    optimizer = bk.NoisyKFAC(
        model,
        likelihood,
        num_data=train,
        lr=0.1,
        prior_precision=100.0,  # a standard deviation of 0.1, about that of the weights at the start
        temperature=0.1,  # 80 000 weights on 10 000 images: at 1 the KL would leave little to learn
        extrinsic_damping=1e-3,
        kl_clip=3e-3,
        statistics_decay=0.95,  # a short run: the curvature remembers 20 steps
        inverse_every=20,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress(optimizer, options.steps)
    for _ in range(options.steps):
        index = torch.randint(train, (batch,))
        with optimizer.sampled_params():  # a sample of the weights is in the model here
            optimizer.zero_grad()
            loss = likelihood(model(x[index]), y[index])
            loss.backward()
        optimizer.step()  # outside, the weights are at the mean
        schedule.step()
        progress(loss)

    posterior = optimizer.posterior()
    x, y = cifar10("test_batch", test, smoke=options.smoke)
    draws = posterior.sample(16)  # the same sixteen networks for all parts of the test set
    show_classification(torch.cat([posterior.predict(part, draws=draws).probs for part in x.split(100)]), y)


if __name__ == "__main__":
    main()
