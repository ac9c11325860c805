"""Files: what is read is what was written, to the last bit; other files are refused; nothing in them is code."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace

from bayes_kfac import Posterior
from bayes_kfac.errors import ArgumentError, BayesKfacError
from bayes_kfac.likelihoods import Bernoulli, BoundedNoise, Categorical, GammaNoise, Gaussian, LearnedNoise, Likelihood
from tests.curvature.modules.cases import CASES
from tests.helpers import randn, record, rng, seeded
from tests.posteriors import DAMPING_KINDS, FAMILIES, random_posterior


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 30, bias=False), nn.Tanh(), nn.Linear(30, 2))


def cnn() -> nn.Module:
    """Groups, a normalisation, a parameter without a block, floating-point and integer buffers, a frozen weight."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2, padding=1),
        nn.BatchNorm1d(4),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.Linear(6, 2),
    )
    model[4].requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"mlp": (mlp, (7, 3)), "cnn": (cnn, (7, 2, 5))}


def trained(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    model = seeded(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.add_(0.3)
            module.num_batches_tracked.add_(5)
    return model.to(dtype)


def same(left: Any, right: Any) -> bool:
    """Equality of nested results, of tensors to the last bit and with their dtype."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    return left == right


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "posterior.safetensors"


# What comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", DAMPING_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_bit_identical(name: str, damping: str, dtype: torch.dtype, path: Path) -> None:
    """In a freshly initialised model: both methods, draws, divergence and densities."""
    make, shape = MODELS[name]
    posterior = random_posterior(trained(make, dtype), Gaussian(LearnedNoise([0.3, 0.7])).to(dtype), damping=damping)
    posterior.save(path)
    loaded = Posterior.load(path, make())
    x, y = randn(*shape, seed=1).to(dtype), randn(7, 2, seed=2).to(dtype)
    for method in ("linearized", "sampling"):
        before = posterior.predict(x, method, num_samples=5, generator=rng(0))
        after = loaded.predict(x, method, num_samples=5, generator=rng(0))
        assert same(after.mean, before.mean)
        assert same(after.covariance, before.covariance)
        assert same(after.log_prob(y), before.log_prob(y))
        assert after.source == before.source
    assert same(loaded.sample(3, generator=rng(1)).values, posterior.sample(3, generator=rng(1)).values)
    assert same(loaded.kl(), posterior.kl())
    assert same(loaded.mean, posterior.mean)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_how_it_was_made_comes_back(damping: str, path: Path) -> None:
    """Provenance, prior precisions with all their digits, kinds of blocks, and the summary."""
    posterior = random_posterior(trained(cnn), Categorical(), damping=damping, prior_precision=0.1 + 0.2)
    posterior.save(path)
    model = cnn()
    loaded = Posterior.load(path, model)
    assert loaded.provenance == posterior.provenance
    assert loaded.prior_precision == posterior.prior_precision == dict.fromkeys(("0", "1", "5"), 0.1 + 0.2)
    assert [type(block) for block in loaded.blocks.values()] == [type(block) for block in posterior.blocks.values()]
    assert list(loaded.blocks) == list(posterior.blocks)
    assert str(loaded.summary()) == str(posterior.summary())
    assert loaded.model is model


def moved_gamma() -> GammaNoise:
    noise = GammaNoise(6.0, 4.0, (2,)).double()
    with torch.no_grad():
        noise.log_concentration.add_(torch.tensor([0.1, 0.3], dtype=torch.float64))
        noise.log_rate.sub_(torch.tensor([0.7, 1 / 3], dtype=torch.float64))
    return noise


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "fixed": lambda: Gaussian(torch.tensor(1 / 3, dtype=torch.float64)),
    "fixed-per-output": lambda: Gaussian([0.1, 0.7]),
    "learned": lambda: Gaussian(LearnedNoise(torch.tensor(1 / 3, dtype=torch.float64))),
    "learned-per-output": lambda: Gaussian(LearnedNoise([0.1, 0.7])).double(),
    "bounded": lambda: Gaussian(BoundedNoise([0.1, 0.7])).double(),
    "gamma": lambda: Gaussian(moved_gamma()),
    "categorical": Categorical,
    "bernoulli": Bernoulli,
}


@pytest.mark.parametrize("build", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_likelihood_comes_back_with_what_it_learned(build: Callable[[], Likelihood], path: Path) -> None:
    """All digits and the dtype of a learned or believed noise; nothing of it is trainable."""
    posterior = random_posterior(trained(mlp), build())
    posterior.save(path)
    loaded = Posterior.load(path, mlp()).likelihood
    assert type(loaded) is type(posterior.likelihood)
    assert same(dict(loaded.state_dict()), dict(posterior.likelihood.state_dict()))
    assert loaded.config() == posterior.likelihood.config()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    if isinstance(loaded, Gaussian):
        assert same(loaded.noise_scale, posterior.likelihood.noise_scale)
        assert same(loaded.kl(), posterior.likelihood.kl())


def test_the_models_own_weights_are_neither_used_nor_changed(path: Path) -> None:
    posterior = random_posterior(trained(mlp), Gaussian(0.5))
    posterior.save(path)
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = Posterior.load(path, model)
    x = randn(7, 3, seed=1)
    mean = loaded.predict(x).mean
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(loaded.predict(x).mean, mean)


def test_a_loaded_posterior_is_independent_of_the_file(path: Path) -> None:
    """The file may be overwritten, and a loaded posterior saved again gives the same file."""
    posterior = random_posterior(trained(mlp), Gaussian(0.5))
    posterior.save(path)
    loaded, content = Posterior.load(path, mlp()), path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == content
    path.write_bytes(b"")
    assert same(loaded.predict(randn(7, 3, seed=1)).mean, posterior.predict(randn(7, 3, seed=1)).mean)


def test_paths_may_be_strings(tmp_path: Path) -> None:
    name = str(tmp_path / "posterior")
    random_posterior(trained(mlp), Gaussian(0.5)).save(name)
    assert Posterior.load(name, mlp()).provenance.num_data == 20


def test_tied_and_shared_storage(path: Path) -> None:
    """Tied weights, parameters that are views of one buffer, and an expanded buffer are all written whole."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        model[2].weight = model[0].weight
        model.register_buffer("constant", torch.ones(1, dtype=torch.float64).expand(4))
        return model

    model = make()
    flat = randn(8, seed=5)
    model[4].weight = nn.Parameter(flat[:6].view(2, 3))
    model[4].bias = nn.Parameter(flat[6:])
    posterior = random_posterior(model, Gaussian(0.5))
    posterior.save(path)
    loaded = Posterior.load(path, make())
    x = randn(7, 3, seed=1)
    assert same(loaded.predict(x).covariance, posterior.predict(x).covariance)
    assert same(loaded.mean["constant"], torch.ones(4, dtype=torch.float64))
    pointers = [value.data_ptr() for value in loaded.mean.values()]
    assert len(set(pointers)) == len(pointers)


def test_blocks_that_share_storage(path: Path) -> None:
    """Layers of equal shape are factorised in one stack, and two layers may even have the same Gaussian."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    whole = random_posterior(model, Gaussian(0.5))
    options: dict[str, Any] = {"prior_precision": {"0": 1.3, "2": 1.3}, "provenance": whole.provenance}
    posterior = Posterior(model, Gaussian(0.5), {"0": whole.blocks["0"], "2": whole.blocks["0"]}, **options)
    for shared in (whole, posterior):
        shared.save(path)
        loaded = Posterior.load(path, model)
        assert all(same(block.state, loaded.blocks[name].state) for name, block in shared.blocks.items())


# Likelihoods of one's own


class LaplaceLikelihood(Likelihood):
    """A likelihood that is not registered, with something learned."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def check(self, output: Tensor, target: Tensor) -> None:
        pass

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def fisher_root(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def distribution(self, output: Tensor) -> Distribution:
        return Laplace(output, self.log_scale.exp())

    def config(self) -> dict[str, Any]:
        return {}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return -self.distribution(output).log_prob(target)


def test_own_likelihood_is_given_when_loading(path: Path) -> None:
    """Without it the error names the class; with it a copy takes the saved state, and the caller's is left alone."""
    posterior = random_posterior(trained(mlp), LaplaceLikelihood(0.25))
    posterior.save(path)
    with pytest.raises(ArgumentError, match="'LaplaceLikelihood' is unknown"):
        Posterior.load(path, mlp())
    own = LaplaceLikelihood(8.0)
    loaded = Posterior.load(path, mlp(), likelihood=own)
    assert isinstance(loaded.likelihood, LaplaceLikelihood)
    assert same(loaded.likelihood.log_scale.data, posterior.likelihood.log_scale.data)
    assert own.log_scale.exp().item() == pytest.approx(8.0)
    assert own.log_scale.requires_grad


def test_a_likelihood_that_does_not_fit_is_refused(path: Path) -> None:
    """Also one given by hand: its state has to be the saved one's."""
    random_posterior(trained(mlp), LaplaceLikelihood(0.25)).save(path)
    with pytest.raises(ArgumentError, match=r"(?s)LaplaceLikelihood.*does not fit.*likelihood=Categorical"):
        Posterior.load(path, mlp(), likelihood=Categorical())


# Files and models that do not fit


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "posterior.safetensors"):
        with pytest.raises(ArgumentError, match=r"path='.*folder.*Allowed: a file in a folder that exists"):
            saved(path)


def saved(path: Path) -> Path:
    random_posterior(trained(mlp), Gaussian(0.5)).save(path)
    return path


def assert_refused(path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        Posterior.load(path, model)
    assert isinstance(caught.value, BayesKfacError)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "details"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 41), nn.Tanh(), nn.Linear(41, 30, bias=False), nn.Tanh(), nn.Linear(30, 2)),
         r"0\.weight: file \(40, 3\), model \(41, 3\)"),
        (lambda: nn.Sequential(nn.Linear(3, 40), nn.Tanh()), r"2\.weight: file \(30, 40\), model None"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(2, 2)), r"5\.bias: file None, model \(2,\)"),
        (lambda: nn.ModuleDict({"net": mlp()}), r"net\.0\.bias: file None, model \(40,\)"),
        (lambda: nn.Sequential(*mlp(), nn.BatchNorm1d(2, affine=False)), r"5\.running_mean: file None"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(make: Callable[[], nn.Module], details: str, path: Path) -> None:
    """The message lists the parameters and buffers that differ, with both shapes."""
    assert_refused(saved(path), make(), f"(?s)posterior of another architecture.*{details}")


def frozen(model: nn.Module, prefix: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))
    return model


@pytest.mark.parametrize("then", ["none", "0.weight", "0.bias", "4", ""])
@pytest.mark.parametrize("now", ["none", "0.weight", "2", ""])
def test_what_is_frozen_now_does_not_matter(then: str, now: str, path: Path) -> None:
    """The file says which parameters are in which block."""
    posterior = random_posterior(frozen(trained(mlp), then), Gaussian(0.5))
    posterior.save(path)
    model = frozen(mlp(), now)
    loaded = Posterior.load(path, model)
    x = randn(7, 3, seed=1)
    assert {name: list(layer.parameters) for name, layer in loaded.layers.items()} == {
        name: list(layer.parameters) for name, layer in posterior.layers.items()
    }
    assert same(loaded.sample(3, generator=rng(1)).values, posterior.sample(3, generator=rng(1)).values)
    if posterior.blocks:
        assert same(loaded.predict(x).covariance, posterior.predict(x).covariance)
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        parameter.requires_grad for parameter in frozen(mlp(), now).parameters()
    ]


@pytest.mark.parametrize(("prefix", "layer"), [("0.weight", "0"), ("0.bias", "0"), ("4", "4")])
def test_a_file_that_does_not_say_is_of_the_trainable_parameters(prefix: str, layer: str, path: Path) -> None:
    """One that was written before files said which parameters have a block."""
    header = read_header(saved(path))
    del header["parameters"]
    save_file(load_file(path), path, metadata={"bayes_kfac": json.dumps(header)})
    assert list(Posterior.load(path, mlp()).blocks) == ["0", "2", "4"]
    assert_refused(path, frozen(mlp(), prefix), rf"layer '{layer}'.*requires_grad")


def test_parameters_of_equal_shapes_in_other_blocks_are_refused(path: Path) -> None:
    random_posterior(trained(lambda: nn.Conv1d(2, 4, 3, groups=2)), Gaussian(0.5)).save(path)
    assert_refused(path, nn.Conv1d(1, 4, 3), r"a block of shape \(2, 2, 4\) for layer '\(root\)'.*\(4, 4\)")


class Scaled(nn.Module):
    """Reads the weight of its layer, so that no block can hold it; the bias has one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.weight = self.layer.weight
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).tanh() @ self.weight)


def test_a_block_beside_a_parameter_without_one_comes_back(path: Path) -> None:
    posterior = random_posterior(trained(Scaled), Gaussian(0.5))
    assert set(posterior.layers["layer.bias"].parameters) == {"layer.bias"}
    posterior.save(path)
    x = randn(7, 3, seed=1)
    assert same(Posterior.load(path, Scaled()).predict(x).covariance, posterior.predict(x).covariance)


@pytest.mark.parametrize(("structure", "damping"), FAMILIES)
def test_every_structure_comes_back_with_ties_and_bare_parameters(structure: str, damping: str, path: Path) -> None:
    """Diagonal factors, unit-wise blocks, and an embedding that is tied to the output layer."""
    build, inputs = CASES["language model"]
    model = seeded(build())
    options = {"structure": structure, "damping": damping, "rows": record(model, inputs)}
    posterior = random_posterior(model, Categorical(), **options)
    posterior.save(path)
    loaded = Posterior.load(path, build())
    assert same(loaded.predict(inputs, generator=rng(0)).logits, posterior.predict(inputs, generator=rng(0)).logits)
    assert same(loaded.sample(3, generator=rng(1)).values, posterior.sample(3, generator=rng(1)).values)
    assert same(loaded.kl(), posterior.kl())


def test_missing_files_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.safetensors", mlp(), "does not exist")
    assert_refused(tmp_path, mlp(), "does not exist, or is not a file")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not a safetensors file at all",
        lambda content: content[:-9],
        lambda content: content[: len(content) // 2],
        lambda content: content[:100],
        lambda content: b"\xff" * 64 + content[64:],
        lambda content: pickle.dumps({"mean": [1.0]}),
    ],
    ids=["empty", "text", "last-bytes-missing", "half", "header-cut", "header-overwritten", "pickle"],
)
def test_corrupt_files_are_refused(damage: Callable[[bytes], bytes], path: Path) -> None:
    saved(path).write_bytes(damage(path.read_bytes()))
    assert_refused(path, mlp(), "is not a safetensors file")


def test_foreign_safetensors_are_refused(path: Path) -> None:
    """The weights of the very same model, but no posterior."""
    save_file(mlp().state_dict(), path)
    assert_refused(path, mlp(), r"not a posterior saved by Posterior\.save")
    save_file(mlp().state_dict(), path, metadata={"format": "pt"})
    assert_refused(path, mlp(), r"not a posterior saved by Posterior\.save")


def test_files_of_a_later_format_are_refused(path: Path) -> None:
    header = read_header(saved(path))
    save_file(load_file(path), path, metadata={"bayes_kfac": json.dumps({**header, "format": 1000})})
    assert_refused(path, mlp(), "format 1000, newer than")


# What is in a file


def read_header(path: Path) -> dict[str, Any]:
    """The library's own header, read without the safetensors package."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert list(metadata) == ["bayes_kfac"]
    return json.loads(metadata["bayes_kfac"])


def test_a_file_is_json_and_tensors(path: Path) -> None:
    """A length, a header of JSON, and the bytes of the tensors it names, without a gap in which code could hide."""
    random_posterior(trained(cnn), Gaussian(moved_gamma()), damping="exact").save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    del entries["__metadata__"]
    spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    assert [start for start, _ in spans] == [0, *[end for _, end in spans[:-1]]]
    assert spans[-1][1] == len(content) - 8 - length
    assert {name.split("/")[0] for name in entries} == {"mean", "block", "likelihood"}
    assert {"mean/1.num_batches_tracked", "block/0/precision", "likelihood/noise.log_rate"} <= set(entries)


def test_the_header_is_numbers_and_strings(path: Path) -> None:
    header = read_header(saved(path))
    assert header["format"] == 1
    assert header["kinds"] == {"0": "matrix_normal", "2": "matrix_normal", "4": "matrix_normal"}
    assert header["likelihood"] == {"name": "Gaussian", "config": {"noise_scale": {"kind": "fixed", "scale": 0.5}}}
    assert header["provenance"]["damping"] == "factored"
    assert header["prior_precision"] == dict.fromkeys("024", 1.3)


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither writing nor reading goes through pickle, which would run what a file says."""
    posterior = random_posterior(trained(mlp), Gaussian(moved_gamma()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    posterior.save(path)
    loaded = Posterior.load(path, mlp())
    assert same(loaded.kl(), posterior.kl())


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file({"mean/weight": torch.zeros(1)}, path, metadata={"bayes_kfac": "{"})
    with pytest.raises(ArgumentError, match="damaged header"):
        Posterior.load(path, nn.Linear(2, 1))
