"""The notebooks: each runs in smoke mode, and is committed as it is, with the outputs of a full run."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
import torch

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
#: Paths of somebody's machine.
A_PATH = re.compile(r"/(?:home|root|work|tmp|Users|usr)/\w+")


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Notebooks set a seed, a style, a default dtype and a number of threads."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(), mpl.rc_context({"backend": "agg"}):
        yield
    plt.close("all")
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("as_it_was")
def test_runs_from_top_to_bottom(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, no data but scikit-learn's, no warning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAYES_KFAC_SMOKE", "1")
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(source), run_name="__main__")


def test_pair_is_the_same(source: Path) -> None:
    """What is read on the site is what runs here: cell by cell."""

    def cells(path: Path) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]

    assert cells(source) == cells(source.with_suffix(".ipynb"))


def test_outputs_are_of_a_clean_full_run(source: Path) -> None:
    """Every code cell was run, in order, without an error or a warning, and no output tells where."""
    cells = [cell for cell in jupytext.read(source.with_suffix(".ipynb")).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not A_PATH.findall(str(outputs))


def test_every_notebook_has_its_source() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES}
