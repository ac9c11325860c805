"""The three ways in which a prior ``δ I`` enters the precision of ``F̄ ≈ G ⊗ A``: ``P = (N/τ) (G ⊗ A + γ I)``.

With ``γ = τδ/N``:

``factored``: ``(G + √γ/π I) ⊗ (A + π√γ I)`` with ``π² = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015; the
noisy K-FAC paper's posterior). A matrix normal by two Cholesky factorisations, but its cross terms make it narrower
than the damped product: it loses 15-50 % of the marginal variance where the prior matters.

``optimal``: the matrix normal nearest to ``G ⊗ A + γ I`` in ``KL(q ‖ p)``, which is where the evidence lower bound
itself has its optimum. ``U`` and ``V`` solve ``U⁻¹ = (tr(AV) G + γ tr(V) I) / in`` and
``V⁻¹ = (tr(GU) A + γ tr(U) I) / out``: ``U⁻¹ ∝ G + r I`` and ``V⁻¹ ∝ A + s I``, with ``r = γ tr(V) / tr(AV)`` and
``s = γ tr(U) / tr(GU)``, one equation for one number. In training they follow the factors by turns.

``exact``: ``G ⊗ A + γ I`` itself, in its eigenbasis; not a matrix normal.

Any prior ``R ⊗ S`` is made white first: ``G`` and ``A`` are taken in the coordinates of its roots, where its precision
is ``I`` and ``γ = τ/N``, and the result is brought back. So the posterior of an earlier task, or a precision of its own
for the bias, enters as ``δ I`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.structures.base import BlockGaussian, BlockSpec
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: A factor and what is added to it.
Damped = tuple[Tensor, Tensor]
#: Those of the rows and of the columns of a covariance.
Roots = tuple[Tensor, Tensor]

#: Halvings of the interval of ``log r``, which is some tens wide: to the rounding of float64.
HALVINGS = 60
#: How many times its rounding a trace has to be to go by it.
CERTAIN = 100
#: Between two refreshes in training the factors move little: a few sweeps from the last roots follow them.
WARM_SWEEPS = 2


@dataclass(frozen=True)
class WhiteBlock:
    """A block whose Fisher is ``G ⊗ A``, in the coordinates in which its prior is white: ``W = R_row W' R_columnᵀ``.

    Attributes:
        spec: The block.
        A: The input factor there.
        G: The gradient factor there.
        row_root: ``R_row``, a factor; with ``column_root`` a root of the prior's covariance.
        column_root: ``R_column``.
    """

    spec: BlockSpec
    A: Tensor
    G: Tensor
    row_root: Tensor
    column_root: Tensor

    @classmethod
    def of(cls, spec: BlockSpec, A: Tensor, G: Tensor, *, structure: str) -> WhiteBlock:
        """The block of a spec, whose factors are these in the weights' own coordinates.

        Args:
            spec: The block.
            A: The input factor.
            G: The gradient factor.
            structure: The structure's name, for messages.

        Returns:
            The block.

        Raises:
            ArgumentError: If the prior is no Kronecker product.
        """
        row_root, column_root = _prior_roots(spec, A, G, structure)
        return cls(spec, linalg.congruence(A, column_root), linalg.congruence(G, row_root), row_root, column_root)

    @property
    def gamma(self) -> Tensor:
        """``γ``: the prior's precision over the data's scale."""
        return self.A.new_tensor(1 / self.spec.data_scale)

    def spectrum(self) -> Tensor:
        """The eigenvalues of ``G ⊗ A``, ``[*blocks, out, in]``."""
        d_A, _ = linalg.eigh(self.A, [self.spec.name])
        d_G, _ = linalg.eigh(self.G, [self.spec.name])
        return d_G.unsqueeze(-1) * d_A.unsqueeze(-2)


def damped(blocks: Sequence[WhiteBlock], damping: str) -> list[BlockGaussian]:
    """The Gaussians of blocks with their priors.

    Args:
        blocks: The blocks.
        damping: One of ``bayes_kfac.structures.DAMPING_KINDS``.

    Returns:
        One Gaussian for each.
    """
    return list(_BUILDERS[damping](blocks))


def _prior_roots(spec: BlockSpec, A: Tensor, G: Tensor, structure: str) -> tuple[Tensor, Tensor]:
    """Roots of the prior's covariance on the two sides of a block, as factors."""
    prior = spec.prior
    if isinstance(prior, MatrixNormalGaussian):
        return prior.scale_tril_row, prior.scale_tril_column
    ones = G.new_ones(*G.shape[:-2], 1, G.shape[-1])
    if isinstance(prior, BlockGaussian):
        raise spec.refuse_prior(
            structure, "a posterior with damping='factored' or 'optimal', or Posterior.nearest_matrix_normal() of it"
        )
    precision = torch.as_tensor(prior, dtype=A.dtype, device=A.device)
    if precision.ndim > 1 and not bool((precision == precision[..., :1, :]).all()):
        raise spec.refuse_prior(structure, "one precision for each column of a block, or structure='diagonal'")
    by_column = precision[..., :1, :] if precision.ndim > 1 else precision
    return ones, by_column.rsqrt().expand(*A.shape[:-2], 1, A.shape[-1])


def _factored(blocks: Sequence[WhiteBlock]) -> list[MatrixNormalGaussian]:
    return _matrix_normals(blocks, *_factored_roots(blocks))


def _factored_roots(blocks: Sequence[WhiteBlock]) -> tuple[list[Tensor], list[Tensor]]:
    rows, columns = zip(*map(factored_sides, blocks), strict=True) if blocks else ((), ())
    return _inverse_roots(rows, blocks), _inverse_roots(columns, blocks)


def factored_sides(block: WhiteBlock) -> tuple[Damped, Damped]:
    """The damped factors ``G + √γ/π I`` and ``A + π√γ I`` of a block, in white coordinates, as the terms of each."""
    pi, A, G = _pi(block.A, block.G)
    root = block.gamma.sqrt()
    return (G, linalg.multiple_of_one(root / pi, G)), (A, linalg.multiple_of_one(root * pi, A))


def _optimal(blocks: Sequence[WhiteBlock]) -> list[MatrixNormalGaussian]:
    roots = dict(enumerate(_followed(blocks)))
    afresh = [i for i, pair in roots.items() if pair is None]
    roots |= zip(afresh, _optimum([blocks[i] for i in afresh]), strict=True)
    pairs = [pair for pair in roots.values() if pair is not None]
    return _matrix_normals(blocks, [row for row, _ in pairs], [column for _, column in pairs])


def _followed(blocks: Sequence[WhiteBlock]) -> list[Roots | None]:
    """The roots a few sweeps on from earlier ones; ``None`` where there are none, or all that is known is rounding."""
    before = {i: _earlier_column(block) for i, block in enumerate(blocks)}
    columns = {i: _of_norm_one(root) for i, root in before.items() if root is not None}
    rows: dict[int, Tensor] = {}
    for _ in range(WARM_SWEEPS):
        rows = _given(columns, blocks, lambda block: (block.G, block.A))
        columns = _given(rows, blocks, lambda block: (block.A, block.G))
    return [(rows[i], columns[i]) if i in columns else None for i in range(len(blocks))]


def _earlier_column(block: WhiteBlock) -> Tensor | None:
    """The column root of an earlier Gaussian of this form, in white coordinates."""
    earlier = block.spec.previous
    if not isinstance(earlier, MatrixNormalGaussian):
        return None
    return linalg.quotient(block.column_root, earlier.scale_tril_column)


def _given(
    roots: Mapping[int, Tensor], blocks: Sequence[WhiteBlock], factors: Callable[[WhiteBlock], tuple[Tensor, Tensor]]
) -> dict[int, Tensor]:
    """The roots of one side given the other's, of the blocks where the other side's trace is more than rounding."""
    sides = {i: _side(*factors(blocks[i]), root, blocks[i].gamma) for i, root in roots.items()}
    known = {i: side for i, side in sides.items() if side is not None}
    return dict(zip(known, _inverse_roots(list(known.values()), [blocks[i] for i in known]), strict=True))


def _optimum(blocks: Sequence[WhiteBlock]) -> list[Roots]:
    """The roots at the optimum, from scratch."""
    names = [block.spec.name for block in blocks]
    # in float64: what is small beside the largest eigenvalues decides where data are few
    columns_of = linalg.map_by_shape(linalg.eigh, [block.A.double() for block in blocks], names)
    rows_of = linalg.map_by_shape(linalg.eigh, [block.G.double() for block in blocks], names)
    roots = []
    for block, (d_G, Q_G), (d_A, Q_A) in zip(blocks, rows_of, columns_of, strict=True):
        spectra = zip((Q_G, Q_A), optimal_spectra(d_G, d_A, block.gamma), strict=True)
        row, column = (linalg.triangular_root(Q * values.sqrt().unsqueeze(-2)).to(block.A) for Q, values in spectra)
        roots.append((row, column))
    return roots


def optimal_spectra(
    d_G: Tensor, d_A: Tensor, gamma: Tensor, *, n_G: Tensor | None = None, n_A: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The eigenvalues of the optimal ``U`` and ``V``, which have the eigenvectors of ``G`` and ``A``, in float64.

    Of ``r`` and ``s`` each falls as the other grows, so that ``r`` is a function of itself that grows, and it crosses
    the identity once: by halving.

    Args:
        d_G: The eigenvalues of ``G``, ``[*blocks, out]``.
        d_A: Those of ``A``, ``[*blocks, in]``.
        gamma: ``γ``, scalar.
        n_G: How many dimensions each of them has; one by default.
        n_A: The same for ``A``.

    Returns:
        Those of ``U`` and ``V``; where a factor is zero the prior's.
    """
    d_G, d_A, gamma = d_G.double(), d_A.double(), gamma.double()
    n_G, n_A = (
        torch.ones_like(values) if count is None else count.double() for values, count in ((d_G, n_G), (d_A, n_A))
    )
    size_G, size_A = n_G.sum(-1, keepdim=True), n_A.sum(-1, keepdim=True)
    alive = ((n_G * d_G).sum(-1, keepdim=True) > 0) & ((n_A * d_A).sum(-1, keepdim=True) > 0)
    d_G, d_A = (torch.where(alive, values, torch.ones_like(values)) for values in (d_G, d_A))

    def other(count: Tensor, values: Tensor, shift: Tensor) -> Tensor:
        """``γ tr(V) / tr(AV)`` for ``V⁻¹ ∝ A + shift I``."""
        weights = count / (values + shift)
        return gamma * weights.sum(-1, keepdim=True) / (weights * values).sum(-1, keepdim=True)

    lower = (gamma * size_A / (n_A * d_A).sum(-1, keepdim=True)).log()
    upper = other(n_A, d_A, gamma * size_G / (n_G * d_G).sum(-1, keepdim=True)).log()
    for _ in range(HALVINGS):
        middle = (lower + upper) / 2
        below = other(n_A, d_A, other(n_G, d_G, middle.exp())).log() > middle
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    V = 1 / (d_A + other(n_G, d_G, lower.exp()))
    U = size_A / ((n_A * d_A * V).sum(-1, keepdim=True) * d_G + gamma * (n_A * V).sum(-1, keepdim=True))
    U, V = torch.where(alive, U, torch.ones_like(U)), torch.where(alive, V, 1 / gamma)
    balance = (U.amax(-1, keepdim=True) / V.amax(-1, keepdim=True)).sqrt()  # in float32 one alone may be out of range
    return U / balance, V * balance


def _exact(blocks: Sequence[WhiteBlock]) -> list[KroneckerEigenGaussian]:
    names = [block.spec.name for block in blocks]
    columns = linalg.map_by_shape(linalg.eigh, [block.A for block in blocks], names)
    rows = linalg.map_by_shape(linalg.eigh, [block.G for block in blocks], names)
    return [
        KroneckerEigenGaussian(
            linalg.product(block.row_root, Q_G),
            linalg.product(block.column_root, Q_A),
            block.spec.data_scale * d_G.unsqueeze(-1) * d_A.unsqueeze(-2) + 1,
            Q_A.shape[-1] * _log_det(block.row_root) + Q_G.shape[-1] * _log_det(block.column_root),
        )
        for block, (d_G, Q_G), (d_A, Q_A) in zip(blocks, rows, columns, strict=True)
    ]


_BUILDERS: dict[str, Callable[[Sequence[WhiteBlock]], Sequence[BlockGaussian]]] = {
    "factored": _factored,
    "optimal": _optimal,
    "exact": _exact,
}


def _matrix_normals(
    blocks: Sequence[WhiteBlock], rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> list[MatrixNormalGaussian]:
    """The matrix normals with these roots of ``(P / data_scale)⁻¹`` in white coordinates, in the weights' own."""
    return [
        MatrixNormalGaussian(
            linalg.product(block.row_root, row / block.spec.data_scale**0.5), linalg.product(block.column_root, column)
        )
        for block, row, column in zip(blocks, rows, columns, strict=True)
    ]


def _pi(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the damping splits, the root of the ratio of mean eigenvalues, and the factors to damp."""
    # where one factor is zero (no gradient reaches the layer) the Fisher is too: with both at zero and π = 1 the damped
    # product is the prior's
    mean_A, mean_G = linalg.trace(A) / A.shape[-1], linalg.trace(G) / G.shape[-1]
    alive = (mean_A > 0) & (mean_G > 0)
    pi = torch.where(alive, mean_A.sqrt() / mean_G.sqrt(), torch.ones_like(mean_A))  # whose square may overflow
    return pi, A * alive[..., None, None], G * alive[..., None, None]


def _side(own: Tensor, other: Tensor, other_root: Tensor, gamma: Tensor) -> Damped | None:
    """The terms of ``(tr(other C) own + γ tr(C) I) / dim``, ``C`` the other side's covariance; ``None`` if rounding."""
    covariance = linalg.gram(other_root)
    dim = other.shape[-1]
    trace = (other * covariance).sum((-2, -1))
    # a singular factor is indefinite by its own rounding, and there the covariance is largest
    rounding = (linalg.diagonal(other) * linalg.diagonal(covariance)).sum(-1) * torch.finfo(trace.dtype).eps
    if not bool((trace >= CERTAIN * rounding).all()):
        return None
    return own * (trace / dim)[..., None, None], linalg.multiple_of_one(gamma * linalg.trace(covariance) / dim, own)


def _of_norm_one(root: Tensor) -> Tensor:
    """The root at a scale of its own: where rounding is large, one side's would grow and the other's shrink."""
    return root / torch.linalg.matrix_norm(root, keepdim=True)


def _inverse_roots(damped: Sequence[Damped], blocks: Sequence[WhiteBlock]) -> list[Tensor]:
    return linalg.inverse_roots(damped, [block.spec.name for block in blocks])


def _log_det(root: Tensor) -> Tensor:
    return linalg.diagonal(root).log().sum(-1)
