"""Embeddings: which of them are linear in their weights, and that one-hot rows are never written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayes_kfac.curvature import SparseRows, find_layers
from tests.curvature.modules.cases import FLAT, STARTS, WORDS
from tests.helpers import record, seeded

SPARSE = "its gradients are sparse; make it with sparse=False"
CLIPPED = "max_norm changes its weights in every forward pass"
FREQUENCY = "scale_grad_by_freq=True makes its gradients those of another loss"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(6, 3, sparse=True), SPARSE),
        (nn.Embedding(6, 3, max_norm=1.0), CLIPPED),
        (nn.Embedding(6, 3, scale_grad_by_freq=True), FREQUENCY),
        (nn.EmbeddingBag(6, 3, sparse=True), SPARSE),
        (nn.EmbeddingBag(6, 3, max_norm=1.0), CLIPPED),
        (nn.EmbeddingBag(6, 3, scale_grad_by_freq=True), FREQUENCY),
        (nn.EmbeddingBag(6, 3, mode="max"), "its mode 'max' is not linear in the weights"),
    ],
)
def test_what_is_not_linear_in_the_weights_is_a_reason(module, reason):
    layers, reasons = find_layers(nn.Sequential(module))
    assert layers == {}
    assert reasons == {"0.weight": reason}


def test_rows_of_a_large_vocabulary_are_as_many_as_its_words_in_the_batch():
    """A row written out would have a million elements."""
    model = seeded(nn.Sequential(nn.Embedding(1_000_000, 1), nn.Flatten(), nn.Linear(4, 1)))
    rows = record(model, WORDS)["0"]
    assert isinstance(rows.inputs, SparseRows)
    assert rows.inputs.indices.shape == rows.inputs.weights.shape == (3, 4, 1)
    assert rows.inputs.shape == (3, 4, 1_000_000)
    assert torch.equal(rows.inputs.indices.squeeze(-1), WORDS)


def test_the_padding_index_weighs_nothing():
    """Its row of the weight never moves, so that it has no frequency either."""
    model = seeded(nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 2)))
    inputs = record(model, WORDS)["0"].inputs
    assert torch.equal(inputs.weights.squeeze(-1), (WORDS != 2).double())


def test_an_empty_bag_has_an_empty_row():
    dense = record(seeded(nn.EmbeddingBag(6, 3, mode="mean")), (FLAT, STARTS))["(root)"].inputs.dense().squeeze(1)
    expected = torch.tensor([[0.5, 0, 0, 0, 0.5, 0], [0] * 6, [0, 0.4, 0.2, 0.2, 0, 0.2]], dtype=torch.float64)
    assert torch.allclose(dense, expected)
