"""The meter: measures each layer's curvature statistics inside the training forward pass.

While it is attached, every training forward of the model that builds a graph is measured once: the output gradients are
pulled back through the graph before the caller's own backward pass, so that the statistics depend neither on the loss's
reduction nor on a gradient scaler, batch split or accumulation. Forwards under ``no_grad``, or with the model in
``eval()``, are never counted.

Which tensor is the output, what the targets are and which of them weigh is known for certain only when the likelihood
is called. A forward pass whose output is plain is measured at once, for loops with a loss of their own; a call of the
likelihood that says more measures it again, in the place of the first. It finds its forward pass through the graph of
its output, so that losses may come in any order, after any other forward pass; until the caller's backward pass. Losses
on different outputs of one forward pass are refused, as only one of them would be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from bayes_kfac import linalg
from bayes_kfac.batches import count_examples, output_tensor
from bayes_kfac.curvature.fisher import FISHER_KINDS, output_gradients
from bayes_kfac.curvature.layers import Layer
from bayes_kfac.curvature.modules import couples_examples
from bayes_kfac.curvature.pullback import Call, PullBack
from bayes_kfac.curvature.recorder import Recorder
from bayes_kfac.curvature.recursion import recursive_rows
from bayes_kfac.curvature.rows import Rows
from bayes_kfac.curvature.statistics import Statistics, added
from bayes_kfac.errors import ArgumentError, UnsupportedModelError, UsageError, check_choice
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.likelihoods.base import check_mask

Measure = Callable[[Mapping[str, Rows]], dict[str, Statistics]]


@dataclass(eq=False)
class _Pass:
    """A forward pass of the model that counts.

    Attributes:
        calls: The uses of blocks in it.
        statistics: What was measured, by layer; empty before.
        output: The model's output, or what the likelihood was called with; ``None`` where that is not known.
        origin: The use of a block that is nearest behind what the likelihood was called with.
        has_loss: Whether the likelihood was called.
        is_partial: Whether the output may be a part of what the model returned.
    """

    calls: list[Call]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    output: Tensor | None = None
    origin: Node | None = None
    has_loss: bool = False
    is_partial: bool = False

    def is_of(self, output: Tensor, origin: Node | None) -> bool:
        """Whether an output is the one that is known, maybe in another shape or dtype."""
        if self.output is None or (self.has_loss and origin is not self.origin):
            return False
        return output is self.output or (
            output.numel() == self.output.numel()
            and torch.allclose(
                output.to(self.output.dtype).flatten(), self.output.flatten(), rtol=0, atol=0, equal_nan=True
            )
        )


class Meter:
    """Measures statistics of layers in the forward passes of a model.

    Args:
        model: The root module, whose output the likelihood reads.
        likelihood: What the output means.
        layers: The layers to measure, by name.
        measure: Turns the rows of the layers that a forward pass used into statistics of each.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"recursive"``.
        num_data: Tells the size of the data set, for checking.
        generator: The source of randomness for ``"mc"``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        layers: Mapping[str, Layer],
        measure: Measure,
        *,
        fisher: str,
        num_data: Callable[[], int],
        generator: torch.Generator | None = None,
    ) -> None:
        self.fisher = check_choice("fisher", fisher, FISHER_KINDS)
        self.model = model
        self.likelihood = likelihood
        self._num_data = num_data
        self.generator = generator
        self._measure = measure
        self._settled: dict[str, Statistics] = {}
        self._passes: list[_Pass] = []  # those that the caller's backward pass has not been through
        self._is_measuring = False
        self._is_paused = False
        self._handles: list[RemovableHandle] = []
        self.watch(layers)

    def watch(self, layers: Mapping[str, Layer]) -> None:
        """Measure these layers from now on.

        Args:
            layers: The layers, by name.
        """
        self.recorder = Recorder(layers)
        self._is_checked = False

    @property
    def statistics(self) -> dict[str, Statistics]:
        """What was measured since :meth:`attach`, by layer."""
        total = self._settled
        for passed in self._passes:
            total = added(total, passed.statistics)
        return total

    def take(self) -> dict[str, Statistics]:
        """Hand over :attr:`statistics`, which are empty then."""
        taken = self.statistics
        self._settled, self._passes = {}, []
        return taken

    def attach(self) -> None:
        """Start to measure; :attr:`statistics` starts empty."""
        self.take()
        self.recorder.attach()
        self.recorder.is_recording = False
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward, always_call=True),
            self.likelihood.register_forward_pre_hook(self._before_likelihood, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Stop to measure; :attr:`statistics` stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settled, self._passes = self.statistics, []
        self.recorder.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let forward passes go by unmeasured."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _measure_pass(
        self, passed: _Pass, output: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Take the statistics of a forward pass by an output: the model's, or what a loop made of it."""
        gradients = output_gradients(
            self.likelihood, output, self.fisher, target=target, mask=mask, generator=self.generator
        )
        pull_back = self.recorder.pull_back(
            output,
            passed.calls,
            # targets sampled for each example have gradients of mean zero; those of other kinds add up
            independent=self.fisher == "mc",
            coupled=any(couples_examples(module) for module in self.model.modules()),
        )
        self._is_measuring = True
        try:
            recorded = self._rows(pull_back, gradients, mask)
        finally:
            self._is_measuring = False
        with linalg.full_precision(output.device):  # products in 16 bits are not positive definite
            passed.statistics = self._measure(recorded)

    def _rows(self, pull_back: PullBack, gradients: Tensor, mask: Tensor | None) -> dict[str, Rows]:
        """The rows of a forward pass; at the first one, it is checked that they account for the gradient."""
        if self.fisher == "recursive":
            if not self._is_checked:
                pull_back.check_complete(gradients[0], pull_back.rows(gradients[:1], mask))
            recorded = recursive_rows(pull_back, gradients, mask)
        else:
            recorded = pull_back.rows(gradients, mask)
            if not self._is_checked:
                pull_back.check_complete(gradients[0], recorded)
        self._is_checked = True
        return recorded

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.recorder.clear()
        self.recorder.is_recording = module.training and not self._is_paused and torch.is_grad_enabled()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        counts = self.recorder.is_recording and output is not None  # None where the forward pass raised
        self.recorder.is_recording = False  # not what activation checkpoints run again in the backward pass
        if not counts:
            return
        passed = _Pass(self.recorder.calls)
        self.recorder.clear()
        self._passes.append(passed)
        if passed.calls:
            self._settle_after_backward(passed)
        tensor = output_tensor(output)
        if tensor is None or not tensor.requires_grad:
            return
        passed.output = tensor
        if self.fisher != "empirical":
            self._measure_pass(passed, tensor)

    def _settle_after_backward(self, passed: _Pass) -> None:
        """Let go of a forward pass when its graph does; gradient accumulation would pile up activations."""
        weak = ref(passed)  # a hook that held the pass would be a cycle through the graph

        def settle(_: Any) -> None:
            done = weak()
            if done is not None and done in self._passes and not self._is_measuring:
                self._settled = added(self._settled, done.statistics)
                self._passes.remove(done)

        passed.calls[0].edge.node.register_prehook(settle)

    def _before_likelihood(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("output", "target", "mask"), args, strict=False)) | kwargs
        output, target, mask = given["output"], given.get("target"), given.get("mask")
        if not isinstance(output, Tensor):  # which the likelihood refuses
            return
        passes, origin = _find(self._passes, output)
        if not passes:  # a detached output is being logged, or it is another model's
            if self.recorder.is_recording and mask is not None and output.requires_grad:
                raise UnsupportedModelError(
                    "The likelihood was called with a mask inside of the model, where the curvature would not know of "
                    "it. Call it in the loop: likelihood(model(inputs), target, mask)."
                )
            return
        if mask is not None and target is not None:
            check_mask(mask, target)
        examples = len(output) if mask is None else count_examples(mask)
        num_data = self._num_data()
        if examples > num_data:
            raise ArgumentError(
                f"num_data={num_data} is smaller than a batch of {examples:.0f} examples. It is the number of "
                "examples in the whole training set: pass num_data=len(train_set)."
            )
        if mask is None and _are_rows(output, passes):  # some examples, and all are measured
            return
        if len(passes) > 1:
            raise UnsupportedModelError(
                f"The likelihood was called with an output of shape {tuple(output.shape)} that {len(passes)} calls of "
                "the model went into, as in model(a) - model(b): the curvature would be that of one of them. Put the "
                "calls into one module, and train that. Outputs of calls may be concatenated, but neither with a mask "
                "nor with fisher='empirical'."
            )
        (passed,) = passes
        shape, is_known = () if passed.output is None else tuple(passed.output.shape), passed.is_of(output, origin)
        # the root's output flattened over time has tokens for examples: their statistics are others
        is_measured = bool(passed.statistics) and mask is None and output.shape[1:] == shape[1:]
        if passed.has_loss and not is_known:
            raise UsageError(
                f"The likelihood was called with outputs of shapes {shape} and {tuple(output.shape)} of one forward "
                "pass, and only one of them would be in the curvature. Concatenate them into one output."
            )
        if not (is_measured and is_known):
            if shape and len(output) != shape[0] and output.numel() != math.prod(shape):
                raise UnsupportedModelError(
                    f"The likelihood was called with an output of shape {tuple(output.shape)} that was made of one of "
                    f"shape {shape}: which examples it belongs to cannot be known. Pass the whole output and a mask to "
                    "the likelihood rather than a selection; what joins examples, as a mean over bags, put into the "
                    "model."
                )
            self._measure_pass(passed, output, target, mask)
        passed.is_partial |= not is_known
        passed.output, passed.origin, passed.has_loss = output, origin, True


def _find(passes: Sequence[_Pass], output: Tensor) -> tuple[list[_Pass], Node | None]:
    """The forward passes that an output came from, by the graph behind it, and the nearest use of a block there."""
    if not output.requires_grad or not passes:
        return [], None
    owner = {call.edge.node: passed for passed in passes for call in passed.calls}
    fallback: list[_Pass] = []
    if not owner:  # parameters alone: their uses leave no trace, and outputs only where they are known
        owner = {torch.autograd.graph.get_gradient_edge(p.output).node: p for p in passes if p.output is not None}
        fallback = [passes[-1]]
    waiting = [torch.autograd.graph.get_gradient_edge(output).node]
    seen = set(waiting)
    found: list[_Pass] = []
    origin = None
    for node in waiting:  # which grows by what is one step further
        if node in owner and owner[node] not in found:
            found.append(owner[node])
            origin = origin or node
            if len(found) == len(passes):
                break
        following = [node for node, _ in node.next_functions if node is not None and node not in seen]
        seen.update(following)
        waiting += following
    return found or fallback, None if fallback else origin


def _are_rows(output: Tensor, passes: Sequence[_Pass]) -> bool:
    """Whether an output is some examples of one forward pass, or of several side by side, that were all measured."""
    wholes = [
        passed.output for passed in passes if passed.output is not None and passed.statistics and not passed.is_partial
    ]
    if len(wholes) < len(passes) or any(whole.shape[1:] != output.shape[1:] for whole in wholes):
        return False
    if len(passes) == 1 and len(output) == len(wholes[0]):
        return False
    if len(passes) > 1 and any(len(_find(passes, whole)[0]) > 1 for whole in wholes):  # one of them feeds another
        return False
    known = torch.cat([whole.detach() for whole in wholes]).nan_to_num()
    both = torch.cat([known, output.detach().to(known.dtype).nan_to_num()])
    return len(both.unique(dim=0)) == len(known.unique(dim=0))
