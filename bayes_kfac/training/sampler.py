"""The samples of one step: ``mean + noise`` in the weights, and what the passes through them showed.

Weights are changed in place under ``no_grad`` with autograd's version counters on, so that a backward pass that comes
after the mean is back fails instead of using the wrong weights. Noise is one matrix ``[*blocks, out, in]`` a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bayes_kfac import linalg
from bayes_kfac.curvature import Layer, Meter, Statistics, added
from bayes_kfac.errors import ArgumentError, UsageError, check_count
from bayes_kfac.structures import JointGaussian


class Sampler:
    """Opens the contexts of a step, and gathers gradients, noise and statistics over them.

    Args:
        meter: Measures the statistics.
        num_samples: Contexts on one batch; each counts ``1/num_samples``.
        antithetic: Whether every second sample mirrors the one before.
        generator: The source of randomness.

    Attributes:
        contexts: How many contexts of this step were left without an exception.
        statistics: What was measured in them, by layer.
        noise_sum: The sum of their noise, by layer.
    """

    def __init__(self, meter: Meter, *, num_samples: int, antithetic: bool, generator: torch.Generator | None) -> None:
        self.num_samples = check_count("num_samples", num_samples)
        if antithetic and num_samples % 2:
            raise ArgumentError(f"num_samples={num_samples} must be even where antithetic=True pairs the samples.")
        self.antithetic = antithetic
        self.generator = generator
        self.is_open = False
        self._meter = meter
        self._drawn: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._changed: tuple[Tensor, ...] = ()
        self._means: tuple[Tensor, ...] = ()
        self.watch({}, [])

    def watch(self, layers: Mapping[str, Layer], parameters: Sequence[nn.Parameter]) -> None:
        """Sample and measure these layers from now on; a step that was begun is forgotten.

        Args:
            layers: The layers that have a posterior, by name.
            parameters: All parameters whose gradients the step uses.
        """
        self._layers = layers
        self._parameters = parameters
        self._meter.watch(layers)
        self.forget()

    def unmeasured(self) -> AbstractContextManager[None]:
        """Let forward passes go by unmeasured."""
        return self._meter.paused()

    def forget(self) -> None:
        """Start a new step."""
        self.contexts = 0
        self._has_gradients = False
        self.statistics: dict[str, Statistics] = {}
        self.noise_sum: dict[str, Tensor] = {}

    def with_decay(self, gradients: Mapping[str, Tensor], decays: Mapping[str, float]) -> dict[str, Tensor]:
        """``gradient + decay · W``, ``W`` the mean over this step's samples, ``[*blocks, out, in]`` of each layer."""
        # of all layers at once: on a GPU a launch for each would take longer than the work
        weights = [self._layers[n].matrix(self._layers[n].parameters).to(own.dtype) for n, own in gradients.items()]
        totals = torch._foreach_mul(weights, [decays[name] for name in gradients])
        torch._foreach_add_(totals, tuple(gradients.values()))
        named = dict(zip(gradients, totals, strict=True))
        if sampled := [name for name in named if name in self.noise_sum]:
            noise, shares = [self.noise_sum[n] for n in sampled], [decays[n] / self.contexts for n in sampled]
            torch._foreach_add_([named[name] for name in sampled], torch._foreach_mul(noise, shares))
        return named

    @contextmanager
    def sample(self, gaussian: JointGaussian, *, measure: bool) -> Iterator[None]:
        """Put one sample into the weights; the mean is back afterwards, whatever happens inside.

        Args:
            gaussian: Where the noise comes from; layers that it does not know stay at their mean.
            measure: Whether forward passes inside are measured.

        Yields:
            Nothing.

        Raises:
            UsageError: If a sample is in the weights already.
        """
        if self.is_open:
            raise UsageError("sampled_params() is entered already. Leave it before entering it again.")
        earlier = self._set_gradients_aside()
        self.is_open, succeeded = True, False
        try:
            self._draw(gaussian)
            self._apply()
            if measure:
                self._meter.attach()
            yield
            succeeded = True
        finally:
            self._meter.detach()
            self._restore()
            self.is_open = False
            self._put_gradients_back(earlier, succeeded)
            if succeeded:
                self._gather()

    def _draw(self, gaussian: JointGaussian) -> None:
        if self.antithetic and self.contexts % 2:
            self._noise = {name: -noise for name, noise in self._drawn.items()}
        else:
            with linalg.full_precision(self._parameters[0].device):
                self._drawn = self._noise = gaussian.sample(gaussian.standard_normal(self.generator))

    @torch.no_grad()
    def _apply(self) -> None:
        changes = {
            parameter: change
            for name, noise in self._noise.items()
            for parameter, change in self._layers[name].by_parameter(noise)
        }
        if (
            changes
        ):  # all at once: on a GPU a few launches, where one for each parameter would take longer than the work
            self._changed = tuple(changes)
            self._means = tuple(torch._foreach_mul(self._changed, 1))
            torch._foreach_add_(self._changed, tuple(changes.values()))
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    @torch.no_grad()
    def _restore(self) -> None:
        if self._means:
            torch._foreach_copy_(self._changed, self._means)
        self._changed, self._means = (), ()
        torch.clear_autocast_cache()

    def _set_gradients_aside(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of this step's earlier samples, so that ``zero_grad()`` inside does not lose them."""
        if self.contexts == 0:
            return {}
        # copies: DistributedDataParallel may write the next gradients into the memory of these
        gradients = {p: p.grad.clone() for p in self._parameters if p.grad is not None}
        is_of_statistics = bool(self.statistics) and not self._has_gradients  # of unlabelled data, say
        if not (gradients or is_of_statistics) or not linalg.all_finite(gradients.values()):
            # cleared by the user, or in a step that a gradient scaler refused: the step begins anew
            self.forget()
            gradients = {}
        for parameter in self._parameters:
            parameter.grad = None
        return gradients

    def _put_gradients_back(self, earlier: Mapping[nn.Parameter, Tensor], succeeded: bool) -> None:
        """Add this sample's gradients to the earlier ones, or drop them if the sample failed."""
        for parameter in self._parameters:
            own = parameter.grad if succeeded else None
            self._has_gradients |= own is not None
            if own is not None and self.num_samples > 1:
                own /= self.num_samples
            before = earlier.get(parameter)
            parameter.grad = own if before is None else before if own is None else before + own

    def _gather(self) -> None:
        for name, noise in self._noise.items():
            self.noise_sum[name] = self.noise_sum[name] + noise if name in self.noise_sum else noise
        self.statistics = added(self.statistics, self._meter.take())
        self.contexts += 1
