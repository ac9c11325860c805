"""What is trained: the parameters that are not frozen as things stand, sorted into layers and the rest.

A likelihood's own parameters are no part of the model, wherever it is kept; that they change is noticed here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from bayes_kfac.curvature import Layer, find_covered
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.training.checks import check_params


class Roster:
    """The parameters of a model that are trained, which may be frozen, unfrozen and replaced on the way.

    Args:
        model: The model.
        likelihood: The likelihood.
        params: Which of the model's parameters to train; ``None`` for all.
        others: What to do with parameters that no block covers.

    Attributes:
        trainable: The parameters that are trained, by name, as of the last :meth:`sort`.
        reasons: Why parameters have no block, by name.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, params: Iterable[nn.Parameter] | None, others: str
    ) -> None:
        self._model = model
        self._likelihood = likelihood
        self._params = None if params is None else set(check_params(model, params))
        self._others = others
        self.trainable: dict[str, nn.Parameter] = {}
        self.reasons: Mapping[str, str] = {}

    def has_changed(self) -> bool:
        """Whether others are trainable by now than at the last :meth:`sort`, or under other names."""
        return _differ(self._now(), self.trainable) or _differ(self._now_of_likelihood(), self._of_likelihood)

    def sort(self) -> dict[str, Layer]:
        """The layers of what is trainable now, by name."""
        layers, reasons = find_covered(self._model, self._now().values(), self._others)
        self.trainable, self.reasons = self._now(), reasons
        self._of_likelihood = self._now_of_likelihood()
        return layers

    def _now(self) -> dict[str, nn.Parameter]:
        named, chosen, others = self._model.named_parameters(), self._params, set(self._likelihood.parameters())
        return {n: p for n, p in named if p.requires_grad and p not in others and (chosen is None or p in chosen)}

    def _now_of_likelihood(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._likelihood.named_parameters() if p.requires_grad}


def _differ(now: Mapping[str, nn.Parameter], before: Mapping[str, nn.Parameter]) -> bool:
    return now.keys() != before.keys() or any(now[name] is not own for name, own in before.items())
