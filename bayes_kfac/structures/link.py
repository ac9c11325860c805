"""A link: what the weights of one layer say about those of another, as a Kronecker product ``Ψ = Ψ^G ⊗ Ψ^A``.

``Ψ`` takes gradients of the layer it leads to, ``[out', in']``, to those of the layer it comes from, ``[out, in]``; its
transpose takes weights the other way. Neither factor is square in general.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bayes_kfac.curvature import Rows
from bayes_kfac.structures.gaussian import BlockGaussian


@dataclass(frozen=True)
class Link:
    """A link from one layer to another.

    Attributes:
        to: The layer that it leads to, by name.
        row: ``Ψ^G``, ``[out, out']``.
        column: ``Ψ^A``, ``[in, in']``.
        kept: Which part of the measured correlation it has, a scalar: 1, or less where statistics that were averaged
            over unlike data would have made it more than certain.
    """

    to: str
    row: Tensor
    column: Tensor
    kept: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        """``Ψ V``, from ``[..., out', in']`` to ``[..., out, in]``."""
        return self.row @ value @ self.column.mT

    def adjoint(self, value: Tensor) -> Tensor:
        """``Ψᵀ V``, from ``[..., out, in]`` to ``[..., out', in']``."""
        return self.row.mT @ value @ self.column

    def rows(self, rows: Rows) -> Rows:
        """The rows whose Jacobians are ``Ψ J``, of the rows of ``J``."""
        assert isinstance(rows.inputs, Tensor)
        return Rows(rows.inputs @ self.column.mT, rows.gradients @ self.row.mT)

    def variance(self, gaussian: BlockGaussian) -> Tensor:
        """The variances of ``Ψᵀ Z``, ``[out', in']``, for ``Z`` of a Gaussian."""
        inputs = self.column.mT.unsqueeze(-2)  # each is the response to one Jacobian, a row times a row
        gradients = self.row.mT[:, None, None].expand(-1, len(inputs), -1, -1)
        return gaussian.whitened(inputs, gradients).variance().mT

    @property
    def state(self) -> dict[str, Tensor]:
        """Plain tensors from which, with the name, the link can be made again."""
        return {"row": self.row, "column": self.column, "kept": self.kept}

    def map(self, function: Callable[[Tensor], Tensor]) -> Link:
        """The link with a function applied to every tensor: a move to another device or dtype."""
        return Link(self.to, **{name: function(tensor) for name, tensor in self.state.items()})


#: Links by the layers that they come from.
Links = Mapping[str, Link]
