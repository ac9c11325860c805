"""What is no number, or too large a one, is kept out of a trainer's state; on accelerators without waiting for them.

A number that is read back costs a step on an accelerator about what launching it takes. Steps that measure curvature
wait for the device in any case, and on the CPU there is nothing to wait for: they check, and refuse. Between them
gradients are judged where they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Statistics
from bayes_kfac.errors import NonFiniteError

_ADVICE = "Check the batch's data; if it is clean, lower lr or kl_clip, or raise extrinsic_damping."


def check_finite(
    statistics: Mapping[str, Statistics], gradients: Mapping[str, Tensor], deterministic: Mapping[str, Tensor]
) -> None:
    """Refuse what cannot be gone on with, before anything is changed.

    Args:
        statistics: The batch's statistics by layer.
        gradients: The gradients by layer.
        deterministic: The gradients of parameters without a posterior, by name.

    Raises:
        NonFiniteError: If any of them holds NaN or infinity, or a gradient a number that is too large; the message
            names the layer and the statistic.
    """
    measured = [tensor for batch in statistics.values() for tensor in batch.tensors]
    if linalg.all_finite(measured) and _can_be_stepped_along(gradients, deterministic):
        return
    outcome = f"holds NaN or infinity. Nothing was updated. {_ADVICE}"
    for name, batch in statistics.items():
        for statistic in batch.non_finite():
            raise NonFiniteError(f"Layer {name!r}: the batch's {statistic!r} statistic {outcome}")
    for kind, tensors in (("Layer", gradients), ("Parameter", deterministic)):
        for name, gradient in tensors.items():
            largest = float(gradient.abs().max()) if gradient.numel() else 0.0
            if not math.isfinite(largest):
                raise NonFiniteError(f"{kind} {name!r}: the gradient {outcome}")
            if largest >= (limit := _too_large(gradient.dtype)):
                raise NonFiniteError(
                    f"{kind} {name!r}: the gradient is as large as {largest:.1e}, and a step goes along none beyond "
                    f"{limit:.0e}. Nothing was updated. {_ADVICE}"
                )


def _too_large(dtype: torch.dtype) -> float:
    """What no entry of a gradient may reach: the cube root of the largest number, 7e12 in float32."""
    # a step's length sums their squares over a damping that may be tiny; where it overflows, the mean would be NaN
    return float(torch.finfo(torch.promote_types(dtype, torch.float32)).max ** (1 / 3))


def _can_be_stepped_along(*gradients: Mapping[str, Tensor]) -> Tensor:
    """Whether all entries are finite and none is too large, ``[]``, where the gradients are."""
    entries = [own for part in gradients for own in part.values() if own.numel()]
    if not entries:
        return torch.ones((), dtype=torch.bool)
    norms = torch.stack(torch._foreach_norm(entries, math.inf))
    return (norms < _too_large(norms.dtype)).all()  # which NaN is not


class Watch:
    """Judges gradients without reading a number, and says later what it saw."""

    def __init__(self) -> None:
        self._were_finite: Tensor | None = None

    @staticmethod
    def is_needed(gradients: Mapping[str, Tensor]) -> bool:
        """Whether the host would wait for the device that gradients are on."""
        return any(gradient.device.type != "cpu" for gradient in gradients.values())

    def take(self, *gradients: Mapping[str, Tensor]) -> Tensor:
        """Look at the gradients of a step.

        Args:
            gradients: Gradients by name, in one or several parts.

        Returns:
            Whether all are finite, and none is too large, ``[]``, on the device.
        """
        finite = _can_be_stepped_along(*gradients)
        self._were_finite = finite if self._were_finite is None else self._were_finite & finite
        return finite

    def report(self) -> None:
        """Read what was seen since the last report.

        Raises:
            NonFiniteError: If gradients held NaN, infinity or numbers that are too large.
        """
        were_finite, self._were_finite = self._were_finite, None
        if were_finite is not None and not were_finite:
            raise NonFiniteError(
                "The gradients of a step since curvature was last measured held NaN, infinity or numbers that are "
                f"too large. That step left the weights that have a posterior where they were. {_ADVICE}"
            )
