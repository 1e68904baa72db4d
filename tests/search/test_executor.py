"""`LocalExecutor`: what every executor owes, one worker in this process, and workers that leave with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arqsearch.errors import ArqError
from arqsearch.search.executor import LocalExecutor, OnProgress, Task, open_executor
from tests.search.executor_conformance import (
    ExecutorConformance,
    compute,
    compute_tasks,
    refuse,
    silent,
    work,
)


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor(2) as opened:
        yield opened


class TestLocalExecutor(ExecutorConformance):
    """Two processes."""


def stay(folder: str, on_progress: OnProgress) -> None:
    """Leave the process's number and stay."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def lambda_result(on_progress: OnProgress) -> object:
    return lambda: None


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    one = LocalExecutor(1)
    results = one.map(compute_tasks(), silent)
    assert results == {f"t{seed}": (1, compute(seed, silent)[1]) for seed in (3, 1, 2)}
    tasks = [Task(name, work, (str(tmp_path), name, 0.0)) for name in "ab"]
    assert set(one.map(tasks, silent).values()) == {os.getpid()}
    assert set(LocalExecutor(4).map(tasks[:1], silent).values()) == {os.getpid()}, "and so is a single task"
    with pytest.raises(ArqError, match=r"^set x to 5$"):
        one.map([Task("bad", refuse, ("set x to 5",))], silent)


def test_workers_stay_between_two_calls(executor: LocalExecutor, tmp_path: Path) -> None:
    """What a task function keeps in its process, such as an open network, must be there again."""
    tasks = [Task(f"w{index}", work, (str(tmp_path), f"w{index}", 0.2)) for index in range(4)]
    first, second = (set(executor.map(tasks, silent).values()) for _ in range(2))
    assert first == second and len(first) == 2 and os.getpid() not in first


def test_a_result_that_cannot_be_pickled_is_said_so(executor: LocalExecutor) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)'bad' failed.*cannot be pickled"):
        executor.map([compute_tasks()[0], Task("bad", lambda_result, ())], silent)


def test_executors_that_do_not_exist() -> None:
    for name in ("locl", "ray:", "ray:10.0.0.1:6379"):
        with pytest.raises(ArqError, match=r"choose local, ray, ray:auto or ray://host:port"):
            open_executor(name, 2)


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
