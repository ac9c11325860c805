"""The recorder: hooks that see each layer's input and the place of its output in the autograd graph.

Rows are ``[*blocks, batch, shared, features]`` for inputs; output gradients have a leading dimension of columns, one
for each output-gradient vector pulled back: ``[columns, *blocks, batch, shared, features]``. A module that is called
several times in one forward pass uses its weights several times: the calls are laid side by side along ``shared``.

Hooks are on the model only between :meth:`Recorder.attach` and :meth:`Recorder.detach`; a model that is copied, pickled
or compiled at any other time carries none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from bayes_kfac.curvature.layers import Layer
from bayes_kfac.errors import UnsupportedModelError, UsageError


@dataclass(frozen=True)
class Rows:
    """What one forward and backward pass shows of one layer.

    Attributes:
        inputs: ``[*blocks, batch, shared, in]``, with the 1 of the bias.
        gradients: ``[columns, *blocks, batch, shared, out]``.
    """

    inputs: Tensor
    gradients: Tensor

    @property
    def num_examples(self) -> int:
        """How many examples the rows come from."""
        return self.inputs.shape[-3]


class Recorder:
    """Records the calls of layers during a forward pass and turns them into rows.

    Args:
        layers: The layers to watch, by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self._calls: dict[str, list[tuple[Tensor, GradientEdge]]] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put a forward hook on every layer.

        Raises:
            UsageError: If the hooks are on already.
        """
        if self._handles:
            raise UsageError("The recorder is attached already; detach() it first.")
        for layer in self.layers.values():
            self._handles.append(layer.module.register_forward_hook(self._hook(layer.name), with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()

    @property
    def has_calls(self) -> bool:
        """Whether any layer ran since the last :meth:`clear`."""
        return bool(self._calls)

    def rows(self, output: Tensor, output_gradients: Tensor) -> dict[str, Rows]:
        """Pull gradients with respect to the model's output back to every layer.

        The graph is kept, so that the caller can still run its own backward pass through it.

        Args:
            output: The model's output, ``[batch, ...]``, of the forward pass that was recorded.
            output_gradients: ``[columns, batch, ...]``.

        Returns:
            The rows of each layer that ran and that the output depends on.
        """
        edges = [(name, inputs, edge) for name, calls in self._calls.items() for inputs, edge in calls]
        if not edges:
            return {}
        pulled = _pull_back(output, [edge for _, _, edge in edges], output_gradients)
        inputs: dict[str, list[Tensor]] = {}
        gradients: dict[str, list[Tensor]] = {}
        for (name, layer_input, _), gradient in zip(edges, pulled, strict=True):
            if gradient is None:
                continue
            adapter = self.layers[name].adapter
            inputs.setdefault(name, []).append(_by_example(adapter.input_rows(layer_input), output.shape[0], name))
            if len(gradient) > 1:
                rows = torch.vmap(adapter.gradient_rows)(gradient)
            else:  # vmap's overhead would rule on small networks
                rows = adapter.gradient_rows(gradient[0]).unsqueeze(0)
            gradients.setdefault(name, []).append(_by_example(rows, output.shape[0], name))
        return {name: Rows(_side_by_side(inputs[name]), _side_by_side(gradients[name])) for name in inputs}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], None]:
        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            # outputs of no_grad forwards have no place in a graph, and nothing can be pulled back to them
            if output.requires_grad:
                edge = torch.autograd.graph.get_gradient_edge(output)
                inputs = next(iter((*args, *kwargs.values())))
                self._calls.setdefault(name, []).append((inputs.detach(), edge))

        return record


def _pull_back(output: Tensor, edges: list[GradientEdge], output_gradients: Tensor) -> Iterable[Tensor | None]:
    """Gradients ``[columns, ...]`` at each edge; one batched backward pass for all columns."""
    if output_gradients.shape[0] > 1:
        return torch.autograd.grad(
            output, edges, output_gradients, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    single = torch.autograd.grad(output, edges, output_gradients[0], retain_graph=True, allow_unused=True)
    return [None if gradient is None else gradient.unsqueeze(0) for gradient in single]


def _by_example(rows: Tensor, num_examples: int, name: str) -> Tensor:
    """Give rows the batch dimension of the output: models flatten ``[batch, time]`` before a layer, batch first."""
    batch = rows.shape[-3]
    if batch == num_examples:
        return rows
    if batch % num_examples:
        raise UnsupportedModelError(
            f"Layer {name!r} saw a batch of {batch} rows while the model's output has {num_examples}. The first "
            "dimension of inputs and outputs must be the batch (a batch flattened with further dimensions, batch "
            "first, is understood)."
        )
    return rows.unflatten(-3, (num_examples, batch // num_examples)).flatten(-3, -2)


def _side_by_side(calls: list[Tensor]) -> Tensor:
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=-2)
