"""Whether a loader shows the training data as they are: once each, and all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from operator import length_hint
from typing import Any

from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

from bayes_kfac.errors import BayesKfacWarning


def warn_of_samplers(loader: Iterable[Any], num_examples: int, *, stacklevel: int) -> None:
    """Warn where a loader leaves examples of its data set out, or may show them more than once.

    Args:
        loader: The loader, after one pass.
        num_examples: How many examples it yielded.
        stacklevel: The frames between here and the user's call.
    """
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    source = dataset if isinstance(dataset, IterableDataset) else sampler  # whose sampler is a placeholder of torch
    advice = "The fit counts what was yielded, as it was yielded; pass num_data= if there are more examples or fewer."
    length = length_hint(dataset, num_examples)  # streams may have a len() that raises
    if length != num_examples:
        cause = "drop_last=True" if getattr(loader, "drop_last", False) else f"its {type(source).__name__}"
        message = f"The loader yielded {num_examples} examples of a data set of {length}: {cause}. {advice}"
    elif source is not None and not _shows_each_once(source):
        message = f"The loader's {type(source).__name__} may repeat examples and leave others out. {advice}"
    else:
        return
    warnings.warn(message, BayesKfacWarning, stacklevel=stacklevel + 1)


def _shows_each_once(source: Any) -> bool:
    if isinstance(source, RandomSampler):
        return not source.replacement
    # of samplers and iterables of the user's own nothing is known but how many examples they yield
    return isinstance(source, SequentialSampler | IterableDataset) or not type(source).__module__.startswith("torch.")
