"""Metrics against scikit-learn, SciPy, plain-Python loops and brute force."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, stats
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError

finite = st.floats(-1e3, 1e3)
seeds = st.integers(0, 2**32 - 1)


def random_classification(seed: int, n: int, num_classes: int, *, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities in float64, rounded to make confidences tie if ``decimals`` is given, and labels."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64), -1)
    if decimals is not None:
        probs = probs.round(decimals=decimals)
        probs[:, -1] += 1 - probs.sum(-1)
        probs = probs.clamp(min=0)
        probs /= probs.sum(-1, keepdim=True)
    labels = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return probs, labels


def bins_by_loop(probs: Tensor, labels: Tensor, num_bins: int, scheme: str) -> list[tuple[float, float, int]]:
    """Reference: (confidence, accuracy, count) of the non-empty bins, one example at a time."""
    examples = []
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        predicted = max(range(len(row)), key=row.__getitem__)
        examples.append((row[predicted], predicted == label))
    examples.sort()
    n = len(examples)
    if scheme == "width":
        uppers = [i / num_bins for i in range(1, num_bins)]
    else:
        uppers = [examples[math.ceil(i * n / num_bins) - 1][0] for i in range(1, num_bins)]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for confidence, correct in examples:
        index = 0
        while index < num_bins - 1 and confidence > uppers[index]:
            index += 1
        bins[index].append((confidence, correct))
    return [
        (sum(c for c, _ in members) / len(members), sum(hit for _, hit in members) / len(members), len(members))
        for members in bins
        if members
    ]


def crps_by_pairs(samples: np.ndarray, target: float) -> float:
    """Reference: the energy form with all pairs."""
    return float(np.abs(samples - target).mean() - np.abs(samples[:, None] - samples[None, :]).mean() / 2)


# Point predictions and intervals


def test_root_mean_squared_error() -> None:
    assert metrics.root_mean_squared_error([1.0, 2.0, 5.0], [1.0, 0.0, 4.0]).item() == pytest.approx(math.sqrt(5 / 3))


def test_coverage_includes_boundaries() -> None:
    lower, upper = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert metrics.coverage(lower, upper, [0.0, 1.0, 0.5, 1.1]).item() == pytest.approx(0.75)


def test_coverage_takes_infinite_ends() -> None:
    assert metrics.coverage([-math.inf, 0.0], [0.0, math.inf], [-1e30, 1e30]).item() == 1


def test_sharpness() -> None:
    assert metrics.sharpness([0.0, -1.0], [1.0, 2.0]).item() == pytest.approx(2)


def test_interval_score_by_hand() -> None:
    # Width 2 each; a miss costs 2 / 0.1 = 20 times its distance, below as well as above.
    score = metrics.interval_score([0.0] * 3, [2.0] * 3, [1.0, -0.5, 2.25], level=0.9)
    assert score.item() == pytest.approx((2 + (2 + 10) + (2 + 5)) / 3)


@given(seed=seeds, level=st.floats(0, 0.99))
@settings(deadline=None, max_examples=30)
def test_interval_score_against_loop(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.normal(size=(20, 2)), axis=1)
    target = rng.normal(size=20) * 2
    expected = 0.0
    for (lower, upper), y in zip(ends, target, strict=True):
        expected += upper - lower
        if y < lower:
            expected += 2 / (1 - level) * (lower - y)
        if y > upper:
            expected += 2 / (1 - level) * (y - upper)
    score = metrics.interval_score(ends[:, 0], ends[:, 1], target, level)
    assert score.item() == pytest.approx(expected / 20)


def test_interval_score_is_least_at_true_quantiles() -> None:
    level = 0.8
    # A fine grid of quantiles stands for the population.
    target = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)

    def score(half_width: float, shift: float = 0.0) -> float:
        lower, upper = np.full_like(target, shift - half_width), np.full_like(target, shift + half_width)
        return metrics.interval_score(lower, upper, target, level).item()

    best = stats.norm.ppf((1 + level) / 2)
    for half_width, shift in [(0.95 * best, 0), (1.05 * best, 0), (best, 0.1), (best, -0.1)]:
        assert score(best) < score(half_width, shift)


# Classification


@given(seed=seeds, n=st.integers(2, 60), num_classes=st.integers(2, 6))
@settings(deadline=None, max_examples=40)
def test_classification_against_sklearn(seed: int, n: int, num_classes: int) -> None:
    probs, labels = random_classification(seed, n, num_classes)
    nll = log_loss(labels, probs, labels=range(num_classes))
    assert metrics.categorical_nll(probs, labels).item() == pytest.approx(nll, rel=1e-12)
    accuracy = accuracy_score(labels, probs.argmax(-1))
    assert metrics.accuracy(probs, labels).item() == pytest.approx(accuracy, rel=1e-12)
    brier = np.square(probs.numpy() - np.eye(num_classes)[labels]).sum(1).mean()
    assert metrics.brier_score(probs, labels).item() == pytest.approx(brier, rel=1e-12)


@given(seed=seeds, n=st.integers(2, 60))
@settings(deadline=None, max_examples=20)
def test_brier_is_twice_the_binary_one_of_sklearn(seed: int, n: int) -> None:
    probs, labels = random_classification(seed, n, 2)
    expected = 2 * brier_score_loss(labels, probs[:, 1], pos_label=1)
    assert metrics.brier_score(probs, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nll_of_impossible_label_is_finite(dtype: torch.dtype) -> None:
    nll = metrics.categorical_nll(torch.tensor([[1, 0]], dtype=dtype), [1])
    assert nll.dtype == dtype
    assert nll.item() == pytest.approx(-math.log(torch.finfo(dtype).tiny))


@pytest.mark.parametrize("scheme", ["width", "mass"])
@given(
    seed=seeds,
    n=st.integers(1, 200),
    num_classes=st.integers(1, 5),
    num_bins=st.integers(1, 25),
    decimals=st.sampled_from([None, 1, 2]),
)
@settings(deadline=None, max_examples=60)
def test_calibration_against_loop(
    scheme: str, seed: int, n: int, num_classes: int, num_bins: int, decimals: int | None
) -> None:
    probs, labels = random_classification(seed, n, num_classes, decimals=decimals)
    expected = bins_by_loop(probs, labels, num_bins, scheme)
    curve = metrics.reliability_curve(probs, labels, num_bins, scheme)
    assert curve.count.tolist() == [count for _, _, count in expected]
    assert curve.confidence.tolist() == pytest.approx([confidence for confidence, _, _ in expected])
    assert curve.accuracy.tolist() == pytest.approx([accuracy for _, accuracy, _ in expected])
    error = sum(count / n * abs(accuracy - confidence) for confidence, accuracy, count in expected)
    result = metrics.expected_calibration_error(probs, labels, num_bins, scheme)
    assert result.item() == pytest.approx(error, abs=1e-12)


@given(n=st.integers(1, 60), num_bins=st.integers(1, 20), seed=seeds, scheme=st.sampled_from(["width", "mass"]))
@settings(deadline=None, max_examples=30)
def test_calibration_ignores_order(n: int, num_bins: int, seed: int, scheme: str) -> None:
    probs, labels = random_classification(seed, n, 3, decimals=1)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    once = metrics.expected_calibration_error(probs, labels, num_bins, scheme)
    again = metrics.expected_calibration_error(probs[order], labels[order], num_bins, scheme)
    assert once.item() == pytest.approx(again.item(), abs=1e-12)


def test_width_bins_are_closed_on_the_right() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.61, 0.39], [0.8, 0.2], [1.0, 0.0]])
    assert metrics.reliability_curve(probs, [0, 0, 0, 0], num_bins=5).count.tolist() == [1, 2, 1]


def test_mass_bins_hold_equal_numbers() -> None:
    probs, labels = random_classification(0, 103, 4)
    count = metrics.reliability_curve(probs, labels, 10, scheme="mass").count
    assert len(count) == 10
    assert set(count.tolist()) == {10, 11}


def test_ece_of_certain_predictions() -> None:
    probs = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert metrics.expected_calibration_error(probs, [0, 0, 1, 1]).item() == 0
    assert metrics.expected_calibration_error(probs, [1, 1, 0, 0]).item() == 1


def test_ece_in_float32_stays_accurate_for_many_examples() -> None:
    probs = torch.tensor([[0.9, 0.1]]).repeat(2_000_000, 1)
    labels = torch.zeros(len(probs), dtype=torch.int64)
    assert metrics.expected_calibration_error(probs, labels).item() == pytest.approx(0.1, abs=1e-6)


# Continuous ranked probability score


@pytest.mark.parametrize(("mean", "stddev", "target"), [(0, 1, 0), (1, 2, -0.5), (-3, 0.2, -2), (10, 5, 0)])
def test_crps_gaussian_against_integral(mean: float, stddev: float, target: float) -> None:
    distribution = stats.norm(mean, stddev)
    below, _ = integrate.quad(lambda v: distribution.cdf(v) ** 2, mean - 12 * stddev, target)
    above, _ = integrate.quad(lambda v: distribution.sf(v) ** 2, target, mean + 12 * stddev)
    result = metrics.crps_gaussian(*(np.array([v], dtype=np.float64) for v in (mean, stddev, target)))
    assert result.item() == pytest.approx(below + above, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crps_gaussian_without_spread_is_absolute_error(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, dtype=dtype)
    assert metrics.crps_gaussian(zero, zero, torch.tensor([0, 2, -4], dtype=dtype)).item() == pytest.approx(2)


@given(
    samples=hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=1, max_side=30), elements=finite),
    target=finite,
)
@settings(deadline=None, max_examples=100)
def test_crps_samples_against_pairs(samples: np.ndarray, target: float) -> None:
    # A plain Python float would be rounded to float32 first.
    result = metrics.crps_samples(samples, np.float64(target))
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(crps_by_pairs(samples, target), rel=1e-9, abs=1e-9)


def test_crps_samples_averages_over_targets() -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(40, 5, 2)), rng.normal(size=(5, 2))
    expected = np.mean(
        [crps_by_pairs(samples[:, i, j], target[i, j]) for i, j in itertools.product(range(5), range(2))]
    )
    assert metrics.crps_samples(samples, target).item() == pytest.approx(expected)


def test_crps_of_one_sample_is_absolute_error() -> None:
    assert metrics.crps_samples([[1.0, 5.0]], [2.0, 2.0]).item() == pytest.approx(2)


def test_crps_samples_tends_to_gaussian() -> None:
    samples = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000, loc=1, scale=2)
    gaussian = metrics.crps_gaussian(1.0, 2.0, 2.5)
    assert metrics.crps_samples(samples, 2.5).item() == pytest.approx(gaussian.item(), rel=1e-3)


def test_crps_samples_keeps_digits_under_a_large_offset() -> None:
    # All numbers are multiples of 1/8 near 1e6, exact in float32, so only the algorithm could lose digits.
    samples = torch.arange(64, dtype=torch.float32) / 8
    near = metrics.crps_samples(samples, torch.tensor(3.0))
    far = metrics.crps_samples(samples + 1e6, torch.tensor(3.0 + 1e6))
    assert far.item() == pytest.approx(near.item(), rel=1e-6)


def test_crps_is_differentiable() -> None:
    samples = torch.randn(6, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: metrics.crps_samples(s, target), samples)
    mean = samples[0].detach().requires_grad_()
    stddev = samples[1].detach().exp().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: metrics.crps_gaussian(m, s, target), (mean, stddev))


# What goes in and what comes out

PROBS = [[0.25, 0.75], [0.5, 0.5]]
LABELS = [1, 0]
CLASSIFICATION = [
    metrics.accuracy,
    metrics.categorical_nll,
    metrics.brier_score,
    metrics.expected_calibration_error,
    metrics.reliability_curve,
]
REGRESSION = [
    (metrics.root_mean_squared_error, 2),
    (metrics.coverage, 3),
    (metrics.sharpness, 2),
    (lambda *args: metrics.interval_score(*args, level=0.9), 3),
    (metrics.crps_gaussian, 3),
]
REGRESSION_IDS = ["rmse", "coverage", "sharpness", "interval_score", "crps_gaussian"]


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
        ((torch.int64, torch.int32), torch.float32),
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
