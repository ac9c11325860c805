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
        why: The reason where it has no block.
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


def summarize(model: nn.Module, layers: Mapping[str, Layer], reasons: Mapping[str, str], structure: str) -> Summary:
    """Say for each parameter what becomes of it.

    Args:
        model: The model.
        layers: The layers with a block.
        reasons: Why each trainable parameter outside of them has none.
        structure: The structure of the blocks, for display.

    Returns:
        The table.
    """
    home = {name: layer for layer in layers.values() for name in layer.parameters}
    rows = []
    for name, parameter in model.named_parameters():
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        if layer := home.get(name):
            block_shape = "×".join(map(str, layer.shape))
            rows.append(SummaryRow(name, shape, layer.name, f"{structure} {block_shape}", ""))
        elif name in reasons:
            rows.append(SummaryRow(name, shape, "-", "deterministic", reasons[name]))
        else:
            rows.append(SummaryRow(name, shape, "-", "constant", "frozen (requires_grad=False)"))
    return Summary(tuple(rows))
