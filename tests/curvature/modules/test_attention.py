"""Attention: its parts, what they see, and that masked positions weigh nothing."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from bayes_kfac.curvature import find_layers
from tests.curvature.modules.cases import KEY, PADDED, SEQUENCE, VALUE, Model, attending, crossing
from tests.helpers import TIGHT, record, seeded


def test_its_inner_linear_layer_is_a_part_of_it():
    """It is never called, so that no hook on it would ever fire; in an encoder layer its siblings are layers."""
    layers, reasons = find_layers(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    assert list(layers) == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"]
    assert list(layers["self_attn.out_proj"].parameters) == ["self_attn.out_proj.weight", "self_attn.out_proj.bias"]
    assert reasons == {}


def test_self_attention_has_the_rows_of_one_fused_linear_layer():
    model = seeded(attending())
    rows = record(model, SEQUENCE)["attention.in_proj"]
    assert_close(rows.inputs[..., :-1], SEQUENCE, **TIGHT)
    assert rows.gradients.shape == (16, 3, 4, 12)


def test_cross_attention_has_its_three_uses_side_by_side():
    """Each has zeros in the outputs that it does not fill."""
    rows = record(seeded(attending(crossing)), (SEQUENCE, KEY, VALUE))["attention.in_proj"]
    assert_close(rows.inputs[..., :-1], torch.cat([SEQUENCE, KEY, VALUE], dim=1), **TIGHT)
    for use, gradients in enumerate(rows.gradients.split([4, 5, 5], dim=-2)):
        own = torch.zeros(12, dtype=torch.bool)
        own[4 * use : 4 * use + 4] = True
        assert gradients[..., own].any()
        assert not gradients[..., ~own].any()


def test_keys_that_are_masked_have_no_gradient():
    model = seeded(attending(lambda m, x, padding: m.attention(x, x, x, key_padding_mask=padding)[0].mean(1)))
    rows = record(model, (SEQUENCE, PADDED))["attention.in_proj"]
    keys_and_values = rows.gradients[..., 4:]
    assert not keys_and_values[:, PADDED].any()
    assert keys_and_values[:, ~PADDED].any(-1).all()


def test_attention_that_is_called_twice_sums_its_uses():
    model = seeded(Model(lambda m, x: m.attention(*[m.attention(x, x, x)[0]] * 3)[0], attention=attending().attention))
    rows = record(model, SEQUENCE)
    assert rows["attention.in_proj"].inputs.shape == (3, 8, 5)
    assert rows["attention.out_proj"].inputs.shape == (3, 8, 5)
