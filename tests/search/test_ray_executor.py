"""`RayExecutor`: what every executor owes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from arqsearch.errors import ArqError
from arqsearch.search.executor import Executor, Task, open_executor
from tests.search.executor_conformance import ExecutorConformance, log, silent

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'arqsearch[ray]'")


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with open_executor("ray", 2) as opened:
        yield opened
    assert not ray.is_initialized(), "what an executor started, it ends"


class TestRayExecutor(ExecutorConformance):
    """Ray on this machine, two tasks at a time."""


def test_another_version_on_a_node_is_refused(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    from arqsearch.search import ray_executor

    monkeypatch.setattr(ray_executor, "__version__", "0.0.0")
    tasks: list[Any] = [Task(name, log, ("", name)) for name in "ab"]
    with pytest.raises(ArqError, match=r"the caller 0\.0\.0; install the same version on every node"):
        executor.map(tasks, silent)
