"""K-FAC for weights that are used along a chain: recurrent networks, whose time steps are not independent.

The gradient of one example is ``Σ_t g_t a_tᵀ``. K-FAC takes its terms as uncorrelated: ``F ≈ Σ_t E[g gᵀ] ⊗ E[a aᵀ]``
(which is ``structure="kron"`` with ``sharing="expand"``, the option of independent time in the paper). Here they are a
linear Gaussian chain: with ``A₁ = E[a_{t+1} a_tᵀ]`` and ``G₁`` likewise, the factors ``A₀`` and ``G₀`` of one position,
``V₀ = G₀ ⊗ A₀`` and ``Ψ = (G₁ ⊗ A₁) V₀⁻¹``,

    ``F ≈ Σ_{|d|<T} (T − |d|) Ψᵈ V₀``.

``rnn_chain_1`` makes ``A₁`` and ``G₁`` symmetric, and has this sum in closed form; ``rnn_chain_2`` has them as they
are, and the sum for ``T → ∞``. Source: Martens, Ba & Johnson 2018, options 1 and 2, whose statistics are these: beyond
the ends there is nothing, and all averages are over ``T`` positions. So ``A₀^(-1/2) A₁ A₀^(-1/2)`` is a contraction,
and the eigenvalues of its symmetric part are within ``±cos(π/(T+1))``. The price is that correlation comes out too
small by a part in ``T`` on each side.

The prior enters as in K-FAC, by factored damping of ``A₀`` and ``G₀``, whatever ``damping`` says: without correlation
both are ``kron`` with ``damping="factored"``. What damping adds has no correlation along the chain.

Positions are those of :class:`bayes_kfac.curvature.Rows`, in their order, of which pixels have none that means much;
masked ones are beyond the ends. Where examples are of unequal length ``T`` is their average. A chain has the same
Fisher in both directions, so that it may run back in time. Correlation is not measured, and the block is ``kron``,
where a side is diagonal (words looked up), where the block is used transposed too, and where ``sharing="reduce"`` takes
positions together.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import EXAMPLEWISE_KINDS, NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.errors import BayesKfacWarning
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Information, register
from bayes_kfac.structures.chain import ChainGaussian, chain_gain, log_det_stein
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: By how many roundings a correlation stays below 1.
ROUNDINGS = 8
#: Beyond it a correlation is no matter of rounding, which where it rules the damping makes it go beyond 1 a little.
IMPOSSIBLE = 2.0


class ChainStructure(KroneckerStructure):
    """What both options share: the lagged statistics, and the uncorrelated block that they correct."""

    fishers = EXAMPLEWISE_KINDS

    def __init__(self, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "factored"

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        factors = super().measure(rows, frame)
        if self.sharing == "reduce" or rows.transposed is not None or isinstance(rows.inputs, SparseRows):
            return factors
        return _with_lags(factors, *_lagged(rows))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        factors = super().identity(shape, like, sparse_sides=sparse_sides, tied=tied)
        if self.sharing == "reduce" or tied or sparse_sides:
            return factors
        return _with_lags(factors, *(torch.zeros_like(factors.sums[side]) for side in ("input", "gradient")))

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        uncorrelated = super().gaussians(specs)
        chains = {
            index: (spec, block)
            for index, (spec, block) in enumerate(zip(specs, uncorrelated, strict=True))
            if isinstance(block, MatrixNormalGaussian) and _is_chain(spec.statistics)
        }
        names = [spec.name for spec, _ in chains.values()]
        lags = [_white_lags(spec, block) for spec, block in chains.values()]
        rows, columns = (linalg.map_by_shape(self._decompose, [lag[side] for lag in lags], names) for side in (0, 1))
        correlated = {
            index: self._correlated(block, row, column, _length(spec.statistics))
            for (index, (spec, block)), row, column in zip(chains.items(), rows, columns, strict=True)
        }
        return [correlated.get(index, block) for index, block in enumerate(uncorrelated)]

    def information(self, spec: BlockSpec) -> Information:
        """How much data tell of the weights, see :meth:`Structure.information`.

        It is that of K-FAC, where the prior enters exactly, and what correlation adds to it, where the prior enters by
        factored damping. Both are exact where the data rule, and where the prior does.

        Args:
            spec: The block.

        Returns:
            The function.
        """
        uncorrelated, statistics = super().information(spec), spec.statistics
        if not _is_chain(statistics):
            return uncorrelated
        white, length = self._white(spec), _length(statistics)
        A, G = white.A.double(), white.G.double()
        A1 = linalg.congruence(statistics.mean("lagged_input"), white.column_root).double()
        G1 = linalg.congruence(statistics.mean("lagged_gradient"), white.row_root).double()
        alive, one = _is_alive(statistics), A.new_ones(())
        mean_A, mean_G = linalg.trace(A) / A.shape[-1], linalg.trace(G) / G.shape[-1]
        pi = (torch.where(alive, mean_A, one) / torch.where(alive, mean_G, one)).sqrt()

        def information(scale: Tensor) -> Tensor:
            root_gamma = scale.double().rsqrt()
            root_A = linalg.inverse_cholesky(linalg.add_to_diagonal(A, pi * root_gamma), [spec.name])
            root_G = linalg.inverse_cholesky(linalg.add_to_diagonal(G, root_gamma / pi), [spec.name])
            gain = self._log_gain(linalg.congruence(G1, root_G), linalg.congruence(A1, root_A), length)
            return uncorrelated(scale) + gain.sum()

        return information

    @abstractmethod
    def _decompose(self, lag: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What :meth:`_correlated` needs of one side's correlations of neighbours, in coordinates where it is white."""

    @abstractmethod
    def _correlated(
        self, uncorrelated: MatrixNormalGaussian, row: Sequence[Tensor], column: Sequence[Tensor], length: float
    ) -> BlockGaussian:
        """The Gaussian of a chain of so many positions, from the decompositions of both sides."""

    @abstractmethod
    def _log_gain(self, lag_row: Tensor, lag_column: Tensor, length: float) -> Tensor:
        """The log determinant of the chain's Fisher over that of uncorrelated positions, ``[*blocks]``."""


@register("rnn_chain_1")
class SymmetricChainStructure(ChainStructure):
    """A chain of finite length, with the same correlation forth and back."""

    card = Card(
        formula="F ≈ Σ_{|d|<T} (T − |d|) Ψᵈ (G₀ ⊗ A₀), Ψ = (G₁ ⊗ A₁) (G₀ ⊗ A₀)⁻¹, A₁ and G₁ made symmetric",
        captures="Correlation of a layer's uses along time that dies off geometrically, the same forth and back. "
        "Without it, and for a layer used once, it is kron with factored damping. It misses what turns as it goes.",
        use="Recurrent networks, where steps are few, or where in doubt between the two options.",
        cost="Statistics twice those of kron; refresh, with eigenvectors, about 10 (in³ + out³); else as kron.",
        source="Martens, Ba & Johnson 2018, option 1.",
    )

    def _decompose(self, lag: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        shifted, vectors = linalg.eigh(linalg.symmetrize(lag) + _eye_like(lag), names)  # 1 + ψ ≥ 0
        return _contracted(shifted - 1, names), vectors

    def _correlated(
        self, uncorrelated: MatrixNormalGaussian, row: Sequence[Tensor], column: Sequence[Tensor], length: float
    ) -> BlockGaussian:
        psi_G, E_G = row
        psi_A, E_A = column
        return KroneckerEigenGaussian(
            uncorrelated.scale_tril_row @ E_G,
            uncorrelated.scale_tril_column @ E_A,
            chain_gain(psi_G.unsqueeze(-1) * psi_A.unsqueeze(-2), length),
            -uncorrelated.logdet() / 2,
        )

    def _log_gain(self, lag_row: Tensor, lag_column: Tensor, length: float) -> Tensor:
        psi_G, psi_A = (_limited(torch.linalg.eigvalsh(linalg.symmetrize(lag))) for lag in (lag_row, lag_column))
        return chain_gain(psi_G.unsqueeze(-1) * psi_A.unsqueeze(-2), length).log().sum((-2, -1))


@register("rnn_chain_2")
class EndlessChainStructure(ChainStructure):
    """A chain without ends, with any correlation."""

    card = Card(
        formula="F ≈ T Σ_d Ψᵈ (G₀ ⊗ A₀), Ψ = (G₁ ⊗ A₁) (G₀ ⊗ A₀)⁻¹",
        captures="Correlation of a layer's uses along time, turning as it goes, as of a linear Gaussian chain, where "
        "it dies off before the chain ends. It overrates correlation that outlasts the chain.",
        use="Recurrent networks on long sequences.",
        cost="Statistics twice those of kron; refresh, with eigenvectors, about 10 (in³ + out³); a sample or a solve "
        "twice that of kron; the log determinant 25 (in³ + out³), a product with the precision some 20 (in³ + out³).",
        source="Martens, Ba & Johnson 2018, option 2.",
    )

    def _decompose(self, lag: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        mu, vectors = linalg.eigh(lag.mT @ lag, names)
        within = _contracted(mu.sqrt(), names)
        shrink = torch.where(mu.sqrt() > within, within / mu.sqrt(), torch.ones_like(mu))
        return within.square(), vectors, vectors.mT @ lag @ vectors * shrink.unsqueeze(-2)

    def _correlated(
        self, uncorrelated: MatrixNormalGaussian, row: Sequence[Tensor], column: Sequence[Tensor], length: float
    ) -> BlockGaussian:
        mu_G, E_G, M_G = row
        mu_A, E_A, M_A = column
        return ChainGaussian(
            uncorrelated.scale_tril_row @ E_G,
            uncorrelated.scale_tril_column @ E_A,
            M_G,
            M_A,
            1 - mu_G.unsqueeze(-1) * mu_A.unsqueeze(-2),
            -uncorrelated.logdet() / 2,
        )

    def _log_gain(self, lag_row: Tensor, lag_column: Tensor, length: float) -> Tensor:
        mu_G, mu_A = (_limited(torch.linalg.eigvalsh(lag.mT @ lag)) for lag in (lag_row, lag_column))
        innovation = 1 - mu_G.unsqueeze(-1) * mu_A.unsqueeze(-2)
        return innovation.log().sum((-2, -1)) - 2 * log_det_stein(lag_row, lag_column)


def _lagged(rows: Rows) -> tuple[Tensor, Tensor]:
    """Sums over neighbours, ``Σ a_{t+1} a_tᵀ`` and ``Σ_c g_{c,t+1} g_ctᵀ``, as of :func:`kronecker_factors`."""
    inputs, gradients = rows.inputs, rows.gradients.movedim(0, -4)
    assert isinstance(inputs, Tensor)
    if rows.mask is not None:
        inputs = inputs * rows.mask.unsqueeze(-1)
    sums = []
    for positions, leading in ((inputs, -3), (gradients, -4)):
        later, earlier = (part.flatten(leading, -2) for part in (positions[..., 1:, :], positions[..., :-1, :]))
        sums.append(later.mT @ earlier)
    return sums[0] * rows.share, sums[1]


def _with_lags(factors: Statistics, inputs: Tensor, gradients: Tensor) -> Statistics:
    sums = {**factors.sums, "lagged_input": inputs, "lagged_gradient": gradients}
    counts = {**factors.counts, **{f"lagged_{side}": factors.counts[side] for side in ("input", "gradient")}}
    return Statistics(sums, counts, factors.frame)


def _length(statistics: Statistics) -> float:
    """``T``: the average number of positions of an example."""
    return max(1.0, statistics.counts["input"] / (statistics.counts["gradient"] or 1.0))


def _is_chain(statistics: Statistics) -> bool:
    """Whether there are neighbours to be correlated."""
    return "lagged_input" in statistics.sums and _length(statistics) > 1


def _is_alive(statistics: Statistics) -> Tensor:
    """Which blocks have a Fisher that is not zero, ``[*blocks]``: factored damping leaves the others to the prior."""
    return (linalg.trace(statistics.sums["input"]) > 0) & (linalg.trace(statistics.sums["gradient"]) > 0)


def _white_lags(spec: BlockSpec, uncorrelated: MatrixNormalGaussian) -> tuple[Tensor, Tensor]:
    """``G₁`` and ``A₁`` in the coordinates in which the damped factors, of so many data, are the identity."""
    alive = _is_alive(spec.statistics)[..., None, None]
    row, column = uncorrelated.scale_tril_row * spec.data_scale**0.5, uncorrelated.scale_tril_column
    return _white_lag(spec, "gradient", row * alive), _white_lag(spec, "input", column * alive)


def _white_lag(spec: BlockSpec, side: str, root: Tensor) -> Tensor:
    """A covariance of neighbours in the coordinates of a root, less where the factor's rounding is as large as it."""
    rounding = root.shape[-1] * torch.finfo(root.dtype).eps * linalg.diagonal(spec.statistics.mean(side)).unsqueeze(-2)
    lower = linalg.cholesky(linalg.congruence(rounding, root) + _eye_like(root), [spec.name])
    white = linalg.congruence(spec.statistics.mean(f"lagged_{side}"), root)
    return linalg.left_solve(lower, linalg.left_solve(lower, white).mT).mT


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _limited(correlations: Tensor) -> Tensor:
    """Correlations within what is left of ``[−1, 1]`` when rounding has had its share."""
    bound = 1 - ROUNDINGS * torch.finfo(correlations.dtype).eps
    return correlations.clamp(-bound, bound)


def _contracted(correlations: Tensor, names: Sequence[str]) -> Tensor:
    """:func:`_limited`, with a warning where it was not rounding that made them too large."""
    beyond = int((correlations.abs() > IMPOSSIBLE).sum())
    if beyond:
        warnings.warn(
            f"{beyond} of {correlations.numel()} correlations along the chain in {', '.join(names)} are far beyond 1 "
            "and taken as 1: the lagged statistics do not belong to the factors.",
            BayesKfacWarning,
            stacklevel=2,
        )
    return _limited(correlations)
