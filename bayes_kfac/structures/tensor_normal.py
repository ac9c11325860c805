"""The tensor normal block: a covariance that is a Kronecker product with a factor for each mode of the weights.

``cov(vec W) = C_1 ⊗ … ⊗ C_k``, with ``C_i = R_i R_iᵀ``, for the sizes ``n_i`` of a tensor whose elements in their order
are those of the block: the first modes make up its ``out`` side, the others its ``in`` side. A root is named after its
side and place, ``row_0``, ``row_1``, …, ``column_0``, …; a side of one weight may have none. The roots are regular,
``[*blocks, n_i, n_i]``, and are applied one mode at a time (:func:`along`): the products are never formed.

With eigenvectors for roots, any Gaussian that is diagonal there is one of the kind: see :class:`TensorEigenGaussian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.alternating import settled
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.kron_eigen import squared_lengths
from bayes_kfac.structures.whitened import WhitenedRows, same_for_all

ROW, COLUMN = "row", "column"


@register_gaussian("tensor_normal")
class TensorNormalGaussian(BlockGaussian):
    """A zero-mean tensor normal.

    Args:
        **roots: ``R_i``, ``[*blocks, n_i, n_i]``, by the names ``row_0``, …, ``column_0``, … in their order.
    """

    def __init__(self, **roots: Tensor) -> None:
        # files keep tensors by name, in an order of their own
        self.roots = in_order(roots)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        blocks = next(iter(self.roots.values())).shape[:-2]
        return (*blocks, *sides({name: root.shape[-1] for name, root in self.roots.items()}))

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self._along(self.roots.values(), noise)

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._along((root.mT for root in self.roots.values()), value)

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._divided_by_adjoint(self._divided(value))

    def logdet(self) -> Tensor:  # noqa: D102
        size = math.prod(self.shape[-2:])
        logs = [size // root.shape[-1] * torch.linalg.slogdet(root)[1] for root in self.roots.values()]
        return -2 * torch.stack(logs).sum(0)

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedRows:  # noqa: D102
        inputs = inputs.dense() if isinstance(inputs, SparseRows) else inputs
        return WhitenedRows(self._rows(COLUMN, inputs), self._rows(ROW, same_for_all(gradients)), self._weights())

    def marginal_variance(self) -> Tensor:  # noqa: D102
        like, weights = next(iter(self.roots.values())), self._weights()
        variance = like.new_ones(self.shape) if weights is None else weights
        return self._along((root.square() for root in self.roots.values()), variance)

    def to_power(self, exponent: float) -> BlockGaussian:  # noqa: D102
        return TensorNormalGaussian(**{name: linalg.root_of_power(root, exponent) for name, root in self.roots.items()})

    def to_dense(self) -> Tensor:  # noqa: D102
        inverse = reduce(linalg.kron, (torch.linalg.inv(root) for root in self.roots.values()))
        return inverse.mT @ inverse

    @property
    def matrix_normal_roots(self) -> tuple[Tensor, Tensor] | None:
        """The products of each side's roots, written out."""
        one = next(iter(self.roots.values())).new_ones(*self.shape[:-2], 1, 1)
        row, column = (
            reduce(linalg.kron, (linalg.triangular_root(root) for root in self._roots_of(side)), one)
            for side in (ROW, COLUMN)
        )
        return row, column

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return dict(self.roots)

    def _weights(self) -> Tensor | None:
        """The variances of what the roots are applied to, ``[*blocks, out, in]``; ``None`` for ones."""
        return None

    def _along(self, matrices: Iterable[Tensor], value: Tensor) -> Tensor:
        return along(matrices, value.flatten(-2)).unflatten(-1, value.shape[-2:])

    def _divided(self, value: Tensor) -> Tensor:
        """``R⁻¹ V``."""
        flat = along(self.roots.values(), value.flatten(-2), torch.linalg.solve)
        return flat.unflatten(-1, value.shape[-2:])

    def _divided_by_adjoint(self, value: Tensor) -> Tensor:
        """``R⁻ᵀ V``."""
        flat = along((root.mT for root in self.roots.values()), value.flatten(-2), torch.linalg.solve)
        return flat.unflatten(-1, value.shape[-2:])

    def _rows(self, side: str, rows: Tensor) -> Tensor:
        """Rows ``[..., *blocks, batch, shared, size]`` of one side, whitened by its modes."""
        own = (root.mT.unsqueeze(-3) for root in self._roots_of(side))
        return along(own, rows.flatten(-3, -2)).unflatten(-2, rows.shape[-3:-1])

    def _roots_of(self, side: str) -> list[Tensor]:
        return [root for name, root in self.roots.items() if name.startswith(side)]


@register_gaussian("tensor_eigen")
class TensorEigenGaussian(TensorNormalGaussian):
    """A zero-mean Gaussian that is diagonal in a Kronecker-factored basis: ``P⁻¹ = B diag(Λ)⁻¹ Bᵀ``, ``B = ⊗ B_i``.

    Args:
        precision: ``Λ``, ``[*blocks, out, in]``, positive.
        **bases: ``B_i``, named as the roots of a :class:`TensorNormalGaussian`.
    """

    def __init__(self, precision: Tensor, **bases: Tensor) -> None:
        super().__init__(**bases)
        self.precision = precision

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return super().sample(noise * self.precision.rsqrt())

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return super().whiten(value) * self.precision.rsqrt()

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._divided_by_adjoint(self._divided(value) * self.precision)

    def logdet(self) -> Tensor:  # noqa: D102
        return super().logdet() + self.precision.log().sum((-2, -1))

    def to_power(self, exponent: float) -> BlockGaussian:  # noqa: D102
        total = self.precision.new_ones(self.shape[:-2])
        bases = {}
        for name, basis in self.roots.items():
            lengths = squared_lengths(basis)
            if lengths is None:
                return BlockGaussian.to_power(self, exponent)
            total = total * lengths
            bases[name] = basis / lengths.sqrt()[..., None, None]
        return TensorEigenGaussian((self.precision / total[..., None, None]) ** exponent, **bases)

    def to_dense(self) -> Tensor:  # noqa: D102
        inverse = reduce(linalg.kron, (torch.linalg.inv(basis) for basis in self.roots.values()))
        return (inverse.mT * self.precision.flatten(-2).unsqueeze(-2)) @ inverse

    @property
    def matrix_normal_roots(self) -> None:  # noqa: D102
        return None

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"precision": self.precision, **self.roots}

    def as_prior(self) -> TensorNormalGaussian:  # noqa: D102
        return self.nearest_tensor_normal()

    def nearest_tensor_normal(self) -> TensorNormalGaussian:
        """The tensor normal ``q`` nearest in ``KL(q ‖ p)`` to this Gaussian ``p``.

        In the basis it is ``⊗ diag(c_i)`` such that ``Λ ∘ (c_1 ⊗ … ⊗ c_k)`` has mean 1 over every slice of every mode:
        each mode's ``c_i`` given the others is one scaling (Sinkhorn's, of a tensor).

        Returns:
            The tensor normal.
        """

        def sweep(sides: tuple[Tensor, list[Tensor]]) -> tuple[tuple[Tensor, list[Tensor]], float]:
            scaled, before = sides
            scales, moved = [], 0.0
            for scale in before:
                slices = scaled.unflatten(-1, (scale.shape[-1], -1))
                factor = slices.mean(-1).reciprocal()
                scaled = (slices * factor.unsqueeze(-1)).mT.flatten(-2)
                scales.append(scale * factor)
                moved = max(moved, float((factor - 1).abs().max()))
            return (scaled, scales), moved

        precision = self.precision.flatten(-2).double()  # in float32 rounding would end the turns early
        ones = [precision.new_ones(basis.shape[:-1]) for basis in self.roots.values()]
        _, scales = settled(sweep, (precision, ones))
        roots = zip(self.roots.items(), scales, strict=True)
        return TensorNormalGaussian(
            **{name: basis * scale.sqrt().to(basis).unsqueeze(-2) for (name, basis), scale in roots}
        )

    def _weights(self) -> Tensor:
        return self.precision.reciprocal()


def along(
    matrices: Iterable[Tensor], value: Tensor, operation: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Tensor:
    """A Kronecker product of matrices times a tensor, one mode at a time.

    Args:
        matrices: One for each mode, ``[*blocks, n_i, n_i]``.
        value: The tensor with its modes flattened, ``[..., *blocks, size]``.
        operation: What is done with a matrix and a value ``[..., *blocks, n_i, size / n_i]``: its product by default.

    Returns:
        The same of every mode, in the shape of ``value``.
    """
    for matrix in matrices:  # the mode at hand goes to the end, so that after all of them the order is as before
        value = operation(matrix, value.unflatten(-1, (matrix.shape[-1], -1))).mT.flatten(-2)
    return value


def outer(vectors: Iterable[Tensor]) -> Tensor:
    """The outer product of vectors ``[*blocks, n_i]`` with its modes flattened, ``[*blocks, size]``."""
    return reduce(lambda left, right: (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), vectors)


def sides(sizes: Mapping[str, int]) -> tuple[int, int]:
    """The shape ``(out, in)`` of a block, from the sizes of its modes by name."""
    out_features, in_features = (
        math.prod(size for name, size in sizes.items() if name.startswith(side)) for side in (ROW, COLUMN)
    )
    return out_features, in_features


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of modes, in the order of these."""
    return {name: tensors[name] for name in sorted(tensors, key=_place)}


def _place(name: str) -> tuple[bool, int]:
    side, _, place = name.partition("_")
    return side != ROW, int(place)
