"""Sides of which each has a closed form given the other, and all together have none: in turns, until none moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

#: What moves by less than this, relatively, has come to its end.
TOLERANCE = 1e-10
SWEEPS = 500
#: So has what moved no less in so many sweeps than in one before them: that is as far as rounding lets it come. A
#: single sweep says nothing, as the first ones may move further and further.
PATIENCE = 3

Sides = TypeVar("Sides")
Side = TypeVar("Side")


def relative_change(before: Tensor, after: Tensor) -> float:
    """The largest change of a positive element, relative to itself."""
    return float((before / after - 1).abs().max())


def alternated(
    row_given: Callable[[Side], Side],
    column_given: Callable[[Side], Side],
    column: Side,
    distance: Callable[[Side, Side], float] = relative_change,  # type: ignore[assignment]
    tolerance: float = TOLERANCE,
) -> tuple[Side, Side]:
    """Two sides that fit each other.

    Args:
        row_given: The row side given the column side.
        column_given: The column side given the row side.
        column: The column side to start from.
        distance: How far a column side moved, from one to the next, relatively. The row side follows from it.
        tolerance: The distance that is none.

    Returns:
        The row side and the column side.
    """

    def sweep(sides: tuple[Side, Side]) -> tuple[tuple[Side, Side], float]:
        _, before = sides
        row = row_given(before)
        column = column_given(row)
        return (row, column), distance(before, column)

    return settled(sweep, (column, column), tolerance)


def settled(sweep: Callable[[Sides], tuple[Sides, float]], sides: Sides, tolerance: float = TOLERANCE) -> Sides:
    """Any number of sides after so many sweeps that another would not move them.

    Args:
        sweep: Each side given the others, and how far that moved them, relatively.
        sides: Where to start.
        tolerance: The movement that is none.

    Returns:
        The sides.
    """
    least, stalled = math.inf, 0
    for _ in range(SWEEPS):
        sides, moved = sweep(sides)
        least, stalled = (moved, 0) if moved < least else (least, stalled + 1)
        if moved <= tolerance or stalled == PATIENCE:
            break
    return sides
