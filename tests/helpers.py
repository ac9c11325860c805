"""Dense oracles: the slow, explicit counterparts of what the library computes by structure. All float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

from bayes_kfac.curvature import Layer, Recorder, Rows, find_layers

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


def record(model: nn.Module, inputs: Tensor, gradients: Tensor | None = None) -> dict[str, Rows]:
    """The rows of every layer of a model, for given output gradients or else for each element of the output."""
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    try:
        output = model(inputs)
        return recorder.rows(output, unit_gradients(output) if gradients is None else gradients)
    finally:
        recorder.detach()


def unit_gradients(output: Tensor) -> Tensor:
    """One column for each element of an example's output, ``[elements, batch, ...]``."""
    size = output[0].numel()
    basis = torch.eye(size, dtype=output.dtype).reshape(size, 1, *output.shape[1:])
    return basis.expand(size, *output.shape)


def block(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors ``[..., *parameter]`` by parameter name as ``[..., *blocks, out, in]``, written out by hand."""
    weight = tensors[layer.weight_name]
    leading = weight.shape[: weight.ndim - layer.weight.ndim]
    matrix = weight.flatten(len(leading) + 1)
    groups = getattr(layer.module, "groups", 1)
    if groups > 1:
        matrix = matrix.reshape(*leading, groups, matrix.shape[-2] // groups, matrix.shape[-1])
    if layer.bias_name is None:
        return matrix
    bias = tensors[layer.bias_name].reshape(*matrix.shape[:-1], 1)
    return torch.cat([matrix, bias], dim=-1)


def jacobians(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Jacobians of each example's output by each layer's block, ``[batch, outputs, *blocks, out, in]``."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def function(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, values, example.unsqueeze(0)).flatten()

    derivatives = vmap(jacrev(function), in_dims=(None, 0))(parameters, inputs)
    return {name: block(layer, derivatives) for name, layer in find_layers(model)[0].items()}


def block_fishers(model: nn.Module, inputs: Tensor, output_fishers: Tensor) -> dict[str, Tensor]:
    """The dense Fisher of one example for each layer, averaged over the batch, ``[*blocks, out·in, out·in]``.

    ``output_fishers`` are those of each example's flattened output, ``[batch, outputs, outputs]``.
    """
    return {
        name: torch.einsum("nc...i,ncd,nd...j->...ij", J.flatten(-2), output_fishers, J.flatten(-2)) / len(inputs)
        for name, J in jacobians(model, inputs).items()
    }


def dense_kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of two stacks, one ``torch.kron`` at a time."""
    if left.ndim == 2:
        return torch.kron(left, right)
    return torch.stack([dense_kron(a, b) for a, b in zip(left, right, strict=True)])


def assert_same_statistics(actual, expected, **tolerance: float) -> None:
    """Two sets of statistics hold the same sums and counts."""
    assert set(actual.sums) == set(expected.sums)
    assert dict(actual.counts) == dict(expected.counts)
    for name, value in expected.sums.items():
        assert_close(actual.sums[name], value, **(tolerance or TIGHT))
