"""Robustness files: JSON lines, one for each image and ε, that survive a kill, resume and merge."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from arqsearch.certify.linf.robustness_line import RobustnessLine
from arqsearch.certify.linf.robustness_schema import KIND
from arqsearch.errors import ArqError


def is_robustness_file(path: str | Path) -> bool:
    """Whether a file's first line is one of a robustness file, as far as can be told."""
    try:
        with Path(path).open("rb") as file:
            return bool(json.loads(file.readline()).get("kind") == KIND)
    except (OSError, ValueError, AttributeError):
        return False


def read_lines(path: str | Path) -> list[RobustnessLine]:
    """Read a robustness file and check every line's digest; of an image and ε tried twice, the later line counts.

    :raises ArqError: when the file is missing, ends within a line, or a line is damaged, altered or contradicted.
    """
    if not Path(path).is_file():
        raise ArqError(f"No robustness file at {path}; `arqsearch verify-robustness` writes one.")
    text = Path(path).read_bytes()
    if text and not text.endswith(b"\n"):
        raise ArqError(f"{path} ends within a line: it was stopped there. Run `arqsearch verify-robustness` again.")
    return list(_latest(_parse(text, path), path).values())


def _parse(text: bytes, path: str | Path) -> list[RobustnessLine]:
    lines = text.decode("utf-8", "replace").split("\n")[:-1]
    return [RobustnessLine.from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _latest(lines: Iterable[RobustnessLine], path: str | Path) -> dict[tuple[int, int], RobustnessLine]:
    """The line of each image and ε: a decided one where there is one."""
    found: dict[tuple[int, int], RobustnessLine] = {}
    for line in lines:
        earlier = found.get(line.key)
        if earlier is not None and earlier.decided and line.decided and earlier.verdict != line.verdict:
            raise ArqError(
                f"{path}: image {line.image} at ε = {line.epsilon} is {earlier.verdict} in one line and {line.verdict} "
                "in another. Run `arqsearch verify` on it."
            )
        if earlier is None or not earlier.decided:
            found[line.key] = line
    return found


class RobustnessWriter:
    """Appends lines to a file; they are on disk before :meth:`write` returns.

    A last line that was cut by a kill is dropped on opening. Only one process may write a file.

    :param path: made with its folders when absent.
    :raises ArqError: when another process writes the file, or a whole line is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            text = self._file.read()
            whole = text[: text.rfind(b"\n") + 1]
            # Lines are checked before anything is cut: a file that is not ours stays as it was.
            #: The line of each image and ε, found in the file or written.
            self.lines = _latest(_parse(whole, path), path)
            self._file.truncate(len(whole))
        except OSError as error:
            self._file.close()
            raise ArqError(
                f"{path} is being written by another process; wait for it or choose another file."
            ) from error
        except ArqError:
            self._file.close()
            raise

    def write(self, lines: Sequence[RobustnessLine]) -> None:
        """Append lines and flush them to the disk."""
        if not lines:
            return
        self._file.write(b"".join(line.to_json().encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.update({line.key: line for line in lines})

    def close(self) -> None:
        """Close the file and let other processes write it."""
        self._file.close()

    def __enter__(self) -> RobustnessWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def replace_lines(path: str | Path, lines: Iterable[RobustnessLine]) -> None:
    """Write a robustness file at once or not at all."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.writelines(line.to_json().encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def merge(paths: Sequence[str | Path], target: str | Path) -> list[RobustnessLine]:
    """Join the files of shards: by image id, then ε; a decided line wins over an unknown one.

    :param target: written at once or not at all.
    :raises ArqError: when there is no line, programs or data differ, or two verdicts contradict each other.
    """
    found = [line for path in paths for line in read_lines(path)]
    if not found:
        raise ArqError(f"{', '.join(map(str, paths))} hold no verdict; give the files of the shards.")
    for line in found:
        if (line.program, line.data) != (found[0].program, found[0].data):
            raise ArqError(f"Image {line.image} was verified with another program or other data than the rest.")
    joined = _latest(found, target)
    lines = [joined[key] for key in sorted(joined)]
    replace_lines(target, lines)
    return lines
