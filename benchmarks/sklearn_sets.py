"""The scikit-learn estimators with their defaults on scikit-learn's own data sets, beside scikit-learn's estimators.

``python benchmarks/sklearn_sets.py`` goes through five folds of each data set, writes
``benchmarks/results/sklearn/<data>.json`` and prints the tables of ``docs/sklearn.md``. A result that exists is shown;
delete it to take it anew. Peers get what a careful user would give them: standardised inputs (and targets), and a
Gaussian process an anisotropic kernel with noise. Nobody sees the test fold. Predictive densities of a regression that
has none (ridge has one; ``MLPRegressor`` has not) are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import keep
from scipy.stats import norm
from sklearn import datasets
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from uci import HERE, with_error

from bayes_kfac.sklearn import BayesianMLPClassifier, BayesianMLPRegressor

RESULTS = HERE / "results" / "sklearn"
FOLDS, SPLIT_SEED = 5, 1
REGRESSION = {
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
    "friedman1": lambda: datasets.make_friedman1(300, noise=1.0, random_state=0),
    "friedman2": lambda: datasets.make_friedman2(400, noise=50.0, random_state=0),
    "linear": lambda: datasets.make_regression(200, 10, n_informative=5, noise=20.0, random_state=0),
}
CLASSIFICATION = {
    "iris": lambda: datasets.load_iris(return_X_y=True),
    "wine": lambda: datasets.load_wine(return_X_y=True),
    "breast_cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "digits": lambda: datasets.load_digits(return_X_y=True),
}
TOO_MANY = 600  # training examples for a Gaussian process classifier, whose cost is cubic in them for each class


def estimators(name: str, num_training: int, num_features: int) -> dict[str, BaseEstimator]:
    """What is compared on a data set."""
    if name in REGRESSION:
        kernel = ConstantKernel(1.0) * RBF(np.ones(num_features), (1e-2, 1e4)) + WhiteKernel(0.5, (1e-6, 10.0))
        return {
            "BayesianMLPRegressor()": BayesianMLPRegressor(random_state=0),
            'BayesianMLPRegressor(method="noisy")': BayesianMLPRegressor(method="noisy", random_state=0),
            "MLPRegressor": MLPRegressor(max_iter=1000, random_state=0),
            "MLPRegressor, early stopping": MLPRegressor(max_iter=1000, early_stopping=True, random_state=0),
            "GaussianProcessRegressor": GaussianProcessRegressor(kernel, random_state=0),
            "BayesianRidge": BayesianRidge(),
        }
    found = {
        "BayesianMLPClassifier()": BayesianMLPClassifier(random_state=0),
        'BayesianMLPClassifier(method="noisy")': BayesianMLPClassifier(method="noisy", random_state=0),
        "MLPClassifier": MLPClassifier(max_iter=1000, random_state=0),
        "MLPClassifier, early stopping": MLPClassifier(max_iter=1000, early_stopping=True, random_state=0),
        "LogisticRegression": LogisticRegression(max_iter=1000),
    }
    if num_training <= TOO_MANY:
        found["GaussianProcessClassifier"] = GaussianProcessClassifier(
            ConstantKernel(1.0) * RBF(num_features**0.5), random_state=0
        )
    return found


def figures(
    model: BaseEstimator, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray
) -> dict[str, float]:
    """Test figures of one fold, in the targets' units, and the seconds that a processor worked on the fit."""
    is_ours = type(model).__module__.startswith("bayes_kfac")
    inputs, scale, location = x, 1.0, 0.0
    if not is_ours:
        inputs = StandardScaler().fit(x[train]).transform(x)
    targets = y
    if not is_classifier(model) and not is_ours:
        location, scale = y[train].mean(), y[train].std()
        targets = (y - location) / scale
    start = time.process_time()
    model.fit(inputs[train], targets[train])
    seconds = time.process_time() - start
    if is_classifier(model):
        probs = np.clip(model.predict_proba(inputs[test]), 1e-12, 1)
        index = np.searchsorted(model.classes_, y[test])
        hits = probs.argmax(1) == index
        confidence = probs.max(1)
        bins = np.minimum((confidence * 10).astype(int), 9)
        gaps = [abs((hits[bins == b] - confidence[bins == b]).sum()) for b in range(10)]
        return {
            "accuracy": float(hits.mean()),
            "log-likelihood": float(np.log(probs[np.arange(len(test)), index]).mean()),
            "ECE": float(sum(gaps) / len(test)),
            "seconds": seconds,
        }
    if isinstance(model, MLPRegressor):
        errors = model.predict(inputs[test]) * scale + location - y[test]
        return {"RMSE": float(np.sqrt((errors**2).mean())), "seconds": seconds}
    mean, std = model.predict(inputs[test], return_std=True)
    mean, std = mean * scale + location, std * scale
    errors = y[test] - mean
    return {
        "RMSE": float(np.sqrt((errors**2).mean())),
        "log-likelihood": float(norm.logpdf(errors, scale=std).mean()),
        "90 % coverage": float((np.abs(errors) <= norm.ppf(0.95) * std).mean()),
        "seconds": seconds,
    }


def measured(name: str, folds: int, *, smoke: bool) -> dict[str, list[dict[str, float]]]:
    """Figures of every estimator on each fold."""
    x, y = {**REGRESSION, **CLASSIFICATION}[name]()
    splitter = (StratifiedKFold if name in CLASSIFICATION else KFold)(FOLDS, shuffle=True, random_state=SPLIT_SEED)
    splits = list(splitter.split(x, y))[:folds]
    found: dict[str, list[dict[str, float]]] = {}
    for label, model in tqdm(estimators(name, len(splits[0][0]), x.shape[1]).items(), desc=name, unit="estimator"):
        if smoke and hasattr(model, "max_iter"):
            model.set_params(max_iter=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a kernel's bound, or of a budget
            found[label] = [figures(model, x, y, train, test) for train, test in splits]
    return found


def cell(rows: list[dict[str, float]], figure: str) -> str:
    """Mean ± standard error over folds; of seconds the median."""
    values = np.asarray([row.get(figure, math.nan) for row in rows])
    if np.isnan(values).any():
        return "–"
    if figure == "seconds":
        return f"{np.median(values):.1f}"
    return with_error(values, 1 if np.abs(values).mean() >= 10 else 3)


def show(name: str, result: dict[str, Any]) -> None:
    """Print a data set's table."""
    columns = next(iter(result["folds"].values()))[0].keys()
    print(f"\n| {name} | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for label, rows in result["folds"].items():
        print(f"| `{label}` | " + " | ".join(cell(rows, figure) for figure in columns) + " |")


def main() -> None:
    """Measure, where that was not done, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[*REGRESSION, *CLASSIFICATION])
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--smoke", action="store_true", help="little of everything; the result is not kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.data:
        path = arguments.results / f"{name}.json"
        if path.exists() and not arguments.smoke:
            show(name, json.loads(path.read_text()))
            continue
        result = {"folds": measured(name, arguments.folds, smoke=arguments.smoke), "split_seed": SPLIT_SEED}
        if not arguments.smoke:
            keep(path, result)
        show(name, result)


if __name__ == "__main__":
    main()
