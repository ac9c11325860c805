"""What each kind of module supports: every cell of the table in ``docs/modules.md`` is the outcome of a check run here.

A check either holds, and returns what the cell says, or fails. The routes are independent of the adapters: gradients of
one example at a time by autograd; a module's input rows from what it puts out for weights that are zero but for a 1;
recurrence and attention written out with weights of their own for each time step.

``python -m tests.test_support`` runs the checks and writes the table into the page.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Layer, Recorder, Rows, Statistics, find_layers, kronecker_factors
from bayes_kfac.errors import UnsupportedModelError
from tests.helpers import block_fishers, rng, seeded, unit_gradients

PAGE = Path(__file__).resolve().parent.parent / "docs" / "modules.md"
COMMAND = "python -m tests.test_support"
BEGIN, END = f"<!-- table written by {COMMAND} -->", "<!-- end of table -->"
HEADER = ("module", "block", "structure", "exact", "expand", "reduce", "tied", "AMP", "compile")

#: How far statistics under bfloat16 autocast may be from those in float32, relative to their norm.
AMP_TOLERANCE = 0.03
EXAMPLES, OUTPUTS = 3, 2


# What the kinds are


@dataclass(frozen=True)
class Case:
    """One module of a kind.

    Attributes:
        make: Makes it.
        shape: The shape of one example that uses the weights several times, where the kind can.
        sizes: The sizes in the formula of its blocks.
        once: The shape of one example that uses them once.
        words: Where inputs are indices, how many there are.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sizes: dict[str, int]
    once: tuple[int, ...] = ()
    words: int = 0


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        title: What the row is about.
        blocks: The formula of each block's shape, by the block's name in the module.
        cases: Modules of this kind; all of them must have the same outcomes.
        call: Calls the module.
        matrix: A weight of the module as ``[*blocks, out, in]``.
        rows: An output of the module as ``[*blocks, batch, positions, out]``.
        by_hand: The rows of each layer; by default :func:`rows_of_calls`.
        others: What is asked for parameters that no block covers.
        instead: Checks other than those of :data:`CHECKS`, by column.
    """

    title: str
    blocks: dict[str, str]
    cases: tuple[Case, ...]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    matrix: Callable[[nn.Module, Tensor], Tensor] = lambda module, weight: weight.flatten(1)
    rows: Callable[[nn.Module, Tensor], Tensor] = lambda module, y: y.reshape(len(y), -1, y.shape[-1])
    by_hand: Callable[[Kind, Net, Tensor], dict[str, tuple[Tensor, Tensor]]] | None = None
    others: str = "error"
    instead: dict[str, Callable[[Kind, Case], str]] = field(default_factory=dict)


class Net(nn.Module):
    """A module of some kind, or two of them, and a linear head on all that comes out."""

    def __init__(self, kind: Kind, x: Tensor, module: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.kind, self.module, self.second = kind, module, second
        with torch.no_grad():
            self.head = nn.Linear(kind.call(module, x).flatten(1).shape[1], OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.kind.call(self.module, x)
        if self.second is not None:
            hidden = hidden + 2 * self.kind.call(self.second, x.flip(-1))
        return self.head(hidden.flatten(1).tanh())


class Gain(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.exp()


class Positions(Gain):
    """The same parameter held by a module that has children, as class tokens and positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2, whose weight is ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class ShiftedRMSNorm(nn.Module):
    """The normalisation of Hugging Face's Gemma, whose weight of zero is a gain of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * functional.rms_norm(x, (4,))


class LayerNorm2d(nn.LayerNorm):
    """The normalisation of channels of torchvision and timm, with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ScaledWordEmbedding(nn.Embedding):
    """The words of Hugging Face's BART and Gemma."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) * 2.5


class LoRA(nn.Module):
    """A frozen linear layer with a trainable product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def by_channel(module: nn.Module, y: Tensor) -> Tensor:
    """``[batch, channels, *positions]`` to ``[(groups,) batch, positions, channels of a group]``."""
    groups = [part.flatten(2).mT for part in y.chunk(module.groups, dim=1)]
    return groups[0] if len(groups) == 1 else torch.stack(groups)


def kernel_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    parts = weight.chunk(module.groups)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        parts = [part.transpose(0, 1) for part in parts]
    matrices = [part.flatten(1) for part in parts]
    return matrices[0] if len(matrices) == 1 else torch.stack(matrices)


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def over_time(cell: nn.Module, x: Tensor) -> Tensor:
    """A cell's outputs, one step after another."""
    outputs, state = [], None
    for step in x.unbind(1):
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, dim=1)


# The documented quantities, by other routes


def rows_of_calls(kind: Kind, net: Net, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of modules that are linear in their weights.

    The gradient rows are autograd's at the module's output. Element ``i`` of an input row is the first output where the
    weights are zero but for a 1 in row 0 and column ``i`` of the block.
    """
    result = {}
    for name, layer in layers_of(net).items():
        module, seen = net.get_submodule(name), []
        handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
        output = net(x)
        handle.remove()
        ((inputs, y),) = seen
        gradients = [torch.autograd.grad(output[:, c].sum(), y, retain_graph=True)[0] for c in range(OUTPUTS)]
        columns = []
        for i in range(layer.shape[-1]):
            place = torch.zeros(layer.shape, dtype=torch.float64)
            place[..., 0, i] = 1
            y = functional_call(module, as_parameters(kind, layer, place), inputs.detach())
            columns.append(kind.rows(module, y)[..., 0])
        result[name] = torch.stack(columns, -1).detach(), torch.stack([kind.rows(module, g) for g in gradients])
    return result


def as_matrix(kind: Kind, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    """Tensors by parameter name as the layer's block, the bias as the last column."""
    weight = kind.matrix(layer.module, tensors[layer.weight_name])
    if layer.bias_name is None:
        return weight
    return torch.cat([weight, tensors[layer.bias_name].reshape(*weight.shape[:-1], 1)], dim=-1)


def as_parameters(kind: Kind, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
    """A block as the module's own parameters: where each of them is in the block tells where it comes from."""
    positions, start = {}, 0
    for name, parameter in layer.parameters.items():
        positions[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    flat = torch.zeros(start, dtype=matrix.dtype)
    flat[as_matrix(kind, layer, positions).flatten()] = matrix.flatten()
    return {name.rpartition(".")[2]: flat[position] for name, position in positions.items()}


CELLS = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}


def untied_recurrence(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Torch's cells, with weights ``[time, ...]``."""
    kind = CELLS.get(type(module))
    cell = module if kind is None else kind(module.input_size, module.hidden_size).double()
    outputs, state = [], None
    for t, step in enumerate(x.unbind(1)):
        own = {name.removesuffix("_l0"): weight[t] for name, weight in weights.items()}
        state = functional_call(cell, own, (step, state))
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, dim=1)


def untied_attention(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Self-attention with projections of its own for each token."""
    joint = torch.einsum("toi,nti->nto", weights["in_proj_weight"], x) + weights["in_proj_bias"]
    q, k, v = joint.unflatten(-1, (3, module.num_heads, -1)).movedim((2, 3), (0, 2))
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return torch.einsum("toi,nti->nto", weights["out_proj.weight"], attended) + weights["out_proj.bias"]


def rows_of_untied(forward: Callable) -> Callable[[Kind, Net, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Rows from gradients of weights of their own for each time step: ``J_t = g_t a_tᵀ``, and ``g_t`` the bias's."""

    def by_hand(kind: Kind, net: Net, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        steps = x.shape[1]
        weights = {
            name: parameter.detach().expand(steps, *parameter.shape).clone().requires_grad_()
            for name, parameter in net.module.named_parameters()
        }
        found: dict[str, list[Tensor]] = {name: [] for name in weights}
        for n in range(len(x)):
            output = net.head(forward(net.module, weights, x[n : n + 1]).flatten(1).tanh())[0]
            for c in range(OUTPUTS):
                gradients = torch.autograd.grad(output[c], weights.values(), retain_graph=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    found[name].append(gradient)
        result = {}
        for name, layer in layers_of(net).items():
            J, g = (
                torch.stack(found[key.removeprefix("module.")]).unflatten(0, (len(x), OUTPUTS)).transpose(0, 1)
                for key in (layer.weight_name, layer.bias_name)
            )
            a = torch.einsum("cnto,cntoi->nti", g, J) / g.square().sum((0, -1)).unsqueeze(-1)
            result[name] = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1), g
        return result

    return by_hand


def jacobians(kind: Kind, net: Net, x: Tensor) -> dict[str, Tensor]:
    """Each example's gradients of each output, one backward pass each, ``[batch, outputs, *blocks, out, in]``."""
    layers = layers_of(net)
    parameters = {name: p for layer in layers.values() for name, p in layer.parameters.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for n in range(len(x)):
        output = net(x[n : n + 1])[0]
        for c in range(OUTPUTS):
            gradients = torch.autograd.grad(output[c], parameters.values(), retain_graph=True)
            by_name = dict(zip(parameters, gradients, strict=True))
            for name, layer in layers.items():
                found[name].append(as_matrix(kind, layer, by_name))
    return {name: torch.stack(parts).unflatten(0, (len(x), OUTPUTS)) for name, parts in found.items()}


def fisher(jacobian: Tensor) -> Tensor:
    """The mean over examples of ``Σ_c vec(J_c) vec(J_c)ᵀ``, ``[*blocks, out·in, out·in]``."""
    flat = jacobian.flatten(-2)
    return torch.einsum("nc...i,nc...j->...ij", flat, flat) / len(jacobian)


# What the library measures


def build(
    kind: Kind, case: Case, *, once: bool = False, examples: int = EXAMPLES, uses: str = "one"
) -> tuple[Net, Tensor]:
    """A network around a module of this kind, in float64, and its inputs."""
    shape = (examples, *(case.once if once and case.once else case.shape))
    if case.words:
        x = torch.randint(case.words, shape, generator=rng(1))
    else:
        x = torch.randn(shape, generator=rng(1), dtype=torch.float64)
    module = case.make().double()
    second = {"one": None, "twice": module, "tied": tied_copy(module)}[uses]
    net = seeded(Net(kind, x, module, second))
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2, generator=rng(2))
    return net.train(not is_batch_norm(module)), x


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def tied_copy(module: nn.Module) -> nn.Module:
    """Another module with the same parameters."""
    other = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        path, _, own = name.rpartition(".")
        setattr(other.get_submodule(path), own, parameter)
    return other


def layers_of(net: Net) -> dict[str, Layer]:
    """The layers of the kind's module; the head is left out."""
    asked = net.kind.others if isinstance(net, Net) else "error"
    layers = find_layers(net, rest="diagonal" if asked == "diagonal" else "none")[0]
    return {name: layer for name, layer in layers.items() if name != "head"}


def record(net: Net, x: Tensor) -> dict[str, Rows]:
    recorder = Recorder(layers_of(net))
    recorder.attach()
    output = net(x)
    rows = recorder.rows(output, unit_gradients(output))
    recorder.detach()
    return rows


def measure(net: Net, x: Tensor, sharing: str) -> dict[str, Statistics]:
    """The statistics that noisy K-FAC takes of the module."""
    kron = structures.get("kron", damping="factored", sharing=sharing)
    return {name: kron.for_layer(layers_of(net)[name]).measure(rows) for name, rows in record(net, x).items()}


def structure_of(layer: Layer) -> str:
    """The structure of a layer's block, in words."""
    own = layer.adapter.structure or "Kronecker"
    return f"{own}, diagonal input factor" if layer.sparse_sides else own


# The checks


def evaluate(formula: str, sizes: dict[str, int]) -> int:
    return eval(re.sub(r"\bin\b", "in_", formula).replace("·", "*").replace("/", "//"), {}, sizes)


def described(kind: Kind, case: Case) -> tuple[str, str]:
    """The blocks' shapes, as formulas that hold, and their structures."""
    net, _ = build(kind, case)
    layers = {name.removeprefix("module").removeprefix("."): layer for name, layer in layers_of(net).items()}
    if not kind.blocks:
        assert not layers
        return "–", "–"
    for name, formula in kind.blocks.items():
        found = [layer for own, layer in layers.items() if own == name or own.startswith(f"{name}_l")]
        sides = [evaluate(side, case.sizes) for side in formula.split(" × ")]
        assert [list(layer.shape) for layer in found] == [sides], f"{kind.title} {name}: {found} is not {sides}"
    assert len(layers) == len(kind.blocks)
    (structure,) = {structure_of(layer) for layer in layers.values()}
    single = "" in kind.blocks or "gain" in kind.blocks
    formulas = (formula if single else f"{name}: {formula}" for name, formula in kind.blocks.items())
    return "; ".join(formulas), structure


def exact(kind: Kind, case: Case) -> str:
    """Rows are Jacobians; the block is the Fisher's, of one example and one use where it is a Kronecker product."""
    net, x = build(kind, case)
    check_jacobians(kind, net, x)
    outcomes = {exact_block(kind, case, name, layer) for name, layer in layers_of(net).items()}
    (outcome,) = outcomes
    if is_batch_norm(net.module):
        check_coupling(net.train(), x)
        outcome += " in eval(); training couples examples"
    return outcome


def check_jacobians(kind: Kind, net: Net, x: Tensor) -> None:
    rows, expected = record(net, x), jacobians(kind, net, x)
    assert set(rows) == set(expected)
    for name, jacobian in expected.items():
        a, g = rows[name].inputs, rows[name].gradients
        a = a if isinstance(a, Tensor) else a.dense()
        assert_close(torch.einsum("c...nto,...nti->nc...oi", g, a), jacobian)


def exact_block(kind: Kind, case: Case, name: str, layer: Layer) -> str:
    if layer.adapter.structure is None:
        net, x = build(kind, case, once=True, examples=1)
        assert record(net, x)[name].inputs.shape[-2] == 1
    else:
        net, x = build(kind, case)
    statistics = measure(net, x, "expand")[name]
    expected = fisher(jacobians(kind, net, x)[name])
    if layer.adapter.structure == "diagonal":
        assert_close(statistics.mean("fisher").flatten(-2), expected.diagonal(dim1=-2, dim2=-1))
        return "diagonal"
    if layer.adapter.structure == "dense":
        assert_close(statistics.mean("fisher").flatten(-3, -2), expected)
        return f"yes, unit-wise {expected.shape[-1]}×{expected.shape[-1]}"
    A, G = statistics.mean("input"), statistics.mean("gradient")
    A = torch.diag_embed(A.squeeze(-2)) if layer.sparse_sides else A
    assert_close(torch.einsum("...op,...ij->...oipj", G, A).flatten(-4, -3).flatten(-2), expected)
    return "yes, one block per group" if expected.ndim > 2 else "yes"


def check_coupling(net: Net, x: Tensor) -> None:
    """In training, batch normalisation makes an example's output depend on another's input; sums stay right."""
    rows, output = record(net, x), net(x)
    for name, layer in layers_of(net).items():
        gradients = torch.autograd.grad(output[:, 0].sum(), layer.parameters.values())
        expected = as_matrix(net.kind, layer, dict(zip(layer.parameters, gradients, strict=True)))
        assert_close(rows[name].total(0), expected)
    moved = x.clone()
    moved[1:] += 1
    assert not torch.allclose(net(moved)[0], output[0])


def sharing(kind: Kind, case: Case, how: str) -> str:
    """The sums that are documented, of rows that were found by hand."""
    net, x = build(kind, case)
    measured, layers = measure(net, x, how), layers_of(net)
    own = [layer.adapter.structure for layer in layers.values()]
    if all(own):  # the Fisher itself, or its diagonal
        for name, jacobian in jacobians(kind, net, x).items():
            expected = fisher(jacobian)
            fishers = measured[name].mean("fisher")
            if layers[name].adapter.structure == "diagonal":
                assert_close(fishers.flatten(-2), expected.diagonal(dim1=-2, dim2=-1))
            else:
                assert_close(fishers.flatten(-3, -2), expected)
        return "plays no part"
    for name, (all_a, all_g) in (kind.by_hand or rows_of_calls)(kind, net, x).items():
        a, g = (all_a, all_g) if how == "expand" else (all_a.mean(-2, keepdim=True), all_g.sum(-2, keepdim=True))
        examples, positions = a.shape[-3:-1]
        A = torch.einsum("...nti,...ntj->...ij", a, a) / (examples * positions)
        G = torch.einsum("c...nto,c...ntp->...op", g, g) / examples
        A = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) if layers[name].sparse_sides else A
        assert_close(measured[name].mean("input"), A)
        assert_close(measured[name].mean("gradient"), G)
    assert set(measured) == set(layers)
    return "yes"


def tied(kind: Kind, case: Case) -> str:
    """Two modules that share their weights have one block, whose statistics are those of one module called twice."""
    (twice, x), (two, _) = build(kind, case, uses="twice"), build(kind, case, uses="tied")
    assert_close(two(x), twice(x))
    assert set(layers_of(two)) == set(layers_of(twice))
    check_jacobians(kind, two, x)
    for how in ("expand", "reduce"):
        actual, expected = measure(two, x, how), measure(twice, x, how)
        assert set(actual) == set(expected) == set(layers_of(two))
        for name, statistics in expected.items():
            assert dict(actual[name].counts) == dict(statistics.counts)
            for key, value in statistics.sums.items():
                assert torch.linalg.vector_norm(value) > 0
                assert_close(actual[name].sums[key], value)
    return "one block"


def train(net: Net, x: Tensor, *, steps: int, autocast: bool = False, backend: Callable | None = None) -> bk.NoisyKFAC:
    """Steps of noisy K-FAC in float32, with the same noise in every call."""
    net.float().train()
    y = torch.randn(len(x), OUTPUTS, generator=rng(3))
    x = x.float() if x.is_floating_point() else x
    likelihood = bk.likelihoods.Gaussian(1.0)
    schedule = {"statistics_every": 2, "inverse_every": 2}
    options = {"num_data": 100, "fisher": "exact", "others": net.kind.others, "generator": rng(4)}
    optimizer = bk.NoisyKFAC(net, likelihood, **schedule, **options)
    model = net if backend is None else torch.compile(net, backend=backend)
    for _ in range(steps):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = likelihood(model(x), y)
            loss.backward()
        optimizer.step()
    return optimizer


def amp(kind: Kind, case: Case) -> str:
    """A step under autocast: everything finite, statistics in float32 and near those without autocast."""
    (net, x), (other, _) = build(kind, case), build(kind, case)
    mixed, single = train(net, x, steps=1, autocast=True), train(other, x, steps=1)
    for name in single.blocks:
        actual, expected = mixed.blocks[name].statistics, single.blocks[name].statistics
        for key, value in expected.sums.items():
            assert actual.sums[key].dtype == torch.float32
            error = torch.linalg.vector_norm(actual.sums[key] - value) / torch.linalg.vector_norm(value)
            assert error < AMP_TOLERANCE, f"{kind.title}: {name}'s {key} is off by {float(error):.3f}"
    for parameter in net.parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all()
    return "yes"


def compiled(kind: Kind, case: Case) -> str:
    """Steps of a compiled model equal the plain ones: three that are measured and one that runs the compiled graph."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        """The backend ``"eager"``, which tells that it was used."""
        graphs.append(graph)
        return graph.forward

    (net, x), (other, _) = build(kind, case), build(kind, case)
    before = [parameter.clone() for parameter in net.float().parameters()]
    with warnings.catch_warnings():  # dynamo itself asks for it since torch 2.15
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        optimizer = train(net, x, steps=4, backend=eager)
    plain = train(other, x, steps=4)
    assert [plain.statistics_schedule.is_due(step) for step in range(4)] == [True, True, True, False]
    for parameter, expected, old in zip(net.parameters(), other.parameters(), before, strict=True):
        assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
        assert parameter.requires_grad == (not torch.equal(parameter, old))
    for name, state in plain.blocks.items():
        for key, value in state.statistics.sums.items():
            assert_close(optimizer.blocks[name].statistics.sums[key], value, rtol=1e-5, atol=1e-6)
    if not graphs:  # nor does torch, before 2.15, compile a bare recurrence
        torch.compile(net, backend=eager)(x.float())
        assert not graphs
    return "yes"


CHECKS: dict[str, Callable[[Kind, Case], str]] = {
    "exact": exact,
    "expand": lambda kind, case: sharing(kind, case, "expand"),
    "reduce": lambda kind, case: sharing(kind, case, "reduce"),
    "tied": tied,
    "AMP": amp,
    "compile": compiled,
}


def refused(kind: Kind, case: Case) -> str:
    """The optimizer is not made; the message names the parameter and what to do."""
    net, x = build(kind, case)
    with pytest.raises(UnsupportedModelError, match=r"module\.gain: Gain has no adapter\n.*others='diagonal'"):
        train(net, x, steps=1)
    return "refused"


def no_block(kind: Kind, case: Case) -> str:
    """The parameter is in no layer, with one use or two, and Adam's first step moves it by its step size."""
    for uses in ("one", "tied"):
        net, x = build(kind, case, uses=uses)
        assert layers_of(net) == {}
        assert find_layers(net)[1] == {"module.gain": "Gain has no adapter"}
        before = net.module.gain.detach().clone().float()
        optimizer = train(net, x, steps=1)
        assert set(optimizer.layers) == {"head"}
        assert_close((net.module.gain - before).abs(), torch.full_like(before, 1e-2), rtol=1e-3, atol=0)
    return "no block"


# The rows of the table


def linear(title: str, module: nn.Module, **options) -> Kind:
    return Kind(title, {"": "out × (in + 1)"}, (Case(module, (5, 3), {"in_": 3, "out": 4}, (3,)),), **options)


def channels(title: str, formula: str, *cases: Case) -> Kind:
    return Kind(title, {"": formula}, cases, matrix=kernel_matrix, rows=by_channel)


def words(title: str, module: type[nn.Module], shape: tuple[int, ...]) -> Kind:
    cases = (Case(lambda: module(5, 3), shape, {"words": 5, "width": 3}, (1,), words=5),)
    options = {"rows": lambda _, y: y[:, None]} if len(shape) == 1 and module is nn.EmbeddingBag else {}
    return Kind(title, {"": "width × words"}, cases, matrix=lambda _, weight: weight.mT, **options)


def norm(title: str, *modules: tuple[Callable[[], nn.Module], tuple[int, ...]], columns: int = 2) -> Kind:
    cases = tuple(Case(make, shape, {"features": 4}) for make, shape in modules)
    return Kind(title, {"": f"features × 1 × {columns}"}, cases, matrix=lambda _, weight: weight.reshape(-1, 1, 1))


def recurrence(title: str, gates: str, *modules: Callable[[], nn.Module], call: Callable[..., Tensor]) -> Kind:
    blocks = {"ih": f"{gates}hidden × (in + 1)", "hh": f"{gates}hidden × (hidden + 1)"}
    cases = tuple(Case(make, (3, 2), {"in_": 2, "hidden": 3, "gates": i}, (1, 2)) for i, make in modules)
    return Kind(title, blocks, cases, call=call, by_hand=rows_of_untied(untied_recurrence))


def alone(title: str, module: type[nn.Module], blocks: dict[str, str], **options) -> Kind:
    cases = (Case(module, (4, 3), {"elements": 12}),)
    return Kind(title, blocks, cases, matrix=lambda _, weight: weight.reshape(-1, 1), **options)


ONE_BLOCK = {"gain": "elements × 1"}
KINDS = (
    linear("`Linear`", lambda: nn.Linear(3, 4)),
    channels(
        "`Conv1d`, `Conv2d`, `Conv3d`",
        "out × (in·kernel + 1)",
        Case(lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=1), (2, 6), {"in_": 2, "out": 3, "kernel": 3}, (2, 3)),
        Case(lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1)), (2, 5, 4), {"in_": 2, "out": 3, "kernel": 6}, (2, 2, 3)),
        Case(lambda: nn.Conv3d(2, 3, (1, 2, 2)), (2, 2, 3, 2), {"in_": 2, "out": 3, "kernel": 4}, (2, 1, 2, 2)),
    ),
    channels(
        "`Conv2d`, grouped",
        "groups × out/groups × (in/groups·kernel + 1)",
        Case(
            lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3), {"in_": 4, "out": 6, "groups": 2, "kernel": 4}, (4, 2, 2)
        ),
    ),
    channels(
        "`Conv2d`, depthwise",
        "in × out/in × (kernel + 1)",
        Case(lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 3, 3), {"in_": 3, "out": 6, "kernel": 4}, (3, 2, 2)),
    ),
    channels(
        "`ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`",
        "out × (in·kernel + 1)",
        Case(
            lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 3), {"in_": 2, "out": 3, "kernel": 3}, (2, 1)
        ),
        Case(
            lambda: nn.ConvTranspose2d(2, 3, (3, 1), padding=(1, 0)),
            (2, 2, 2),
            {"in_": 2, "out": 3, "kernel": 3},
            (2, 1, 1),
        ),
        Case(
            lambda: nn.ConvTranspose3d(2, 3, (1, 1, 3), padding=(0, 0, 1)),
            (2, 1, 2, 2),
            {"in_": 2, "out": 3, "kernel": 3},
            (2, 1, 1, 1),
        ),
    ),
    words("`Embedding`", nn.Embedding, (4,)),
    words("`EmbeddingBag`", nn.EmbeddingBag, (4,)),
    words("scaled and positional `Embedding` of transformers", ScaledWordEmbedding, (4,)),
    norm("`LayerNorm`", (lambda: nn.LayerNorm(4), (3, 4))),
    norm("`RMSNorm`", (lambda: nn.RMSNorm(4), (3, 4)), columns=1),
    norm(
        "`LayerNorm`, `LayerNorm2d` of other libraries",
        (lambda: LayerNorm2d(4), (4, 3, 2)),
        (lambda: LayerNorm2d(4), (4, 4, 2)),
    ),
    norm("`RMSNorm` of other libraries", (ShiftedRMSNorm, (3, 4)), columns=1),
    norm("`GroupNorm`", (lambda: nn.GroupNorm(2, 4), (4, 3))),
    norm(
        "`InstanceNorm1d`, `InstanceNorm2d`, `InstanceNorm3d`, affine",
        (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
        (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
        (lambda: nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 1)),
    ),
    norm(
        "`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`",
        (lambda: nn.BatchNorm1d(4), (4,)),
        (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
        (lambda: nn.BatchNorm3d(4), (4, 3, 2, 1)),
    ),
    recurrence("`RNN`", "", (1, lambda: nn.RNN(2, 3, batch_first=True)), call=first),
    recurrence("`LSTM`", "4·", (4, lambda: nn.LSTM(2, 3, batch_first=True)), call=first),
    recurrence("`GRU`", "3·", (3, lambda: nn.GRU(2, 3, batch_first=True)), call=first),
    recurrence(
        "`RNNCell`, `LSTMCell`, `GRUCell`",
        "gates·",
        (1, lambda: nn.RNNCell(2, 3)),
        (4, lambda: nn.LSTMCell(2, 3)),
        (3, lambda: nn.GRUCell(2, 3)),
        call=over_time,
    ),
    Kind(
        "`MultiheadAttention`",
        {"in_proj": "3·embed × (embed + 1)", "out_proj": "embed × (embed + 1)"},
        (Case(lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4), {"embed": 4}, (1, 4)),),
        call=lambda module, x: module(x, x, x)[0],
        by_hand=rows_of_untied(untied_attention),
    ),
    alone("`nn.Parameter` in a module with children", Positions, ONE_BLOCK),
    linear("`Conv1D` of Hugging Face", lambda: Conv1D(4, 3), matrix=lambda _, weight: weight.mT),
    Kind(
        "LoRA pair on a frozen `Linear`",
        {"down": "rank × in", "up": "out × rank"},
        (Case(LoRA, (5, 3), {"in_": 3, "rank": 2, "out": 4}, (3,)),),
    ),
    alone('no adapter, `others="error"`', Gain, {}, instead=dict.fromkeys(CHECKS, refused)),
    alone('no adapter, `others="diagonal"`', Gain, ONE_BLOCK, others="diagonal"),
    alone(
        'no adapter, `others="deterministic"`',
        Gain,
        {},
        others="deterministic",
        instead=dict.fromkeys(("exact", "expand", "reduce", "tied"), no_block),
    ),
)


# The table


def row(kind: Kind) -> str:
    """Run every check of a kind and say what came out."""
    cells = [kind.title, *agreed(described(kind, case) for case in kind.cases)]
    cells += [agreed(check(kind, case) for case in kind.cases) for check in (CHECKS | kind.instead).values()]
    return f"| {' | '.join(cells)} |"


def agreed(outcomes: Iterator) -> str | tuple[str, str]:
    """The outcome of all modules of a kind."""
    (outcome,) = set(outcomes)
    return outcome


def table_in(page: str) -> list[str]:
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[start:end].strip().splitlines()


def write() -> None:
    """Run all checks and write the table into the page."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *map(row, KINDS)]
    page = PAGE.read_text()
    table = "\n".join([BEGIN, *lines, END])
    PAGE.write_text(page[: page.index(BEGIN)] + table + page[page.index(END) + len(END) :])


@pytest.mark.parametrize("kind", KINDS, ids=[kind.title.replace("`", "") for kind in KINDS])
def test_the_row_of_the_page_is_what_the_checks_say(kind):
    lines = table_in(PAGE.read_text())
    (committed,) = [line for line in lines if line.startswith(f"| {kind.title} |")] or [None]
    assert row(kind) == committed, f"docs/modules.md is not what was run: rewrite its table with `{COMMAND}`"


def test_the_page_has_these_rows_and_columns():
    lines = table_in(PAGE.read_text())
    titles = [line.split("|")[1].strip() for line in lines]
    expected = [HEADER[0], "---", *(kind.title for kind in KINDS)]
    assert titles == expected, f"docs/modules.md has other rows: rewrite its table with `{COMMAND}`"
    assert lines[0] == f"| {' | '.join(HEADER)} |"


class Pooled(nn.Sequential):
    """Linear layers on every position, their outputs averaged over positions or not."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, OUTPUTS))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.how == "expand" else y.mean(1)


@pytest.mark.parametrize("how", ["expand", "reduce"])
def test_each_sharing_is_exact_in_its_setting(how):
    """Linear layers and Gaussian noise, any number of examples and positions (Eschenhagen et al. 2023)."""
    net, x = seeded(Pooled(how)), torch.randn(4, 5, 3, generator=rng(0), dtype=torch.float64)
    outputs = net(x)[0].numel()
    fishers = block_fishers(net, x, torch.eye(outputs, dtype=torch.float64).expand(len(x), outputs, outputs))
    for name, expected in fishers.items():
        kron = {
            sharing: torch.kron(statistics.mean("gradient"), statistics.mean("input"))
            for sharing in ("expand", "reduce")
            if (statistics := kronecker_factors(record(net, x)[name], sharing))
        }
        assert_close(kron.pop(how), expected)
        (other,) = kron.values()
        assert not torch.allclose(other, expected, rtol=0.1)


if __name__ == "__main__":
    write()
