"""A small ResNet with GroupNorm on 10 000 images of CIFAR-10, by ``bk.fit``.

``python examples/resnet_groupnorm.py`` trains for a minute and a half on one core; ``--smoke`` only tries it out.
GroupNorm couples no examples and keeps no running averages: each draw of the weights is one function, in training as in
prediction. Where the draws disagree the network says what it does not know.
"""

from __future__ import annotations

import torch
from _common import arguments, cifar10, print_elbo, show, show_classification
from _resnet import resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk


def main() -> None:
    """Train, predict, print."""
    options = arguments(__doc__, steps=800)
    train, test, batch = (64, 32, 16) if options.smoke else (10_000, 1_000, 64)
    images, labels = cifar10("data_batch_1", train, smoke=options.smoke)
    loader = DataLoader(TensorDataset(images, labels), batch, shuffle=True)
    epochs = max(1, round(options.steps / len(loader)))
    posterior = bk.fit(
        resnet(lambda channels: nn.GroupNorm(4, channels)),
        bk.likelihoods.Categorical(),
        loader,
        epochs=epochs,
        lr=0.1,
        prior_precision=100.0,  # a standard deviation of 0.1, about that of the weights at the start
        temperature=0.1,  # 80 000 weights on 10 000 images: at 1 the KL would leave little to learn
        extrinsic_damping=1e-3,
        kl_clip=3e-3,
        statistics_decay=0.95,  # a short run: the curvature remembers 20 steps
        inverse_every=20,
        callbacks=[lambda state: print_elbo(f"epoch {state.epoch} of {epochs}", state.nll, state.optimizer)],
        progress=False,
    )

    images, labels = cifar10("test_batch", test, smoke=options.smoke)
    draws = posterior.sample(16)  # the same sixteen networks for all parts of the test set
    parts = [posterior.predict(part, draws=draws) for part in images.split(100)]
    probs = torch.cat([part.probs for part in parts])
    ignorance = torch.cat([part.mutual_information for part in parts])
    right = probs.argmax(-1) == labels
    show_classification(probs, labels)
    show(
        ignorance_where_right=(ignorance[right].mean(), "mutual information of class and weights, in nats"),
        ignorance_where_wrong=(ignorance[~right].mean(), "the same; larger, since more data would help there"),
    )


if __name__ == "__main__":
    main()
