"""The loop: what its states hold, how it ends, that it can be repeated and resumed to the bit, and what it refuses."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import BayesianRidge, LogisticRegression, SGDClassifier
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bayes_kfac as bk
from bayes_kfac.active import BALD, EPIG, BatchBALD, Committee, Labelled, LoopState, PowerBALD, Random, loop, stratified
from bayes_kfac.errors import ArgumentError, NonFiniteError, TargetError
from tests.helpers import randn

POOL = randn(40, 2, seed=0)
LABELS = (POOL[:, 0] > 0).long() + (POOL[:, 1] > 0.5).long()
VALUES = POOL[:, :1] ** 2 - POOL[:, 1:]
QUIET = {"progress": False}


def classify(data: Labelled, previous: bk.Posterior | None) -> bk.Posterior:
    """A Laplace posterior of a small network, in float64; from the last weights where there are any."""
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    if previous is not None:
        model.load_state_dict(dict(previous.mean))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return bk.Laplace(model, bk.likelihoods.Categorical()).fit(loader, progress=False).posterior()


def regress(data: Labelled, previous: bk.Posterior | None) -> bk.Posterior:
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loader = DataLoader(data, batch_size=8)
    likelihood = bk.likelihoods.Gaussian(torch.tensor(0.1, dtype=torch.float64))
    return bk.Laplace(model, likelihood).fit(loader, progress=False).posterior()


def ridge() -> BayesianRidge:
    return BayesianRidge()


def run(*args, **options) -> list[LoopState]:
    return list(loop(*args, **{**QUIET, **options}))


def assert_same(left: LoopState, right: LoopState) -> None:
    """The same state to the bit: choices, labels, scores and predictions."""
    assert (left.round, left.labelled.tolist(), left.chosen.tolist()) == (
        right.round,
        right.labelled.tolist(),
        right.chosen.tolist(),
    )
    assert torch.equal(left.data.targets, right.data.targets)
    assert (left.scores is None) == (right.scores is None)
    if left.scores is not None and right.scores is not None:
        assert torch.equal(left.scores.nan_to_num(), right.scores.nan_to_num())
    if isinstance(left.predictor, bk.Posterior):
        assert torch.equal(left.predictor.function_covariance(POOL[:5]), right.predictor.function_covariance(POOL[:5]))
    else:
        assert np.array_equal(left.predictor.predict(POOL.numpy()), right.predictor.predict(POOL.numpy()))


# -- what a state holds -----------------------------------------------------------------------------------------------


def test_states_tell_what_was_labelled_and_why():
    states = run(POOL, VALUES, "variance", ridge_of_column(), batch_size=3, initial=[5, 1, 7], rounds=4)
    assert [state.round for state in states] == [0, 1, 2, 3, 4]
    assert states[0].labelled.tolist() == [5, 1, 7]
    assert states[0].scores is None
    for before, state in itertools.pairwise(states):
        assert state.labelled.tolist() == [*before.labelled.tolist(), *state.chosen.tolist()]
        known = torch.zeros(40, dtype=torch.bool)
        known[before.labelled] = True
        assert torch.equal(state.scores.isnan(), known)
        assert torch.equal(state.chosen, state.scores.nan_to_num(-torch.inf).topk(3).indices)
        assert_close(state.data.inputs, POOL[state.labelled])
        assert_close(state.data.targets, VALUES[state.labelled])
        assert state.seconds > 0
    inputs, target = states[-1].data[4]
    assert_close(inputs, POOL[states[-1].labelled[4]])
    assert_close(target, VALUES[states[-1].labelled[4]])


def ridge_of_column():
    """Ridge regression with the target as a column, as torch has it."""

    class Ridge(BayesianRidge):
        def fit(self, X, y):
            return super().fit(X, np.ravel(y))

    return Ridge()


def test_the_predictor_has_seen_all_labels_so_far():
    seen = []

    def learner(data, previous):
        seen.append((len(data), previous))
        return BayesianRidge().fit(data.inputs.numpy(), data.targets.ravel().numpy())

    states = run(POOL, VALUES, "variance", learner, batch_size=2, initial=4, rounds=2)
    assert seen == [(4, None), (6, None), (8, None)]
    assert [len(state.labelled) for state in states] == [4, 6, 8]


@pytest.mark.parametrize("acquisition", ["bald", BatchBALD(num_samples=16), EPIG(num_samples=16), PowerBALD()])
def test_posteriors_of_classes(acquisition):
    state = run(POOL, LABELS, acquisition, classify, batch_size=3, initial=10, rounds=2)[-1]
    assert len(state.labelled.unique()) == 16


@pytest.mark.parametrize("acquisition", ["bald", "variance", "batch_bald", "epig", "random", "entropy"])
def test_posteriors_of_real_values(acquisition):
    state = run(POOL, VALUES, acquisition, regress, batch_size=3, initial=10, rounds=2)[-1]
    assert len(state.labelled.unique()) == 16


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acquisition", ["variance", "random"])
def test_the_whole_pool_is_labelled_once_and_then_it_ends(acquisition):
    states = run(POOL, VALUES, acquisition, ridge_of_column(), batch_size=7, initial=4)
    assert sorted(states[-1].labelled.tolist()) == list(range(40))
    assert [len(state.chosen) for state in states] == [4, 7, 7, 7, 7, 7, 1]


def test_the_budget_counts_all_labels():
    states = run(POOL, VALUES, "variance", ridge_of_column(), batch_size=4, initial=5, budget=11)
    assert [len(state.labelled) for state in states] == [5, 9, 11]
    assert [len(s.labelled) for s in run(POOL, VALUES, "variance", ridge_of_column(), initial=5, budget=5)] == [5]
    assert [len(s.labelled) for s in run(POOL, VALUES, "variance", ridge_of_column(), initial=40)] == [40]
    assert [s.round for s in run(POOL, VALUES, "variance", ridge_of_column(), rounds=0)] == [0]


def test_a_sample_of_the_candidates_is_looked_at():
    states = run(POOL, VALUES, "variance", ridge_of_column(), batch_size=2, initial=4, rounds=3, candidates=6)
    assert [int((~state.scores.isnan()).sum()) for state in states[1:]] == [6, 6, 6]
    looked_at = [tuple((~state.scores.isnan()).nonzero().squeeze(1).tolist()) for state in states[1:]]
    assert len(set(looked_at)) == 3


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_same_seed_is_the_same_run(start):
    runs = [
        run(POOL, LABELS, "bald", classify, batch_size=3, initial=8, rounds=2, seed=seed, start=start)
        for seed in (3, 3, 4)
    ]
    for left, right in zip(runs[0], runs[1], strict=True):
        assert_same(left, right)
    assert runs[0][-1].labelled.tolist() != runs[2][-1].labelled.tolist()


def test_counts_and_seeds_may_be_numpys(tmp_path):
    whole, given = {"batch_size": 3, "initial": 8, "rounds": 2, "seed": 2, "candidates": 9, "budget": 12}, []
    for index, kind in enumerate((int, np.int64)):
        options = {name: kind(value) for name, value in whole.items()}
        path = tmp_path / f"{index}.safetensors"
        given.append(run(POOL, VALUES, "variance", ridge_of_column(), checkpoint=path, **options)[-1])
        given[-1].save(path)
    assert_same(*given)
    assert torch.equal(stratified(LABELS, np.int64(3), seed=np.int64(1)), stratified(LABELS, 3, seed=1))


def test_an_estimator_without_random_state_follows_the_seed():
    runs = [
        run(POOL.numpy(), LABELS, "entropy", RandomForestClassifier(5), batch_size=3, initial=10, rounds=2)
        for _ in range(2)
    ]
    assert_same(runs[0][-1], runs[1][-1])


def test_generators_outside_are_left_as_they_were():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    run(POOL, LABELS, PowerBALD(), classify, batch_size=3, rounds=1)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002


# -- warm and cold ----------------------------------------------------------------------------------------------------


def test_a_warm_start_is_passed_the_last_predictor_and_a_cold_one_none():
    for start, expected in (("warm", [None, 1, 2]), ("cold", [None, None, None])):
        previous = []

        class Counted(BayesianRidge):
            count = 0

        def learner(data, last, previous=previous, kind=Counted):
            previous.append(None if last is None else last.count)
            predictor = kind().fit(data.inputs.numpy(), data.targets.ravel().numpy())
            predictor.count = len(previous)
            return predictor

        run(POOL, VALUES, "random", learner, rounds=2, start=start)
        assert previous == expected


@pytest.mark.parametrize(
    "estimator",
    [MLPClassifier((5,), max_iter=3, warm_start=True, random_state=0), SGDClassifier(loss="log_loss", random_state=0)],
    ids=["warm_start", "partial_fit"],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_warm_estimator_goes_on_and_earlier_states_stay(estimator):
    first = stratified(LABELS, 3)
    states = run(POOL.numpy(), LABELS, "entropy", estimator, batch_size=3, initial=first, rounds=2, start="warm")
    assert not hasattr(estimator, "coef_")
    assert not hasattr(estimator, "coefs_")
    assert len({id(state.predictor) for state in states}) == 3
    assert states[0].predictor.t_ < states[1].predictor.t_ < states[2].predictor.t_


def test_a_cold_estimator_is_what_it_is_after_one_fit():
    states = run(POOL, LABELS, "margin", LogisticRegression(), batch_size=3, initial=stratified(LABELS, 3), rounds=2)
    data = states[-1].data
    expected = LogisticRegression().fit(data.inputs.numpy(), data.targets.numpy())
    assert np.array_equal(states[-1].predictor.coef_, expected.coef_)


def test_any_object_with_fit_and_predict():
    class Nearest:
        def fit(self, inputs, targets):
            self.inputs, self.targets = inputs, targets

        def predict(self, inputs, return_std=False):
            distances = torch.cdist(torch.as_tensor(inputs), torch.as_tensor(self.inputs))
            return torch.as_tensor(self.targets)[distances.argmin(1)], distances.amin(1)

    learner = Nearest()
    states = run(POOL, VALUES, "variance", learner, initial=[0], rounds=1)
    assert not hasattr(learner, "inputs")
    assert states[1].chosen.item() == int(torch.cdist(POOL, POOL[:1]).argmax())
    with pytest.raises(ArgumentError, match="Nearest has neither warm_start=True nor partial_fit"):
        run(POOL, VALUES, "variance", learner, start="warm")


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("how", ["file", "state"])
def test_a_resumed_loop_goes_on_to_the_bit(start, how, tmp_path):
    """States from the resumed one on equal those of a run that was never interrupted."""
    options = {"batch_size": 3, "initial": 8, "seed": 2, "start": start, "rounds": 4}
    whole = run(POOL, noisy, PowerBALD(), classify, **options)
    stopped = next(state for state in loop(POOL, noisy, PowerBALD(), classify, **options, **QUIET) if state.round == 2)
    stopped.save(tmp_path / "state.safetensors")
    resume = tmp_path / "state.safetensors" if how == "file" else stopped
    rest = run(POOL, noisy, PowerBALD(), classify, **options, resume=resume)
    assert [state.round for state in rest] == [2, 3, 4]
    for expected, state in zip(whole[2:], rest, strict=True):
        assert_same(expected, state)


def noisy(inputs: Tensor) -> Tensor:
    """An oracle that errs at random."""
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    return torch.where(torch.rand(len(inputs)) < 0.2, torch.randint(3, (len(inputs),)), labels)


class Failing:
    """Fails once, at a given call."""

    def __init__(self, function, at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise ConnectionError("gone for lunch")
        return self.function(*args)


@pytest.mark.parametrize("who", ["oracle", "learner"])
def test_after_an_error_the_checkpoint_goes_on_and_no_question_is_asked_twice(who, tmp_path):
    options = {"batch_size": 3, "initial": 8, "rounds": 3}
    whole = run(POOL, noisy, "bald", classify, **options)
    oracle, learner = Failing(noisy, at=3 if who == "oracle" else 0), Failing(classify, at=3 if who == "learner" else 0)
    path = tmp_path / "labels.safetensors"
    states = []
    with pytest.raises(ConnectionError):
        states.extend(loop(POOL, oracle, "bald", learner, **options, **QUIET, checkpoint=path))
    rest = run(POOL, oracle, "bald", learner, **options, checkpoint=path, resume=path)
    assert rest[0].round == (1 if who == "oracle" else 2)
    for state in rest:
        assert_same(state, whole[state.round])
    assert oracle.calls == (5 if who == "oracle" else 4)


def test_after_an_error_the_last_state_goes_on():
    whole = run(POOL, noisy, "bald", classify, rounds=2)
    oracle, state = Failing(noisy, at=2), None
    with pytest.raises(ConnectionError):
        for state in loop(POOL, oracle, "bald", classify, rounds=2, **QUIET):  # noqa: B007
            pass
    assert state is not None
    assert_same(run(POOL, oracle, "bald", classify, rounds=2, resume=state)[-1], whole[-1])


def test_labels_on_the_disk_are_never_overwritten(tmp_path):
    path = tmp_path / "labels.safetensors"
    run(POOL, VALUES, "variance", ridge_of_column(), rounds=1, checkpoint=path)
    with pytest.raises(ArgumentError, match=r"the labels in it would be lost. Pass resume="):
        run(POOL, VALUES, "variance", ridge_of_column(), rounds=1, checkpoint=path)
    assert len(run(POOL, VALUES, "variance", ridge_of_column(), rounds=3, checkpoint=path, resume=str(path))) == 3
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_that_cannot_be_written_is_told_before_a_label_is_paid_for(tmp_path):
    oracle = Failing(noisy, at=1)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none" / "labels", "a folder that does not exist")):
        with pytest.raises(ArgumentError, match=message):
            loop(POOL, oracle, "random", ridge(), checkpoint=path)
    assert oracle.calls == 0


class Own(Random):
    """An acquisition of a user's that makes any scores and selects anything."""

    def __init__(self, scores: object, chosen: object) -> None:
        self.given, self.chosen = scores, chosen

    def scores(self, view: Tensor) -> Tensor:
        return self.given

    def select(self, view: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.chosen


@pytest.mark.parametrize(
    ("scores", "chosen", "message"),
    [
        (torch.zeros(30), torch.tensor([1, 1]), r"selected tensor\(\[1, 1\]\).*2 distinct indices from 0 to 29"),
        (torch.zeros(30), torch.arange(3), "2 distinct"),
        (torch.zeros(30), torch.tensor([0, 30]), "2 distinct"),
        (torch.zeros(30), torch.tensor([0, -1]), "2 distinct"),
        (torch.zeros(30), torch.zeros(2), "2 distinct"),
        (torch.zeros(30), [0, 1], "2 distinct"),
        (torch.zeros(29), torch.arange(2), r"shape \(29,\)\. Allowed: \(30,\)"),
        (torch.zeros(30, 1), torch.arange(2), r"shape \(30, 1\)"),
        (np.zeros(30), torch.arange(2), "ndarray"),
    ],
)
def test_no_candidate_is_chosen_twice_whatever_an_acquisition_of_a_user_selects(scores, chosen, message):
    with pytest.raises(ArgumentError, match=message):
        run(POOL, VALUES, Own(scores, chosen), ridge_of_column(), batch_size=2, rounds=1)


def test_scores_of_a_users_acquisition_may_be_counts():
    """Of candidates that were not looked at there is none, and so they are not integers in a state."""
    _, state = run(POOL, VALUES, Own(torch.arange(30), torch.arange(1)), ridge_of_column(), initial=10, rounds=1)
    assert state.scores.isnan().sum() == 10
    assert state.scores[~state.scores.isnan()].tolist() == list(range(30))


def test_another_loop_is_not_gone_on_with(tmp_path):
    path = tmp_path / "state.safetensors"
    state = run(POOL, VALUES, "variance", ridge_of_column(), rounds=0)[0]
    state.save(path)
    for source in (state, path):
        with pytest.raises(ArgumentError, match="of a loop with seed 0, and this one has 1"):
            loop(POOL, VALUES, "variance", ridge_of_column(), resume=source, seed=1)
        with pytest.raises(ArgumentError, match="of a loop with pool size 40, and this one has 39"):
            loop(POOL[1:], VALUES[1:], "variance", ridge_of_column(), resume=source)
    with pytest.raises(ArgumentError, match="does not exist"):
        loop(POOL, VALUES, "variance", ridge_of_column(), resume=tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ArgumentError, match="no file of a loop"):
        loop(POOL, VALUES, "variance", ridge_of_column(), resume=tmp_path / "text")


# -- pools and oracles ------------------------------------------------------------------------------------------------


class Lines(Dataset):
    """A data set that would not fit into memory, and counts what is read."""

    def __init__(self, *, with_targets: bool) -> None:
        self.with_targets, self.most = with_targets, 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        return (POOL[index], LABELS[index]) if self.with_targets else POOL[index]


@pytest.mark.parametrize(
    "acquisition", ["random", BALD(link="mc"), BatchBALD(num_samples=16), EPIG(num_samples=16)], ids=repr
)
@pytest.mark.parametrize("with_targets", [False, True])
def test_a_dataset_is_streamed(acquisition, with_targets):
    options = {"batch_size": 3, "rounds": 2, "pool_batch_size": 50}
    streamed = run(Lines(with_targets=with_targets), LABELS, acquisition, classify, **options)
    held = run(POOL, LABELS, acquisition, classify, **options)
    assert_same(streamed[-1], held[-1])
    assert_close(streamed[-1].data.inputs, POOL[streamed[-1].labelled])


@pytest.mark.parametrize(
    "pool",
    [
        TensorDataset(POOL),
        TensorDataset(POOL, VALUES, VALUES),
        [{"input": row, "label": 0} for row in POOL],
        [((row,), 0) for row in POOL],
    ],
    ids=["alone", "with a mask", "by name", "arguments"],
)
def test_items_of_a_dataset_are_what_its_loader_would_make_a_batch_of(pool):
    def learner(data: Labelled, previous: None) -> bk.Posterior:
        model = nn.Linear(2, 3).double()
        return bk.Laplace(model, bk.likelihoods.Categorical()).fit(DataLoader(data, 8), progress=False).posterior()

    options = {"batch_size": 3, "rounds": 1}
    state = run(pool, LABELS, "batch_bald", learner, **options)[-1]
    assert repr(state.data) == "Labelled(13 of 40 examples)"
    assert_same(state, run(POOL, LABELS, "batch_bald", learner, **options)[-1])


def test_a_model_of_two_arguments():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1).double()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left + right)

    def learner(data: Labelled, previous: None) -> bk.Posterior:
        likelihood = bk.likelihoods.Gaussian(torch.tensor(0.1, dtype=torch.float64))
        return bk.Laplace(Sum(), likelihood).fit(DataLoader(data, 8), progress=False).posterior()

    pool = [((row / 2, row / 2), value) for row, value in zip(POOL, VALUES, strict=True)]
    for acquisition in ("bald", "batch_bald", "epig"):
        assert len(run(pool, VALUES, acquisition, learner, batch_size=3, rounds=1)[-1].labelled) == 13


def test_small_batches_of_a_dataset_give_the_same_choice():
    options = {"batch_size": 3, "rounds": 2}
    for acquisition in ("bald", "batch_bald", "epig"):
        streamed = run(TensorDataset(POOL, VALUES), VALUES, acquisition, regress, **options, pool_batch_size=7)
        held = run(POOL, VALUES, acquisition, regress, **options)
        assert streamed[-1].labelled.tolist() == held[-1].labelled.tolist()


@pytest.mark.parametrize("kind", ["array", "frame", "dataset", "list"])
def test_estimators_take_pools_of_any_kind(kind):
    pools = {
        "array": POOL.numpy(),
        "frame": pd.DataFrame(POOL.numpy(), columns=["a", "b"]),
        "dataset": TensorDataset(POOL),
        "list": list(POOL),
    }
    if kind == "dataset":
        pools[kind] = TensorDataset(POOL, LABELS)
    expected = run(POOL, VALUES.ravel(), "variance", BayesianRidge(), rounds=3)[-1]
    state = run(pools[kind], VALUES.ravel().tolist(), "variance", BayesianRidge(), rounds=3)[-1]
    assert state.labelled.tolist() == expected.labelled.tolist()


def test_a_forest_as_a_committee():
    def forest(data, _):
        trees = RandomForestClassifier(8, max_depth=3).fit(data.inputs, data.targets.numpy()).estimators_
        return Committee(trees)

    state = run(POOL.numpy(), LABELS, "batch_bald", forest, initial=stratified(LABELS, 4), batch_size=4, rounds=2)[-1]
    assert len(state.labelled.unique()) == 20


def test_oracles_of_any_kind_are_asked_for_what_was_chosen():
    class Labeller:
        def __getitem__(self, indices: Tensor) -> Tensor:
            assert indices.ndim == 1
            return VALUES[indices]

    oracles = [VALUES, VALUES.numpy(), lambda x: x[:, :1] ** 2 - x[:, 1:], Labeller(), pd.DataFrame(VALUES.numpy())]
    for oracle in oracles:
        state = run(POOL, oracle, "variance", ridge_of_column(), rounds=2)[-1]
        assert_close(state.data.targets, VALUES[state.labelled])


@pytest.mark.parametrize(
    ("oracle", "error", "message"),
    [
        (lambda x: x[:-1, 0], TargetError, "one for each"),
        (lambda x: 0.0, TargetError, r"shape \(\)"),
        (lambda x: ["cat"] * len(x), TargetError, "Encode classes"),
        (lambda x: None, TargetError, "Is a return missing"),
        (VALUES[:30], ArgumentError, "oracle holds 30 targets for a pool of 40"),
        (lambda x: x[:, 0] * torch.nan, NonFiniteError, "NaN or infinity for the indices"),
        (lambda x: x * torch.nan, NonFiniteError, "NaN or infinity for the indices"),
        (3.0, ArgumentError, "oracle=3.0 is a float"),
    ],
)
def test_wrong_answers_are_refused(oracle, error, message):
    with pytest.raises(error, match=message):
        run(POOL, oracle, "random", ridge())


def test_answers_of_another_kind_are_refused():
    answers = iter([torch.zeros(10), torch.zeros(1, 2)])
    with pytest.raises(TargetError, match="the same kind in every round"):
        run(POOL, lambda _: next(answers), "random", ridge())


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rounds": -1}, "rounds=-1"),
        ({"budget": 5}, "budget=5 is less than the 10 labels"),
        ({"initial": 0}, "initial=0"),
        ({"initial": np.int64(41)}, "initial=41 is more than the 40"),
        ({"initial": [1, 1]}, "not distinct"),
        ({"initial": [-1]}, "not distinct indices. Allowed: 0 to 39"),
        ({"initial": [0.5]}, "a count, or one index or more"),
        ({"initial": []}, "a count, or one index or more"),
        ({"initial": torch.arange(40) < 5}, r"Of a mask pass mask\.nonzero"),
        ({"start": "lukewarm"}, "start='lukewarm' is unknown"),
        ({"candidates": 2, "batch_size": 3}, "candidates=2"),
        ({"seed": -1}, "seed=-1"),
        ({"pool_batch_size": 0}, "pool_batch_size=0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_asked(options, message):
    oracle = Failing(noisy, at=1)
    with pytest.raises(ArgumentError, match=message):
        loop(POOL, oracle, "random", ridge(), **options)
    assert oracle.calls == 0


@pytest.mark.parametrize(
    ("pool", "acquisition", "learner", "message"),
    [
        (POOL, "best", ridge(), "acquisition='best' is unknown"),
        (POOL, "bald", 3, "learner=3 is a int"),
        (POOL, "bald", nn.Linear(2, 1), r"is a Linear.*a function learner\(data, previous\)"),
        (POOL, "bald", "ridge", "learner='ridge' is a str"),
        (POOL, "bald", BayesianRidge, r"learner=BayesianRidge is a class.*Pass BayesianRidge\(...\)"),
        (POOL, "bald", lambda data: None, r"learner\(data\) does not take the two arguments"),
        (POOL[1:], "bald", ridge(), "oracle holds 40 targets for a pool of 39"),
        (torch.tensor(1.0), "bald", ridge(), "without dimensions"),
        (iter([1]), "bald", ridge(), "pool is a list_iterator"),
        (POOL.tolist(), "bald", ridge(), r"pool is a list of numbers.*Pass torch\.tensor\(pool\)"),
        (DataLoader(POOL), "bald", ridge(), "Pass the data set of a loader"),
    ],
)
def test_wrong_objects_are_refused(pool, acquisition, learner, message):
    with pytest.raises(ArgumentError, match=message):
        loop(pool, VALUES, acquisition, learner)


def test_a_learner_that_returns_nothing_is_told():
    with pytest.raises(ArgumentError, match="Is a return missing"):
        run(POOL, VALUES, "random", lambda data, previous: None)


def test_the_progress_bar_counts_labels(capsys):
    list(loop(POOL, VALUES, Random(), ridge_of_column(), batch_size=5, budget=20))
    assert "20/20" in capsys.readouterr().err
    states = list(loop(POOL, VALUES, Random(), ridge_of_column(), batch_size=5, rounds=2))
    assert "20/20" in capsys.readouterr().err
    list(loop(POOL, VALUES, Random(), ridge_of_column(), batch_size=5, rounds=3, resume=states[1]))
    assert "25/25" in capsys.readouterr().err
    run(POOL, VALUES, Random(), ridge_of_column(), batch_size=5, budget=20)
    assert not capsys.readouterr().err


def test_a_stratified_set_has_as_many_of_each_class():
    chosen = stratified(LABELS, 3, seed=1)
    assert LABELS[chosen].bincount().tolist() == [3, 3, 3]
    assert torch.equal(chosen, stratified(LABELS.numpy(), 3, seed=1))
    names = pd.Series(["none", "one", "two"])[LABELS.numpy()]
    assert torch.equal(chosen, stratified(names, 3, seed=1))
    with pytest.raises(ArgumentError, match="per_class=30 is more than the 14 examples of class 'none'"):
        stratified(names, 30)
