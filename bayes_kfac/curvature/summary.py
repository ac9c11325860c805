"""The summary: for each parameter of a model, which block it is in and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

from torch import nn

from bayes_kfac.curvature.layers import Layer


@dataclass(frozen=True)
class SummaryRow:
    """What becomes of one parameter.

    Attributes:
        parameter: Its name in the model.
        shape: Its shape.
        block: The layer whose posterior block holds it, or ``-``.
        structure: The block's structure and shape, or how the parameter is treated.
        why: The reason where it has no block, and what is special about one.
    """

    parameter: str
    shape: str
    block: str
    structure: str
    why: str


@dataclass(frozen=True)
class Summary:
    """A table with one row for each parameter; ``print`` shows it.

    Attributes:
        rows: The rows, in the model's order.
    """

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        table = [tuple(field.name for field in fields(SummaryRow)), *map(astuple, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summarize(
    model: nn.Module, layers: Mapping[str, Layer], reasons: Mapping[str, str], structures: Mapping[str, str]
) -> Summary:
    """Say for each parameter what becomes of it.

    Args:
        model: The model.
        layers: The layers with a block.
        reasons: Why each trainable parameter outside of them has none.
        structures: The structure of each block, for display.

    Returns:
        The table.
    """
    home = {name: layer for layer in layers.values() for name in layer.parameters}
    rows = []
    for name, parameter in model.named_parameters():
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        if layer := home.get(name):
            block_shape = "×".join(map(str, layer.shape))
            rows.append(SummaryRow(name, shape, layer.name, f"{structures[layer.name]} {block_shape}", _why(layer)))
        elif name in reasons:
            rows.append(SummaryRow(name, shape, "-", "deterministic", reasons[name]))
        else:
            why = "not among params=" if parameter.requires_grad else "frozen (requires_grad=False)"
            rows.append(SummaryRow(name, shape, "-", "constant", why))
    return Summary(tuple(rows))


def _why(layer: Layer) -> str:
    """What there is to say of a block: which modules share it, which of its sides are diagonal."""
    notes = []
    if len(layer.uses) > 1:
        kinds = ", ".join(type(use.adapter.module).__name__ for use in layer.uses)
        notes.append(f"tied between {len(layer.uses)} modules ({kinds})")
    if layer.sparse_sides:
        sides = {"input": "input", "gradient": "output"}
        notes.append(f"diagonal {', '.join(sides[side] for side in sorted(layer.sparse_sides))} factor")
    if layer.adapter.stands_alone:
        notes.append("no module multiplies it with an input")
    return "; ".join(notes)
