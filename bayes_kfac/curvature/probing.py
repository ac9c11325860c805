"""Probes: how rows of layers lie, found by pulling back gradients of outputs times factors that tell examples apart.

Any two examples differ in a digit of their place. So all pairs are told apart by one factor for each digit: rows of
gradients must be those of the outputs as they are times the factors of the rows' examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from bayes_kfac.curvature.alignment import WAYS, Owned, Way, batch_first, positions_first
from bayes_kfac.curvature.rows import Rows

#: Bits of a digit of an example's place, of which a probe makes a factor. More of them leave half precision's range.
DIGIT_BITS = 3

#: What all kinds of batch normalisation are called by in a graph.
BATCH_NORM = "BatchNorm"


def factors(size: int, split: int | None, generator: torch.Generator) -> Tensor:
    """Factors of examples for the digits of their places, ``[1 + digits, size]``: ones, then 0, 1, 2, 4, ..., exact.

    Args:
        size: The number of examples.
        split: Where given, examples are in a random order, and of their places the first digit alone is used.
        generator: The source of the order.

    Returns:
        The factors, on the generator's device.
    """
    device = generator.device
    places, digits = torch.arange(size, device=device), -(-(size - 1).bit_length() // DIGIT_BITS)
    if split is not None:
        places, digits = torch.randperm(size, generator=generator, device=device), 1
    digit = places >> DIGIT_BITS * torch.arange(digits, device=device).unsqueeze(1) & (1 << DIGIT_BITS) - 1
    return torch.cat([torch.ones_like(places).unsqueeze(0), 2**digit // 2])


def ways_of(rows: Rows, members: Tensor, *, tells_all: bool) -> Set[Way]:
    """How rows can lie, by gradients of outputs times factors of examples, ``[factors, batch]`` with ones first."""
    size = members.shape[1]
    if _is_apart(batch_first(rows, size), members):
        is_one_each = rows.gradients.shape[-3] * rows.gradients.shape[-2] == size  # which is every way
        return set(WAYS) if is_one_each else {batch_first}
    if _is_apart(positions_first(rows, size), members):
        return {positions_first}
    owned = Owned(_owner(rows, size))
    return {owned} if tells_all and _is_apart(owned(rows, size), members) else set()


def _owner(rows: Rows, size: int) -> Tensor:
    """The example that a row's gradients are of, ``[batch·shared]``; where they are zero, that of the row before."""
    every, *some = rows.gradients.movedim((-3, -2), (1, 2)).flatten(1, 2).flatten(2)
    largest = every.abs().argmax(-1, keepdim=True)
    factors = torch.cat([part.gather(-1, largest) for part in some], dim=-1) / every.gather(-1, largest)
    digits = factors.nan_to_num().clamp(min=0.5).log2().round().long() + 1
    owner = (digits << DIGIT_BITS * torch.arange(len(some), device=digits.device)).sum(-1).clamp(max=size - 1)
    place = torch.arange(len(owner), device=owner.device)
    return owner[torch.where(every.any(-1), place, 0).cummax(0).values]


def _is_apart(rows: Rows | None, members: Tensor) -> bool:
    """Whether the gradients of outputs times factors are those of the rows' examples times theirs."""
    if rows is None:
        return False
    every, *some = rows.gradients
    # a product of what is rounded to the smallest numbers, over time steps again and again, is not what the product is
    # rounded to: where they have lost their digits, gradients tell nothing
    number = torch.finfo(every.dtype)
    atol = number.smallest_normal * max(number.eps * 2 ** (1 << DIGIT_BITS), 0.25)
    parts = zip(some, members[1:, :, None, None].to(every), strict=True)
    return all(torch.allclose(part, every * here, rtol=1e-3, atol=atol) for part, here in parts)


def nodes_behind(source: GradientEdge) -> Iterator[Node]:
    """The nodes of the graph behind an edge."""
    seen: set[Node] = set()
    waiting: list[Node | None] = [source.node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            yield node
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]


@contextmanager
def uncoupled(output: Tensor) -> Iterator[None]:
    """Pull gradients back through batch normalisation as if it were the identity, so that each example has its own."""
    handles = [
        node.register_hook(lambda inputs, outputs: (None if inputs[0] is None else outputs[0], *inputs[1:]))
        for node in nodes_behind(torch.autograd.graph.get_gradient_edge(output))
        if BATCH_NORM in node.name()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
