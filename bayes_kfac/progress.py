"""Progress bars: tqdm's, for a terminal or a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from operator import length_hint
from typing import Any


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """A bar over an iterable, or one that is moved on by hand.

    It is made of widgets in a notebook that has them, and of text elsewhere.

    Args:
        iterable: What to go through, once.
        shown: Whether there is a bar.
        options: Further arguments of ``tqdm``.

    Returns:
        The bar.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import tells a notebook without widgets that it has none
        from tqdm.auto import tqdm
    if iterable is not None:  # tqdm.auto begins to iterate twice, which starts a loader's workers and shuffles it twice
        options.setdefault("total", length_hint(iterable) or None)
        iterable = (item for item in iterable)
    return tqdm(iterable, disable=not shown, **options)
