"""Where a posterior came from. Dampings and temperatures give different posteriors; each result says which it used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """How a posterior was made.

    Attributes:
        method: How it was fitted.
        structure: The structure of its blocks.
        damping: How the prior entered the blocks.
        fisher: The kind of Fisher that was measured.
        sharing: How positions that share weights were summed.
        temperature: The weight of the KL term.
        num_data: The number of training examples.
    """

    method: str
    structure: str
    damping: str
    fisher: str
    sharing: str
    temperature: float
    num_data: int
