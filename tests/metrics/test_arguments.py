"""What goes into metrics and what comes out: types, precision, shapes and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError

PROBS = [[0.25, 0.75], [0.5, 0.5]]
LABELS = [1, 0]
CLASSIFICATION = [
    metrics.accuracy,
    metrics.categorical_nll,
    metrics.brier_score,
    metrics.expected_calibration_error,
    metrics.maximum_calibration_error,
    metrics.classwise_calibration_error,
    lambda probs, labels: metrics.selective_accuracy(probs, labels, 0.5),
    metrics.reliability_curve,
]
REGRESSION = [
    (metrics.root_mean_squared_error, 2),
    (metrics.coverage, 3),
    (metrics.sharpness, 2),
    (lambda *args: metrics.interval_score(*args, level=0.9), 3),
    (metrics.crps_gaussian, 3),
    (metrics.gaussian_nll, 3),
]
REGRESSION_IDS = ["rmse", "coverage", "sharpness", "interval_score", "crps_gaussian", "gaussian_nll"]


@pytest.mark.parametrize(("metric", "num_arguments"), REGRESSION, ids=REGRESSION_IDS)
@pytest.mark.parametrize("convert", [torch.tensor, np.array, list], ids=["tensor", "numpy", "list"])
def test_regression_metrics_return_scalars(metric, num_arguments, convert) -> None:
    result = metric(*([convert([1.0, 2.0])] * num_arguments))
    assert isinstance(result, Tensor)
    assert result.shape == ()


@pytest.mark.parametrize("metric", CLASSIFICATION[:-1])
@pytest.mark.parametrize("convert", [torch.tensor, np.array, list], ids=["tensor", "numpy", "list"])
def test_classification_metrics_return_scalars(metric, convert) -> None:
    result = metric(convert(PROBS), convert(LABELS))
    assert isinstance(result, Tensor)
    assert result.shape == ()


@pytest.mark.parametrize(
    ("given_dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.int64, torch.int32), torch.float64),
        ((torch.int16, torch.bool), torch.float32),
    ],
)
def test_precision_is_the_widest_and_at_least_single(given_dtypes, expected) -> None:
    mean, target = (torch.ones(2, dtype=dtype) for dtype in given_dtypes)
    assert metrics.root_mean_squared_error(mean, target).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_probabilities_are_accepted(dtype: torch.dtype) -> None:
    probs = torch.softmax(torch.randn(500, 100, generator=torch.Generator().manual_seed(0)), -1).to(dtype)
    labels = torch.zeros(500, dtype=torch.uint8)
    assert metrics.categorical_nll(probs, labels).dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16, np.int64])
def test_labels_of_any_integer_dtype(dtype) -> None:
    assert metrics.categorical_nll(PROBS, np.array(LABELS, dtype=dtype)).item() == pytest.approx(-math.log(0.375) / 2)


def test_read_only_and_reversed_arrays() -> None:
    values = np.arange(3.0)
    values.flags.writeable = False
    assert metrics.root_mean_squared_error(values, values[::-1]).item() == pytest.approx(math.sqrt(8 / 3))


def test_arguments_stay_as_they_were() -> None:
    samples, target = torch.tensor([3.0, 1.0, 2.0]), torch.tensor(0.0)
    metrics.crps_samples(samples, target)
    assert samples.tolist() == [3, 1, 2]


@pytest.mark.parametrize(("metric", "num_arguments"), REGRESSION, ids=REGRESSION_IDS)
def test_regression_metrics_refuse(metric, num_arguments) -> None:
    good = [torch.ones(3)] * (num_arguments - 1)
    for wrong in (torch.ones(3, 1), torch.ones(1), torch.tensor(1.0), torch.ones(4)):
        with pytest.raises(ArgumentError, match="Shapes differ"):
            metric(*good, wrong)
    with pytest.raises(ArgumentError, match="NaN"):
        metric(*good, torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ArgumentError, match="real numbers"):
        metric(*good, torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ArgumentError, match="empty"):
        metric(*([[]] * num_arguments))
    with pytest.raises(ArgumentError, match="is no tensor"):
        metric(*good, None)


@pytest.mark.parametrize(
    "metric", [metrics.coverage, lambda *args: metrics.interval_score(*args, level=0.5)], ids=["coverage", "score"]
)
def test_intervals_refuse_swapped_ends(metric) -> None:
    with pytest.raises(ArgumentError, match="swapped"):
        metric([0.0, 1.0], [1.0, 0.0], [0.5, 0.5])
    with pytest.raises(ArgumentError, match="swapped"):
        metrics.sharpness([1.0], [0.0])


@pytest.mark.parametrize("level", [-0.1, 1.0, math.nan])
def test_interval_score_refuses_level(level: float) -> None:
    with pytest.raises(ArgumentError, match="level"):
        metrics.interval_score([0.0], [1.0], [0.5], level)


def test_crps_refuses() -> None:
    with pytest.raises(ArgumentError, match="stddev has a negative entry, -1"):
        metrics.crps_gaussian([0.0], [-1.0], [0.0])
    for samples, target in [((4, 3), (3, 1)), ((4, 3), (4,)), ((3,), (3,)), ((), ())]:
        with pytest.raises(ArgumentError, match="samples has shape"):
            metrics.crps_samples(torch.ones(samples), torch.ones(target))
    with pytest.raises(ArgumentError, match="samples is empty"):
        metrics.crps_samples(torch.ones(0, 3), torch.ones(3))


@pytest.mark.parametrize("metric", CLASSIFICATION)
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (PROBS, [[1], [0]], r"labels \(2, 1\)"),
        (PROBS, [1], r"labels \(1,\)"),
        ([0.5, 0.5], LABELS, r"probs has shape \(2,\)"),
        (PROBS, [1.0, 0.0], "integer dtype"),
        (PROBS, [True, False], "integer dtype"),
        (PROBS, [2, 0], r"labels range from 0 to 2. Allowed: 0 to 1"),
        (PROBS, [-1, 0], r"labels range from -1 to 0"),
        ([[0.5, 0.4], [0.5, 0.5]], LABELS, "sums to 0.9"),
        ([[0.5, 0.5], [1.0, 0.5]], LABELS, "sums to 1.5"),
        ([[1.5, -0.5], [0.5, 0.5]], LABELS, "probs has an entry -0.5"),
        ([[math.nan, 1.0], [0.5, 0.5]], LABELS, "NaN"),
        ([[math.inf, 1.0], [0.5, 0.5]], LABELS, "sums to inf"),
        (torch.ones(0, 2), torch.ones(0, dtype=torch.int64), "empty"),
        (torch.ones(2, 0), LABELS, "empty"),
    ],
)
def test_classification_metrics_refuse(metric, probs, labels, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        metric(probs, labels)


def test_calibration_refuses_options() -> None:
    for metric in (metrics.expected_calibration_error, metrics.reliability_curve):
        with pytest.raises(ArgumentError, match="num_bins"):
            metric(PROBS, LABELS, num_bins=0)
        with pytest.raises(ArgumentError, match="scheme"):
            metric(PROBS, LABELS, scheme="height")
