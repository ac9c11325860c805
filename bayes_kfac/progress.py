"""Progress bars, by tqdm."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any


def bar(iterable: Iterable[Any] | None = None, *, progress: bool, **options: Any) -> Any:
    """A progress bar: widgets in a notebook that has them, else text.

    Args:
        iterable: What to go through, if anything.
        progress: Whether to show it.
        options: Arguments of tqdm.

    Returns:
        A tqdm, to be iterated over or updated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets text, and need not be told so
        from tqdm.auto import tqdm
    return tqdm(iterable, disable=not progress, **options)
