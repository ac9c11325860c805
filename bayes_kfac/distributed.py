"""Sums and means over the processes that train one model together.

Statistics are sums and counts, so that those of all processes add up to those of the whole batch, however it is split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from bayes_kfac.curvature import Statistics


def sum_over_processes(statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Add the statistics of all processes.

    Args:
        statistics: This process's, by layer; the same layers everywhere.

    Returns:
        Everyone's.
    """
    if not _is_shared():
        return dict(statistics)
    return {name: _summed(own) for name, own in sorted(statistics.items())}


def mean_over_processes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average tensors over all processes.

    Args:
        tensors: This process's, by name; the same names everywhere.

    Returns:
        The averages.
    """
    if not _is_shared():
        return dict(tensors)
    return {name: _sum(value) / distributed.get_world_size() for name, value in sorted(tensors.items())}


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _summed(statistics: Statistics) -> Statistics:
    names = sorted(statistics.sums)
    device = statistics.sums[names[0]].device
    counts = _sum(torch.tensor([statistics.counts[name] for name in names], dtype=torch.float64, device=device))
    return Statistics(
        {name: _sum(statistics.sums[name]) for name in names},
        dict(zip(names, counts.tolist(), strict=True)),
        statistics.frame,
    )


def _sum(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total
