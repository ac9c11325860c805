"""Spectra and layer summaries against dense matrices: what is drawn where, not how it looks."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayes_kfac import Laplace, Posterior, plotting
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Gaussian
from tests.plotting.helpers import legend_texts
from tests.posteriors import STRUCTURES, random_posterior

PRIOR = 1.3


def posterior(structure: str = "kron", damping: str = "factored", **options: float) -> Posterior:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return random_posterior(model, Gaussian(1.0).double(), structure=structure, damping=damping, **options)


def descending(values: Tensor) -> np.ndarray:
    return np.sort(values.double().numpy().ravel())[::-1]


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES)
def test_precision_spectrum_has_the_eigenvalues_of_the_dense_precision(structure: str, damping: str) -> None:
    """Of every structure's blocks; those that are linked are refused, with what to do instead."""
    own = posterior(structure, damping)
    if any(own.blocks.is_linked(name) for name in own.blocks):
        with pytest.raises(ArgumentError, match=r"linked to another.*nearest_matrix_normal\(\)"):
            plotting.plot_precision_spectrum(own)
        own = own.nearest_matrix_normal()
    ax = plotting.plot_precision_spectrum(own)
    for name, line in zip(own.blocks, ax.lines, strict=False):
        expected = torch.linalg.eigvalsh(own.blocks[name].to_dense())
        share, eigenvalues = line.get_data()
        np.testing.assert_allclose(eigenvalues, descending(expected), rtol=1e-6)
        np.testing.assert_allclose(share, (np.arange(len(share)) + 0.5) / len(share))
    assert ax.get_yscale() == "log"
    assert legend_texts(ax) == ["0, 4×4", "2, 2×5", "prior"]
    assert ax.lines[-1].get_ydata()[0] == PRIOR


@pytest.mark.parametrize("damping", ["factored", "optimal"])
def test_factor_spectra_multiply_to_the_precision(damping: str) -> None:
    own = posterior("kron", damping)
    ax = plotting.plot_factor_spectra(own)
    for index, name in enumerate(own.blocks):
        (_, outputs), (_, inputs) = (line.get_data() for line in ax.lines[2 * index : 2 * index + 2])
        assert outputs.mean() == pytest.approx(inputs.mean())
        dense = torch.linalg.eigvalsh(own.blocks[name].to_dense())
        np.testing.assert_allclose(descending(torch.tensor(np.outer(outputs, inputs))), descending(dense), rtol=1e-8)
    assert legend_texts(ax) == ["0, 4 outputs", "0, 4 inputs", "2, 2 outputs", "2, 5 inputs", "√ prior"]
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(math.sqrt(PRIOR))


def test_factored_damping_has_the_root_of_the_prior_as_its_floor() -> None:
    """With one datum each factor has rank one, and all other eigenvalues are the floor itself."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(1, 3).double()
    laplace = Laplace(model, Gaussian(1.0).double(), structure="kron", damping="factored", prior_precision=PRIOR)
    own = laplace.fit([(x, torch.randn(1, 4).double())], progress=False).posterior()
    _, (_, inputs) = (line.get_data() for line in plotting.plot_factor_spectra(own).lines[:2])
    np.testing.assert_allclose(inputs[1:], math.sqrt(PRIOR), rtol=1e-8)
    assert inputs[0] > math.sqrt(PRIOR)


def test_factor_spectra_refuse_what_has_no_factors() -> None:
    with pytest.raises(ArgumentError, match=r"'0' is a kron_eigen Gaussian.*nearest_matrix_normal\(\)"):
        plotting.plot_factor_spectra(posterior("kron", "exact"))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    laplace = Laplace(model, Gaussian(1.0), structure="tridiagonal", damping="factored")
    linked = laplace.fit([(x, torch.randn(9, 2))], progress=False).posterior()
    with pytest.raises(ArgumentError, match=r"'2' is linked to another.*nearest_matrix_normal\(\) has them\.$"):
        plotting.plot_factor_spectra(linked, layers=["2"])
    for own in (posterior("kron", "exact"), linked):
        plotting.plot_factor_spectra(own.nearest_matrix_normal())  # as it says


def test_spectra_of_large_blocks_are_thinned_and_keep_both_ends() -> None:
    torch.manual_seed(0)
    own = random_posterior(nn.Linear(60, 50).double(), Gaussian(1.0).double(), structure="diagonal", damping="exact")
    _, eigenvalues = plotting.plot_precision_spectrum(own).lines[0].get_data()
    expected = descending(next(iter(own.blocks.values())).precision)
    assert len(eigenvalues) == 1000
    assert (eigenvalues[0], eigenvalues[-1]) == (expected[0], expected[-1])


def test_blocks_too_large_to_write_out_are_refused() -> None:
    own = random_posterior(nn.Linear(70, 60).double(), Gaussian(1.0).double(), structure="smw", damping="exact")
    with pytest.raises(ArgumentError, match=r"has 4260 weights.*Allowed: up to 4096"):
        plotting.plot_precision_spectrum(own)


def test_layers_with_other_priors_have_lines_of_their_own_colours() -> None:
    own = posterior()
    own.prior_precision["2"] = 0.5
    ax = plotting.plot_precision_spectrum(own)
    assert [line.get_color() for line in ax.lines[:2]] == [line.get_color() for line in ax.lines[2:]]
    assert [line.get_ydata()[0] for line in ax.lines[2:]] == [PRIOR, 0.5]
    own.prior_precision["2"] = torch.ones(2, 5)  # of each weight: no line
    assert len(plotting.plot_precision_spectrum(own).lines) == 3


@pytest.mark.parametrize("quantity", ["stddev", "signal_to_noise"])
def test_layer_summary_has_the_quantiles_of_the_weights(quantity: str) -> None:
    own = posterior("kron", "exact")
    ax = plotting.plot_layer_summary(own, quantity)
    lines = [line for line in ax.lines if line.get_gid() is None]
    for index, (name, variance) in enumerate(own.blocks.marginal_variance().items()):
        values = variance.sqrt()
        if quantity == "signal_to_noise":
            values = own.layers[name].matrix(own.mean).abs() / values
        expected = np.quantile(values, [0.05, 0.95, 0.25, 0.75, 0.5])
        drawn = np.concatenate([line.get_xdata() for line in lines[3 * index : 3 * index + 3]])
        np.testing.assert_allclose(drawn, expected)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "2"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first layer is on top
    ticks = [line.get_xdata()[0] for line in ax.lines if line.get_gid()]
    assert ticks == pytest.approx([PRIOR**-0.5] * 2 if quantity == "stddev" else [])
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("structure", "damping"), [("kron", "exact"), ("tridiagonal", "factored"), ("dense", "exact")])
def test_layer_summary_counts_the_determined_directions(structure: str, damping: str) -> None:
    """``Σ (λ − δ) / λ`` over the eigenvalues of the layer's marginal precision."""
    own = posterior(structure, damping)
    ax = plotting.plot_layer_summary(own, "determined")
    widths = [patch.get_width() for patch in ax.patches if patch.get_width() != 1]
    covariance = {}
    for name, block in own.blocks.items():
        unit = torch.eye(int(np.prod(block.shape)), dtype=torch.float64).reshape(-1, *block.shape)
        covariance[name] = own.blocks.solve({name: unit})[name].flatten(1)
    for width, own_covariance in zip(widths, covariance.values(), strict=True):
        variances = torch.linalg.eigvalsh(own_covariance)
        assert width == pytest.approx((1 - PRIOR * variances).mean().item(), rel=1e-8)
    assert len(ax.texts) == 2
    assert ax.texts[0].get_text().endswith(" of 16")


def test_layers_are_chosen_by_name() -> None:
    own = posterior()
    for plot in (plotting.plot_precision_spectrum, plotting.plot_factor_spectra, plotting.plot_layer_summary):
        ax = plot(own, layers=["2"])
        assert "0" not in [text.get_text()[:1] for text in (*ax.get_yticklabels(), *ax.get_legend().get_texts())]
        with pytest.raises(ArgumentError, match=r"layers='1' is unknown. Allowed: '0', '2'"):
            plot(own, layers=["1"])
        with pytest.raises(ArgumentError, match=r"layers='2' is one name. Allowed: a list of names, such as \['2'\]"):
            plot(own, layers="2")


def test_what_is_no_posterior_is_refused() -> None:
    for plot in (plotting.plot_precision_spectrum, plotting.plot_factor_spectra, plotting.plot_layer_summary):
        with pytest.raises(ArgumentError, match=r"posterior is a Laplace.*laplace.posterior\(\)"):
            plot(Laplace(nn.Linear(3, 2), Gaussian(1.0)))


def test_summary_refuses() -> None:
    own = posterior()
    with pytest.raises(ArgumentError, match="quantity='entropy' is unknown"):
        plotting.plot_layer_summary(own, "entropy")
    own.prior_precision.clear()
    with pytest.raises(ArgumentError, match="its prior was another posterior"):
        plotting.plot_layer_summary(own, "determined")
    plotting.plot_layer_summary(own)  # the standard deviations are known all the same
    assert len(plt.get_fignums()) == 1
