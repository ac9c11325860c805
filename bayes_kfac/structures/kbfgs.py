"""K-BFGS: K-FAC's factored posterior, whose covariance roots follow by quasi-Newton updates of low rank.

Of ``(G + √γ/π I) ⊗ (A + π√γ I)`` each side ``P`` has an inverse ``H = L Lᵀ``, which the BFGS update

    ``H⁺ = S D⁻¹ Sᵀ + (I − S D⁻¹ Yᵀ) H (I − Y D⁻¹ Sᵀ)``,  ``Y = P S``, ``D = Sᵀ Y``,

makes right in the directions ``S``: ``H⁺ Y = S``; with one of them it is the textbook's. There is nothing to sample
here, as ``P`` is known: the update is BFGS by the action of the Hessian (Goldfarb, Ren & Bahamou 2020, on the input
side), and on the output side, where they take pairs of a step's differences, that of the Fisher's factor. In the root's
coordinates, ``S = L X`` with orthonormal ``X``, the root itself has an update of low rank (Gower & Richtárik 2017),

    ``L⁺ = L + S (R⁻ᵀ Xᵀ − D⁻¹ Yᵀ L)``,  ``D = R Rᵀ``,  ``log det L⁺ = log det L − ½ log det D``,

so that samples and the log determinant need no factorisation larger than ``D``. The directions are those where the root
is most wrong, of ``Lᵀ P L − I``, by two steps of subspace iteration; before, the root takes its best scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import check_count
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register
from bayes_kfac.structures.damping import WhiteBlock, factored_sides
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian

#: Steps of the subspace iteration for the directions.
SUBSPACE_STEPS = 2


@register("kbfgs")
class KBFGSStructure(KroneckerStructure):
    """K-FAC's factored posterior by BFGS updates of its roots.

    From scratch the roots are exact; a refresh that starts from an earlier one updates them.

    Args:
        damping: Not used: the prior enters as ``"factored"``.
        sharing: How positions that share weights are summed.
        directions: The rank of an update.
    """

    card = Card(
        formula="F ≈ G ⊗ A; covariance L_G L_Gᵀ ⊗ L_A L_Aᵀ, L ← L + S (R⁻ᵀ Xᵀ − D⁻¹ Yᵀ L)",
        captures="What kron with damping='factored' does: exactly in a fit and in the posterior that training gives; "
        "between refreshes of training it follows where it is most wrong.",
        use="Training of wide layers, whose factorisations take longer than everything else.",
        cost="Statistics n (in² + out²); refresh k (in² + out²) for k directions; sample or solve in·out (in + out); "
        "memory in² + out².",
        source="Goldfarb, Ren & Bahamou 2020 (K-BFGS); Gower & Richtárik 2017 (the root).",
    )

    def __init__(self, *, damping: str = "factored", sharing: str = "expand", directions: int = 16) -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "factored"
        self.directions = check_count("directions", directions)

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"directions": self.directions}

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        blocks = [self._white(spec) for spec in specs]
        afresh = [not _is_followed(block) for block in blocks]
        exact = iter(_exact([block for block, new in zip(blocks, afresh, strict=True) if new]))
        return [next(exact) if new else self._followed(block) for block, new in zip(blocks, afresh, strict=True)]

    def _followed(self, block: WhiteBlock) -> KroneckerEigenGaussian:
        """The Gaussian whose roots are those of the earlier one, updated."""
        before = block.spec.previous
        assert isinstance(before, KroneckerEigenGaussian)
        G, A = (linalg.plus(*side) for side in factored_sides(block))
        row, by_row = self._updated(linalg.quotient(block.row_root, before.basis_row), G, block.spec.name)
        column, by_column = self._updated(linalg.quotient(block.column_root, before.basis_column), A, block.spec.name)
        volume = before.log_volume + column.shape[-1] * by_row + row.shape[-1] * by_column
        return _gaussian(block, row, column, volume)

    def _updated(self, root: Tensor, precision: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """A root nearer to the inverse root of a precision, and how its log determinant changed."""
        if linalg.is_diagonal(precision):
            exact = linalg.inverse_cholesky(precision, [name])
            return exact, (exact / root).log().sum((-2, -1))
        size = precision.shape[-1]
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(size, min(self.directions, size), generator=generator, dtype=torch.float64).to(root)
        X = torch.linalg.qr(X.expand(*root.shape[:-2], *X.shape))[0]
        mean = (X * _in_coordinates(precision, root, X)).sum((-2, -1)) / X.shape[-1]
        root = root * mean.rsqrt()[..., None, None]
        for _ in range(SUBSPACE_STEPS):
            X = torch.linalg.qr(X - _in_coordinates(precision, root, X))[0]
        root, change = bfgs_root(root, precision, X, name)
        return root, change - size / 2 * mean.log()


def bfgs_root(root: Tensor, precision: Tensor, X: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The root of the BFGS update of ``L Lᵀ`` towards ``P⁻¹`` along ``L X``.

    Args:
        root: ``L``, ``[..., n, n]``.
        precision: ``P``, ``[..., n, n]``.
        X: Orthonormal columns, ``[..., n, k]``.
        name: The layer's name, for messages.

    Returns:
        ``L⁺`` and ``log det L⁺ − log det L``, ``[...]``.
    """
    S = root @ X
    Y = precision @ S
    R = linalg.cholesky(S.mT @ Y, [name])
    change = torch.linalg.solve_triangular(R.mT, X.mT, upper=True) - torch.cholesky_solve(Y.mT @ root, R)
    return root + S @ change, -linalg.diagonal(R).log().sum(-1)


def _in_coordinates(precision: Tensor, root: Tensor, X: Tensor) -> Tensor:
    """``Lᵀ P L X``."""
    return root.mT @ (precision @ (root @ X))


def _is_followed(block: WhiteBlock) -> bool:
    """Whether there is an earlier Gaussian of this structure to start from: a matrix normal, of the same form."""
    before = block.spec.previous
    return (
        isinstance(before, KroneckerEigenGaussian)
        and (before.basis_row.shape, before.basis_column.shape) == (block.G.shape, block.A.shape)
        and bool((before.precision == before.precision[..., :1, :1]).all())
    )


def _exact(blocks: Sequence[WhiteBlock]) -> list[KroneckerEigenGaussian]:
    names = [block.spec.name for block in blocks]
    sides = [factored_sides(block) for block in blocks]
    rows, columns = (linalg.inverse_roots([side[i] for side in sides], names) for i in range(2))
    built = []
    for block, row, column in zip(blocks, rows, columns, strict=True):
        logs = [
            linalg.diagonal(linalg.product(*pair)).log().sum(-1)
            for pair in ((block.row_root, row), (block.column_root, column))
        ]
        built.append(_gaussian(block, row, column, column.shape[-1] * logs[0] + row.shape[-1] * logs[1]))
    return built


def _gaussian(block: WhiteBlock, row: Tensor, column: Tensor, log_volume: Tensor) -> KroneckerEigenGaussian:
    """The Gaussian with these roots of the inverses of the two sides in white coordinates, in the weights' own."""
    precision = row.new_full((*row.shape[:-2], row.shape[-1], column.shape[-1]), block.spec.data_scale)
    return KroneckerEigenGaussian(
        linalg.product(block.row_root, row), linalg.product(block.column_root, column), precision, log_volume
    )
