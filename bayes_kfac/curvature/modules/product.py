"""One matrix product among several inside a module: the blocks of attention and recurrence.

Sequences inside these modules are time first: a product's inputs are ``[time, batch, in]``. A product may fill only a
part of its block's outputs, as the query's projection does in a fused weight; the rows are zero in the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from bayes_kfac.curvature.modules.base import ModuleAdapter, Record
from bayes_kfac.curvature.rows import SparseRows


class Captured(NamedTuple):
    """What is kept of one product.

    Attributes:
        inputs: ``[time, batch, in]``.
        offset: Where in the block its outputs begin.
    """

    inputs: Tensor
    offset: int = 0


class ProductAdapter(ModuleAdapter):
    """A block ``[W b]`` of a composite module.

    Args:
        module: The composite module.
        names: The weight's and the bias's name in it.
        runs_backwards: Whether its calls go back in time.
        weight: Whether the weight belongs to the block.
        bias: Whether the bias does.
    """

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        runs_backwards: bool = False,
        *,
        weight: bool = True,
        bias: bool,
    ) -> None:
        self.parameter_names = names
        self.runs_backwards = runs_backwards
        super().__init__(module, weight=weight, bias=bias)

    def rows(  # noqa: D102
        self, captured: Captured, gradients: Tensor, inputs: Tensor | SparseRows | None = None
    ) -> tuple[Tensor | SparseRows, Tensor]:
        outgoing = gradients.transpose(1, 2)
        end = captured.offset + outgoing.shape[-1]
        outgoing = functional.pad(outgoing, (captured.offset, self.shape[-2] - end))
        return self._inputs_beside(outgoing, captured.inputs) if inputs is None else inputs, outgoing

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._append_one(inputs.transpose(0, 1))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.transpose(0, 1)

    def _weight_shape(self) -> tuple[int, ...]:
        if self.weight:
            return super()._weight_shape()
        return (self.parameter("bias").numel(), 1)


def product(*names: str, runs_backwards: bool = False) -> Callable[..., ModuleAdapter]:
    """What makes the adapter of the block whose weight and bias have these names."""
    return partial(ProductAdapter, names=names, runs_backwards=runs_backwards)


def recorded_linear(
    record: Record, part: str, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, offset: int = 0
) -> Tensor:
    """``F.linear`` of ``[time, batch, in]``, told to the recorder.

    Args:
        record: The recorder's.
        part: The block's name in the module.
        inputs: The input.
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.
        offset: Where in the block the outputs begin.

    Returns:
        ``[time, batch, out]``.
    """
    return record(part, Captured(inputs, offset), functional.linear(inputs, weight, bias))
