"""Prediction: from a posterior over weights to result objects, linearised or sampled."""

from bayes_kfac.prediction.classification import BernoulliPrediction, CategoricalPrediction
from bayes_kfac.prediction.linearized import linearize
from bayes_kfac.prediction.regression import GaussianPrediction, MixturePrediction
from bayes_kfac.prediction.results import Prediction, Source, from_gaussian, from_outputs
from bayes_kfac.prediction.sampling import Draws, sampled_outputs

__all__ = [
    "BernoulliPrediction",
    "CategoricalPrediction",
    "Draws",
    "GaussianPrediction",
    "MixturePrediction",
    "Prediction",
    "Source",
    "from_gaussian",
    "from_outputs",
    "linearize",
    "sampled_outputs",
]
