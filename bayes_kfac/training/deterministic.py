"""What has no posterior: the likelihood's own parameters, and the model's outside every block, trained by Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.distributed import mean_over_processes
from bayes_kfac.errors import check_positive
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
        self.likelihood = likelihood
        self.may_grow = may_grow
        self.lr = check_positive("deterministic_lr", lr, allow_zero=True)
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in reasons}
        for name, parameter in likelihood.named_parameters():
            if parameter.requires_grad:
                self.parameters[f"{_PREFIX}{name}"] = parameter
        self._adam = torch.optim.Adam(self.parameters.values(), lr=lr) if self.parameters else None

    @property
    def group(self) -> list[dict[str, Any]]:
        """The parameter group of kind ``"deterministic"``, or nothing."""
        if not self.parameters and not self.may_grow:
            return []
        return [{"params": list(self.parameters.values()), "kind": "deterministic", "lr": self.lr}]

    def take_up(self, model: nn.Module, reasons: Mapping[str, str], param_groups: list[dict[str, Any]]) -> None:
        """Train the model's parameters that are outside of blocks by now, too.

        Args:
            model: The model.
            reasons: Its parameters outside of blocks.
            param_groups: The trainer's groups; the one of kind ``"deterministic"`` is extended.
        """
        named = dict(model.named_parameters())
        new = {name: named[name] for name in reasons if name not in self.parameters}
        if not new:
            return
        self.parameters |= new
        _own(param_groups)["params"] += new.values()
        if self._adam is None:
            self._adam = torch.optim.Adam(self.parameters.values(), lr=self.lr)
        else:
            self._adam.param_groups[0]["params"] += new.values()

    def lr_in(self, param_groups: list[dict[str, Any]]) -> float:
        """The step size as the trainer's groups have it by now, which a schedule may change."""
        lr: float = _own(param_groups)["lr"] if self.parameters else self.lr
        return lr

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients there are, by name."""
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def share_gradients(self) -> None:
        """Average the gradients over processes."""
        for name, gradient in mean_over_processes(self.gradients).items():
            self.parameters[name].grad = gradient

    def follow_model(self) -> None:
        """Drop what gradients frozen parameters still have, and bring Adam's state to where the others went."""
        for parameter in self.parameters.values():
            if not parameter.requires_grad:
                parameter.grad = None
        moments = {} if self._adam is None else self._adam.state
        if any(
            state["exp_avg"].dtype != parameter.dtype or state["exp_avg"].device != parameter.device
            for parameter, state in moments.items()
        ):
            self.load_state_dict(self.state_dict())  # which brings it there

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

    def state_dict(self) -> dict[str, Any] | None:
        """Adam's state."""
        return None if self._adam is None else self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up Adam's state."""
        if self._adam is not None and state is not None:
            self._adam.load_state_dict(state)


def _own(param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    return next(group for group in param_groups if group["kind"] == "deterministic")
