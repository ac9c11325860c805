"""What the pictures share: colours, axes, legends, and the arrays that are drawn.

Curves differ in colour, dashes and marker at once, so that they are told apart without colours too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayes_kfac.errors import ArgumentError
from bayes_kfac.metrics import TensorLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with any common kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (8, 2)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
# Opaque tints of the first colour: no grid line shines through, and the legend shows the very colours of the plot.
LIGHT = "#D3E5F1"
DARK = "#8FC0DD"
INK = "#333333"
QUIET = "#999999"
GRID = "#E6E6E6"

#: Marks the curves that have a style of their own, to be counted.
_CURVE = "bayes_kfac.curve"


def next_style(ax: Axes) -> dict[str, Any]:
    """The colour, the dashes and the mark of the next curve on these axes, as arguments for a line."""
    drawn = sum(line.get_gid() == _CURVE for line in ax.lines)
    index = drawn % len(PALETTE)
    return {"color": PALETTE[index], "linestyle": DASHES[index], "gid": _CURVE}


def marker_of(style: dict[str, Any]) -> str:
    """The marker that goes with a curve's colour."""
    return MARKERS[PALETTE.index(style["color"])]


def once(ax: Axes, gid: str) -> bool:
    """Whether nothing of this mark is on the axes yet: a reference is drawn once, however many curves there are."""
    return not any(artist.get_gid() == gid for artist in (*ax.lines, *ax.collections, *ax.patches))


def diagonal(ax: Axes, label: str) -> None:
    """Draw the diagonal of the unit square, where it is not drawn yet."""
    gid = "bayes_kfac.diagonal"
    if once(ax, gid):
        ax.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), gid=gid, label=label)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")


def prepare(ax: Axes | None, *, figsize: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure, with a light grid and without a box.

    Args:
        ax: Axes to draw on, or None.
        figsize: Width and height of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "Plots need Matplotlib, which is not installed: pip install 'bayes-kfac[plot]'"
            ) from error
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    ax.set_axisbelow(True)
    ax.grid(visible=True, color=GRID, linewidth=0.8)
    ax.tick_params(length=0, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    return ax


def label_axes(ax: Axes, x: str, y: str) -> None:
    """Name the axes, unless the caller already did."""
    if not ax.get_xlabel():
        ax.set_xlabel(x)
    if not ax.get_ylabel():
        ax.set_ylabel(y)


def legend(ax: Axes, **where: Any) -> None:
    """Put a quiet legend where it covers least, unless the place is given."""
    if ax.get_legend_handles_labels()[0]:
        # Said explicitly, "best" does not warn when many points make it slow.
        options: dict[str, Any] = {"loc": "best", "labelcolor": INK, "edgecolor": "none", "fontsize": "small"}
        ax.legend(frameon=True, framealpha=0.9, **(options | where))


def as_array(name: str, value: TensorLike) -> np.ndarray:
    """Return numbers on any device as a float64 array.

    Args:
        name: The argument's name, for the message.
        value: A tensor, an array, or lists of one length.

    Returns:
        The array, of the same shape.

    Raises:
        ArgumentError: If it is none.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} of type {type(value).__name__} is no array of numbers: {error}") from error


def column(name: str, value: TensorLike, length: int | None = None) -> np.ndarray:
    """Return ``[n]`` or ``[n, 1]`` as a flat float64 array.

    Args:
        name: The argument's name, for the message.
        value: Numbers on any device.
        length: The ``n`` to insist on, if any.

    Returns:
        The array, ``[n]``.

    Raises:
        ArgumentError: If the shape is another one.
    """
    array = as_array(name, value)
    if array.shape not in {(array.size,), (array.size, 1)} or length not in {None, array.size}:
        n = "n" if length is None else length
        raise ArgumentError(f"{name} has shape {array.shape}. Allowed: [{n}] or [{n}, 1].")
    return array.ravel()
