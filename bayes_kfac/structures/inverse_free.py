"""INGD, IKFAC and SINGD: K-FAC's matrix normals by inverse-free steps of their covariance's roots.

What is least, and the steps, are in :mod:`bayes_kfac.structures.roots`. SINGD's roots are of a structure that products
keep: block-diagonal, down to diagonal. Such roots see of the factors the same blocks alone, so that no more is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Frame, Rows, Statistics, kronecker_factors
from bayes_kfac.errors import check_count
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.roots import matrix_normals


@register("ingd")
class InverseFreeStructure(KroneckerStructure):
    """The nearest matrix normal to K-FAC's posterior by an inverse-free natural gradient.

    The prior enters optimally, whatever ``damping`` says.

    Args:
        damping: Not used.
        sharing: How positions that share weights are summed.
        sweeps: How many steps each root takes in a refresh that starts from an earlier one.

    Raises:
        ArgumentError: If there is no sweep.
    """

    card = Card(
        formula="F ≈ G ⊗ A; covariance C Cᵀ ⊗ K Kᵀ, K ← K (I − E), E ∝ (tr(CᵀGC) KᵀAK + γ tr(CᵀC) KᵀK) / out − I",
        captures="What kron with damping='optimal' does: the matrix normal nearest in KL(q ‖ p) to K-FAC's posterior.",
        use="On accelerators in low precision, or where Cholesky factorisations are slow: products alone, and "
        "factors that rounding made indefinite are survived.",
        cost="Statistics n (in² + out²); a sweep six products of in³ and of out³; sample in·out (in + out); memory "
        "in² + out².",
        source="Lin et al. 2023 (INGD); Lin, Dangel, Eschenhagen et al. 2024 (SINGD).",
    )

    def __init__(self, *, damping: str = "optimal", sharing: str = "expand", sweeps: int = 2) -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "optimal"
        self.sweeps = check_count("sweeps", sweeps)

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"sweeps": self.sweeps}

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return [*matrix_normals([self._white(spec) for spec in specs], self.damping, self.sweeps)]


@register("ikfac")
class InverseFreeKFACStructure(InverseFreeStructure):
    """K-FAC's factored posterior by inverse-free steps; the prior enters so whatever ``damping`` says.

    Args:
        damping: Not used: the prior enters as ``"factored"``.
        sharing: How positions that share weights are summed.
        sweeps: How many steps each root takes in a refresh that starts from an earlier one.
    """

    card = Card(
        formula="F ≈ G ⊗ A; covariance C Cᵀ ⊗ K Kᵀ, K ← K (I − E), E ∝ Kᵀ (A + π√γ I) K − I",
        captures="What kron with damping='factored' does.",
        use="As ingd, where the published damping is wanted: to compare with noisy K-FAC.",
        cost="As ingd.",
        source="Lin, Dangel, Eschenhagen et al. 2024 (IKFAC).",
    )

    def __init__(self, *, damping: str = "factored", sharing: str = "expand", sweeps: int = 2) -> None:
        super().__init__(damping=damping, sharing=sharing, sweeps=sweeps)
        self.damping = "factored"


@register("singd")
class StructuredInverseFreeStructure(InverseFreeStructure):
    """INGD with block-diagonal roots; of blocks of one, diagonal.

    Args:
        damping: Not used.
        sharing: How positions that share weights are summed.
        sweeps: How many steps each root takes in a refresh that starts from an earlier one.
        input_block: The size of the blocks on the input side; ``None`` for one block.
        output_block: The size of the blocks on the output side; ``None`` for one block.

    Raises:
        ArgumentError: If there is no sweep, or a block of no size.
    """

    card = Card(
        formula="F ≈ G ⊗ A with A and G block-diagonal; covariance C Cᵀ ⊗ K Kᵀ as in ingd, C and K block-diagonal",
        captures="Correlations within blocks of neighbouring inputs and of neighbouring outputs, or on one side only.",
        use="Very wide layers: diagonal on the wide side (input_block=1 or output_block=1), whole on the other.",
        cost="As ingd; a diagonal side takes n·size for statistics, and size for a sweep and for memory; blocks of "
        "more than one are kept as matrices with zeros.",
        source="Lin, Dangel, Eschenhagen et al. 2024 (SINGD).",
    )

    def __init__(
        self,
        *,
        damping: str = "optimal",
        sharing: str = "expand",
        sweeps: int = 2,
        input_block: int | None = 1,
        output_block: int | None = 1,
    ) -> None:
        super().__init__(damping=damping, sharing=sharing, sweeps=sweeps)
        self.input_block = None if input_block is None else check_count("input_block", input_block)
        self.output_block = None if output_block is None else check_count("output_block", output_block)

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {**super().options, "input_block": self.input_block, "output_block": self.output_block}

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        if rows.transposed is not None:
            return self._kept(super().measure(rows, frame))
        diagonals, rest = {}, rows
        if self.input_block == 1 and isinstance(rows.inputs, Tensor):
            diagonals["input"] = _diagonal_factor(rows, "input", self.sharing)
            rest = replace(rest, inputs=rows.inputs[..., :0])
        if self.output_block == 1:
            diagonals["gradient"] = _diagonal_factor(rows, "gradient", self.sharing)
            rest = replace(rest, gradients=rows.gradients[..., :0])
        measured = super().measure(rest, frame)
        return self._kept(replace(measured, sums={**measured.sums, **diagonals}))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        return self._kept(super().identity(shape, like, sparse_sides=sparse_sides, tied=tied))

    def _kept(self, statistics: Statistics) -> Statistics:
        """What block-diagonal roots see of the factors: the same blocks of them."""
        sizes = {
            "input": self.input_block,
            "gradient": self.output_block,
            "transposed_input": self.output_block,
            "transposed_gradient": self.input_block,
        }
        return replace(
            statistics, sums={name: _block_diagonal(factor, sizes[name]) for name, factor in statistics.sums.items()}
        )


def _diagonal_factor(rows: Rows, side: str, sharing: str) -> Tensor:
    """The diagonal of one side's factor as a row: its features as blocks of one, so that no matrix is formed."""
    columns, *outer, out_features = rows.gradients.shape
    empty = rows.gradients.new_zeros
    if side == "input":
        assert isinstance(rows.inputs, Tensor)
        inputs = rows.inputs.movedim(-1, 0).unsqueeze(-1)
        apart = replace(rows, inputs=inputs, gradients=empty(columns, len(inputs), *outer, 0))
    else:
        gradients = rows.gradients.movedim(-1, 1).unsqueeze(-1)
        apart = replace(rows, inputs=empty(out_features, *outer, 0), gradients=gradients)
    return kronecker_factors(apart, sharing).sums[side].movedim(0, -1).squeeze(-2)


def _block_diagonal(factor: Tensor, size: int | None) -> Tensor:
    """The diagonal blocks of a factor, zero outside of them; of size 1 its diagonal as a row."""
    if size is None or linalg.is_diagonal(factor):
        return factor
    if size == 1:
        return linalg.diagonal(factor).unsqueeze(-2)
    block = torch.arange(factor.shape[-1], device=factor.device) // size
    return factor * (block.unsqueeze(-1) == block)
