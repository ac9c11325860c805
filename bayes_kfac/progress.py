"""Progress bars: tqdm's, for a terminal or a notebook, imported when something goes through data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """A bar over an iterable, or one that is moved on by hand.

    One that is not shown says nothing at all: in a notebook without widgets the import of ``tqdm.auto`` warns.

    Args:
        iterable: What to go through.
        shown: Whether there is a bar.
        options: Further arguments of ``tqdm``.

    Returns:
        The bar.
    """
    if shown:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm(iterable, disable=not shown, **options)
