"""Scores of predictions: errors, densities, calibration, intervals, selection and detection.

Pure functions of tensors, or of anything :func:`torch.as_tensor` takes. They average over all examples and return a
0-dimensional tensor on the device of the first argument, computed in the widest precision among the arguments and at
least in float32; plain Python numbers count as PyTorch's default dtype. Shapes have to agree exactly, because ``[n]``
against ``[n, 1]`` would broadcast to a plausible but wrong number. NaN is refused rather than counted, since
comparisons would silently turn it into a miss. Scores that are smooth in a prediction are differentiable in it.
"""

from bayes_kfac.metrics.calibration import (
    ReliabilityCurve,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_curve,
)
from bayes_kfac.metrics.checks import TensorLike
from bayes_kfac.metrics.classification import accuracy, brier_score, categorical_nll
from bayes_kfac.metrics.detection import auroc, average_precision, false_positive_rate
from bayes_kfac.metrics.intervals import coverage, interval_score, sharpness
from bayes_kfac.metrics.pit import miscalibration_area, pit_gaussian, pit_samples
from bayes_kfac.metrics.regression import (
    crps_gaussian,
    crps_samples,
    energy_score,
    gaussian_nll,
    mixture_nll,
    root_mean_squared_error,
)
from bayes_kfac.metrics.selection import (
    RiskCoverageCurve,
    area_under_risk_coverage,
    risk_coverage_curve,
    selective_accuracy,
)

__all__ = [
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "TensorLike",
    "accuracy",
    "area_under_risk_coverage",
    "auroc",
    "average_precision",
    "brier_score",
    "categorical_nll",
    "classwise_calibration_error",
    "coverage",
    "crps_gaussian",
    "crps_samples",
    "energy_score",
    "expected_calibration_error",
    "false_positive_rate",
    "gaussian_nll",
    "interval_score",
    "maximum_calibration_error",
    "miscalibration_area",
    "mixture_nll",
    "pit_gaussian",
    "pit_samples",
    "reliability_curve",
    "risk_coverage_curve",
    "root_mean_squared_error",
    "selective_accuracy",
    "sharpness",
]
