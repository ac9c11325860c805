"""Factorisations of symmetric matrices that do not give up early.

All functions speak stacks of square matrices, ``[..., n, n]``. Kronecker factors are accumulated in float32 and are
often nearly singular, so a factorisation that fails is tried again: with a jitter at rounding level, in float64, and
on the CPU; then it is an error that names whose matrix it was. Matrices of many layers are stacked by shape
(:func:`map_by_shape`), because one batched call on a GPU costs what a single small one does.

A factor that is diagonal is one row, ``[..., 1, n]``, wherever a function says *factor*: a vocabulary of 50,000 words
has no dense one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from bayes_kfac.errors import NotPositiveDefiniteError

BatchedFunction = Callable[..., tuple[Tensor, ...]]


@cache
def algebra_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that curvature and its algebra are in beside weights of a dtype: float32 for those of 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast, where the caller has a region open: factorisations and draws in 16 bits would be others."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def leaving_inference_mode() -> AbstractContextManager[None]:
    """Tensors made inside may be differentiated later, wherever the caller is."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def all_finite(tensors: Collection[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; where none does, one number is read back from the device."""
    sums = [tensor.sum() for tensor in tensors]
    if not sums or math.isfinite(torch.stack(sums).sum()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # sums of what is finite may overflow


def symmetrize(matrix: Tensor) -> Tensor:
    """Return the symmetric part, ``(M + Mᵀ) / 2``."""
    return (matrix + matrix.mT) / 2


def is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is kept as its diagonal ``[..., 1, n]``; for ``n = 1`` the two forms are one."""
    return factor.shape[-2] != factor.shape[-1]


def left_product(factor: Tensor, value: Tensor) -> Tensor:
    """Return ``F V`` for a factor ``F``."""
    return factor.mT * value if is_diagonal(factor) else factor @ value


def right_product(value: Tensor, factor: Tensor) -> Tensor:
    """Return ``V F`` for a factor ``F``."""
    return value * factor if is_diagonal(factor) else value @ factor


def transpose(factor: Tensor) -> Tensor:
    """Return the transpose of a factor."""
    return factor if is_diagonal(factor) else factor.mT


def gram(root: Tensor) -> Tensor:
    """Return ``R Rᵀ`` for a factor ``R``."""
    return root.square() if is_diagonal(root) else root @ root.mT


def congruence(factor: Tensor, root: Tensor) -> Tensor:
    """Return ``Rᵀ F R`` for a factor ``F`` and a factor ``R``; diagonal where both are."""
    if is_diagonal(factor) and is_diagonal(root):
        return factor * root.square()
    inner = dense(factor) if is_diagonal(factor) else factor
    return left_product(transpose(root), right_product(inner, root))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``F R`` for two factors; diagonal where both are."""
    if is_diagonal(right):
        return left * right
    return left_product(left, right)


def left_solve(factor: Tensor, value: Tensor, *, transposed: bool = False) -> Tensor:
    """Return ``L⁻¹ V``, or ``L⁻ᵀ V``, for a lower triangular or diagonal factor ``L``."""
    if is_diagonal(factor):
        return value / factor.mT
    if transposed:
        return torch.linalg.solve_triangular(factor.mT, value, upper=True)
    return torch.linalg.solve_triangular(factor, value, upper=False)


def quotient(left: Tensor, right: Tensor) -> Tensor:
    """Return ``L⁻¹ F`` for two factors, ``L`` lower triangular; diagonal where both are."""
    if is_diagonal(left) and is_diagonal(right):
        return right / left
    return left_solve(left, dense(right))


def diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal of each factor of a stack, ``[..., n]``."""
    return factor.squeeze(-2) if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def dense(factor: Tensor) -> Tensor:
    """Return a factor as matrices ``[..., n, n]``."""
    return torch.diag_embed(factor.squeeze(-2)) if is_diagonal(factor) else factor


def trace(factor: Tensor) -> Tensor:
    """Return the trace of each factor of a stack, ``[...]``."""
    return diagonal(factor).sum(-1)


def add_to_diagonal(factor: Tensor, value: Tensor) -> Tensor:
    """Return ``F + value I`` as a new tensor; ``value`` has the stack's shape ``[...]``."""
    return plus(factor, multiple_of_one(value, factor))


def multiple_of_one(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value I`` as a diagonal factor of a size; ``value`` has the stack's shape ``[...]``."""
    return value[..., None, None].expand(*value.shape, 1, like.shape[-1])


def plus(left: Tensor, right: Tensor) -> Tensor:
    """Return ``F + R`` for two factors as a new tensor, ``R`` diagonal where ``F`` is."""
    if is_diagonal(left) or not is_diagonal(right):
        return left + right
    result = left.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(diagonal(right))
    return result


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of the last two dimensions of two stacks of equal leading shape."""
    product = torch.einsum("...ij,...kl->...ikjl", left, right)
    return product.flatten(-2).flatten(-3, -2)


def cholesky(matrix: Tensor, names: Sequence[str]) -> Tensor:
    """Lower Cholesky factors of symmetric matrices, with retries.

    Args:
        matrix: Symmetric matrices, ``[..., n, n]``.
        names: Who the matrices belong to, for the message; one name for each entry of the first dimension, or one for
            all of them.

    Returns:
        ``L`` with ``L Lᵀ = matrix``, in the dtype and on the device of ``matrix``.

    Raises:
        NotPositiveDefiniteError: If no attempt succeeds.
    """
    for attempt in _attempts(matrix):
        factor, failed = _cholesky(attempt)
        if not failed.any():
            return factor.to(matrix)
    raise NotPositiveDefiniteError(_describe("Cholesky factorisation", matrix, failed, names))


def eigh(matrix: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at zero, and eigenvectors of symmetric positive semi-definite factors, with retries.

    Args:
        matrix: Symmetric factors, ``[..., n, n]`` or ``[..., 1, n]``.
        names: As for :func:`cholesky`.

    Returns:
        Eigenvalues ``[..., n]``, ascending, and eigenvectors ``[..., n, n]`` as columns; of a diagonal factor its
        elements as they stand, and ones ``[..., 1, n]``.

    Raises:
        NotPositiveDefiniteError: If no attempt converges to finite numbers.
    """
    values, vectors = symmetric_eigh(matrix, names)
    return values.clamp(min=0), vectors


def symmetric_eigh(matrix: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """:func:`eigh` of symmetric factors that may be indefinite: eigenvalues are not clamped."""
    if is_diagonal(matrix):
        if not bool(torch.isfinite(matrix).all()):
            raise NotPositiveDefiniteError(_describe("Eigendecomposition", matrix, _non_finite(matrix), names))
        return diagonal(matrix), torch.ones_like(matrix)
    for attempt in _attempts(matrix):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except RuntimeError:  # torch's LinAlgError is one
            continue
        if bool(torch.isfinite(values).all()):
            return values.to(matrix), vectors.to(matrix)
    non_finite = _non_finite(matrix)
    failed = non_finite if bool(non_finite.any()) else torch.ones_like(non_finite)
    raise NotPositiveDefiniteError(_describe("Eigendecomposition", matrix, failed, names))


def inverse_cholesky(precision: Tensor, names: Sequence[str]) -> Tensor:
    """Lower Cholesky factors of the inverses: ``L`` with ``L Lᵀ = precision⁻¹``, never forming an inverse.

    Args:
        precision: Symmetric positive definite factors, ``[..., n, n]`` or ``[..., 1, n]``.
        names: As for :func:`cholesky`.

    Returns:
        ``L``, of the same shape.

    Raises:
        NotPositiveDefiniteError: If a factor is not positive definite.
    """
    if is_diagonal(precision):
        failed = ~((precision > 0) & torch.isfinite(precision)).all(-1).all(-1)
        if bool(failed.any()):
            raise NotPositiveDefiniteError(_describe("Inversion", precision, failed, names))
        return precision.rsqrt()
    return _inverse_transpose(cholesky(precision.flip(-2, -1), names))


def damped_inverse_cholesky(factor: Tensor, names: Sequence[str], damping: Tensor) -> Tensor:
    """:func:`inverse_cholesky` of ``F + D``, where ``F`` is positive semi-definite but for rounding.

    Where rounding outweighs ``D``, what is negative of ``F`` is left out, in float64: ``D`` counts however small it is,
    and no variance is above that of ``D`` alone. So it is where rounding comes near to ``-D``, and variances would be
    above twice that of ``D`` alone.

    Args:
        factor: ``F``, symmetric factors ``[..., n, n]`` or ``[..., 1, n]``.
        names: As for :func:`cholesky`.
        damping: ``D``, positive definite factors, diagonal where ``F`` is.

    Returns:
        ``L`` with ``L Lᵀ = (F + D)⁻¹``, of the shape of ``F``.

    Raises:
        NotPositiveDefiniteError: If ``F`` or ``D`` holds NaN or infinity, or ``D`` is not positive definite.
    """
    precision = plus(factor, damping)
    if is_diagonal(precision):
        return inverse_cholesky(precision, names)
    lower, failed = _cholesky(symmetrize(precision.flip(-2, -1)))
    inverse = _inverse_transpose(lower)
    root = damping.sqrt() if is_diagonal(damping) else cholesky(damping, names)
    failed |= ~(_largest_eigenvalue(left_product(transpose(root), inverse)) <= 2)
    if bool(failed.any()):
        values, vectors = eigh(factor.double(), names)
        lower = _lower(torch.cat([vectors * values.sqrt().unsqueeze(-2), dense(root).double()], dim=-1).flip(-2))
        failed = ~(diagonal(lower) > 0).all(-1)
        if bool(failed.any()):
            raise NotPositiveDefiniteError(_describe("Cholesky factorisation", precision, failed, names))
        inverse = _inverse_transpose(lower)
    return inverse.to(factor)


def psd_root(matrix: Tensor, names: Sequence[str]) -> Tensor:
    """Some ``R`` with ``R Rᵀ = matrix`` of positive semi-definite matrices, which may be singular.

    A Cholesky factor where there is one: of many small matrices on a GPU it costs a fraction of their eigenvectors.

    Args:
        matrix: Symmetric matrices, ``[..., n, n]``.
        names: As for :func:`cholesky`.

    Returns:
        The roots, of the same shape.

    Raises:
        NotPositiveDefiniteError: If a matrix holds NaN or infinity.
    """
    root, info = torch.linalg.cholesky_ex(symmetrize(matrix))
    if not bool((info != 0).any()) and bool(torch.isfinite(root).all()):
        return root
    values, vectors = eigh(matrix, names)
    return vectors * values.sqrt().unsqueeze(-2)


def triangular_root(root: Tensor) -> Tensor:
    """The lower triangular ``L`` with ``L Lᵀ = R Rᵀ`` and a positive diagonal, for a factor ``R``."""
    if is_diagonal(root):
        return root.abs()
    return _lower(root)


def root_of_power(root: Tensor, exponent: float) -> Tensor:
    """Some ``S`` with ``S Sᵀ = (R Rᵀ)^p``, for a factor ``R``."""
    # in float64: small eigenvalues, which a power below 1 raises most, are the rounding of large ones in float32
    values, vectors = eigh(gram(root.double()), ["the block"])
    return (vectors * values.pow(exponent / 2).unsqueeze(-2)).to(root)


def inverse_roots(damped: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[Tensor]:
    """:func:`damped_inverse_cholesky` of factors of many shapes, one call for each shape.

    Args:
        damped: Factors and what is added to them, ``F`` and ``D``, in any order.
        names: One name for each.

    Returns:
        The roots, in the order given.
    """
    factors, dampings = [factor for factor, _ in damped], [damping for _, damping in damped]
    roots = map_by_shape(lambda *stacked: (damped_inverse_cholesky(*stacked),), factors, names, dampings)
    return [root for (root,) in roots]


def map_by_shape(
    function: BatchedFunction, matrices: Sequence[Tensor], names: Sequence[str], *others: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Apply a batched function to matrices of many shapes, one call for each shape.

    Args:
        function: Takes stacked matrices ``[k, ...]``, their names and what else there is, stacked; returns a tuple of
            stacked results.
        matrices: The matrices, in any order.
        names: One name for each matrix.
        *others: More tensors, one for each matrix.

    Returns:
        The tuple of results for each matrix, in the order given.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    arguments = list(zip(matrices, *others, strict=True))
    for index, own in enumerate(arguments):
        groups[tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in own)].append(index)
    results: dict[int, tuple[Tensor, ...]] = {}
    for members in groups.values():
        stacked, *more = (
            tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
            for tensors in zip(*(arguments[index] for index in members), strict=True)
        )
        outputs = function(stacked, [names[index] for index in members], *more)
        for position, index in enumerate(members):
            results[index] = tuple(output[position] for output in outputs)
    return [results[index] for index in range(len(matrices))]


def _non_finite(matrix: Tensor) -> Tensor:
    return ~torch.isfinite(matrix).all(-1).all(-1)


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors, and for which of them there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # LAPACK notices NaN, but an infinite diagonal passes as its own root
    return factor, (info != 0) | factor.diagonal(dim1=-2, dim2=-1).isinf().any(-1)


def _lower(root: Tensor) -> Tensor:
    """:func:`triangular_root` of matrices ``[..., n, k]`` with ``k ≥ n``."""
    lower = torch.linalg.qr(root.mT)[1].mT
    return lower * diagonal(lower).sign().unsqueeze(-2)


def _largest_eigenvalue(root: Tensor) -> Tensor:
    """That of ``R Rᵀ``, from below, near where it stands out: three power steps from the largest of its diagonal."""
    largest = root.square().sum(-1).argmax(-1, keepdim=True)
    vector = torch.zeros_like(root[..., 0]).scatter_(-1, largest, 1.0).unsqueeze(-1)
    for _ in range(3):
        vector = torch.nn.functional.normalize(root @ (root.mT @ vector), dim=-2)
    return (root.mT @ vector).square().sum((-2, -1))


def _inverse_transpose(lower: Tensor) -> Tensor:
    """The lower root of ``P⁻¹`` from that of ``P`` with its rows and columns reversed."""
    # reversed again it is an upper triangular T with T Tᵀ = P, whose inverse transpose is lower triangular
    upper = lower.flip(-2, -1)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper.mT, identity.expand_as(upper), upper=False)


def _attempts(matrix: Tensor) -> Iterator[Tensor]:
    """The same matrices, each time easier to factorise."""
    symmetric = symmetrize(matrix)
    yield symmetric
    size = matrix.shape[-1]
    jitter = size * torch.finfo(matrix.dtype).eps * trace(symmetric).abs() / size
    yield add_to_diagonal(symmetric, jitter)
    double = symmetrize(matrix.double())
    yield double
    yield add_to_diagonal(double, jitter.double())
    if matrix.device.type != "cpu":
        yield add_to_diagonal(double.cpu(), jitter.double().cpu())


def _describe(what: str, matrix: Tensor, failed: Tensor, names: Sequence[str]) -> str:
    flat = (
        failed.reshape(len(names), -1).any(dim=1) if len(names) == matrix.shape[0] else failed.any().expand(len(names))
    )
    culprits = ", ".join(repr(name) for name, bad in zip(names, flat.tolist(), strict=True) if bad)
    if not bool(torch.isfinite(matrix).all()):
        return f"{what} failed for {culprits}: the matrix holds NaN or infinity. Check the data and the learning rate."
    return (
        f"{what} failed for {culprits} in {matrix.dtype}, with jitter, and in float64: the matrix of shape "
        f"{tuple(matrix.shape)} is not positive definite (its smallest diagonal element is "
        f"{diagonal(matrix).min().item():.3g}). Raise prior_precision or extrinsic_damping."
    )
