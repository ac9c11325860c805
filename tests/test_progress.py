"""Progress bars: shown where they are wanted, and quiet in notebooks without widgets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bayes_kfac.progress import bar


@pytest.mark.parametrize("progress", [True, False])
def test_shows_or_does_not(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar([1, 2], progress=progress, desc="fit")) == [1, 2]
    assert ("fit" in capsys.readouterr().err) == progress


def test_notebook_without_widgets_gets_text_and_no_warning() -> None:
    """tqdm.auto warns at its import, where IPython runs a kernel and ipywidgets are missing."""
    code = (
        "import sys; sys.modules['ipywidgets'] = None; import IPython\n"
        "IPython.get_ipython = lambda: type('Shell', (), {'config': {'IPKernelApp': 1}})()\n"
        "from bayes_kfac.progress import bar; list(bar([1], progress=True, desc='fit'))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stderr
