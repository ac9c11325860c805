"""The contract of a structure, and the registry.

A :class:`Structure` says what to measure of a layer and turns the statistics into a :class:`BlockGaussian`: a zero-mean
Gaussian over one block ``W`` of shape ``(*blocks, out, in)`` with precision
``P = data_scale · F̄ + P₀``, where ``F̄`` is the Fisher of one example and ``P₀`` the precision of a prior, such as
``prior_precision · I``. The posterior of a block has ``data_scale = num_data / temperature``; an optimizer's
preconditioner is the same thing with ``data_scale = 1`` and a damping in the place of the prior precision. ``vec`` is
row-major, so ``F̄ ≈ G ⊗ A`` with ``G`` on the output side.

Independent blocks stack along ``*blocks``; quantities of one block have that shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from bayes_kfac.curvature import SHARING_KINDS, Rows, SparseRows, Statistics
from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.structures.whitened import Whitened, WhitenedJacobians

DAMPING_KINDS = ("factored", "optimal", "exact")

_STRUCTURES: dict[str, type[Structure]] = {}
_GAUSSIANS: dict[str, type[BlockGaussian]] = {}


class BlockGaussian(ABC):
    """A zero-mean Gaussian over one block, ``N(0, P⁻¹)``, with ``W`` of shape ``(*blocks, out, in)``."""

    #: The name under which the state is saved.
    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The block's shape, ``(*blocks, out, in)``."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """``B ε`` with ``B Bᵀ = P⁻¹``: a linear map of ``ε``, ``[..., *blocks, out, in]``."""

    @abstractmethod
    def whiten(self, value: Tensor) -> Tensor:
        """``Bᵀ V``, the adjoint of :meth:`sample`, for ``V`` of shape ``[..., *blocks, out, in]``."""

    @abstractmethod
    def multiply(self, value: Tensor) -> Tensor:
        """``P V`` for ``V`` of shape ``[..., *blocks, out, in]``."""

    def solve(self, value: Tensor) -> Tensor:
        """``P⁻¹ V = B Bᵀ V`` for ``V`` of shape ``[..., *blocks, out, in]``."""
        return self.sample(self.whiten(value))

    @abstractmethod
    def logdet(self) -> Tensor:
        """``log det P``, ``[*blocks]``."""

    @abstractmethod
    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Whitened:
        """``Bᵀ J_c`` for the Jacobians ``J_c = Σ_t g_ct a_tᵀ``, from rows.

        Args:
            inputs: ``a``, ``[*blocks, batch, shared, in]``; sparse where the block's input side is.
            gradients: ``g``, ``[columns, *blocks, batch, shared, out]``.

        Returns:
            The whitened Jacobians, written out or not.
        """

    def whitened_rows(self, rows: Rows) -> Whitened:
        """:meth:`whitened` for all uses of a block.

        Uses as it is and transposed have no rows in common, so that the Jacobians themselves are formed.

        Args:
            rows: The rows of a forward pass.

        Returns:
            The whitened Jacobians.
        """
        if rows.transposed is None:
            return self.whitened(rows.inputs, rows.gradients)
        return WhitenedJacobians(self.whiten(rows.jacobians()), num_blocks=0)

    def quad(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Tensor:
        """``J_c P⁻¹ J_dᵀ`` within each example, ``[batch, columns, columns]``, from rows as in :meth:`whitened`."""
        return self.whitened(inputs, gradients).covariance()

    @abstractmethod
    def marginal_variance(self) -> Tensor:
        """``diag P⁻¹``, ``[*blocks, out, in]``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """``P`` itself, ``[*blocks, out·in, out·in]``; for tests and tiny blocks only."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Plain tensors from which the class rebuilds the Gaussian as keyword arguments."""

    @property
    def like(self) -> Tensor:
        """One of its tensors, for dtype and device."""
        return next(iter(self.state.values()))

    def as_prior(self) -> BlockGaussian:
        """The nearest Gaussian in ``KL(q ‖ p)`` whose precision a block of its structure can add exactly."""
        return self

    def trace_covariance(self) -> Tensor:
        """``tr P⁻¹``, ``[*blocks]``."""
        return self.marginal_variance().sum((-2, -1))

    def kl(self, mean: Tensor, prior_precision: float | Tensor) -> Tensor:
        """``KL(N(mean, P⁻¹) ‖ N(0, diag(prior_precision)⁻¹))`` in nats, ``[*blocks]``.

        Args:
            mean: The mean, ``[*blocks, out, in]``.
            prior_precision: The prior's precision: one number, or of each weight.

        Returns:
            The divergence.
        """
        size = mean.shape[-2] * mean.shape[-1]
        if isinstance(prior_precision, Tensor):
            quadratic = (prior_precision * (self.marginal_variance() + mean.square())).sum((-2, -1))
            log_precision = prior_precision.log().expand(mean.shape).sum((-2, -1))
        else:
            quadratic = prior_precision * (self.trace_covariance() + mean.square().sum((-2, -1)))
            log_precision = size * mean.new_tensor(math.log(prior_precision))
        return 0.5 * (quadratic - size + self.logdet() - log_precision)

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockGaussian:
        """The Gaussian with a function applied to every tensor of its state: a move to another device or dtype."""
        return type(self)(**{name: function(tensor) for name, tensor in self.state.items()})

    def to(self, target: torch.device | torch.dtype | str) -> BlockGaussian:
        """The same Gaussian on another device or in another dtype."""
        return self.map(lambda tensor: tensor.to(target))


#: A prior's precision: see :attr:`BlockSpec.prior`.
Prior = float | Tensor | BlockGaussian


def standard_normal(gaussian: BlockGaussian, generator: torch.Generator | None, count: tuple[int, ...] = ()) -> Tensor:
    """Standard normal noise for a block, ``[*count, *blocks, out, in]``, like its state."""
    like = gaussian.like
    # a generator draws on its own device only: one of the CPU serves a model anywhere, the same numbers everywhere
    device = like.device if generator is None else generator.device
    noise = torch.randn((*count, *gaussian.shape), dtype=like.dtype, device=device, generator=generator)
    return noise.to(like.device)


@dataclass(frozen=True)
class BlockSpec:
    """What a structure needs to know of one block.

    Attributes:
        name: The layer's name, for messages.
        statistics: What was measured.
        data_scale: The factor on the Fisher of one example: ``num_data / temperature`` for a posterior.
        prior: What is added to it: a multiple of the identity, precisions of single weights in a shape that broadcasts
            to ``(*blocks, out, in)``, or the precision of a Gaussian, such as the posterior of an earlier task.
        previous: The Gaussian of an earlier refresh, for warm starts.
    """

    name: str
    statistics: Statistics
    data_scale: float
    prior: Prior
    previous: BlockGaussian | None = None

    def refuse_prior(self, structure: str, allowed: str) -> ArgumentError:
        """The error of a structure that cannot add this prior's precision exactly."""
        prior = self.prior
        what = f"a {prior.kind} Gaussian" if isinstance(prior, BlockGaussian) else "precisions of single weights"
        return ArgumentError(
            f"The prior of layer {self.name!r} is {what}, which structure={structure!r} cannot add exactly. Allowed: "
            f"{allowed}."
        )


class Structure(ABC):
    """A family of approximations to the Fisher of a block.

    Args:
        damping: How the prior enters: ``"factored"``, ``"optimal"`` or ``"exact"``.
        sharing: How positions that share weights are summed: ``"expand"`` or ``"reduce"``.
    """

    #: The name in the registry.
    name: ClassVar[str]

    def __init__(self, *, damping: str, sharing: str) -> None:
        self.damping = check_choice("damping", damping, DAMPING_KINDS)
        self.sharing = check_choice("sharing", sharing, SHARING_KINDS)

    @property
    def label(self) -> str:
        """Name and damping, for summaries."""
        return f"{self.name}/{self.damping}"

    def for_block(self, own: str | None) -> Structure:
        """The structure of a block whose kind has one of its own by this name, or ``None`` for this one."""
        return self if own is None else get(own, damping=self.damping, sharing=self.sharing)

    @abstractmethod
    def measure(self, rows: Rows) -> Statistics:
        """Turn a batch's rows into the statistics that this structure needs."""

    @abstractmethod
    def identity(
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        """The statistics of a block whose Fisher is the identity.

        Args:
            shape: The block's shape, ``(*blocks, out, in)``.
            like: A tensor of the block's dtype and device.
            sparse_sides: The sides that are diagonal because of sparse inputs, of ``"input"`` and ``"gradient"``.
            tied: Whether the block is used transposed too.

        Returns:
            The statistics, under the names and in the shapes that :meth:`measure` gives.
        """

    @abstractmethod
    def spectrum(self, spec: BlockSpec) -> Tensor:
        """The eigenvalues of one example's Fisher where the prior is white, ``λ`` of ``P₀^(-1/2) F̄ P₀^(-1/2)``.

        They give ``log det P = log det P₀ + Σ log(1 + data_scale · λ)``, differentiable in the prior's precisions. The
        prior enters exactly, whatever ``damping`` says; tied weights enter as one product.

        Args:
            spec: The block.

        Returns:
            ``[*blocks, ...]``.
        """

    @abstractmethod
    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:
        """Build the Gaussians of many blocks at once, so that those of equal shape can share batched calls."""


StructureType = TypeVar("StructureType", bound=type[Structure])
GaussianType = TypeVar("GaussianType", bound=type[BlockGaussian])


def register(name: str) -> Callable[[StructureType], StructureType]:
    """Class decorator that puts a structure into the registry.

    Args:
        name: The name users write for ``structure=``.

    Returns:
        The decorator.
    """

    def decorate(structure: StructureType) -> StructureType:
        structure.name = name
        _STRUCTURES[name] = structure
        return structure

    return decorate


def register_gaussian(kind: str) -> Callable[[GaussianType], GaussianType]:
    """Class decorator that makes a Gaussian loadable from a saved state.

    Args:
        kind: The name under which its state is saved.

    Returns:
        The decorator.
    """

    def decorate(gaussian: GaussianType) -> GaussianType:
        gaussian.kind = kind
        _GAUSSIANS[kind] = gaussian
        return gaussian

    return decorate


def available() -> tuple[str, ...]:
    """The names that ``structure=`` accepts."""
    return tuple(sorted(_STRUCTURES))


def get(name: str, *, damping: str, sharing: str) -> Structure:
    """Make a structure by its name.

    Args:
        name: One of :func:`available`.
        damping: How the prior enters.
        sharing: How positions that share weights are summed.

    Returns:
        The structure.
    """
    return _STRUCTURES[check_choice("structure", name, available())](damping=damping, sharing=sharing)


def build(structures: Mapping[str, Structure], specs: Sequence[BlockSpec]) -> dict[str, BlockGaussian]:
    """The Gaussian of each block; those of one structure together, so that equal shapes share batched calls.

    Args:
        structures: The structure of each block, by name.
        specs: The blocks.

    Returns:
        The Gaussians by name, in the order of the specs.
    """
    together: dict[tuple[type[Structure], str, str], list[BlockSpec]] = {}
    for spec in specs:
        own = structures[spec.name]
        together.setdefault((type(own), own.damping, own.sharing), []).append(spec)
    built = {
        spec.name: gaussian
        for group in together.values()
        for spec, gaussian in zip(group, structures[group[0].name].gaussians(group), strict=True)
    }
    return {spec.name: built[spec.name] for spec in specs}


def gaussian_from_state(kind: str, state: Mapping[str, Tensor]) -> BlockGaussian:
    """Rebuild a Gaussian from :attr:`BlockGaussian.kind` and :attr:`BlockGaussian.state`.

    Args:
        kind: The registered name.
        state: The tensors.

    Returns:
        The Gaussian.
    """
    return _GAUSSIANS[check_choice("kind", kind, tuple(_GAUSSIANS))](**state)
