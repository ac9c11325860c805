"""Linear maps of the last dimension: ``nn.Linear``, and the transposed ``Conv1D`` of Hugging Face's GPT-2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from bayes_kfac.curvature.modules.base import ModuleAdapter, register, register_like


@register(nn.Linear)
class LinearAdapter(ModuleAdapter):
    """``nn.Linear`` on inputs ``[batch, ..., in]``: the dimensions between are shared."""

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._append_one(as_rows(inputs))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return as_rows(gradient)

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: D102
        # a module that reads the weights of its child, of this type, without calling it: no hook on it ever fires
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "MultiheadAttention uses it without calling it"
        return None


class LinearWithoutBiasAdapter(LinearAdapter):
    """A use of a linear layer's weight without its bias, whose column of the rows is zero."""

    def _append_one(self, rows: Tensor) -> Tensor:
        return functional.pad(rows, (0, 1))


def _is_linear(module: nn.Module) -> bool:
    weight, names = getattr(module, "weight", None), {"in_channels", "out_channels"}
    return type(module).__name__ == "Linear" and names <= vars(module).keys() and getattr(weight, "ndim", 0) == 2


register_like(_is_linear)(LinearAdapter)  # PyTorch Geometric's, which is no nn.Linear


def _is_transposed_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor)


@register_like(_is_transposed_linear)
class TransposedLinearAdapter(LinearAdapter):
    """Hugging Face's ``Conv1D``: a linear map whose weight is ``[in, out]``."""

    transposes = True


def as_rows(tensor: Tensor) -> Tensor:
    """``[batch, ..., features]`` to ``[batch, shared, features]``; a lone vector is a batch of one."""
    if tensor.ndim == 1:
        return tensor[None, None]
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
