"""What a Laplace fit takes of the data: each layer's curvature statistics and the log-likelihood.

Both are sums over examples, so that measurements of parts of the data add up to that of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac import linalg
from bayes_kfac.batches import Batch, count_examples, unpack, widened
from bayes_kfac.curvature import (
    Frame,
    PullBack,
    Recorder,
    Rows,
    Statistics,
    added,
    no_rows,
    output_gradients,
    recursive_rows,
)
from bayes_kfac.curvature.rows import of_all_columns
from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction.forward import watched
from bayes_kfac.progress import progress_bar
from bayes_kfac.structures import Structure, measure


@dataclass(frozen=True)
class Measurement:
    """Sums over examples.

    Attributes:
        statistics: Curvature statistics by layer.
        nll: The negative log-likelihood, in nats.
        num_examples: How many examples these are sums over, as they count.
        num_targets: How many numbers their targets hold.
    """

    statistics: Mapping[str, Statistics]
    nll: Tensor
    num_examples: float
    num_targets: float

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(
            added(self.statistics, other.statistics),
            self.nll + other.nll,
            self.num_examples + other.num_examples,
            self.num_targets + other.num_targets,
        )

    @property
    def frames(self) -> dict[str, Frame]:
        """The frame of each layer's statistics."""
        return {name: own.frame for name, own in self.statistics.items()}

    def counting(self, num_examples: float) -> Measurement:
        """The same as if it were of so many examples like these."""
        weight = num_examples / self.num_examples
        return Measurement(
            {name: own * weight for name, own in self.statistics.items()},
            self.nll * weight,
            num_examples,
            self.num_targets * weight,
        )


@dataclass
class Surveyor:
    """Measures batches.

    Attributes:
        model: The model; left as it was.
        state: All parameters and buffers at the mode.
        likelihood: What its output means.
        recorder: Watches the layers.
        structures: What to measure of each of them.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"recursive"``.
        generator: The source of randomness for ``"mc"``.
        memory_budget: Bytes that output gradients may take up while they are pulled back.
        is_checked: Whether it is known that the layers account for the gradient.
        num_yielded: How many examples loaders yielded, masked ones included.
        used: The layers that some example used.
    """

    model: nn.Module
    state: Mapping[str, Tensor]
    likelihood: Likelihood
    recorder: Recorder
    structures: Mapping[str, Structure]
    fisher: str
    generator: torch.Generator | None
    memory_budget: int
    is_checked: bool = False
    num_yielded: int = 0
    used: set[str] = field(default_factory=set)

    def survey(self, loader: Iterable[Any], frames: Mapping[str, Frame], *, progress: bool) -> Measurement:
        """Measure all batches of a loader, in one pass.

        Args:
            loader: Yields batches as for :func:`bayes_kfac.fit`.
            frames: The frame to measure each layer in, where it has one.
            progress: Whether to show a progress bar.

        Returns:
            The sums.

        Raises:
            ArgumentError: If the loader yields nothing.
            UsageError: If a layer was never used.
            NonFiniteError: If a sum holds NaN or infinity.
        """
        if not isinstance(loader, Iterable):
            raise ArgumentError(f"loader={loader!r} is not iterable. Allowed: a DataLoader, or a list of batches.")
        total: Measurement | None = None
        self.num_yielded = 0
        self.used.clear()
        for raw in progress_bar(loader, desc="laplace", unit="batch", shown=progress):
            batch = unpack(raw)
            if batch.is_empty:
                continue
            self.num_yielded += len(batch.target)
            measured = self._batch(batch.to(next(iter(self.state.values())).device), frames)
            total = measured if total is None else total + measured
        if total is None or not total.num_examples:
            raise ArgumentError(
                f"loader=<{type(loader).__name__}> yielded no example. An iterator is used up after one pass: pass a "
                "DataLoader or a list."
            )
        if missing := sorted(set(self.recorder.layers) - self.used):
            raise UsageError(
                f"No forward pass used the layers {missing}, so that nothing is known of their curvature. Leave them "
                "out with subset=; subset='requires_grad' leaves out what is frozen."
            )
        _check_finite(total)
        return total

    def _batch(self, batch: Batch, frames: Mapping[str, Frame]) -> Measurement:
        mask = batch.mask
        with (
            watched(
                self.recorder,
                self.model,
                self.state,
                batch.inputs,
                independent=self.fisher == "mc",
                keeps_inputs=True,
            ) as (output, pull_back),
            torch.no_grad(),
            linalg.full_precision(output.device),
        ):
            nll = self.likelihood.negative_log_likelihood(output.double(), _widest(batch.target), mask).sum()
            columns = output_gradients(
                self.likelihood, output, self.fisher, target=batch.target, mask=mask, generator=self.generator
            )
            statistics = self._statistics(pull_back, columns, mask, frames) if self.recorder.layers else {}
        examples = float(len(output)) if mask is None else count_examples(mask)
        targets = batch.target if mask is None else widened(mask, batch.target).expand_as(batch.target)
        return Measurement(
            statistics, nll.double(), examples, float(targets.numel() if mask is None else targets.sum())
        )

    def _statistics(
        self, pull_back: PullBack, columns: Tensor, mask: Tensor | None, frames: Mapping[str, Frame]
    ) -> dict[str, Statistics]:
        if not self.is_checked:
            pull_back.check()
            self.is_checked = True
        if self.fisher == "recursive":  # it takes a few columns at a time by itself
            rows = recursive_rows(pull_back, columns, mask)
            self.used |= rows.keys()
            return measure(self.structures, rows, frames)
        parts = columns.split(pull_back.columns_within(self.memory_budget))
        found = (self._rows(pull_back, part, mask) for part in parts)
        if not all(structure.takes_parts for structure in self.structures.values()):
            together = list(found)
            whole = {name: of_all_columns([rows[name] for rows in together]) for name in self.recorder.layers}
            return measure(self.structures, whole, frames)
        total: dict[str, Statistics] = {}
        for place, own in enumerate(found):  # inputs are the same for all columns: they count with the first
            rows = {name: replace(one, share=float(place == 0)) for name, one in own.items()}
            total = added(total, measure(self.structures, rows, frames))
        return total

    def _rows(self, pull_back: PullBack, columns: Tensor, mask: Tensor | None) -> dict[str, Rows]:
        """The rows of all layers; a layer that these examples do not use has their zeros in its mean over examples."""
        found = pull_back.rows(columns, mask)
        self.used |= found.keys()
        examples = float(len(pull_back.output)) if mask is None else count_examples(mask)
        return {name: found.get(name) or no_rows(own, columns, examples) for name, own in self.recorder.layers.items()}


def _widest(target: Any) -> Any:
    """Real targets in float64: where the noise is far above the residuals, float32 would round these away."""
    return target.double() if isinstance(target, Tensor) and target.is_floating_point() else target


def _check_finite(measured: Measurement) -> None:
    advice = "Check the data and the weights."
    if not bool(torch.isfinite(measured.nll)):
        raise NonFiniteError(f"The negative log-likelihood is {measured.nll.item()}. {advice}")
    for name, statistics in measured.statistics.items():
        for statistic in statistics.non_finite():
            raise NonFiniteError(f"Layer {name!r}: the {statistic!r} statistic holds NaN or infinity. {advice}")
