"""`LocalExecutor`: the same results for any number of workers, and a clear word when a task or a worker fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arqsearch.errors import ArqError
from arqsearch.search.executor import LocalExecutor, OnProgress, Task

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


def die(on_progress: OnProgress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def chatter(path: str, seconds: float, on_progress: OnProgress) -> None:
    """Report without a pause, then leave a file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        on_progress("chatter", 0, 0, "")
        time.sleep(0.02)
    Path(path).touch()


def stay(folder: str, on_progress: OnProgress) -> None:
    """Leave the process's number and stay."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def silent(*update: Any) -> None:
    """Nobody watches."""


TASKS = [Task(f"t{seed}", compute, (seed,)) for seed in (3, 1, 2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_progress_do_not_depend_on_the_workers(workers: int) -> None:
    updates: list[Update] = []
    results = LocalExecutor(workers).map(TASKS, lambda *update: updates.append(update))
    assert list(results) == ["t3", "t1", "t2"], "in the order of the tasks"
    assert results == {task.name: (1, compute(task.args[0], silent)[1]) for task in TASKS}
    for seed in (1, 2, 3):
        own = [update for update in updates if update[0] == f"task {seed}"]
        assert own == [(f"task {seed}", 1, 2, "half"), (f"task {seed}", 2, 2, "")]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_user_arrives_as_it_is(workers: int) -> None:
    with pytest.raises(ArqError, match=r"^set x to 5$"):
        LocalExecutor(workers).map([TASKS[0], Task("bad", refuse, ("set x to 5",))], silent)


def test_any_other_error_arrives_with_the_workers_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)'bad' failed.*break_down.*ZeroDivisionError: by nothing"):
        LocalExecutor(2).map([TASKS[0], Task("bad", break_down, ())], silent)


def test_a_killed_worker_is_reported_while_another_one_is_busy(tmp_path: Path) -> None:
    """The other worker reports all the time, and is stopped before it is done."""
    busy = Task("busy", chatter, (str(tmp_path / "done"), 60.0))
    start = time.monotonic()
    with pytest.raises(ArqError, match=r"worker of task 'dead' died \(exit code -9\).*finished work is kept"):
        LocalExecutor(2).map([busy, Task("dead", die, ())], silent)
    assert time.monotonic() - start < 40
    assert not (tmp_path / "done").exists()


ABANDON = """
import sys
from arqsearch.search.executor import LocalExecutor, Task
from tests.search.test_executor import silent, stay

if __name__ == "__main__":
    LocalExecutor(2).map([Task(name, stay, (sys.argv[1],)) for name in ("a", "b")], silent)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_workers_leave_when_the_run_is_killed(tmp_path: Path) -> None:
    """Otherwise a resumed run would share the machine with its predecessor's workers."""
    pids, script = tmp_path / "pids", tmp_path / "abandon.py"
    pids.mkdir()
    script.write_text(ABANDON)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.Popen([sys.executable, str(script), str(pids)], env=environment)
    try:
        assert wait_for(lambda: len(list(pids.iterdir())) == 2)
        workers = [int(path.name) for path in pids.iterdir()]
        assert all(alive(pid) for pid in workers)
    finally:
        run.kill()
        run.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in workers), 20)
