"""Layers: the parameters of a model, sorted into blocks ``[*blocks, out, in]`` and what no block covers.

A :class:`Layer` is one block: the parameters that it holds, how they look as one matrix whose last column is the bias,
and the modules that use them. Tied weights are one layer with several uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bayes_kfac import linalg
from bayes_kfac.curvature.modules import CompositeAdapter, ModuleAdapter, ParameterAdapter, adapter_for
from bayes_kfac.errors import UsageError


@dataclass(frozen=True)
class Use:
    """One module that uses a block.

    Attributes:
        adapter: How the block looks in it.
        transposed: Whether its matrix is the transpose of the layer's.
        composite: The module's adapter where it uses several blocks, and tells of each itself.
        part: The block's name there.
    """

    adapter: ModuleAdapter
    transposed: bool = False
    composite: CompositeAdapter | None = None
    part: str = ""


@dataclass(frozen=True)
class Layer:
    """One block of a model.

    Attributes:
        name: The module's name in the model, with the block's where it has several; ``"(root)"`` for the model itself.
        adapter: How the parameters look as a block.
        weight_name: The weight's name in ``model.named_parameters()``, or ``None`` where it is not in the block.
        bias_name: The bias's name, or ``None``.
        uses: The modules that use the block.
    """

    name: str
    adapter: ModuleAdapter
    weight_name: str | None
    bias_name: str | None
    uses: tuple[Use, ...]

    @property
    def module(self) -> nn.Module:
        """The module that holds the block's parameters."""
        module: nn.Module = self.adapter.module
        return module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The block's parameters by their names in the model."""
        kinds = {self.weight_name: "weight", self.bias_name: "bias"}
        return {name: self.adapter.parameter(kind) for name, kind in kinds.items() if name is not None}  # type: ignore[misc]

    @property
    def like(self) -> nn.Parameter:
        """One of its parameters, for dtype and device."""
        return next(iter(self.parameters.values()))

    @property
    def template(self) -> Tensor:
        """An empty tensor on the layer's device, in the dtype of its statistics and Gaussians."""
        return self.like.new_empty(0, dtype=linalg.algebra_dtype(self.like.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape ``(*blocks, out, in)``; ``in`` counts the bias's column."""
        return self.adapter.shape

    @property
    def is_tied_to_transpose(self) -> bool:
        """Whether the block is used as it is and transposed."""
        return any(use.transposed for use in self.uses)

    @property
    def sparse_sides(self) -> frozenset[str]:
        """Which sides of the block are diagonal because of sparse inputs: ``"input"``, ``"gradient"``."""
        return frozenset("gradient" if use.transposed else "input" for use in self.uses if use.adapter.sparse)

    @property
    def form(self) -> dict[str, Any]:
        """What beside its shape decides which factors the block has, as ``Structure.identity`` takes it."""
        return {"sparse_sides": self.sparse_sides, "tied": self.is_tied_to_transpose}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors keyed by parameter name (values, gradients, ...) into ``[*blocks, out, in]``."""
        weight, bias = (None if name is None else tensors[name] for name in (self.weight_name, self.bias_name))
        return self.adapter.to_matrix(weight, bias)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Split ``[..., *blocks, out, in]`` into tensors keyed by parameter name; the inverse of :meth:`matrix`."""
        names = (self.weight_name, self.bias_name)
        parts = zip(names, self.adapter.from_matrix(matrix), strict=True)
        return {name: part for name, part in parts if name is not None and part is not None}

    def by_parameter(self, matrix: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters, each with its part of ``[*blocks, out, in]``."""
        tensors = self.tensors(matrix)
        return [(parameter, tensors[name]) for name, parameter in self.parameters.items()]

    def values(self) -> Tensor:
        """A copy of the current weight and bias, ``[*blocks, out, in]``."""
        with torch.no_grad():
            return self.matrix(self.parameters).clone()

    def gradient(self) -> Tensor | None:
        """The current gradients of weight and bias, ``[*blocks, out, in]``, or ``None`` where there is none at all."""
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        if all(gradient is None for gradient in gradients.values()):
            return None
        filled = {
            name: torch.zeros_like(self.parameters[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }
        return self.matrix(filled)


def find_layers(
    model: nn.Module, parameters: Collection[nn.Parameter] | None = None, *, rest: str = "none"
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Sort the trainable parameters of a model into blocks.

    A parameter that the model, or a module with children, holds itself (a class token, a positional embedding) is a
    diagonal block of its own. What modules without an adapter hold is left over.

    Args:
        model: Any module.
        parameters: Which parameters to sort; by default those that are not frozen.
        rest: ``"diagonal"`` to make diagonal blocks of what is left over too.

    Returns:
        The layers by name, and for each parameter that no layer covers the reason why. A frozen parameter
        (``requires_grad=False``) is a constant and appears in neither.

    Raises:
        UsageError: If a lazy module has not seen its first batch.
    """
    check_initialized(model)
    chosen = {p for p in model.parameters() if p.requires_grad} if parameters is None else set(parameters)
    sorting = _Sorting(model, chosen)
    sorting.visit()
    sorting.join()
    if rest == "diagonal":
        for parameter in list(sorting.reasons):
            sorting.add_alone(parameter)
    order = {parameter: position for position, parameter in enumerate(sorting.names)}
    by_name = dict(model.named_parameters())
    layers = sorted(sorting.layers, key=lambda layer: min(order[by_name[name]] for name in layer.parameters))
    reasons = sorted(sorting.reasons.items(), key=lambda entry: order[entry[0]])
    return {layer.name: layer for layer in layers}, {sorting.names[p]: reason for p, reason in reasons}


def check_initialized(model: nn.Module) -> None:
    """Check that lazy modules have their shapes.

    Args:
        model: The model.

    Raises:
        UsageError: If one of them has not; the message names it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            module, _, _ = name.rpartition(".")
            kind = type(model.get_submodule(module)).__name__
            raise UsageError(
                f"Module {module or '(root)'!r} ({kind}) takes its shape from its first batch, which it has not seen "
                "yet. Call the model once on a batch first."
            )


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A use of a weight, a bias or both, before it is known what else uses them."""

    name: str
    module: nn.Module
    make: Any
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    composite: CompositeAdapter | None = None
    part: str = ""

    def adapter(self, *, weight: bool, bias: bool) -> ModuleAdapter:
        made: ModuleAdapter = self.make(self.module, weight=weight, bias=bias)
        return made


@dataclass
class _Sorting:
    """The parameters of a model on their way into layers."""

    model: nn.Module
    chosen: set[nn.Parameter]
    names: dict[nn.Parameter, str] = field(init=False)
    layers: list[Layer] = field(default_factory=list)
    reasons: dict[nn.Parameter, str] = field(default_factory=dict)
    candidates: list[_Candidate] = field(default_factory=list)
    #: Each parameter that a module holds itself, with the module and its own name there.
    alone: dict[nn.Parameter, tuple[nn.Module, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.chosen &= self.names.keys()

    def visit(self) -> None:
        """Find the candidates, the parameters that stand alone, and the reasons of the rest."""
        in_parts: dict[nn.Module, set[nn.Parameter]] = {}
        for prefix, module in self.model.named_modules():
            adapter = adapter_for(module)
            own = {name: p for name, p in module.named_parameters(recurse=False) if p in self.chosen}
            if isinstance(adapter, type) and issubclass(adapter, CompositeAdapter):
                claimed = self._visit_parts(prefix, adapter(module))
                in_parts.update(dict.fromkeys(module.modules(), claimed))
            own = {name: p for name, p in own.items() if p not in in_parts.get(module, ())}
            if not own:
                continue
            reason = _obstacle(module, adapter, own, is_root=module is self.model)
            if reason is None:
                weight, bias = (own.get(name) for name in ("weight", "bias"))
                self.candidates.append(_Candidate(prefix or "(root)", module, adapter, weight, bias))
            for name, parameter in own.items():
                if reason == "":
                    self.alone[parameter] = (module, name)
                elif reason is not None:
                    self.reasons[parameter] = reason

    def _visit_parts(self, prefix: str, composite: CompositeAdapter) -> set[nn.Parameter]:
        """The candidates of a composite module; returns the parameters in them."""
        claimed: set[nn.Parameter] = set()
        for part, make in composite.parts().items():
            found: list[nn.Parameter | None] = []
            names = make(composite.module, weight=True, bias=False).parameter_names
            for name in (*names, "")[:2]:
                parameter = _attribute(composite.module, name)
                found.append(parameter if isinstance(parameter, nn.Parameter) and parameter in self.chosen else None)
            weight, bias = found
            if weight is not None or bias is not None:
                name = f"{prefix}.{part}" if prefix else part
                self.candidates.append(_Candidate(name, composite.module, make, weight, bias, composite, part))
                claimed |= {parameter for parameter in found if parameter is not None}
        return claimed

    def join(self) -> None:
        """Make a layer of each weight with all its uses, its bias included where the two are always used together."""
        using: dict[nn.Parameter, list[_Candidate]] = {}
        for candidate in self.candidates:
            for parameter in (candidate.weight, candidate.bias):
                if parameter is not None:
                    using.setdefault(parameter, []).append(candidate)
        self._leave_out_mixed(using)
        for candidate in self.candidates:
            weight, bias = candidate.weight, candidate.bias
            together = weight in using and bias in using and using[weight] == using[bias]
            if together and weight is not None and len({c.make.transposes for c in using[weight] if not c.part}) > 1:
                together = False
            for parameters in [(weight, bias)] if together else [(weight, None), (None, bias)]:
                self._add(candidate, using, *parameters)
        for parameter in self.alone:
            self.add_alone(parameter)

    def _leave_out_mixed(self, using: dict[nn.Parameter, list[_Candidate]]) -> None:
        """Parameters with a use that no adapter sees, or with uses that do not fit each other, have no block."""
        for parameter in list(using):
            users = using[parameter]
            names = [user.name for user in users]
            if parameter in self.alone or parameter in self.reasons:
                others = [name for name in _holders(self.model, parameter) if name not in names]
                reason = (
                    f"it is tied between {', '.join(names)} and {', '.join(others)}, whose use of it no adapter sees"
                )
                self.alone.pop(parameter, None)
            elif not _fit(parameter, users):
                reason = f"it is tied between {', '.join(names)}, which use it in different ways"
            else:
                continue
            self.reasons[parameter] = reason
            del using[parameter]

    def _add(
        self,
        candidate: _Candidate,
        using: dict[nn.Parameter, list[_Candidate]],
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
    ) -> None:
        """The layer of these two parameters, either of which may be ``None``, unless it is made already."""
        key = weight if weight is not None else bias
        if key is None or key not in using:
            return
        users = using.pop(key)
        if bias is not None:
            using.pop(bias, None)
        has = {"weight": weight is not None, "bias": bias is not None}
        adapters = [user.adapter(**has) for user in users]
        # the layout of the first use that does not look words up, so that an embedding follows its output layer
        main = next((adapter for adapter in adapters if not adapter.sparse), adapters[0])
        uses = tuple(
            Use(adapter, weight is not None and adapter.transposes != main.transposes, user.composite, user.part)
            for user, adapter in zip(users, adapters, strict=True)
        )
        # the same name whether the weight is frozen, tied or refused: a saved posterior finds its block by it
        name = f"{candidate.name}.bias" if weight is None else users[adapters.index(main)].name
        self.layers.append(Layer(name, main, self._name(weight), self._name(bias), uses))

    def add_alone(self, parameter: nn.Parameter) -> None:
        """Make a diagonal block of one parameter."""
        module, name = self.alone.get(parameter) or next(_held(self.model, parameter))
        adapter = ParameterAdapter(module, name)
        self.layers.append(Layer(self.names[parameter], adapter, self.names[parameter], None, (Use(adapter),)))
        self.reasons.pop(parameter, None)

    def _name(self, parameter: nn.Parameter | None) -> str | None:
        return None if parameter is None else self.names[parameter]


def _obstacle(module: nn.Module, adapter: Any, own: Mapping[str, nn.Parameter], *, is_root: bool) -> str | None:
    """Why parameters of a module cannot be one block; ``""`` if each is one by itself, ``None`` if they can."""
    kind = type(module).__name__
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return ""
    if adapter is None:
        is_torchs = type(module).__module__.startswith("torch.")
        is_container = is_root or next(module.children(), None) is not None
        return "" if is_container and not is_torchs else f"{kind} has no adapter"
    if issubclass(adapter, CompositeAdapter):
        return ""
    if extra := set(own) - set(adapter.parameter_names):
        return f"{kind} has parameters {sorted(extra)} beside its weight and bias"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is not a parameter of its own (a parametrization computes it)"
    reason: str | None = adapter.obstacle(module)
    return reason


def _fit(parameter: nn.Parameter, users: list[_Candidate]) -> bool:
    """Whether all uses of a parameter can be uses of one block."""
    is_weight = {parameter is user.weight for user in users}
    if len(is_weight) > 1:
        return False
    has = {"weight": is_weight == {True}, "bias": is_weight == {False}}
    adapters = [user.adapter(**has) for user in users]
    if all(len(adapter.shape) == 2 for adapter in adapters) and parameter.ndim <= 2:
        transposed = [adapter.shape[:: -1 if adapter.transposes and has["weight"] else 1] for adapter in adapters]
        return len(set(transposed)) == 1
    return len({(type(adapter), adapter.shape) for adapter in adapters}) == 1


def _held(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold a parameter, with its name in each."""
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is parameter:
                yield module, name


def _holders(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    prefixes = {module: prefix or "(root)" for prefix, module in model.named_modules()}
    return [prefixes[module] for module, _ in _held(model, parameter)]


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
