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

Independent blocks stack along ``*blocks``; quantities of one block have that shape. Blocks of different layers are
independent too, but for structures that link layers: see :mod:`bayes_kfac.structures.joint`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from bayes_kfac.curvature import (
    EXAMPLEWISE_KINDS,
    FISHER_KINDS,
    NO_FRAME,
    SHARING_KINDS,
    Frame,
    Layer,
    Rows,
    Statistics,
)
from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.structures.gaussian import BlockGaussian, gaussian_from_state, register_gaussian, standard_normal
from bayes_kfac.structures.link import Link

__all__ = [
    "DAMPING_KINDS",
    "BlockGaussian",
    "BlockSpec",
    "Card",
    "Information",
    "Prior",
    "Structure",
    "available",
    "gaussian_from_state",
    "get",
    "register",
    "register_gaussian",
    "standard_normal",
]

DAMPING_KINDS = ("factored", "optimal", "exact")

_STRUCTURES: dict[str, type[Structure]] = {}


#: A prior's precision: see :attr:`BlockSpec.prior`.
Prior = float | Tensor | BlockGaussian
#: See :meth:`Structure.information`.
Information = Callable[[Tensor], Tensor]


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
    #: Why a structure is a preconditioner only, and its Gaussian no posterior, with what to take in its place.
    refusal: ClassVar[str] = ""
    #: The kinds of Fisher that it can be measured with; ``"recursive"`` takes one that reads no more of the gradients
    #: than their second moment.
    fishers: ClassVar[tuple[str, ...]] = EXAMPLEWISE_KINDS
    #: Whether statistics of a batch's output gradients in parts add up to those of all of them; single columns, which a
    #: window keeps some of, do not.
    takes_parts: ClassVar[bool] = True
    #: The layer that the block is linked to, where a structure correlates layers: see :meth:`for_layers`.
    linked_to: str | None = None

    def __init__(self, *, damping: str = "factored", sharing: str = "expand") -> None:
        self.damping = check_choice("damping", damping, DAMPING_KINDS)
        self.sharing = check_choice("sharing", sharing, SHARING_KINDS)

    def check_posterior(self) -> None:
        """Refuse to be a posterior, where the structure is a preconditioner only.

        Raises:
            ArgumentError: If it is; the message says why.
        """
        if self.refusal:
            raise ArgumentError(
                f"structure={self.name!r} is a preconditioner and no posterior: {self.refusal} Train with "
                "NaturalGradient, or choose another structure."
            )

    def check_fisher(self, fisher: str) -> None:
        """Refuse a kind of Fisher that the structure is not for.

        Args:
            fisher: The kind.

        Raises:
            ArgumentError: If it is.
        """
        if check_choice("fisher", fisher, FISHER_KINDS) not in self.fishers:
            allowed = ", ".join(map(repr, self.fishers))
            raise ArgumentError(f"fisher={fisher!r} does not go with structure={self.name!r}. Allowed: {allowed}.")

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

    def for_layer(self, layer: Layer) -> Structure:
        """The structure of a layer by itself: this one, or that of the layer's kind where it has one of its own."""
        own = layer.adapter.structure
        return self if own is None else get(own, damping=self.damping, sharing=self.sharing)

    def for_layers(self, layers: Mapping[str, Layer]) -> dict[str, Structure]:
        """The structure of each layer of a model, :meth:`for_layer`, and what depends on the others.

        Args:
            layers: The layers by name, in their order.

        Returns:
            The structures by name.
        """
        return {name: self.for_layer(layer) for name, layer in layers.items()}

    @abstractmethod
    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:
        """Turn a batch's rows into the statistics that this structure needs.

        Args:
            rows: What the batch shows of the block, in the dtype of its statistics.
            frame: That of the statistics so far, which these are to be added to; empty at the beginning.

        Returns:
            Sums, in the frame given.
        """

    def measure_linked(self, rows: Rows, other: Rows | None, frame: Frame = NO_FRAME) -> Statistics:
        """:meth:`measure` of a layer that is linked to another.

        Args:
            rows: What the batch shows of the layer.
            other: What it shows of :attr:`linked_to`; ``None`` where there is no such layer, or it was not used.
            frame: As for :meth:`measure`.

        Returns:
            Sums, of the same names and shapes whether the other layer was used or not.
        """
        return self.measure(rows, frame)

    def adapted(self, statistics: Statistics) -> Statistics:
        """The same statistics of a layer that is linked to another one than before, as :meth:`measure_linked` has them.

        Args:
            statistics: What was measured when :attr:`linked_to` was another.

        Returns:
            What goes on with what is measured now.
        """
        return statistics

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
            like: A tensor of the dtype and device of its statistics.
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

    def linked_gaussians(
        self, specs: Sequence[BlockSpec], pairs: Mapping[str, str]
    ) -> tuple[Sequence[BlockGaussian], Mapping[str, Link]]:
        """Build the Gaussian of many layers, some of which are linked to others.

        Args:
            specs: The layers' blocks.
            pairs: Those of :attr:`linked_to` that are among them, by the layers that the links come from.

        Returns:
            The blocks and the links of a :class:`bayes_kfac.structures.JointGaussian`; without links, what
            :meth:`gaussians` gives.
        """
        return self.gaussians(specs), {}

    def correlation(self, specs: Sequence[BlockSpec], pairs: Mapping[str, str]) -> Information:
        """``log det P − Σ_l log det P_ll`` of linked layers as a function of ``data_scale``.

        Args:
            specs: The layers' blocks; their ``data_scale`` is not used.
            pairs: As for :meth:`linked_gaussians`.

        Returns:
            The function, differentiable as :meth:`information`.
        """
        return torch.zeros_like


StructureType = TypeVar("StructureType", bound=type[Structure])


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


def available() -> tuple[str, ...]:
    """The names that ``structure=`` accepts.

    Returns:
        The names, sorted.

    Example:
        >>> from bayes_kfac import structures
        >>> {"kron", "ekfac", "diagonal", "dense"} <= set(structures.available())
        True
    """
    return tuple(sorted(name for name, structure in _STRUCTURES.items() if not structure.refusal))


def preconditioners() -> tuple[str, ...]:
    """What ``structure=`` of :class:`bayes_kfac.NaturalGradient` accepts beside :func:`available`: no posteriors."""
    return tuple(sorted(name for name, structure in _STRUCTURES.items() if structure.refusal))


def get(structure: str | Structure, *, damping: str, sharing: str) -> Structure:
    """Make a structure by its name.

    Args:
        structure: One of :func:`available`, or a structure with options of its own.
        damping: How the prior enters.
        sharing: How positions that share weights are summed.

    Returns:
        The structure.

    Example:
        >>> from bayes_kfac import structures
        >>> structures.get("kron", damping="optimal", sharing="expand").label
        'kron/optimal'
    """
    if isinstance(structure, Structure):
        return structure.configured(damping=damping, sharing=sharing)
    return _STRUCTURES[check_choice("structure", structure, (*available(), *preconditioners()))](
        damping=damping, sharing=sharing
    )
