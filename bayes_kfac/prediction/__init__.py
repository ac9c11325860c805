"""Prediction: from a posterior over weights to result objects, linearised or sampled."""

from bayes_kfac.prediction.classification import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
)
from bayes_kfac.prediction.linearized import linearize
from bayes_kfac.prediction.links import LINKS
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.regression import GaussianPrediction, MixturePrediction
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, concatenate, from_gaussian, from_outputs
from bayes_kfac.prediction.sampling import Draws, sampled_outputs

__all__ = [
    "LINKS",
    "BernoulliPrediction",
    "CategoricalPrediction",
    "DirichletPrediction",
    "Draws",
    "GaussianOutput",
    "GaussianPrediction",
    "MeanBernoulliPrediction",
    "MeanCategoricalPrediction",
    "MixturePrediction",
    "Prediction",
    "Source",
    "batch_dim",
    "concatenate",
    "from_gaussian",
    "from_outputs",
    "linearize",
    "sampled_outputs",
]
