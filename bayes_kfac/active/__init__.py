"""Active learning: which examples of a pool to label next, and the loop around that question."""

from bayes_kfac.active.base import Acquisition, Gains, available, get, greedy, highest, register
from bayes_kfac.active.gaussian import GaussianGains, GaussianPredictiveGains
from bayes_kfac.active.joint import EPIG, BatchBALD, Joint, information_gains, predictive_gains
from bayes_kfac.active.loop import LoopState, loop
from bayes_kfac.active.optimizing import ExpectedImprovement, ThompsonSampling
from bayes_kfac.active.pointwise import (
    BALD,
    Entropy,
    LeastConfidence,
    Margin,
    Pointwise,
    Random,
    Variance,
    VariationRatio,
)
from bayes_kfac.active.pool import Labelled, stratified
from bayes_kfac.active.predictors import Committee
from bayes_kfac.active.sampled import SampledGains, SampledPredictiveGains
from bayes_kfac.active.stochastic import Power, PowerBALD, Softmax, Softrank, Stochastic

__all__ = [
    "BALD",
    "EPIG",
    "Acquisition",
    "BatchBALD",
    "Committee",
    "Entropy",
    "ExpectedImprovement",
    "Gains",
    "GaussianGains",
    "GaussianPredictiveGains",
    "Joint",
    "Labelled",
    "LeastConfidence",
    "LoopState",
    "Margin",
    "Pointwise",
    "Power",
    "PowerBALD",
    "Random",
    "SampledGains",
    "SampledPredictiveGains",
    "Softmax",
    "Softrank",
    "Stochastic",
    "ThompsonSampling",
    "Variance",
    "VariationRatio",
    "available",
    "get",
    "greedy",
    "highest",
    "information_gains",
    "loop",
    "predictive_gains",
    "register",
    "stratified",
]
