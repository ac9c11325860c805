"""The meter: measures each layer's curvature statistics inside the training forward pass.

While it is attached, every training forward of the model that builds a graph is measured once: the output gradients are
pulled back through the graph before the caller's own backward pass, so that the statistics depend neither on the loss's
reduction nor on a gradient scaler, batch split or accumulation. Forwards under ``no_grad``, or with the model in
``eval()``, are never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayes_kfac.curvature.fisher import FISHER_KINDS, output_gradients
from bayes_kfac.curvature.layers import Layer
from bayes_kfac.curvature.recorder import Recorder, Rows
from bayes_kfac.curvature.statistics import Statistics
from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.likelihoods import Likelihood


class Meter:
    """Measures statistics of layers in the forward passes of a model.

    Args:
        model: The root module, whose output the likelihood reads.
        likelihood: What the output means.
        layers: The layers to measure, by name.
        measure: Turns a layer's rows into statistics.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        num_data: The size of the data set, for checking.
        generator: The source of randomness for ``"mc"``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        layers: Mapping[str, Layer],
        measure: Callable[[Rows], Statistics],
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
        self.recorder = Recorder(layers)
        self.statistics: dict[str, Statistics] = {}
        self._measure = measure
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start to measure; :attr:`statistics` starts empty."""
        self.statistics = {}
        self.recorder.attach()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward),
            self.likelihood.register_forward_pre_hook(self._before_likelihood, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Stop to measure; :attr:`statistics` stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recorder.detach()

    def measure(self, output: Tensor, target: Tensor | None = None) -> None:
        """Add the statistics of the forward pass that was just recorded.

        Args:
            output: The model's output, ``[batch, ...]``.
            target: The targets, for the empirical Fisher.

        Raises:
            ArgumentError: If the batch has more examples than ``num_data``.
        """
        if output.shape[0] > self.num_data:
            raise ArgumentError(
                f"num_data={self.num_data} is smaller than a batch of {output.shape[0]} examples. It is the number of "
                "examples in the whole training set: pass num_data=len(train_set)."
            )
        gradients = output_gradients(self.likelihood, output, self.fisher, target=target, generator=self.generator)
        recorded = self.recorder.rows(output, gradients)
        with torch.autocast(output.device.type, enabled=False):  # products in 16 bits are not positive definite
            measured = {name: self._measure(rows) for name, rows in recorded.items()}
        for name, batch in measured.items():
            self.statistics[name] = self.statistics[name] + batch if name in self.statistics else batch
        self.recorder.clear()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.recorder.clear()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training:
            self.recorder.clear()
        elif isinstance(output, Tensor) and self.fisher != "empirical" and output.requires_grad:
            self.measure(output)

    def _before_likelihood(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # where the root's output is no tensor, or targets are needed, the likelihood's call says what the output is
        if self.recorder.has_calls:
            output = args[0] if args else kwargs["output"]
            target = args[1] if len(args) > 1 else kwargs["target"]
            if output.requires_grad:  # a detached output is being logged
                self.measure(output, target)
