"""`RayExecutor`: tasks on a Ray cluster, or on Ray on this machine (extra ``arqsearch[ray]``)."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arqsearch import __version__
from arqsearch.errors import ArqError
from arqsearch.search.executor import ATTEMPTS, OnProgress, OnResult, Task, failed, lost, perform, require_distinct

#: Seconds between two looks for progress.
LOOK_SECONDS = 0.5
#: Environment variables of the caller that decide where data lies and how programs run.
PASSED_ON = ("ARQSEARCH_DATA", "ARQSEARCH_BACKEND")


class Messages:
    """Ray actor beside the caller that gathers the progress of tasks."""

    def __init__(self) -> None:
        self._updates: list[tuple[str, int, int, str]] = []

    def put(self, update: tuple[str, int, int, str]) -> None:
        """Add an update; the last one of a task replaces its earlier ones that nobody has seen."""
        self._updates = [known for known in self._updates if known[0] != update[0]]
        self._updates.append(update)

    def take(self) -> list[tuple[str, int, int, str]]:
        """The updates since the last call."""
        updates, self._updates = self._updates, []
        return updates


def run_remotely(payload: bytes, messages: Any, folder: str, paths: list[str], version: str) -> tuple[str, Any]:
    """Run a pickled task in a Ray worker.

    :param messages: handle of :class:`Messages`.
    :param folder: working folder of the caller, where it exists here: relative paths of a recipe start there.
    :param paths: the caller's import path, from which its functions come.
    :param version: of the caller's arqsearch.
    """
    if version != __version__:
        here = os.uname().nodename
        return "error", ArqError(
            f"{here} has arqsearch {__version__}, the caller {version}; install the same version on every node."
        )
    from arqsearch.search.executor import use_threads

    if Path(folder).is_dir():
        os.chdir(folder)
    sys.path.extend(path for path in paths if path not in sys.path)
    use_threads(1)
    return perform(pickle.loads(payload), lambda *update: messages.put.remote(update))


class RayExecutor:
    """Tasks on Ray; see :class:`arqsearch.search.executor.Executor`.

    :param workers: tasks at a time, each on one CPU of the cluster.
    :param address: as ``ray.init`` takes it; None uses ``RAY_ADDRESS``, or else starts Ray on this machine.
    :raises ArqError: when Ray is not installed or the cluster is not reached.
    """

    def __init__(self, workers: int, address: str | None = None) -> None:
        self.workers = workers
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ArqError("The executor 'ray' needs Ray; install it: pip install 'arqsearch[ray]'.") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            self._connect(address or os.environ.get("RAY_ADDRESS"))
        run = ray.remote(run_remotely)
        # Ray itself starts a task again whose worker or node is lost.
        self._run = run.options(max_retries=ATTEMPTS - 1, num_cpus=1)
        actor: Any = ray.remote(Messages)
        self._messages = actor.options(num_cpus=0, scheduling_strategy=self._here()).remote()

    def _connect(self, address: str | None) -> None:
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        options["runtime_env"] = {"env_vars": variables} if variables else {}
        if address is None:
            # "local" also keeps clear of a cluster that happens to run here.
            options |= {"address": "local", "num_cpus": self.workers, "include_dashboard": False}
        else:
            options["address"] = address
        try:
            self._ray.init(**options)
        except Exception as error:
            raise ArqError(
                f"Ray at {address or 'this machine'} is not reached ({error}). Is the cluster up (`ray status`), with "
                f"Ray {self._ray.__version__} on every node? A ray:// address needs its client server's port (10001)."
            ) from error

    def _here(self) -> Any:
        """Keep an actor on the caller's node (or, for a Ray Client, the server's): other nodes may be lost."""
        strategies = self._ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def map(self, tasks: Sequence[Task], on_progress: OnProgress, on_result: OnResult | None = None) -> dict[str, Any]:
        """Run every task and return results by task name; see :class:`arqsearch.search.executor.Executor`.

        :raises ArqError: the first failure of a task, after the others were stopped.
        """
        require_distinct(tasks)
        ray, waiting, results = self._ray, deque(tasks), {}
        running: dict[Any, Task] = {}
        folder, some = os.getcwd(), ray.cluster_resources().get("GPU", 0) > 0
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    task = waiting.popleft()
                    run = self._run.options(num_gpus=task.gpus) if task.gpus and some else self._run
                    running[run.remote(pickle.dumps(task), self._messages, folder, sys.path, __version__)] = task
                done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
                for update in ray.get(self._messages.take.remote()):
                    on_progress(*update)
                for reference in done:
                    name = running.pop(reference).name
                    results[name] = self._result(name, reference)
                    if on_result is not None:
                        on_result(name, results[name])
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise
        return {task.name: results[task.name] for task in tasks}

    def _result(self, name: str, reference: Any) -> Any:
        try:
            kind, payload = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise lost(name, type(error).__name__) from error
        if kind == "error":
            raise failed(name, payload)
        return payload

    def close(self) -> None:
        """Leave the cluster, and end Ray where this executor started it."""
        if self._started:
            self._ray.shutdown()
            self._started = False
