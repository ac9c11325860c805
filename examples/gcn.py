"""A graph network on Cora: 2708 papers that cite each other, 140 of them labelled.

``python examples/gcn.py`` trains two networks in half a minute on one core; ``--smoke`` only tries it out. The whole
graph is one batch; a mask says which nodes are examples, for the loss and for the Fisher. Since the Fisher needs no
labels, the second network measures it on all nodes.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from _common import Progress, arguments, cora, show_classification
from torch import Tensor, nn

import bayes_kfac as bk


class GCN(nn.Module):
    """Two layers, each on features that are averaged over neighbours (Kipf and Welling 2017)."""

    def __init__(self, words: int, width: int = 16, classes: int = 7) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(words, width), nn.Linear(width, classes)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """``[nodes, words]`` to ``[nodes, classes]``."""
        return self.out(adjacency @ self.hidden(adjacency @ features).relu())


def normalised(edges: Tensor, nodes: int) -> Tensor:
    """``D^-1/2 (A + I) D^-1/2`` as a sparse matrix."""
    both = torch.cat([edges, edges.flip(0), torch.arange(nodes).expand(2, nodes)], dim=1)
    degree = torch.bincount(both[0], minlength=nodes).float()
    weights = degree[both].prod(0).rsqrt()
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(both, weights, (nodes, nodes)).coalesce()


def main() -> None:
    """Train, predict, print, twice."""
    options = arguments(__doc__, steps=200)
    features, edges, labels, masks = cora(smoke=options.smoke)
    adjacency, mask = normalised(edges, len(labels)), masks["train"]
    for everywhere in (False, True):
        print("The Fisher of", "all nodes" if everywhere else "the labelled nodes")
        torch.manual_seed(options.seed)
        model, likelihood = GCN(features.shape[1]), bk.likelihoods.Categorical()
        optimizer = bk.NoisyKFAC(
            model,
            likelihood,
            num_data=int(mask.sum()),
            lr=0.1,
            prior_precision=10.0,
            temperature=0.03,  # 23 000 weights on 140 labels: at 1 the posterior is the prior
            kl_clip=1e-2,
            statistics_decay=0.95,  # a short run: the curvature remembers 20 steps
            inverse_every=20,
        )
        progress = Progress(optimizer, options.steps)
        for _ in range(options.steps):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                if everywhere and optimizer.is_measuring:
                    model(features, adjacency)  # measured, without a loss
                with optimizer.unmeasured() if everywhere else nullcontext():
                    loss = likelihood(model(features, adjacency), labels, mask)
                loss.backward()
            optimizer.step()
            progress(loss)
        probs = optimizer.posterior().predict((features, adjacency), method="sampling").probs
        show_classification(probs[masks["test"]], labels[masks["test"]])


if __name__ == "__main__":
    main()
