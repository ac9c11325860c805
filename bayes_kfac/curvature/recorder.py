"""The recorder: hooks that see each block's inputs and the place of its outputs in the autograd graph.

A block may be used several times in one forward pass, by a module that is called again or by several modules with tied
weights: each use is a call.

Hooks are on the model only between :meth:`Recorder.attach` and :meth:`Recorder.detach`; a model that is copied, pickled
or compiled at any other time carries none. Compiled modules run uncompiled in between: a compiled graph shows no layer.

Some models use the weight of a linear layer without calling it, ``F.linear(x, layer.weight)``. A mode of torch sees
these products; as it slows every operation down, it stays on only where the first pass had any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from bayes_kfac.curvature.alignment import WAYS, Way
from bayes_kfac.curvature.layers import Layer, Use
from bayes_kfac.curvature.modules import CompositeAdapter, LinearAdapter, LinearWithoutBiasAdapter
from bayes_kfac.curvature.pullback import Call, PullBack
from bayes_kfac.curvature.rows import Rows
from bayes_kfac.errors import UsageError


class Recorder:
    """Records the uses of blocks during a forward pass.

    Args:
        layers: The layers to watch, by name.

    Attributes:
        is_recording: Whether calls are taken down; set to ``False`` to let forward passes go by.
        keeps_graph: Whether what is taken down stays in the autograd graph, for derivatives of rows.
        calls: What was taken down since the last :meth:`clear`.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.is_recording = True
        self.keeps_graph = False
        self.calls: list[Call] = []
        self._attached: ExitStack | None = None
        self._known: dict[tuple[int, ...], _Known] = {}
        #: Linear layers, whose weights may be used without calling them.
        self._linear = [
            (layer.name, use)
            for layer in layers.values()
            for use in layer.uses
            if type(use.adapter) is LinearAdapter and use.composite is None
        ]
        self._has_products: bool | None = None  # not known before the first pass
        self._open_calls = 0

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
        if self._linear and self._has_products is not False:
            self._watch_products(stack)

    def _watch_products(self, stack: ExitStack) -> None:
        """See products with weights of linear layers outside of their calls."""
        self._open_calls = 0
        for module in {use.adapter.module for _, use in self._linear}:
            stack.callback(module.register_forward_pre_hook(lambda *_: self._count_calls(1)).remove)
            stack.callback(module.register_forward_hook(lambda *_: self._count_calls(-1), always_call=True).remove)
        stack.enter_context(_Products(self._take_product))

    def _count_calls(self, change: int) -> None:
        self._open_calls += change

    def detach(self) -> None:
        """Take the hooks off and forget what was recorded."""
        if self._attached:
            self._attached.close()
        self._attached = None
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.calls = []  # a new one: the old may be kept for later

    def pull_back(self, output: Tensor, calls: Sequence[Call] | None = None, **options: Any) -> PullBack:
        """What pulls gradients with respect to the model's output back to every block; the graph is kept.

        How rows lie, and whether examples meet, is probed for each shape of an example's output: on the first batch of
        several whose output is finite, and with a look at the second, fourth, eighth and so on: a graph may have no
        edges. Layers whose rows have not always had the output's batch are probed on every batch: nodes of graphs, the
        images that take another way, and time that comes first lie differently from one to the next.

        Args:
            output: The model's output, ``[batch, ...]``, of the forward pass that was recorded.
            calls: The calls of that pass, where they are not those of :attr:`calls`.
            options: Further arguments of :class:`PullBack`.

        Returns:
            The pull-back.
        """
        calls = self.calls if calls is None else calls
        pull_back = PullBack(self.layers, calls, output, create_graph=self.keeps_graph, **options)
        if len(output) == 1 or not output.requires_grad:  # all rows are the one example's
            return replace(pull_back, ways={})
        return replace(pull_back, ways=self._probed(pull_back))

    def _probed(self, pull_back: PullBack) -> Mapping[str, Set[Way]]:
        """How rows lie by all probes so far, and by one of this pass where it is due."""
        output = pull_back.output
        known = self._known.setdefault(tuple(output.shape[1:]), _Known())  # tokens meet where sequences do not
        known.passes += 1
        known.forget({call.layer for call in pull_back.calls if call.batch != len(output)})
        is_known = all(call.layer in known.ways for call in pull_back.calls)
        is_due = known.passes.bit_count() == 1
        # most passes know: nothing is read back from the device
        tells = not (is_known and not is_due) and bool(torch.isfinite(output).all())
        if is_known and not tells:
            return dict(known.ways)
        probed = pull_back.probe(split=known.passes if is_known else None)
        known.forget({name for name, own in probed.items() if not own <= set(WAYS)})
        found = {name: own & known.ways.get(name, own) for name, own in probed.items()}
        ways = {**known.ways, **found}
        if tells:
            known.learn(found)
        return ways

    def rows(
        self, output: Tensor, output_gradients: Tensor, *, mask: Tensor | None = None, **options: Any
    ) -> dict[str, Rows]:
        """The rows of each layer that was used and that the output depends on: :meth:`PullBack.rows`."""
        return self.pull_back(output, **options).rows(output_gradients, mask)

    def _hook(
        self, name: str, use: Use, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return self._take([(name, use)], partial(use.adapter.capture, args, kwargs, output), output)

    def _run_composite(
        self, composite: CompositeAdapter, uses: Mapping[str, list[tuple[str, Use]]], *args: Any, **kwargs: Any
    ) -> Any:
        def record(part: str, captured: Any, output: Tensor) -> Tensor:
            return self._take(uses.get(part, []), lambda: captured, output)

        self._count_calls(1)  # whose products it tells of by itself
        try:
            return composite.forward(record, *args, **kwargs)
        finally:
            self._count_calls(-1)

    def _take_product(self, output: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Take an ``F.linear`` down if no call of a layer does, for every layer whose weight it is with."""
        if self._open_calls or not self.is_recording:
            return output
        uses: dict[str, Use] = {}
        for name, use in self._linear:
            adapter = use.adapter
            if adapter.parameter("weight") is not given["weight"] or name in uses:
                continue
            if not adapter.bias or adapter.parameter("bias") is given.get("bias"):
                uses[name] = use
            elif adapter.weight:
                uses[name] = replace(use, adapter=LinearWithoutBiasAdapter(adapter.module, bias=True))
        self._has_products = self._has_products or bool(uses)
        return self._take(list(uses.items()), lambda: given["input"], output)

    def _take(self, uses: list[tuple[str, Use]], capture: Callable[[], Any], output: Tensor) -> Tensor:
        """Take a call down; returns the output that the model goes on with."""
        # outputs of no_grad forwards have no place in a graph, so that nothing can be pulled back to them; empty ones
        # have no rows
        if not self.is_recording or not output.requires_grad or not output.numel() or not uses:
            return output
        if output._is_view():  # an operation in place on a view would take its edge out of the graph
            output = output.clone()
        self._has_products = bool(self._has_products)
        with torch.set_grad_enabled(self.keeps_graph):
            captured = capture()
        if not self.keeps_graph:
            captured = tree_map_only(Tensor, Tensor.detach, captured)
        self.calls += [Call.of(name, use, captured, output) for name, use in uses]
        return output


@dataclass
class _Known:
    """What is known of how rows lie.

    Attributes:
        ways: The ways of layers, by name: of those whose rows have had the batch of the output in every pass, and of
            those in which examples have met, which have none.
        passes: How many passes there were.
        varying: The layers whose rows had another batch in some pass, or lay in no order; what holds in one pass says
            nothing of the next.
    """

    ways: dict[str, Set[Way]] = field(default_factory=dict)
    passes: int = 0
    varying: set[str] = field(default_factory=set)

    def forget(self, names: Set[str]) -> None:
        """Let go of how the rows of layers lie, which vary."""
        self.varying |= names
        for name in names:
            if self.ways.get(name):
                del self.ways[name]

    def learn(self, found: Mapping[str, Set[Way]]) -> None:
        """Keep what holds for other passes too."""
        self.ways.update({name: ways for name, ways in found.items() if not (ways and name in self.varying)})


class _Products(TorchFunctionMode):
    """Tells of every ``F.linear``.

    Args:
        take: Called with its output, and its arguments by name; returns the output to go on with.
    """

    def __init__(self, take: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not functional.linear:
            return output
        return self.take(output, dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs)


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
