"""An LSTM on Shakespeare, character by character.

``python examples/lstm.py`` trains for half a minute on one core; ``--smoke`` only tries it out. An example is an
excerpt of 64 characters, whose negative log-likelihood is the sum over them. The LSTM's weights for its input and for
its state are one block each, used at every step of time. The predictive entropy splits into what is open in English and
what is open about the weights.
"""

from __future__ import annotations

import torch
from _common import Progress, arguments, excerpts, shakespeare, show, show_classification
from torch import Tensor, nn

import bayes_kfac as bk


class CharacterLSTM(nn.Module):
    """The logits of each next character."""

    def __init__(self, symbols: int, width: int = 128) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width // 2)
        self.lstm = nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """``[batch, time]`` to ``[batch, time, symbols]``."""
        return self.head(self.lstm(self.symbols(text))[0])


def main() -> None:
    """Train, predict, print."""
    options = arguments(__doc__, steps=800)
    batch, length = (4, 16) if options.smoke else (32, 64)
    train, test, alphabet = shakespeare(smoke=options.smoke)
    model, likelihood = CharacterLSTM(len(alphabet)), bk.likelihoods.Categorical()
    optimizer = bk.NoisyKFAC(
        model,
        likelihood,
        num_data=len(train) // length,
        lr=0.1,
        prior_precision=10.0,
        kl_clip=0.1,  # a limit for an example, which is 64 characters here
        statistics_decay=0.95,  # a short run: the curvature remembers 20 steps
        inverse_every=20,
    )
    print(optimizer.summary(), "\n")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress(optimizer, options.steps)
    for _ in range(options.steps):
        x, y = excerpts(train, batch, length)
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss = likelihood(model(x), y)
            loss.backward()
        optimizer.step()
        schedule.step()
        progress(loss)

    x, y = excerpts(test, 8 * batch, length)
    prediction = optimizer.posterior().predict(x, method="sampling", num_samples=8)
    show_classification(prediction.probs, y)
    show(
        entropy=(prediction.entropy.mean(), "nats that a character is expected to cost, and of them:"),
        ignorance=(prediction.mutual_information.mean(), "about the weights; more text would remove it"),
    )


if __name__ == "__main__":
    main()
