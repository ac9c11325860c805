"""Time and memory of a call, the fresh process to take them in, and the file to keep them in."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, from before torch is imported

import torch
from torch.profiler import ProfilerActivity, profile
from uci import commit

import bayes_kfac as bk

PEERS = ("torch", "laplace-torch", "curvlinops-for-pytorch")


def seconds(call: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """The time of each of several calls by a clock; what a GPU still has to do is waited for."""
    found = []
    for _ in range(repeats):
        _wait()
        start = clock()
        result = call()
        _wait()
        found.append(clock() - start)
        del result
    return found


def resident_bytes(call: Callable[[], Any]) -> int | None:
    """How far the process's resident memory rises above where it was: all of it, libraries' workspaces included.

    Memory that the process has already and keeps for later does not show, which is why it is handed back before.
    Linux only, ``None`` elsewhere.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = read("VmRSS")
    result = call()
    del result
    return read("VmHWM") - before


def tensor_bytes(call: Callable[[], Any]) -> int:
    """The peak of what torch allocates for tensors, above what there was before; on a GPU that of its memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        _wait()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns when a process that has done nothing else runs it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def keep(path: Path, figures: dict[str, Any]) -> None:
    """Write figures with the versions and the machine that they came from."""
    versions = {"bayes_kfac": bk.__version__, "python": platform.python_version()}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    machine: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    machine["load_average"] = os.getloadavg()[1]  # of five minutes: what else was running
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    result = {**figures, "commit": commit(), "versions": versions, "machine": machine}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
