"""Parameters that no module multiplies an input with: positional embeddings, class tokens, gates, user's own layers.

The block is the parameter itself, ``(elements, 1)`` on an input of 1, with a diagonal covariance. Its gradient rows are
the gradients of the parameter, one example at a time; autograd sees every use of it, whatever the module does.
"""

from __future__ import annotations

from torch import Tensor, nn

from bayes_kfac.curvature.modules.base import Modes, ModuleAdapter
from bayes_kfac.curvature.rows import SparseRows


class ParameterAdapter(ModuleAdapter):
    """One parameter of any shape, held by a module under any name.

    Args:
        module: The module.
        name: The parameter's name in it.
    """

    structure = "diagonal"
    stands_alone = True

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, bias=False)
        self.parameter_names = (name,)

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return inputs.new_ones(()).expand(*inputs.shape[:-1], 1)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """``[batch, *parameter]`` to ``[batch, 1, elements]``."""
        return gradient.reshape(gradient.shape[0], 1, -1)

    def rows(
        self, captured: None, gradients: Tensor, inputs: Tensor | SparseRows | None = None
    ) -> tuple[Tensor | SparseRows, Tensor]:
        """The rows of a parameter's gradients of each example, ``[columns, batch, *parameter]``."""
        outgoing = gradients.reshape(*gradients.shape[:2], 1, -1)
        return self.input_rows(outgoing[0]) if inputs is None else inputs, outgoing

    @property
    def modes(self) -> Modes:
        """The parameter's own, without those of one element."""
        return tuple(size for size in self.parameter("weight").shape if size > 1) or (1,), ()

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.parameter("weight").numel(), 1)
