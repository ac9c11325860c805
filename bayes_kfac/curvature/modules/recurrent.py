"""Recurrence: ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells, with time steps as independent uses of the weights.

For each layer and direction there are the blocks ``ih`` and ``hh`` (and ``hr`` of an LSTM with projections). Torch's
kernels show no pre-activations, so that while a module is watched the recurrence is written out in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayes_kfac.curvature.modules.base import CompositeAdapter, Record, register
from bayes_kfac.curvature.modules.product import product, recorded_linear
from bayes_kfac.errors import UnsupportedModelError

#: The state of a recurrence: ``h``, or ``h`` and ``c``, each ``[batch, hidden]``.
State = tuple[Tensor, ...]


def _tanh(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).tanh(),)


def _relu(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).relu(),)


def _lstm(from_input: Tensor, from_state: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_state).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_state: Tensor, state: State) -> State:
    r_input, z_input, n_input = from_input.chunk(3, dim=-1)
    r_state, z_state, n_state = from_state.chunk(3, dim=-1)
    reset, update = (r_input + r_state).sigmoid(), (z_input + z_state).sigmoid()
    new = (n_input + reset * n_state).tanh()
    return (new + update * (state[0] - new),)


def _gates(module: Any) -> Callable[[Tensor, Tensor, State], State]:
    """How a module's kind makes the next state from the two products and the last state."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _gru
    return _relu if module.nonlinearity == "relu" else _tanh


@register(nn.RNN)
@register(nn.LSTM)
@register(nn.GRU)
class RecurrentAdapter(CompositeAdapter):
    """Recurrent networks of any number of layers, in one or both directions, on padded tensors."""

    def parts(self) -> dict[str, Any]:  # noqa: D102
        kinds = ["ih", "hh"] + ["hr"] * bool(getattr(self.module, "proj_size", 0))
        return {
            f"{kind}_{suffix}": product(
                f"weight_{kind}_{suffix}",
                f"bias_{kind}_{suffix}",
                runs_backwards=suffix.endswith("reverse") and kind != "ih",
            )
            for layer in range(self.module.num_layers)
            for suffix in self._suffixes(layer)
            for kind in kinds
        }

    def forward(self, record: Record, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:  # noqa: A002, D102
        module = self.module
        if not isinstance(input, Tensor):
            raise UnsupportedModelError(
                f"{type(module).__name__} was called on a {type(input).__name__}, whose time steps no curvature block "
                "can be read from. Pass the padded tensor, and the mask of its valid steps to the likelihood."
            )
        is_batched = input.ndim == 3
        sequence = input if is_batched else input.unsqueeze(1)
        if is_batched and module.batch_first:
            sequence = sequence.transpose(0, 1)
        states = self._initial(sequence, hx, is_batched)
        final: list[State] = []
        for layer in range(module.num_layers):
            directions = []
            for suffix in self._suffixes(layer):
                outputs, state = self._run(record, suffix, sequence, states[len(final)])
                directions.append(outputs)
                final.append(state)
            sequence = torch.cat(directions, dim=-1)
            if module.dropout and layer < module.num_layers - 1:
                sequence = functional.dropout(sequence, module.dropout, module.training)
        last = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
        if not is_batched:
            sequence, last = sequence.squeeze(1), tuple(part.squeeze(1) for part in last)
        elif module.batch_first:
            sequence = sequence.transpose(0, 1)
        return sequence, last if isinstance(module, nn.LSTM) else last[0]

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"][: 1 + self.module.bidirectional]

    def _initial(self, sequence: Tensor, hx: Any, is_batched: bool) -> list[State]:
        """The first state of each layer and direction."""
        module = self.module
        is_lstm = isinstance(module, nn.LSTM)
        count, batch = module.num_layers * (1 + module.bidirectional), sequence.shape[1]
        if hx is None:
            widths = [getattr(module, "proj_size", 0) or module.hidden_size] + [module.hidden_size] * is_lstm
            parts = [sequence.new_zeros(count, batch, width) for width in widths]
        else:
            given = hx if is_lstm else (hx,)
            parts = [part if is_batched else part.unsqueeze(1) for part in given]
        return list(zip(*parts, strict=True))

    def _run(self, record: Record, suffix: str, sequence: Tensor, state: State) -> tuple[Tensor, State]:
        """One layer in one direction: all outputs ``[time, batch, hidden]`` and the last state."""
        module, gates = self.module, _gates(self.module)

        def linear(kind: str, inputs: Tensor) -> Tensor:
            weight, bias = getattr(module, f"weight_{kind}_{suffix}"), getattr(module, f"bias_{kind}_{suffix}", None)
            return recorded_linear(record, f"{kind}_{suffix}", inputs, weight, bias)

        from_inputs = linear("ih", sequence).unbind()  # indexing would put a gradient of all steps behind each of them
        steps = range(len(sequence))
        outputs: dict[int, Tensor] = {}
        for step in reversed(steps) if suffix.endswith("reverse") else steps:
            from_state = linear("hh", state[0].unsqueeze(0)).squeeze(0)
            state = gates(from_inputs[step], from_state, state)
            if getattr(module, "proj_size", 0):
                state = (linear("hr", state[0].unsqueeze(0)).squeeze(0), *state[1:])
            outputs[step] = state[0]
        return torch.stack([outputs[step] for step in steps]), state


@register(nn.RNNCell)
@register(nn.LSTMCell)
@register(nn.GRUCell)
class CellAdapter(CompositeAdapter):
    """One step of a recurrence."""

    def parts(self) -> dict[str, Any]:  # noqa: D102
        return {kind: product(f"weight_{kind}", f"bias_{kind}") for kind in ("ih", "hh")}

    def forward(self, record: Record, input: Tensor, hx: Any = None) -> Any:  # noqa: A002, D102
        module, is_lstm = self.module, isinstance(self.module, nn.LSTMCell)
        is_batched = input.ndim == 2
        inputs = input if is_batched else input.unsqueeze(0)
        if hx is None:
            state = (inputs.new_zeros(len(inputs), module.hidden_size),) * (1 + is_lstm)
        else:
            state = tuple(part if is_batched else part.unsqueeze(0) for part in (hx if is_lstm else (hx,)))

        def linear(kind: str, value: Tensor) -> Tensor:
            weight, bias = getattr(module, f"weight_{kind}"), getattr(module, f"bias_{kind}")
            return recorded_linear(record, kind, value.unsqueeze(0), weight, bias).squeeze(0)

        state = _gates(module)(linear("ih", inputs), linear("hh", state[0]), state)
        if not is_batched:
            state = tuple(part.squeeze(0) for part in state)
        return state if is_lstm else state[0]
