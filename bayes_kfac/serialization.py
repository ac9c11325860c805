"""Posteriors as safetensors files: tensors, and a header of JSON with numbers and strings. Nothing in them is executed.

Tensors are named ``mean/<parameter>``, ``block/<layer>/<tensor>``, ``link/<layer>/<tensor>`` (where layers are linked),
``prior/<layer>`` (precisions of single weights) and ``likelihood/<tensor>``, with the names that parameters and layers
have where no part of the model is compiled. In a file of a mixture ``member/<index>/`` stands before all of that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_kfac import likelihoods, linalg
from bayes_kfac.curvature import check_initialized, find_layers
from bayes_kfac.errors import ArgumentError, check_file
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, JointGaussian, Link, gaussian_from_state

if TYPE_CHECKING:
    from bayes_kfac.posterior import Posterior

#: Files without links are of format 1, which all versions read; those of mixtures are of format 3.
FORMAT = 3


def save(posterior: Posterior, path: Path) -> None:
    """Write a posterior to a file.

    Args:
        posterior: The posterior.
        path: The file.

    Raises:
        ArgumentError: If it is a folder, or in a folder that does not exist.
    """
    _write(path, *_packed(posterior))


def save_members(members: Sequence[Posterior], path: Path) -> None:
    """Write the members of a mixture to one file.

    Args:
        members: The posteriors.
        path: The file.

    Raises:
        ArgumentError: If it is a folder, or in a folder that does not exist.
    """
    packed = [_packed(member) for member in members]
    tensors = {f"member/{index}/{name}": own for index, (_, each) in enumerate(packed) for name, own in each.items()}
    _write(path, {"format": 3, "members": [header for header, _ in packed]}, tensors)


def _packed(posterior: Posterior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What describes a posterior, and its tensors."""
    tensors = {f"mean/{_plain(name)}": value for name, value in posterior.mean.items()}
    for layer, block in posterior.blocks.items():
        tensors.update({f"block/{_plain(layer)}/{name}": value for name, value in block.state.items()})
    links = posterior.blocks.links
    for layer, link in links.items():
        tensors.update({f"link/{_plain(layer)}/{name}": value for name, value in link.state.items()})
    tensors.update(
        {f"prior/{_plain(layer)}": own for layer, own in posterior.prior_precision.items() if isinstance(own, Tensor)}
    )
    tensors.update({f"likelihood/{name}": value for name, value in posterior.likelihood.state_dict().items()})
    header = {
        "format": 2 if links else 1,
        "provenance": asdict(posterior.provenance),
        "prior_precision": {
            _plain(layer): value for layer, value in posterior.prior_precision.items() if not isinstance(value, Tensor)
        },
        "parameters": {
            _plain(name): [_plain(parameter) for parameter in layer.parameters]
            for name, layer in posterior.layers.items()
        },
        "kinds": {_plain(layer): block.kind for layer, block in posterior.blocks.items()},
        "links": {_plain(layer): _plain(link.to) for layer, link in links.items()},
        "likelihood": {"name": type(posterior.likelihood).__name__, "config": posterior.likelihood.config()},
    }
    return header, tensors


def _write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    check_file("path", path)
    save_file(
        # copies, since the format takes no tensor that shares memory; on the CPU, where there is room for them
        {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        },
        path,
        metadata={"bayes_kfac": json.dumps(header)},
    )


def load(posterior_type: type[Posterior], path: Path, model: nn.Module, likelihood: Likelihood | None) -> Posterior:
    """Read a posterior from a file.

    Args:
        posterior_type: The class to build.
        path: The file.
        model: A model of the same architecture.
        likelihood: A likelihood whose copy takes the saved state, or ``None`` to rebuild the registered one.

    Returns:
        The posterior.

    Raises:
        ArgumentError: If the file is not a saved posterior, or not one of this architecture.
    """
    with linalg.leaving_inference_mode():
        header, tensors = _read(path, next(model.parameters()).device)
        if "members" in header:
            raise ArgumentError(
                f"path={str(path)!r} holds a mixture of {len(header['members'])} posteriors. Read it with "
                "Mixture.load()."
            )
        return _unpacked(posterior_type, path, header, tensors, model, likelihood)


def load_members(
    posterior_type: type[Posterior], path: Path, model: nn.Module, likelihood: Likelihood | None
) -> list[Posterior]:
    """Read the members of a mixture from a file.

    Args:
        posterior_type: The class to build.
        path: The file.
        model: A model of the same architecture.
        likelihood: As in :func:`load`; each member has a copy of its own.

    Returns:
        The posteriors.

    Raises:
        ArgumentError: If the file is not a saved mixture, or not one of this architecture.
    """
    with linalg.leaving_inference_mode():
        header, tensors = _read(path, next(model.parameters()).device)
        if "members" not in header:
            raise ArgumentError(
                f"path={str(path)!r} holds one posterior, not a mixture. Read it with Posterior.load()."
            )
        return [
            _unpacked(posterior_type, path, own, _under(f"member/{index}/", tensors), model, likelihood)
            for index, own in enumerate(header["members"])
        ]


def _unpacked(
    posterior_type: type[Posterior],
    path: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    likelihood: Likelihood | None,
) -> Posterior:
    """The posterior of what :func:`_packed` made of it."""
    mean = _under("mean/", tensors)
    check_initialized(model)
    _check_architecture(path, mean, model)
    layers, _ = find_layers(model, _parameters(header, model), rest="diagonal")
    layers = {_plain(name): layer for name, layer in layers.items()}
    blocks = {
        layer: gaussian_from_state(kind, _under(f"block/{layer}/", tensors)) for layer, kind in header["kinds"].items()
    }
    _check_blocks(path, blocks, {name: layer.shape for name, layer in layers.items()})
    links = {
        layers[layer].name: Link(layers[to].name, **_under(f"link/{layer}/", tensors))
        for layer, to in header.get("links", {}).items()
    }
    if likelihood is None:
        likelihood = likelihoods.from_config(header["likelihood"]["name"], header["likelihood"]["config"])
    # a copy, so that the caller's is left alone; assigned, so that float64 is not rounded to the dtype it was built in
    likelihood = copy.deepcopy(likelihood)
    try:
        likelihood.load_state_dict(_under("likelihood/", tensors), assign=True)
    except RuntimeError as error:
        raise ArgumentError(
            f"path={str(path)!r} was saved with the likelihood {header['likelihood']}, whose state does not fit "
            f"likelihood={likelihood!r}: {error}"
        ) from error
    return posterior_type(
        model,
        likelihood,
        JointGaussian({layers[name].name: block for name, block in blocks.items()}, links),
        prior_precision={
            layers[name].name: value for name, value in (header["prior_precision"] | _under("prior/", tensors)).items()
        },
        provenance=Provenance(**header["provenance"]),
        layers={layer.name: layer for layer in layers.values()},
        mean={name: mean[_plain(name)] for name, _ in [*model.named_parameters(), *model.named_buffers()]},
    )


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ArgumentError(f"path={str(path)!r} does not exist, or is not a file.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            # copies: they outlive a change of the file, and torch aligns them, which products to the last bit ask for
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, no dictionary
    except SafetensorError as error:
        raise ArgumentError(f"path={str(path)!r} is not a safetensors file: {error}.") from error
    if "bayes_kfac" not in metadata:
        raise ArgumentError(f"path={str(path)!r} is not a posterior saved by Posterior.save().")
    try:
        header: dict[str, Any] = json.loads(metadata["bayes_kfac"])
    except json.JSONDecodeError as error:
        raise ArgumentError(f"path={str(path)!r} has a damaged header: {error}.") from error
    if header["format"] > FORMAT:
        raise ArgumentError(
            f"path={str(path)!r} has format {header['format']}, newer than {FORMAT}: update bayes_kfac to read it."
        )
    return header, tensors


def _plain(name: str) -> str:
    """The name where no part of the model is compiled: ``torch.compile`` puts a module in between."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def _parameters(header: Mapping[str, Any], model: nn.Module) -> list[nn.Parameter] | None:
    """The parameters that have a block; a file that does not say has one for all that are trainable."""
    if "parameters" not in header:
        return None
    named = {_plain(name): parameter for name, parameter in model.named_parameters()}
    return [named[name] for names in header["parameters"].values() for name in names]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors directly under a prefix."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_architecture(path: Path, mean: Mapping[str, Tensor], model: nn.Module) -> None:
    saved = {name: tuple(value.shape) for name, value in mean.items()}
    named: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    own = {_plain(name): tuple(value.shape) for name, value in named}
    if saved == own:
        return
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    details = "".join(f"\n  {name}: file {saved.get(name)}, model {own.get(name)}" for name in differing[:8])
    raise ArgumentError(f"path={str(path)!r} holds the posterior of another architecture:{details}")


def _check_blocks(path: Path, blocks: Mapping[str, BlockGaussian], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for layer, block in blocks.items():
        if shapes.get(layer) != block.shape:
            raise ArgumentError(
                f"path={str(path)!r} has a block of shape {block.shape} for layer {layer!r}; the model's is "
                f"{shapes.get(layer)}. The same parameters must be trainable (requires_grad) as when it was saved."
            )
