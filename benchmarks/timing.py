"""Timing that compares: everyone runs once a round, in rotated order, and ratios are taken within rounds.

What a machine does besides (clock changes, other processes) lasts longer than one call, so it meets all who run in
the same round; a ratio within a round is steadier than a ratio of two medians.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

#: Seconds of each call, by contender: one for each round.
Table: TypeAlias = dict[str, list[float]]

#: Rounds that are run even where the time is used up.
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Rate:
    """Images for each second over the rounds."""

    median: float
    low: float
    high: float


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: each name comes first once in as many rounds as there are names."""
    start = turn % len(names) if names else 0
    return [*names[start:], *names[:start]]


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = float("inf"),
    on_round: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Table:
    """Time every call once in each round.

    :param calls: what to time; each has been called before, so that nothing is measured cold.
    :param rounds: number of rounds.
    :param seconds: no further round begins after this time, once there are :data:`MIN_ROUNDS`.
    :param on_round: told the number of rounds done.
    :param clock: seconds, ascending.
    """
    table: Table = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        for turn in range(rounds):
            for name in rotated(list(calls), turn):
                start = clock()
                calls[name]()
                table[name].append(clock() - start)
            on_round(turn + 1)
            if turn + 1 >= MIN_ROUNDS and clock() - begin > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return table


def rate(seconds: Sequence[float], images: int) -> Rate:
    """Median, least and greatest images for each second.

    :param seconds: of each round.
    :param images: in one call.
    """
    return Rate(images / median(seconds), images / max(seconds), images / min(seconds))


def paired_ratio(table: Table, name: str, peer: str) -> float | None:
    """How many times as fast `name` is as `peer`: the median over rounds of the ratio in that round.

    :returns: None where one of the two was not timed.
    """
    if not table.get(name) or not table.get(peer):
        return None
    return median(theirs / ours for ours, theirs in zip(table[name], table[peer], strict=True))
