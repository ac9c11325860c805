"""The contract of a structure, and the registry.

A :class:`Structure` says what to measure of a layer and turns the statistics into a :class:`BlockGaussian`: a zero-mean
Gaussian over one block ``W`` of shape ``(*blocks, out, in)`` with precision
``P = data_scale · F̄ + prior_precision · I``, where ``F̄`` is the Fisher of one example. The posterior of a block has
``data_scale = num_data / temperature``; an optimizer's preconditioner is the same thing with ``data_scale = 1`` and a
damping in the place of the prior precision. ``vec`` is row-major, so ``F̄ ≈ G ⊗ A`` with ``G`` on the output side.

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
from bayes_kfac.errors import check_choice

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
    def solve(self, value: Tensor) -> Tensor:
        """``P⁻¹ V`` for ``V`` of shape ``[..., *blocks, out, in]``."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """``B ε`` with ``B Bᵀ = P⁻¹``: a linear map of ``ε``, ``[..., *blocks, out, in]``."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """``log det P``, ``[*blocks]``."""

    @abstractmethod
    def quad(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Tensor:
        """``J_c P⁻¹ J_dᵀ`` for the Jacobians ``J_c = Σ_t g_ct a_tᵀ``, from rows.

        Args:
            inputs: ``a``, ``[*blocks, batch, shared, in]``; sparse where the block's input side is.
            gradients: ``g``, ``[columns, *blocks, batch, shared, out]``.

        Returns:
            ``[batch, columns, columns]``, summed over blocks.
        """

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

    def quad_rows(self, rows: Rows) -> Tensor:
        """:meth:`quad` for all uses of a block.

        Uses as it is and transposed have no rows in common, so that the Jacobians themselves are formed.

        Args:
            rows: The rows of a forward pass.

        Returns:
            ``[batch, columns, columns]``, summed over blocks.
        """
        if rows.transposed is None:
            return self.quad(rows.inputs, rows.gradients)
        jacobians = rows.jacobians()
        return torch.einsum("cnoi,dnoi->ncd", jacobians, self.solve(jacobians))

    def trace_covariance(self) -> Tensor:
        """``tr P⁻¹``, ``[*blocks]``."""
        return self.marginal_variance().sum((-2, -1))

    def kl(self, mean: Tensor, prior_precision: float) -> Tensor:
        """``KL(N(mean, P⁻¹) ‖ N(0, prior_precision⁻¹ I))`` in nats, ``[*blocks]``.

        Args:
            mean: The mean, ``[*blocks, out, in]``.
            prior_precision: The prior's precision.

        Returns:
            The divergence.
        """
        size = mean.shape[-2] * mean.shape[-1]
        quadratic = prior_precision * (self.trace_covariance() + mean.square().sum((-2, -1)))
        return 0.5 * (quadratic - size + self.logdet() - size * math.log(prior_precision))

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockGaussian:
        """The Gaussian with a function applied to every tensor of its state: a move to another device or dtype."""
        return type(self)(**{name: function(tensor) for name, tensor in self.state.items()})

    def to(self, target: torch.device | torch.dtype | str) -> BlockGaussian:
        """The same Gaussian on another device or in another dtype."""
        return self.map(lambda tensor: tensor.to(target))


def standard_normal(gaussian: BlockGaussian, generator: torch.Generator | None, count: tuple[int, ...] = ()) -> Tensor:
    """Standard normal noise for a block, ``[*count, *blocks, out, in]``, like its state."""
    like = next(iter(gaussian.state.values()))
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
        prior_precision: The multiple of the identity that is added.
        previous: The Gaussian of an earlier refresh, for warm starts.
    """

    name: str
    statistics: Statistics
    data_scale: float
    prior_precision: float
    previous: BlockGaussian | None = None


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


def gaussian_from_state(kind: str, state: Mapping[str, Tensor]) -> BlockGaussian:
    """Rebuild a Gaussian from :attr:`BlockGaussian.kind` and :attr:`BlockGaussian.state`.

    Args:
        kind: The registered name.
        state: The tensors.

    Returns:
        The Gaussian.
    """
    return _GAUSSIANS[check_choice("kind", kind, tuple(_GAUSSIANS))](**state)
