"""What holds for all plots: Matplotlib is optional, pyplot is not needed for given axes, and each is in the gallery."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bayes_kfac import plotting
from bayes_kfac.likelihoods import Gaussian
from tests.plotting.helpers import predict
from tests.posteriors import random_posterior

ROOT = Path(__file__).resolve().parents[2]


class State:
    """What a callback of ``fit`` is given."""

    epoch, kl, elbo = 1, 2.0, -3.0


def calls(classification: tuple[Tensor, Tensor]) -> dict:
    """Each plot's arguments."""
    probs, labels = classification
    x = torch.linspace(-1, 1, 5)
    posterior = random_posterior(nn.Linear(3, 2).double(), Gaussian(1.0).double())
    return {
        "plot_acquisition": (x, x.square()),
        "plot_coverage": (x.abs(),),
        "plot_elbo": ([State()],),
        "plot_factor_spectra": (posterior,),
        "plot_layer_summary": (posterior,),
        "plot_learning_curve": (x, x),
        "plot_pit": (x.abs(),),
        "plot_precision_spectrum": (posterior,),
        "plot_predictive_band": (x, predict(x)),
        "plot_reliability": (probs, labels),
        "plot_risk_coverage": (probs.argmax(-1) != labels, probs.amax(-1)),
    }


@pytest.mark.parametrize("name", plotting.__all__)
def test_given_axes_need_no_pyplot(
    name: str, classification: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure of one's own, in a server or a window: it is drawn on, and pyplot is not even imported."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = Figure(layout="constrained")
    ax = figure.add_subplot()
    assert getattr(plotting, name)(*calls(classification)[name], ax=ax) is ax
    figure.canvas.draw()
    monkeypatch.undo()
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", plotting.__all__)
def test_missing_matplotlib_says_what_to_install(
    name: str, classification: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'bayes-kfac\[plot\]'"):
        getattr(plotting, name)(*calls(classification)[name])


def test_plotting_is_imported_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only drawing needs it."""
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in [name for name in sys.modules if name.startswith("bayes_kfac.plotting")]:
        monkeypatch.delitem(sys.modules, module)
    fresh = importlib.import_module("bayes_kfac.plotting")
    assert fresh is not plotting
    assert fresh.__all__ == plotting.__all__


@pytest.mark.parametrize("name", plotting.__all__)
def test_gallery_shows_it(name: str) -> None:
    assert name in (ROOT / "docs" / "plotting.md").read_text()


def test_pictures_of_the_gallery_are_small_and_shown() -> None:
    page = (ROOT / "docs" / "plotting.md").read_text()
    for picture in (ROOT / "docs" / "images").glob("plot_*.png"):
        assert picture.stat().st_size < 60_000
        assert picture.name in page
