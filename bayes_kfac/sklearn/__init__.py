"""scikit-learn estimators: multilayer perceptrons with a posterior over their weights.

``import sklearn`` inside this package is the library's; the package itself is ``bayes_kfac.sklearn``.
"""

from __future__ import annotations

from bayes_kfac.sklearn.classifier import BayesianMLPClassifier
from bayes_kfac.sklearn.regressor import BayesianMLPRegressor

__all__ = ["BayesianMLPClassifier", "BayesianMLPRegressor"]
