"""Algebra of Fishers that are summed along a chain of positions, and the Gaussian of an endless one.

The gradient of weights that are used at ``T`` positions is a sum over them. Where its terms are a stationary chain,
with covariance ``V`` at one position and correlation ``Ψᵈ`` at a distance of ``d``, the sum's covariance is
``Σ_{|d|<T} (T − |d|) Ψᵈ V``, with the transposes for ``d < 0`` (Martens, Ba & Johnson 2018). In coordinates in which
``V`` is the identity, ``Ψ = M_G ⊗ M_A`` is a contraction.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.alternating import alternated
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.whitened import WhitenedRows, product_rows

#: Doublings of the number of terms of a Neumann series; a contraction by a factor of 1 − 2⁻⁵⁰ converges within them.
DOUBLINGS = 60


def chain_gain(correlation: Tensor, length: float) -> Tensor:
    """How much more a chain tells than as many independent positions: ``Σ_{|d|<T} (1 − |d|/T) x^|d|``.

    In closed form ``(T (1 − x²) − 2x (1 − x^T)) / (T (1 − x)²)``, which cancels near ``x = 1``. Here the sum is built
    up by doubling the chain, from its total ``Σ_{tu} x^|t−u|`` and the reach ``Σ_t x^t`` of one end into it. Between
    whole numbers of positions it is linear in ``T`` times it, as for a mixture of chains of the lengths around.

    Args:
        correlation: ``x``, of neighbours, within ``[−1, 1]``.
        length: ``T``, at least 1.

    Returns:
        The factor, not negative, of the shape of ``x``.
    """
    x, whole = correlation, int(length)
    power, reach, total = torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for digit in f"{whole:b}":
        power, reach, total = power.square(), reach * (1 + power), 2 * total + 2 * x * reach.square()
        if digit == "1":
            power, reach, total = power * x, 1 + x * reach, total + 1 + 2 * x * reach
    return (total + (length - whole) * (1 + 2 * x * reach)) / length


def solve_stein(left: Tensor, right: Tensor, value: Tensor) -> Tensor:
    """``Y`` with ``Y − L Y Rᵀ = V``, by doubling the terms of ``Y = Σ_k Lᵏ V (Rᵏ)ᵀ`` (Smith 1968).

    Args:
        left: ``L``, a contraction, ``[*blocks, out, out]``.
        right: ``R``, a contraction, ``[*blocks, in, in]``.
        value: ``V``, ``[..., *blocks, out, in]``.

    Returns:
        ``Y``, of the shape of ``V``.
    """
    epsilon = torch.finfo(value.dtype).eps
    for _ in range(DOUBLINGS):
        norms = torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
        if not bool((norms > epsilon).any()):
            break
        value = value + left @ value @ right.mT
        left, right = left @ left, right @ right
    return value


def log_det_stein(left: Tensor, right: Tensor) -> Tensor:
    """``log det(I − L ⊗ R)`` of contractions, ``[*blocks]``, from their eigenvalues.

    Its derivatives are those of matrices very near by: eigenvalues that coincide may have none of their own.

    Args:
        left: ``L``, ``[*blocks, out, out]``.
        right: ``R``, ``[*blocks, in, in]``.

    Returns:
        The log determinants.
    """
    total = _log_det(torch.linalg.eigvals(left.detach()), torch.linalg.eigvals(right.detach()))
    if left.requires_grad or right.requires_grad:
        near = _log_det(torch.linalg.eigvals(_nearby(left)), torch.linalg.eigvals(_nearby(right))).to(total)
        total = total + near - near.detach()
    return total


def _log_det(alpha: Tensor, beta: Tensor) -> Tensor:
    return (1 - alpha.unsqueeze(-1) * beta.unsqueeze(-2)).abs().log().sum((-2, -1))


def _nearby(matrix: Tensor) -> Tensor:
    """A contraction changed at random by the root of rounding: it has eigenvectors, not too skew (Davies 2007)."""
    size = matrix.shape[-1]
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return matrix.double() + torch.finfo(torch.float64).eps ** 0.5 / size * noise.to(matrix.device)


@register_gaussian("chain")
class ChainGaussian(BlockGaussian):
    """A zero-mean Gaussian whose precision is the Fisher of an endless chain: ``P⁻¹ = B Bᵀ``.

    ``B = (K_G ⊗ K_A) (I − M_G ⊗ M_A) diag(Λ)^(-1/2)``: in the bases ``K`` one position is white, ``M`` is the
    correlation of neighbours, and ``Λ = 1 − diag(M_Gᵀ M_G) diag(M_Aᵀ M_A)ᵀ`` what the next position adds.

    Args:
        basis_row: ``K_G``, regular, ``[*blocks, out, out]``.
        basis_column: ``K_A``, regular, ``[*blocks, in, in]``.
        lag_row: ``M_G``, a contraction, ``[*blocks, out, out]``.
        lag_column: ``M_A``, a contraction, ``[*blocks, in, in]``.
        innovation: ``Λ``, positive, ``[*blocks, out, in]``.
        log_volume: ``log |det (K_G ⊗ K_A)|``, ``[*blocks]``.
    """

    def __init__(
        self,
        basis_row: Tensor,
        basis_column: Tensor,
        lag_row: Tensor,
        lag_column: Tensor,
        innovation: Tensor,
        log_volume: Tensor,
    ) -> None:
        self.basis_row = basis_row
        self.basis_column = basis_column
        self.lag_row = lag_row
        self.lag_column = lag_column
        self.innovation = innovation
        self.log_volume = log_volume

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.innovation.shape)

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        scaled = noise * self.innovation.rsqrt()
        return self.basis_row @ (scaled - self.lag_row @ scaled @ self.lag_column.mT) @ self.basis_column.mT

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        rotated = self.basis_row.mT @ value @ self.basis_column
        return (rotated - self.lag_row.mT @ rotated @ self.lag_column) * self.innovation.rsqrt()

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        rotated = _two_sided_solve(self.basis_row, self.basis_column, value)
        noise = solve_stein(self.lag_row, self.lag_column, rotated) * self.innovation
        summed = solve_stein(self.lag_row.mT, self.lag_column.mT, noise)
        return _two_sided_solve(self.basis_row.mT, self.basis_column.mT, summed)

    def logdet(self) -> Tensor:  # noqa: D102
        return self.innovation.log().sum((-2, -1)) - 2 * (self.log_volume + self._log_det_of_lags)

    @cached_property
    def _log_det_of_lags(self) -> Tensor:
        return log_det_stein(self.lag_row, self.lag_column)

    @property
    def _lagged(self) -> tuple[Tensor, Tensor]:
        """The bases of the second Kronecker product in ``B``."""
        return self.basis_row @ self.lag_row, self.basis_column @ self.lag_column

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedRows:
        """:meth:`BlockGaussian.whitened`: ``B`` is a difference of two products, and each position's rows are two."""
        weights = self.innovation.reciprocal()
        inputs = inputs.dense() if isinstance(inputs, SparseRows) else inputs
        now = product_rows(self.basis_row, self.basis_column, inputs, gradients)
        before = product_rows(*self._lagged, inputs, gradients)
        assert isinstance(now.inputs, Tensor)
        assert isinstance(before.inputs, Tensor)
        return WhitenedRows(
            torch.cat([now.inputs, before.inputs], dim=-2),
            torch.cat([now.gradients, -before.gradients], dim=-2),
            weights,
        )

    def marginal_variance(self) -> Tensor:  # noqa: D102
        weights, (row, column) = self.innovation.reciprocal(), self._lagged
        products = (
            (self.basis_row.square(), self.basis_column.square()),
            (self.basis_row * row, -2 * self.basis_column * column),
            (row.square(), column.square()),
        )
        return torch.stack([left @ weights @ right.mT for left, right in products]).sum(0)

    def to_dense(self) -> Tensor:  # noqa: D102
        root = linalg.kron(self.basis_row, self.basis_column) - linalg.kron(*self._lagged)
        inverse = torch.linalg.inv(root)
        return (inverse.mT * self.innovation.flatten(-2).unsqueeze(-2)) @ inverse

    def as_prior(self) -> MatrixNormalGaussian:  # noqa: D102
        return self.nearest_matrix_normal()

    def nearest_matrix_normal(self) -> MatrixNormalGaussian:
        """The matrix normal ``q`` nearest in ``KL(q ‖ p)`` to this Gaussian ``p``.

        In the bases the precision is ``I + Σ_{d≥1} (M_Gᵈ ⊗ M_Aᵈ + transposes)``, so that of ``q = MN(0, U, V)``
        ``U⁻¹ = (tr(V) I + Σ_d (M_Gᵈ tr(M_Aᵈ V) + transposes)) / in``, and ``V⁻¹`` likewise, in turns. The series are
        summed in the eigenvectors of ``M``.

        Returns:
            The matrix normal.
        """
        out_features, in_features = self.shape[-2:]
        row_lag, column_lag = _diagonalised(self.lag_row), _diagonalised(self.lag_column)
        identity = torch.eye(in_features, dtype=torch.float64, device=self.innovation.device)
        row, column = alternated(
            lambda column: torch.linalg.inv(_partial_trace(row_lag, column_lag, column) / in_features),
            lambda row: torch.linalg.inv(_partial_trace(column_lag, row_lag, row) / out_features),
            identity.expand(*self.shape[:-2], -1, -1),
            _distance,
        )
        row_root, column_root = (
            basis @ linalg.psd_root(side, ["the nearest matrix normal"]).to(basis)
            for basis, side in ((self.basis_row, row), (self.basis_column, column))
        )
        return MatrixNormalGaussian(linalg.triangular_root(row_root), linalg.triangular_root(column_root))

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {
            "basis_row": self.basis_row,
            "basis_column": self.basis_column,
            "lag_row": self.lag_row,
            "lag_column": self.lag_column,
            "innovation": self.innovation,
            "log_volume": self.log_volume,
        }


def _two_sided_solve(left: Tensor, right: Tensor, value: Tensor) -> Tensor:
    """``L⁻¹ V R⁻ᵀ``."""
    return torch.linalg.solve(right, torch.linalg.solve(left, value).mT).mT


def _diagonalised(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors as columns, and the inverse of these, of a matrix :func:`_nearby`; complex."""
    values, vectors = torch.linalg.eig(_nearby(matrix))
    return values, vectors, torch.linalg.inv(vectors)


def _partial_trace(own: tuple[Tensor, ...], other: tuple[Tensor, ...], covariance: Tensor) -> Tensor:
    """``tr(C) I + Σ_{d≥1} (Lᵈ tr(Rᵈ C) + transposes)`` of diagonalised ``L`` and ``R``."""
    alpha, vectors, inverse = own
    beta, other_vectors, other_inverse = other
    weights = torch.einsum("...ji,...ik,...kj->...j", other_inverse, covariance.to(beta.dtype), other_vectors)
    products = alpha.unsqueeze(-1) * beta.unsqueeze(-2)
    sums = (products / (1 - products) * weights.unsqueeze(-2)).sum(-1)
    lagged = ((vectors * sums.unsqueeze(-2)) @ inverse).real
    return linalg.add_to_diagonal(lagged + lagged.mT, linalg.trace(covariance))


def _distance(before: Tensor, after: Tensor) -> float:
    """The largest relative change of a matrix."""
    return float((torch.linalg.matrix_norm(after - before) / torch.linalg.matrix_norm(after)).max())
