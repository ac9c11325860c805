"""Active learning: which examples of a pool to label next, and the loop around that question."""

from bayes_kfac.active.base import Acquisition, Gains, greedy

__all__ = ["Acquisition", "Gains", "greedy"]
