"""Curvature: from a batch to running statistics of each layer. Knows no prior and no posterior."""

from bayes_kfac.curvature.alignment import no_rows
from bayes_kfac.curvature.fisher import EXAMPLEWISE_KINDS, FISHER_KINDS, output_gradients
from bayes_kfac.curvature.layers import Layer, check_initialized, find_layers
from bayes_kfac.curvature.meter import Meter
from bayes_kfac.curvature.models import OTHERS, check_types, find_covered, unwrapped
from bayes_kfac.curvature.modules import CompositeAdapter, Modes, ModuleAdapter, register, register_like
from bayes_kfac.curvature.pullback import COPIES, PullBack
from bayes_kfac.curvature.recorder import Recorder
from bayes_kfac.curvature.recursion import recursive_rows
from bayes_kfac.curvature.rows import Rows, SparseRows
from bayes_kfac.curvature.sketches import Columns, FrequentDirections, LatestColumns, LeadingColumns, principal
from bayes_kfac.curvature.statistics import (
    NO_FRAME,
    SHARING_KINDS,
    Frame,
    Statistics,
    added,
    factor_rows,
    kronecker_factors,
)
from bayes_kfac.curvature.summary import Summary, SummaryRow, summarize

__all__ = [
    "COPIES",
    "EXAMPLEWISE_KINDS",
    "FISHER_KINDS",
    "NO_FRAME",
    "OTHERS",
    "SHARING_KINDS",
    "Columns",
    "CompositeAdapter",
    "Frame",
    "FrequentDirections",
    "LatestColumns",
    "Layer",
    "LeadingColumns",
    "Meter",
    "Modes",
    "ModuleAdapter",
    "PullBack",
    "Recorder",
    "Rows",
    "SparseRows",
    "Statistics",
    "Summary",
    "SummaryRow",
    "added",
    "check_initialized",
    "check_types",
    "factor_rows",
    "find_covered",
    "find_layers",
    "kronecker_factors",
    "no_rows",
    "output_gradients",
    "principal",
    "recursive_rows",
    "register",
    "register_like",
    "summarize",
    "unwrapped",
]
