"""Probability distributions in Pyro's interface, for use in ``pyro.sample`` and ``kl_divergence`` or on their own."""

from __future__ import annotations

from bayes_kfac.distributions.block_normal import BlockNormal
from bayes_kfac.distributions.matrix_normal import MatrixNormal

__all__ = ["BlockNormal", "MatrixNormal"]
