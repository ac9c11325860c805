"""Where a step of a small network goes: ``python benchmarks/uci_profile.py`` writes ``results/uci/profile.json``.

A 1×50 network in the ``paper`` mode (ten samples a step, statistics and inverses on every step), for one split and for
ten splits stacked. Phases are wall time by wrapped calls.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from replicas import ReplicatedMLP
from uci import HERE

import bayes_kfac as bk
from bayes_kfac.curvature import Meter
from bayes_kfac.training.sampler import Sampler

STEPS, NUM_DATA, FEATURES, BATCH, SAMPLES = 40, 455, 13, 10, 10


def make(replicas: int) -> Callable[[], None]:
    """One step on fixed data."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, replicas, FEATURES), torch.randn(BATCH, replicas, 1)
    model = ReplicatedMLP(replicas, FEATURES, 50, generator)
    likelihood = bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(shape=(replicas, 1)))
    options: dict[str, Any] = {"statistics_every": 1, "inverse_every": 1, "kl_clip": None, "num_samples": SAMPLES}
    optimizer = bk.NoisyKFAC(model, likelihood, num_data=NUM_DATA, lr=1e-3, generator=generator, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = likelihood(model(x), y)
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(closure)


def timed(replicas: int) -> dict[str, float]:
    """Milliseconds a step, in all and by phase."""
    step = make(replicas)
    for _ in range(10):
        step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    total = (time.perf_counter() - start) / STEPS
    spent: dict[str, float] = defaultdict(float)

    def watch(owner: Any, name: str, phase: str) -> Callable[[], None]:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[phase] += time.perf_counter() - begin

        setattr(owner, name, wrapped)
        return lambda: setattr(owner, name, original)

    undo = [
        watch(Sampler, "_draw", "draw noise"),
        watch(Sampler, "_apply", "weights in"),
        watch(Sampler, "_restore", "weights out"),
        watch(Meter, "_measure_pass", "MC pull-back and statistics"),
        watch(torch.Tensor, "backward", "backward"),
        watch(bk.NoisyKFAC, "_step", "average, factorise, precondition, update"),
    ]
    try:
        for _ in range(STEPS):
            step()
    finally:
        for restore in undo:
            restore()
    phases = {phase: round(1e3 * seconds / STEPS, 3) for phase, seconds in spent.items()}
    phases["forward, loss and the rest"] = round(1e3 * total - sum(phases.values()), 3)
    return {"total": round(1e3 * total, 3), **phases}


def main() -> None:
    """Measure and keep."""
    torch.set_num_threads(1)
    result = {
        "unit": "milliseconds a step of ten samples",
        "one split": timed(1),
        "ten splits": timed(10),
        "versions": {"bayes_kfac": bk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
    }
    print(json.dumps(result, indent=1))
    (HERE / "results" / "uci" / "profile.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
