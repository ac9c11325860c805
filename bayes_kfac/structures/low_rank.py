"""Low-rank Fishers of a block, ``F̄ ≈ Σ_k c_k c_kᵀ`` (plus a diagonal): one algebra, and four ways to come by columns.

``slang``: the leading eigenvectors, and a diagonal that makes the whole one exact. ``tonga``: the leading eigenvectors.
``smw``: the gradients of single examples. ``mfac``: gradients of whole batches, in a sliding window.

In the papers of ``slang`` and ``mfac`` the columns are of all weights together; here, as everywhere in this library,
each layer has its own. The columns come from each example's own Jacobian, and the prior enters exactly, whatever
``damping`` says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Columns, Frame, LatestColumns, LeadingColumns, Rows, Statistics
from bayes_kfac.errors import check_count
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Information, Structure, register
from bayes_kfac.structures.diagonal import DiagonalGaussian
from bayes_kfac.structures.low_rank_gaussian import LowRankGaussian


class LowRankStructure(Structure):
    """The Fisher as columns ``[*blocks, k, out, in]``, under the name ``fisher``, and what is added to its diagonal.

    Args:
        limit: How many columns are kept at most.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    def __init__(self, limit: int, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"
        self.limit = limit

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        # one example's after the other's, [*blocks, batch, columns, out, in]
        return self._statistics(rows.jacobians().movedim(0, -3), rows.num_examples)

    @abstractmethod
    def _statistics(self, jacobians: Tensor, num_examples: float) -> Statistics:
        """The statistics of Jacobians ``[*blocks, batch, columns, out, in]``."""

    def _diagonal(self, statistics: Statistics) -> Tensor:
        """What is to be added to the columns' outer products, ``[*blocks, out, in]``."""
        columns = statistics.mean_columns("fisher")
        return columns.floor[..., None, None].expand(columns.diagonal().shape)

    def information(self, spec: BlockSpec) -> Information:  # noqa: D102
        columns, diagonal = spec.statistics.mean_columns("fisher").columns, self._diagonal(spec.statistics)
        prior_columns, prior_diagonal = self._prior(spec)
        before = _log_det(prior_columns, prior_diagonal, spec.name)
        if prior_columns.shape[-3] or bool(diagonal.any()):
            return lambda scale: (
                _log_det(
                    torch.cat([scale.sqrt() * columns, prior_columns], dim=-3),
                    scale * diagonal + prior_diagonal,
                    spec.name,
                )
                - before
            )
        gram = _gram(columns, prior_diagonal)  # the same at every scale
        return lambda scale: _log_det_plus_one(scale * gram, spec.name)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        columns, diagonals = [], []
        for spec in specs:
            own = spec.statistics.mean_columns("fisher").columns * spec.data_scale**0.5
            prior_columns, prior_diagonal = self._prior(spec)
            columns.append(torch.cat([own, prior_columns], dim=-3))
            diagonals.append(self._diagonal(spec.statistics) * spec.data_scale + prior_diagonal)
        return [*LowRankGaussian.of(columns, diagonals, [spec.name for spec in specs])]

    def _prior(self, spec: BlockSpec) -> tuple[Tensor, Tensor]:
        """The prior's precision: columns ``[*blocks, k, out, in]`` and a diagonal ``[*blocks, out, in]``."""
        like, prior = spec.statistics.columns["fisher"].values, spec.prior
        none = like[..., :0, :, :]
        if isinstance(prior, LowRankGaussian):
            return prior.columns * prior.diagonal.sqrt().unsqueeze(-3), prior.diagonal
        if isinstance(prior, DiagonalGaussian):
            return none, prior.precision
        if isinstance(prior, BlockGaussian):
            raise spec.refuse_prior(
                self.name, "precisions, or a posterior of structure='diagonal' or of a low-rank structure"
            )
        precision = torch.as_tensor(prior, dtype=like.dtype, device=like.device)
        return none, precision.expand(*like.shape[:-3], *like.shape[-2:])


@register("tonga")
class TongaStructure(LowRankStructure):
    """The leading eigenvectors of the Fisher of a layer.

    Args:
        rank: How many of them.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    card = Card(
        formula="F ≈ U Uᵀ, the leading eigenvectors of E[vec J vec Jᵀ]",
        captures="The directions that the data determine best, with all their correlations within a layer; of all "
        "others nothing: there the posterior is the prior.",
        use="Natural gradients where few directions matter. As a posterior mind the rank: directions that are left out "
        "have the prior's variance, and the evidence is for broader priors than the data are.",
        cost="Statistics (n + k)² in·out; refresh k² in·out; a sample or a solve k in·out; memory k in·out.",
        source="Le Roux, Manzagol & Bengio 2007 (TONGA).",
    )

    def __init__(self, rank: int = 32, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(check_count("rank", rank), damping=damping, sharing=sharing)

    @property
    def options(self) -> dict[str, int]:  # noqa: D102
        return {"rank": self.limit}

    def _statistics(self, jacobians: Tensor, num_examples: float) -> Statistics:
        columns = LeadingColumns.of(jacobians.flatten(-4, -3), self.limit)
        return Statistics({}, {"fisher": num_examples}, columns={"fisher": columns})

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        return _identity(LeadingColumns, shape, self.limit, like)


@register("slang")
class SlangStructure(TongaStructure):
    """The leading eigenvectors of the Fisher of a layer, and a diagonal with which all of the diagonal is exact.

    Args:
        rank: How many eigenvectors.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    card = Card(
        formula="F ≈ U Uᵀ + diag(E[J ∘ J] − diag(U Uᵀ))",
        captures="The size of each weight's gradient, and correlations along the leading eigenvectors.",
        use="In the place of the diagonal where correlations matter.",
        cost="Statistics (n + k)² in·out; refresh k² in·out; a sample or a solve k in·out; memory k in·out.",
        source="Mishkin, Kunstner, Nielsen, Schmidt & Khan 2018 (SLANG).",
    )

    def __init__(self, rank: int = 16, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(rank, damping=damping, sharing=sharing)

    def _statistics(self, jacobians: Tensor, num_examples: float) -> Statistics:
        leading = super()._statistics(jacobians, num_examples)
        counts = {"fisher": num_examples, "diagonal": num_examples}
        return Statistics({"diagonal": jacobians.square().sum((-4, -3))}, counts, columns=leading.columns)

    def _diagonal(self, statistics: Statistics) -> Tensor:
        columns = statistics.mean_columns("fisher").columns
        return (statistics.mean("diagonal") - columns.square().sum(-3)).clamp(min=0)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        flat = super().identity(shape, like)
        ones = flat.columns["fisher"].diagonal()
        return Statistics({"diagonal": ones}, {"fisher": 1.0, "diagonal": 1.0}, columns=flat.columns)


class WindowStructure(LowRankStructure):
    """The Fisher from columns of the latest batches, as they came: averages are over the window.

    Args:
        window: How many columns are kept.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    takes_parts = False

    def __init__(self, window: int, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(check_count("window", window), damping=damping, sharing=sharing)

    @property
    def options(self) -> dict[str, int]:  # noqa: D102
        return {"window": self.limit}

    def _statistics(self, jacobians: Tensor, num_examples: float) -> Statistics:
        columns = LatestColumns.of(self._columns(jacobians), self.limit, num_examples)
        return Statistics({}, {"fisher": num_examples}, columns={"fisher": columns})

    @abstractmethod
    def _columns(self, jacobians: Tensor) -> Tensor:
        """The columns that stand for Jacobians ``[*blocks, batch, columns, out, in]``, ``[*blocks, k, out, in]``."""

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        return _identity(LatestColumns, shape, self.limit, like)


@register("smw")
class SmwStructure(WindowStructure):
    """The Fisher of the latest examples, in its dual form: nothing but the inverse of a Gram matrix.

    With the identity of Sherman, Morrison and Woodbury ``P⁻¹ V = (V − Σ_n c_n J_n) / δ`` with
    ``c = (δ I + K)⁻¹ v``, ``K_nm = ⟨J_n, J_m⟩`` and ``v_n = ⟨J_n, V⟩``; with ``J_n = g_n a_nᵀ`` it is the Gram matrix
    ``(a aᵀ) ∘ (g gᵀ)`` of SNGD, or HyLo before its reduction.

    Args:
        window: How many columns are kept: examples times output-gradient vectors of each.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    card = Card(
        formula="F ≈ E[vec J vec Jᵀ] over a window of examples, by its Gram matrix",
        captures="Everything within a block, of the examples in the window; exactly that of a Laplace fit, where the "
        "window holds all examples.",
        use="Small data sets and large layers: the exact Laplace approximation of each layer; natural gradients.",
        cost="Statistics n in·out; refresh k² in·out + k³; a sample or a solve k in·out; memory k in·out.",
        source="Ren & Goldfarb 2019; Mu et al. 2022 (HyLo).",
    )

    def __init__(self, window: int = 512, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(window, damping=damping, sharing=sharing)

    def _columns(self, jacobians: Tensor) -> Tensor:
        return jacobians.flatten(-4, -3)


@register("mfac")
class MFacStructure(WindowStructure):
    """The Fisher from gradients of the latest batches, one column for each.

    A column is the sum of a batch's Jacobians with random signs, ``c = Σ_n ε_n J_n``: ``E[c cᵀ] = Σ_n J_n J_nᵀ``
    whatever the Jacobians are of. Gradients of targets that are sampled from the model have mean zero and need no
    signs: that is the paper's. The signs are a hash of the Jacobians and of their places in the batch, so that the same
    data give the same column, whatever else is random, and examples that repeat have signs of their own.

    Args:
        window: How many batches.
        damping: Makes no difference.
        sharing: Makes no difference.
    """

    card = Card(
        formula="F ≈ Σ_b c_b c_bᵀ / Σ_b n_b over the latest batches, c_b the sum of a batch's n_b gradients",
        captures="An estimate without bias of everything within a block, from as many numbers as there are batches.",
        use="Natural gradients in few columns for many examples. A posterior takes many batches: where no column is, "
        "it is the prior.",
        cost="Statistics n in·out; refresh k² in·out; a sample or a solve k in·out; memory k in·out.",
        source="Frantar, Kurtic & Alistarh 2021 (M-FAC).",
    )

    def __init__(self, window: int = 64, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(window, damping=damping, sharing=sharing)

    def _columns(self, jacobians: Tensor) -> Tensor:
        return (_signs(jacobians)[..., None, None] * jacobians).sum((-4, -3)).unsqueeze(-3)


def _identity(kind: type[Columns], shape: tuple[int, ...], limit: int, like: Tensor) -> Statistics:
    return Statistics({}, {"fisher": 1.0}, columns={"fisher": kind.identity(shape, limit, like)})


def _signs(jacobians: Tensor) -> Tensor:
    """Signs that depend on what Jacobians ``[..., batch, columns, out, in]`` are, to about a tenth, and on where."""
    # places make equal Jacobians of a batch independent, values those at the same place in other batches
    # by a hash of a few of their products with fixed directions, which rounding changes once in a million times
    values = jacobians.flatten(-2).float()
    angles = torch.arange(1, values.shape[-1] + 1, dtype=torch.float32, device=values.device)
    places = values.shape[-3:-1]
    bits = torch.arange(places.numel(), device=values.device).view(places)
    for frequency in (1.0, 1.7, 2.3, 2.9):
        products = values @ (frequency * angles).sin()
        coarse = products.view(torch.int32).long() >> 21  # the sign, the exponent, and two bits more
        bits = ((bits ^ coarse) * 0x9E3779B1) & 0xFFFFFFFF  # a multiplicative hash
        bits = bits ^ (bits >> 15)
    return 1 - 2 * ((bits >> 7) & 1).to(jacobians.dtype)


def _log_det(columns: Tensor, diagonal: Tensor, name: str) -> Tensor:
    """``log det(D + Σ u uᵀ)``, summed over blocks, in float64."""
    return diagonal.double().log().sum() + _log_det_plus_one(_gram(columns, diagonal), name)


def _gram(columns: Tensor, diagonal: Tensor) -> Tensor:
    """``Uᵀ D⁻¹ U`` or, where it is smaller, a matrix of the same eigenvalues but for zeros, ``[*blocks, k, k]``."""
    white = (columns.double() * diagonal.double().rsqrt().unsqueeze(-3)).flatten(-2)
    return white @ white.mT if white.shape[-2] <= white.shape[-1] else white.mT @ white


def _log_det_plus_one(gram: Tensor, name: str) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return 2 * linalg.diagonal(linalg.cholesky(gram + eye, [name])).log().sum()
