"""MKOR: Kronecker factors of rank one for each batch, ``A = E[ā āᵀ]`` and ``G = E[ḡ ḡᵀ]`` (Mozaffari et al. 2023).

``ā`` ``[*blocks, 1, in]`` is the mean of a layer's inputs over a batch and ``ḡ`` ``[*blocks, 1, out]`` that of its
output gradients; the expectations are moving averages over batches. The paper updates the inverses,

    ``G⁻¹ ← (G⁻¹ − (1−β) z zᵀ / (β + (1−β) ḡᵀ z)) / β``, ``z = G⁻¹ ḡ``,

which by Sherman & Morrison is the inverse of ``β G + (1−β) ḡ ḡᵀ``: the averages here, which add over processes and are
factorised at a refresh, give the same. The paper starts at ``I`` (as training does with its warm-up) and has no damping
but a stabiliser, which moves an inverse whose norm has grown towards ``I``; here the damping enters as K-FAC's does.
"""

from __future__ import annotations

from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.structures.base import Card, register
from bayes_kfac.structures.eva import summed
from bayes_kfac.structures.kron import KroneckerStructure


@register("mkor")
class MkorStructure(KroneckerStructure):
    """Kronecker factors of the means of batches."""

    card = Card(
        formula="F ≈ G ⊗ A, A = E[ā āᵀ], G = E[ḡ ḡᵀ], ā and ḡ the means of a batch",
        captures="How the means of batches vary on each side, over many batches.",
        use="As an optimizer where K-FAC's statistics are too dear; with fisher='empirical'.",
        cost="Statistics n (in + out) + in² + out²; all else as K-FAC.",
        source="Mozaffari et al. 2023.",
    )
    refusal = (
        "its factors are of the means of whole batches: that of the gradients falls with the batch size, and that of "
        "the inputs leaves out how they vary within a batch."
    )
    fishers = ("empirical",)

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        total = summed(rows, self.name)
        sums = {
            "input": _outer(total.mean("input"), diagonal=isinstance(rows.inputs, SparseRows)),
            "gradient": _outer(total.mean("gradient"), diagonal=False),
        }
        return Statistics(sums, dict.fromkeys(sums, 1.0))


def _outer(mean: Tensor, *, diagonal: bool) -> Tensor:
    """``m mᵀ`` of ``[*blocks, 1, size]`` as a factor."""
    return mean.square() if diagonal else mean.mT @ mean
