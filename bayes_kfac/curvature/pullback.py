"""The pull-back: from the uses of blocks in a forward pass, and gradients at its output, to rows.

A row belongs to an example where the layer's batch is the output's: ``[batch, ...]``, or flattened with further
dimensions before or behind it; or where its gradient is of one example's output alone. Elsewhere (positions looked up
once for all examples, nodes of a graph that see each other, parameters that no module multiplies with an input) every
row may be in every example's Jacobian. Then each example's gradient is pulled back by itself, or that of a few groups
of examples where this is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from bayes_kfac.batches import count_examples, widened
from bayes_kfac.curvature.alignment import WAYS, Way, batch_first, both_ways, in_every_example, joined
from bayes_kfac.curvature.layers import Layer, Use
from bayes_kfac.curvature.probing import factors, nodes_behind, uncoupled, ways_of
from bayes_kfac.curvature.rows import Rows, SparseRows
from bayes_kfac.errors import UnsupportedModelError, UsageError

#: Examples times columns that one batched backward pass takes on, where gradients of single examples are needed.
CHUNK = 64
#: How many times an activation's gradient is held while it is pulled back and turned into something.
COPIES = 3
#: Groups of examples whose gradients are summed where that is enough; more of them cost time and save variance.
GROUPS = 8

#: What torch 2.13 gets wrong, without a word, in a backward pass that is both batched and to be differentiated again.
GROUP_NORM = "NativeGroupNormBackward"


@dataclass(frozen=True)
class Call:
    """One use of a block's weights in a forward pass.

    Attributes:
        layer: The block's layer, by name.
        use: The module that used it.
        captured: What its adapter keeps of the call.
        edge: The call's output in the autograd graph.
        like: A zero in the shape of the output.
        versions: How often each captured tensor had been changed in place.
    """

    layer: str
    use: Use
    captured: Any
    edge: GradientEdge
    like: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, layer: str, use: Use, captured: Any, output: Tensor) -> Call:
        """The call that gave ``output``."""
        edge = torch.autograd.graph.get_gradient_edge(output)
        like = output.detach().new_zeros(()).expand(output.shape)
        return cls(layer, use, captured, edge, like, _versions(captured))

    @property
    def batch(self) -> int:
        """The batch of its rows."""
        return self.use.adapter.gradient_rows(self.like).shape[-3]

    def check(self) -> None:
        """Check that what was captured is still what it was.

        Raises:
            UsageError: If not.
        """
        if _versions(self.captured) != self.versions:
            raise UsageError(
                f"The input of layer {self.layer!r} was changed in place after its call, so that its curvature can "
                "no longer be measured. Make the operation on it one that is not in place."
            )


@dataclass(frozen=True)
class PullBack:
    """The rows of a forward pass.

    Attributes:
        layers: The layers, by name.
        calls: Their uses.
        output: The model's output, ``[batch, ...]``, or what a loop made of it.
        parameters: The tensors that the forward pass used for the model's parameters, where it was others.
        independent: Whether the gradients of different examples are independent and have mean zero. Gradients of
            groups of examples then serve where each example's would be needed: the expectation of a square is the sum
            of the examples' squares (Liu et al. 2023, "Sophia").
        coupled: Whether all examples depend on each other by batch normalisation in training. Rows then belong to the
            examples that they would belong to without it.
        ways: How the rows of layers lie, where it is known; otherwise :meth:`probe` finds out.
        create_graph: Whether rows are to be differentiable with respect to the model's inputs.
        keeps_inputs: Whether the inputs of rows are kept from one time to the next, as for columns that are pulled back
            in parts: the patches of convolutions cost as much as a backward pass.
    """

    layers: Mapping[str, Layer]
    calls: Sequence[Call]
    output: Tensor
    parameters: Mapping[str, Tensor] | None = None
    independent: bool = False
    coupled: bool = False
    ways: Mapping[str, Set[Way]] | None = None
    create_graph: bool = False
    keeps_inputs: bool = False
    _inputs: dict[int, Tensor | SparseRows] = field(default_factory=dict, repr=False, compare=False)

    def columns_within(self, budget: int) -> int:
        """How many columns of gradients can be pulled back at a time within so many bytes.

        Args:
            budget: Bytes.

        Returns:
            At least 1.
        """
        elements = sum(call.like.numel() for call in self.calls)
        return max(1, budget // max(1, COPIES * elements * self.output.element_size()))

    def rows(self, output_gradients: Tensor, mask: Tensor | None = None) -> dict[str, Rows]:
        """Pull gradients with respect to the output back to every block; the graph is kept.

        Args:
            output_gradients: ``[columns, batch, ...]``.
            mask: Which elements of the output weigh; the gradients of the others must be zero.

        Returns:
            The rows of each layer that was used and that the output depends on.
        """
        if not self.output.requires_grad:
            return {}
        with torch.set_grad_enabled(self.create_graph):
            return self._rows(output_gradients, mask)

    def _rows(self, output_gradients: Tensor, mask: Tensor | None) -> dict[str, Rows]:
        found = [(call, self._by_example(call, rows)) for call, rows in self._rows_as_they_lie(output_gradients)]
        apart = {call.layer for call, rows in found if rows is None}
        uses: dict[tuple[str, bool], list[Rows]] = {}
        for call, rows in found:
            if rows is not None and call.layer not in apart:
                _put(uses, call, rows)
        for call, rows in self._rows_apart(apart, output_gradients):
            _put(uses, call, rows)
        examples = float(len(self.output)) if mask is None else count_examples(mask)
        whole = {key: joined(calls, mask, examples) for key, calls in uses.items()}
        whole |= self._rows_of_parameters(output_gradients, examples)
        names = [name for name in self.layers if (name, False) in whole or (name, True) in whole]
        return {name: both_ways(self.layers[name], whole) for name in names}

    def _rows_as_they_lie(self, output_gradients: Tensor) -> list[tuple[Call, Rows]]:
        """The rows of each call that the output depends on, as they lie in it."""
        for call in self.calls:
            call.check()
        pulled = self._pull_back([call.edge for call in self.calls], output_gradients)
        found = [
            (call, self._rows_of(place, gradients))
            for place, (call, gradients) in enumerate(zip(self.calls, pulled, strict=True))
            if gradients is not None
        ]
        return _whole_batches(found, len(self.output))

    def _rows_of(self, place: int, gradients: Tensor) -> Rows:
        """The rows of the call at a place, as they lie in it."""
        call = self.calls[place]
        rows = Rows(*call.use.adapter.rows(call.captured, gradients, self._inputs.get(place)))
        if self.keeps_inputs:
            self._inputs[place] = rows.inputs
        return rows

    def _by_example(self, call: Call, rows: Rows) -> Rows | None:
        """The rows of a call by the examples that they belong to; ``None`` where they may belong to several."""
        ways = self.known_ways.get(call.layer, {batch_first})
        placed = (way(rows, len(self.output)) for way in (*WAYS, *ways) if way in ways)
        return next((own for own in placed if own is not None), None)

    @cached_property
    def known_ways(self) -> Mapping[str, Set[Way]]:
        """How the rows of layers lie; no way where the gradient of one example's output reaches the rows of another."""
        return self.probe() if self.ways is None else self.ways

    @torch.no_grad()
    def probe(self, split: int | None = None) -> dict[str, Set[Way]]:
        """Find how the rows of layers lie.

        Where rows do not even fit there is no way: in a batch of another size they might.

        Args:
            split: The number of a random order of the examples, for a look at its first digit alone: it tells most
                pairs apart, with a cost that does not depend on the batch.

        Returns:
            The ways that hold in all calls, by layer: every way where gradients are zero, or where the output does not
            depend on the call, which tells nothing.
        """
        size, device = len(self.output), self.output.device
        generator = torch.Generator(device).manual_seed(split or 0)
        probe = torch.rand(self.output.shape, generator=generator, device=device).to(self.output.dtype)
        members = factors(size, split, generator).to(probe)
        with uncoupled(self.output) if self.coupled else nullcontext():
            lying = self._rows_as_they_lie(probe * widened(members, probe.unsqueeze(0)))
        found: dict[str, Set[Way]] = {}
        for call, rows in lying:
            if bool(rows.gradients.any()):
                ways = ways_of(rows, members, tells_all=split is None)
                found[call.layer] = found.get(call.layer, ways) & ways
        return {call.layer: set(WAYS) for call in self.calls} | found

    def _rows_apart(self, names: set[str], output_gradients: Tensor) -> Iterable[tuple[Call, Rows]]:
        """The rows of some layers' calls, each of them in every example."""
        calls = [call for call in self.calls if call.layer in names]
        for call, gradients in zip(calls, self._apart([c.edge for c in calls], output_gradients), strict=True):
            if gradients is not None:
                rows = Rows(*call.use.adapter.rows(call.captured, gradients.flatten(0, 1)))
                yield call, in_every_example(rows, *gradients.shape[:2])

    def _rows_of_parameters(self, output_gradients: Tensor, examples: float) -> dict[tuple[str, bool], Rows]:
        """The rows of the parameters that no module multiplies with an input."""
        alone = {n: layer for n, layer in self.layers.items() if layer.adapter.stands_alone}
        tensors = [(self.parameters or layer.parameters)[layer.weight_name or ""] for layer in alone.values()]
        return {
            (name, False): Rows(*layer.adapter.rows(None, gradients), examples=examples)
            for (name, layer), gradients in zip(alone.items(), self._apart(tensors, output_gradients), strict=True)
            if gradients is not None
        }

    def _apart(self, edges: Sequence[Any], output_gradients: Tensor) -> list[Tensor | None]:
        """Gradients of each example's output at each edge, ``[columns, batch, ...]``, or summed over a few groups."""
        if not edges:
            return []
        columns, batch = output_gradients.shape[:2]
        groups = min(batch, GROUPS) if self.independent else batch
        group_of = torch.arange(batch, device=self.output.device) % groups
        every = torch.arange(columns * groups, device=self.output.device)

        def of_group(some: Tensor) -> Tensor:
            """Output gradients that are zero for other groups, ``[some, batch, ...]``; all of them would be many."""
            column = output_gradients[some // groups]
            return column * widened(group_of == (some % groups).unsqueeze(1), column)

        chunks = [self._pull_back(edges, of_group(some)) for some in every.split(CHUNK)]
        return [
            None if parts[0] is None else torch.cat(parts).unflatten(0, (columns, groups))
            for parts in zip(*chunks, strict=True)
        ]

    def check(self) -> None:
        """:meth:`check_complete` for a mix of all outputs: each of them may reach weights that the others do not."""
        generator = torch.Generator(self.output.device).manual_seed(0)
        mix = torch.rand(self.output.shape, generator=generator, device=self.output.device).to(self.output.dtype)
        self.check_complete(mix, self.rows(mix.unsqueeze(0)))

    def check_complete(self, output_gradient: Tensor, rows: Mapping[str, Rows]) -> None:
        """Check that the rows account for the whole gradient of every block.

        They do not where weights are used without a call of their module, where a layer's adapter is wrong, or where a
        part of the model builds no graph: the statistics would be wrong without a word.

        Args:
            output_gradient: ``[batch, ...]``, the first of the gradients that were pulled back.
            rows: What :meth:`rows` returned for them.

        Raises:
            UnsupportedModelError: If they do not; the message names the layer.
        """
        watched = {n: layer for n, layer in self.layers.items() if not layer.adapter.stands_alone}
        tensors = {
            key: parameter if self.parameters is None else self.parameters[key]
            for layer in watched.values()
            for key, parameter in layer.parameters.items()
        }
        if not tensors:
            return
        pulled = self._pull_back(list(tensors.values()), output_gradient.unsqueeze(0))
        gradients = dict(zip(tensors, pulled, strict=True))
        for name, layer in watched.items():
            expected = {key: gradients[key] for key in layer.parameters}
            if all(gradient is None for gradient in expected.values()):
                continue
            filled = {k: tensors[k].detach() * 0 if g is None else g[0] for k, g in expected.items()}
            if not _agree(layer.matrix(filled).float(), rows.get(name), self.output.dtype):
                raise UnsupportedModelError(
                    f"Layer {name!r} ({type(layer.module).__name__}): the calls that were seen do not account for the "
                    "gradient of its weights. Are they used without calling the module, as in x @ module.weight.T? Or "
                    "is the module's adapter wrong? Call the module; or leave its parameters out, by "
                    "requires_grad_(False), params= of a trainer or subset= of a Laplace fit; or leave them to "
                    "others='diagonal' by holding them in a module without adapter."
                )

    def _pull_back(self, edges: Sequence[Any], output_gradients: Tensor) -> Sequence[Tensor | None]:
        if not self.output.requires_grad:
            raise UsageError(
                f"The model's output does not depend on the layers {', '.join(self.layers)}, or none of its graph was "
                "kept. Choose layers that the forward pass uses, and let it run without torch.no_grad() or detach()."
            )
        own = torch.autograd.graph.get_gradient_edge(self.output)
        return gradients_at(edges, own, output_gradients, create_graph=self.create_graph)


def gradients_at(
    edges: Sequence[Any], source: GradientEdge, gradients: Tensor, *, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Pull gradients at one place of the autograd graph back to others; the graph is kept.

    Args:
        edges: The places.
        source: Where the gradients are.
        gradients: ``[columns, ...]``.
        create_graph: Whether what is returned is to be differentiable.

    Returns:
        Gradients ``[columns, ...]`` at each edge, ``None`` where the source does not depend on it; at the source's own,
        the gradients as they are.
    """
    others = [edge for edge in edges if edge != source]
    pulled = iter(_pull_back(source, others, gradients, create_graph=create_graph))
    return [gradients if edge == source else next(pulled) for edge in edges]


def _versions(captured: Any) -> tuple[int, ...]:
    tensors = [leaf for leaf in tree_leaves(captured) if isinstance(leaf, Tensor)]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _pull_back(
    source: GradientEdge, edges: Sequence[Any], gradients: Tensor, *, create_graph: bool
) -> Sequence[Tensor | None]:
    """Gradients ``[columns, ...]`` at each edge; one batched backward pass for all columns where that is possible."""
    if not edges:
        return []
    options = {"retain_graph": True, "allow_unused": True, "create_graph": create_graph}
    try:
        if gradients.shape[0] > 1 and not (
            create_graph and any(node.name().startswith(GROUP_NORM) for node in nodes_behind(source))
        ):
            try:
                return torch.autograd.grad(source, edges, gradients, is_grads_batched=True, **options)
            except RuntimeError:
                # some formulas do not batch (images in channels_last, functions of the user's own): column by column
                # below, where any other error is raised again
                pass
        each = [torch.autograd.grad(source, edges, gradient, **options) for gradient in gradients]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedModelError(
            "Under activation checkpointing with use_reentrant=True a forward pass builds no graph, so that curvature "
            "cannot be measured. Pass use_reentrant=False to checkpoint()."
        ) from error
    if len(each) == 1:
        return [None if gradient is None else gradient.unsqueeze(0) for gradient in each[0]]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]


def _whole_batches(found: list[tuple[Call, Rows]], num_examples: int) -> list[tuple[Call, Rows]]:
    """Calls on parts of the batch, one after another, as the one call that they stand for."""
    by_use: dict[tuple[str, bool], list[tuple[Call, Rows]]] = {}
    for call, rows in found:
        by_use.setdefault((call.layer, call.use.transposed), []).append((call, rows))
    whole = []
    for calls in by_use.values():
        parts = [rows for _, rows in calls]
        are_parts = len({rows.inputs.shape[-2] for rows in parts}) == 1 and all(
            isinstance(rows.inputs, Tensor) for rows in parts
        )
        if len(parts) > 1 and are_parts and sum(rows.inputs.shape[-3] for rows in parts) == num_examples:
            inputs = torch.cat([rows.inputs for rows in parts if isinstance(rows.inputs, Tensor)], dim=-3)
            gradients = torch.cat([rows.gradients for rows in parts], dim=-3)
            whole.append((calls[0][0], Rows(inputs, gradients)))
        else:
            whole += calls
    return whole


def _put(uses: dict[tuple[str, bool], list[Rows]], call: Call, rows: Rows) -> None:
    """Add the rows of a call to those of its layer, in the order of time."""
    own = uses.setdefault((call.layer, call.use.transposed), [])
    own.insert(0 if call.use.adapter.runs_backwards else len(own), rows)


def _agree(whole: Tensor, rows: Rows | None, dtype: torch.dtype) -> bool:
    """Whether rows add up to a gradient of the weights, as far as rounding lets one tell."""
    if rows is None:
        return not bool(whole.any())
    relative, absolute = (0.01, 1e-5) if torch.finfo(dtype).bits >= 32 else (0.1, 1e-2)
    # a gradient that vanishes, as of a bias before a normalisation, is rounding on both sides
    allowed = relative * torch.linalg.vector_norm(whole) + absolute * rows.magnitude(0)
    # NaN, as from data that hold it, tells nothing of the rows: it is found in the statistics
    return not bool(torch.linalg.vector_norm(rows.total(0).float() - whole) > allowed)
