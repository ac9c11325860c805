"""Progress bars are shown where they are wanted, and quiet in notebooks without widgets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, IterableDataset

from bayes_kfac.progress import progress_bar


@pytest.mark.parametrize("shown", [True, False])
def test_shown_on_request(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1, 2], shown=shown, desc="counting")) == [1, 2]
    assert ("counting" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("shown", [True, False])
def test_begins_only_once(shown: bool) -> None:
    """A loader starts its workers, and draws its order, where it is asked for an iterator."""

    class Counting:
        begun = 0

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[int]:
            self.begun += 1
            return iter([1, 2])

    counting = Counting()
    bar = progress_bar(counting, shown=shown)
    assert list(bar) == [1, 2]
    assert counting.begun == 1
    assert not shown or bar.total == 2


def test_length_may_be_unknown() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    assert [int(value) for value in progress_bar(DataLoader(Endless()), shown=True)] == [1, 2]


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
