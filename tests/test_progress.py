"""Progress bars are shown where they are wanted, and quiet in notebooks without widgets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bayes_kfac.progress import progress_bar


@pytest.mark.parametrize("shown", [True, False])
def test_shown_on_request(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1, 2], shown=shown, desc="counting")) == [1, 2]
    assert ("counting" in capsys.readouterr().err) == shown


def test_notebook_without_widgets_gets_text_and_no_warning() -> None:
    """tqdm.auto warns at its import, where IPython runs a kernel and ipywidgets are missing."""
    code = (
        "import sys; sys.modules['ipywidgets'] = None; import IPython\n"
        "IPython.get_ipython = lambda: type('Shell', (), {'config': {'IPKernelApp': 1}})()\n"
        "from bayes_kfac.progress import progress_bar; list(progress_bar([1], shown=True, desc='counting'))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "counting" in done.stderr
