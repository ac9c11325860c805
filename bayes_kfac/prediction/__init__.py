"""Prediction: from a posterior over weights to result objects, linearised or sampled."""

from bayes_kfac.prediction.classification import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
)
from bayes_kfac.prediction.counts import PoissonMixturePrediction, PoissonPrediction
from bayes_kfac.prediction.heteroscedastic import HeteroscedasticMixturePrediction, HeteroscedasticPrediction
from bayes_kfac.prediction.linearized import MEMORY_BUDGET, Features, LinearizedModel
from bayes_kfac.prediction.links import LINKS
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.pooled import (
    PooledBernoulli,
    PooledCategorical,
    PooledCounts,
    PooledPrediction,
    PooledRegression,
    from_members,
    pool,
)
from bayes_kfac.prediction.regression import GaussianPrediction, MixturePrediction
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, concatenate, from_gaussian, from_outputs
from bayes_kfac.prediction.sampling import Draws, check_draws, sampled_outputs

__all__ = [
    "LINKS",
    "MEMORY_BUDGET",
    "BernoulliPrediction",
    "CategoricalPrediction",
    "DirichletPrediction",
    "Draws",
    "Features",
    "GaussianOutput",
    "GaussianPrediction",
    "HeteroscedasticMixturePrediction",
    "HeteroscedasticPrediction",
    "LinearizedModel",
    "MeanBernoulliPrediction",
    "MeanCategoricalPrediction",
    "MixturePrediction",
    "PoissonMixturePrediction",
    "PoissonPrediction",
    "PooledBernoulli",
    "PooledCategorical",
    "PooledCounts",
    "PooledPrediction",
    "PooledRegression",
    "Prediction",
    "Source",
    "batch_dim",
    "check_draws",
    "concatenate",
    "from_gaussian",
    "from_members",
    "from_outputs",
    "pool",
    "sampled_outputs",
]
