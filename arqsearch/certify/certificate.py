"""Certificate files: JSON lines that are appended one by one, survive a kill and resume."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch import __version__
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import INCREMENTAL, CertificateLine
from arqsearch.certify.smoothing import Classifier, OnSamples, SmoothingSettings, total_distance
from arqsearch.errors import ArqError

if TYPE_CHECKING:
    from arqsearch.certify.base import BaseNetwork
    from arqsearch.certify.rules import Rule

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
    base: BaseNetwork | None = None,
    on_image: OnImage | None = None,
    on_samples: OnSamples | None = None,
) -> list[CertificateLine]:
    """Certify images into a file; images whose line is there already are not computed again.

    The finished file is the same, byte for byte, whether or not it was interrupted.

    :param classify: must be what ``program_hash`` names.
    :param positions: positions in ``dataset`` to certify, None = all. Shards of one set are positions of it, never
        subsets: lines state the identity of ``dataset``.
    :param labelled: False leaves the labels out, so that no image is skipped.
    :param base: the network that the ``incremental`` rule starts from.
    :param on_image: called after each image.
    :param on_samples: called as samples are taken.
    :returns: the lines of the asked images, in the order of the data set.
    :raises ArqError: when the file holds lines of another program, data set or settings.
    """
    from arqsearch.certify.rules import make_rule  # The rules read certificate files, too.

    order = list(range(len(dataset.images))) if positions is None else sorted(set(positions))
    if order and not 0 <= order[0] <= order[-1] < len(dataset.images):
        raise ArqError(f"Positions {order[0]}..{order[-1]} leave the data set; choose 0..{len(dataset.images) - 1}.")
    rank = {int(image): position for position, image in enumerate(dataset.ids)}
    if len(rank) < len(dataset.ids):
        raise ArqError("Two images of the data set have the same id; certificates need different ones.")
    rule = make_rule(settings, base)
    if base is not None:
        base.check(settings, dataset.identity)
        for position in order:
            base.line(int(dataset.ids[position]))
    expected = _expected(dataset, program_hash, settings, rule)
    with CertificateWriter(path) as writer:
        for line in writer.lines:
            _check_resumable(line, expected, settings, labelled, rank, dataset, path)
        done = {rank[line.image]: line for line in writer.lines}
        older = {line.version for line in writer.lines} - {__version__}
        if older and not set(order) <= set(done):
            raise ArqError(
                f"{path} was begun by version {', '.join(sorted(older))}, this is {__version__}. Finish it with that "
                "version, or certify into another file."
            )
        for index, position in enumerate(order):
            if position not in done:
                label = int(dataset.labels[position]) if labelled else None
                job = ImageJob(
                    classify, dataset.images[position], int(dataset.ids[position]), label, settings, program_hash,
                    dataset.identity, on_samples,
                )  # fmt: skip
                done[position] = rule.certify(job)
                writer.write(done[position])
            if on_image is not None:
                on_image(index + 1, len(order), done[position])
        if [rank[line.image] for line in writer.lines] != sorted(done):
            replace_lines(path, [done[position] for position in sorted(done)])
    return [done[position] for position in order]


def _expected(dataset: LabelledImages, program_hash: str, settings: SmoothingSettings, rule: Rule) -> dict[str, Any]:
    return {
        "program": program_hash,
        "data": dataset.identity,
        "sigma": float(settings.sigma),
        "d_tau": total_distance(settings.sigma, int(np.prod(dataset.images.shape[1:]))),
        "alpha": float(settings.alpha),
        "seed": settings.seed,
        "rule": rule.name,
        **rule.stated(settings),
    }


def _check_resumable(
    line: CertificateLine,
    expected: dict[str, Any],
    settings: SmoothingSettings,
    labelled: bool,
    rank: dict[int, int],
    dataset: LabelledImages,
    path: str | Path,
) -> None:
    stated = {name: value for name, value in line.settings.items() if name != "version"}
    differing = [f"{name} {stated.get(name)!r}, now {expected.get(name)!r}"
                 for name in dict.fromkeys([*expected, *stated]) if stated.get(name) != expected.get(name)]  # fmt: skip
    if stated["rule"] != expected["rule"]:
        differing = [f"rule {stated['rule']!r}, now {expected['rule']!r}"]
    if not differing and line.image not in rank:
        differing = [f"image {line.image}, which the data set does not have"]
    if not differing:
        label = int(dataset.labels[rank[line.image]]) if labelled else None
        skipped = settings.skip_misclassified and label is not None and line.predicted != label
        if line.label != label:
            differing = [f"label {line.label} of image {line.image}, now {label}"]
        elif line.estimated == skipped and (line.estimated or line.rule != INCREMENTAL):
            differing = [f"skip_misclassified {not settings.skip_misclassified}, now {settings.skip_misclassified}"]
    if differing:
        raise ArqError(f"{path} was begun with {'; '.join(differing)}. Certify into another file, or delete this one.")


def replace_lines(path: str | Path, lines: Iterable[CertificateLine]) -> None:
    """Write a certificate file at once or not at all."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.writelines(line.to_json().encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
