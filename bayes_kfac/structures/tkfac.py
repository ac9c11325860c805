"""TKFAC: ``F̄ ≈ Ψ ⊗ Φ`` up to scale, with the trace and both partial traces of the Fisher (Gao et al. 2021).

With each example's own Jacobian ``J`` (out×in), summed over output-gradient columns,

    ``F̄ ≈ E[J Jᵀ] ⊗ E[Jᵀ J] / E‖J‖²``,

which is K-FAC with ``aaᵀ`` weighted by ``‖g‖²`` and ``ggᵀ`` by ``‖a‖²``: large gradients where inputs are large count.
It is one step of the power iteration for the nearest Kronecker product, from the identity. Nothing is approximated
where positions share weights, whatever ``sharing`` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import EXAMPLEWISE_KINDS, NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.structures.base import Card, register
from bayes_kfac.structures.jacobian import pieces, word_columns
from bayes_kfac.structures.kron import KroneckerStructure


@register("tkfac")
class TKFACStructure(KroneckerStructure):
    """The Kronecker product with the Fisher's partial traces."""

    card = Card(
        formula="F ≈ G ⊗ A, A = E[Jᵀ J] / E‖J‖², G = E[J Jᵀ]; without weight sharing A ∝ E[‖g‖² a aᵀ]",
        captures="As K-FAC, and that gradients are large where inputs are: the trace of the Fisher and both of its "
        "partial traces are exact.",
        use="In the place of K-FAC wherever the size of the variances matters; the same cost without weight sharing.",
        cost="Statistics n (in² + out²); with T positions n T (in² + out²) + n T² (in + out) or "
        "n in·out (in + out + T), whichever is less. All else as K-FAC.",
        source="Gao et al. 2021; Ren & Goldfarb 2021 (TNT).",
    )
    fishers = EXAMPLEWISE_KINDS

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        input_sum, gradient_sum = _partial_traces(rows)
        sums = {"input": input_sum, "gradient": gradient_sum}
        return Statistics(sums, dict.fromkeys(sums, rows.num_examples))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        out_features, in_features = shape[-2:]
        factors = super().identity(shape, like, sparse_sides=sparse_sides)
        sums = {"input": out_features * factors.sums["input"], "gradient": in_features * factors.sums["gradient"]}
        return Statistics(sums, factors.counts)

    def factors(self, statistics: Statistics) -> tuple[Tensor, Tensor]:  # noqa: D102
        input_trace, gradient_trace = statistics.mean("input"), statistics.mean("gradient")
        trace = linalg.trace(input_trace)[..., None, None]
        return input_trace / torch.where(trace > 0, trace, torch.ones_like(trace)), gradient_trace


def _partial_traces(rows: Rows) -> tuple[Tensor, Tensor]:
    """``Σ Jᵀ J`` and ``Σ J Jᵀ`` over examples and columns; of a side that words are on, the diagonal."""
    if rows.transposed is None:
        if isinstance(rows.inputs, SparseRows):
            return _of_words(rows.inputs, rows.gradients)
        if _prefers_grams(rows):
            return _by_grams(rows.inputs, rows.gradients)
    (input_sum, gradient_sum), *others = (_by_jacobians(part) for part in pieces(rows))
    for more_input, more_gradient in others:
        input_sum, gradient_sum = input_sum + more_input, gradient_sum + more_gradient
    return input_sum, gradient_sum


def _prefers_grams(rows: Rows) -> bool:
    """Whether products of positions cost fewer operations than Jacobians."""
    columns, shared, out_features, in_features = len(rows.gradients), *rows.gradients.shape[-2:], rows.inputs.shape[-1]
    by_grams = 2 * shared**2 * (in_features + columns * out_features)
    by_grams += shared * (in_features**2 + columns * out_features**2)
    return by_grams <= columns * out_features * in_features * (shared + in_features + out_features)


def _by_grams(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """``aᵀ (g gᵀ) a`` and ``gᵀ (a aᵀ) g`` with the positions of an example between."""
    input_gram = inputs @ inputs.mT  # [*blocks, batch, shared, shared]
    gradient_gram = torch.einsum("c...to,c...uo->...tu", gradients, gradients)
    return _moment(gradient_gram @ inputs, inputs), _moment(input_gram @ gradients, gradients).sum(0)


def _moment(left: Tensor, right: Tensor) -> Tensor:
    """``Σ l rᵀ`` over examples and positions."""
    return left.flatten(-3, -2).mT @ right.flatten(-3, -2)


def _by_jacobians(rows: Rows) -> tuple[Tensor, Tensor]:
    jacobians = rows.jacobians().movedim(0, -4).flatten(-4, -3)  # [*blocks, columns·batch, out, in]
    across = rows.transposed.inputs if rows.transposed is not None else None
    return (
        _gram(jacobians.flatten(-3, -2), diagonal=isinstance(rows.inputs, SparseRows)),
        _gram(jacobians.mT.flatten(-3, -2), diagonal=isinstance(across, SparseRows)),
    )


def _of_words(inputs: SparseRows, gradients: Tensor) -> tuple[Tensor, Tensor]:
    words, columns = word_columns(inputs, gradients)
    by_word = gradients.new_zeros(inputs.size).index_add_(0, words, columns.square().sum((-2, -1)))
    return by_word.unsqueeze(0), _gram(columns.flatten(0, 1), diagonal=False)


def _gram(rows: Tensor, *, diagonal: bool) -> Tensor:
    """``Σ r rᵀ`` as a factor."""
    return rows.square().sum(-2, keepdim=True) if diagonal else rows.mT @ rows
