"""What every executor owes; a test class of an executor inherits from `ExecutorConformance` and names a fixture."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from arqsearch.errors import ArqError
from arqsearch.search.executor import ATTEMPTS, Executor, OnProgress, Task

Update = tuple[str, int, int, str]


def compute(seed: int, on_progress: OnProgress) -> tuple[int, list[float]]:
    """Something with torch in it, with two updates on the way."""
    on_progress(f"task {seed}", 1, 2, "half")
    values = torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()
    on_progress(f"task {seed}", 2, 2, "")
    return torch.get_num_threads(), values


def refuse(text: str, on_progress: OnProgress) -> None:
    raise ArqError(text)


def break_down(on_progress: OnProgress) -> None:
    raise ZeroDivisionError("by nothing")


def die(folder: str, on_progress: OnProgress) -> None:
    log(folder, "die")
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(folder: str, on_progress: OnProgress) -> str:
    """Kill the worker at the first start only."""
    if log(folder, "die_once") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def chatter(path: str, seconds: float, on_progress: OnProgress) -> None:
    """Report without a pause, then leave a file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        on_progress("chatter", 0, 0, "")
        time.sleep(0.02)
    Path(path).touch()


def work(folder: str, name: str, seconds: float, on_progress: OnProgress) -> int:
    """Note the start, take some time, and say who did it."""
    log(folder, name)
    time.sleep(seconds)
    return os.getpid()


def log(folder: str, name: str) -> int:
    """Note a start of a task; how many there have been."""
    with (Path(folder) / name).open("a") as file:
        file.write("x")
    return starts(Path(folder), name)


def starts(folder: Path, name: str) -> int:
    """How often a task was started."""
    file = folder / name
    return len(file.read_text()) if file.is_file() else 0


def silent(*update: Any) -> None:
    """Nobody watches."""


def compute_tasks() -> list[Task]:
    return [Task(f"t{seed}", compute, (seed,)) for seed in (3, 1, 2)]


class ExecutorConformance:
    """Inherit, and give a fixture `executor` with at least two workers."""

    def test_results_come_in_the_order_of_the_tasks_and_once_each(self, executor: Executor) -> None:
        arrived: list[tuple[str, Any]] = []
        results = executor.map(compute_tasks(), silent, lambda *result: arrived.append(result))
        assert list(results) == ["t3", "t1", "t2"]
        assert dict(results) == {f"t{seed}": (1, compute(seed, silent)[1]) for seed in (3, 1, 2)}
        assert sorted(arrived) == sorted(results.items())

    def test_progress_arrives_in_order(self, executor: Executor) -> None:
        updates: list[Update] = []
        executor.map(compute_tasks(), lambda *update: updates.append(update))
        for seed in (1, 2, 3):
            own = [update for update in updates if update[0] == f"task {seed}"]
            # An executor may leave out what the next update replaces.
            assert own in (
                [(f"task {seed}", 1, 2, "half"), (f"task {seed}", 2, 2, "")], [(f"task {seed}", 2, 2, "")]
            )  # fmt: skip

    def test_no_tasks(self, executor: Executor) -> None:
        assert executor.map([], silent) == {}

    def test_an_error_of_the_user_arrives_as_it_is_and_the_executor_goes_on(self, executor: Executor) -> None:
        with pytest.raises(ArqError, match=r"^set x to 5$"):
            executor.map([compute_tasks()[0], Task("bad", refuse, ("set x to 5",))], silent)
        assert list(executor.map(compute_tasks(), silent)) == ["t3", "t1", "t2"]

    def test_any_other_error_arrives_with_the_workers_traceback(self, executor: Executor) -> None:
        with pytest.raises(RuntimeError, match=r"(?s)'bad' failed.*break_down.*ZeroDivisionError: by nothing"):
            executor.map([compute_tasks()[0], Task("bad", break_down, ())], silent)

    def test_two_tasks_of_one_name_are_refused(self, executor: Executor) -> None:
        with pytest.raises(ArqError, match=r"Two tasks are called 't1'"):
            executor.map([Task("t1", compute, (1,)), Task("t1", compute, (2,))], silent)

    def test_a_killed_worker_loses_nothing_and_nothing_else_runs_twice(
        self, executor: Executor, tmp_path: Path
    ) -> None:
        others = [Task(f"w{index}", work, (str(tmp_path), f"w{index}", 0.05)) for index in range(5)]
        results = executor.map([*others, Task("die_once", die_once, (str(tmp_path),))], silent)
        assert results["die_once"] == "alive" and starts(tmp_path, "die_once") == 2
        assert [starts(tmp_path, task.name) for task in others] == [1] * 5
        assert len(results) == 6

    def test_a_task_that_always_kills_its_worker_is_given_up(self, executor: Executor, tmp_path: Path) -> None:
        """While another one is busy, reports all the time, and is stopped before it is done."""
        busy = Task("busy", chatter, (str(tmp_path / "done"), 300.0))
        with pytest.raises(ArqError, match=r"worker of task 'dead' died \(.*\), 3 times.*finished work is kept"):
            executor.map([busy, Task("dead", die, (str(tmp_path),))], silent)
        assert starts(tmp_path, "die") == ATTEMPTS == 3
        assert not (tmp_path / "done").exists()
