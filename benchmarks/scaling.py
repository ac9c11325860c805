"""What our linearised prediction costs against inputs, classes and width, beside the count of operations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from libraries import fit, linearized
from networks import Batches, mlp, random_data
from tqdm import tqdm
from uci import HERE

PLOT = HERE.parent / "docs" / "images" / "laplace_cost.png"
SEED = 0


@dataclass(frozen=True)
class Size:
    """Inputs at once, classes, and the width of the two hidden layers and of the input."""

    inputs: int = 64
    classes: int = 10
    width: int = 512

    def operations(self) -> int:
        """Multiplications, with one position for each example and the damping that is exact.

        A hidden layer: forward ``h²``, whitening of ``a`` and ``g`` ``(1 + C) h²``, the outputs' variances ``h²``, and
        ``C² h`` for the covariance; to pull back is ``C h²`` once. The output layer's gradients are unit vectors, the
        same for all inputs: ``C h`` forward and for the variances, ``h²`` to whiten ``a``, ``C³`` for the covariance.
        """
        n, C, h = self.inputs, self.classes, self.width
        hidden = (3 + C) * h**2 + C**2 * h
        return n * (2 * hidden + C * h**2 + 3 * C * h + h**2 + C**3)

    def elements(self) -> int:
        """Numbers held: gradients of two hidden layers, as they are and whitened, a layer's weights, the covariance."""
        return 4 * self.inputs * self.classes * self.width + self.width**2 + self.inputs * self.classes**2


SWEEPS = {
    "inputs": [Size(inputs=2**k) for k in range(4, 12)],
    "classes": [Size(inputs=16, classes=2**k) for k in range(2, 11)],
    "width": [Size(width=2**k) for k in range(6, 12)],
}


def sweep(name: str, repeats: int = 5) -> dict[str, Any]:
    """One sweep, its sizes in turns; exponents over its upper half, where fixed costs no longer count.

    Seconds are the least of several, and of the processor in one thread: other work on the machine adds little to them.
    """
    torch.set_num_threads(1)
    calls = {getattr(size, name): prediction(size) for size in SWEEPS[name]}
    taken: dict[int, list[float]] = {at: [] for at in calls}
    for at, call in tqdm(list(calls.items()) * repeats, desc=f"scaling/{name}"):
        taken[at] += measure.seconds(call, 1, time.process_time)
    rows = {}
    for size, (at, call) in zip(SWEEPS[name], calls.items(), strict=True):
        own = {"seconds": min(taken[at]), "operations": size.operations()}
        rows[str(at)] = {**own, "bytes": measure.tensor_bytes(call), "elements": size.elements()}
    upper = list(rows.items())[len(rows) // 2 :]
    at = np.log([int(key) for key, _ in upper])
    rows["exponent"] = {
        key: float(np.polyfit(at, np.log([row[key] for _, row in upper]), 1)[0]) for key in rows[upper[0][0]]
    }
    return {"rows": rows, "sizes": [asdict(size) for size in SWEEPS[name]]}


def prediction(size: Size) -> Callable[[], Any]:
    """A prediction of this size, ready to be made and made once."""
    torch.manual_seed(SEED)
    model = mlp(size.width, size.width, size.width, size.classes)
    x, y = random_data(max(size.inputs, 64), (size.width,), size.classes, SEED)
    predict = partial(linearized, fit("bayes_kfac", model, Batches(x[:64], y[:64], 64)), x[: size.inputs])
    predict()
    return predict


def plot(folder: Path) -> None:
    """Measured cost as dots, the count as a line through the last one, where all sweeps are there."""
    if not all((folder / f"{name}.json").exists() for name in SWEEPS):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", layout="constrained")
    kinds = (("seconds", "operations", "CPU milliseconds", 1e3), ("bytes", "elements", "megabytes", 1e-6))
    for column, name in zip(axes.T, SWEEPS, strict=True):
        rows = json.loads((folder / f"{name}.json").read_text())["rows"]
        exponents = rows.pop("exponent")
        at = [int(key) for key in rows]
        for axis, (key, theory, label, unit) in zip(column, kinds, strict=True):
            measured, count = (np.array([row[one] for row in rows.values()]) for one in (key, theory))
            axis.loglog(at, unit * measured, "o", color="C0", label="measured")
            axis.loglog(at, unit * count * measured[-1] / count[-1], color="C1", linewidth=1, label="by count")
            axis.set_title(f"exponent {exponents[key]:.2f}, by count {exponents[theory]:.2f}", fontsize=9)
            axis.set_ylabel(label)
        column[-1].set_xlabel(name)
    axes[0, 0].legend(fontsize=8)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=90)
    plt.close(figure)
