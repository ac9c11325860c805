"""Noisy natural gradient: an optimizer whose iterate is a Gaussian over the weights (Zhang et al., ICML 2018).

One step: draw ``W ~ N(M, P⁻¹)`` with ``P = (N/τ) F̄ + δ I``; take the gradient of the mean negative log-likelihood *and*
the curvature statistics at the sample; then ``M ← M − lr · (F̄ + γ I)⁻¹ (∇ + γ_in W)`` with ``γ_in = τδ/N`` and
``γ = γ_in + γ_ex``. The extrinsic damping ``γ_ex`` shapes the step only and never enters the posterior.

Outside :meth:`NoisyNaturalGradient.sampled_params` the weights are at the mean ``M``, always. How this departs from the
paper's own code is listed in ``docs/noisy_kfac.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import (
    Layer,
    Meter,
    Rows,
    Statistics,
    Summary,
    check_types,
    summarize,
    unwrapped,
)
from bayes_kfac.distributed import mean_over_processes, sum_over_processes
from bayes_kfac.errors import ArgumentError, check_count, check_generator, check_positive
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.provenance import Provenance
from bayes_kfac.readonly import ReadOnly
from bayes_kfac.structures import Structure
from bayes_kfac.training.blocks import Blocks, restore_set_aside
from bayes_kfac.training.checks import check_generator_state, check_losses, check_made_by, check_outside, check_ready
from bayes_kfac.training.deterministic import PointEstimates
from bayes_kfac.training.finite import Watch, check_finite
from bayes_kfac.training.groups import Checked, block_groups, follow_model, layers_by_group, with_options
from bayes_kfac.training.roster import Roster
from bayes_kfac.training.sampler import Sampler
from bayes_kfac.training.schedules import Schedule, as_schedule, dump_schedule, load_schedule
from bayes_kfac.training.state import BlockState
from bayes_kfac.training.states import States

_STATE_KEY = "bayes_kfac"
#: What is settled when an optimizer is made: its parts hold on to these.
SETTLED = ("model", "likelihood", "structure", "generator")


class NoisyNaturalGradient(torch.optim.Optimizer):
    """Trains a Gaussian posterior over a model's weights by noisy natural gradient.

    ``for x, y in loader: with optimizer.sampled_params(): optimizer.zero_grad(); likelihood(model(x), y).backward()``
    and then ``optimizer.step()``; or ``optimizer.step(closure)``, which opens the context itself.

    Args:
        model: The model; its output's first dimension is the batch. It may be compiled, or wrapped in
            ``DistributedDataParallel``.
        likelihood: What the output means; its mean negative log-likelihood is the loss.
        num_data: The number of examples in the training set. The scale between data and prior comes from here alone.
        lr: The step size. As gradients are averaged over steps, 0.1 here is 0.01 with torch's momentum.
        structure: The family of the posterior's blocks: one of ``bayes_kfac.structures.available()``, or a structure
            with options of its own.
        damping: How the prior enters a block: ``"factored"``, ``"optimal"`` or ``"exact"``.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"``, or ``"recursive"`` (KFRA, of chains of layers).
        sharing: How positions that share weights are summed: ``"expand"`` or ``"reduce"``.
        prior_precision: The precision ``δ`` of the prior ``N(0, I/δ)``.
        temperature: The weight ``τ`` of the KL term; 1 is Bayes. Below it a learned noise wants a bound:
            :class:`bayes_kfac.likelihoods.BoundedNoise`.
        extrinsic_damping: ``γ_ex``, on the scale of one example's Fisher.
        momentum: The decay of the gradient's debiased moving average, before preconditioning.
        statistics_decay: The decay *per step* of the curvature statistics' debiased moving average: a measurement after
            ``k`` steps keeps ``statistics_decay**k`` of the old ones, so that the average's memory does not depend on
            ``statistics_every``.
        statistics_every: Steps between two measurements of the statistics (more often at the start), or a schedule of
            ``bayes_kfac.training.schedules`` that decides layer by layer.
        inverse_every: The same between two refreshes of the posterior's factors.
        num_samples: Weight samples in one step: the context is entered that often for each batch.
        antithetic: Whether every second sample mirrors the one before.
        warmup: Whether, while the moving average is young, training blends it with the identity, with the weight that a
            start at the identity would still have (the paper's code). Noise and steps then start small and grow as
            data come in; :meth:`posterior` never has the blend.
        kl_clip: The largest ``lr² · dᵀ F̄ d`` of a step, or ``None`` for no limit.
        params: The parameters to train, by default all that are not frozen; the rest is left to another optimizer.
        others: What to do with parameters that no block covers: ``"error"``, ``"diagonal"`` to give each an independent
            Gaussian, or ``"deterministic"`` to train them as point estimates.
        deterministic_lr: Adam's step size for these and for the likelihood's own parameters.
        groups: Options for parts of the model: ``[{"params": parameters, "prior_precision": 10.0, "lr": 1e-3}]``.
        generator: The source of randomness for weight samples and sampled targets.

    Raises:
        ArgumentError: If an argument is out of range.
        UnsupportedModelError: If the model has no block, or parameters outside blocks with ``others="error"``.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> model, likelihood = torch.nn.Linear(1, 1), bk.likelihoods.Gaussian(noise_scale=0.1)
        >>> optimizer = bk.NoisyNaturalGradient(model, likelihood, num_data=32, structure="dense")
        >>> for _ in range(3):
        ...     with optimizer.sampled_params():
        ...         optimizer.zero_grad()
        ...         likelihood(model(x), 2 * x).backward()
        ...     optimizer.step()
        >>> optimizer.steps, optimizer.posterior().provenance.structure
        (3, 'dense')
    """

    #: What the posterior says of how it was made.
    method: ClassVar[str] = "noisy natural gradient"
    #: By how much ``kl_clip`` shortened the last step, a scalar on its device, or ``None``: 1 where it left it alone.
    clip_factor: Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        num_data: int,
        lr: float = 0.1,
        structure: str | Structure = "kron",
        damping: str = "factored",
        fisher: str = "mc",
        sharing: str = "expand",
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        extrinsic_damping: float = 0.0,
        momentum: float = 0.9,
        statistics_decay: float = 0.99,
        statistics_every: int | Schedule = 10,
        inverse_every: int | Schedule = 100,
        num_samples: int = 1,
        antithetic: bool = False,
        warmup: bool = True,
        kl_clip: float | None = 1e-3,
        params: Iterable[nn.Parameter] | None = None,
        others: str = "error",
        deterministic_lr: float = 1e-2,
        groups: Sequence[Mapping[str, Any]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_types(model, likelihood)
        self.model, self._is_parallel = unwrapped(model)
        self.likelihood = likelihood
        self.kl_clip = kl_clip
        self.statistics_schedule = as_schedule("statistics_every", statistics_every)
        self.inverse_schedule = as_schedule("inverse_every", inverse_every)
        self.generator = check_generator(generator)
        self.structure = structures.get(structure, damping=damping, sharing=sharing)
        self._check_structure()
        self.structure.check_fisher(fisher)
        self.steps = 0
        self._blocks = self._make_blocks(
            num_data=check_count("num_data", num_data),
            temperature=check_positive("temperature", temperature),
            warmup=warmup,
        )
        self._roster = Roster(self.model, likelihood, params, others)
        layers = self._roster.sort()
        defaults = {
            "lr": lr,
            "prior_precision": prior_precision,
            "extrinsic_damping": extrinsic_damping,
            "momentum": momentum,
            "statistics_decay": statistics_decay,
        }
        all_groups = block_groups(layers, defaults, groups)
        self._point_estimates = PointEstimates(
            self.model, likelihood, self.reasons, deterministic_lr, may_grow=others == "deterministic"
        )
        # schedulers that cycle the momentum look for it here
        super().__init__(all_groups + self._point_estimates.group, {"momentum": momentum})
        self._take_up(layers)
        self._meter = Meter(
            self.model,
            likelihood,
            layers,
            self._measure,
            fisher=fisher,
            num_data=partial(getattr, self, "num_data"),
            generator=generator,
        )
        self._sampler = Sampler(self._meter, num_samples=num_samples, antithetic=antithetic, generator=generator)
        self._sampler.watch(layers, self._parameters())
        self._watch = Watch()
        self._checked_groups = Checked()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be set and not counted."""
        if name in SETTLED and name in self.__dict__:
            raise AttributeError(f"{name} is settled when an optimizer is made. Make a new one with the other {name}.")
        super().__setattr__(name, value)

    def _check_structure(self) -> None:
        self.structure.check_posterior()

    def _make_blocks(self, **options: Any) -> Blocks:
        return Blocks(self.structure, self._group, **options)

    @property
    def num_data(self) -> int:
        """The number of examples in the training set; may be set where the set grows.

        Like every option it counts for noise and steps from the next refresh of the factors on, and for
        :meth:`posterior` at once.
        """
        return self._blocks.num_data

    @num_data.setter
    def num_data(self, value: int) -> None:
        self._blocks.num_data = check_count("num_data", value)

    @property
    def temperature(self) -> float:
        """The weight ``τ`` of the KL term; may be set on the way, to anneal it. It counts as :attr:`num_data` does."""
        return self._blocks.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._blocks.temperature = check_positive("temperature", value)

    @property
    def kl_clip(self) -> float | None:
        """The largest ``lr² · dᵀ F̄ d`` of a step; may be set on the way. A smaller ``lr`` shortens no clipped step."""
        return self._kl_clip

    @kl_clip.setter
    def kl_clip(self, value: float | None) -> None:
        self._kl_clip = None if value is None else check_positive("kl_clip", value)

    @property
    def warmup(self) -> bool:
        """Whether training goes by averages that started at the identity."""
        return self._blocks.warmup

    @property
    def fisher(self) -> str:
        """The kind of Fisher that is measured."""
        return self._meter.fisher

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why parameters have no block, by parameter."""
        return self._roster.reasons

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers that have a posterior, by name."""
        return self._blocks.layers

    @property
    def prior_precision(self) -> dict[str, float]:
        """The prior's precision of each layer, to be read; it is set in ``param_groups``."""
        return ReadOnly({name: self._group(name)["prior_precision"] for name in self.layers})

    @property
    def blocks(self) -> Mapping[str, BlockState]:
        """The state of each layer's block."""
        return self._blocks.states

    def sampled_params(self) -> AbstractContextManager[None]:
        """Put a sample of the weights into the model; take the gradient inside. The mean is back afterwards, always.

        Entered several times before a step, gradients add up as in any accumulation over micro-batches; with
        ``num_samples=k`` each context counts ``1/k``, so that ``k`` contexts on one batch average over samples.
        ``zero_grad()`` inside clears this context's gradient only. Before the first statistics are in, the warm-up's
        identity is what is sampled from; without warm-up the first sample is the mean itself.

        Returns:
            The context; entering one inside another raises ``UsageError``.
        """
        if not self._sampler.is_open:
            self._prepare()
        return self._sampler.sample(self._blocks.states.posterior, measure=self.is_measuring)

    def _prepare(self) -> None:
        """Take note of what became of the model; layers that were not measured yet have the warm-up's Gaussian."""
        self._follow_model()
        states = self._blocks.states
        if self.warmup and any(state.posterior is None for state in states.values()):
            with torch.no_grad(), self._full_precision:
                self._blocks.states = self._blocks.with_posterior(states, states)

    @property
    def is_measuring(self) -> bool:
        """Whether forward passes of :meth:`sampled_params` are measured on this step.

        Forward passes whose output is in no loss are measured too: unlabelled data may enter the Fisher by
        ``if optimizer.is_measuring: model(unlabelled)`` inside of the context.
        """
        return bool(self._due(self.statistics_schedule, self._blocks.states))

    def _due(self, schedule: Schedule, states: States) -> set[str]:
        """The layers that are due by a schedule; all of them where there are new ones, which have nothing yet."""
        if self._has_new_layers:
            return set(self.layers)
        return schedule.due(self.steps, states.averages)

    def _measure(self, rows: Mapping[str, Rows]) -> dict[str, Statistics]:
        return self._blocks.measure(rows, self._due(self.statistics_schedule, self._blocks.states))

    def unmeasured(self) -> AbstractContextManager[None]:
        """Let forward passes inside go by unmeasured: the batch of the gradient need not be that of the Fisher.

        Returns:
            The context, for use inside :meth:`sampled_params`.
        """
        return self._sampler.unmeasured()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the posterior by one natural-gradient step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the loss; called inside
                :meth:`sampled_params` once for each of ``num_samples``. Without it, gradients must have been taken
                inside :meth:`sampled_params`.

        Returns:
            What the closure returned, with several samples the mean; or ``None``.

        Raises:
            ArgumentError: If options in ``param_groups`` are out of range by now, the closure is no function or, with
                several samples, returns no number; the state stays as it was.
            UsageError: If no gradient, or no statistics, came from inside :meth:`sampled_params`.
            NonFiniteError: If gradients or statistics hold NaN or infinity, or gradients numbers so large that a step's
                length may overflow (7e12 in float32); the state stays as it was. On an accelerator steps that measure
                no curvature do not wait for the device to say so: they leave the mean and its momentum where they were,
                and the next step that measures raises the error.
        """
        check_outside(self._sampler, "step()")
        if closure is not None and not callable(closure):
            raise ArgumentError(f"closure={closure!r} is not allowed. Allowed: a function that returns the loss.")
        losses = []
        try:
            self._checked_groups(self.param_groups)
            for _ in range(self._sampler.num_samples if closure is not None else 0):
                with self.sampled_params(), torch.enable_grad():
                    losses.append(closure())  # type: ignore[misc]
            if len(losses) > 1:
                check_losses(losses)
            with self._full_precision:
                self._step()
        finally:
            self._sampler.forget()
        return sum(losses) / len(losses) if len(losses) > 1 else next(iter(losses), None)

    def _step(self) -> None:
        check_ready(self._sampler, self.layers, measured=self.is_measuring)
        statistics, gradients = self._sampler.statistics, self._gradients()
        if self._is_parallel:
            statistics = sum_over_processes(self._blocks.with_zeros(statistics)) if self.is_measuring else {}
            # each process has its own noise, and there are no averages of gradients taken under no_sync() yet
            gradients = mean_over_processes(gradients)
            self._point_estimates.share_gradients()
        finite = self._check_finite(statistics, gradients)
        statistics = {name: batch for name, batch in statistics.items() if any(batch.counts.values())}
        states = self._blocks.averaged(self._blocks.states, statistics)
        due = self._due(self.inverse_schedule, states)
        if due:
            states = self._blocks.refreshed(states, due)
        if finite is not None:
            gradients = self._blocks.admitted(states, gradients, finite)
            self._point_estimates.admit(finite)
        states, directions = self._blocks.directions(states, gradients)
        changes = self._changes(states, gradients, directions)
        self._blocks.states = states
        for schedule, names in ((self.statistics_schedule, statistics.keys()), (self.inverse_schedule, due)):
            schedule.done(self.steps, {name: own for name, own in states.averages.items() if name in names})
        self.steps += 1
        moves = dict(pair for name, change in changes.items() for pair in self.layers[name].by_parameter(change))
        if finite is not None:
            torch._foreach_mul_(tuple(moves.values()), finite)
        torch._foreach_add_(tuple(moves), tuple(moves.values()))
        self._point_estimates.step(self._point_estimates.lr_in(self.param_groups), self.temperature / self.num_data)
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    def _check_finite(self, statistics: Mapping[str, Statistics], gradients: Mapping[str, Tensor]) -> Tensor | None:
        """Refuse NaN and infinity; or say on the device whether there is none, where the host would wait for it."""
        deterministic = self._point_estimates.gradients
        if self._watch.is_needed(gradients) and not self.is_measuring:
            return self._watch.take(gradients, deterministic)
        self._watch.report()
        check_finite(statistics, gradients, deterministic)
        return None

    def _gradients(self) -> dict[str, Tensor]:
        """``∇ + γ_in W``: the gradient of the mean objective at the samples, for layers that took part."""
        gradients = {name: layer.gradient() for name, layer in self.layers.items()}
        present = {n: own.to(linalg.algebra_dtype(own.dtype)) for n, own in gradients.items() if own is not None}
        return self._sampler.with_decay(present, {name: self._blocks.intrinsic_damping(name) for name in present})

    def _changes(
        self, states: States, gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a step adds to the mean of each layer."""
        changes = torch._foreach_mul(tuple(directions.values()), [-self._group(name)["lr"] for name in directions])
        self.clip_factor = None if self.kl_clip is None else self._clip(states, directions, self.kl_clip)
        if self.clip_factor is not None:
            torch._foreach_mul_(changes, self.clip_factor)
        return dict(zip(directions, changes, strict=True))

    def _clip(self, states: States, directions: Mapping[str, Tensor], largest: float) -> Tensor:
        """``min(1, sqrt(κ / (lr² Σ dᵀ F̄ d)))``; the sum may come out below zero by rounding."""
        return (largest / self._blocks.squared_length(states, directions).clamp(min=0)).sqrt().clamp(max=1.0)

    def posterior(self) -> Posterior:
        """The posterior: the current mean, and blocks from the current statistics, as a snapshot.

        Returns:
            The posterior.

        Raises:
            UsageError: If called inside :meth:`sampled_params`, or before any statistics were measured.
        """
        check_outside(self._sampler, "posterior()")
        with linalg.leaving_inference_mode(), torch.no_grad(), self._full_precision:
            blocks = self._blocks.posterior(self._blocks.states, self.layers, in_training=False)
        return Posterior(
            self.model,
            self.likelihood,
            blocks,
            layers=self.layers,
            prior_precision=self.prior_precision,
            provenance=Provenance(
                method=self.method,
                structure=self.structure.name,
                damping=self.structure.damping,
                fisher=self.fisher,
                sharing=self.structure.sharing,
                temperature=self.temperature,
                num_data=self.num_data,
            ),
        )

    def kl(self) -> Tensor:
        """``KL(q ‖ prior)`` of the Gaussians that samples are drawn from, plus the likelihood's own, in nats.

        Returns:
            A scalar.

        Raises:
            UsageError: If called inside :meth:`sampled_params`, or where a layer has no Gaussian yet.
        """
        check_outside(self._sampler, "kl()")
        self._prepare()
        for name, state in self._blocks.states.items():
            if state.posterior is None:
                state.measured(name)  # raises: without warm-up there is no Gaussian before it
        means = {name: layer.values() for name, layer in self.layers.items()}
        with self._full_precision:
            return self.likelihood.kl().detach() + self._blocks.states.posterior.kl(means, self.prior_precision)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; outside of :meth:`sampled_params` that begins the step anew.

        Args:
            set_to_none: Whether gradients are ``None`` afterwards, or zero.
        """
        if set_to_none:  # torch's own takes longer than a small network's loss
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            super().zero_grad(set_to_none=False)
        if not self._sampler.is_open:
            self._sampler.forget()

    def summary(self) -> Summary:
        """For each parameter: its block, structure, shape, and why where it has none.

        Returns:
            A table; ``print`` shows it.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1, bias=False))
            >>> print(bk.NoisyKFAC(model, bk.likelihoods.Gaussian(), num_data=10).summary())
            parameter  shape  block  structure          why
            -----------------------------------------------
            0.weight   3×2    0      kron/factored 3×3
            0.bias     3      0      kron/factored 3×3
            2.weight   1×3    2      kron/factored 1×3
        """
        return summarize(self.model, self.layers, self.reasons, self._blocks.describe())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a layer's block is set up with its group.

        Args:
            param_group: The group.

        Raises:
            ArgumentError: Always, once the optimizer is built.
        """
        if hasattr(self, "_sampler"):
            raise ArgumentError("add_param_group() is not supported. Pass groups= when the optimizer is made.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later :meth:`load_state_dict` needs to go on bit for bit, the generator included."""
        state = super().state_dict()
        state[_STATE_KEY] = {
            "made_by": self._made_by,
            "groups": self._groups,
            "steps": self.steps,
            "schedules": [dump_schedule(schedule) for schedule in (self.statistics_schedule, self.inverse_schedule)],
            **self._blocks.states.state_dict(),
            "set_aside": self._blocks.dump_set_aside(self.model),
            "point_estimates": self._point_estimates.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the model's and the likelihood's weights are loaded separately.

        :attr:`num_data` and :attr:`temperature` are no part of it, and stay this optimizer's own.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ArgumentError: If it came from another kind of optimizer, another structure or another model, or has options
                that are out of range, or a generator's state that is of another kind of device; nothing is changed
                then. A schedule of another kind than the saved one begins anew.
            UsageError: If called inside :meth:`sampled_params`.
        """
        check_outside(self._sampler, "load_state_dict()")
        if _STATE_KEY not in state_dict:
            raise ArgumentError("state_dict is not from a noisy natural gradient optimizer of bayes_kfac.")
        own = state_dict[_STATE_KEY]
        check_made_by(own.get("made_by", self._made_by), self._made_by)
        self._follow_model()
        states = States.restored(own, self.layers)
        set_aside = restore_set_aside(own["set_aside"], self.model)
        check_made_by({"groups": own.get("groups", self._groups)}, {"groups": self._groups})
        point_estimates = own["point_estimates"] or {}  # there were none, in checkpoints of before states had names
        self._point_estimates.check(point_estimates)
        groups = with_options(super().state_dict()["param_groups"], state_dict["param_groups"])
        self._checked_groups(groups)
        check_generator_state(self.generator, own["generator"])
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._blocks.states, self._blocks.set_aside = states, set_aside
        self.steps = own["steps"]
        for schedule, saved in zip(
            (self.statistics_schedule, self.inverse_schedule), own.get("schedules", ({}, {})), strict=True
        ):
            load_schedule(schedule, saved)
        self._point_estimates.load_state_dict(point_estimates, self.param_groups)
        if self.generator is not None and own["generator"] is not None:
            self.generator.set_state(own["generator"])
        self._sampler.forget()

    @property
    def _made_by(self) -> dict[str, Any]:
        """What the statistics of a checkpoint mean something to."""
        structure = self.structure
        return {"method": self.method, "structure": structure.name, "sharing": structure.sharing, **structure.options}

    def __getstate__(self) -> dict[str, Any]:
        """Everything, the model included: a copy trains a copy of the model."""
        # torch's own hooks and the wrapper that a learning rate schedule puts around step() stay behind, as in torch
        return {name: value for name, value in self.__dict__.items() if name != "step" and name[:10] != "_optimizer"}

    def _group(self, name: str) -> dict[str, Any]:
        return self.param_groups[self._group_index[name]]

    @property
    def _full_precision(self) -> AbstractContextManager[None]:
        return linalg.full_precision(next(iter(self._roster.trainable.values())).device)

    @property
    def _has_new_layers(self) -> bool:
        return any(state.statistics is None for state in self.blocks.values())

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients a step uses."""
        blocks = [parameter for layer in self.layers.values() for parameter in layer.parameters.values()]
        return blocks + list(self._point_estimates.parameters.values())

    def _take_up(self, layers: Mapping[str, Layer]) -> None:
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._group_index = {name: group_of[layer.like] for name, layer in layers.items()}
        self._groups = layers_by_group(self._group_index, self.param_groups)
        self._blocks.take_up(layers)

    def _follow_model(self) -> None:
        """Take note of what was frozen, unfrozen, replaced or moved since the last step."""
        if self._roster.has_changed():
            layers = self._roster.sort()
            follow_model(self.param_groups, self.model, layers)
            self._point_estimates.take_up(self.reasons, self.param_groups)
            self._take_up(layers)
            self._sampler.watch(layers, self._parameters())
        self._blocks.follow_devices()
        self._point_estimates.follow_model()
