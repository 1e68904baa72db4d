"""The exact 32-bit form of a requantization: ``clip((clip(x, lo, hi) * multiplier + offset) >> shift, ...)``.

Both sides are non-decreasing step functions of x, so they are equal on a range exactly when they step at the same
places. With p the place where the result reaches the level L, a pair (multiplier m, shift s) steps right if

    p*m + c >= L * 2^s   and   (p-1)*m + c < L * 2^s

for every level, which leaves an interval for the offset c. The places come from integer division and are checked
against the 64-bit definition on both sides, so nothing rests on how a rounding mode is derived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arqsearch.integer.ops import INT32_MAX, INT32_MIN, Requantize
from arqsearch.integer.requantize import MAX_STEPS, round_shift

Int64 = NDArray[np.int64]

#: Multipliers up to this are faster: kernels can multiply the two int16 halves of a sum.
SMALL_MULTIPLIER = 2**15 - 1
#: Channels that are tried first: where none of a layer's hardest fails, the others rarely do.
HARDEST = 8
#: Tried shifts below the largest that fits, and multipliers around the ideal one.
SHIFTS, NUDGES = (0, 1, 2), (0, 1, -1, 2)


@dataclass(frozen=True)
class Fast:
    """The 32-bit form, one entry for each channel or one for all (all int64 arrays holding int32)."""

    lo: Int64
    hi: Int64
    multiplier: Int64
    offset: Int64
    shift: Int64


@dataclass(frozen=True)
class Domain:
    """Values x for each channel or, as one entry, for all.

    :param lo: smallest value that can occur.
    :param hi: largest value that can occur.
    :param wide_lo: smallest value that kernels would like to leave unclipped; at most `lo`.
    :param wide_hi: largest such value.
    """

    lo: Int64
    hi: Int64
    wide_lo: Int64
    wide_hi: Int64


def fast_form(op: Requantize, lo: int, hi: int, domain: Domain) -> Fast | None:
    """Find the 32-bit form that equals ``clip(round(x * M / 2**k), lo, hi)`` for every x of the domain.

    :param lo: lower clip, which may be tighter than the operation's where the difference is known not to matter.
    :param hi: upper clip.
    :returns: the form, or None where one of the channels has none.
    """
    problem = _Problem(op, lo, hi, domain)
    result = problem.same_multiplier()
    if result is not None:
        return result
    if problem.steps * problem.count > MAX_STEPS:
        return None
    hardest = problem.hardest()
    if len(hardest) < problem.count and problem.solve(hardest) is None:
        return None
    return problem.solve(np.arange(problem.count))


class _Problem:
    """One requantization; arrays have one entry for each of the record's channels."""

    def __init__(self, op: Requantize, lo: int, hi: int, domain: Domain) -> None:
        self.rounding = op.rounding
        self.clip_lo, self.clip_hi = lo, hi
        self.count = n = max(op.multiplier.size, op.shift.size)

        def spread(values: Int64, smallest: bool) -> Int64:
            if n == 1:
                values = np.array([values.min() if smallest else values.max()])
            return np.broadcast_to(values.astype(np.int64), (n,))

        self.x_lo, self.x_hi = spread(domain.lo, True), spread(domain.hi, False)
        self.wide_lo = np.maximum(spread(domain.wide_lo, True), INT32_MIN)
        self.wide_hi = np.minimum(spread(domain.wide_hi, False), INT32_MAX)
        self.multiplier = np.broadcast_to(op.multiplier.astype(np.int64), (n,))
        self.shift = np.broadcast_to(op.shift.astype(np.int64), (n,))
        self.first = self.exact(self.x_lo, slice(None))
        self.last = self.exact(self.x_hi, slice(None))
        self.steps = int((self.last - self.first).max())

    def exact(self, x: Int64, channels: Int64 | slice) -> Int64:
        """The 64-bit definition; channels are the last axis of `x`."""
        scaled = round_shift(x * self.multiplier[channels], self.shift[channels], self.rounding)
        return np.asarray(np.clip(scaled, self.clip_lo, self.clip_hi))

    def same_multiplier(self) -> Fast | None:
        """The definition itself, where it fits 32 bits as it stands: always so for powers of two."""
        if self.rounding == "half_even":
            return None
        multiplier, shift = self.multiplier.copy(), self.shift.copy()
        least = 0 if self.rounding == "floor" else 1  # the half must stay an integer
        for _ in range(31):
            even = (multiplier % 2 == 0) & (multiplier > 0) & (shift > least)
            multiplier, shift = np.where(even, multiplier >> 1, multiplier), np.where(even, shift - 1, shift)
        constant = self.first == self.last
        offset = np.zeros_like(shift) if self.rounding == "floor" else np.int64(1) << np.maximum(shift - 1, 0)
        multiplier, shift = np.where(constant, 0, multiplier), np.where(constant, 0, shift)
        offset = np.where(constant, self.first, offset)
        if int(shift.max()) > 31:
            return None
        for lo, hi in ((self.wide_lo, self.wide_hi), (self.x_lo, self.x_hi)):
            if _fits(lo, hi, multiplier, offset).all():
                return Fast(lo, hi, multiplier, offset, shift)
        return None

    def hardest(self) -> Int64:
        """Channels whose steps lie widest apart from 0: they leave the fewest bits for the multiplier."""
        ratio = np.ldexp(self.multiplier.astype(np.float64), -self.shift)
        reach = np.where(self.first < self.last, 1.0 / np.maximum(ratio, 1e-300), 0.0)
        return np.sort(np.argsort(-reach, kind="stable")[:HARDEST])

    def solve(self, channels: Int64) -> Fast | None:
        """The form of some channels, from the quickest kind to the one that clips x as narrowly as possible."""
        places = _Places(self, channels)
        if not places.proven:
            return None
        found = np.zeros((5, len(channels)), dtype=np.int64)
        found[0], found[1] = self.wide_lo[channels], self.wide_hi[channels]
        found[3] = self.first[channels]  # a constant
        open_ = np.flatnonzero(self.first[channels] < self.last[channels])
        tight = (places.low, places.high)
        wide = (self.wide_lo[channels], self.wide_hi[channels])
        for (lo, hi), largest in ((wide, SMALL_MULTIPLIER), (wide, INT32_MAX), (tight, INT32_MAX)):
            if not len(open_):
                break
            solved, columns = places.search(open_, lo[open_], hi[open_], largest)
            found[:, open_[solved]] = columns[:, solved]
            open_ = open_[~solved]
        return None if len(open_) else Fast(*found)


class _Places:
    """Where the result of some channels steps: `step[j]` is the smallest x that gives ``level[j]`` or more."""

    def __init__(self, problem: _Problem, channels: Int64) -> None:
        self.problem, self.channels = problem, channels
        first, last = problem.first[channels], problem.last[channels]
        count = int((last - first).max(initial=0))
        # Channels with fewer steps repeat their last one.
        self.level = np.minimum(first + 1 + np.arange(count, dtype=np.int64)[:, None], last)
        multiplier, shift = np.maximum(problem.multiplier[channels], 1), problem.shift[channels]
        moving = first < last
        target = self.level << shift  # at most a product that the range proof holds to int64
        if problem.rounding != "floor":
            target = target - (np.int64(1) << (shift - 1))
        step = -((-target) // multiplier)
        if problem.rounding == "half_even":
            step = step + ((step * multiplier == target) & (self.level % 2 == 1))
        self.step = np.where(moving, step, problem.x_hi[channels])
        if count == 0:
            self.low, self.high, self.proven = problem.x_lo[channels], problem.x_hi[channels], True
            return
        self.low = np.where(moving, self.step[0] - 1, problem.x_lo[channels])
        self.high = self.step[-1]
        inside = (self.step > problem.x_lo[channels]) & (self.step <= problem.x_hi[channels])
        right = (problem.exact(self.step, channels) >= self.level) & (
            problem.exact(self.step - 1, channels) < self.level
        )
        self.proven = bool(((inside & right) | ~moving).all())

    def search(self, some: Int64, lo: Int64, hi: Int64, largest: int) -> tuple[NDArray[np.bool_], Int64]:
        """Try multipliers and shifts with x clipped to lo..hi.

        :param some: positions among this object's channels.
        :param largest: largest multiplier.
        :returns: which are solved, and (lo, hi, multiplier, offset, shift) of each as rows.
        """
        solved = np.zeros(len(some), dtype=np.bool_)
        found = np.zeros((5, len(some)), dtype=np.int64)
        for multiplier, shift in self._candidates(some, lo, hi, largest):
            rest = np.flatnonzero(~solved)
            if not len(rest):
                break
            m, s = multiplier[rest], shift[rest]
            low, high = lo[rest], hi[rest]
            least, most = self._offsets(some[rest], low, high, m, s)
            offset = least + (most - least) // 2
            good = (least <= most) & (s >= 0) & (m >= 0) & (m <= largest) & _fits(low, high, m, offset)
            found[:, rest[good]] = np.stack([low, high, m, offset, s])[:, good]
            solved[rest[good]] = True
        return solved, found

    def _candidates(self, some: Int64, lo: Int64, hi: Int64, largest: int) -> Iterator[tuple[Int64, Int64]]:
        """Multiplier and shift: the largest shift that fits first, as it makes the multiplier most precise."""
        numbers = self.problem.multiplier[self.channels[some]]
        places = self.problem.shift[self.channels[some]]
        ratio = np.ldexp(numbers.astype(np.float64), -places)
        extreme = np.maximum(np.maximum(np.abs(lo), np.abs(hi)), 1).astype(np.float64)
        # extreme * ratio * 2^s + 2^s < 2^31 and ratio * 2^s <= largest; what floats miss, _fits sees.
        room = np.minimum(2.0**31 / (extreme * ratio + 1.0), (largest + 0.5) / ratio)
        most = np.clip(np.floor(np.log2(room)), -1, 31).astype(np.int64)
        for below in SHIFTS:
            shift = most - below
            usable = np.maximum(shift, 0)
            ideal = np.floor(np.ldexp(numbers.astype(np.float64), usable - places) + 0.5).astype(np.int64)
            for nudge in NUDGES:
                yield ideal + nudge, shift

    def _offsets(self, some: Int64, lo: Int64, hi: Int64, m: Int64, s: Int64) -> tuple[Int64, Int64]:
        """The interval of offsets for which every step is right and both ends of the domain are."""
        problem, channels = self.problem, self.channels[some]
        bound = self.level[:, some] << np.maximum(s, 0)
        product = self.step[:, some] * m
        least = (bound - product).max(axis=0)
        most = (bound - product + (m - 1)).min(axis=0)
        first, last = problem.first[channels], problem.last[channels]
        start = np.clip(problem.x_lo[channels], lo, hi) * m
        end = np.clip(problem.x_hi[channels], lo, hi) * m
        one = np.int64(1) << np.maximum(s, 0)
        least = np.where(first > problem.clip_lo, np.maximum(least, first * one - start), least)
        most = np.where(last < problem.clip_hi, np.minimum(most, (last + 1) * one - 1 - end), most)
        # The sum with the offset and the offset itself must be an int32.
        least = np.maximum(least, np.maximum(INT32_MIN - np.minimum(lo * m, 0), INT32_MIN))
        most = np.minimum(most, np.minimum(INT32_MAX - np.maximum(hi * m, 0), INT32_MAX))
        return least, most


def _fits(lo: Int64, hi: Int64, multiplier: Int64, offset: Int64) -> NDArray[np.bool_]:
    """Whether x * multiplier and x * multiplier + offset are int32 for x in lo..hi (multiplier >= 0)."""
    low, high = lo * multiplier, hi * multiplier
    return np.asarray(
        (low >= INT32_MIN)
        & (high <= INT32_MAX)
        & (low + offset >= INT32_MIN)
        & (high + offset <= INT32_MAX)
        & (offset >= INT32_MIN)
        & (offset <= INT32_MAX)
    )
