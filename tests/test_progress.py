"""Progress bars are silent where they are not wanted, and shown where they are."""

from __future__ import annotations

import sys

import pytest
import torch

import bayes_kfac as bk
from bayes_kfac.progress import progress_bar


@pytest.fixture
def loader():
    data = torch.utils.data.TensorDataset(torch.eye(4), torch.ones(4, 1))
    return torch.utils.data.DataLoader(data, batch_size=2)


def test_none_is_imported_where_none_is_shown(loader, monkeypatch):
    """In a notebook without widgets the import of tqdm.auto warns, which no ``progress=False`` could keep quiet."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # importing it is an error now
    model, likelihood = torch.nn.Linear(4, 1), bk.likelihoods.Gaussian(1.0)
    bk.fit(model, likelihood, loader, epochs=1, progress=False)
    laplace = bk.Laplace(model, likelihood).fit(loader, progress=False)
    laplace.optimize_prior_precision("validation", loader=loader, grid=[1.0], progress=False)
    laplace.posterior().predict(loader, progress=False)


def test_shown_on_request(capsys):
    assert list(progress_bar([1, 2], shown=True, desc="counting")) == [1, 2]
    assert "counting" in capsys.readouterr().err
    assert list(progress_bar([1, 2], shown=False, desc="counting")) == [1, 2]
    assert not capsys.readouterr().err
