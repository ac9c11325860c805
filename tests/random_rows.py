"""Random rows of blocks, dense, sparse and tied. All float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from bayes_kfac.curvature import Rows, SparseRows
from tests.helpers import randn, rng

__all__ = ["SEEDS", "dense_rows", "sparse_rows", "tied_rows", "words", "written_out"]

SEEDS = st.integers(0, 2**31 - 1)


def dense_rows(
    columns: int = 2,
    blocks: tuple[int, ...] = (),
    batch: int = 3,
    shared: int = 4,
    *,
    in_: int = 3,
    out: int = 2,
    seed: int = 0,
) -> Rows:
    """Rows of a layer with three inputs and two outputs."""
    inputs = randn(*blocks, batch, shared, in_, seed=seed)
    return Rows(inputs, randn(columns, *blocks, batch, shared, out, seed=seed + 1))


def words(batch: int, shared: int, count: int, *, size: int = 5, seed: int = 0) -> SparseRows:
    """Random words of a vocabulary with random weights; many occur several times in a row."""
    indices = torch.randint(size, (batch, shared, count), generator=rng(seed))
    return SparseRows(indices, randn(batch, shared, count, seed=seed + 1), size)


def tied_rows(columns: int = 2, *, batch: int = 3, size: int = 5, width: int = 3, sparse: bool = True) -> Rows:
    """Rows of an output layer whose weight is used transposed before it: by an embedding of words, or densely."""
    head = dense_rows(columns, batch=batch, in_=width, out=size)
    lookup = dense_rows(columns, batch=batch, shared=2, in_=size, out=width, seed=4)
    if sparse:
        lookup = replace(lookup, inputs=words(batch, 2, 1, size=size))
    return replace(head, transposed=lookup)


@st.composite
def sparse_rows(draw: st.DrawFn) -> SparseRows:
    """Words of any number in any number of positions, down to one word in a vocabulary of one."""
    batch, shared, count, size = (draw(st.integers(1, 4)) for _ in range(4))
    return words(batch, shared, count, size=size, seed=draw(SEEDS))


def written_out(rows: Rows) -> Rows:
    """The same rows with inputs that are not sparse, neither in its uses as it is nor transposed."""
    inputs = rows.inputs.dense() if isinstance(rows.inputs, SparseRows) else rows.inputs
    transposed = None if rows.transposed is None else written_out(rows.transposed)
    return replace(rows, inputs=inputs, transposed=transposed)
