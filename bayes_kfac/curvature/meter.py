"""The meter: measures each layer's curvature statistics inside the training forward pass.

While it is attached, every training forward of the model that builds a graph is measured once: the output gradients are
pulled back through the graph before the caller's own backward pass, so that the statistics depend neither on the loss's
reduction nor on a gradient scaler, batch split or accumulation. Forwards under ``no_grad``, or with the model in
``eval()``, are never counted.

Which tensor is the output, what the targets are and which of them weigh is known for certain only when the likelihood
is called. A forward pass whose output is plain is measured at once, for loops with a loss of their own; a call of the
likelihood that says more measures it again, in the place of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayes_kfac.batches import output_tensor
from bayes_kfac.curvature.fisher import FISHER_KINDS, output_gradients
from bayes_kfac.curvature.layers import Layer
from bayes_kfac.curvature.recorder import Recorder
from bayes_kfac.curvature.rows import Rows
from bayes_kfac.curvature.statistics import Statistics
from bayes_kfac.errors import ArgumentError, UsageError, check_choice
from bayes_kfac.likelihoods import Likelihood

Measure = Callable[[str, Rows], Statistics]


class Meter:
    """Measures statistics of layers in the forward passes of a model.

    Args:
        model: The root module, whose output the likelihood reads.
        likelihood: What the output means.
        layers: The layers to measure, by name.
        measure: Turns a layer's name and rows into statistics.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        num_data: The size of the data set, for checking.
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
        num_data: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.fisher = check_choice("fisher", fisher, FISHER_KINDS)
        self.model = model
        self.likelihood = likelihood
        self.num_data = num_data
        self.generator = generator
        self._measure = measure
        self._statistics: dict[str, Statistics] = {}
        self._latest: dict[str, Statistics] = {}
        self._counts = False  # whether the forward pass under way, or just ended, is to be measured
        self._measured_shape: tuple[int, ...] = ()
        self._is_partial = False  # whether what was measured may be a part of what the model returned
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
        return _added(self._statistics, self._latest)

    def take(self) -> dict[str, Statistics]:
        """Hand over :attr:`statistics`, which are empty then."""
        taken = self.statistics
        self._statistics, self._latest = {}, {}
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
        self._counts = False
        self.recorder.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let forward passes go by unmeasured."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def measure(self, output: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Take the statistics of the forward pass that was just recorded.

        Args:
            output: The model's output, ``[batch, ...]``, or what a loop made of it: tokens as examples, say.
            target: The targets, for the empirical Fisher.
            mask: Which elements of the output weigh, ``[batch, *leading dimensions]``.

        Raises:
            UnsupportedModelError: On the first pass, if what was recorded does not account for a layer's gradient.
        """
        gradients = output_gradients(
            self.likelihood, output, self.fisher, target=target, mask=mask, generator=self.generator
        )
        # targets sampled for each example have gradients of mean zero; those of other kinds add up
        recorded = self.recorder.rows(output, gradients, mask=mask, independent=self.fisher == "mc")
        self._measured_shape = tuple(output.shape)
        if not self._is_checked:
            self.recorder.check_complete(output, gradients[0], recorded)
            self._is_checked = True
        with torch.autocast(output.device.type, enabled=False):  # products in 16 bits are not positive definite
            self._latest = {name: self._measure(name, rows) for name, rows in recorded.items() if rows.num_examples}

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._statistics, self._latest, self._is_partial = self.statistics, {}, False
        self.recorder.clear()
        self._counts = module.training and not self._is_paused and torch.is_grad_enabled()
        self.recorder.is_recording = self._counts

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.is_recording = False  # not what activation checkpoints run again in the backward pass
        tensor = output_tensor(output)
        if self._counts and self.fisher != "empirical" and tensor is not None and tensor.requires_grad:
            self.measure(tensor)

    def _before_likelihood(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("output", "target", "mask"), args, strict=False)) | kwargs
        output, mask = given["output"], given.get("mask")
        if not self._counts or not output.requires_grad:  # a detached output is being logged
            return
        if len(output) > self.num_data:
            raise ArgumentError(
                f"num_data={self.num_data} is smaller than a batch of {len(output)} examples. It is the number of "
                "examples in the whole training set: pass num_data=len(train_set)."
            )
        if self._latest and self._is_partial and output.shape != self._measured_shape:
            raise UsageError(
                f"The likelihood was called with outputs of shapes {self._measured_shape} and {tuple(output.shape)} of "
                "one forward pass, and only the first would be in the curvature. Concatenate them into one output."
            )
        # the root's output flattened over time has tokens for examples: their statistics are others
        if not self._latest or mask is not None or output.ndim != len(self._measured_shape):
            self._is_partial = not self._latest
            self.measure(output, given.get("target"), mask)


def _added(total: Mapping[str, Statistics], more: Mapping[str, Statistics]) -> dict[str, Statistics]:
    return {**total, **{name: total[name] + batch if name in total else batch for name, batch in more.items()}}
