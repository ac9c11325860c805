"""Jacobians in the coordinates in which a Gaussian is white, and their inner products: ``J_c P⁻¹ J_dᵀ``.

A layer's Jacobian is ``J_c = Σ_t g_ct a_tᵀ``. Where the Gaussian is Kronecker-factored, up to weights ``w`` for each
element, the rows ``a`` and ``g`` are whitened instead of the Jacobian:

    ``⟨J_c, J_d⟩ = Σ_oi w_oi J̃_coi J̃_doi = Σ_tu Σ_o (Σ_i w_oi ã_ti ã_ui) g̃_cto g̃_duo``.

The second form needs no Jacobian; with ``w = 1`` it is ``Σ_tu (ã_t · ã_u) (g̃_ct · g̃_du)``. It is taken where positions
are few, the first where they are many: by count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows

#: Bytes of Jacobians, or of products of pairs, that are formed at a time: on a CPU what the caches like, elsewhere what
#: memory allows.
CPU_JACOBIAN_BYTES = 1 << 27
ACCELERATOR_JACOBIAN_BYTES = 1 << 30


def jacobian_bytes(device: torch.device) -> int:
    """The bytes of Jacobians that are formed at a time on a device."""
    return CPU_JACOBIAN_BYTES if device.type == "cpu" else ACCELERATOR_JACOBIAN_BYTES


class Whitened(ABC):
    """Whitened Jacobians of ``columns`` outputs of each of ``batch`` examples."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """``⟨J_c, J_d⟩`` within each example, ``[batch, columns, columns]``, summed over blocks."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Its diagonal, ``⟨J_c, J_c⟩``, ``[batch, columns]``."""

    @abstractmethod
    def jacobians(self) -> Tensor:
        """The Jacobians themselves, ``[batch, columns, size]``."""

    def between(self, other: Whitened) -> Tensor:
        """``⟨J_c, J'_d⟩`` for all pairs of examples, ``[batch, other batch, columns, columns]``.

        Args:
            other: Those of other examples, by the same Gaussian.

        Returns:
            The products.
        """
        return torch.einsum("nck,mdk->nmcd", self.jacobians(), other.jacobians())

    def within_groups(self, other: Whitened, groups: int) -> Tensor:
        """``⟨J_c, J'_d⟩`` for pairs of examples of one group, ``[groups, size, other size, columns, other columns]``.

        Args:
            other: Those of other examples, by the same Gaussian.
            groups: How many groups of consecutive examples both batches are made of.

        Returns:
            The products.
        """
        if groups == 1:
            return self.between(other).unsqueeze(0)
        mine, theirs = (own.jacobians().unflatten(0, (groups, -1)) for own in (self, other))
        return torch.einsum("gnck,gmdk->gnmcd", mine, theirs)


@dataclass(frozen=True)
class WhitenedJacobians(Whitened):
    """Jacobians written out.

    Attributes:
        values: ``[columns, *blocks, batch, ...]``.
        num_blocks: The number of dimensions of ``*blocks``.
    """

    values: Tensor
    num_blocks: int

    def jacobians(self) -> Tensor:  # noqa: D102
        return self.values.movedim(self.num_blocks + 1, 0).flatten(2)

    def covariance(self) -> Tensor:  # noqa: D102
        jacobians = self.jacobians()
        return jacobians @ jacobians.mT

    def variance(self) -> Tensor:  # noqa: D102
        return self.jacobians().square().sum(-1)


@dataclass(frozen=True)
class WhitenedRows(Whitened):
    """Jacobians as whitened rows.

    Attributes:
        inputs: ``ã``, ``[*blocks, batch, shared, in]``.
        gradients: ``g̃``, ``[columns, *blocks, batch, shared, out]``; a batch of 1 where all examples have the same.
        weights: ``w``, ``[*blocks, out, in]``; ``None`` for ones.
    """

    inputs: Tensor | SparseRows
    gradients: Tensor
    weights: Tensor | None = None

    def covariance(self) -> Tensor:  # noqa: D102
        if isinstance(self.inputs, SparseRows) and self.weights is not None:
            variances, kernel, gradients = self._meetings()
            return torch.einsum("cnto,nto,ntu,dnuo->ncd", gradients, variances, kernel, gradients)
        if self._shared == 1 and isinstance(self.inputs, Tensor):
            scale, gradients = self._scale(), self.gradients.squeeze(-2)
            if self._is_same_for_all and self.weights is None:
                products = torch.einsum("c...no,d...no->...cd", gradients, gradients)
                return torch.einsum("...no,...cd->ncd", scale, products)
            weighted = gradients * scale.sqrt()
            return torch.einsum("c...no,d...no->ncd", weighted, weighted)
        if self._prefers_kernel(self._columns**2):
            lefts = [(part, part._by_kernel()) for part in self._kernel_parts()]
            return torch.cat(
                [torch.einsum("c...nuo,d...nuo->ncd", own, part.gradients.expand_as(own)) for part, own in lefts]
            )
        parts = (part.jacobians() for part in self.parts())
        return torch.cat([jacobians @ jacobians.mT for jacobians in parts])

    def variance(self) -> Tensor:  # noqa: D102
        if isinstance(self.inputs, SparseRows) and self.weights is not None:
            variances, kernel, gradients = self._meetings()
            return torch.einsum("cnto,nto,ntu,cnuo->nc", gradients, variances, kernel, gradients)
        if self._shared == 1 and isinstance(self.inputs, Tensor):
            scale, squares = self._scale(), self.gradients.squeeze(-2).square()
            if self.weights is None:
                squares = squares.sum(-1, keepdim=True)
            if self._is_same_for_all:
                return torch.einsum("c...o,...no->nc", squares.squeeze(-2), scale)
            return torch.einsum("c...no,...no->nc", squares, scale)
        if self._prefers_kernel(self._columns):
            lefts = [(part, part._by_kernel()) for part in self._kernel_parts()]
            return torch.cat(
                [torch.einsum("c...nuo,c...nuo->nc", own, part.gradients.expand_as(own)) for part, own in lefts]
            )
        return torch.cat([part.jacobians().square().sum(-1) for part in self.parts()])

    def between(self, other: Whitened) -> Tensor:  # noqa: D102
        assert isinstance(other, WhitenedRows)
        if self._shared == other._shared == 1 and self.weights is None and not self._is_sparse:
            kernel = torch.einsum("...nti,...mui->...nm", self.inputs, other.inputs)
            return torch.einsum("c...nto,d...muo,...nm->nmcd", self.gradients, other.gradients, kernel)
        if self._shared == other._shared == 1 and not self._is_sparse and self._is_few(other):
            size = other.inputs.shape[-3] * (self.inputs.shape[-1] + self._columns * self.gradients.shape[-1])
            return torch.cat([part._between_by_pairs(other) for part in self._pieces(size)])
        if self._prefers_pairs(other):
            pairs = (mine.between(theirs) for mine in self._positions() for theirs in other._positions())
            return reduce(torch.add, pairs)
        return torch.cat(
            [
                torch.cat([torch.einsum("nck,mdk->nmcd", mine, theirs.jacobians()) for theirs in other.parts()], dim=1)
                for mine in (part.jacobians() for part in self.parts())
            ]
        )

    def within_groups(self, other: Whitened, groups: int) -> Tensor:  # noqa: D102
        assert isinstance(other, WhitenedRows)
        if groups == 1 or self._shared > 1 or other._shared > 1 or self._is_sparse:
            return super().within_groups(other, groups)
        (mine, own), (theirs, others) = self._by_group(groups), other._by_group(groups)
        if self.weights is None:
            return torch.einsum("c...gno,d...gmo,...gnm->gnmcd", own, others, mine @ theirs.mT)
        pairs = mine.shape[-2] * theirs.shape[-2] * self.gradients.shape[1:-3].numel()
        size = pairs * (mine.shape[-1] + (1 + self._columns) * own.shape[-1]) * own.element_size()
        step = max(1, jacobian_bytes(own.device) // size)
        parts = (slice(start, start + step) for start in range(0, groups, step))
        products = (
            torch.einsum(
                "c...gno,d...gmo,...gnmo->gnmcd",
                own[..., part, :, :],
                others[..., part, :, :],
                (mine[..., part, :, None, :] * theirs[..., part, None, :, :]) @ self.weights.mT[..., None, None, :, :],
            )
            for part in parts
        )
        return torch.cat(list(products))

    def _by_group(self, groups: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[*blocks, groups, size, in]`` and gradients ``[columns, *blocks, groups, size, out]``."""
        assert isinstance(self.inputs, Tensor)
        inputs = self.inputs.squeeze(-2)
        gradients = self.gradients.squeeze(-2).expand(-1, *inputs.shape[:-1], -1)
        return inputs.unflatten(-2, (groups, -1)), gradients.unflatten(-2, (groups, -1))

    def _between_by_pairs(self, other: WhitenedRows) -> Tensor:
        """``Σ_o g_co g'_do Σ_i w_oi a_i a'_i`` of examples with one position."""
        assert isinstance(self.inputs, Tensor)
        assert isinstance(other.inputs, Tensor)
        assert self.weights is not None
        mine, theirs = self.inputs, other.inputs.squeeze(-2).unsqueeze(-3)  # [*blocks, n, 1, in], [*blocks, 1, m, in]
        products = (mine * theirs) @ self.weights.mT.unsqueeze(-3)  # [*blocks, n, m, out]
        weighted = self.gradients * products
        gradients = other.gradients.squeeze(-2).unsqueeze(-3)
        return torch.einsum("c...nmo,d...kmo->nmcd", weighted, gradients)

    def jacobians(self) -> Tensor:  # noqa: D102
        inputs = self.inputs.dense() if isinstance(self.inputs, SparseRows) else self.inputs
        *blocks, batch, shared, _ = inputs.shape
        # one product for each example, [columns·out, shared] with [shared, in]
        gradients = self.gradients.movedim(0, -3).expand(*blocks, batch, -1, shared, -1)
        jacobians = gradients.mT.flatten(-3, -2) @ inputs
        jacobians = jacobians.unflatten(-2, (self._columns, self.gradients.shape[-1]))
        if self.weights is not None:
            jacobians = jacobians * self.weights.sqrt()[..., None, None, :, :]
        return jacobians.movedim(-4, 0).movedim(-3, 1).flatten(2)

    @property
    def _is_sparse(self) -> bool:
        return isinstance(self.inputs, SparseRows)

    @property
    def _columns(self) -> int:
        return self.gradients.shape[0]

    @property
    def _shared(self) -> int:
        return self.inputs.shape[-2]

    def _prefers_kernel(self, products: int) -> bool:
        """Whether the Gram of positions costs fewer operations than Jacobians, for so many products of columns."""
        shared, in_features, out_features = self._shared, self.inputs.shape[-1], self.gradients.shape[-1]
        kernels = in_features if self.weights is None else in_features * out_features
        kernel_cost = shared**2 * (kernels + self._columns * out_features) + products * shared * out_features
        jacobian_cost = out_features * in_features * (self._columns * shared + products)
        return self._is_sparse or kernel_cost <= jacobian_cost

    def _by_kernel(self) -> Tensor:
        """``Σ_t (Σ_i w_oi ã_ti ã_ui) g̃_cto``, ``[columns, *blocks, batch, shared, out]``."""
        if self.weights is not None:
            assert isinstance(self.inputs, Tensor)
            pairs = self.inputs.unsqueeze(-2) * self.inputs.unsqueeze(-3)  # [*blocks, batch, shared, shared, in]
            kernel = (pairs.flatten(-4, -2) @ self.weights.mT).unflatten(-2, pairs.shape[-4:-1])
            return (self.gradients.unsqueeze(-2) * kernel).sum(-3)
        if isinstance(self.inputs, SparseRows):
            kernel = self.inputs.gram(self.gradients.new_ones(self.inputs.size))
        else:
            kernel = self.inputs @ self.inputs.mT
        return kernel.mT @ self.gradients

    def _kernel_parts(self) -> Iterator[WhitenedRows]:
        """The same in pieces whose :meth:`_by_kernel` is of bounded size; whole where it is small."""
        if self.weights is None:
            return iter([self])
        in_features, out_features = self.inputs.shape[-1], self.gradients.shape[-1]
        return self._pieces(self._shared**2 * (in_features + self._columns * out_features))

    def _prefers_pairs(self, other: WhitenedRows) -> bool:
        """Whether products of all pairs of positions cost fewer operations than Jacobians, where there are weights."""
        in_features, pairs = self.inputs.shape[-1], self._shared * other._shared
        products = self._columns * other._columns
        formed = self._columns * self._shared + other._columns * other._shared
        is_cheaper = pairs * (in_features + products) <= in_features * (formed + products)
        return pairs > 1 and is_cheaper and self.weights is not None and not self._is_sparse

    def _is_few(self, other: WhitenedRows) -> bool:
        """Whether an example's rows, formed for each of the others, are fewer numbers than its Jacobians."""
        in_features, out_features = self.inputs.shape[-1], self._columns * self.gradients.shape[-1]
        return self._columns > 1 or other.inputs.shape[-3] * (in_features + out_features) <= in_features * out_features

    def _positions(self) -> Iterator[WhitenedRows]:
        """The rows of each position, whose Jacobians add up to these."""
        for t in range(self._shared):
            here = slice(t, t + 1)
            yield replace(self, inputs=self.inputs[..., here, :], gradients=self.gradients[..., here, :])

    @property
    def _is_same_for_all(self) -> bool:
        return self.gradients.shape[-3] == 1

    def _scale(self) -> Tensor:
        """``Σ_i w_oi a_i²`` where there is one position, ``[*blocks, batch, out]``; ``out`` is 1 without weights."""
        assert isinstance(self.inputs, Tensor)
        squares = self.inputs.squeeze(-2).square()
        return squares.sum(-1, keepdim=True) if self.weights is None else squares @ self.weights.mT

    def _meetings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of sparse rows one position for each element: ``w`` of it, which of them meet at an index, and gradients."""
        assert isinstance(self.inputs, SparseRows)
        assert self.weights is not None
        count = self.inputs.indices.shape[-1]
        indices, weights = (tensor.flatten(1).unsqueeze(-1) for tensor in (self.inputs.indices, self.inputs.weights))
        words = SparseRows(indices, weights, self.inputs.size)
        kernel = words.gram(self.weights.new_ones(words.size))
        return self.weights.mT[indices.squeeze(-1)], kernel, self.gradients.repeat_interleave(count, dim=-2)

    def parts(self) -> Iterator[WhitenedRows]:
        """The same in pieces of the batch whose Jacobians are of bounded size."""
        return self._pieces(self._columns * self.gradients.shape[-1] * self.inputs.shape[-1])

    def _pieces(self, elements: int) -> Iterator[WhitenedRows]:
        """The same in pieces of the batch, where an example of a block takes so many elements."""
        size = elements * self.gradients.element_size() * self.gradients.shape[1:-3].numel()
        step = max(1, jacobian_bytes(self.gradients.device) // max(size, 1))
        for start in range(0, max(self.inputs.shape[-3], 1), step):
            piece = slice(start, start + step)
            gradients = self.gradients
            if gradients.shape[-3] > 1:
                gradients = gradients[..., piece, :, :]
            yield replace(self, inputs=self.inputs[..., piece, :, :], gradients=gradients)


@dataclass(frozen=True)
class WhitenedByRoot(Whitened):
    """Jacobians whitened one by one, written out in pieces of bounded size.

    Of a Gaussian with few columns, whose covariance is a difference: products with it could come out negative in
    float32, those of whitened Jacobians cannot.

    Attributes:
        rows: Rows of Jacobians that are not white yet.
        shape: The block's shape, ``(*blocks, out, in)``.
        root: What makes Jacobians white, ``[..., *blocks, out, in]``.
    """

    rows: WhitenedRows
    shape: tuple[int, ...]
    root: Callable[[Tensor], Tensor]

    def covariance(self) -> Tensor:  # noqa: D102
        return torch.cat([jacobians @ jacobians.mT for jacobians in self._parts()])

    def variance(self) -> Tensor:  # noqa: D102
        return torch.cat([jacobians.square().sum(-1) for jacobians in self._parts()])

    def jacobians(self) -> Tensor:  # noqa: D102
        return self._rooted(self.rows)

    def between(self, other: Whitened) -> Tensor:  # noqa: D102
        assert isinstance(other, WhitenedByRoot)
        return torch.cat(
            [
                torch.cat([torch.einsum("nck,mdk->nmcd", mine, theirs) for theirs in other._parts()], dim=1)
                for mine in self._parts()
            ]
        )

    def _parts(self) -> Iterator[Tensor]:
        return (self._rooted(part) for part in self.rows.parts())

    def _rooted(self, rows: WhitenedRows) -> Tensor:
        return self.root(rows.jacobians().unflatten(-1, self.shape)).flatten(2)


def product_rows(
    row_root: Tensor,
    column_root: Tensor,
    inputs: Tensor | SparseRows,
    gradients: Tensor,
    weights: Tensor | None = None,
) -> WhitenedRows:
    """Rows whitened by a Gaussian whose root is ``R_G ⊗ R_A``, up to weights.

    Args:
        row_root: ``R_G``, a factor ``[*blocks, out, out]``.
        column_root: ``R_A``, a factor ``[*blocks, in, in]``; sparse inputs stay sparse where it is diagonal.
        inputs: ``[*blocks, batch, shared, in]``.
        gradients: ``[columns, *blocks, batch, shared, out]``.
        weights: ``[*blocks, out, in]``, or ``None``.

    Returns:
        The rows.
    """
    if isinstance(inputs, SparseRows) and not linalg.is_diagonal(column_root):
        inputs = inputs.dense()
    if isinstance(inputs, SparseRows):
        whitened: Tensor | SparseRows = inputs.scaled(column_root.flatten())
    else:
        whitened = _right_product(inputs, column_root)
    return WhitenedRows(whitened, _right_product(same_for_all(gradients), row_root), weights)


def _right_product(rows: Tensor, root: Tensor) -> Tensor:
    """Rows times a root ``[*blocks, size, size]``: one product for all examples and positions of a block."""
    if root.ndim == 2 and rows.shape == (len(root), 1, 1, len(root)):  # maybe the unit vectors of an output layer
        identity = torch.eye(len(root), dtype=rows.dtype, device=rows.device)
        if torch.equal(rows[:, 0, 0], identity):
            return root[:, None, None]
    return linalg.right_product(rows.flatten(-3, -2), root).unflatten(-2, rows.shape[-3:-1])


def same_for_all(gradients: Tensor) -> Tensor:
    """Gradients ``[columns, *blocks, batch, shared, out]``, with a batch of 1 where all examples share their memory.

    Those of an output layer are unit vectors, the same for every example.

    Args:
        gradients: The gradients.

    Returns:
        A view of them.
    """
    return gradients[..., :1, :, :] if gradients.stride(-3) == 0 else gradients
