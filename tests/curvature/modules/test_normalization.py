"""Normalisations in training: batch statistics couple the examples, and running averages move with every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.curvature import Recorder, find_layers
from tests.helpers import TIGHT, randn, record, seeded


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm1d(4, track_running_stats=False), (5, 4, 3)),
        (nn.BatchNorm2d(4, momentum=0.5), (5, 4, 3, 2)),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (5, 4, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_in_training_rows_account_for_the_gradient_of_the_batch(norm, shape):
    """Each example's normalised input and gradient are those of the function that the batch computes as a whole."""
    model, inputs, gradient = seeded(nn.Sequential(norm, nn.Tanh())), randn(*shape, seed=1), randn(*shape, seed=2)
    rows = record(model, inputs, gradient[None])["0"]
    model(inputs).backward(gradient)
    (layer,) = find_layers(model)[0].values()
    assert_close(rows.total(0), layer.gradient(), **TIGHT)


def test_running_averages_are_those_of_the_time_of_the_call():
    """A module that is called twice in training moves them in between; one in evaluation reads what others moved."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).eval()

        def forward(self, x: Tensor) -> Tensor:
            first = self.norm(x)
            self.norm.running_mean.add_(1)
            return first * self.norm(x)

    model, inputs, gradient = seeded(Twice()), randn(5, 3, seed=1), randn(5, 3, seed=2)
    rows = record(model, inputs, gradient[None])["norm"]
    for call, mean in enumerate([0, 1]):
        expected = (inputs - mean) * (1 + model.norm.eps) ** -0.5
        assert_close(rows.inputs[..., call, 0].mT, expected, **TIGHT)


def test_a_recorder_does_not_move_running_averages_itself():
    inputs, moved = randn(5, 3, seed=1), []
    for is_watched in (True, False):
        model = seeded(nn.BatchNorm1d(3, momentum=0.5))
        recorder = Recorder(find_layers(model)[0])
        if is_watched:
            recorder.attach()
        model(inputs)
        recorder.detach()
        moved.append((model.running_mean, model.running_var, model.num_batches_tracked))
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
