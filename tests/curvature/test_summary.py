"""The summary: one row for each parameter, with its block or the reason for having none."""

from __future__ import annotations

import torch
from torch import nn

from bayes_kfac.curvature import Summary, SummaryRow, find_layers, summarize


def summary_of(model: nn.Module) -> Summary:
    layers, reasons = find_layers(model)
    structures = {name: layer.adapter.structure or "kron" for name, layer in layers.items()}
    return summarize(model, layers, reasons, structures)


def test_every_parameter_has_a_row_in_the_models_order():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.PReLU(6), nn.Flatten(), nn.Linear(6, 2, bias=False)
    )
    model[1].bias.requires_grad_(False)
    assert summary_of(model).rows == (
        SummaryRow("0.weight", "6×2×3×3", "0", "kron 2×3×19", ""),
        SummaryRow("0.bias", "6", "0", "kron 2×3×19", ""),
        SummaryRow("1.weight", "6", "1", "dense 6×1×1", ""),
        SummaryRow("1.bias", "6", "-", "constant", "frozen (requires_grad=False)"),
        SummaryRow("2.weight", "6", "-", "deterministic", "PReLU has no adapter"),
        SummaryRow("4.weight", "2×6", "4", "kron 2×6", ""),
    )


def test_a_frozen_bias_is_a_constant_beside_its_layers_block():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    weight, bias = summary_of(model).rows
    assert (weight.block, weight.structure) == ("(root)", "kron 2×3")
    assert (bias.block, bias.structure) == ("-", "constant")


def test_a_tied_weight_is_listed_once_with_its_modules():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    (row,) = summary_of(model).rows
    assert (row.parameter, row.block, row.structure, row.why) == (
        "0.weight",
        "0",
        "kron 2×2",
        "tied between 2 modules (Linear, Linear)",
    )


def test_diagonal_factors_are_mentioned_on_their_side():
    """An embedding's is on the input side; tied to the output layer, it is on the output side of that layer's block."""
    embedding = nn.Embedding(5, 3)
    (alone,) = summary_of(embedding).rows
    assert (alone.structure, alone.why) == ("kron 3×5", "diagonal input factor")
    model = nn.Sequential(embedding, nn.Linear(3, 5, bias=False))
    model[1].weight = embedding.weight
    (tied,) = summary_of(model).rows
    assert (tied.parameter, tied.block, tied.structure) == ("0.weight", "1", "kron 5×3")
    assert tied.why == "tied between 2 modules (Embedding, Linear); diagonal output factor"


def test_a_bare_parameter_is_mentioned_as_one():
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, 3))])
    (row,) = summary_of(model).rows
    assert row == SummaryRow("0", "2×3", "0", "diagonal 6×1", "no module multiplies it with an input")


def test_a_parameter_that_was_not_chosen_is_a_constant():
    model = nn.Linear(3, 2)
    layers, reasons = find_layers(model, [model.weight])
    weight, bias = summarize(model, layers, reasons, {"(root)": "kron"}).rows
    assert (weight.structure, bias.structure, bias.why) == ("kron 2×3", "constant", "not among params=")


def test_a_scalar_parameter_has_a_shape_to_read():
    model = nn.Module()
    model.scale = nn.Parameter(nn.Linear(1, 1).bias.detach().squeeze())
    assert [row.shape for row in summary_of(model).rows] == ["scalar"]


def test_printed_columns_are_aligned_under_their_headings():
    lines = str(summary_of(nn.Sequential(nn.Linear(30, 2), nn.PReLU(2)))).splitlines()
    assert lines[0].split() == ["parameter", "shape", "block", "structure", "why"]
    assert set(lines[1]) == {"-"}
    assert len(lines) == 2 + 3
    for heading, cells in [("shape", ["2×30", "2", "2"]), ("structure", ["kron", "kron", "deter"])]:
        start = lines[0].index(heading)
        assert [line[start:].startswith(cell) for line, cell in zip(lines[2:], cells, strict=True)] == [True] * 3
    assert all(line == line.rstrip() for line in lines)


def test_a_model_without_parameters_has_an_empty_table():
    summary = summary_of(nn.ReLU())
    assert summary.rows == ()
    assert str(summary).startswith("parameter")
