"""The contract of a structure, and the registry.

A :class:`Structure` says what to measure of a layer and turns the statistics into a :class:`BlockGaussian`: a zero-mean
Gaussian over one block ``W`` of shape ``(*blocks, out, in)`` with precision
``P = data_scale · F̄ + P₀``, where ``F̄`` is the Fisher of one example and ``P₀`` the precision of a prior, such as
``prior_precision · I``. The posterior of a block has ``data_scale = num_data / temperature``; an optimizer's
preconditioner is the same thing with ``data_scale = 1`` and a damping in the place of the prior precision. ``vec`` is
row-major, so ``F̄ ≈ G ⊗ A`` with ``G`` on the output side.

What is measured may depend on what was measured before: in the eigenvectors of the factors so far, or of the last
iterate of a power method. That is the statistics' frame: :meth:`Structure.measure` takes it,
:meth:`Structure.reframed` renews it, at every refresh in training and between the passes over the data of a Laplace
fit, of which there are :attr:`Structure.passes`.

Independent blocks stack along ``*blocks``; quantities of one block have that shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, SHARING_KINDS, Frame, Rows, SparseRows, Statistics
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
#: See :meth:`Structure.information`.
Information = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Card:
    """What a user wants to know of a structure; ``docs/structures.md`` is made of these.

    Attributes:
        formula: The Fisher of a block as it has it, in plain text.
        captures: What of the Fisher it keeps, and what it leaves out.
        use: When to choose it.
        cost: Time and memory by theory, for a block ``out × in`` and a batch of ``n`` examples.
        source: The paper.
    """

    formula: str
    captures: str
    use: str
    cost: str
    source: str


class Structure(ABC):
    """A family of approximations to the Fisher of a block.

    Args:
        damping: How the prior enters: ``"factored"``, ``"optimal"`` or ``"exact"``.
        sharing: How positions that share weights are summed: ``"expand"`` or ``"reduce"``.
    """

    #: The name in the registry.
    name: ClassVar[str]
    #: What a user wants to know of it.
    card: ClassVar[Card]
    #: How many passes over the data a fit from scratch takes; after each of them the frame is renewed.
    passes: ClassVar[int] = 1

    def __init__(self, *, damping: str = "factored", sharing: str = "expand") -> None:
        self.damping = check_choice("damping", damping, DAMPING_KINDS)
        self.sharing = check_choice("sharing", sharing, SHARING_KINDS)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's further arguments, where a structure has some."""
        return {}

    def configured(self, *, damping: str, sharing: str) -> Self:
        """The same structure, with its own :attr:`options`, as a trainer or a fit would have it."""
        return type(self)(damping=damping, sharing=sharing, **self.options)

    @property
    def label(self) -> str:
        """Name and damping, for summaries."""
        return f"{self.name}/{self.damping}"

    def for_block(self, own: str | None) -> Structure:
        """The structure of a block whose kind has one of its own by this name, or ``None`` for this one."""
        return self if own is None else get(own, damping=self.damping, sharing=self.sharing)

    @abstractmethod
    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:
        """Turn a batch's rows into the statistics that this structure needs.

        Args:
            rows: What the batch shows of the block.
            frame: That of the statistics so far, which these are to be added to; empty at the beginning.

        Returns:
            Sums, in the frame given.
        """

    def reframed(self, statistics: Statistics, name: str) -> Statistics:
        """The same statistics in the frame that they suggest themselves; what cannot be known there is approximated.

        Args:
            statistics: What was measured.
            name: The layer's name, for messages.

        Returns:
            The statistics, of the same names and shapes.
        """
        return statistics

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

    def information(self, spec: BlockSpec) -> Information:
        """How much data tell of the weights: ``log det P − log det P₀`` as a function of ``data_scale``.

        It is ``log det(I + s F̃)`` with ``F̃ = P₀^(-1/2) F̄ P₀^(-1/2)``, differentiable in ``s`` and in the prior's
        precisions. The prior enters exactly where there is a closed form, whatever ``damping`` says.

        Args:
            spec: The block; its ``data_scale`` is not used.

        Returns:
            The function.
        """
        spectrum = self.spectrum(spec).double()
        return lambda scale: torch.log1p(scale * spectrum).sum()

    def spectrum(self, spec: BlockSpec) -> Tensor:
        """The eigenvalues of ``F̃``, see :meth:`information`; of structures that have them.

        Args:
            spec: The block.

        Returns:
            ``[*blocks, ...]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a spectrum nor an information() of its own.")

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


def get(structure: str | Structure, *, damping: str, sharing: str) -> Structure:
    """Make a structure by its name.

    Args:
        structure: One of :func:`available`, or a structure with options of its own.
        damping: How the prior enters.
        sharing: How positions that share weights are summed.

    Returns:
        The structure.
    """
    if isinstance(structure, Structure):
        return structure.configured(damping=damping, sharing=sharing)
    return _STRUCTURES[check_choice("structure", structure, available())](damping=damping, sharing=sharing)


def build(structures: Mapping[str, Structure], specs: Sequence[BlockSpec]) -> dict[str, BlockGaussian]:
    """The Gaussian of each block; those of one structure together, so that equal shapes share batched calls.

    Args:
        structures: The structure of each block, by name.
        specs: The blocks.

    Returns:
        The Gaussians by name, in the order of the specs.
    """
    together: dict[tuple[Any, ...], list[BlockSpec]] = {}
    for spec in specs:
        own = structures[spec.name]
        together.setdefault((type(own), own.damping, own.sharing, *own.options.items()), []).append(spec)
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
