"""Pictures of a posterior: what the data determined in each layer, and what is left of the prior.

A layer's block has a precision ``P`` whose eigenvalues are at least about the prior's precision ``δ``: a direction at
``δ`` is one that the data say nothing about, one far above it is determined by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.plotting.style import DARK, INK, LIGHT, PALETTE, QUIET, label_axes, legend, next_style, once, prepare
from bayes_kfac.posterior import Posterior
from bayes_kfac.structures import BlockGaussian, DiagonalGaussian, KroneckerEigenGaussian, MatrixNormalGaussian
from bayes_kfac.structures.kron_eigen import squared_lengths
from bayes_kfac.structures.unit_wise import UnitWiseGaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Weights of the largest block whose precision is written out for its eigenvalues.
DENSE_LIMIT = 4096
#: Points of a curve of eigenvalues.
POINTS = 1000
#: What :func:`plot_layer_summary` can show, and its axis.
QUANTITIES = {
    "stddev": "standard deviation of a weight",
    "signal_to_noise": "signal to noise: |mean| / standard deviation",
    "determined": "share of the directions that the data determine",
}
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def plot_precision_spectrum(
    posterior: Posterior, *, layers: Iterable[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the eigenvalues of each layer's posterior precision, in descending order, beside the prior's.

    Directions where a curve lies on the dashed line of the prior's precision are those that the data left as they
    were; where it is ten times as high, the data count for nine tenths. The lines of layers with different priors have
    the layers' colours; a prior with a precision of its own for each weight has none.

    Args:
        posterior: The posterior.
        layers: The names of the layers to show; by default all.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes, logarithmic in the eigenvalue.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If a layer is unknown, is linked to another, or is of a kind whose eigenvalues have no closed
            form and too large to be written out.
    """
    spectra = {name: _precision_eigenvalues(posterior, name) for name in _names(posterior, layers)}
    colours: dict[str, str] = {}

    ax = prepare(ax, figsize=(6.4, 4.0))
    for name, values in spectra.items():
        style = next_style(ax)
        share, eigenvalues = _descending(values)
        shape = "×".join(map(str, posterior.blocks[name].shape))
        ax.plot(share, eigenvalues, linewidth=1.8, label=f"{name}, {shape}", **style)
        colours[name] = style["color"]
    _prior_lines(ax, {name: _number(posterior, name) for name in spectra}, colours, "prior")
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    label_axes(ax, "directions of the layer, best determined first (share)", "posterior precision (eigenvalue)")
    legend(ax)
    return ax


def plot_factor_spectra(posterior: Posterior, *, layers: Iterable[str] | None = None, ax: Axes | None = None) -> Axes:
    """Plot the eigenvalues of the two Kronecker factors of each layer's posterior precision, in descending order.

    The precision is ``U⁻¹ ⊗ V⁻¹``: output side, drawn solid, times input side, dashed. Scaled so that both have the
    same mean eigenvalue, they are ``√(N/τ) G' + √δ`` and ``√(N/τ) A' + √δ`` for ``damping="factored"``, with
    ``G'`` and ``A'`` of equal means: each is an undamped factor of the Fisher with the root of the prior's precision
    as its floor, which is the thin line. For other dampings the line is a guide for the eye.

    Source: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    Section 6.3, for the factored damping.

    Args:
        posterior: The posterior.
        layers: The names of the layers to show; by default all.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes, logarithmic in the eigenvalue.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If a layer is unknown, or its Gaussian is not a matrix normal.
    """
    spectra = {name: _factor_eigenvalues(posterior, name) for name in _names(posterior, layers)}
    colours: dict[str, str] = {}

    ax = prepare(ax, figsize=(6.4, 4.0))
    for name, sides in spectra.items():
        style = next_style(ax) | {"linestyle": "-"}
        for side, values in zip(("outputs", "inputs"), sides, strict=True):
            share, eigenvalues = _descending(values)
            text = f"{name}, {values.shape[-1]} {side}"
            ax.plot(share, eigenvalues, linewidth=1.8, label=text, **style)
            style = {"color": style["color"], "linestyle": (0, (4, 1.5))}
        colours[name] = style["color"]
    roots = {name: prior and prior**0.5 for name in spectra for prior in [_number(posterior, name)]}
    _prior_lines(ax, roots, colours, "√ prior")
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    label_axes(ax, "directions of the factor, best determined first (share)", "eigenvalue of the factor")
    legend(ax)
    return ax


def plot_layer_summary(
    posterior: Posterior, quantity: str = "stddev", *, layers: Iterable[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Plot how well each layer is known, one row for each, the model's first layer on top.

    ``"stddev"`` and ``"signal_to_noise"`` are distributions over the layer's weights: the median, the middle half
    (thick) and the middle nine tenths (thin). ``"determined"`` is one number, ``1 - mean(δ Σ)`` with the marginal
    variances ``Σ``: MacKay's effective number of parameters over their number, which stands beside the bar.

    Sources: Graves (2011), Practical variational inference for neural networks, for signal to noise; MacKay (1992),
    Bayesian interpolation, Section 4.2, for the number of well determined parameters.

    Args:
        posterior: The posterior.
        quantity: ``"stddev"``, with the prior's as a tick; ``"signal_to_noise"``; or ``"determined"``.
        layers: The names of the layers to show; by default all.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If ``quantity`` or a layer is unknown, or ``"determined"`` is asked of a posterior whose prior
            was another posterior.
    """
    check_choice("quantity", quantity, tuple(QUANTITIES))
    names = _names(posterior, layers)
    variances = posterior.blocks.marginal_variance()
    rows = [_row(posterior, name, variances[name], quantity) for name in names]
    height = np.arange(len(rows))

    ax = prepare(ax, figsize=(6.4, 1.2 + 0.42 * len(rows)))
    if quantity == "determined":
        ax.barh(height, 1, height=0.62, color=LIGHT)
        ax.barh(height, [row.share for row in rows], height=0.62, color=PALETTE[0])
        for y, row in zip(height, rows, strict=True):
            effective = row.share * row.size
            number = f"{effective:,.{0 if effective >= 10 else 1}f} of {row.size:,}"
            ax.annotate(number, (1, y), (4, 0), textcoords="offset points", va="center", fontsize="small", color=INK)
        ax.set_xlim(0, 1)
    else:
        for y, row in zip(height, rows, strict=True):
            low, lower, middle, upper, high = row.quantiles
            ax.plot([low, high], [y, y], color=DARK, linewidth=2, solid_capstyle="round")
            ax.plot([lower, upper], [y, y], color=PALETTE[0], linewidth=7, solid_capstyle="butt")
            ax.plot([middle], [y], color="white", marker="o", markersize=4.5, markeredgecolor=INK)
            if quantity == "stddev" and row.prior is not None:
                first = once(ax, "bayes_kfac.prior")
                ax.plot(
                    [row.prior] * 2,
                    [y - 0.35, y + 0.35],
                    color=PALETTE[1],
                    linewidth=2,
                    gid="bayes_kfac.prior",
                    label="prior" if first else None,
                )
        _plain_log_axis(ax)
        legend(ax)
    ax.set_yticks(height, names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    label_axes(ax, QUANTITIES[quantity], "layer")
    return ax


def _plain_log_axis(ax: Axes) -> None:
    """A logarithmic axis with numbers such as 0.2 and 0.5, which stay readable within one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_xscale("log", nonpositive="clip")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


class _Row(NamedTuple):
    """What is known of a layer."""

    size: int
    quantiles: Sequence[float]
    share: float
    prior: float | None


def _row(posterior: Posterior, name: str, variance: Tensor, quantity: str) -> _Row:
    """The summary of one layer.

    Args:
        posterior: The posterior.
        name: The layer.
        variance: Its weights' marginal variances.
        quantity: What is asked for.

    Returns:
        Its numbers; those that are not asked for may be 0.

    Raises:
        ArgumentError: If the prior is not known where it is needed.
    """
    variance = variance.double()
    prior = posterior.prior_precision.get(name)
    share, quantiles = 0.0, [0.0] * len(_QUANTILES)
    if quantity == "determined":
        if prior is None:
            raise ArgumentError(
                f"quantity='determined' is not known of layer {name!r}: its prior was another posterior. Allowed for "
                "it: 'stddev' and 'signal_to_noise'."
            )
        share = float(1 - (torch.as_tensor(prior).to(variance) * variance).mean())
    else:
        values = variance.sqrt()
        if quantity == "signal_to_noise":
            values = posterior.layers[name].matrix(posterior.mean).to(values).abs() / values
        # numpy's, since PyTorch's refuses layers of more than 16 million weights
        quantiles = np.quantile(values.flatten().cpu().numpy(), _QUANTILES).tolist()
    own = _number(posterior, name)
    return _Row(variance.numel(), quantiles, share, None if own is None else own**-0.5)


def _names(posterior: Posterior, layers: Iterable[str] | None) -> list[str]:
    """The layers to show: all, or those that are asked for."""
    if not isinstance(posterior, Posterior):
        raise ArgumentError(
            f"posterior is a {type(posterior).__name__}. Allowed: a bayes_kfac.Posterior, such as fit(...) returns, "
            "laplace.posterior() or optimizer.posterior()."
        )
    known = tuple(posterior.blocks)
    if layers is None:
        return list(known)
    if isinstance(layers, str):
        raise ArgumentError(f"layers={layers!r} is one name. Allowed: a list of names, such as [{layers!r}].")
    return [check_choice("layers", name, known) for name in layers]


def _number(posterior: Posterior, name: str) -> float | None:
    """The prior's precision of a layer, where it is one number."""
    prior = posterior.prior_precision.get(name)
    return None if prior is None or isinstance(prior, Tensor) else float(prior)


def _prior_lines(ax: Axes, priors: dict[str, float | None], colours: dict[str, str], label: str) -> None:
    """Thin lines at the priors of layers: a grey one with a name if all are the same, else in the layers' colours."""
    shared = len(set(priors.values())) == 1
    for name, prior in priors.items():
        gid = f"bayes_kfac.prior {prior}"
        if prior is not None and once(ax, gid):
            own: dict[str, Any] = {"color": QUIET, "label": label} if shared else {"color": colours[name]}
            ax.axhline(prior, linewidth=1, linestyle=(0, (4, 3)), gid=gid, zorder=1.5, **own)


def _descending(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ranks as shares, and the values in descending order; of many values an even choice that has both ends."""
    array = np.sort(values.detach().double().cpu().numpy().ravel())[::-1]
    chosen = np.unique(np.linspace(0, len(array) - 1, min(len(array), POINTS)).round().astype(int))
    return (chosen + 0.5) / len(array), array[chosen]


def _precision_eigenvalues(posterior: Posterior, name: str) -> Tensor:
    """The eigenvalues of a layer's precision, in any order and shape.

    Args:
        posterior: The posterior.
        name: The layer.

    Returns:
        As many as there are weights.

    Raises:
        ArgumentError: If it is linked, or too large for a kind without a closed form.
    """
    block = posterior.blocks[name]
    if posterior.blocks.is_linked(name):
        raise ArgumentError(
            f"Layer {name!r} is linked to another, so that its precision is not a block of its own. "
            "posterior.nearest_matrix_normal() has one."
        )
    if isinstance(block, MatrixNormalGaussian):
        row, column = (_squared_singular_values(root) for root in block.matrix_normal_roots)
        return 1 / (row.unsqueeze(-1) * column.unsqueeze(-2))
    if isinstance(block, KroneckerEigenGaussian):
        lengths = squared_lengths(block.basis_row), squared_lengths(block.basis_column)
        if lengths[0] is not None and lengths[1] is not None:
            return block.precision / (lengths[0] * lengths[1])[..., None, None]
    if isinstance(block, DiagonalGaussian):
        return block.precision
    if isinstance(block, UnitWiseGaussian):
        return 1 / _squared_singular_values(block.scale_tril)
    size = int(np.prod(block.shape))
    if size > DENSE_LIMIT:
        raise ArgumentError(
            f"Layer {name!r} has {size} weights, and the eigenvalues of a {block.kind} Gaussian have no closed form. "
            f"Allowed: up to {DENSE_LIMIT}. Leave it out by layers=, or plot posterior.nearest_matrix_normal()."
        )
    return torch.linalg.eigvalsh(block.to_dense().double())


def _factor_eigenvalues(posterior: Posterior, name: str) -> tuple[Tensor, Tensor]:
    """The eigenvalues of ``U⁻¹`` and ``V⁻¹``, of equal means.

    Args:
        posterior: The posterior.
        name: The layer.

    Returns:
        Output side and input side, ``[*blocks, size]``.

    Raises:
        ArgumentError: If the layer's Gaussian is not a matrix normal.
    """
    block: BlockGaussian = posterior.blocks[name]
    roots = block.matrix_normal_roots
    if posterior.blocks.is_linked(name):
        raise ArgumentError(
            f"Layer {name!r} is linked to another, and has no two Kronecker factors of its own. "
            "posterior.nearest_matrix_normal() has them."
        )
    if roots is None:
        raise ArgumentError(
            f"Layer {name!r} is a {block.kind} Gaussian, which has no two Kronecker factors. "
            "posterior.nearest_matrix_normal() has them; plot_precision_spectrum shows the eigenvalues of any block."
        )
    row, column = (1 / _squared_singular_values(root) for root in roots)
    balance = (row.mean(-1, keepdim=True) / column.mean(-1, keepdim=True)).sqrt()
    return row / balance, column * balance


def _squared_singular_values(root: Tensor) -> Tensor:
    """The eigenvalues of ``R Rᵀ``, ``[*blocks, size]``, in float64."""
    root = root.double()
    return linalg.diagonal(root).square() if linalg.is_diagonal(root) else torch.linalg.svdvals(root).square()
