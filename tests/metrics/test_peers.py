"""The same numbers as torchmetrics and uncertainty-toolbox; where they mean something else, the test says what."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_kfac import metrics
from tests.metrics.data import random_classification

toolbox = pytest.importorskip("uncertainty_toolbox")
requirements = pytest.importorskip("lightning_utilities.core.imports").RequirementCache
is_met = requirements.__bool__
# The image metrics of torchmetrics import torchvision where it is there, and all metrics fail where it is of another
# build than torch. None of it is needed here.
with mock.patch.object(requirements, "__bool__", lambda own: "torchvision" not in own.requirement and is_met(own)):
    functional = pytest.importorskip("torchmetrics.functional")

N = 400


@pytest.fixture
def regression() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and target; the standard deviations are too small, the means biased."""
    rng = np.random.default_rng(0)
    mean, stddev = rng.normal(size=N), np.exp(rng.normal(size=N) / 3)
    return mean, stddev, mean + 0.3 + 1.4 * stddev * rng.normal(size=N)


@pytest.fixture
def classification() -> tuple[Tensor, Tensor]:
    probs, labels = random_classification(0, N, 5)
    return probs.square() / probs.square().sum(-1, keepdim=True), labels  # overconfident


@pytest.mark.parametrize(("norm", "metric"), [("l1", "expected"), ("max", "maximum")])
@pytest.mark.parametrize("num_bins", [5, 15])
def test_calibration_error_of_torchmetrics(classification, norm: str, metric: str, num_bins: int) -> None:
    """Its bins are open on the right and ours on the left: no confidence is an edge here. It sums in float32."""
    expected = functional.classification.multiclass_calibration_error(*classification, 5, n_bins=num_bins, norm=norm)
    own = getattr(metrics, f"{metric}_calibration_error")(*classification, num_bins)
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


def test_classwise_calibration_error_is_the_mean_of_binary_ones_of_torchmetrics(classification) -> None:
    probs, labels = classification
    binary = [
        functional.classification.binary_calibration_error(probs[:, index].clone(), (labels == index).long(), n_bins=15)
        for index in range(5)
    ]
    own = metrics.classwise_calibration_error(probs, labels)
    assert own.item() == pytest.approx(torch.stack(binary).mean().item(), rel=1e-5)


def test_detection_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = (torch.randn(70, generator=generator) + 1).round(decimals=1)
    negative = torch.randn(90, generator=generator).round(decimals=1)
    scores, labels = torch.cat([positive, negative]).sigmoid(), torch.cat([torch.ones(70), torch.zeros(90)]).long()
    auroc = functional.classification.binary_auroc(scores, labels)
    precision = functional.classification.binary_average_precision(scores, labels)
    assert metrics.auroc(positive, negative).item() == pytest.approx(auroc.item(), rel=1e-6)
    assert metrics.average_precision(positive, negative).item() == pytest.approx(precision.item(), rel=1e-6)


def test_gaussian_scores_of_uncertainty_toolbox(regression) -> None:
    mean, stddev, target = regression
    crps = toolbox.metrics_scoring_rule.crps_gaussian(mean, stddev, target)
    assert metrics.crps_gaussian(mean, stddev, target).item() == pytest.approx(crps, rel=1e-10)
    nll = toolbox.metrics_scoring_rule.nll_gaussian(mean, stddev, target)
    assert metrics.gaussian_nll(mean, stddev, target).item() == pytest.approx(nll, rel=1e-10)


def test_interval_score_of_uncertainty_toolbox_is_ours_averaged_over_levels(regression) -> None:
    mean, stddev, target = regression
    levels = np.linspace(0.01, 0.99, 99)
    expected = toolbox.metrics_scoring_rule.interval_score(mean, stddev, target)
    z = [torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item() for level in levels]
    own = [
        metrics.interval_score(mean - z_level * stddev, mean + z_level * stddev, target, level).item()
        for z_level, level in zip(z, levels, strict=True)
    ]
    assert np.mean(own) == pytest.approx(expected, rel=1e-10)


def test_coverage_of_uncertainty_toolbox(regression) -> None:
    mean, stddev, target = regression
    z = torch.special.ndtri(torch.tensor(0.9, dtype=torch.float64)).item()
    expected = toolbox.metrics_calibration.get_proportion_in_interval(mean, stddev, target, 0.8)
    assert metrics.coverage(mean - z * stddev, mean + z * stddev, target).item() == pytest.approx(expected)


def test_sharpness_of_uncertainty_toolbox_is_another_number(regression) -> None:
    """It is the root mean square of the standard deviations, and not the width of an interval."""
    mean, stddev, _ = regression
    stddev = np.full_like(stddev, 0.7)
    z = torch.special.ndtri(torch.tensor(0.95, dtype=torch.float64)).item()
    width = metrics.sharpness(mean - z * stddev, mean + z * stddev).item()
    assert width == pytest.approx(2 * z * toolbox.metrics_calibration.sharpness(stddev), rel=1e-10)


@pytest.mark.parametrize("kind", ["interval", "quantile"])
def test_miscalibration_area_of_uncertainty_toolbox(regression, kind: str) -> None:
    """It integrates over a grid of levels, which comes within its spacing of the exact area.

    Its "quantile" counts the residuals mean − target instead of target − mean: the area of the reflected curve, which
    is the same.
    """
    expected = toolbox.metrics_calibration.miscalibration_area(*regression, num_bins=4001, prop_type=kind)
    own = metrics.miscalibration_area(metrics.pit_gaussian(*regression), kind)
    assert own.item() == pytest.approx(expected, abs=1 / 4000)
    assert own.item() > 0.03


def test_root_mean_squared_error_of_torchmetrics(regression) -> None:
    mean, _, target = (torch.as_tensor(array) for array in regression)
    expected = functional.mean_squared_error(mean, target, squared=False)
    assert metrics.root_mean_squared_error(mean, target).item() == pytest.approx(expected.item(), rel=1e-10)


def test_crps_of_torchmetrics() -> None:
    """It takes samples last, and divides the pairs by S²: the score of the empirical distribution, as ours."""
    generator = torch.Generator().manual_seed(0)
    samples, target = torch.randn(20, 30, generator=generator), torch.randn(30, generator=generator)
    crps = functional.regression.continuous_ranked_probability_score
    expected = crps(samples.mT.contiguous(), target)
    assert metrics.crps_samples(samples, target).item() == pytest.approx(expected.item(), rel=1e-5)
