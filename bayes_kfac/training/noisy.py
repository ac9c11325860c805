"""Noisy natural gradient: an optimizer whose iterate is a Gaussian over the weights (Zhang et al., ICML 2018).

One step: draw ``W ~ N(M, P⁻¹)`` with ``P = (N/τ) F̄ + δ I``; take the gradient of the mean negative log-likelihood *and*
the curvature statistics at the sample; then ``M ← M − lr · (F̄ + γ I)⁻¹ (∇ + γ_in W)`` with ``γ_in = τδ/N`` and
``γ = γ_in + γ_ex``. The extrinsic damping ``γ_ex`` shapes the step only and never enters the posterior.

Outside :meth:`NoisyNaturalGradient.sampled_params` the weights are at the mean ``M``, always. How this departs from the
paper's own code is listed in ``docs/noisy_kfac.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac import structures
from bayes_kfac.curvature import Meter, Statistics, Summary, find_layers, summarize
from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError, check_count, check_positive
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, BlockSpec
from bayes_kfac.training.groups import block_groups, check_coverage
from bayes_kfac.training.perturbation import Perturbation
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
        statistics_decay: The decay of the curvature statistics' debiased moving average.
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
        statistics_decay: float = 0.95,
        statistics_every: int = 10,
        inverse_every: int = 100,
        num_samples: int = 1,
        antithetic: bool = False,
        warmup: bool = True,
        kl_clip: float | None = None,
        others: str = "error",
        deterministic_lr: float = 1e-2,
        groups: Sequence[Mapping[str, Any]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_types(model, likelihood)
        self.model = model
        self.likelihood = likelihood
        self.num_data = check_count("num_data", num_data)
        self.temperature = check_positive("temperature", temperature)
        self.kl_clip = None if kl_clip is None else check_positive("kl_clip", kl_clip)
        self.num_samples = check_count("num_samples", num_samples)
        self.antithetic = antithetic
        self.warmup = warmup
        if antithetic and num_samples % 2:
            raise ArgumentError(f"num_samples={num_samples} must be even where antithetic=True pairs the samples.")
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
        named = dict(model.named_parameters())
        deterministic = [named[name] for name in self.reasons]
        deterministic += [parameter for parameter in likelihood.parameters() if parameter.requires_grad]
        all_groups = block_groups(self.layers, defaults, groups)
        if deterministic:
            check_positive("deterministic_lr", deterministic_lr, allow_zero=True)
            all_groups.append({"params": deterministic, "kind": "deterministic", "lr": deterministic_lr})
        super().__init__(all_groups, {})
        self._adam = torch.optim.Adam(deterministic, lr=deterministic_lr) if deterministic else None
        self._group_index = {
            name: next(i for i, group in enumerate(all_groups) if any(layer.weight is p for p in group["params"]))
            for name, layer in self.layers.items()
        }
        self.steps = 0
        self.blocks = {name: BlockState() for name in self.layers}
        self._meter = Meter(
            model,
            likelihood,
            self.layers,
            self.structure.measure,
            fisher=fisher,
            num_data=num_data,
            generator=generator,
        )
        self._perturbation = Perturbation(self.layers)
        self._is_sampled = False
        self._forget_samples()

    # -- sampling -----------------------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Put a sample of the weights into the model; take the gradient inside. The mean is back afterwards, always.

        Entered several times before a step, gradients add up as in any accumulation over micro-batches; with
        ``num_samples=k`` each context counts ``1/k``, so that ``k`` contexts on one batch average over samples.
        ``zero_grad()`` inside clears this context's gradient only.

        Raises:
            UsageError: If contexts are nested.
        """
        if self._is_sampled:
            raise UsageError("sampled_params() is entered already. Leave it before entering it again.")
        earlier = self._stash_gradients()
        succeeded = False
        self._is_sampled = True
        try:
            self._draw()
            self._perturbation.apply()
            if self.statistics_schedule.is_due(self.steps):
                self._meter.attach()
            yield
            succeeded = True
        finally:
            self._meter.detach()
            self._perturbation.restore()
            self._is_sampled = False
            self._collect(earlier, succeeded)

    def _draw(self) -> None:
        if self.antithetic and self._contexts % 2:
            self._perturbation.negate()
        else:
            gaussians = {name: state.posterior for name, state in self.blocks.items() if state.posterior is not None}
            self._perturbation.draw(gaussians, self.generator)

    def _stash_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Set the gradients of this step's earlier samples aside; none are there if the user cleared them."""
        if self._contexts == 0:
            return []
        gradients = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        if not gradients:
            self._forget_samples()
        for parameter, _ in gradients:
            parameter.grad = None
        return gradients

    def _collect(self, earlier: list[tuple[nn.Parameter, Tensor]], succeeded: bool) -> None:
        """Close a context: what was sampled in it counts if nothing was raised."""
        if succeeded:
            if self.num_samples > 1:
                for parameter in self._parameters():
                    if parameter.grad is not None:
                        parameter.grad /= self.num_samples
            for parameter, gradient in earlier:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for name, noise in self._perturbation.noise.items():
                self._noise_sum[name] = self._noise_sum[name] + noise if name in self._noise_sum else noise
            for name, batch in self._meter.statistics.items():
                self._batch[name] = self._batch[name] + batch if name in self._batch else batch
            self._contexts += 1
        else:
            for parameter, gradient in earlier:
                parameter.grad = gradient
        self._meter.statistics = {}

    def _forget_samples(self) -> None:
        self._contexts = 0
        self._noise_sum: dict[str, Tensor] = {}
        self._batch: dict[str, Statistics] = {}

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    # -- the step -----------------------------------------------------------------------------------------------------

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
        loss = None
        if closure is not None:
            losses = []
            for _ in range(self.num_samples):
                with self.sampled_params(), torch.enable_grad():
                    losses.append(closure())
            loss = sum(losses) / self.num_samples
        try:
            self._step()
        finally:
            self._forget_samples()
        return loss

    def _step(self) -> None:
        self._check_usage()
        gradients = self._gradients()
        self._check_finite(gradients)
        blocks = self._refreshed(self._measured())
        directions = {}
        for name, gradient in gradients.items():
            blocks[name], directions[name] = self._direction(name, blocks[name], gradient)
        clip = self._clip(blocks, directions)
        self.blocks = blocks
        self.steps += 1
        for name, direction in directions.items():
            layer, lr = self.layers[name], self._group(name)["lr"]
            tensors = layer.tensors(direction * (-lr * clip))
            for key, parameter in layer.parameters.items():
                parameter.add_(tensors[key])
        self._step_deterministic()

    def _gradients(self) -> dict[str, Tensor]:
        """``∇ + γ_in W``: the gradient of the mean objective at the samples, for layers that took part."""
        gradients = {}
        for name, layer in self.layers.items():
            gradient = layer.gradient()
            if gradient is None:
                continue
            sample = layer.values()
            if name in self._noise_sum:
                sample = sample + self._noise_sum[name] / self._contexts
            gradients[name] = gradient + self._intrinsic_damping(name) * sample
        return gradients

    def _measured(self) -> dict[str, BlockState]:
        """The blocks with this step's statistics averaged in."""
        blocks = dict(self.blocks)
        for name, batch in self._batch.items():
            running = blocks[name].statistics
            decay = self._group(name)["statistics_decay"]
            updated = batch if running is None else running.moving_average(batch, decay)
            identity_weight = blocks[name].identity_weight * decay
            blocks[name] = replace(blocks[name], statistics=updated, identity_weight=identity_weight)
        return blocks

    def _refreshed(self, blocks: dict[str, BlockState]) -> dict[str, BlockState]:
        """The blocks with their Gaussians rebuilt from their statistics, if that is due."""
        if not self.inverse_schedule.is_due(self.steps):
            return blocks
        for name, gaussian in self._build_posteriors(blocks, warm=True).items():
            blocks[name] = replace(blocks[name], posterior=gaussian)
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

    def _build_posteriors(self, blocks: Mapping[str, BlockState], *, warm: bool) -> dict[str, BlockGaussian]:
        specs = [
            BlockSpec(
                name,
                self._blended(name, state) if warm else self._statistics(name, state),
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

    def _step_deterministic(self) -> None:
        if self._adam is None:
            return
        group = self.param_groups[-1]
        self._adam.param_groups[0]["lr"] = group["lr"]
        with torch.enable_grad():
            divergence = self.likelihood.kl() * (self.temperature / self.num_data)
        if divergence.requires_grad:
            own = [parameter for parameter in self.likelihood.parameters() if parameter.requires_grad]
            pulls = torch.autograd.grad(divergence, own, allow_unused=True)
            for parameter, pull in zip(own, pulls, strict=True):
                if pull is not None:
                    parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        self._adam.step()

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_usage(self) -> None:
        if self._is_sampled:
            raise UsageError("step() was called inside sampled_params(). Leave the context first, then step.")
        if self._contexts == 0:
            raise UsageError(
                "step() was called, but nothing was sampled since the last step. Compute the loss and call backward() "
                "inside `with optimizer.sampled_params():`, or pass a closure to step()."
            )
        if self._contexts % self.num_samples:
            raise UsageError(
                f"num_samples={self.num_samples}, but sampled_params() was entered {self._contexts} times before "
                "step(). Enter it num_samples times for each batch."
            )
        if all(parameter.grad is None for layer in self.layers.values() for parameter in layer.parameters.values()):
            raise UsageError("No layer has a gradient: call loss.backward() inside sampled_params(), before step().")
        if self.statistics_schedule.is_due(self.steps) and not self._batch:
            raise UsageError(
                "No curvature statistics were measured inside sampled_params(). The model must be called through "
                "model(x) in train() mode with gradients enabled; where its output is no tensor, or with "
                "fisher='empirical', the loss must be computed by calling likelihood(output, target)."
            )

    def _check_finite(self, gradients: Mapping[str, Tensor]) -> None:
        for name, batch in self._batch.items():
            for statistic in batch.non_finite():
                cause = "the layer's input" if statistic == "input" else "the gradient at the layer's output"
                raise NonFiniteError(
                    f"Layer {name!r}: the batch's {statistic!r} statistic holds NaN or infinity, so {cause} does. "
                    "Nothing was updated. Check the batch's data; if it is clean, lower lr or raise extrinsic_damping."
                )
        for name, gradient in gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(
                    f"Layer {name!r}: the gradient holds NaN or infinity. Nothing was updated. Check the batch's data; "
                    "if it is clean, lower lr or raise extrinsic_damping."
                )

    # -- what was learned ---------------------------------------------------------------------------------------------

    def posterior(self) -> Posterior:
        """The posterior: the current mean, and blocks from the current statistics, as a snapshot.

        Returns:
            The posterior.
        """
        self._check_at_mean("posterior()")
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
                fisher=self._meter.fisher,
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

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later :meth:`load_state_dict` needs to go on bit for bit, the generator's state included."""
        state = super().state_dict()
        state[_STATE_KEY] = {
            "steps": self.steps,
            "blocks": dump_state(self.blocks),
            "deterministic": None if self._adam is None else self._adam.state_dict(),
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
        if self._adam is not None:
            self._adam.load_state_dict(own["deterministic"])
        if self.generator is not None and own["generator"] is not None:
            self.generator.set_state(own["generator"])
        self._forget_samples()

    # -- small things -------------------------------------------------------------------------------------------------

    def _group(self, name: str) -> dict[str, Any]:
        return self.param_groups[self._group_index[name]]

    def _intrinsic_damping(self, name: str) -> float:
        prior_precision: float = self._group(name)["prior_precision"]
        return self.temperature * prior_precision / self.num_data

    def _blended(self, name: str, state: BlockState) -> Statistics:
        statistics = self._statistics(name, state)
        return self.structure.blend_with_identity(statistics, state.identity_weight) if self.warmup else statistics

    def _statistics(self, name: str, state: BlockState) -> Statistics:
        if state.statistics is None:
            raise UsageError(
                f"Layer {name!r} has no curvature statistics yet: no training step ran through it. Train first; if the "
                "model never uses the layer, freeze it with requires_grad_(False)."
            )
        return state.statistics

    def _check_at_mean(self, what: str) -> None:
        if self._is_sampled:
            raise UsageError(f"{what} was called inside sampled_params(), where the weights are not at the mean.")


class NoisyKFAC(NoisyNaturalGradient):
    """Noisy K-FAC (Zhang et al. 2018): :class:`NoisyNaturalGradient` with the Kronecker-factored Fisher."""


def _check_types(model: nn.Module, likelihood: Likelihood) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={model!r} must be an nn.Module.")
    if not isinstance(likelihood, Likelihood):
        raise ArgumentError(
            f"likelihood={likelihood!r} must be one of bayes_kfac.likelihoods, such as Gaussian() or Categorical()."
        )
