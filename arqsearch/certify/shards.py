"""Shards of a certificate file: who certifies which image, and the joining of the parts, byte for byte."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from arqsearch.certify.certificate import LabelledImages, read_lines, replace_lines
from arqsearch.certify.line import CertificateLine
from arqsearch.errors import ArqError

_NAME = re.compile(r"\.shard-(\d+)-of-(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Shard:
    """One of several parts: images i, i + n, i + 2n, ... of those that are asked for.

    :param number: i, from 1.
    :param count: n.
    """

    number: int
    count: int

    @staticmethod
    def parse(text: str) -> Shard:
        """Read ``i/n``.

        :raises ArqError: when it is not 1 ≤ i ≤ n.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ArqError(
                f"There is no shard {text!r}; write i/n with i from 1 to n, such as 1/4 for the first of four."
            )
        return Shard(int(found[1]), int(found[2]))

    def of(self, positions: Sequence[int]) -> list[int]:
        """The positions of this shard."""
        return list(positions[self.number - 1 :: self.count])

    def path(self, whole: str | Path) -> Path:
        """File of this shard: ``found.jsonl`` becomes ``found.shard-1-of-4.jsonl``."""
        file = Path(whole)
        return file.with_name(f"{file.stem}.shard-{self.number}-of-{self.count}{file.suffix}")


@dataclass(frozen=True)
class Merged:
    """What came of joining shards.

    :param path: the joined file.
    :param lines: its lines, in order.
    :param missing: ids of images that no shard has, of those that were to be certified.
    :param missing_shards: numbers of shards that were not given, by the files' names.
    """

    path: Path
    lines: tuple[CertificateLine, ...]
    missing: tuple[int, ...]
    missing_shards: tuple[int, ...]


def merge(
    paths: Sequence[str | Path],
    target: str | Path,
    dataset: LabelledImages | None = None,
    expected: Sequence[int] | None = None,
) -> Merged:
    """Join the files of shards into one, in the order of the data set.

    :param target: written at once or not at all.
    :param dataset: the set that all shards are positions of; None: its ids ascend, as those of every loaded set do.
    :param expected: ids that should be there; None: the regular series of positions that
        those found belong to.
    :raises ArqError: when there is no line, settings differ, two lines of an image differ, or an image is unknown.
    """
    rank = None if dataset is None else {int(image): position for position, image in enumerate(dataset.ids)}
    found: dict[int, CertificateLine] = {}
    first: CertificateLine | None = None
    for path in paths:
        for line in read_lines(path):
            first = first or line
            foreign = dataset is not None and line.data != dataset.identity
            if line.settings != first.settings or foreign:
                raise ArqError(f"{path}: image {line.image} was certified with other settings or data than the rest.")
            if rank is not None and line.image not in rank:
                raise ArqError(f"{path}: image {line.image} is not in the data set; merge with the set it came from.")
            if found.setdefault(line.image, line) != line:
                raise ArqError(
                    f"{path}: image {line.image} has two different lines; run `arqsearch verify` on each file."
                )
    if not found:
        raise ArqError(f"{', '.join(map(str, paths))} hold no certificate; give the files of the shards.")
    order = sorted(found, key=lambda image: image if rank is None else rank[image])
    lines = tuple(found[image] for image in order)
    replace_lines(target, lines)
    if expected is None:
        ids = range(order[-1] + 1) if dataset is None else [int(image) for image in dataset.ids]
        places = order if rank is None else [rank[image] for image in order]
        expected = [ids[place] for place in regular_series(places)]
    return Merged(Path(target), lines, tuple(i for i in expected if i not in found), absent_shards(paths))


def regular_series(places: Sequence[int]) -> Sequence[int]:
    """The arithmetic series from its first possible number to the last that these ascending numbers belong to."""
    step = math.gcd(*(b - a for a, b in pairwise(places)))
    return range(places[0] % step, places[-1] + 1, step) if step else places


def absent_shards(paths: Sequence[str | Path]) -> tuple[int, ...]:
    """Numbers of shards that these files' names speak of and that are not among them."""
    named = [match for path in paths if (match := _NAME.search(Path(path).name))]
    count = max((int(match[2]) for match in named), default=0)
    return tuple(sorted(set(range(1, count + 1)) - {int(match[1]) for match in named}))
