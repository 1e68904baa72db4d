"""Where work runs: the `Executor` protocol, and `LocalExecutor`, processes of one thread each on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from arqsearch.errors import ArqError

#: glibc's mallopt parameters, and the size below which memory is kept.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30
#: How often a task is started before its worker's death is taken for the task's own doing.
ATTEMPTS = 3

#: Called with (task, done, total, note); a total of 0 means unknown.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]
#: Called in the calling process with (name of the task, its result) as soon as a result is there.
OnResult: TypeAlias = Callable[[str, Any], None]


@dataclass(frozen=True)
class Task:
    """One independent piece of work, a pure function of its arguments: it may be started again elsewhere.

    :param name: shown in errors, unique within a batch.
    :param function: importable function, called as ``function(*args, on_progress)``.
    :param args: picklable arguments.
    :param gpus: GPUs that it needs, for executors that hand them out where there are any; a fraction shares one.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    gpus: float = 0.0


class Executor(Protocol):
    """Runs tasks and returns their results by name; nothing depends on the number of workers or where they are.

    Workers stay between two calls of :meth:`map`, so that what a task function keeps in its process is there again. A
    task whose worker or machine is lost runs again on another one; results that have arrived stay.
    """

    @property
    def workers(self) -> int:
        """Tasks that run at a time, at most."""
        ...

    def map(
        self, tasks: Sequence[Task], on_progress: OnProgress, on_result: OnResult | None = None
    ) -> Mapping[str, Any]:
        """Run every task; results in the order of the tasks.

        :param on_result: called with each result when it arrives, in any order.
        :raises ArqError: the first failure of a task, after the others were stopped; or a task whose workers died
            :data:`ATTEMPTS` times.
        """
        ...

    def close(self) -> None:
        """End the workers; a later :meth:`map` starts new ones."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_executor(where: str, workers: int) -> Executor:
    """The executor that a recipe names.

    :param where: ``local``; ``ray`` (this machine, or the cluster that ``RAY_ADDRESS`` names), ``ray:auto`` (the
        cluster that this machine is part of) or ``ray://host:port`` (a Ray Client server).
    :param workers: tasks at a time.
    :raises ArqError: when it is none of these, or Ray is missing or not reached.
    """
    if where == "local":
        return LocalExecutor(workers)
    if where in {"ray", "ray:auto"} or where.startswith("ray://"):
        from arqsearch.search.ray_executor import RayExecutor

        return RayExecutor(workers, {"ray": None, "ray:auto": "auto"}.get(where, where))
    raise ArqError(f"There is no executor {where!r}; choose local, ray, ray:auto or ray://host:port.")


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


def gpus_for(device: str) -> float:
    """GPUs that a task with this torch device needs."""
    return 0.0 if device == "cpu" else 1.0


def require_distinct(tasks: Sequence[Task]) -> None:
    """Results are known by name.

    :raises ArqError: when two tasks have the same name.
    """
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise ArqError(f"Two tasks are called {twice[0]!r}; give each its own name.")


def lost(name: str, how: str) -> ArqError:
    """The error for a task whose workers died too often.

    :param how: what is known of the last death.
    """
    return ArqError(
        f"The worker of task {name!r} died ({how}), {ATTEMPTS} times in a row; out of memory? "
        "Run the same command again: finished work is kept."
    )


def failed(name: str, payload: Any) -> Exception:
    """The exception of a task that failed in a worker: the user's as it is, any other with its traceback."""
    return payload if isinstance(payload, ArqError) else RuntimeError(f"Task {name!r} failed:\n{payload}")


class LocalExecutor:
    """Processes on this machine.

    :param workers: processes at a time; with 1, tasks run in this process, and so does a single task.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def map(self, tasks: Sequence[Task], on_progress: OnProgress, on_result: OnResult | None = None) -> dict[str, Any]:
        """Run every task and return results by task name; see :class:`Executor`.

        :raises ArqError: the first failure of a task, after the others were stopped.
        """
        require_distinct(tasks)
        results: dict[str, Any] = {}

        def keep(name: str, result: Any) -> None:
            results[name] = result
            if on_result is not None:
                on_result(name, result)

        if self.workers == 1 or len(tasks) == 1:
            use_threads(1)
            for task in tasks:
                keep(task.name, task.function(*task.args, on_progress))
            return results
        waiting, attempts = deque(tasks), dict.fromkeys((task.name for task in tasks), 0)
        try:
            while len(results) < len(tasks):
                self._hand_out(waiting, attempts)
                busy = [worker for worker in self._pool if worker.task is not None]
                # A dead worker's pipe reads as ended once its last message is taken, so none of them is missed.
                ready = wait([worker.messages for worker in busy])
                for worker in busy:
                    if worker.messages in ready:
                        self._take(worker, waiting, attempts, keep, on_progress)
        except BaseException:
            for worker in [worker for worker in self._pool if worker.task is not None]:
                worker.end()
                self._pool.remove(worker)
            raise
        return {task.name: results[task.name] for task in tasks}

    def _hand_out(self, waiting: deque[Task], attempts: dict[str, int]) -> None:
        idle = [worker for worker in self._pool if worker.task is None]
        while waiting and (idle or len(self._pool) < self.workers):
            if idle:
                worker = idle.pop()
            else:
                worker = _Worker()
                self._pool.append(worker)
            task = waiting.popleft()
            attempts[task.name] += 1
            if not worker.start(task):
                # It died between two tasks, by no fault of this one.
                attempts[task.name] -= 1
                waiting.appendleft(task)
                self._pool.remove(worker)

    def _take(
        self, worker: _Worker, waiting: deque[Task], attempts: dict[str, int], keep: OnResult, on_progress: OnProgress
    ) -> None:
        """Take one message of a busy worker, or notice its death."""
        task = worker.task
        assert task is not None
        try:
            kind, payload = worker.messages.recv()
        except (EOFError, OSError):
            self._pool.remove(worker)
            how = worker.end()
            if attempts[task.name] >= ATTEMPTS:
                raise lost(task.name, how) from None
            waiting.appendleft(task)
            return
        if kind == "progress":
            on_progress(*payload)
        elif kind == "error":
            raise failed(task.name, payload)
        else:
            worker.task = None
            keep(task.name, payload)

    def close(self) -> None:
        """End the workers."""
        for worker in self._pool:
            worker.end()
        self._pool.clear()


class _Worker:
    """A process that does one task after another, and the pipe to it: a kill leaves no lock taken."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.messages, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def start(self, task: Task) -> bool:
        """Hand over a task; False when the process is gone."""
        try:
            self.messages.send(task)
        except (BrokenPipeError, ConnectionResetError):
            self.end()
            return False
        self.task = task
        return True

    def end(self) -> str:
        """Stop the process, whatever it does, and say how it ended."""
        self.messages.close()
        if self.task is None:  # It waits for a task, and leaves in good order when there will be none.
            self.process.join(5)
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return f"exit code {self.process.exitcode}"


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, be it killed; a thread waits for that."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _serve(messages: Connection) -> None:
    _leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process.
    use_threads(1)
    while True:
        try:
            task: Task = messages.recv()
        except EOFError:
            return
        outcome = perform(task, lambda *update: messages.send(("progress", update)))
        try:
            messages.send(outcome)
        except (AttributeError, TypeError, pickle.PicklingError):
            messages.send(("error", f"Its result cannot be pickled.\n{traceback.format_exc()}"))


def perform(task: Task, on_progress: OnProgress) -> tuple[str, Any]:
    """Run a task in a worker; ``("result", value)`` or ``("error", ArqError or traceback)``, never an exception."""
    try:
        return "result", task.function(*task.args, on_progress)
    except ArqError as error:
        return "error", error
    except Exception:
        return "error", traceback.format_exc()
