"""Dense oracles: the slow, explicit counterparts of what the library computes by structure. All float64."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from bayes_kfac.batches import call
from bayes_kfac.curvature import Layer, Recorder, Rows, find_layers
from bayes_kfac.curvature.pullback import PullBack

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def random_spd(*shape: int, seed: int) -> Tensor:
    """Positive definite matrices ``[*shape, shape[-1]]`` with eigenvalues of about 0.1 to 3, far from diagonal."""
    root = randn(*shape, shape[-1], seed=seed)
    return root @ root.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with reproducible parameters."""
    generator = rng(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def pull_back(model: nn.Module, inputs: Any, **options: Any) -> PullBack:
    """One forward pass of a model, recorded."""
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    try:
        output = call(model, inputs)
        return PullBack(recorder.layers, list(recorder.calls), output, **options)
    finally:
        recorder.detach()


def record(
    model: nn.Module, inputs: Any, gradients: Tensor | None = None, *, mask: Tensor | None = None, **options: Any
) -> dict[str, Rows]:
    """The rows of every layer of a model, for given output gradients or else for each element of the output."""
    passed = pull_back(model, inputs, **options)
    return passed.rows(unit_gradients(passed.output) if gradients is None else gradients, mask)


def unit_gradients(output: Tensor) -> Tensor:
    """One column for each element of an example's output, ``[elements, batch, ...]``."""
    size = output[0].numel()
    basis = torch.eye(size, dtype=output.dtype).reshape(size, 1, *output.shape[1:])
    return basis.expand(size, *output.shape)


def block(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors ``[..., *parameter]`` by parameter name as ``[..., *blocks, out, in]``, written out by hand."""
    weight = tensors[layer.weight_name]
    leading = weight.shape[: weight.ndim - layer.like.ndim]
    matrix = weight.flatten(len(leading) + 1)
    groups = getattr(layer.module, "groups", 1)
    if groups > 1:
        matrix = matrix.reshape(*leading, groups, matrix.shape[-2] // groups, matrix.shape[-1])
    if layer.bias_name is None:
        return matrix
    bias = tensors[layer.bias_name].reshape(*matrix.shape[:-1], 1)
    return torch.cat([matrix, bias], dim=-1)


def parameter_jacobians(model: nn.Module, inputs: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Derivatives of each example's flattened output by each parameter, ``[batch, outputs, *parameter]``.

    They are taken at the model's own parameters and buffers, or at those in ``state``.
    """
    names = {name for name, _ in model.named_parameters()}
    state = state or {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def function(parameters: dict[str, Tensor]) -> Tensor:
        values = {**state, **parameters}
        output = call(lambda *args, **kwargs: functional_call(model, values, args, kwargs), inputs)
        return output.reshape(len(output), -1)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return jacrev(function)({name: state[name].detach() for name in names})


def in_block(layer: Layer, derivatives: Mapping[str, Tensor]) -> Tensor:
    """Derivatives by parameters as derivatives by the elements of their block, ``[batch, outputs, *blocks, out, in]``.

    The derivative by an element is the one in the direction in which it moves the parameters.
    """
    size = torch.Size(layer.shape).numel()
    directions = layer.tensors(torch.eye(size, dtype=torch.float64).reshape(size, *layer.shape))
    parts = [
        derivatives[name].reshape(*derivatives[name].shape[:2], -1) @ direction.reshape(size, -1).mT
        for name, direction in directions.items()
    ]
    return sum(parts[1:], parts[0]).unflatten(-1, layer.shape)


def jacobians(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Jacobians of each example's output by each layer's block, ``[batch, outputs, *blocks, out, in]``."""
    derivatives = parameter_jacobians(model, inputs)
    return {name: in_block(layer, derivatives) for name, layer in find_layers(model)[0].items()}


def assert_rows_are_jacobians(model: nn.Module, inputs: Any) -> None:
    """The Jacobians of a model's rows are torch.func's of each example, by every parameter of a layer."""
    expected, rows, layers = parameter_jacobians(model, inputs), record(model, inputs), find_layers(model)[0]
    for name, one in rows.items():
        for key, jacobian in layers[name].tensors(one.jacobians().movedim(-3, 0)).items():
            assert_close(jacobian, expected[key], **TIGHT)


def block_fishers(model: nn.Module, inputs: Any, output_fishers: Tensor) -> dict[str, Tensor]:
    """The dense Fisher of one example for each layer, averaged over the batch, ``[*blocks, out·in, out·in]``.

    ``output_fishers`` are those of each example's flattened output, ``[batch, outputs, outputs]``.
    """
    return {
        name: torch.einsum("nc...i,ncd,nd...j->...ij", J.flatten(-2), output_fishers, J.flatten(-2)) / len(J)
        for name, J in jacobians(model, inputs).items()
    }


def dense_kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of two stacks, one ``torch.kron`` at a time."""
    if left.ndim == 2:
        return torch.kron(left, right)
    return torch.stack([dense_kron(a, b) for a, b in zip(left, right, strict=True)])


def assert_same_statistics(actual, expected, **tolerance: float) -> None:
    """Two sets of statistics hold the same sums and counts."""
    assert dict(actual.counts) == dict(expected.counts)
    mine, theirs = matrices(actual), matrices(expected)
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        assert_close(mine[name], value, **(tolerance or TIGHT))


def matrices(statistics) -> dict[str, Tensor]:
    """All sums of statistics by name, those that are kept as columns written out."""
    return {**statistics.sums, **{name: columns.to_dense() for name, columns in statistics.columns.items()}}
