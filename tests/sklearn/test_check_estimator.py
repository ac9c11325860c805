"""scikit-learn's own suite: every check passes, none is expected to fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import check_estimator

from bayes_kfac.sklearn import BayesianMLPClassifier, BayesianMLPRegressor

#: As small as still learns what some checks ask for.
OPTIONS = {"hidden_layer_sizes": (4,), "max_iter": 2, "learning_rate_init": 0.2, "batch_size": 8}


@pytest.mark.filterwarnings("ignore", category=SkipTestWarning)  # of the array API, which is below
@pytest.mark.parametrize("method", ["laplace", "noisy"])
@pytest.mark.parametrize("kind", [BayesianMLPRegressor, BayesianMLPClassifier])
def test_every_check_passes(kind, method):
    check_estimator(kind(method=method, **OPTIONS))


ARRAY_API = """
from sklearn.utils.estimator_checks import check_array_api_input
from bayes_kfac.sklearn import BayesianMLPClassifier, BayesianMLPRegressor
for kind in (BayesianMLPRegressor, BayesianMLPClassifier):
    check_array_api_input(kind.__name__, kind(max_iter=2), "numpy", expect_only_array_outputs=False)
"""


def test_array_api_dispatch_changes_nothing():
    """It needs a variable that is read when scipy is first imported."""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ARRAY_API], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
