"""The loop of active learning: train, look at the pool, choose, ask, and again.

Whatever is random in a round follows from the seed and the round alone, so that a loop that was interrupted, and
resumed from the labels it had, goes on exactly as it would have.
"""

from __future__ import annotations

import random
import reprlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_kfac.active.base import Acquisition, check_scores, check_selection, get
from bayes_kfac.active.learners import Trainer, trainer_of
from bayes_kfac.active.pool import Labelled, answer, candidates_at, check_oracle, check_pool, size_of
from bayes_kfac.active.record import Record
from bayes_kfac.errors import ArgumentError, check_count, check_file
from bayes_kfac.progress import progress_bar

#: What each of a round's seeds is for.
INITIAL, LABEL, TRAIN, CHOOSE = range(4)


@dataclass(frozen=True)
class LoopState:
    """What is known at the end of a round, when the predictor was trained on all labels so far.

    Attributes:
        round: From 0, which is the initial set.
        labelled: Indices into the pool of all labels, in the order in which they came, ``[labels]``.
        chosen: Those of this round, best first.
        scores: The scores by which they were chosen, ``[pool]``, NaN where there was no candidate; ``None`` in round 0.
        data: The labelled data.
        predictor: Trained on them.
        seconds: How long the round took: choosing, labelling and training.
    """

    round: int
    labelled: Tensor
    chosen: Tensor
    scores: Tensor | None
    data: Labelled
    predictor: Any
    seconds: float
    record: Record = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write what :func:`loop` needs to go on from here to a safetensors file: labels, not the predictor.

        Args:
            path: The file.
        """
        self.record.save(path)


def loop(
    pool: Any,
    oracle: Any,
    acquisition: str | Acquisition,
    learner: Any,
    *,
    batch_size: int = 1,
    initial: int | Sequence[int] | Tensor = 10,
    rounds: int | None = None,
    budget: int | None = None,
    start: str = "cold",
    candidates: int | None = None,
    seed: int = 0,
    resume: str | Path | LoopState | None = None,
    checkpoint: str | Path | None = None,
    pool_batch_size: int = 256,
    progress: bool = True,
) -> Iterator[LoopState]:
    """Learn actively: an iterator over the states after each round, for a ``for`` loop of your own.

    Round 0 labels the initial set and trains. Every further round looks at what is unlabelled through the predictor,
    chooses, asks the oracle, and trains. It ends after the rounds, at the budget, or when the pool is used up,
    whichever is first. No index is ever chosen twice.

    The learner, the oracle and the acquisition run with the random generators of torch, numpy and Python seeded anew
    from ``seed`` and the round; outside of the loop these generators are left as they were.

    Args:
        pool: A tensor or array ``[n, ...]``, a data frame, or a map-style ``Dataset``, which is streamed.
        oracle: A function from inputs to targets; or all targets of the pool, or any object with ``__getitem__`` that
            takes a tensor of indices.
        acquisition: An acquisition, or its name.
        learner: A function ``learner(data, previous)`` from the labelled :class:`Labelled` data set and the last
            predictor to a predictor: a :class:`bayes_kfac.Posterior`, a fitted estimator, or any object with
            ``predict``. Or an object with ``fit(inputs, targets)`` and ``predict``, such as an estimator of
            scikit-learn; it is copied and stays as it is.
        batch_size: How many to choose in a round; the last may be smaller.
        initial: The initial set: how many to draw at random, or which.
        rounds: How many rounds follow round 0; by default as many as there can be.
        budget: How many labels to have in the end, the initial ones among them; by default the whole pool.
        start: ``"cold"``: every round trains a new model on all labels; a function is passed ``None`` as the last
            predictor. ``"warm"``: training goes on from the last weights; a function is passed the last predictor, an
            estimator made with ``warm_start=True`` is fitted again, another one is given the new labels by
            ``partial_fit``.
        candidates: Look at so many unlabelled examples only, drawn at random in each round: for huge pools, where what
            is chosen is then the best of a sample. By default all of them.
        seed: Of everything random.
        resume: A state, or the file of one: its labels are taken, its predictor is trained again, its state comes
            first, and then it goes on as if it had not stopped. A warm start is repeated from round 0 on for that.
        checkpoint: A file to which labels are written as soon as the oracle has given them, before training. It can
            be resumed from whatever happens then.
        pool_batch_size: How many examples of a ``Dataset`` to look at together.
        progress: Whether to show a progress bar.

    Returns:
        An iterator over the states.

    Raises:
        ArgumentError: If an argument is out of range, the file is of another seed or size of the pool (that the pool
            has the same examples in the same order is not seen), or the checkpoint cannot be written, or exists and is
            not resumed from.
    """
    size = check_pool(pool)
    check_oracle(oracle, size)
    batch_size = check_count("batch_size", batch_size)
    pool_batch_size = check_count("pool_batch_size", pool_batch_size)
    seed = check_count("seed", seed, minimum=0)
    if candidates is not None:
        candidates = check_count("candidates", candidates, minimum=batch_size)
    limit = size if budget is None else min(size, check_count("budget", budget))
    if rounds is not None:
        rounds = check_count("rounds", rounds, minimum=0)
    first = _initial(initial, size, seed)
    record = Record.resumed(resume, seed, size) if resume is not None else None
    held = len(first if record is None else record.indices)
    if held > limit:
        raise ArgumentError(f"budget={budget} is less than the {held} labels to start with. Allowed: {held} or more.")
    path = None if checkpoint is None else _writable(Path(checkpoint), resume)
    run = _Run(
        pool=pool,
        oracle=oracle,
        acquisition=get(acquisition),
        train=trainer_of(learner, start),
        is_warm=start == "warm",
        batch_size=batch_size,
        rounds=rounds,
        limit=limit,
        candidates=candidates,
        seed=seed,
        checkpoint=path,
        pool_batch_size=pool_batch_size,
    )
    return run.states(record, first, progress=progress)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The arguments of a loop, checked."""

    pool: Any
    oracle: Any
    acquisition: Acquisition
    train: Trainer
    is_warm: bool
    batch_size: int
    rounds: int | None
    limit: int
    candidates: int | None
    seed: int
    checkpoint: Path | None
    pool_batch_size: int

    def states(self, record: Record | None, first: Tensor, *, progress: bool) -> Iterator[LoopState]:
        started = time.perf_counter()
        if record is None:
            record = self._asked(Record.empty(self.seed, size_of(self.pool)), first, None)
        with progress_bar(shown=progress, total=self._total(record), desc="active", unit="label") as bar:
            state = self._trained(record, self._replayed(record), started)
            while True:
                bar.update(len(state.labelled) - bar.n)
                yield state
                count = min(self.batch_size, self.limit - len(state.labelled))
                if count == 0 or (self.rounds is not None and state.round >= self.rounds):
                    return
                started = time.perf_counter()
                chosen, scores = self._choose(state, count)
                record = self._asked(state.record, chosen, scores)
                state = self._trained(record, state.predictor if self.is_warm else None, started)

    def _total(self, record: Record) -> int:
        """How many labels there will be in the end."""
        if self.rounds is None:
            return self.limit
        missing = max(self.rounds - record.round, 0)
        return min(self.limit, len(record.indices) + missing * self.batch_size)

    def _replayed(self, record: Record) -> Any:
        """The predictor before the last round of a record: of a warm start that of all rounds before, trained again."""
        predictor = None
        for earlier in range(record.round if self.is_warm else 0):
            predictor = self._trained(record.until(earlier), predictor, 0.0).predictor
        return predictor

    def _trained(self, record: Record, previous: Any, started: float) -> LoopState:
        data = Labelled(self.pool, record.indices, record.targets)
        with seeded(self.seed, record.round, TRAIN):
            predictor = self.train(data, len(record.chosen), previous)
        if predictor is None:
            raise ArgumentError("learner returned None. Allowed: a predictor. Is a return missing?")
        return LoopState(
            record.round,
            record.indices,
            record.chosen,
            record.scores,
            data,
            predictor,
            time.perf_counter() - started,
            record,
        )

    def _choose(self, state: LoopState, count: int) -> tuple[Tensor, Tensor]:
        """The indices of the next batch, and the scores of the pool."""
        with seeded(self.seed, state.round + 1, CHOOSE) as generator:
            unlabelled = torch.ones(size_of(self.pool), dtype=torch.bool)
            unlabelled[state.labelled] = False
            indices = unlabelled.nonzero().squeeze(1)
            if self.candidates is not None and self.candidates < len(indices):
                order = torch.randperm(len(indices), generator=generator)[: self.candidates]
                indices = indices[order.sort().values]
            inputs = candidates_at(self.pool, indices, self.pool_batch_size)
            view = self.acquisition.look(state.predictor, inputs, generator=generator)
            candidate_scores = check_scores(self.acquisition.scores(view), len(indices)).detach().cpu()
            chosen = self.acquisition.select(view, count, generator=generator)
            chosen = check_selection(chosen, count, len(indices)).cpu()
        scores = torch.full((len(unlabelled),), torch.nan, dtype=candidate_scores.dtype)
        scores[indices] = candidate_scores
        return indices[chosen], scores

    def _asked(self, record: Record, indices: Tensor, scores: Tensor | None) -> Record:
        """The record with the oracle's answers, which are safe on the disk before anything else happens."""
        with seeded(self.seed, record.round + 1, LABEL):
            targets = answer(self.oracle, self.pool, indices)
        record = record.extended(indices, targets, scores)
        if self.checkpoint is not None:
            record.save(self.checkpoint)
        return record


def _writable(path: Path, resume: str | Path | LoopState | None) -> Path:
    """The file for labels, before the first of them is paid for."""
    check_file("checkpoint", path)
    if path.exists() and (not isinstance(resume, str | Path) or Path(resume) != path):
        raise ArgumentError(
            f"checkpoint={str(path)!r} exists, and the labels in it would be lost. Pass resume={str(path)!r} to go on "
            "from them, or another file."
        )
    return path


def _initial(initial: int | Sequence[int] | Tensor, size: int, seed: int) -> Tensor:
    """The indices of the initial set."""
    if isinstance(initial, Integral):  # numpy's too
        if check_count("initial", initial) > size:
            raise ArgumentError(f"initial={initial} is more than the {size} examples of the pool.")
        with seeded(seed, 0, INITIAL) as generator:
            return torch.randperm(size, generator=generator)[:initial]
    indices = torch.as_tensor(initial).cpu()
    if indices.ndim != 1 or len(indices) == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        advice = " Of a mask pass mask.nonzero().squeeze(1)." if indices.dtype == torch.bool else ""
        raise ArgumentError(
            f"initial={reprlib.repr(initial)} is not allowed. Allowed: a count, or one index or more.{advice}"
        )
    if int(indices.min()) < 0 or int(indices.max()) >= size or len(indices.unique()) < len(indices):
        raise ArgumentError(
            f"initial={indices.tolist()} are not distinct indices. Allowed: 0 to {size - 1}, each once."
        )
    return indices.long()


@contextmanager
def seeded(seed: int, round_: int, purpose: int) -> Iterator[torch.Generator]:
    """Seed the generators of torch, numpy and Python, and put them back afterwards.

    Args:
        seed: The loop's.
        round_: The round.
        purpose: What for.

    Yields:
        A generator with the same seed.
    """
    own = int(np.random.SeedSequence([seed, round_, purpose]).generate_state(1)[0])
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            torch.manual_seed(own)
            np.random.seed(own)  # noqa: NPY002  # what estimators without a random_state draw from
            random.seed(own)
            yield torch.Generator().manual_seed(own)
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
