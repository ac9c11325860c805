"""Noisy natural gradient: an optimizer whose iterate is a Gaussian over the weights (Zhang et al., ICML 2018).

One step: draw ``W ~ N(M, P⁻¹)`` with ``P = (N/τ) F̄ + δ I``; take the gradient of the mean negative log-likelihood *and*
the curvature statistics at the sample; then ``M ← M − lr · (F̄ + γ I)⁻¹ (∇ + γ_in W)`` with ``γ_in = τδ/N`` and
``γ = γ_in + γ_ex``. The extrinsic damping ``γ_ex`` shapes the step only and never enters the posterior.

Outside :meth:`NoisyNaturalGradient.sampled_params` the weights are at the mean ``M``, always. How this departs from the
paper's own code is listed in ``docs/noisy_kfac.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac import structures
from bayes_kfac.curvature import Meter, Statistics, Summary, find_layers, summarize
from bayes_kfac.errors import ArgumentError, UsageError, check_count, check_positive
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, BlockSpec
from bayes_kfac.training.checks import check_finite, check_ready, check_types
from bayes_kfac.training.deterministic import PointEstimates
from bayes_kfac.training.groups import block_groups, check_coverage
from bayes_kfac.training.sampler import Sampler
from bayes_kfac.training.schedules import Every
from bayes_kfac.training.state import BlockState, dump_state, restore_state

_STATE_KEY = "bayes_kfac"


class NoisyNaturalGradient(torch.optim.Optimizer):
    """Trains a Gaussian posterior over a model's weights by noisy natural gradient.

    ``for x, y in loader: with optimizer.sampled_params(): optimizer.zero_grad(); likelihood(model(x), y).backward()``
    and then ``optimizer.step()``; or ``optimizer.step(closure)``, which opens the context itself.

    Args:
        model: The model; its output's first dimension is the batch.
        likelihood: What the output means; its mean negative log-likelihood is the loss.
        num_data: The number of examples in the training set. The scale between data and prior comes from here alone.
        lr: The step size.
        structure: The family of the posterior's blocks; see ``bayes_kfac.structures.available()``.
        damping: How the prior enters a block: ``"factored"``, ``"optimal"`` or ``"exact"``.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        sharing: How positions that share weights are summed: ``"expand"`` or ``"reduce"``.
        prior_precision: The precision ``δ`` of the prior ``N(0, I/δ)``.
        temperature: The weight ``τ`` of the KL term; 1 is Bayes.
        extrinsic_damping: ``γ_ex``, on the scale of one example's Fisher.
        momentum: The decay of the gradient's debiased moving average, before preconditioning.
        statistics_decay: The decay *per step* of the curvature statistics' debiased moving average: a measurement after
            ``k`` steps keeps ``statistics_decay**k`` of the old ones, so that the average's memory does not depend on
            ``statistics_every``.
        statistics_every: Steps between two measurements of the statistics (more often at the start).
        inverse_every: Steps between two refreshes of the posterior's factors (more often at the start).
        num_samples: Weight samples in one step: the context is entered that often for each batch.
        antithetic: Whether every second sample mirrors the one before.
        warmup: Whether, while the moving average is young, training blends it with the identity, with the weight that a
            start at the identity would still have (the paper's code). Noise and steps then start small and grow as
            data come in; :meth:`posterior` never has the blend.
        kl_clip: The largest ``lr² · dᵀ F̄ d`` of a step, or ``None`` for no limit.
        others: What to do with parameters that no block covers: ``"error"``, or ``"deterministic"`` to train them as
            point estimates.
        deterministic_lr: Adam's step size for these and for the likelihood's own parameters.
        groups: Options for parts of the model: ``[{"params": parameters, "prior_precision": 10.0, "lr": 1e-3}]``.
        generator: The source of randomness for weight samples and sampled targets.

    Raises:
        ArgumentError: If an argument is out of range.
        UnsupportedModelError: If the model has no block, or parameters outside blocks with ``others="error"``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        num_data: int,
        lr: float = 1e-2,
        structure: str = "kron",
        damping: str = "factored",
        fisher: str = "mc",
        sharing: str = "expand",
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        extrinsic_damping: float = 0.0,
        momentum: float = 0.9,
        statistics_decay: float = 0.99,
        statistics_every: int = 10,
        inverse_every: int = 100,
        num_samples: int = 1,
        antithetic: bool = False,
        warmup: bool = True,
        kl_clip: float | None = 1e-3,
        others: str = "error",
        deterministic_lr: float = 1e-2,
        groups: Sequence[Mapping[str, Any]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_types(model, likelihood)
        self.model = model
        self.likelihood = likelihood
        self.num_data = check_count("num_data", num_data)
        self.temperature = check_positive("temperature", temperature)
        self.kl_clip = None if kl_clip is None else check_positive("kl_clip", kl_clip)
        self.warmup = warmup
        self.statistics_schedule = Every(check_count("statistics_every", statistics_every))
        self.inverse_schedule = Every(check_count("inverse_every", inverse_every))
        self.generator = generator
        self.structure = structures.get(structure, damping=damping, sharing=sharing)
        self.layers, self.reasons = find_layers(model)
        check_coverage(self.layers, self.reasons, others)
        defaults = {
            "lr": lr,
            "prior_precision": prior_precision,
            "extrinsic_damping": extrinsic_damping,
            "momentum": momentum,
            "statistics_decay": statistics_decay,
        }
        all_groups = block_groups(self.layers, defaults, groups)
        self._point_estimates = PointEstimates(model, likelihood, self.reasons, deterministic_lr)
        all_groups += self._point_estimates.group
        super().__init__(all_groups, {})
        self._group_index = {
            name: next(i for i, group in enumerate(all_groups) if any(layer.weight is p for p in group["params"]))
            for name, layer in self.layers.items()
        }
        self.steps = 0
        self._last_measured = -1
        self.blocks = {name: BlockState() for name in self.layers}
        meter = Meter(
            model,
            likelihood,
            self.layers,
            self.structure.measure,
            fisher=fisher,
            num_data=num_data,
            generator=generator,
        )
        self.fisher = meter.fisher
        self._sampler = Sampler(
            self.layers,
            [parameter for group in all_groups for parameter in group["params"]],
            meter,
            num_samples=num_samples,
            antithetic=antithetic,
            generator=generator,
        )

    def sampled_params(self) -> AbstractContextManager[None]:
        """Put a sample of the weights into the model; take the gradient inside. The mean is back afterwards, always.

        Entered several times before a step, gradients add up as in any accumulation over micro-batches; with
        ``num_samples=k`` each context counts ``1/k``, so that ``k`` contexts on one batch average over samples.
        ``zero_grad()`` inside clears this context's gradient only. Before the first statistics are in, the warm-up's
        identity is what is sampled from; without warm-up the first sample is the mean itself.

        Returns:
            The context; entering one inside another raises ``UsageError``.
        """
        if self.warmup and any(state.posterior is None for state in self.blocks.values()):
            with torch.no_grad():
                self.blocks = self._with_posteriors(self.blocks)
        gaussians = {name: state.posterior for name, state in self.blocks.items() if state.posterior is not None}
        return self._sampler.sample(gaussians, measure=self.statistics_schedule.is_due(self.steps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the posterior by one natural-gradient step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss; called inside
                :meth:`sampled_params` once for each of ``num_samples``. Without it, gradients must have been taken
                inside :meth:`sampled_params`.

        Returns:
            The closure's mean loss, or ``None``.

        Raises:
            UsageError: If no gradient, or no statistics, came from inside :meth:`sampled_params`.
            NonFiniteError: If gradients or statistics hold NaN or infinity; the state stays as it was.
        """
        losses = []
        try:
            for _ in range(self._sampler.num_samples if closure is not None else 0):
                with self.sampled_params(), torch.enable_grad():
                    losses.append(closure())  # type: ignore[misc]
            self._step()
        finally:
            self._sampler.forget()
        return sum(losses) / len(losses) if losses else None

    def _step(self) -> None:
        check_ready(self._sampler, self.layers, measured=self.statistics_schedule.is_due(self.steps))
        gradients = self._gradients()
        check_finite(self._sampler.statistics, gradients, self._point_estimates.gradients)
        blocks = self._refreshed(self._measured())
        directions = {}
        for name, gradient in gradients.items():
            blocks[name], directions[name] = self._direction(name, blocks[name], gradient)
        clip = self._clip(blocks, directions)
        self.blocks = blocks
        if self._sampler.statistics:
            self._last_measured = self.steps
        self.steps += 1
        for name, direction in directions.items():
            layer, lr = self.layers[name], self._group(name)["lr"]
            tensors = layer.tensors(direction * (-lr * clip))
            for key, parameter in layer.parameters.items():
                parameter.add_(tensors[key])
        self._point_estimates.step(self.param_groups[-1]["lr"], self.temperature / self.num_data)

    def _gradients(self) -> dict[str, Tensor]:
        """``∇ + γ_in W``: the gradient of the mean objective at the samples, for layers that took part."""
        gradients = {}
        for name, layer in self.layers.items():
            gradient = layer.gradient()
            if gradient is not None:
                dtype = torch.promote_types(gradient.dtype, torch.float32)  # the algebra of a bf16 model is in float32
                gradients[name] = gradient.to(dtype) + self._intrinsic_damping(name) * self._sampler.mean_sample(name)
        return gradients

    def _measured(self) -> dict[str, BlockState]:
        """The blocks with this step's statistics averaged in."""
        blocks = dict(self.blocks)
        for name, batch in self._sampler.statistics.items():
            running = blocks[name].statistics
            decay = self._group(name)["statistics_decay"] ** (self.steps - self._last_measured)
            # from nothing the average is (1 − decay) of the batch, and so is its count: debiased from the first step on
            updated = batch * (1 - decay) if running is None else running.moving_average(batch, decay)
            identity_weight = blocks[name].identity_weight * decay
            blocks[name] = replace(blocks[name], statistics=updated, identity_weight=identity_weight)
        return blocks

    def _refreshed(self, blocks: dict[str, BlockState]) -> dict[str, BlockState]:
        """The blocks with their Gaussians rebuilt from their statistics, if that is due."""
        if not self.inverse_schedule.is_due(self.steps):
            return blocks
        for name, state in blocks.items():
            state.measured(name)  # a layer that never ran has nothing to go by
        blocks = self._with_posteriors(blocks)
        damped = [name for name in blocks if self._group(name)["extrinsic_damping"] > 0]
        specs = [
            BlockSpec(
                name,
                self._blended(name, blocks[name]),
                data_scale=1.0,
                prior_precision=self._intrinsic_damping(name) + self._group(name)["extrinsic_damping"],
                previous=blocks[name].preconditioner,
            )
            for name in damped
        ]
        for name, gaussian in zip(damped, self.structure.gaussians(specs), strict=True):
            blocks[name] = replace(blocks[name], preconditioner=gaussian)
        return blocks

    def _with_posteriors(self, blocks: Mapping[str, BlockState]) -> dict[str, BlockState]:
        """The blocks with fresh Gaussians to sample from."""
        gaussians = self._build_posteriors(blocks, warm=True)
        return {name: replace(state, posterior=gaussians[name]) for name, state in blocks.items()}

    def _build_posteriors(self, blocks: Mapping[str, BlockState], *, warm: bool) -> dict[str, BlockGaussian]:
        specs = [
            BlockSpec(
                name,
                self._blended(name, state) if warm else state.measured(name),
                data_scale=self.num_data / self.temperature,
                prior_precision=self._group(name)["prior_precision"],
                previous=state.posterior if warm else None,
            )
            for name, state in blocks.items()
        ]
        return dict(zip(blocks, self.structure.gaussians(specs), strict=True))

    def _direction(self, name: str, state: BlockState, gradient: Tensor) -> tuple[BlockState, Tensor]:
        """Average the gradient over steps and precondition it: ``(F̄ + γ I)⁻¹ m``."""
        decay = self._group(name)["momentum"]
        weight = decay * state.momentum_weight + (1 - decay)
        average = (1 - decay) * gradient if state.momentum is None else decay * state.momentum + (1 - decay) * gradient
        state = replace(state, momentum=average, momentum_weight=weight)
        debiased = average / weight
        if state.preconditioner is not None and self._group(name)["extrinsic_damping"] > 0:
            return state, state.preconditioner.solve(debiased)
        assert state.posterior is not None
        return state, state.posterior.solve(debiased) * (self.num_data / self.temperature)

    def _clip(self, blocks: Mapping[str, BlockState], directions: Mapping[str, Tensor]) -> Tensor | float:
        """``min(1, sqrt(κ / (lr² Σ dᵀ F̄ d)))``, without reading a number back from the device."""
        if self.kl_clip is None:
            return 1.0
        lengths = []
        for name, direction in directions.items():
            momentum = blocks[name].momentum
            assert momentum is not None
            inner = (momentum * direction).sum() / blocks[name].momentum_weight
            lengths.append(self._group(name)["lr"] ** 2 * inner)
        return (self.kl_clip / torch.stack(lengths).sum()).sqrt().clamp(max=1.0)

    def posterior(self) -> Posterior:
        """The posterior: the current mean, and blocks from the current statistics, as a snapshot.

        Returns:
            The posterior.

        Raises:
            UsageError: If called inside :meth:`sampled_params`, or before any statistics were measured.
        """
        if self._sampler.is_open:
            raise UsageError("posterior() was called inside sampled_params(). Leave the context first.")
        with torch.no_grad():
            blocks = self._build_posteriors(self.blocks, warm=False)
        return Posterior(
            self.model,
            self.likelihood,
            blocks,
            prior_precision={name: self._group(name)["prior_precision"] for name in self.layers},
            provenance=Provenance(
                method="noisy natural gradient",
                structure=self.structure.name,
                damping=self.structure.damping,
                fisher=self.fisher,
                sharing=self.structure.sharing,
                temperature=self.temperature,
                num_data=self.num_data,
            ),
        )

    def kl(self) -> Tensor:
        """``KL(q ‖ prior)`` of the Gaussians that samples are drawn from, plus the likelihood's own, in nats."""
        total = self.likelihood.kl().detach()
        for name, state in self.blocks.items():
            if state.posterior is not None:
                divergence = state.posterior.kl(self.layers[name].values(), self._group(name)["prior_precision"])
                total = total + divergence.sum()
        return total

    def summary(self) -> Summary:
        """For each parameter: its block, structure, shape, and why where it has none."""
        return summarize(self.model, self.layers, self.reasons, f"{self.structure.name}/{self.structure.damping}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a layer's block is set up with its group.

        Args:
            param_group: The group.

        Raises:
            ArgumentError: Always, once the optimizer is built.
        """
        if hasattr(self, "blocks"):
            raise ArgumentError("add_param_group() is not supported. Pass groups= when the optimizer is made.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later :meth:`load_state_dict` needs to go on bit for bit, the generator included."""
        state = super().state_dict()
        state[_STATE_KEY] = {
            "steps": self.steps,
            "last_measured": self._last_measured,
            "blocks": dump_state(self.blocks),
            "point_estimates": self._point_estimates.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the model's and the likelihood's weights are loaded separately.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ArgumentError: If it came from another kind of optimizer or another model; nothing is changed then.
        """
        if _STATE_KEY not in state_dict:
            raise ArgumentError("state_dict is not from a noisy natural gradient optimizer of bayes_kfac.")
        own = state_dict[_STATE_KEY]
        blocks = restore_state(own["blocks"], self.layers)
        super().load_state_dict({name: value for name, value in state_dict.items() if name != _STATE_KEY})
        self.blocks = blocks
        self.steps = own["steps"]
        self._last_measured = own["last_measured"]
        self._point_estimates.load_state_dict(own["point_estimates"])
        if self.generator is not None and own["generator"] is not None:
            self.generator.set_state(own["generator"])
        self._sampler.forget()

    def _group(self, name: str) -> dict[str, Any]:
        return self.param_groups[self._group_index[name]]

    def _intrinsic_damping(self, name: str) -> float:
        prior_precision: float = self._group(name)["prior_precision"]
        return self.temperature * prior_precision / self.num_data

    def _blended(self, name: str, state: BlockState) -> Statistics:
        """The statistics that training goes by: with warm-up, as if the average had started at the identity."""
        if not self.warmup:
            return state.measured(name)
        layer = self.layers[name]
        identity = self.structure.identity(layer.shape, layer.weight)
        return identity if state.statistics is None else state.statistics.lean(identity, state.identity_weight)


class NoisyKFAC(NoisyNaturalGradient):
    """Noisy K-FAC (Zhang et al. 2018): :class:`NoisyNaturalGradient` with the Kronecker-factored Fisher."""
