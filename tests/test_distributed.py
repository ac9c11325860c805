"""Two processes with a half of each batch are one process with the whole: weights, statistics and posterior.

Both processes run every scenario once and leave their results in files; each test looks at one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import NonFiniteError
from bayes_kfac.structures import SlangStructure, Structure
from tests.helpers import matrices, randn, rng, seeded

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs torch's gloo"
)

PROCESSES, EXAMPLES, STEPS = 2, 8, 3
HALF = EXAMPLES // PROCESSES
SAME = {"rtol": 1e-9, "atol": 1e-9}

Results = dict[str, Tensor]


class Net(nn.Module):
    """Layers, a PReLU outside of every block, and a branch that not every process takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(3, 5), nn.PReLU(), nn.Linear(5, 2)
        self.branch = nn.Linear(3, 2)
        seeded(self)

    def forward(self, inputs: Tensor, branch: bool = True) -> Tensor:
        output = self.head(self.act(self.body(inputs)))
        return output + self.branch(inputs) if branch else output


def batch(step: int) -> tuple[Tensor, Tensor]:
    return randn(EXAMPLES, 3, seed=step), randn(EXAMPLES, 2, seed=50 + step)


def make(model: nn.Module, seed: int = 7, structure: Structure | str = "kron") -> bk.NoisyNaturalGradient:
    likelihood = bk.likelihoods.Gaussian("learned").double()
    options = {"fisher": "exact", "statistics_every": 2, "inverse_every": 2, "others": "deterministic"}
    return bk.NoisyNaturalGradient(
        model, likelihood, num_data=40, lr=0.05, generator=rng(seed), structure=structure, **options
    )


def results_of(optimizer: bk.NoisyKFAC) -> Results:
    named = [*optimizer.model.named_parameters(), *optimizer.likelihood.named_parameters(prefix="likelihood")]
    results = {f"mean/{name}": value.detach().clone() for name, value in named}
    for name, state in optimizer.blocks.items():
        for key, value in matrices(state.statistics).items():
            results[f"sum/{name}/{key}"] = value
            results[f"count/{name}/{key}"] = torch.tensor(state.statistics.counts[key], dtype=torch.float64)
    blocks = optimizer.posterior().blocks
    results |= {f"posterior/{name}": block.to_dense() for name, block in blocks.items()}
    results |= {f"link/{name}/{key}": value for name, own in blocks.links.items() for key, value in own.state.items()}
    return results


# What each process does


def run(
    rank: int, loop: Callable[..., None], *, seed: int = 7, structure: Structure | str = "kron", **options: Any
) -> Results:
    """Three steps; ``loop`` gets the wrapped model, the optimizer, and this process's half of the batch."""
    model = DistributedDataParallel(Net(), **options)
    optimizer = make(model, seed, structure)
    for step in range(STEPS):
        x, y = (tensor[rank * HALF : (rank + 1) * HALF] for tensor in batch(step))
        optimizer.zero_grad()
        loop(model, optimizer, x, y)
        optimizer.step()
    return results_of(optimizer)


def plain(model: nn.Module, optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
    with optimizer.sampled_params():
        optimizer.likelihood(model(x), y).backward()


def accumulated(model: nn.Module, optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
    """Two contexts of one noise, both synchronised."""
    state = optimizer.generator.get_state()
    for part in (slice(0, 1), slice(1, HALF)):
        optimizer.generator.set_state(state)
        with optimizer.sampled_params():
            (optimizer.likelihood(model(x[part]), y[part]) * len(x[part]) / HALF).backward()


def accumulated_without_sync(model: Any, optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
    """The same with gradients that are exchanged in the last context only."""
    state = optimizer.generator.get_state()
    for part in (slice(0, 1), slice(1, HALF)):
        optimizer.generator.set_state(state)
        with model.no_sync() if part.start == 0 else nullcontext(), optimizer.sampled_params():
            (optimizer.likelihood(model(x[part]), y[part]) * len(x[part]) / HALF).backward()


def half_masked(rank: int) -> Callable[..., None]:
    def loop(model: nn.Module, optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params():
            optimizer.likelihood(model(x), y, torch.full((HALF,), rank == 0)).backward()

    return loop


def one_branch(rank: int) -> Callable[..., None]:
    def loop(model: nn.Module, optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params():
            optimizer.likelihood(model(x, rank == 0), y).backward()

    return loop


def not_a_number_in_one(rank: int) -> Results:
    """Everyone refuses the step, and nothing has moved anywhere; the next one is as if it had not been."""
    model = DistributedDataParallel(Net())
    optimizer = make(model)
    for step in range(STEPS):
        x, y = (tensor[rank * HALF : (rank + 1) * HALF] for tensor in batch(step))
        if step == 1:
            before, state = copy.deepcopy(model.module.state_dict()), optimizer.generator.get_state()
            optimizer.zero_grad()
            plain(model, optimizer, x, torch.full_like(y, torch.nan) if rank else y)
            with pytest.raises(NonFiniteError):
                optimizer.step()
            optimizer.generator.set_state(state)
            assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
        optimizer.zero_grad()
        plain(model, optimizer, x, y)
        optimizer.step()
    return results_of(optimizer)


def fitted(rank: int) -> Results:
    optimizers: list[bk.NoisyKFAC] = []
    loader = [tuple(tensor[rank * HALF : (rank + 1) * HALF] for tensor in batch(step)) for step in range(STEPS)]
    options = {"fisher": "exact", "statistics_every": 2, "inverse_every": 2, "others": "deterministic"}
    bk.fit(
        DistributedDataParallel(Net()),
        bk.likelihoods.Gaussian("learned").double(),
        loader,
        epochs=1,
        num_data=40,
        lr=0.05,
        progress=False,
        generator=rng(7),
        callbacks=[lambda state: optimizers.append(state.optimizer)],
        **options,
    )
    return results_of(optimizers[0])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),  # processes that wait for each other fail instead of hanging
    )
    results = {
        "same noise": run(rank, plain),
        "different noise": run(rank, plain, seed=7 + rank),
        "accumulated": run(rank, accumulated),
        "accumulated in views of buckets": run(rank, accumulated, gradient_as_bucket_view=True),
        "accumulated without sync": run(rank, accumulated_without_sync),
        "masked": run(rank, half_masked(rank)),
        "one branch": run(rank, one_branch(rank), find_unused_parameters=True),
        "columns": run(rank, plain, structure="smw"),
        "columns of one branch": run(rank, one_branch(rank), find_unused_parameters=True, structure="smw"),
        "leading columns": run(rank, plain, structure=SlangStructure(2)),
        "linked": run(rank, one_branch(rank), structure="tridiagonal", find_unused_parameters=True),
        "not a number in one": not_a_number_in_one(rank),
        "fit": fitted(rank),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """The results of both processes, by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


# What one process gives


def alone(loss: Callable[[bk.NoisyKFAC, Tensor, Tensor], Tensor], structure: str = "kron") -> Results:
    optimizer = make(Net(), structure=structure)
    for step in range(STEPS):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            loss(optimizer, *batch(step)).backward()
        optimizer.step()
    return results_of(optimizer)


def assert_all_equal(processes: list[dict[str, Results]], scenario: str, expected: Results) -> None:
    """Both processes hold the same bits, and those are the expected numbers."""
    first, second = (results[scenario] for results in processes)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, **SAME, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "scenario",
    [
        "same noise",
        "accumulated",
        "accumulated in views of buckets",
        "accumulated without sync",
        "not a number in one",
        "fit",
    ],
)
def test_halves_of_the_batch_at_one_noise_are_the_whole_batch(processes, scenario):
    expected = alone(lambda optimizer, x, y: optimizer.likelihood(optimizer.model(x), y))
    assert_all_equal(processes, scenario, expected)


def test_noise_of_their_own_is_two_samples_of_one_process(processes):
    """One process that takes each half at the noise of one of them, gradients and samples averaged."""
    optimizer = make(Net())
    states = [rng(7 + rank).get_state() for rank in range(PROCESSES)]
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step)
        for rank, part in enumerate((slice(0, HALF), slice(HALF, EXAMPLES))):
            optimizer.generator.set_state(states[rank])
            with optimizer.sampled_params():
                (optimizer.likelihood(optimizer.model(x[part]), y[part]) / PROCESSES).backward()
            states[rank] = optimizer.generator.get_state()
        optimizer.step()
    assert_all_equal(processes, "different noise", results_of(optimizer))
    shared = processes[0]["same noise"]
    assert not torch.allclose(processes[0]["different noise"]["mean/body.weight"], shared["mean/body.weight"])


def test_a_process_without_any_label_takes_part_and_weighs_nothing_in_the_fisher(processes):
    """Its loss is zero, and is averaged as any other by ``DistributedDataParallel``."""
    mask = torch.arange(EXAMPLES) < HALF
    expected = alone(lambda optimizer, x, y: optimizer.likelihood(optimizer.model(x), y, mask) / PROCESSES)
    assert_all_equal(processes, "masked", expected)


@pytest.mark.parametrize(
    ("scenario", "structure"), [("one branch", "kron"), ("columns of one branch", "smw"), ("linked", "tridiagonal")]
)
def test_a_layer_that_runs_in_one_process_only_is_measured_there(processes, scenario, structure):
    """Columns too, of which the other process has none; and what links it to another layer."""

    def loss(optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> Tensor:
        parts = (slice(0, HALF), True), (slice(HALF, EXAMPLES), False)
        return sum(optimizer.likelihood(optimizer.model(x[part], branch), y[part]) for part, branch in parts) / 2

    expected = alone(loss, structure)
    assert (structure == "tridiagonal") == ("link/head/row" in expected)
    key = "fisher" if structure == "smw" else "gradient"
    assert expected[f"count/branch/{key}"] == expected[f"count/body/{key}"] / 2
    assert_all_equal(processes, scenario, expected)


def test_columns_of_both_processes_are_those_of_the_whole_batch(processes):
    expected = alone(lambda optimizer, x, y: optimizer.likelihood(optimizer.model(x), y), "smw")
    assert_all_equal(processes, "columns", expected)


def test_columns_that_are_reduced_are_the_same_bits_in_both_processes(processes):
    first, second = (results["leading columns"] for results in processes)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
