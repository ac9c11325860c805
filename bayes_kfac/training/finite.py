"""NaN and infinity are kept out of a trainer's state; where the host is ahead of its device, without waiting for it.

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

_ADVICE = "Check the batch's data; if it is clean, lower lr or raise extrinsic_damping."


def check_finite(
    statistics: Mapping[str, Statistics], gradients: Mapping[str, Tensor], deterministic: Mapping[str, Tensor]
) -> None:
    """Refuse NaN and infinity before anything is changed.

    Args:
        statistics: The batch's statistics by layer.
        gradients: The gradients by layer.
        deterministic: The gradients of parameters without a posterior, by name.

    Raises:
        NonFiniteError: If any of them holds NaN or infinity; the message names the layer and the statistic.
    """
    measured = [tensor for batch in statistics.values() for tensor in batch.tensors]
    if linalg.all_finite([*measured, *gradients.values(), *deterministic.values()]):
        return
    outcome = f"holds NaN or infinity. Nothing was updated. {_ADVICE}"
    for name, batch in statistics.items():
        for statistic in batch.non_finite():
            raise NonFiniteError(f"Layer {name!r}: the batch's {statistic!r} statistic {outcome}")
    for kind, tensors in (("Layer", gradients), ("Parameter", deterministic)):
        for name, gradient in tensors.items():
            if not linalg.all_finite([gradient]):
                raise NonFiniteError(f"{kind} {name!r}: the gradient {outcome}")


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
            Whether all are finite, ``[]``, on the device.
        """
        norms = torch._foreach_norm([gradient for part in gradients for gradient in part.values()], math.inf)
        finite = torch.stack(norms).isfinite().all()
        self._were_finite = finite if self._were_finite is None else self._were_finite & finite
        return finite

    def report(self) -> None:
        """Read what was seen since the last report.

        Raises:
            NonFiniteError: If gradients held NaN or infinity.
        """
        were_finite, self._were_finite = self._were_finite, None
        if were_finite is not None and not were_finite:
            raise NonFiniteError(
                "The gradients of a step since curvature was last measured held NaN or infinity. That step left the "
                f"weights that have a posterior where they were. {_ADVICE}"
            )
