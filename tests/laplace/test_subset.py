"""Which parameters a fit is over: every form of ``subset=``, and posteriors with the other weights fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UnsupportedModelError
from tests.helpers import TIGHT, in_block, parameter_jacobians, randn, rng, seeded
from tests.laplace.oracles import LIKELIHOODS, NETS, NOISE_SCALE, Twice, X, Y, batches, fit_net, fitted, gaussian
from tests.posteriors import BY_COLUMN, FAMILY_NAMES, dense_output_covariance


class Deep(nn.Module):
    """A trunk of modules in modules and a head, as people name them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()))
        self.trunk2, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.trunk2(self.trunk(x))))


def deep() -> nn.Module:
    return seeded(Deep())


def covered(model: nn.Module, subset: Any, **options: Any) -> set[str]:
    """The parameters that have a block."""
    laplace = bk.Laplace(model, gaussian(), subset=subset, **options)
    return {name for layer in laplace.layers.values() for name in layer.parameters}


HEAD, TRUNK = {"head.weight", "head.bias"}, {"trunk.0.weight", "trunk.0.bias", "trunk.2.0.weight"}
ALL = {*HEAD, *TRUNK, "trunk2.weight", "trunk2.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("all", ALL),
        ("last_layer", HEAD),
        (["head"], HEAD),
        (("trunk",), TRUNK),
        ({"trunk", "head.bias"}, TRUNK | {"head.bias"}),
        (["trunk.2"], {"trunk.2.0.weight"}),
        (["trunk.2.0.weight", "trunk.2.0"], {"trunk.2.0.weight"}),
        (["head.weight"], {"head.weight"}),
        (lambda name, parameter: parameter.ndim == 1, {name for name in ALL if "bias" in name} | {"norm.weight"}),
        (lambda name, parameter: name.startswith("head"), HEAD),
    ],
)
def test_each_form_covers_what_it_says(subset: Any, expected: set[str]) -> None:
    """A module's name is no prefix of another's: ``trunk`` is not ``trunk2``."""
    assert covered(deep(), subset) == expected


def test_frozen_parameters_are_covered_by_all_and_not_by_requires_grad() -> None:
    """And their flags stay as they were."""
    model = deep()
    model.trunk.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert covered(model, "all") == ALL
    assert covered(model, "requires_grad") == ALL - TRUNK - {"head.bias"}
    assert covered(model, "last_layer") == HEAD
    assert covered(model, ["trunk"]) == TRUNK
    laplace = fitted(model, gaussian(), batches(X, Y), subset="all")
    reference = fitted(deep(), gaussian(), batches(X, Y), subset="all")
    for name, block in laplace.posterior().blocks.items():
        assert_close(block.to_dense(), reference.posterior().blocks[name].to_dense(), **TIGHT)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    ("subset", "match"),
    [
        ("first_layer", r"subset='first_layer' is unknown\. Allowed: 'all', 'requires_grad', 'last_layer', a list"),
        (None, "subset=None is unknown"),
        (3, "subset=3 is unknown"),
        ([], r"subset=\[\] holds no parameter.*trunk\.0\.weight"),
        (["tail"], r"names 'tail', which is no parameter and no module.*head\.weight"),
        (["head", "trunk.1"], r"names 'trunk\.1'"),
        (["hea"], "names 'hea'"),
        (nn.Linear(4, 2), r"subset=a Linear is unknown\. Allowed: .*a list of names .*a function of name"),
        (nn.Linear(4, 2).weight, "subset=a Parameter is unknown"),
        (list(nn.Linear(4, 2).parameters()), r"holds a Parameter\. Allowed: names .*'trunk\.0\.weight'; or .*function"),
        (lambda name, parameter: False, "holds no parameter"),
    ],
)
def test_wrong_subsets_are_named_with_what_is_allowed(subset: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        bk.Laplace(deep(), gaussian(), subset=subset)


def test_models_without_parameters_and_all_frozen_are_refused() -> None:
    with pytest.raises(ArgumentError, match="holds no parameter"):
        bk.Laplace(nn.Sequential(nn.ReLU()), gaussian())
    with pytest.raises(ArgumentError, match="subset='last_layer' holds no parameter"):
        bk.Laplace(nn.Sequential(nn.ReLU()), gaussian(), subset="last_layer")
    with pytest.raises(ArgumentError, match="subset='requires_grad' holds no parameter"):
        bk.Laplace(deep().requires_grad_(False), gaussian(), subset="requires_grad")


def test_the_last_layer_is_the_last_in_the_order_of_definition() -> None:
    """Whatever it is: a normalisation, a parameter that stands alone, a tied weight."""
    assert covered(seeded(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))), "last_layer") == {"1.weight", "1.bias"}
    assert covered(seeded(nn.Sequential(nn.Linear(3, 2), nn.Tanh())), "last_layer") == {"0.weight", "0.bias"}
    assert covered(seeded(Twice()), "last_layer") == {"head.weight", "head.bias"}
    assert covered(seeded(nn.Linear(3, 2)), "last_layer") == {"weight", "bias"}
    # the head, whose weight has the name of the embedding that it is tied to
    assert covered(NETS["tied to words"].make(), "last_layer") == {"embed.weight"}
    assert covered(seeded(nn.LSTM(2, 3, num_layers=2)), "last_layer") == {"weight_hh_l1", "bias_hh_l1"}


def test_a_part_outside_of_blocks_matters_only_within_the_subset() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)))
    with pytest.raises(UnsupportedModelError, match=r"1\.weight: PReLU has no adapter"):
        bk.Laplace(model, gaussian())
    assert covered(model, ["0", "2"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert covered(model, "last_layer") == {"2.weight", "2.bias"}


# Posteriors of a subset


SUBSETS = {
    "last layer": ("last_layer", HEAD),
    "first": (["trunk.0"], {"trunk.0.weight", "trunk.0.bias"}),
    "norm and weight": (["norm", "head.weight"], {"norm.weight", "norm.bias", "head.weight"}),
    "bias": (["head.bias"], {"head.bias"}),
}


def by_parameter(model: nn.Module, x: Tensor, names: set[str]) -> Mapping[str, Tensor]:
    return {name: J for name, J in parameter_jacobians(model, x).items() if name in names}


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_predictions_are_those_of_the_dense_formula_with_the_other_weights_fixed(structure: str, subset: str) -> None:
    """Mean and covariance of the linearised model in the subset's weights alone, by torch.func."""
    chosen, names = SUBSETS[subset]
    model, x = deep(), randn(4, 3, seed=30)
    laplace = fitted(model, gaussian(), batches(X, Y), subset=chosen, structure=structure, prior_precision=0.5)
    posterior = laplace.posterior()
    assert {key for layer in posterior.layers.values() for key in layer.parameters} == names
    prediction = posterior.predict(x)
    derivatives = by_parameter(model, x, names)
    expected = NOISE_SCALE**2 * torch.eye(2, dtype=torch.float64)
    for name, block in posterior.blocks.items():
        J = in_block(posterior.layers[name], derivatives).flatten(-2)
        expected = expected + torch.einsum("nc...i,...ij,nd...j->ncd", J, torch.linalg.inv(block.to_dense()), J)
    assert_close(prediction.covariance, expected, rtol=1e-9, atol=1e-9)
    assert_close(prediction.mean, model(x).detach(), **TIGHT)
    if structure == "dense" and len(posterior.blocks) == 1:
        (layer,) = posterior.layers.values()
        J = in_block(layer, by_parameter(model, X, names)).flatten(-2)
        if J.ndim == 3:  # one block: the whole precision from torch.func
            P = torch.einsum("nci,ncj->ij", J, J) / NOISE_SCALE**2 + 0.5 * torch.eye(J.shape[-1], dtype=torch.float64)
            assert_close(next(iter(posterior.blocks.values())).to_dense(), P, **TIGHT)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_the_blocks_of_a_subset_are_those_of_a_fit_to_all(structure: str, subset: str) -> None:
    """Layers do not see each other."""
    chosen, names = SUBSETS[subset]
    part = fitted(deep(), gaussian(), batches(X, Y), subset=chosen, structure=structure).posterior()
    whole = fitted(deep(), gaussian(), batches(X, Y), structure=structure).posterior()
    for name, block in part.blocks.items():
        if name in whole.blocks and set(part.layers[name].parameters) == set(whole.layers[name].parameters):
            assert_close(block.to_dense(), whole.blocks[name].to_dense(), **TIGHT)
    assert names == {key for layer in part.layers.values() for key in layer.parameters}


def test_draws_leave_the_other_weights_where_they_are() -> None:
    posterior = fitted(deep(), gaussian(), batches(X, Y), subset="last_layer").posterior()
    draws = posterior.sample(3, generator=rng(0))
    assert set(draws.values) == HEAD
    outputs = posterior.predict(X, draws=draws)
    with torch.no_grad():
        features = posterior.model.norm(posterior.model.trunk2(posterior.model.trunk(X)))
        weight, bias = draws.values["head.weight"], draws.values["head.bias"]
        by_hand = torch.einsum("nf,sof->sno", features, weight) + bias[:, None]
    assert_close(outputs.mean, by_hand.mean(0), **TIGHT)


def test_a_subset_survives_a_file_though_the_model_is_not_frozen(tmp_path: Any) -> None:
    for subset in (["trunk.0"], ["head.weight"], "last_layer"):
        posterior = fitted(deep(), gaussian(), batches(X, Y), subset=subset).posterior()
        posterior.save(tmp_path / "p.safetensors")
        loaded = bk.Posterior.load(tmp_path / "p.safetensors", deep().requires_grad_(False))
        assert list(loaded.blocks) == list(posterior.blocks)
        assert torch.equal(loaded.predict(X).covariance, posterior.predict(X).covariance)


# The last layer alone


class Opaque(nn.Module):
    """A trunk that autograd does not get through, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.trunk, self.head = kind, nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                features = self.trunk(x).tanh()
        elif self.kind == "numpy":
            features = torch.as_tensor(self.trunk(x).detach().numpy()).tanh()
        elif self.kind == "in place":
            features = self.trunk(x).tanh_().mul_(2.0)
        else:
            features = (self.trunk(x) > 0).double()
        return self.head(features)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("kind", ["no_grad", "numpy", "in place", "step"])
def test_the_last_layer_needs_no_graph_of_the_trunk(kind: str, structure: str) -> None:
    """A trunk without gradients, out of torch, or not differentiable at all: features are what counts."""
    case = LIKELIHOODS["categorical"]
    model, y = seeded(Opaque(kind)), case.targets(11)
    seen: list[bool] = []
    handle = model.trunk.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    laplace = fitted(model, case.make(), batches(X, y), subset="last_layer", structure=structure, prior_precision=2.0)
    handle.remove()
    assert seen
    assert not any(seen), "nothing of the trunk is in a graph"
    with torch.no_grad():
        output = model(X)
    reference = seeded(Opaque(kind))
    features: list[Tensor] = []
    reference.head.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
    reference(X)
    phi = torch.cat([features[0], torch.ones(11, 1, dtype=torch.float64)], 1)
    F = case.fisher(output)
    if structure in BY_COLUMN:
        fisher = 11 * torch.kron(F.mean(0), phi.T @ phi / 11)
    else:
        fisher = torch.einsum("ncd,ni,nj->cidj", F, phi, phi).reshape(18, 18)
        unit = torch.ones(1, 1) if structure == "diagonal" else torch.ones(6, 6)  # weights whose covariance is kept
        fisher = fisher if structure in {"dense", "smw"} else fisher * torch.kron(torch.eye(18 // len(unit)), unit)
    block = laplace.posterior().blocks["head"]
    assert_close(block.to_dense(), fisher + 2.0 * torch.eye(18, dtype=torch.float64), **TIGHT)
    assert torch.isfinite(laplace.posterior().predict(X, link="probit").probs).all()


def test_the_whole_of_a_model_with_an_opaque_trunk_is_refused() -> None:
    """Its first layer has no gradient, and would have a curvature of nothing."""
    case = LIKELIHOODS["categorical"]
    with pytest.raises(bk.errors.UsageError, match=r"\['trunk'\].*subset="):
        fitted(seeded(Opaque("no_grad")), case.make(), batches(X, case.targets(11)))


def test_a_fit_to_all_predicts_by_the_dense_formula() -> None:
    for name in NETS:
        posterior = fit_net(name).posterior()
        mean, covariance = dense_output_covariance(posterior, NETS[name].x[:3])
        output = posterior.output(NETS[name].x[:3])
        assert_close(output.mean.reshape(mean.shape), mean.detach(), **TIGHT)
        assert_close(output.covariance.reshape(covariance.shape), covariance.detach(), rtol=1e-9, atol=1e-9)
