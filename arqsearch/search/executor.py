"""Where work runs: `LocalExecutor` spreads independent tasks over processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from arqsearch.errors import ArqError

#: glibc's mallopt parameters, and the size below which memory is kept.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30

#: Called with (task, done, total, note); a total of 0 means unknown.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Task:
    """One independent piece of work.

    :param name: shown in progress, unique within a batch.
    :param function: importable function, called as ``function(*args, on_progress)``.
    :param args: picklable arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


class Executor(Protocol):
    """Runs tasks and returns their results by name; results do not depend on the number of workers."""

    def map(self, tasks: list[Task], on_progress: OnProgress) -> Mapping[str, Any]:
        """Run every task; raise the first failure after stopping the others."""
        ...


def use_threads(count: int) -> None:
    """Pin torch's threads (one for each worker process) and keep freed tensors' memory in the process.

    Giving pages back to the system and fetching them again costs a quarter of torch's speed on glibc;
    other C libraries are left as they are.
    """
    import ctypes

    import torch

    torch.set_num_threads(count)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, KEEP_BYTES)


class LocalExecutor:
    """Processes on this machine.

    :param workers: processes at a time; with 1, tasks run in this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, tasks: list[Task], on_progress: OnProgress) -> dict[str, Any]:
        """Run every task and return results by task name.

        :raises ArqError: the first failure of a task, after the others were stopped.
        """
        if self.workers == 1 or len(tasks) == 1:
            use_threads(1)
            return {task.name: task.function(*task.args, on_progress) for task in tasks}
        context = multiprocessing.get_context("spawn")
        messages: Any = context.Queue()
        waiting = list(tasks)
        running: dict[str, Any] = {}
        results: dict[str, Any] = {}
        checked = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    task = waiting.pop(0)
                    process = context.Process(target=_work, args=(task, messages), daemon=True)
                    process.start()
                    running[task.name] = process
                if time.monotonic() - checked > 1.0:
                    # Not only when it is quiet: the messages of a live worker must not hide a dead one.
                    _check_alive(running, messages)
                    checked = time.monotonic()
                try:
                    kind, name, payload = messages.get(timeout=1.0)
                except queue.Empty:
                    continue
                if kind == "progress":
                    on_progress(*payload)
                elif kind == "error":
                    raise (
                        payload if isinstance(payload, ArqError) else RuntimeError(f"Task {name!r} failed:\n{payload}")
                    )
                else:
                    results[name] = payload
                    running.pop(name).join()
        finally:
            for process in running.values():
                process.terminate()
        return {task.name: results[task.name] for task in tasks}


def _check_alive(running: Mapping[str, Any], messages: Any) -> None:
    for name, process in running.items():
        if not process.is_alive() and messages.empty():
            raise ArqError(
                f"The worker of task {name!r} died (exit code {process.exitcode}); out of memory? "
                "Run the same command again: finished work is kept."
            )


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, be it killed; a thread waits for that."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def _work(task: Task, messages: Any) -> None:
    _leave_with_parent()
    use_threads(1)
    try:
        result = task.function(*task.args, lambda *update: messages.put(("progress", task.name, update)))
        messages.put(("result", task.name, result))
    except ArqError as error:
        messages.put(("error", task.name, error))
    except BaseException:
        messages.put(("error", task.name, traceback.format_exc()))
