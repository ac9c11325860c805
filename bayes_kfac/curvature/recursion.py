"""The recursive Fisher: second moments of output gradients, averaged over the batch before they go on to a layer below.

The columns of an exact Fisher give a layer with outputs ``z_l`` the factor ``G_l = E[H_l]`` of each example's
``H_l = J_lᵀ H_{l+1} J_l``, with ``J_l = ∂z_{l+1}/∂z_l``; in a perceptron it is ``W_{l+1} diag f'(z_l)``. Here it is
``G_l = E[J_lᵀ G_{l+1} J_l]``: a root of ``G_{l+1}``, the same for all examples, is pulled back in the place of the
outputs' columns. Source: Botev, Ritter & Barber 2017 (KFRA; the exact columns are their KFLR).

It needs a chain: layers each of which is the only way from the one below to the output, with one position each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bayes_kfac import linalg
from bayes_kfac.batches import weighing_examples, widened
from bayes_kfac.curvature.alignment import WAYS, batch_first
from bayes_kfac.curvature.pullback import Call, PullBack, gradients_at
from bayes_kfac.curvature.rows import Rows, SparseRows
from bayes_kfac.errors import UnsupportedModelError

#: Columns of a root that are pulled back at a time.
COLUMNS = 64


@torch.no_grad()
def recursive_rows(pull_back: PullBack, output_gradients: Tensor, mask: Tensor | None = None) -> dict[str, Rows]:
    """Rows whose gradients have the second moments of the recursion.

    The average is over the batch: of one example it is the exact Fisher's. The gradients are columns of its root,
    spread over the examples; they belong to none of them, and only their second moment means anything.

    Args:
        pull_back: The forward pass.
        output_gradients: Those of the exact Fisher, ``[columns, batch, ...]``.
        mask: Which elements of the output weigh; the gradients of the others must be zero.

    Returns:
        The rows of each layer that was used and that the output depends on.

    Raises:
        UnsupportedModelError: If the layers are no chain; the message names one that is the reason.
    """
    output, found = pull_back.output, dict[str, Rows]()
    if not output.requires_grad:
        return found
    weighs = output.new_ones(len(output), dtype=torch.bool) if mask is None else weighing_examples(mask)
    examples = float(weighs.sum())
    source, columns = get_gradient_edge(output), output_gradients
    with linalg.full_precision(output.device):
        for call in _chain(pull_back, source):
            step = _step(call, source, columns, weighs)
            if step is None:  # nothing below has a gradient
                break
            inputs, root, like = step
            position = None if mask is None else weighs.unsqueeze(1)
            found[call.layer] = Rows(inputs, _spread(root.mT, len(output)), mask=position, examples=examples)
            source, columns = call.edge, (root.mT / max(examples, 1) ** 0.5).to(like).reshape(-1, 1, *like.shape[1:])
    return {name: found[name] for name in pull_back.layers if name in found}


def _step(
    call: Call, source: GradientEdge, columns: Tensor, weighs: Tensor
) -> tuple[Tensor | SparseRows, Tensor, Tensor] | None:
    """Pull columns at the source back to a call.

    Args:
        call: The call.
        source: The output of the layer above, or the model's.
        columns: Of every example, ``[columns, batch, ...]``, or the same for all, ``[columns, 1, ...]``.
        weighs: Which examples weigh, ``[batch]``.

    Returns:
        The layer's inputs, a root of the sum over examples of the gradients' outer products, ``[out, out]``, and a
        tensor like the call's output; ``None`` where the source does not depend on it.

    Raises:
        UnsupportedModelError: If its rows are not those of one matrix, one for each example.
    """
    call.check()
    moment: Any = 0
    like = columns
    for part in columns.split(COLUMNS):
        (pulled,) = gradients_at([call.edge], source, part * widened(weighs, part[0]))
        if pulled is None:
            return None
        rows = Rows(*call.use.adapter.rows(call.captured, pulled))
        if rows.inputs.shape[:-1] != (len(weighs), 1):
            raise UnsupportedModelError(
                _refusal(call.layer, "has several positions, or not one matrix for all that it does")
            )
        flat = rows.gradients.flatten(0, -2)
        flat = flat.to(linalg.algebra_dtype(flat.dtype))
        moment, like = moment + flat.mT @ flat, pulled[0]
    # NaN, as from data that hold it, is found in the statistics
    root = linalg.psd_root(moment, [call.layer]) if bool(moment.isfinite().all()) else moment
    return rows.inputs, root, like


def _spread(columns: Tensor, batch: int) -> Tensor:
    """Columns ``[n, out]`` spread over a batch, ``[columns, batch, 1, out]``, the last of them zero."""
    missing = -len(columns) % batch
    return torch.nn.functional.pad(columns, (0, 0, 0, missing)).unflatten(0, (-1, batch)).unsqueeze(-2)


def _chain(pull_back: PullBack, output: GradientEdge) -> list[Call]:
    """The calls that the output depends on, from the last to the first.

    Returns:
        The calls.

    Raises:
        UnsupportedModelError: If there is a way past one of them, or examples meet.
    """
    knows = bool(pull_back.output.isfinite().all())  # NaN of one example is in the gradients of all
    lie = {} if pull_back.coupled or not knows else pull_back.known_ways
    for name, layer in pull_back.layers.items():
        if layer.adapter.structure is not None:
            raise UnsupportedModelError(_refusal(name, "is no linear map"))
        if len(layer.uses) > 1:
            raise UnsupportedModelError(_refusal(name, "is used by several modules"))
        if pull_back.coupled or batch_first not in lie.get(name, WAYS):
            raise UnsupportedModelError(_refusal(name, "is where examples meet"))
    chain: list[Call] = []
    ways: Iterable[tuple[Any, int]] = [(output.node, output.output_nr)]
    while found := _first_calls(ways, pull_back.calls):
        if len(found) > 1:
            names = " and ".join(repr(call.layer) for call in found[1:])
            raise UnsupportedModelError(
                _refusal(found[0].layer, f"is beside {names}, as in a residual connection or branches")
            )
        if found[0].layer in {call.layer for call in chain}:
            raise UnsupportedModelError(_refusal(found[0].layer, "is used several times"))
        chain += found
        ways = found[0].edge.node.next_functions
    return chain


def _first_calls(ways: Iterable[tuple[Any, int]], calls: Iterable[Call]) -> list[Call]:
    """The calls that one meets first on the ways down the autograd graph, in the order of the forward pass."""
    places = {(call.edge.node, call.edge.output_nr) for call in calls}
    seen, waiting, met = set(), list(ways), set()
    while waiting:
        way = waiting.pop()
        if way in places:
            met.add(way)
        elif way[0] is not None and way[0] not in seen:
            seen.add(way[0])
            waiting += way[0].next_functions
    return [call for call in calls if (call.edge.node, call.edge.output_nr) in met]


def _refusal(name: str, why: str) -> str:
    return (
        "fisher='recursive' is for a chain of layers: linear maps of one position, each used once and the only way "
        f"from the one below to the output. Layer {name!r} {why}. Choose fisher='exact' or 'mc'."
    )
