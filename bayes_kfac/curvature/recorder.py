"""The recorder: hooks that see each block's inputs and the place of its outputs in the autograd graph.

A block may be used several times in one forward pass, by a module that is called again or by several modules with tied
weights: each use is a call.

Hooks are on the model only between :meth:`Recorder.attach` and :meth:`Recorder.detach`; a model that is copied, pickled
or compiled at any other time carries none. Compiled modules run uncompiled in between: a compiled graph shows no layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayes_kfac.curvature.layers import Layer, Use
from bayes_kfac.curvature.modules import CompositeAdapter
from bayes_kfac.curvature.pullback import Call, PullBack
from bayes_kfac.curvature.rows import Rows
from bayes_kfac.errors import UsageError


class Recorder:
    """Records the uses of blocks during a forward pass.

    Args:
        layers: The layers to watch, by name.

    Attributes:
        is_recording: Whether calls are taken down; set to ``False`` to let forward passes go by.
        calls: What was taken down since the last :meth:`clear`; what :meth:`rows` goes by.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.is_recording = True
        self.calls: list[Call] = []
        self._attached: ExitStack | None = None

    def attach(self) -> None:
        """Put a forward hook on every module that uses a block.

        Raises:
            UsageError: If the hooks are on already.
        """
        if self._attached:
            raise UsageError("The recorder is attached already; detach() it first.")
        with ExitStack() as stack:
            self._attach(stack)
            self._attached = stack.pop_all()

    def _attach(self, stack: ExitStack) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        parts: dict[CompositeAdapter, dict[str, list[tuple[str, Use]]]] = {}
        for layer in self.layers.values():
            for use in layer.uses:
                if use.composite is not None:
                    parts.setdefault(use.composite, {}).setdefault(use.part, []).append((layer.name, use))
                elif not use.adapter.stands_alone:
                    hook = partial(self._hook, layer.name, use)
                    handle: RemovableHandle = use.adapter.module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
        for composite, uses in parts.items():
            stack.callback(_replace_forward(composite.module, partial(self._run_composite, composite, uses)))

    def detach(self) -> None:
        """Take the hooks off and forget what was recorded."""
        if self._attached:
            self._attached.close()
        self._attached = None
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.calls = []  # a new one: the old may be kept for later

    def rows(
        self, output: Tensor, output_gradients: Tensor, *, mask: Tensor | None = None, **options: Any
    ) -> dict[str, Rows]:
        """Pull gradients with respect to the model's output back to every block; the graph is kept.

        Args:
            output: The model's output, ``[batch, ...]``, of the forward pass that was recorded.
            output_gradients: ``[columns, batch, ...]``.
            mask: Which elements of the output weigh.
            options: Further arguments of :class:`PullBack`.

        Returns:
            The rows of each layer that was used and that the output depends on.
        """
        return PullBack(self.layers, self.calls, output, **options).rows(output_gradients, mask)

    def _hook(
        self, name: str, use: Use, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return self._take([(name, use)], partial(use.adapter.capture, args, kwargs, output), output)

    def _run_composite(
        self, composite: CompositeAdapter, uses: Mapping[str, list[tuple[str, Use]]], *args: Any, **kwargs: Any
    ) -> Any:
        def record(part: str, captured: Any, output: Tensor) -> Tensor:
            return self._take(uses.get(part, []), lambda: captured, output)

        return composite.forward(record, *args, **kwargs)

    def _take(self, uses: list[tuple[str, Use]], capture: Callable[[], Any], output: Tensor) -> Tensor:
        """Take a call down; returns the output that the model goes on with."""
        # outputs of no_grad forwards have no place in a graph, and nothing can be pulled back to them
        if not self.is_recording or not output.requires_grad or not uses:
            return output
        if output._is_view():  # an operation in place on a view would take its edge out of the graph
            output = output.clone()
        captured = capture()
        self.calls += [Call.of(name, use, captured, output) for name, use in uses]
        return output


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give a module another forward pass; returns what takes it back."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return restore
