"""Laplace: a Gaussian around the weights of a trained model, its evidence, and the tuning of its prior."""

from bayes_kfac.laplace.laplace import Laplace

__all__ = ["Laplace"]
