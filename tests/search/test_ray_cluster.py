"""`RayExecutor` where no Ray runs yet: a node that is lost during work, and clusters that are not there."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arqsearch.errors import ArqError
from arqsearch.search.executor import OnProgress, Task, open_executor
from tests.search.executor_conformance import compute, compute_tasks, die_once, log, silent, starts

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'arqsearch[ray]'")


@contextmanager
def a_cluster(**head: Any) -> Iterator[Any]:
    """A head node. Ray gives a node 30 seconds to start, which a busy machine may miss: it is tried three times."""
    from ray.cluster_utils import Cluster

    for attempt in range(3):
        cluster = Cluster()
        try:
            cluster.add_node(include_dashboard=False, **head)
            break
        except Exception:
            cluster.shutdown()
            if attempt == 2:
                raise
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def work_on_node(folder: str, name: str, slow: str, on_progress: OnProgress) -> str:
    """Note the start and on which node, and say where it was done; on one of the nodes it never ends."""
    node = str(ray.get_runtime_context().get_node_id())
    (Path(folder) / f"{name}-{log(folder, name)}.node").write_text(node)
    time.sleep(300 if node == slow else 0.2)
    return node


def test_a_lost_node_loses_nothing_and_nothing_else_runs_twice(tmp_path: Path) -> None:
    with a_cluster(num_cpus=1) as cluster:
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)

        def take_away() -> None:
            """As soon as the second node works on something."""
            while not any(path.read_text() == second.node_id for path in tmp_path.glob("*.node")):
                time.sleep(0.1)
            cluster.remove_node(second, allow_graceful=False)

        names = [f"w{index}" for index in range(6)]
        tasks = [Task(name, work_on_node, (str(tmp_path), name, second.node_id)) for name in names]
        thread = threading.Thread(target=take_away, daemon=True)
        thread.start()
        arrived: list[str] = []
        with open_executor("ray", 2) as executor:
            results = executor.map(tasks, silent, lambda name, _: arrived.append(name))
        thread.join(30)
        assert list(results) == names and sorted(arrived) == names
        (again,) = [name for name in names if starts(tmp_path, name) > 1]
        assert (tmp_path / f"{again}-1.node").read_text() == second.node_id
        assert starts(tmp_path, again) == 2 and sum(starts(tmp_path, name) for name in names) == len(names) + 1
        assert set(results.values()) == {cluster.head_node.node_id}


def test_an_address_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ArqError, match=r"Ray at nonsense is not reached"):
        open_executor("ray", 2)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArqError, match=r"pip install 'arqsearch\[ray\]'"):
        open_executor("ray", 2)


@pytest.mark.slow
def test_a_ray_client_from_outside_the_cluster(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        a_cluster(num_cpus=2, ray_client_server_port=port),
        open_executor(f"ray://127.0.0.1:{port}", 2) as executor,
    ):
        results = executor.map([*compute_tasks(), Task("die_once", die_once, (str(tmp_path),))], silent)
    assert results["die_once"] == "alive" and list(results) == ["t3", "t1", "t2", "die_once"]
    assert results["t1"] == (1, compute(1, silent)[1])
