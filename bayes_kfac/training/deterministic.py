"""What has no posterior: the likelihood's own parameters, and the model's outside every block, trained by Adam."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.distributed import mean_over_processes
from bayes_kfac.errors import ArgumentError, UsageError, check_positive
from bayes_kfac.likelihoods import Likelihood

_PREFIX = "likelihood."


class PointEstimates:
    """Parameters that are trained as point estimates; there may be none.

    Args:
        model: The model.
        likelihood: The likelihood.
        reasons: The model's parameters outside of blocks.
        lr: Adam's step size.
        may_grow: Whether parameters may join later.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, reasons: Mapping[str, str], lr: float, *, may_grow: bool
    ) -> None:
        self.model = model
        self.likelihood = likelihood
        self.may_grow = may_grow
        self.lr = check_positive("deterministic_lr", lr, allow_zero=True)
        self.parameters: dict[str, nn.Parameter] = {}
        self._adam: torch.optim.Adam | None = None
        self._train(reasons)

    @property
    def group(self) -> list[dict[str, Any]]:
        """The parameter group of kind ``"deterministic"``, or nothing."""
        if not (self.parameters or self.may_grow or any(True for _ in self.likelihood.parameters())):
            return []
        return [{"params": list(self.parameters.values()), "kind": "deterministic", "lr": self.lr}]

    def take_up(self, names: Collection[str], param_groups: list[dict[str, Any]]) -> None:
        """Train parameters of the model or the likelihood, and those of before that are still there.

        Args:
            names: Their names.
            param_groups: The trainer's groups; the one of kind ``"deterministic"`` holds them then.

        Raises:
            UsageError: If there is none, as there was nothing that could be trained so when the trainer was made.
        """
        known = set(self.parameters.values())
        self._train({*names, *(name for name, parameter in self._named().items() if parameter in known)})
        group = next((group for group in param_groups if group["kind"] == "deterministic"), None)
        if group is not None:
            group["params"] = list(self.parameters.values())
        elif self.parameters:
            raise UsageError(
                f"The likelihood has {', '.join(self.parameters)} to train, and had none when the optimizer was made. "
                "Make a new optimizer."
            )

    def _train(self, names: Collection[str]) -> None:
        """Train the parameters of these names, and the likelihood's; those of before keep their moments."""
        moments, own = self._moments, {p for p in self.likelihood.parameters() if p.requires_grad}
        self.parameters = {name: p for name, p in self._named().items() if name in names or p in own}
        self._adam = torch.optim.Adam(self.parameters.values(), lr=self.lr) if self.parameters else None
        self._moments.update((p, moments[p]) for p in self.parameters.values() if p in moments)

    @property
    def _moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """Adam's state, by parameter."""
        return {} if self._adam is None else self._adam.state

    def _named(self) -> dict[str, nn.Parameter]:
        of_likelihood = {f"{_PREFIX}{name}": parameter for name, parameter in self.likelihood.named_parameters()}
        others = set(of_likelihood.values())  # which the model may hold too
        return {name: p for name, p in self.model.named_parameters() if p not in others} | of_likelihood

    def lr_in(self, param_groups: list[dict[str, Any]]) -> float:
        """The step size as the trainer's groups have it by now, which a schedule may change."""
        return next((group["lr"] for group in param_groups if group["kind"] == "deterministic"), self.lr)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients there are, by name."""
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def share_gradients(self) -> None:
        """Average the gradients over processes."""
        for name, gradient in mean_over_processes(self.gradients).items():
            self.parameters[name].grad = gradient

    def admit(self, finite: Tensor) -> None:
        """Take gradients for zeros unless ``finite``."""
        for name, gradient in self.gradients.items():
            self.parameters[name].grad = torch.where(finite, gradient, torch.zeros_like(gradient))

    def follow_model(self) -> None:
        """Drop what gradients frozen parameters still have, and bring Adam's state to where the others went."""
        for parameter in self.parameters.values():
            if not parameter.requires_grad:
                parameter.grad = None
            own = self._moments.get(parameter)
            if own and (own["exp_avg"].dtype != parameter.dtype or own["exp_avg"].device != parameter.device):
                self._moments[parameter] = _like(own, parameter)

    def step(self, lr: float, kl_weight: float) -> None:
        """One step of Adam on the loss plus the likelihood's own KL.

        Args:
            lr: The step size.
            kl_weight: The weight of the KL in the mean loss of an example, ``temperature / num_data``.
        """
        if self._adam is None:
            return
        with torch.enable_grad():
            divergence = self.likelihood.kl() * kl_weight
        if divergence.requires_grad:
            parameters = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
            for parameter, pull in zip(
                parameters, torch.autograd.grad(divergence, parameters, allow_unused=True), strict=True
            ):
                if pull is not None:
                    parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam's state of each parameter, by name; empty where it was in no step yet."""
        return {name: dict(self._moments.get(parameter, {})) for name, parameter in self.parameters.items()}

    def check(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Check that a :meth:`state_dict` is of these parameters; frozen ones may be in it or not.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ArgumentError: If names or shapes differ.
        """
        named = self._named()
        trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
        if not trained <= state.keys() <= trained | frozen:
            raise ArgumentError(
                f"state_dict has point estimates of {sorted(state)} but this optimizer trains {sorted(trained)}. Load "
                "it into an optimizer of the same model and likelihood, frozen as they were."
            )
        for name, own in state.items():
            if own and own["exp_avg"].shape != named[name].shape:
                raise ArgumentError(
                    f"state_dict has a point estimate of shape {tuple(own['exp_avg'].shape)} for {name!r}, whose shape "
                    f"is {tuple(named[name].shape)}. Load it into an optimizer of the same model."
                )

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], param_groups: list[dict[str, Any]]) -> None:
        """Go on from a state that passed :meth:`check`.

        Args:
            state: What :meth:`state_dict` returned.
            param_groups: The trainer's groups; frozen parameters join theirs with their state.
        """
        self.take_up(state.keys(), param_groups)
        for name, parameter in self.parameters.items():
            self._moments.pop(parameter, None)
            if own := state.get(name):
                self._moments[parameter] = _like(own, parameter)


def _like(own: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """A copy of Adam's state where a parameter is, in its dtype; of the count of steps as it is."""
    return {key: value.clone() if key == "step" else value.to(parameter, copy=True) for key, value in own.items()}
