"""Recurrence: what is refused, dropout between layers, and what a step costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayes_kfac.curvature import Recorder, find_layers
from bayes_kfac.errors import UnsupportedModelError
from tests.curvature.modules.cases import SEQUENCE
from tests.helpers import randn, seeded


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_packed_sequence_is_an_error_that_says_what_to_do(kind):
    """While it is watched only: at any other time the module is torch's own."""
    model = seeded(kind(4, 3, batch_first=True))
    packed = pack_padded_sequence(SEQUENCE, torch.tensor([4, 2, 1]), batch_first=True)
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    try:
        with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} was called on a PackedSequence.*mask"):
            model(packed)
    finally:
        recorder.detach()
    assert model(packed)[0].data.shape == (7, 3)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_between_layers_in_training_only(training):
    """With a rate that drops everything, the last layer sees zeros, and its output is the same at every input."""
    model = seeded(nn.GRU(4, 3, num_layers=2, dropout=1.0, batch_first=True)).train(training)
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    try:
        first, other = model(SEQUENCE)[0], model(SEQUENCE + 1)[0]
    finally:
        recorder.detach()
    assert torch.equal(first, other) == training
    assert torch.equal(first, model(SEQUENCE)[0]) or not training


class Elements(TorchDispatchMode):
    """Counts the elements of all results."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_backward_pass_costs_in_proportion_to_time(kind):
    """A gradient of all steps behind each step would be its square."""
    model = seeded(kind(2, 3))
    recorder = Recorder(find_layers(model)[0])
    counts = []
    for steps in (30, 60):
        recorder.attach()
        try:
            with Elements() as elements:
                model(randn(steps, 2, 2, seed=0))[0][-1].sum().backward()
        finally:
            recorder.detach()
        counts.append(elements.count)
    assert counts[1] < 2.1 * counts[0]
