"""The summary: one row for each parameter, with its block or the reason for having none."""

from __future__ import annotations

from torch import nn

from bayes_kfac.curvature import Summary, SummaryRow, find_layers, summarize


def summary_of(model: nn.Module) -> Summary:
    return summarize(model, *find_layers(model), "kron")


def test_every_parameter_has_a_row_in_the_models_order():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 2))
    model[1].bias.requires_grad_(False)
    assert summary_of(model).rows == (
        SummaryRow("0.weight", "6×2×3×3", "0", "kron 2×3×19", ""),
        SummaryRow("0.bias", "6", "0", "kron 2×3×19", ""),
        SummaryRow("1.weight", "6", "-", "deterministic", "BatchNorm2d has no adapter"),
        SummaryRow("1.bias", "6", "-", "constant", "frozen (requires_grad=False)"),
        SummaryRow("3.weight", "2×6", "3", "kron 2×7", ""),
        SummaryRow("3.bias", "2", "3", "kron 2×7", ""),
    )


def test_a_frozen_bias_is_a_constant_beside_its_layers_block():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    weight, bias = summary_of(model).rows
    assert (weight.block, weight.structure) == ("(root)", "kron 2×3")
    assert (bias.block, bias.structure) == ("-", "constant")


def test_a_tied_weight_is_listed_once_with_its_reason():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    (row,) = summary_of(model).rows
    assert (row.parameter, row.structure, row.why) == (
        "0.weight",
        "deterministic",
        "its weights are tied between 0, 1",
    )


def test_a_scalar_parameter_has_a_shape_to_read():
    model = nn.Module()
    model.scale = nn.Parameter(nn.Linear(1, 1).bias.detach().squeeze())
    assert [row.shape for row in summary_of(model).rows] == ["scalar"]


def test_printed_columns_are_aligned_under_their_headings():
    lines = str(summary_of(nn.Sequential(nn.Linear(30, 2), nn.LayerNorm(2)))).splitlines()
    assert lines[0].split() == ["parameter", "shape", "block", "structure", "why"]
    assert set(lines[1]) == {"-"}
    assert len(lines) == 2 + 4
    for heading, cells in [("shape", ["2×30", "2", "2", "2"]), ("structure", ["kron", "kron", "deter", "deter"])]:
        start = lines[0].index(heading)
        assert [line[start:].startswith(cell) for line, cell in zip(lines[2:], cells, strict=True)] == [True] * 4
    assert all(line == line.rstrip() for line in lines)


def test_a_model_without_parameters_has_an_empty_table():
    summary = summary_of(nn.ReLU())
    assert summary.rows == ()
    assert str(summary).startswith("parameter")
