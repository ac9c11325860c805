"""The matrix-variate normal distribution, and its Kullback–Leibler divergences in closed form.

A sample is a matrix ``X = loc + L_row E L_columnᵀ`` of shape ``[..., n, p]``, with ``E`` standard normal,
``U = L_row L_rowᵀ`` the covariance among rows, ``[..., n, n]``, and ``V = L_column L_columnᵀ`` that among columns,
``[..., p, p]``. Read row by row, its covariance is ``cov(vec X) = U ⊗ V``. Nothing but :attr:`covariance_matrix
<MatrixNormal.covariance_matrix>` ever forms that ``np × np`` matrix, and nothing forms an inverse: densities and
divergences go through triangular solves with the two factors.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl
from torch.types import _size

from bayes_kfac.errors import ArgumentError
from bayes_kfac.linalg import cholesky, inverse_cholesky, kron

_REAL_MATRIX = constraints.independent(constraints.real, 2)


class MatrixNormal(TorchDistribution):
    """Normal distribution over ``n × p`` matrices whose covariance is a Kronecker product.

    Batch shapes broadcast. Samples are reparameterised, and gradients flow to all three arguments.

    Args:
        loc: Mean, ``[..., n, p]``.
        scale_tril_row: Lower Cholesky factor of the row covariance ``U``, ``[..., n, n]``.
        scale_tril_column: Lower Cholesky factor of the column covariance ``V``, ``[..., p, p]``.
        validate_args: Whether to check values, here and in :meth:`log_prob`; by default what PyTorch is set to. Shapes
            are always checked.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit each other.
        ValueError: If a factor is not lower triangular with a positive diagonal.

    Example:
        >>> import torch
        >>> from bayes_kfac.distributions import MatrixNormal
        >>> U, V = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), 2 * torch.eye(3)
        >>> q = MatrixNormal(torch.zeros(2, 3), torch.linalg.cholesky(U), torch.linalg.cholesky(V))
        >>> q.rsample((10,)).shape, torch.allclose(q.covariance_matrix, torch.kron(U, V))
        (torch.Size([10, 2, 3]), True)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": _REAL_MATRIX,
        "scale_tril_row": constraints.lower_cholesky,
        "scale_tril_column": constraints.lower_cholesky,
    }
    support = _REAL_MATRIX
    has_rsample = True

    loc: Tensor
    scale_tril_row: Tensor
    scale_tril_column: Tensor

    def __init__(
        self,
        loc: Tensor,
        scale_tril_row: Tensor,
        scale_tril_column: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        batch_shape = _check_shapes(loc, scale_tril_row=scale_tril_row, scale_tril_column=scale_tril_column)
        self._hold(batch_shape, loc, scale_tril_row, scale_tril_column)
        super().__init__(batch_shape, loc.shape[-2:], validate_args=validate_args)

    @classmethod
    def from_covariance(
        cls,
        loc: Tensor,
        covariance_row: Tensor,
        covariance_column: Tensor,
        validate_args: bool | None = None,
    ) -> Self:
        """Make the distribution from its two covariances.

        A matrix that is singular by no more than rounding is factorised with a jitter of that size.

        Args:
            loc: Mean, ``[..., n, p]``.
            covariance_row: Covariance ``U`` among rows, ``[..., n, n]``.
            covariance_column: Covariance ``V`` among columns, ``[..., p, p]``.
            validate_args: As for the class.

        Returns:
            The distribution with ``cov(vec X) = U ⊗ V``.
        """
        _check_shapes(loc, covariance_row=covariance_row, covariance_column=covariance_column)
        _check_symmetric(covariance_row=covariance_row, covariance_column=covariance_column)
        row = cholesky(covariance_row, ["covariance_row"])
        column = cholesky(covariance_column, ["covariance_column"])
        return cls(loc, row, column, validate_args)

    @classmethod
    def from_precision(
        cls,
        loc: Tensor,
        precision_row: Tensor,
        precision_column: Tensor,
        validate_args: bool | None = None,
    ) -> Self:
        """Make the distribution from its two precisions, the inverse covariances.

        A matrix that is singular by no more than rounding is factorised with a jitter of that size.

        Args:
            loc: Mean, ``[..., n, p]``.
            precision_row: Precision ``U⁻¹`` among rows, ``[..., n, n]``.
            precision_column: Precision ``V⁻¹`` among columns, ``[..., p, p]``.
            validate_args: As for the class.

        Returns:
            The distribution with ``cov(vec X) = U ⊗ V``.
        """
        _check_shapes(loc, precision_row=precision_row, precision_column=precision_column)
        _check_symmetric(precision_row=precision_row, precision_column=precision_column)
        row = inverse_cholesky(precision_row, ["precision_row"])
        column = inverse_cholesky(precision_column, ["precision_column"])
        return cls(loc, row, column, validate_args)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the distribution with its batch dimensions expanded, sharing memory.

        Args:
            batch_shape: The new batch shape.
            _instance: The instance to fill in, where a subclass overrides this method.

        Returns:
            The expanded distribution.
        """
        new: Self = self._get_checked_instance(MatrixNormal, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new._hold(batch_shape, self.loc, self._row, self._column)
        super(MatrixNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draw reparameterised samples.

        Args:
            sample_shape: Shape of the independent draws.

        Returns:
            Samples, ``[*sample_shape, *batch_shape, n, p]``.
        """
        shape = self._extended_shape(sample_shape)
        return self._transform(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of matrices.

        Args:
            value: Matrices, ``[..., n, p]``, whose leading dimensions broadcast with the batch shape.

        Returns:
            Log densities, ``[...]``.
        """
        if self._validate_args:
            self._validate_sample(value)
        distance = self._whiten(value).square().sum((-2, -1))
        return -0.5 * (distance + self.event_shape.numel() * math.log(2 * math.pi)) - self._half_log_det()

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats, ``[*batch_shape]``."""
        entropy = 0.5 * self.event_shape.numel() * (1 + math.log(2 * math.pi)) + self._half_log_det()
        return entropy.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Mean, ``[*batch_shape, n, p]``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """Mode, which is the mean, ``[*batch_shape, n, p]``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each element, ``U_ii V_jj``, ``[*batch_shape, n, p]``."""
        variance = _outer(self._row.square().sum(-1), self._column.square().sum(-1))
        return variance.expand_as(self.loc)

    @property
    def covariance_matrix_row(self) -> Tensor:
        """Covariance ``U`` among rows, ``[*batch_shape, n, n]``."""
        return (self._row @ self._row.mT).expand_as(self.scale_tril_row)

    @property
    def covariance_matrix_column(self) -> Tensor:
        """Covariance ``V`` among columns, ``[*batch_shape, p, p]``."""
        return (self._column @ self._column.mT).expand_as(self.scale_tril_column)

    @property
    def covariance_matrix(self) -> Tensor:
        """Dense ``cov(vec X) = U ⊗ V`` of the rows laid end to end, ``[*batch_shape, np, np]``; for small matrices."""
        return kron(self.covariance_matrix_row, self.covariance_matrix_column)

    def _hold(self, batch_shape: torch.Size, loc: Tensor, row: Tensor, column: Tensor) -> None:
        """Keep the parameters as views of the batch shape, and the factors also as given, to compute with."""
        self.loc = loc.expand(batch_shape + loc.shape[-2:])
        self.scale_tril_row = row.expand(batch_shape + row.shape[-2:])
        self.scale_tril_column = column.expand(batch_shape + column.shape[-2:])
        self._row, self._column = row, column

    def _transform(self, eps: Tensor) -> Tensor:
        """Return the samples that standard normal matrices map to."""
        return self.loc + self._row @ eps @ self._column.mT

    def _whiten(self, value: Tensor) -> Tensor:
        """Return the standard normal matrices that samples come from."""
        return _solve(self._column, _solve(self._row, value - self.loc).mT).mT

    def _half_log_det(self) -> Tensor:
        """Return half the log determinant of ``U ⊗ V``, without batch dimensions that the factors lack."""
        rows, columns = self.event_shape
        log_row, log_column = (factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) for factor in (self._row, self._column))
        return columns * log_row + rows * log_column


@register_kl(MatrixNormal, MatrixNormal)  # type: ignore[untyped-decorator]
def _kl_matrix_normal_matrix_normal(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    _check_same_event("MatrixNormal", p.event_shape, q.event_shape)
    # The affine map that makes q standard normal leaves the divergence as it is.
    row, column = _solve(q._row, p._row), _solve(q._column, p._column)
    return _kl_to_diagonal(q._whiten(p.loc), row, column, scale=p.loc.new_ones(()))


@register_kl(MatrixNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_matrix_normal_independent(p: MatrixNormal, q: Independent[Normal]) -> Tensor:
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 2:
        raise ArgumentError(
            f"KL(MatrixNormal || q) got q={q!r} of event shape {tuple(q.event_shape)}. Allowed: a MatrixNormal, or a "
            "Normal with two event dimensions, such as Normal(loc, scale).to_event(2)."
        )
    _check_same_event("Normal", p.event_shape, q.event_shape)
    return _kl_to_diagonal(p.loc - q.base_dist.loc, p._row, p._column, q.base_dist.scale)


def _kl_to_diagonal(deviation: Tensor, row: Tensor, column: Tensor, scale: Tensor) -> Tensor:
    """Divergence of a matrix normal from independent normals.

    The textbook form subtracts ``np`` and a log determinant from a trace, and loses all digits where the two
    distributions are close. Here the trace is split by the triangular factors: their diagonals pair off with the log
    determinant in ``exp(t) - 1 - t``, the rest is squares, and a sum without negative terms loses nothing.

    Args:
        deviation: Difference of the means, ``[..., n, p]``.
        row: Lower Cholesky factor of ``U``, ``[..., n, n]``.
        column: Lower Cholesky factor of ``V``, ``[..., p, p]``.
        scale: Standard deviations of the independent normals, broadcastable to ``[..., n, p]``.

    Returns:
        The divergence in nats, ``[...]``.
    """
    row_diagonal, column_diagonal = row.diagonal(dim1=-2, dim2=-1), column.diagonal(dim1=-2, dim2=-1)
    row_rest, column_rest = row.tril(-1).square().sum(-1), column.tril(-1).square().sum(-1)
    log_ratio = 2 * (row_diagonal.log().unsqueeze(-1) + column_diagonal.log().unsqueeze(-2) - scale.log())
    # U_ii V_jj less the product of the squared diagonals
    rest = _outer(row_rest, column_diagonal.square() + column_rest) + _outer(row_diagonal.square(), column_rest)
    terms = log_ratio.expm1() - log_ratio + (rest + deviation.square()) / scale.square()
    return 0.5 * terms.sum((-2, -1))


def _outer(row: Tensor, column: Tensor) -> Tensor:
    """Return outer products of stacked vectors, ``[..., n], [..., p] -> [..., n, p]``."""
    return row.unsqueeze(-1) * column.unsqueeze(-2)


def _solve(tril: Tensor, rhs: Tensor) -> Tensor:
    """Return ``L⁻¹ B``; leading dimensions of ``B`` that ``L`` lacks become columns, so that ``L`` is not copied."""
    extra = rhs.dim() - tril.dim()
    if extra > 0:
        columns = rhs.flatten(0, extra - 1).movedim(0, -1)
        stacked = _solve(tril, columns.flatten(-2))
        stacked = stacked.reshape(stacked.shape[:-1] + columns.shape[-2:]).movedim(-1, 0)
        return stacked.reshape(rhs.shape[:extra] + stacked.shape[1:])
    solved: Tensor = torch.linalg.solve_triangular(tril, rhs, upper=False)
    return solved


def _check_shapes(loc: Tensor, **factors: Tensor) -> torch.Size:
    """Check a mean ``[..., n, p]`` against the matrices of its rows and of its columns, in this order.

    Args:
        loc: The mean.
        **factors: The matrices, ``[..., n, n]`` and ``[..., p, p]``, by argument name.

    Returns:
        The batch shape.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit each other.
    """
    if loc.dim() < 2 or 0 in loc.shape[-2:]:
        raise ArgumentError(f"loc has shape {tuple(loc.shape)}. Allowed: [..., n, p] with n, p >= 1.")
    for (name, factor), size, axis in zip(factors.items(), loc.shape[-2:], ("rows", "columns"), strict=True):
        if factor.shape[-2:] != (size, size):
            raise ArgumentError(
                f"{name} has shape {tuple(factor.shape)}, but loc of shape {tuple(loc.shape)} has {size} {axis}. "
                f"Allowed: [..., {size}, {size}]."
            )
        if (factor.dtype, factor.device) != (loc.dtype, loc.device):
            raise ArgumentError(
                f"{name} is {factor.dtype} on {factor.device}, but loc is {loc.dtype} on {loc.device}. "
                "Allowed: the same dtype and device for all arguments."
            )
    arguments = {"loc": loc, **factors}
    try:
        return torch.Size(torch.broadcast_shapes(*(value.shape[:-2] for value in arguments.values())))
    except RuntimeError as error:
        described = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arguments.items())
        raise ArgumentError(
            f"Batch shapes do not broadcast: {described}. Allowed: leading dimensions, before the last two, that are "
            "equal, 1 or absent."
        ) from error


def _check_symmetric(**matrices: Tensor) -> None:
    """Check that matrices are symmetric up to rounding.

    Args:
        **matrices: The matrices, ``[..., n, n]``, by argument name.

    Raises:
        ArgumentError: If one is not, or holds NaN or infinity.
    """
    for name, matrix in matrices.items():
        asymmetry = (matrix - matrix.mT).abs().amax((-2, -1))
        if not bool((asymmetry <= math.sqrt(torch.finfo(matrix.dtype).eps) * matrix.abs().amax((-2, -1))).all()):
            raise ArgumentError(
                f"{name} of shape {tuple(matrix.shape)} is not symmetric and finite: it differs from its transpose by "
                f"up to {asymmetry.max().item():.3g}. Allowed: symmetric positive definite matrices."
            )


def _check_same_event(name: str, p: torch.Size, q: torch.Size) -> None:
    """Check that the distributions of a divergence are over matrices of the same shape.

    Args:
        name: The second distribution's name, for the message.
        p: Event shape of the first.
        q: Event shape of the second.

    Raises:
        ArgumentError: If the shapes differ.
    """
    if p != q:
        raise ArgumentError(
            f"KL(MatrixNormal || {name}) got event shapes {tuple(p)} and {tuple(q)}. Allowed: the same event shape."
        )
