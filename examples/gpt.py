"""A small GPT on Shakespeare, character by character; two draws of its weights write.

``python examples/gpt.py`` trains for about two minutes on one core; ``--smoke`` only tries it out. The head's weights
are the embedding's: one block, with the statistics of both uses. The projection of queries, keys and values is another.
"""

from __future__ import annotations

import torch
from _common import Progress, arguments, excerpts, shakespeare, show_classification
from torch import Tensor, nn

import bayes_kfac as bk


class Block(nn.Module):
    """Attention to the characters so far, then a network of its own for each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The logits of each next character."""

    def __init__(self, symbols: int, context: int, width: int = 96, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.symbols.weight
        for table in (self.symbols, self.positions):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, text: Tensor) -> Tensor:
        """``[batch, time]`` to ``[batch, time, symbols]``."""
        return self.head(self.blocks(self.symbols(text) + self.positions(torch.arange(text.shape[1]))))


def main() -> None:
    """Train, predict, write."""
    options = arguments(__doc__, steps=800)
    batch, context = (4, 16) if options.smoke else (32, 64)
    train, test, alphabet = shakespeare(smoke=options.smoke)
    model, likelihood = GPT(len(alphabet), context), bk.likelihoods.Categorical()
    numbers = {"prior_precision": 100.0, "extrinsic_damping": 1e-3, "statistics_decay": 0.95, "inverse_every": 20}
    optimizer = bk.NoisyKFAC(model, likelihood, num_data=len(train), lr=0.1, **numbers)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress(optimizer, options.steps)
    for _ in range(options.steps):
        x, y = excerpts(train, batch, context)
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss = likelihood(model(x).flatten(0, 1), y.flatten())  # every character is an example
            loss.backward()
        optimizer.step()
        schedule.step()
        progress(loss)
    posterior = optimizer.posterior()
    x, y = excerpts(test, 4 * batch, context)
    show_classification(posterior.predict(x, method="sampling", num_samples=8).probs, y)
    for draw in (posterior.sample(1), posterior.sample(1)):
        text = train[None, :1]
        for _ in range(5 if options.smoke else 250):
            text = torch.cat([text, posterior.predict(text[:, -context:], draws=draw).distribution.sample()[:, -1:]], 1)
        print("\nOne draw of the weights writes:", "".join(alphabet[i] for i in text[0]), sep="\n")


if __name__ == "__main__":
    main()
