"""Compiled models train to the plain loop's numbers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayes_kfac as bk
from tests.training.loops.plain import (
    BATCHES,
    SAME,
    Net,
    X,
    assert_same,
    make,
    train,
)


def compiled_root(model: Net, **options: Any) -> nn.Module:
    return torch.compile(model, **options)


def compiled_in_place(model: Net, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def compiled_part(model: Net, **options: Any) -> nn.Module:
    model.body = torch.compile(model.body, **options)
    return model


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", [compiled_root, compiled_in_place, compiled_part])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_train_to_the_same_numbers(how, backend):
    """Steps that measure run uncompiled, the others compiled; both with the sample of the moment."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = how(Net(), backend=counting)
    optimizer = make(model, statistics_every=5)
    train(optimizer, BATCHES[:3], model)
    assert not graphs  # steps 0, 1 and 2 are measured
    train(optimizer, BATCHES[3:], model)
    assert graphs
    expected = train(make(Net(), statistics_every=5))
    if how is not compiled_part:  # its parameters have the names that torch.compile() gave them
        assert_same(optimizer, expected)
    for mean, reference in zip(optimizer.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(mean, reference, **SAME)
    prediction, reference = optimizer.posterior().predict(X), expected.posterior().predict(X)
    assert_close(prediction.epistemic_variance, reference.epistemic_variance, **SAME)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", [compiled_root, compiled_in_place, compiled_part])
def test_the_posterior_of_a_compiled_model_loads_into_a_plain_one(how, tmp_path):
    model = how(Net(), backend="eager")
    posterior = train(make(model), model=model).posterior()
    if how is not compiled_part:  # its parameters have the names that torch.compile() gave them, but not in the file
        assert not any("_orig_mod" in name for name in (*posterior.mean, *posterior.layers, str(posterior.summary())))
    posterior.save(tmp_path / "posterior.safetensors")
    for same in (Net(), how(Net(), backend="eager")):
        loaded = bk.Posterior.load(tmp_path / "posterior.safetensors", same)
        assert_close(loaded.predict(X).mean, posterior.predict(X).mean, rtol=0, atol=0)
        assert_close(loaded.predict(X).epistemic_variance, posterior.predict(X).epistemic_variance, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductors_code_trains_to_the_same_numbers():
    """The backend that users have; a quarter of a minute where its cache is cold."""
    with torch._inductor.config.patch(compile_threads=1):
        model = compiled_root(Net())
        optimizer = train(make(model, statistics_every=5), model=model)
    assert_same(optimizer, train(make(Net(), statistics_every=5)))
