"""A Gaussian over the weights of all layers: one block for each, and links between layers where they correlate.

Its covariance is ``T diag(Λ) Tᵀ``, with a :class:`BlockGaussian` for each ``Λ_l`` and a unit triangular ``T``: the
weights are ``w_l = z_l − Σ_k Ψ_kᵀ z_k`` over the links ``Ψ_k`` that lead to layer ``l``, with independent
``z_k ~ N(0, Λ_k)`` (Martens & Grosse 2015, §4.3). A link leads to a later layer, so that ``T⁻¹`` is a substitution in
the order of the layers. Without links the layers are independent and the blocks are their Gaussians; with them, a block
is the Gaussian of its layer given the layers before it.

Values are dictionaries by layer; layers that are missing in one are zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Rows, Statistics
from bayes_kfac.curvature.rows import side_by_side
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Information, Structure, standard_normal
from bayes_kfac.structures.link import Link, Links
from bayes_kfac.structures.whitened import Whitened

Values = Mapping[str, Tensor]


class JointGaussian(Mapping[str, BlockGaussian]):
    """A zero-mean Gaussian over all layers; as a mapping, its blocks by layer.

    Args:
        blocks: The block of each layer, in the order of the layers.
        links: The links by the layers that they come from; those from or to layers without a block are left out.
    """

    def __init__(self, blocks: Mapping[str, BlockGaussian], links: Links | None = None) -> None:
        self.blocks = dict(blocks)
        self.links = {
            name: links[name] for name in self.blocks if links and name in links and links[name].to in self.blocks
        }

    @classmethod
    def of(cls, blocks: Mapping[str, BlockGaussian]) -> JointGaussian:
        """These blocks together; itself if it is one already."""
        return blocks if isinstance(blocks, JointGaussian) else cls(blocks)

    def __getitem__(self, name: str) -> BlockGaussian:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def standard_normal(self, generator: torch.Generator | None, count: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Noise for :meth:`sample`, ``[*count, *blocks, out, in]`` of each layer."""
        return {name: standard_normal(block, generator, count) for name, block in self.items()}

    def sample(self, noise: Values) -> dict[str, Tensor]:
        """``T B ε``, a linear map whose square is the covariance; ``B Bᵀ = Λ`` in each block."""
        return self._spread({name: self[name].sample(own) for name, own in noise.items()})

    def whiten(self, value: Values) -> dict[str, Tensor]:
        """``Bᵀ Tᵀ V``, the adjoint of :meth:`sample`."""
        return {name: self[name].whiten(own) for name, own in self._gathered(value).items()}

    def solve(self, value: Values) -> dict[str, Tensor]:
        """``P⁻¹ V = T Λ Tᵀ V``."""
        return self._spread({name: self[name].solve(own) for name, own in self._gathered(value).items()})

    def multiply(self, value: Values) -> dict[str, Tensor]:
        """``P V = T⁻ᵀ Λ⁻¹ T⁻¹ V``."""
        inner = dict(value)
        for name, link in self.links.items():
            if name in inner:
                _add(inner, link.to, link.adjoint(inner[name]))
        product = {name: self[name].multiply(own) for name, own in inner.items()}
        for name, link in reversed(self.links.items()):
            if link.to in product:
                _add(product, name, link(product[link.to]))
        return product

    def logdet(self) -> Tensor:
        """``log det P``, a scalar: ``T`` has none."""
        return torch.stack([block.logdet().sum() for block in self.values()]).sum()

    def whitened(self, rows: Mapping[str, Rows]) -> dict[str, Whitened]:
        """``Bᵀ Tᵀ J``, whose products add up over layers to ``J_c P⁻¹ J_dᵀ``, from the rows of a forward pass."""
        gathered = dict(rows)
        for name, link in self.links.items():
            if link.to in rows:
                image = link.rows(rows[link.to])
                taken = Rows(image.inputs, -image.gradients)
                gathered[name] = side_by_side([rows[name], taken]) if name in rows else taken
        return {name: self[name].whitened_rows(own) for name, own in gathered.items()}

    def marginal_variance(self) -> dict[str, Tensor]:
        """``diag P⁻¹``, ``[*blocks, out, in]`` of each layer."""
        variances = {name: block.marginal_variance() for name, block in self.items()}
        for name, more in self._variances_by_links():
            variances[name] = variances[name] + more
        return variances

    def kl(self, means: Values, prior_precision: Mapping[str, float | Tensor]) -> Tensor:
        """``KL(N(mean, P⁻¹) ‖ N(0, diag(prior_precision)⁻¹))`` in nats.

        Args:
            means: The mean of each layer, ``[*blocks, out, in]``.
            prior_precision: The prior's precision of each layer: one number, or of each weight.

        Returns:
            A scalar.
        """
        total = sum(block.kl(means[name], prior_precision[name]).sum() for name, block in self.items())
        for name, more in self._variances_by_links():
            total = total + 0.5 * (prior_precision[name] * more).sum()
        return torch.as_tensor(total)

    def to_power(self, exponent: float) -> JointGaussian:
        """The Gaussian of precision ``P^p``: :meth:`BlockGaussian.to_power` of each layer.

        Args:
            exponent: ``p``.

        Returns:
            The Gaussian.

        Raises:
            ArgumentError: If layers are linked, or a block has no powers.
        """
        if self.links:
            raise ArgumentError(f"power={exponent!r} is not allowed: layers are linked. Allowed: 1.")
        return JointGaussian({name: block.to_power(exponent) for name, block in self.items()})

    def as_prior(self) -> JointGaussian:
        """The nearest independent Gaussians in ``KL(q ‖ p)`` whose precisions a structure can add exactly."""
        return JointGaussian({name: block.as_prior() for name, block in self.items()})

    def is_linked(self, name: str) -> bool:
        """Whether a layer is correlated with another."""
        return name in self.links or any(link.to == name for link in self.links.values())

    def labels(self, structures: Mapping[str, Structure]) -> dict[str, str]:
        """The structure of each layer in words, what it is linked to, and what is to be known of it, for summaries."""
        to = {name: f" → {link.to}" for name, link in self.links.items()}
        notes = {name: f" ({block.note})" for name, block in self.items() if block.note}
        return {name: own.label + to.get(name, "") + notes.get(name, "") for name, own in structures.items()}

    def map(self, function: Callable[[Tensor], Tensor]) -> JointGaussian:
        """The Gaussian with a function applied to every tensor of its state."""
        return JointGaussian(
            {name: block.map(function) for name, block in self.items()},
            {name: link.map(function) for name, link in self.links.items()},
        )

    def to(self, target: torch.device | torch.dtype | str) -> JointGaussian:
        """The same Gaussian on another device or in another dtype."""
        return self.map(lambda tensor: tensor.to(target))

    def _spread(self, value: Values) -> dict[str, Tensor]:
        """``T V``."""
        spread = dict(value)
        for name, link in self.links.items():
            if name in value:
                _add(spread, link.to, -link.adjoint(value[name]))
        return spread

    def _gathered(self, value: Values) -> dict[str, Tensor]:
        """``Tᵀ V``."""
        gathered = dict(value)
        for name, link in self.links.items():
            if link.to in value:
                _add(gathered, name, -link(value[link.to]))
        return gathered

    def _variances_by_links(self) -> Iterator[tuple[str, Tensor]]:
        """What each link adds to the variances of the layer it leads to."""
        for name, link in self.links.items():
            yield link.to, link.variance(self[name])


def measure(
    structures: Mapping[str, Structure], rows: Mapping[str, Rows], frames: Mapping[str, Frame] | None = None
) -> dict[str, Statistics]:
    """What the structures measure of a forward pass, each of its layer and of that which it is linked to.

    Args:
        structures: The structures of the layers to measure, by name.
        rows: The rows of the layers that were used.
        frames: The frames of the statistics so far, where they have one.

    Returns:
        The statistics of those of these layers that were used.
    """
    frames = frames or {}
    measured = {}
    for name, own in rows.items():
        if name in structures:
            other = rows.get(structures[name].linked_to or "")
            measured[name] = structures[name].measure_linked(
                own.for_algebra(), None if other is None else other.for_algebra(), frames.get(name, NO_FRAME)
            )
    return measured


def build(structures: Mapping[str, Structure], specs: Sequence[BlockSpec]) -> JointGaussian:
    """The Gaussian of some layers; blocks of one structure are built together, so that equal shapes share calls.

    Args:
        structures: The structure of each layer, by name.
        specs: The layers' blocks, in the order of the layers.

    Returns:
        The Gaussian, its blocks in the order of the specs.
    """
    blocks: dict[str, BlockGaussian] = {}
    links: dict[str, Link] = {}
    for structure, group, pairs in _groups(structures, specs):
        gaussians, own_links = structure.linked_gaussians(group, pairs)
        blocks.update(zip((spec.name for spec in group), gaussians, strict=True))
        links.update(own_links)
    return JointGaussian({spec.name: blocks[spec.name] for spec in specs}, links)


def correlation(structures: Mapping[str, Structure], specs: Sequence[BlockSpec]) -> Information:
    """What :meth:`Structure.information` of single layers leaves out: ``log det P − Σ_l log det P_ll``.

    It is 0 where layers are independent, and negative where they are not.

    Args:
        structures: The structure of each layer, by name.
        specs: The layers' blocks; their ``data_scale`` is not used.

    Returns:
        The function of ``data_scale``.
    """
    parts = [structure.correlation(group, pairs) for structure, group, pairs in _groups(structures, specs) if pairs]
    return lambda scale: torch.stack([part(scale) for part in parts]).sum() if parts else torch.zeros_like(scale)


def _groups(
    structures: Mapping[str, Structure], specs: Sequence[BlockSpec]
) -> Iterator[tuple[Structure, list[BlockSpec], dict[str, str]]]:
    """The blocks of each structure with the same options, and which of them are linked to which."""
    groups: dict[tuple[Any, ...], list[BlockSpec]] = {}
    for spec in specs:
        own = structures[spec.name]
        groups.setdefault((type(own), own.damping, own.sharing, *own.options.items()), []).append(spec)
    for group in groups.values():
        links = {spec.name: structures[spec.name].linked_to for spec in group}
        yield structures[group[0].name], group, {name: to for name, to in links.items() if to in links}


def _add(values: dict[str, Tensor], name: str, more: Tensor) -> None:
    values[name] = values[name] + more if name in values else more
