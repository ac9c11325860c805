"""The Gaussian of one block: what every structure's result can do, and the registry of kinds that a file can hold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.structures.whitened import Whitened, WhitenedJacobians

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

    @property
    def matrix_normal_roots(self) -> tuple[Tensor, Tensor] | None:
        """Triangular factors ``L_U`` and ``L_V`` of the covariance ``U ⊗ V``, where it is of this form."""
        return None

    @property
    def note(self) -> str:
        """What a summary should say of this very Gaussian; empty where there is nothing to say."""
        return ""

    def to_power(self, exponent: float) -> BlockGaussian:
        """The Gaussian of precision ``P^p``; kinds that have none in closed form raise ``ArgumentError``."""
        raise ArgumentError(f"power={exponent!r} is not allowed: a {self.kind} Gaussian has no powers. Allowed: 1.")

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


GaussianType = TypeVar("GaussianType", bound=type[BlockGaussian])


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


def gaussian_from_state(kind: str, state: Mapping[str, Tensor]) -> BlockGaussian:
    """Rebuild a Gaussian from :attr:`BlockGaussian.kind` and :attr:`BlockGaussian.state`.

    Args:
        kind: The registered name.
        state: The tensors.

    Returns:
        The Gaussian.
    """
    return _GAUSSIANS[check_choice("kind", kind, tuple(_GAUSSIANS))](**state)


def standard_normal(gaussian: BlockGaussian, generator: torch.Generator | None, count: tuple[int, ...] = ()) -> Tensor:
    """Standard normal noise for a block, ``[*count, *blocks, out, in]``, like its state."""
    like = gaussian.like
    # a generator draws on its own device only: one of the CPU serves a model anywhere, the same numbers everywhere
    device = like.device if generator is None else generator.device
    noise = torch.randn((*count, *gaussian.shape), dtype=like.dtype, device=device, generator=generator)
    return noise.to(like.device)
