"""Certificate files: JSON lines that are appended one by one, survive a kill, resume and merge."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.certify.line import CertificateLine
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, certify_image, total_distance
from arqsearch.errors import ArqError

#: Called after each image as (images done, images in all, its line).
OnImage: TypeAlias = Callable[[int, int, CertificateLine], None]


class LabelledImages(Protocol):
    """What certification needs of a data set; `arqsearch.data.Dataset` is one."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """uint8 ``(N, H, W, C)``."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``(N,)``."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 ``(N,)``, different for each image."""

    @property
    def identity(self) -> str:
        """SHA-256 of the decoded pixels and labels."""


def read_lines(path: str | Path) -> list[CertificateLine]:
    """Read a certificate file and check every line's digest.

    :raises ArqError: when the file is missing, ends within a line, or a line is damaged or altered.
    """
    if not Path(path).is_file():
        raise ArqError(f"No certificate file at {path}; `arqsearch certify` writes one.")
    text = Path(path).read_bytes()
    if text and not text.endswith(b"\n"):
        raise ArqError(f"{path} ends within a line: certification was stopped there. Run `arqsearch certify` again.")
    return _parse(text, path)


def _parse(text: bytes, path: str | Path) -> list[CertificateLine]:
    lines = text.decode("utf-8", "replace").split("\n")[:-1]
    return [CertificateLine.from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


class CertificateWriter:
    """Appends lines to a file; each is on disk before :meth:`write` returns.

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
            self._file.truncate(len(whole))
            #: The lines found in the file, then those written.
            self.lines = _parse(whole, path)
        except OSError as error:
            self._file.close()
            raise ArqError(
                f"{path} is being written by another process; wait for it or choose another file."
            ) from error
        except ArqError:
            self._file.close()
            raise

    def write(self, line: CertificateLine) -> None:
        """Append one line and flush it to the disk."""
        self._file.write(line.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def close(self) -> None:
        """Close the file and let other processes write it."""
        self._file.close()

    def __enter__(self) -> CertificateWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def certify_dataset(
    classify: Classifier,
    dataset: LabelledImages,
    program_hash: str,
    settings: SmoothingSettings,
    path: str | Path,
    *,
    positions: Iterable[int] | None = None,
    labelled: bool = True,
    on_image: OnImage | None = None,
) -> list[CertificateLine]:
    """Certify images into a file; images whose line is there already are not computed again.

    The finished file is the same, byte for byte, whether or not it was interrupted.

    :param classify: must be what ``program_hash`` names.
    :param positions: positions in ``dataset`` to certify, None = all. Shards of one set are positions of it, never
        subsets: lines state the identity of ``dataset``.
    :param labelled: False leaves the labels out, so that no image is skipped.
    :returns: the lines of the asked images, in the order of the data set.
    :raises ArqError: when the file holds lines of another program, data set or settings.
    """
    order = list(range(len(dataset.images))) if positions is None else sorted(set(positions))
    if order and not 0 <= order[0] <= order[-1] < len(dataset.images):
        raise ArqError(f"Positions {order[0]}..{order[-1]} leave the data set; choose 0..{len(dataset.images) - 1}.")
    rank = {int(image): position for position, image in enumerate(dataset.ids)}
    if len(rank) < len(dataset.ids):
        raise ArqError("Two images of the data set have the same id; certificates need different ones.")
    expected = _expected(dataset, program_hash, settings)
    with CertificateWriter(path) as writer:
        for line in writer.lines:
            _check_resumable(line, expected, settings, labelled, rank, dataset, path)
        done = {rank[line.image]: line for line in writer.lines}
        for index, position in enumerate(order):
            if position not in done:
                label = int(dataset.labels[position]) if labelled else None
                image_id = int(dataset.ids[position])
                line = certify_image(
                    classify,
                    dataset.images[position],
                    image_id,
                    label,
                    settings,
                    program=program_hash,
                    data=dataset.identity,
                )
                writer.write(line)
                done[position] = line
            if on_image is not None:
                on_image(index + 1, len(order), done[position])
        if [rank[line.image] for line in writer.lines] != sorted(done):
            _replace(path, [done[position] for position in sorted(done)])
    return [done[position] for position in order]


def _expected(dataset: LabelledImages, program_hash: str, settings: SmoothingSettings) -> dict[str, object]:
    return {
        "program": program_hash,
        "data": dataset.identity,
        "sigma": float(settings.sigma),
        "d_tau": total_distance(settings.sigma, int(np.prod(dataset.images.shape[1:]))),
        "alpha": float(settings.alpha),
        "seed": settings.seed,
        "n0": settings.n0,
        "n": settings.n,
        "rule": "fixed",
    }


def _check_resumable(
    line: CertificateLine,
    expected: dict[str, object],
    settings: SmoothingSettings,
    labelled: bool,
    rank: dict[int, int],
    dataset: LabelledImages,
    path: str | Path,
) -> None:
    differing = [f"{name} {line.settings[name]!r}, now {value!r}" for name, value in expected.items()
                 if line.settings[name] != value]  # fmt: skip
    if not differing and line.image not in rank:
        differing = [f"image {line.image}, which the data set does not have"]
    if not differing:
        label = int(dataset.labels[rank[line.image]]) if labelled else None
        skipped = settings.skip_misclassified and label is not None and line.predicted != label
        if line.label != label:
            differing = [f"label {line.label} of image {line.image}, now {label}"]
        elif line.estimated == skipped:
            differing = [f"skip_misclassified {not settings.skip_misclassified}, now {settings.skip_misclassified}"]
    if differing:
        raise ArqError(f"{path} was begun with {'; '.join(differing)}. Certify into another file, or delete this one.")


def merge(paths: Sequence[str | Path], target: str | Path, dataset: LabelledImages) -> Path:
    """Join the files of shards into one, in the order of the data set.

    :param dataset: the set that all shards are positions of.
    :returns: the path of the joined file, written at once or not at all.
    :raises ArqError: when settings differ, two lines of an image differ, or an image is unknown.
    """
    rank = {int(image): position for position, image in enumerate(dataset.ids)}
    found: dict[int, CertificateLine] = {}
    first: CertificateLine | None = None
    for path in paths:
        for line in read_lines(path):
            first = first or line
            if line.settings != first.settings or line.data != dataset.identity:
                raise ArqError(f"{path}: image {line.image} was certified with other settings or data than the rest.")
            if line.image not in rank:
                raise ArqError(f"{path}: image {line.image} is not in the data set; merge with the set it came from.")
            if found.setdefault(rank[line.image], line) != line:
                raise ArqError(
                    f"{path}: image {line.image} has two different lines; run `arqsearch verify` on each file."
                )
    _replace(target, [found[position] for position in sorted(found)])
    return Path(target)


def _replace(path: str | Path, lines: Iterable[CertificateLine]) -> None:
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.writelines(line.to_json().encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
