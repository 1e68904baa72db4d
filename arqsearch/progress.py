"""Progress for people: bars on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds between plain lines of one task.
PLAIN_SECONDS = 10.0


class ProgressReporter:
    """Callable ``(task, done, total, note)``; use as a context manager.

    :param quiet: report nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> ProgressReporter:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` pieces of `task` are finished."""
        if self.quiet:
            return
        if self._bars is not None:
            if task not in self._ids:
                self._ids[task] = self._bars.add_task(task, total=total or None, note=note)
            self._bars.update(self._ids[task], completed=done, total=total or None, note=note)
            return
        now = time.monotonic()
        self._started.setdefault(task, now)
        if done >= total or now - self._last.get(task, 0.0) >= PLAIN_SECONDS:
            self._last[task] = now
            elapsed = now - self._started[task]
            print(f"{task}: {done}/{total} after {elapsed:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)
