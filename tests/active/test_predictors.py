"""Predictors that are no posteriors: scikit-learn's, committees, and objects with ``predict``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import BayesianRidge, LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import bayes_kfac as bk
from bayes_kfac.active import (
    BALD,
    EPIG,
    BatchBALD,
    Committee,
    Entropy,
    LeastConfidence,
    Margin,
    Random,
    ThompsonSampling,
    Variance,
    VariationRatio,
)
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.prediction import CategoricalPrediction
from tests.active.pools import SOURCE, classes, pool, posterior, regression
from tests.helpers import TIGHT, randn

X = pool(40).numpy()
LABELS = np.digitize(X[:, 0], [-0.5, 0.5])
VALUES = X @ np.array([1.0, -1.0, 0.5])


def scores(acquisition, predictor, inputs=None) -> Tensor:
    return acquisition.scores(acquisition.look(predictor, pool() if inputs is None else inputs))


def test_a_classifier_gives_its_mean_probabilities():
    classifier = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, LABELS)
    probs = torch.from_numpy(classifier.predict_proba(pool().numpy()))
    assert_close(scores(Entropy(), classifier), torch.special.entr(probs).sum(1), **TIGHT)
    assert_close(scores(LeastConfidence(), classifier), 1 - probs.amax(1), **TIGHT)
    assert_close(scores(Margin(), classifier, DataLoader(pool(), batch_size=5)), scores(Margin(), classifier), **TIGHT)


# without an optimizer, which on some machines ends at the bounds of the kernel, and warns
@pytest.mark.parametrize("regressor", [GaussianProcessRegressor(optimizer=None), BayesianRidge()], ids=repr)
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_a_regressor_with_stddev_gives_its_variance(regressor, in_pipeline):
    regressor = make_pipeline(StandardScaler(), regressor) if in_pipeline else regressor
    regressor.fit(X, VALUES)
    expected = torch.from_numpy(regressor.predict(pool().numpy(), return_std=True)[1] ** 2)
    assert_close(scores(Variance(), regressor), expected, **TIGHT)


@pytest.mark.parametrize("acquisition", [BALD(), VariationRatio(), BatchBALD(), EPIG(), Variance()], ids=repr)
def test_what_a_plain_classifier_does_not_know_is_said(acquisition):
    classifier = LogisticRegression().fit(X, LABELS)
    with pytest.raises(UsageError, match=r"which predict_proba does not tell.*Committee"):
        scores(acquisition, classifier)


def test_what_a_plain_regressor_does_not_know_is_said():
    regressor = LinearRegression().fit(X, VALUES)
    with pytest.raises(UsageError, match=r"Variance needs epistemic_variance, which predict alone.*predict_proba"):
        scores(Variance(), regressor)
    with pytest.raises(UsageError, match="BALD needs mutual_information, which a mean and a standard deviation"):
        scores(BALD(), BayesianRidge().fit(X, VALUES))
    assert scores(Random(), regressor).shape == (12,)


def test_the_trees_of_a_forest_are_a_committee():
    forest = RandomForestClassifier(10, max_depth=3, random_state=0).fit(X, LABELS)
    committee = Committee(forest.estimators_)
    probs = torch.stack([torch.from_numpy(tree.predict_proba(pool().numpy())) for tree in forest.estimators_])
    expected = CategoricalPrediction(probs.log(), SOURCE)
    for acquisition in (Entropy(), BALD(), Margin(), LeastConfidence(), VariationRatio(), Variance(), BatchBALD()):
        look = acquisition.look(committee, pool())
        if isinstance(acquisition, BatchBALD):
            assert acquisition.select(look, 3).shape == (3,)
        else:
            assert_close(acquisition.scores(look), acquisition.scores(expected), **TIGHT)
    loader = DataLoader(pool(), batch_size=5)
    assert_close(scores(BatchBALD(), committee, loader), scores(BatchBALD(), committee), **TIGHT)
    assert scores(EPIG(pool(3)), committee).shape == (12,)


def test_regressors_on_a_committee_disagree_in_their_means():
    forest = RandomForestRegressor(10, random_state=0).fit(X, VALUES)
    means = np.stack([tree.predict(pool().numpy()) for tree in forest.estimators_])
    assert_close(scores(Variance(), Committee(forest.estimators_)), torch.from_numpy(means.var(0)), **TIGHT)


def test_committees_that_cannot_vote_are_refused():
    with pytest.raises(ArgumentError, match="two models or more"):
        Committee([LogisticRegression()])
    two = LogisticRegression().fit(X, LABELS > 0)
    with pytest.raises(ArgumentError, match=r"members predict \[2, 3\] classes"):
        Committee([two, LogisticRegression().fit(X, LABELS)]).predict(X)
    with pytest.raises(ArgumentError, match=r"different classes: \[.*2.*\] and \[.*True.*\]"):
        Committee([two, LogisticRegression().fit(X, 2 * (LABELS > 0))]).predict(X)


@pytest.mark.parametrize(
    "members", [[LogisticRegression(), LinearRegression()], [nn.Linear(3, 1)] * 2, [regression(), regression()]]
)
def test_members_are_all_classifiers_or_all_regressors(members):
    names = r"(Linear|LinearRegression, LogisticRegression|Posterior)"
    with pytest.raises(ArgumentError, match=rf"members hold {names}\. Allowed: models that all have predict_proba"):
        Committee(members)


@pytest.mark.parametrize("acquisition", [Entropy(), BatchBALD()], ids=repr)
def test_a_posterior_takes_no_data_frame(acquisition):
    with pytest.raises(ArgumentError, match=r"inputs are a DataFrame.*frame\.to_numpy\(\)"):
        scores(acquisition, posterior(), pd.DataFrame(X))


def test_logits_are_no_probabilities():
    class Network:
        def predict_proba(self, inputs: Tensor) -> Tensor:
            return randn(len(inputs), 2, seed=0)

    with pytest.raises(ArgumentError, match="Take the softmax of logits"):
        scores(Entropy(), Network())


def test_any_object_whose_prediction_has_the_attribute():
    @dataclass
    class Known:
        mutual_information: Tensor

    class Predictor:
        def predict(self, inputs: Tensor) -> Known:
            return Known(inputs[:, 0] ** 2)

    assert_close(scores(BALD(), Predictor()), pool()[:, 0] ** 2)


def test_any_object_whose_predict_takes_every_keyword():
    """And so ``return_std=True``, of which it makes nothing."""

    @dataclass
    class Known:
        epistemic_variance: Tensor

    class Predictor:
        def __init__(self, kind) -> None:
            self.kind = kind

        def predict(self, inputs: Tensor, **options):
            return self.kind(inputs[:, 0] ** 2)

    assert_close(scores(Variance(), Predictor(Known)), pool()[:, 0] ** 2)
    for kind in (torch.as_tensor, np.asarray):
        assert scores(Random(), Predictor(kind)).shape == (12,)
        with pytest.raises(UsageError, match="Variance needs epistemic_variance, which predict alone"):
            scores(Variance(), Predictor(kind))


def test_a_wrapper_that_does_not_pass_standard_deviations_on():
    """It takes ``return_std=True`` for the regressor inside, and breaks on the pair that comes back."""
    regressor = TransformedTargetRegressor(GaussianProcessRegressor(optimizer=None)).fit(X, VALUES)
    assert scores(Random(), regressor).shape == (12,)
    with pytest.raises(UsageError, match="Variance needs epistemic_variance, which predict alone"):
        scores(Variance(), regressor)


def test_an_estimator_that_gives_distributions_knows_everything_about_each_example_and_nothing_joint():
    class Estimator(LogisticRegression):
        def predict_distribution(self, inputs):
            assert isinstance(inputs, np.ndarray)
            return classes(5, len(inputs), 3)

    estimator = Estimator().fit(X, LABELS)
    assert_close(scores(BALD(), estimator), classes(5, 12, 3).mutual_information)
    with pytest.raises(UsageError, match="a distribution of its own"):
        BatchBALD().look(estimator, pool())


def test_an_error_of_the_predictor_is_its_own():
    class Broken:
        def predict(self, inputs):
            raise TypeError("not my type")

    with pytest.raises(TypeError, match="not my type"):
        scores(Variance(), Broken())


ACQUISITIONS = [Entropy(), BatchBALD(), BALD(), EPIG(), Random(), ThompsonSampling("maximize")]


@pytest.mark.parametrize("acquisition", ACQUISITIONS, ids=lambda own: type(own).__name__)
def test_a_loader_of_another_order_is_refused(acquisition):
    """Its indices would be of other examples than the data set's."""
    x, net = pool(), regression() if isinstance(acquisition, ThompsonSampling) else posterior()
    for options, given in [
        ({"shuffle": True}, "shuffle=True"),
        ({"sampler": SubsetRandomSampler(range(6))}, r"sampler=SubsetRandomSampler\(\.\.\.\)"),
        ({"sampler": WeightedRandomSampler(torch.ones(12), 12)}, r"sampler=WeightedRandomSampler\(\.\.\.\)"),
        ({"batch_sampler": BatchSampler(RandomSampler(x), 5, False)}, "shuffle=True"),
        ({"batch_sampler": [[3, 4], [0, 1]]}, r"batch_sampler=list\(\.\.\.\)"),
    ]:
        with pytest.raises(ArgumentError, match=rf"inputs=DataLoader\({given}\).*index means nothing.*Subset\("):
            scores(acquisition, net, DataLoader(x, **options))
    with pytest.raises(ArgumentError, match=r"inputs=DataLoader\(drop_last=True\) leaves examples out.*Subset\("):
        scores(acquisition, net, DataLoader(x, batch_size=5, drop_last=True))


@pytest.mark.parametrize("acquisition", ACQUISITIONS, ids=lambda own: type(own).__name__)
def test_a_loader_in_order_is_looked_at_as_it_yields(acquisition):
    """A score for each example, whoever makes the batches."""

    class Streamed(IterableDataset):
        def __iter__(self):
            yield from pool()

    x, net = pool(), regression() if isinstance(acquisition, ThompsonSampling) else posterior()
    batches = BatchSampler(SequentialSampler(x), 5, False)
    assert scores(acquisition, net, DataLoader(x, batch_sampler=batches)).shape == (12,)
    for loader in (DataLoader(Streamed(), batch_size=5), DataLoader([x[:4], x[4:]], batch_size=None)):
        if isinstance(acquisition, EPIG):  # whose targets are drawn by index
            with pytest.raises(ArgumentError, match=r"target_inputs=None.*Pass target_inputs="):
                scores(acquisition, net, loader)
        else:
            assert scores(acquisition, net, loader).shape == (12,)


@pytest.mark.parametrize("acquisition", [Entropy(), BatchBALD(), BALD()], ids=lambda own: type(own).__name__)
def test_an_empty_loader_is_named(acquisition):
    with pytest.raises(ArgumentError, match="inputs=<DataLoader> yielded no example"):
        scores(acquisition, posterior(), DataLoader(pool()[:0]))


def test_random_counts_what_a_loader_makes_of_its_items():
    loader = DataLoader(pool(), batch_size=5, collate_fn=lambda rows: torch.stack(rows).repeat(2, 1))
    assert scores(Random(), None, loader).shape == scores(Entropy(), posterior(), loader).shape == (24,)


def test_what_is_no_predictor_is_refused():
    laplace = bk.Laplace(nn.Linear(3, 1), bk.likelihoods.Gaussian(1.0))
    with pytest.raises(ArgumentError, match=r"A Laplace has neither.*Return its \.posterior\(\)"):
        scores(Entropy(), laplace)
    with pytest.raises(ArgumentError, match="A float has neither predict nor predict_proba"):
        scores(Entropy(), 1.0)
    with pytest.raises(ArgumentError, match="method='sampling' is for predictions of a Posterior"):
        scores(Entropy(method="sampling"), LogisticRegression().fit(X, LABELS))
    several = RandomForestClassifier(3).fit(X, np.stack([LABELS, LABELS], 1))
    with pytest.raises(ArgumentError, match="one target for each example"):
        scores(Entropy(), several)


def test_committee_of_torch_models():
    class Member:
        def __init__(self, seed: int) -> None:
            self.weights = randn(3, 4, seed=seed)

        def predict_proba(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.weights).softmax(-1)

    assert scores(BALD(), Committee([Member(seed) for seed in range(5)])).min() >= 0
