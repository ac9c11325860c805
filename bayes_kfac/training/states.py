"""The states of all blocks in training, with the links between layers that the Gaussians built from them may have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bayes_kfac.curvature import Layer, Statistics
from bayes_kfac.structures import JointGaussian, Link
from bayes_kfac.structures.link import Links
from bayes_kfac.training.state import BlockState, dump_state, restore_state


@dataclass(frozen=True, eq=False)
class States(Mapping[str, BlockState]):
    """What a trainer keeps between two steps; a step replaces it, and never changes it in place.

    Attributes:
        blocks: The state of each block, by layer.
        links: Those of the posterior's Gaussian.
        preconditioner_links: Those of the preconditioner's.
    """

    blocks: Mapping[str, BlockState] = field(default_factory=dict)
    links: Links = field(default_factory=dict)
    preconditioner_links: Links = field(default_factory=dict)

    def __getitem__(self, name: str) -> BlockState:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def posterior(self) -> JointGaussian:
        """The Gaussian that samples are drawn from, of the layers that have one."""
        blocks = {name: state.posterior for name, state in self.items() if state.posterior is not None}
        return JointGaussian(blocks, self.links)

    @property
    def preconditioner(self) -> JointGaussian:
        """The Gaussian of precision ``F̄ + γ I``, of the layers where it is not the posterior's."""
        blocks = {name: state.preconditioner for name, state in self.items() if state.preconditioner is not None}
        return JointGaussian(blocks, self.preconditioner_links)

    @property
    def averages(self) -> dict[str, Statistics]:
        """The running averages of the layers that have been measured."""
        return {name: state.statistics for name, state in self.items() if state.statistics is not None}

    def of(self, blocks: Mapping[str, BlockState], linked: Collection[str]) -> States:
        """The states of other blocks, with the links that are between some of them."""
        links, preconditioner_links = (
            {name: link for name, link in own.items() if name in linked and link.to in linked}
            for own in (self.links, self.preconditioner_links)
        )
        return States(blocks, links, preconditioner_links)

    def updated(self, changed: Mapping[str, BlockState]) -> States:
        """The same with other states of some blocks."""
        return replace(self, blocks={**self.blocks, **changed})

    def with_posterior(self, gaussian: JointGaussian, data_scale: float) -> States:
        """The same with a fresh Gaussian of some layers to draw from; with a layer, those that it is linked to."""
        blocks = {name: replace(self[name], posterior=own, data_scale=data_scale) for name, own in gaussian.items()}
        return replace(self.updated(blocks), links=_renewed(self.links, gaussian))

    def with_preconditioner(self, gaussian: JointGaussian) -> States:
        """The same with a fresh preconditioner of some layers."""
        blocks = {name: replace(self[name], preconditioner=own) for name, own in gaussian.items()}
        return replace(self.updated(blocks), preconditioner_links=_renewed(self.preconditioner_links, gaussian))

    def like(self, layers: Mapping[str, Layer]) -> States:
        """The same where the layers are, in their dtype or float32 if that is wider; itself if it is already."""
        moved = {name: state.like(layers[name].like) for name, state in self.items()}
        if all(moved[name] is state for name, state in self.items()):
            return self
        links, preconditioner_links = (
            {name: _like(link, layers[name]) for name, link in own.items()}
            for own in (self.links, self.preconditioner_links)
        )
        return States(moved, links, preconditioner_links)

    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries of tensors, numbers and strings."""
        links = {"posterior": self.links, "preconditioner": self.preconditioner_links}
        return {
            "blocks": dump_state(self.blocks),
            "links": {
                kind: {name: {"to": link.to, **link.state} for name, link in own.items()} for kind, own in links.items()
            },
        }

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], layers: Mapping[str, Layer]) -> States:
        """What a :meth:`state_dict` holds, on the devices of the layers.

        Args:
            state_dict: The dictionary.
            layers: The layers that it is for.

        Returns:
            The states.

        Raises:
            ArgumentError: If layers or shapes are not those of the dictionary.
        """
        # checkpoints of before layers had schedules of their own say once when all were measured
        age = state_dict["steps"] - 1 - state_dict["last_measured"] if "last_measured" in state_dict else 0
        blocks = restore_state(state_dict["blocks"], layers, age)
        dumped = state_dict.get("links", {})  # checkpoints of before there were links have none
        links, preconditioner_links = (
            {name: _like(Link(**entry), layers[name]) for name, entry in dumped.get(kind, {}).items()}
            for kind in ("posterior", "preconditioner")
        )
        return cls(blocks, links, preconditioner_links)


def _renewed(links: Links, gaussian: JointGaussian) -> Links:
    """Links with those of a Gaussian in the place of its layers' own."""
    kept = {name: link for name, link in links.items() if name not in gaussian}
    return {**kept, **gaussian.links}


def _like(link: Link, layer: Layer) -> Link:
    template = layer.template
    return link.map(lambda tensor: tensor.to(template))
