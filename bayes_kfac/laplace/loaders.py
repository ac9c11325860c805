"""Whether a loader shows the training data as they are: once each, and all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sized
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler

from bayes_kfac.errors import BayesKfacWarning


def warn_of_samplers(loader: Iterable[Any], num_examples: float, *, stacklevel: int) -> None:
    """Warn where a loader leaves examples of its data set out, or may show them more than once.

    Args:
        loader: The loader, after one pass.
        num_examples: How many examples it yielded.
        stacklevel: The frames between here and the user's call.
    """
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    advice = "The fit counts what was yielded, as it was yielded; pass num_data= if there are more examples or fewer."
    if isinstance(dataset, Sized) and len(dataset) != num_examples:
        cause = "drop_last=True" if getattr(loader, "drop_last", False) else f"its {type(sampler).__name__}"
        message = f"The loader yielded {num_examples:.0f} examples of a data set of {len(dataset)}: {cause}. {advice}"
    elif sampler is not None and not _shows_each_once(sampler):
        message = f"The loader's {type(sampler).__name__} may repeat examples and leave others out. {advice}"
    else:
        return
    warnings.warn(message, BayesKfacWarning, stacklevel=stacklevel + 1)


def _shows_each_once(sampler: Any) -> bool:
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement
    # of samplers of the user's own nothing is known but how many examples they yield
    return isinstance(sampler, SequentialSampler) or not type(sampler).__module__.startswith("torch.")
