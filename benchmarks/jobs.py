"""A benchmark's work as jobs: a file of figures for each, several processes at once, one progress bar.

A job whose file exists is read, not done again, so that a run which was stopped goes on where it was. A job that fails
ends neither the others nor what they have kept; the run ends with the names of those that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import keep
from tqdm import tqdm
from uci import HERE


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        path: The file that its figures are kept in.
        work: A function of a module, called with the arguments in a process of one thread; returns figures.
        arguments: What it is called with; kept beside the figures, so they must be what JSON can hold.
    """

    path: Path
    work: Callable[..., dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)

    def do(self) -> dict[str, Any]:
        """Do the work in this process, and keep the figures."""
        torch.set_num_threads(1)  # small matrices: a second thread only waits, a second process works
        keep(self.path, {"arguments": self.arguments, **self.work(**self.arguments)})
        return json.loads(self.path.read_text())


def run(jobs: Iterable[Job], processes: int = 1) -> list[dict[str, Any]]:
    """What all jobs found, in their order; those not yet done are done first.

    Args:
        jobs: The work.
        processes: How many at once; 1 is this process itself.

    Returns:
        The figures of each.

    Raises:
        SystemExit: If jobs failed, after all others are done.
    """
    jobs = list(jobs)
    missing = [job for job in jobs if not job.path.exists()]
    failed: dict[str, str] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="job") as bar:

        def done(job: Job, error: BaseException | None) -> None:
            bar.set_postfix_str(job.path.stem)
            bar.update()
            if error is not None:
                failed[str(job.path)] = "".join(traceback.format_exception(error))

        if processes == 1:
            for job in missing:
                try:
                    job.do()
                except Exception as error:
                    done(job, error)
                else:
                    done(job, None)
        elif missing:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as executor:
                futures = {executor.submit(job.do): job for job in missing}
                for future in as_completed(futures):
                    done(futures[future], future.exception())
    if failed:
        raise SystemExit("\n".join(f"{path} failed:\n{error}" for path, error in failed.items()))
    return [json.loads(job.path.read_text()) for job in jobs]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with what all of them have: processes, where results are, and a quick look that is not kept."""
    own = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--processes", type=int, default=1, help="how many jobs at once")
    own.add_argument("--quick", action="store_true", help="little of everything, to see that it runs; nothing is kept")
    own.add_argument("--results", type=Path, default=HERE / "results", help="the folder of all results")
    return own


@contextmanager
def results_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where results are kept; with ``--quick`` a folder that is gone at the end, and what :func:`cache` holds too."""
    if not arguments.quick:
        yield arguments.results
        return
    before = os.environ.get("BAYES_KFAC_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BAYES_KFAC_CACHE"] = folder  # which other processes inherit
        try:
            yield Path(folder)
        finally:
            os.environ.pop("BAYES_KFAC_CACHE") if before is None else os.environ.update(BAYES_KFAC_CACHE=before)


def cache() -> Path:
    """Where unfinished work is kept: the folder that ``BAYES_KFAC_CACHE`` names, or ``.cache``."""
    return Path(os.environ.get("BAYES_KFAC_CACHE", HERE.parent / ".cache"))
