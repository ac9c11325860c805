"""The contract of an adapter: how a kind of module maps onto a block ``W a`` of shape ``(out, in)``; and the registry.

A block speaks *rows*. Inputs become ``[*blocks, batch, shared, in]`` and output gradients
``[*blocks, batch, shared, out]``; ``shared`` counts the positions at which the same weights are used (1 for a plain
``Linear``, positions for a convolution, time for a sequence). A bias is the last column of the block, so inputs get a 1
appended. ``*blocks`` is empty for most modules; a grouped convolution is a stack of independent blocks, one for each
group, and a normalisation one for each feature.

A new kind of module is one subclass and one :func:`register` line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bayes_kfac.curvature.rows import SparseRows

#: See :attr:`ModuleAdapter.modes`.
Modes = tuple[tuple[int, ...], tuple[int, ...]]


class ModuleAdapter(ABC):
    """How one block's parameters, inputs and output gradients look in a module.

    Args:
        module: The module.
        weight: Whether its weight belongs to the block; without it the block is the bias alone, on inputs of 1.
        bias: Whether its bias belongs to the block, as the last column.
    """

    #: The names in the module of the parameters that an adapter understands, the weight's first.
    parameter_names: tuple[str, ...] = ("weight", "bias")
    #: The structure of these blocks whatever the user's is; ``None`` for the user's.
    structure: ClassVar[str | None] = None
    #: Whether no module multiplies the block with an input, so that its gradients come from autograd and not a hook.
    stands_alone: ClassVar[bool] = False
    #: Whether the block is the transpose of a two-dimensional weight.
    transposes: ClassVar[bool] = False
    #: Whether the calls of one forward pass go back in time, so that the last one is the first position.
    runs_backwards: bool = False
    #: Whether input rows are :class:`SparseRows`, so that the input side of the block is diagonal.
    sparse: ClassVar[bool] = False

    def __init__(self, module: nn.Module, *, weight: bool = True, bias: bool) -> None:
        self.module: Any = module
        self.weight = weight
        self.bias = bias

    @abstractmethod
    def input_rows(self, inputs: Any) -> Tensor | SparseRows:
        """Bring what :meth:`capture` kept of a call to ``[*blocks, batch, shared, in]``, with the 1 of a bias."""

    @abstractmethod
    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Bring a gradient with respect to the module's output to ``[*blocks, batch, shared, out]``."""

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:
        """What to keep of a call until its rows are asked for: the first argument, as it is."""
        return next(iter((*args, *kwargs.values())))

    def rows(
        self, captured: Any, gradients: Tensor, inputs: Tensor | SparseRows | None = None
    ) -> tuple[Tensor | SparseRows, Tensor]:
        """The rows of one call.

        Args:
            captured: What :meth:`capture` returned.
            gradients: Gradients with respect to the call's output, ``[columns, *output]``.
            inputs: The rows' inputs, where they are known from other gradients of the same call.

        Returns:
            Inputs ``[*blocks, batch, shared, in]`` and gradients ``[columns, *blocks, batch, shared, out]``.
        """
        if len(gradients) > 1:
            outgoing = torch.vmap(self.gradient_rows)(gradients)
        else:  # vmap's overhead would rule on small networks
            outgoing = self.gradient_rows(gradients[0]).unsqueeze(0)
        return self._inputs_beside(outgoing, captured) if inputs is None else inputs, outgoing

    def _inputs_beside(self, outgoing: Tensor, captured: Any) -> Tensor | SparseRows:
        """The inputs of rows with these gradients; of a bias alone ones."""
        if self.weight:
            return self.input_rows(captured)
        return outgoing.new_ones(()).expand(*outgoing.shape[1:-1], 1)

    def to_matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Join tensors shaped like weight and bias into ``[*blocks, out, in]``."""
        *rows, columns = self._weight_shape()
        parts = []
        if weight is not None:
            parts.append(weight.mT if self.transposes else weight.reshape(*rows, columns))
        if bias is not None:
            parts.append(bias.reshape(*rows, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Split ``[..., *blocks, out, in]`` into tensors shaped like weight and bias, keeping leading dimensions."""
        leading = matrix.shape[: matrix.ndim - len(self._weight_shape())]
        weight, bias = None, None
        if self.weight:
            columns = matrix[..., :-1] if self.bias else matrix
            weight = columns.mT if self.transposes else columns.reshape(leading + self.parameter("weight").shape)
        if self.bias:
            bias = matrix[..., -1].reshape(leading + self.parameter("bias").shape)
        return weight, bias

    def parameter(self, kind: str) -> Tensor:
        """The module's ``"weight"`` or ``"bias"``."""
        name = self.parameter_names[kind == "bias"]
        own = self.module._parameters  # getattr on a module is slow, and this is asked for often; scripted: no get()
        value: Any = own[name] if name in own else None  # noqa: SIM401
        if value is None:
            value = self.module
            for part in name.split("."):
                value = getattr(value, part)
        tensor: Tensor = value
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape, ``(*blocks, out, in)``, with the bias's column."""
        *leading, columns = self._weight_shape()
        return (*leading, columns * self.weight + self.bias)

    @property
    def modes(self) -> Modes:
        """The sizes of the modes, on the ``out`` side and on the ``in`` side, of the tensor that a block is.

        Its elements in their order are the block's. A matrix has one on each side.
        """
        out_features, in_features = self.shape[-2:]
        return (out_features,), (in_features,)

    def _weight_shape(self) -> tuple[int, ...]:
        """The weight's shape as a block, without the bias's column."""
        weight = self.parameter("weight")
        shape = (weight.shape[0], weight[0].numel())
        return shape[::-1] if self.transposes else shape

    def _append_one(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if self.bias else rows

    def _output_with(self, weight: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The module's output with another weight: it tells what a module of another library does with it."""
        held, own = self.module._parameters, self.module.weight
        held["weight"] = weight
        try:
            output: Tensor = self.module.forward(*args, **kwargs)  # past the hooks, of which this may be one
        finally:
            held["weight"] = own
        return output

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Say why this module cannot be a block although its kind can, or return ``None``."""
        return None


#: Tells the recorder of one product inside a composite module, by its part, what is captured of it and its output;
#: returns the output to go on with.
Record = Callable[[str, Any, Tensor], Tensor]


class CompositeAdapter(ABC):
    """A module in which several blocks are used, out of sight of hooks: attention, recurrence.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @abstractmethod
    def parts(self) -> dict[str, type[ModuleAdapter] | Callable[..., ModuleAdapter]]:
        """For each block its name and what makes its adapter from ``(module, weight=, bias=)``."""

    @abstractmethod
    def forward(self, record: Record, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass; ``output = record(part, captured, output)`` tells of each product inside.

        Used in the place of the module's own while it is watched, so that it must compute the same function.
        """


Adapter = TypeVar("Adapter", bound=type[ModuleAdapter] | type[CompositeAdapter])
Likeness = Callable[[nn.Module], bool]

_REGISTRY: dict[type[nn.Module], Any] = {}
_LIKENESSES: list[tuple[Likeness, Any]] = []


def register(module_type: type[nn.Module]) -> Callable[[Adapter], Adapter]:
    """Class decorator that makes an adapter serve ``module_type`` and its subclasses that keep its ``forward``.

    Args:
        module_type: The kind of module.

    Returns:
        The decorator.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> class Halved(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(1, 3))
        ...     def forward(self, x):  # x: [batch, 3]
        ...         return 0.5 * x @ self.weight.T
        >>> @bk.curvature.register(Halved)
        ... class HalvedAdapter(bk.curvature.ModuleAdapter):
        ...     def input_rows(self, inputs):
        ...         return 0.5 * inputs[:, None]
        ...     def gradient_rows(self, gradient):
        ...         return gradient[:, None]
        >>> laplace = bk.Laplace(Halved(), bk.likelihoods.Gaussian(1.0), structure="dense")
        >>> posterior = laplace.fit([(2 * torch.eye(3), torch.ones(3, 1))], progress=False).posterior()
        >>> posterior.predict(2 * torch.eye(3)).epistemic_variance.squeeze()  # 1 / (1 + 1)
        tensor([0.5000, 0.5000, 0.5000])
    """

    def decorate(adapter: Adapter) -> Adapter:
        _REGISTRY[module_type] = adapter
        return adapter

    return decorate


def register_like(likeness: Likeness) -> Callable[[Adapter], Adapter]:
    """Class decorator that makes an adapter serve every module that looks the part, and has no adapter by its type.

    Args:
        likeness: Whether a module does; for kinds of libraries that are not imported here.

    Returns:
        The decorator.
    """

    def decorate(adapter: Adapter) -> Adapter:
        _LIKENESSES.append((likeness, adapter))
        return adapter

    return decorate


def adapter_for(module: nn.Module) -> Any:
    """Return the adapter of a module's kind, or ``None``.

    A subclass counts as its parent's kind only while it keeps the parent's ``forward``: another forward pass is
    another function of the weights.
    """
    kind = next((kind for kind in type(module).__mro__ if kind in _REGISTRY), None)
    if kind is not None and type(module).forward is kind.forward:
        return _REGISTRY[kind]
    return next((adapter for likeness, adapter in _LIKENESSES if likeness(module)), None)
