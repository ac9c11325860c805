"""Statistics: sums over examples, and the counts that turn them into averages.

Sums and counts, not averages, are what is kept: they add over batches, accumulation steps, workers and tasks. An
exponential moving average is the same recursion on both, so that it is debiased by construction: after one update the
average is the batch's. Sums are in float32 whatever the model's dtype (float64 where the model is).

Some sums are taken in coordinates that come from earlier statistics, such as the eigenvectors of Kronecker factors.
These coordinates are the statistics' frame; sums add where they are of one frame. Sums of outer products that are too
large to be written out are kept as their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayes_kfac.curvature.rows import Rows, SparseRows
from bayes_kfac.curvature.sketches import Columns

SHARING_KINDS = ("expand", "reduce")

#: Coordinates in which sums are taken: see :attr:`Statistics.frame`.
Frame = Mapping[str, Tensor]
#: Coordinates as they are.
NO_FRAME: Frame = {}


@dataclass(frozen=True)
class Statistics:
    """Named sums and the counts they are to be divided by.

    Attributes:
        sums: Tensors by name.
        counts: How many terms each sum has, by the same names, and those of ``columns``.
        frame: What the sums were taken in, tensors by name; empty for coordinates as they are.
        columns: Sums of outer products as their columns, by names of their own.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float]
    frame: Frame = field(default_factory=dict)
    columns: Mapping[str, Columns] = field(default_factory=dict)

    def mean(self, name: str) -> Tensor:
        """The average of one statistic; zero where nothing was counted."""
        return self.sums[name] / (self.counts[name] or 1.0)

    def mean_columns(self, name: str) -> Columns:
        """The average of one sum of outer products; zero where nothing was counted."""
        return self.columns[name] * (1 / (self.counts[name] or 1.0))

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: value + other.counts[name] for name, value in self.counts.items()},
            self.frame,
            {name: value + other.columns[name] for name, value in self.columns.items()},
        )

    def __mul__(self, factor: float) -> Statistics:
        return Statistics(
            {name: value * factor for name, value in self.sums.items()},
            {name: value * factor for name, value in self.counts.items()},
            self.frame,
            {name: value * factor for name, value in self.columns.items()},
        )

    def moving_average(self, batch: Statistics, decay: float) -> Statistics:
        """One step of an exponential moving average, ``decay · self + (1 − decay) · batch``.

        It is taken of the averages, which a batch that shows the same leaves as they are. Sums that hardly change any
        more are rounded the same way at every step, which adds up to ``ε / (1 − decay)``: in float32, for a memory of
        10 000 steps, their averages were off by 3e-4, which is more than many a damping.

        Args:
            batch: What a batch shows.
            decay: The weight of what was there.

        Returns:
            The average's statistics, with counts that are averaged too.
        """
        counts = {name: decay * own + (1 - decay) * batch.counts[name] for name, own in self.counts.items()}
        sums = {}
        for name in self.sums:
            weight = (1 - decay) * batch.counts[name] / (counts[name] or 1.0)
            sums[name] = self.mean(name).lerp(batch.mean(name), weight) * counts[name]
        columns = {name: own * decay + batch.columns[name] * (1 - decay) for name, own in self.columns.items()}
        return Statistics(sums, counts, self.frame, columns)

    def map(self, function: Callable[[Tensor], Tensor]) -> Statistics:
        """The statistics with a function applied to every tensor: a move to another device or dtype."""
        return Statistics(
            {name: function(value) for name, value in self.sums.items()},
            self.counts,
            {name: function(value) for name, value in self.frame.items()},
            {name: value.map(function) for name, value in self.columns.items()},
        )

    def lean(self, other: Statistics, weight: float) -> Statistics:
        """Statistics whose averages are ``(1 − weight) · self + weight · other``, with the counts of ``self``."""
        sums = {
            name: value * (1 - weight) + other.mean(name) * (weight * self.counts[name])
            for name, value in self.sums.items()
        }
        columns = {
            name: value * (1 - weight) + other.mean_columns(name) * (weight * self.counts[name])
            for name, value in self.columns.items()
        }
        return Statistics(sums, self.counts, self.frame, columns)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of its sums."""
        return [*self.sums.values(), *(tensor for own in self.columns.values() for tensor in own.tensors.values())]

    def non_finite(self) -> list[str]:
        """The names of the sums that hold NaN or infinity."""
        spoiled = [name for name, value in self.sums.items() if not bool(torch.isfinite(value).all())]
        return spoiled + [name for name, value in self.columns.items() if not value.is_finite()]


def added(total: Mapping[str, Statistics], more: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The statistics of two sets of layers, added where a layer is in both."""
    return {**total, **{name: total[name] + own if name in total else own for name, own in more.items()}}


def kronecker_factors(rows: Rows, sharing: str) -> Statistics:
    """Sums for the two Kronecker factors of a layer's Fisher, ``F ≈ G ⊗ A`` for one example.

    ``expand``: ``A`` averages ``a aᵀ`` over examples and positions, ``G`` averages ``Σ_t g gᵀ`` over examples.
    ``reduce``: the same with ``mean_t a`` for ``a`` and ``Σ_t g`` for ``g``. Source: Eschenhagen et al. 2023. Positions
    outside of a mask do not count. Where inputs are sparse, the factor of their side is diagonal.

    Args:
        rows: What a batch shows of the layer.
        sharing: ``"expand"`` or ``"reduce"``.

    Returns:
        ``input``: the sum for ``A``, ``[*blocks, in, in]``; ``gradient``: the sum for ``G``, ``[*blocks, out, out]``;
        diagonal factors are ``[*blocks, 1, size]``. Where the block is used transposed too, ``transposed_input`` and
        ``transposed_gradient`` are the same for these uses, on the other sides.
    """
    other = rows.transposed
    if other is None:
        return _factors(rows, sharing, diagonal_gradients=False)
    own = _factors(rows, sharing, diagonal_gradients=isinstance(other.inputs, SparseRows))
    other = replace(other, share=rows.share)
    tied = _factors(other, sharing, diagonal_gradients=isinstance(rows.inputs, SparseRows))
    return Statistics(
        {**own.sums, **{f"transposed_{name}": value for name, value in tied.sums.items()}},
        {**own.counts, **{f"transposed_{name}": value for name, value in tied.counts.items()}},
    )


def factor_rows(rows: Rows, sharing: str) -> dict[str, tuple[Tensor, float]]:
    """The rows whose outer products sum to the Kronecker factors of :func:`kronecker_factors`, and their counts.

    Args:
        rows: What a batch shows of the layer; sparse inputs are written out.
        sharing: ``"expand"`` or ``"reduce"``.

    Returns:
        By the same names ``[*blocks, rows, in]`` or ``[*blocks, rows, out]``, one example's after the other's, with
        what the sum is to be divided by.
    """
    own = _factor_rows(rows, sharing)
    if rows.transposed is None:
        return own
    tied = _factor_rows(replace(rows.transposed, share=rows.share), sharing)
    return {**own, **{f"transposed_{name}": value for name, value in tied.items()}}


def _factor_rows(rows: Rows, sharing: str) -> dict[str, tuple[Tensor, float]]:
    rows = _as_shared(rows, sharing)
    inputs = rows.inputs.dense() if isinstance(rows.inputs, SparseRows) else rows.inputs
    if rows.mask is not None:
        inputs = inputs * rows.mask.unsqueeze(-1)
    gradients = rows.gradients.movedim(0, -2)  # [*blocks, batch, shared, columns, out]
    return {
        "input": (inputs.flatten(-3, -2) * rows.share**0.5, rows.num_rows),
        "gradient": (gradients.flatten(-4, -2), rows.num_examples),
    }


def _as_shared(rows: Rows, sharing: str) -> Rows:
    """The rows of one kind of use in the dtype of their sums, pooled over positions where ``sharing`` says so."""
    rows = replace(rows, transposed=None).for_algebra()
    rows = rows.pooled() if sharing == "reduce" and rows.inputs.shape[-2] > 1 else rows
    if rows.share:
        return rows
    mask = None if rows.mask is None else rows.mask[:0]
    return replace(rows, inputs=rows.inputs[..., :0, :, :], mask=mask)  # they were counted with other columns


def _factors(rows: Rows, sharing: str, *, diagonal_gradients: bool) -> Statistics:
    rows = _as_shared(rows, sharing)
    inputs, gradients = rows.inputs, rows.gradients
    by_block = gradients.movedim(0, -4) if gradients.shape[0] > 1 else gradients[0]
    by_block = by_block.flatten(len(inputs.shape) - 3, -2)
    if isinstance(inputs, SparseRows):
        input_sum = inputs.second_moment(scale=rows.mask)
    else:
        flat = inputs.flatten(-3, -2)
        weighted = flat if rows.mask is None else flat * rows.mask.flatten().unsqueeze(-1)
        input_sum = weighted.mT @ flat
    if rows.share < 1:
        input_sum = input_sum * rows.share
    gradient_sum = by_block.square().sum(-2, keepdim=True) if diagonal_gradients else by_block.mT @ by_block
    return Statistics(
        {"input": input_sum, "gradient": gradient_sum}, {"input": rows.num_rows, "gradient": rows.num_examples}
    )
