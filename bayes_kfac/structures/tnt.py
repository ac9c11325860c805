"""TNT: the Fisher of a tensor of weights as a tensor normal's covariance (Ren & Goldfarb 2021).

With each example's own Jacobian ``J`` as a tensor of the weights' modes, of sizes ``n_i``, and ``mat_i(J)`` its matrix
of ``n_i`` rows,

    ``F̄ ≈ U_1 ⊗ … ⊗ U_k / (tr F̄)^(k−1)``, ``U_i = E[mat_i(J) mat_i(J)ᵀ]``, summed over output-gradient columns.

Each ``U_i`` is a partial trace of the Fisher, so that all of these are exact, and the trace is. Of one mode this is the
Fisher itself, and of two it is TKFAC.

The mean eigenvalue of the product is ``m = tr F̄ / d``, so that ``F̄ ≈ m V_1 ⊗ … ⊗ V_k`` with ``V_i = U_i n_i / tr U_i``
of mean 1. A prior of precision ``γ`` enters

``factored``: ``⊗ (m^(1/k) V_i + γ^(1/k) I)``, each mode damped by the same part ``(γ/m)^(1/k)`` of its mean; of two
modes this is K-FAC's ``(G + √γ/π I) ⊗ (A + π√γ I)``;

``exact``: by its diagonal ``m d_1 ⊗ … ⊗ d_k + γ`` in the eigenvectors of all modes;

``optimal``: as the tensor normal nearest to that in ``KL(q ‖ p)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Frame, Layer, Modes, Rows, Statistics
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Structure, register
from bayes_kfac.structures.jacobian import pieces
from bayes_kfac.structures.tensor_normal import (
    COLUMN,
    ROW,
    TensorEigenGaussian,
    TensorNormalGaussian,
    in_order,
    outer,
    sides,
)
from bayes_kfac.structures.tkfac import TKFACStructure


@register("tnt")
class TensorNormalStructure(TKFACStructure):
    """A factor for each mode of a tensor of weights; of matrices TKFAC.

    Tensors are convolutions without bias, outputs × channels × kernel, and parameters that stand alone, such as
    positional embeddings, in their own shape. Beside a bias a convolution's inputs are one mode.
    """

    card = Card(
        formula="F ≈ U_1 ⊗ … ⊗ U_k / (tr F)^(k−1), U_i = E[mat_i(J) mat_i(J)ᵀ] for the k modes of a tensor",
        captures="For each mode of a convolution, or of a parameter of any shape, the correlations along it; all "
        "partial traces are exact. Of a vector the Fisher itself; of a matrix TKFAC.",
        use="Wide convolutions without bias, whose input factor is too large; positional embeddings and class tokens, "
        "which are diagonal elsewhere.",
        cost="Statistics n (d Σ n_i + T d) for d weights in modes n_i and T positions; refresh Σ n_i³; sample or solve "
        "d Σ n_i; memory Σ n_i². Of matrices as TKFAC.",
        source="Ren & Goldfarb 2021.",
    )

    def for_layer(self, layer: Layer) -> Structure:  # noqa: D102
        # a parameter that stands alone is a tensor
        structure = self if layer.adapter.stands_alone else super().for_layer(layer)
        if structure is self and tuple(map(len, layer.adapter.modes)) != (1, 1):
            return TensorModesStructure(layer.adapter.modes, damping=self.damping, sharing=self.sharing)
        return structure


class TensorModesStructure(Structure):
    """The tensor normal Fisher of layers whose weights are tensors of the same modes.

    Args:
        modes: The sizes of the modes on the ``out`` side and on the ``in`` side.
        damping: How the prior enters.
        sharing: Makes no difference: positions are summed exactly.
    """

    name = TensorNormalStructure.name
    card = TensorNormalStructure.card

    def __init__(self, modes: Modes, *, damping: str = "factored", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.modes = modes
        #: Their names, as those of the statistics and of the Gaussian's roots, in their order.
        self.sizes = {
            f"{side}_{place}": size
            for side, own in zip((ROW, COLUMN), modes, strict=True)
            for place, size in enumerate(own)
        }

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"modes": self.modes}

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        first, *others = map(self._moments, pieces(rows))
        sums = [sum(moments, start) for start, *moments in zip(first, *others, strict=True)]
        return Statistics(dict(zip(self.sizes, sums, strict=True)), dict.fromkeys(self.sizes, rows.num_examples))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        sums = {}
        for name, size in self.sizes.items():
            moment = out_features * in_features / size * torch.eye(size, dtype=like.dtype, device=like.device)
            sums[name] = moment.expand(*blocks, size, size)
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        tensor = _WhiteTensor.of(spec)
        values = [linalg.eigh(factor, [spec.name])[0] for factor in tensor.factors.values()]
        return tensor.mean.unsqueeze(-1) * outer(values)

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return list(_BUILDERS[self.damping]([_WhiteTensor.of(spec) for spec in specs]))

    def _moments(self, rows: Rows) -> list[Tensor]:
        """``Σ mat_i(J) mat_i(J)ᵀ`` over examples and columns, of each mode."""
        jacobians = rows.jacobians().movedim(0, -4).flatten(-2).flatten(-3, -2)  # [*blocks, columns·batch, size]
        moments = []
        for size in self.sizes.values():
            slices = jacobians.unflatten(-1, (size, -1))
            matrix = slices.transpose(-3, -2).flatten(-2)
            moments.append(matrix @ matrix.mT)
            jacobians = slices.mT.flatten(-2)  # the next mode comes first
        return moments


@dataclass(frozen=True)
class _WhiteTensor:
    """A block whose Fisher is ``m V_1 ⊗ … ⊗ V_k``, in coordinates in which its prior is white: ``W = ⊗ R_i W'``.

    Attributes:
        spec: The block.
        mean: ``m``, ``[*blocks]``.
        factors: ``V_i``, of mean eigenvalue 1; zero where the Fisher is.
        prior_roots: ``R_i``, factors.
    """

    spec: BlockSpec
    mean: Tensor
    factors: dict[str, Tensor]
    prior_roots: dict[str, Tensor]

    @classmethod
    def of(cls, spec: BlockSpec) -> _WhiteTensor:
        """The block of a spec.

        Args:
            spec: The block.

        Returns:
            The block.

        Raises:
            ArgumentError: If the prior is neither one precision for a block nor a tensor normal of the same modes.
        """
        moments = in_order({name: spec.statistics.mean(name) for name in spec.statistics.sums})
        roots = _prior_roots(spec, moments)
        size = torch.Size([moment.shape[-1] for moment in moments.values()]).numel()
        mean = linalg.trace(next(iter(moments.values()))) / size
        factors = {}
        for name, moment in moments.items():
            factor = linalg.congruence(_over(moment, linalg.trace(moment) / moment.shape[-1]), roots[name])
            own_mean = linalg.trace(factor) / factor.shape[-1]
            mean = mean * own_mean
            factors[name] = _over(factor, own_mean)
        return cls(spec, mean, factors, roots)

    def in_own_coordinates(self, roots: Sequence[Tensor]) -> dict[str, Tensor]:
        """Roots, or bases, of all modes brought back to the weights' own coordinates, by name."""
        both = zip(self.prior_roots.items(), roots, strict=True)
        return {name: linalg.product(prior_root, root) for (name, prior_root), root in both}


def _prior_roots(spec: BlockSpec, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Roots of the prior's covariance along each mode, as factors."""
    prior, like = spec.prior, next(iter(moments.values()))
    sizes = {name: moment.shape[-1] for name, moment in moments.items()}
    refusal = spec.refuse_prior(
        TensorNormalStructure.name,
        "one precision for a block, or a posterior of this structure with damping='factored' or 'optimal', or "
        "Posterior.nearest_matrix_normal() of it",
    )
    if isinstance(prior, BlockGaussian):
        if type(prior) is TensorNormalGaussian and {n: r.shape[-1] for n, r in prior.roots.items()} == sizes:
            return prior.roots
        raise refusal
    shape = (*like.shape[:-2], *sides(sizes))
    precision = torch.as_tensor(prior, dtype=like.dtype, device=like.device).expand(shape)
    one = precision[..., :1, :1]
    if not bool((precision == one).all()):
        raise refusal
    return {name: one.pow(-0.5 / len(sizes)).expand(*shape[:-2], 1, size) for name, size in sizes.items()}


def _factored(tensors: Sequence[_WhiteTensor]) -> list[TensorNormalGaussian]:
    damped = [_damped(tensor) for tensor in tensors]
    names = [tensor.spec.name for tensor, own in zip(tensors, damped, strict=True) for _ in own]
    roots = iter(linalg.inverse_roots([side for own in damped for side in own], names))
    return [
        TensorNormalGaussian(**tensor.in_own_coordinates([next(roots) for _ in own]))
        for tensor, own in zip(tensors, damped, strict=True)
    ]


def _damped(tensor: _WhiteTensor) -> list[tuple[Tensor, Tensor]]:
    """The terms of ``(s m)^(1/k) V_i + I``, whose product is ``s m ⊗ V_i + I`` and more; ``s`` is the data's scale."""
    scale = (tensor.mean * tensor.spec.data_scale) ** (1 / len(tensor.factors))
    one = torch.ones_like(scale)
    return [(scale[..., None, None] * own, linalg.multiple_of_one(one, own)) for own in tensor.factors.values()]


def _exact(tensors: Sequence[_WhiteTensor]) -> list[TensorEigenGaussian]:
    spectra = _eigenvectors(tensors)
    gaussians = []
    for tensor, own in zip(tensors, spectra, strict=True):
        scale = (tensor.mean * tensor.spec.data_scale).unsqueeze(-1)
        bases = TensorNormalGaussian(**tensor.in_own_coordinates([vectors for _, vectors in own]))
        precision = scale * outer(values for values, _ in own) + 1
        gaussians.append(TensorEigenGaussian(precision.reshape(bases.shape), **bases.roots))
    return gaussians


def _optimal(tensors: Sequence[_WhiteTensor]) -> list[TensorNormalGaussian]:
    return [gaussian.nearest_tensor_normal() for gaussian in _exact(tensors)]


_BUILDERS: dict[str, Callable[[Sequence[_WhiteTensor]], Sequence[BlockGaussian]]] = {
    "factored": _factored,
    "optimal": _optimal,
    "exact": _exact,
}


def _eigenvectors(tensors: Sequence[_WhiteTensor]) -> list[list[tuple[Tensor, ...]]]:
    """Eigenvalues and eigenvectors of all modes of some tensors, one call for each shape."""
    flat = [factor for tensor in tensors for factor in tensor.factors.values()]
    names = [tensor.spec.name for tensor in tensors for _ in tensor.factors]
    results = iter(linalg.map_by_shape(linalg.eigh, flat, names))
    return [[next(results) for _ in tensor.factors] for tensor in tensors]


def _over(factor: Tensor, scale: Tensor) -> Tensor:
    """A factor over its scale ``[*blocks]``; zero where that is."""
    return factor / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None, None]
