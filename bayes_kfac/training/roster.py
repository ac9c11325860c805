"""What is trained: the parameters that are not frozen as things stand, sorted into layers and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from bayes_kfac.curvature import Layer, find_covered
from bayes_kfac.training.checks import check_params


class Roster:
    """The parameters of a model that are trained, which may be frozen, unfrozen and replaced on the way.

    Args:
        model: The model.
        params: Which of its parameters to train; ``None`` for all.
        others: What to do with parameters that no block covers.

    Attributes:
        trainable: The parameters that are trained, by name, as of the last :meth:`sort`.
        reasons: Why parameters have no block, by name.
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter] | None, others: str) -> None:
        self._model = model
        self._params = None if params is None else set(check_params(model, params))
        self._others = others
        self.trainable: dict[str, nn.Parameter] = {}
        self.reasons: Mapping[str, str] = {}

    def has_changed(self) -> bool:
        """Whether others are trainable by now than at the last :meth:`sort`, or under other names."""
        now = self._now()
        return now.keys() != self.trainable.keys() or any(now[name] is not own for name, own in self.trainable.items())

    def sort(self) -> dict[str, Layer]:
        """The layers of what is trainable now, by name."""
        layers, reasons = find_covered(self._model, self._now().values(), self._others)
        self.trainable, self.reasons = self._now(), reasons
        return layers

    def _now(self) -> dict[str, nn.Parameter]:
        named, chosen = self._model.named_parameters(), self._params
        return {name: p for name, p in named if p.requires_grad and (chosen is None or p in chosen)}
