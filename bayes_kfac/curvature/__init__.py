"""Curvature: from a batch to running statistics of each layer. Knows no prior and no posterior."""

from bayes_kfac.curvature.fisher import FISHER_KINDS, output_gradients
from bayes_kfac.curvature.layers import Layer, find_layers
from bayes_kfac.curvature.meter import Meter
from bayes_kfac.curvature.modules import ModuleAdapter, register
from bayes_kfac.curvature.recorder import Recorder, Rows
from bayes_kfac.curvature.statistics import SHARING_KINDS, Statistics
from bayes_kfac.curvature.summary import Summary, SummaryRow, summarize

__all__ = [
    "FISHER_KINDS",
    "SHARING_KINDS",
    "Layer",
    "Meter",
    "ModuleAdapter",
    "Recorder",
    "Rows",
    "Statistics",
    "Summary",
    "SummaryRow",
    "find_layers",
    "output_gradients",
    "register",
    "summarize",
]
