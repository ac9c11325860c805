"""What our linearised prediction costs against inputs, classes and width, beside the count of operations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
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


def scaling() -> dict[str, Any]:
    """Every sweep, with exponents over its upper half, where the fixed cost of small operations no longer counts."""
    figures: dict[str, Any] = {}
    with tqdm(total=sum(map(len, SWEEPS.values())), desc="scaling") as bar:
        for name, sizes in SWEEPS.items():
            rows = []
            for size in sizes:
                rows.append(
                    {**asdict(size), **cost(size), "operations": size.operations(), "elements": size.elements()}
                )
                bar.update()
            upper = rows[len(rows) // 2 :]
            slopes = {key: slope(upper, name, key) for key in ("seconds", "operations", "bytes", "elements")}
            figures[name] = {"rows": rows, "slopes": slopes}
    plot(figures)
    return {"seed": SEED, "sweeps": figures}


def cost(size: Size) -> dict[str, float]:
    """Seconds and bytes of one prediction."""
    torch.manual_seed(SEED)
    model = mlp(size.width, size.width, size.width, size.classes)
    x, y = random_data(max(size.inputs, 64), (size.width,), size.classes, SEED)
    predict = partial(linearized, fit("bayes_kfac", model, Batches(x[:64], y[:64], 64)), x[: size.inputs])
    predict()
    return {"seconds": median(measure.seconds(predict, 7)), "bytes": measure.allocated_bytes(predict)}


def slope(rows: list[dict[str, Any]], by: str, key: str) -> float:
    """The exponent of a power law, by least squares on logarithms."""
    return float(np.polyfit(np.log([row[by] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


def plot(figures: dict[str, Any]) -> None:
    """Measured cost as dots, the count as a line through the last one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", layout="constrained")
    kinds = (("seconds", "operations", "milliseconds", 1e3), ("bytes", "elements", "megabytes", 1e-6))
    for column, (name, found) in zip(axes.T, figures.items(), strict=True):
        for axis, (key, theory, label, unit) in zip(column, kinds, strict=True):
            axis.set_ylabel(label)
            rows = found["rows"]
            at, value, count = (np.array([row[one] for row in rows]) for one in (name, key, theory))
            axis.loglog(at, unit * value, "o", color="C0")
            measured, counted = found["slopes"][key], found["slopes"][theory]
            axis.loglog(at, unit * count * value[-1] / count[-1], color="C1", linewidth=1)
            axis.set_title(f"slope {measured:.2f}, by count {counted:.2f}", fontsize=9)
        column[-1].set_xlabel(name)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=90)
    plt.close(figure)
