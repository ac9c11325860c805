"""Sums and means over the processes that train one model together.

Statistics are sums and counts, so that those of all processes add up to those of the whole batch, however it is split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from bayes_kfac.curvature import Columns, Statistics


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
    names = sorted(statistics.counts)
    device = statistics.tensors[0].device
    counts = _sum(torch.tensor([statistics.counts[name] for name in names], dtype=torch.float64, device=device))
    return Statistics(
        {name: _sum(value) for name, value in sorted(statistics.sums.items())},
        dict(zip(names, counts.tolist(), strict=True)),
        statistics.frame,
        {name: _merged(value) for name, value in sorted(statistics.columns.items())},
    )


def _merged(columns: Columns) -> Columns:
    """The sum of everyone's columns, in the order of the processes, so that all have the same bits."""
    gathered = {name: _gathered(tensor) for name, tensor in columns.tensors.items()}
    parts = [
        columns.holding({name: tensors[rank] for name, tensors in gathered.items()})
        for rank in range(distributed.get_world_size())
    ]
    return columns.merged(parts)


def _gathered(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, which may differ in shape, though not in their number of dimensions."""
    processes = distributed.get_world_size()
    shape = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(processes)]
    if tensor.ndim:
        distributed.all_gather(shapes, shape)
    sizes = [torch.Size(other.tolist()) for other in shapes]
    longest = max(size.numel() for size in sizes)
    flat = tensor.new_zeros(longest)
    flat[: tensor.numel()] = tensor.flatten()
    received = [torch.empty_like(flat) for _ in range(processes)]
    distributed.all_gather(received, flat)
    return [own[: size.numel()].reshape(size) for own, size in zip(received, sizes, strict=True)]


def _sum(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total
