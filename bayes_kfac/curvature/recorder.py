"""The recorder: hooks that see each block's inputs and the place of its outputs in the autograd graph.

What it returns are :class:`Rows`. A block that is used several times in one forward pass, by a module that is called
again or by several modules with tied weights, has the rows of all its uses side by side.

Hooks are on the model only between :meth:`Recorder.attach` and :meth:`Recorder.detach`; a model that is copied, pickled
or compiled at any other time carries none. Compiled modules run uncompiled in between: a compiled graph shows no layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from bayes_kfac.batches import count_examples
from bayes_kfac.curvature.layers import Layer, Use
from bayes_kfac.curvature.modules import CompositeAdapter, ParameterAdapter
from bayes_kfac.curvature.rows import Rows, SparseRows, side_by_side
from bayes_kfac.errors import UnsupportedModelError, UsageError

#: Examples times columns that one batched backward pass takes on, where gradients of single examples are needed.
CHUNK = 64
#: Groups of examples whose gradients are summed where that is enough; more of them cost time and save variance.
GROUPS = 8


@dataclass(frozen=True)
class _Call:
    """One use of a block's weights in a forward pass."""

    layer: str
    use: Use
    captured: Any
    edge: GradientEdge
    version: int


class Recorder:
    """Records the uses of blocks during a forward pass and turns them into rows.

    Args:
        layers: The layers to watch, by name.

    Attributes:
        is_recording: Whether calls are taken down; set to ``False`` to let forward passes go by.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.is_recording = True
        self._calls: list[_Call] = []
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
                elif not isinstance(use.adapter, ParameterAdapter):
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
        self._calls.clear()

    @property
    def has_calls(self) -> bool:
        """Whether any block was used since the last :meth:`clear`."""
        return bool(self._calls)

    def rows(
        self,
        output: Tensor,
        output_gradients: Tensor,
        *,
        mask: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        independent: bool = False,
    ) -> dict[str, Rows]:
        """Pull gradients with respect to the model's output back to every block.

        The graph is kept, so that the caller can still run its own backward pass through it.

        Args:
            output: The model's output, ``[batch, ...]``, of the forward pass that was recorded.
            output_gradients: ``[columns, batch, ...]``.
            mask: Which elements of the output weigh, ``[batch, *leading dimensions]``; the gradients of the others must
                be zero.
            parameters: The tensors that the forward pass used for the model's parameters; by default the parameters.
            independent: Whether the gradients of different examples are independent and have mean zero. Gradients of
                groups of examples then serve for parameters that no module multiplies with an input: the expectation
                of a square is the sum of the examples' squares (Liu et al. 2023, "Sophia").

        Returns:
            The rows of each layer that was used and that the output depends on.

        Raises:
            UnsupportedModelError: If the batch of a layer does not fit the output's.
            UsageError: If a layer's input was changed in place since.
        """
        self._check_versions()
        if not output.requires_grad:
            return {}
        examples = None if mask is None else count_examples(mask)
        found: dict[tuple[str, bool], list[Rows]] = {}
        pulled = _pull_back(output, [call.edge for call in self._calls], output_gradients) if self._calls else []
        for call, gradients in zip(self._calls, pulled, strict=True):
            if gradients is None:
                continue
            rows = Rows(*call.use.adapter.rows(call.captured, gradients), examples=examples)
            rows = _by_example(rows, output.shape[0], call.layer)
            if mask is not None:
                rows = replace(rows, mask=_align(mask, rows.inputs.shape[-2]))
            found.setdefault((call.layer, call.use.transposed), []).append(rows)
        joined = {key: side_by_side(calls) for key, calls in found.items()}
        alone = self._rows_of_parameters(output, output_gradients, parameters, independent=independent)
        result = {}
        for name in self.layers:
            if name in alone:
                count = float(output.shape[0]) if examples is None else examples
                result[name] = replace(alone[name], examples=count)
            elif (name, False) in joined:
                result[name] = replace(joined[name, False], transposed=joined.get((name, True)))
            elif (name, True) in joined:
                result[name] = _only_transposed(joined[name, True])
        return result

    def _rows_of_parameters(
        self, output: Tensor, output_gradients: Tensor, parameters: Mapping[str, Tensor] | None, *, independent: bool
    ) -> dict[str, Rows]:
        """The rows of the parameters that no module multiplies with an input."""
        alone = {n: layer for n, layer in self.layers.items() if isinstance(layer.adapter, ParameterAdapter)}
        if not alone:
            return {}
        tensors = [(parameters or layer.parameters)[layer.weight_name or ""] for layer in alone.values()]
        pulled = _example_gradients(output, tensors, output_gradients, independent=independent)
        return {
            name: Rows(*layer.adapter.rows(None, gradients))
            for (name, layer), gradients in zip(alone.items(), pulled, strict=True)
            if gradients is not None
        }

    def check_complete(self, output: Tensor, output_gradient: Tensor, rows: Mapping[str, Rows]) -> None:
        """Check that the rows account for the whole gradient of every block.

        They do not where weights are used without a call of their module, where a layer's adapter is wrong, or where a
        part of the model builds no graph: the statistics would be wrong without a word.

        Args:
            output: The model's output.
            output_gradient: ``[batch, ...]``, the first of the gradients that were pulled back.
            rows: What :meth:`rows` returned for them.

        Raises:
            UnsupportedModelError: If they do not; the message names the layer.
        """
        watched = {n: layer for n, layer in self.layers.items() if not isinstance(layer.adapter, ParameterAdapter)}
        parameters = [p for layer in watched.values() for p in layer.parameters.values()]
        if not parameters:
            return
        gradients = torch.autograd.grad(output, parameters, output_gradient, retain_graph=True, allow_unused=True)
        by_parameter = dict(zip(parameters, gradients, strict=True))
        for name, layer in watched.items():
            expected = {key: by_parameter[parameter] for key, parameter in layer.parameters.items()}
            if all(gradient is None for gradient in expected.values()):
                continue
            whole = layer.matrix({k: layer.parameters[k] * 0 if g is None else g for k, g in expected.items()}).float()
            own = rows[name].total(0).float() if name in rows else torch.zeros_like(whole)
            is_single = torch.finfo(output.dtype).bits >= 32
            allowed = (0.01 if is_single else 0.1) * torch.linalg.vector_norm(whole)
            if name in rows:  # a gradient that vanishes, as of a bias before a normalisation, is rounding on both sides
                allowed = allowed + (1e-5 if is_single else 1e-2) * rows[name].magnitude(0)
            if torch.linalg.vector_norm(own - whole) > allowed:
                raise UnsupportedModelError(
                    f"Layer {name!r} ({type(layer.module).__name__}): the calls that were seen do not account for the "
                    "gradient of its weights. Are they used without calling the module, as in F.linear(x, "
                    "module.weight)? Or under activation checkpointing with use_reentrant=True (use False)? Call the "
                    "module, or leave its parameters to others='diagonal' by holding them in a module without adapter."
                )

    def _check_versions(self) -> None:
        for call in self._calls:
            if isinstance(call.captured, Tensor) and _version(call.captured) != call.version:
                raise UsageError(
                    f"The input of layer {call.layer!r} was changed in place after its call, so that its curvature can "
                    "no longer be measured. Make the operation on it one that is not in place."
                )

    def _hook(self, name: str, use: Use, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        self._take(name, use, partial(use.adapter.capture, args, kwargs, output), output)

    def _run_composite(
        self, composite: CompositeAdapter, uses: Mapping[str, list[tuple[str, Use]]], *args: Any, **kwargs: Any
    ) -> Any:
        def record(part: str, captured: Any, output: Tensor) -> None:
            for name, use in uses.get(part, ()):
                self._take(name, use, lambda: captured, output)

        return composite.forward(record, *args, **kwargs)

    def _take(self, name: str, use: Use, capture: Callable[[], Any], output: Tensor) -> None:
        # outputs of no_grad forwards have no place in a graph, and nothing can be pulled back to them
        if self.is_recording and output.requires_grad:
            captured = capture()
            version = _version(captured) if isinstance(captured, Tensor) else 0
            self._calls.append(_Call(name, use, captured, torch.autograd.graph.get_gradient_edge(output), version))


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


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pull_back(output: Tensor, edges: Sequence[Any], output_gradients: Tensor) -> Iterable[Tensor | None]:
    """Gradients ``[columns, ...]`` at each edge; one batched backward pass for all columns."""
    if output_gradients.shape[0] > 1:
        return torch.autograd.grad(
            output, edges, output_gradients, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    single = torch.autograd.grad(output, edges, output_gradients[0], retain_graph=True, allow_unused=True)
    return [None if gradient is None else gradient.unsqueeze(0) for gradient in single]


def _example_gradients(
    output: Tensor, parameters: Sequence[Tensor], output_gradients: Tensor, *, independent: bool
) -> list[Tensor | None]:
    """Gradients of parameters for each example, ``[columns, batch, *parameter]``, or summed over a few groups."""
    columns, batch = output_gradients.shape[:2]
    groups = min(batch, GROUPS) if independent else batch
    members = torch.arange(batch, device=output.device) % groups == torch.arange(groups, device=output.device)[:, None]
    apart = output_gradients.unsqueeze(1) * members.reshape(groups, batch, *[1] * (output.ndim - 1))
    chunks = [_pull_back(output, parameters, chunk) for chunk in apart.flatten(0, 1).split(CHUNK)]
    return [
        None if parts[0] is None else torch.cat(parts).unflatten(0, (columns, groups))
        for parts in zip(*chunks, strict=True)
    ]


def _only_transposed(rows: Rows) -> Rows:
    """Rows of a layer that was used transposed only: none as it is."""
    size = rows.inputs.shape[-1]
    batch, features = rows.gradients.shape[-3], rows.gradients.shape[-1]
    inputs = rows.gradients.new_zeros(batch, 0, features)
    gradients = rows.gradients.new_zeros(rows.gradients.shape[0], batch, 0, size)
    return Rows(inputs, gradients, transposed=rows, examples=rows.examples)


def _by_example(rows: Rows, num_examples: int, name: str) -> Rows:
    """Give rows the batch dimension of the output: models flatten ``[batch, time]``, before a layer or at the end."""
    batch, shared = rows.inputs.shape[-3:-1]
    if batch == num_examples:
        return rows
    is_finer = num_examples % batch == 0 and batch * shared % num_examples == 0
    if batch % num_examples and not is_finer:
        raise UnsupportedModelError(
            f"Layer {name!r} saw {batch} × {shared} rows while the output has {num_examples} examples. The first "
            "dimension of inputs and outputs must be the batch (a batch flattened with further dimensions, batch "
            "first, is understood). Where only some elements of the output are in the loss, pass a mask to the "
            "likelihood rather than a selection of the output."
        )

    def regroup(tensor: Tensor) -> Tensor:
        return tensor.flatten(-3, -2).unflatten(-2, (num_examples, batch * shared // num_examples))

    inputs = rows.inputs
    if isinstance(inputs, SparseRows):
        inputs = SparseRows(regroup(inputs.indices), regroup(inputs.weights), inputs.size)
    else:
        inputs = regroup(inputs)
    return replace(rows, inputs=inputs, gradients=regroup(rows.gradients))


def _align(mask: Tensor, shared: int) -> Tensor:
    """A mask of the output's elements for the positions of a layer, ``[batch, shared]``."""
    # where the layer has as many positions as the mask they are the same ones; elsewhere an example weighs as a whole
    flat = mask.reshape(len(mask), -1)
    if flat.shape[1] == shared:
        return flat
    return flat.any(1, keepdim=True).expand(len(mask), shared)
