"""Non-decreasing integer step functions and the straight lines below and above them.

Every non-linear operation but the maximum is a staircase of one integer: a requantization, the input quantizer, the
clip of a residual sum. On an interval of integers l..u the hull of its points has few corners: the flat bottom step,
the flat top step, and between them a band of slope ``M / 2**k``. Each lower line of a family of three (flat, along the
band, up to the top) lies below the function at *every integer* of the interval, so each convex combination does too;
the slopes that the optimisation chooses are such combinations. Upper lines mirror them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.requantize import Int64, input_quantize, requantize

Array = NDArray[Any]
#: Larger tables of thresholds keep the ends only: of so many steps, one more or less makes no difference.
MAX_TABLE = 1 << 20


@dataclass(frozen=True)
class Lines:
    """Lower and upper lines ``slope * x + height`` of the elements of one tensor, three choices each.

    Choice 0 of the lower lines is flat and touches the bottom, the last one is the steepest. The upper lines' choice 0
    is flat and touches the top.

    :param slopes: float64 ``(2, 3, N, *shape)``, lower and upper, ascending in the second axis.
    :param heights: as `slopes`, at x = 0.
    :param start: int64 ``(2, N, *shape)``, the choice closest to the function in the middle of the interval.
    :param mass: float64 ``(N, *shape)``, bounds ``|slope x| + |height|`` and ``|f(x)|`` on the interval.
    :param gap: float64 ``(2, N, *shape)``, largest distance between the function and the starting line.
    :param steps: float64 ``(N, *shape)``, number of steps ``f(u) - f(l)``.
    """

    slopes: Tensor
    heights: Tensor
    start: Tensor
    mass: Tensor
    gap: Tensor
    steps: Tensor


class Staircase:
    """One monotone operation, compiled: thresholds for each channel and the band that its middle lies in.

    :param evaluate: the exact function on int64 arrays whose last axis is the channel.
    :param ratio: slope of the band, one for each channel; exact in float64.
    :param below: ``f(x) >= ratio * x + below`` wherever f is not clipped from above.
    :param above: ``f(x) <= ratio * x + above`` wherever f is not clipped from below.
    :param lo: smallest x that occurs.
    :param hi: largest.
    """

    def __init__(
        self, evaluate: Callable[[Int64], Int64], ratio: Array, below: Array, above: Array, lo: int, hi: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        channels = len(ratio)
        self.lo, self.hi, self.device = lo, hi, device
        ends = evaluate(np.array([[lo] * channels, [hi] * channels], dtype=np.int64))
        self.bottom, self.top = int(ends.min()), int(ends.max())
        self._whole = (self.top - self.bottom + 2) * channels <= MAX_TABLE
        if self._whole:
            levels = np.arange(self.bottom, self.top + 2, dtype=np.int64)[:, None].repeat(channels, 1)
        else:
            levels = np.stack([ends[0] + 1, ends[1]])
        self._first = first_at_least(evaluate, levels, lo, hi)
        #: Steps of more than one: the value beside a threshold has to be computed.
        self.jumps = bool((np.diff(self._first, axis=0)[: self.top - self.bottom] == 0).any()) or not self._whole
        self._table = self._tensor(self._first.T.ravel().astype(np.float64))
        self._columns = self._first.shape[0]
        self._constants = tuple(self._tensor(x) for x in (ratio, below, above))
        self._ends = tuple(self._tensor(x.astype(np.float64)) for x in (*ends, *self._first[[0, -1]]))

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def preimage(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The integers x with ``lo <= f(x) <= hi``, within the range that occurs; empty where lower exceeds upper.

        :param lo: float64 integers ``(N, *shape)``, channels at axis 1.
        """
        below = self._threshold(lo.clamp(self.bottom, self.top + 1))
        above = self._threshold((hi + 1).clamp(self.bottom, self.top + 1)) - 1
        return below, above

    def _channelwise(self, values: Tensor, ndim: int) -> Tensor:
        return values.reshape(1, -1, *(1,) * (ndim - 2))

    def _threshold(self, level: Tensor) -> Tensor:
        """First x with ``f(x) >= level`` (the whole table only); one past the range where there is none."""
        if not self._whole:
            ndim = level.ndim
            start, end, low, high = (self._channelwise(x, ndim) for x in self._ends)
            first = torch.where(level <= start, float(self.lo), low)
            return torch.where(level > end, float(self.hi + 1), torch.where(level >= end, high, first))
        index = (level - self.bottom).long()
        if len(self._table) > self._columns:
            channels = len(self._table) // self._columns
            index = index + self._channelwise(torch.arange(channels, device=index.device) * self._columns, level.ndim)
        return self._table[index]

    def lines(self, lo: Tensor, hi: Tensor, at: Callable[[Tensor], Tensor]) -> Lines:
        """Lines that hold for every integer of ``lo..hi``.

        :param lo: float64 integers ``(N, *shape)``, channels at axis 1.
        :param hi: float64, not below `lo`.
        :param at: the function itself on float64 tensors.
        """
        ratio, below, above = (self._channelwise(x, lo.ndim) for x in self._constants)
        bottom, top = at(lo), at(hi)
        many = bottom < top
        if self._whole:
            end, begin = self._threshold(bottom + 1) - 1, self._threshold(top)
        else:
            start, stop, low, high = (self._channelwise(x, lo.ndim) for x in self._ends)
            end = torch.where(bottom == start, low - 1, lo)
            begin = torch.where(top == stop, high, hi)
        end, begin = torch.minimum(end, hi), torch.maximum(begin, lo)
        end, begin = torch.where(many, end, hi), torch.where(many, begin, lo)
        if self.jumps:
            second, before = at(torch.minimum(end + 1, hi)), at(torch.maximum(begin - 1, lo))
        else:
            second, before = torch.minimum(bottom + 1, top), torch.maximum(top - 1, bottom)
        middle = (begin - end) > 1
        first, last = end + 1, begin - 1
        lower = _hull(
            (end, bottom), (torch.maximum(last, end), before), (hi, top), (first, last, middle), ratio, below, many
        )
        # The upper hull is the lower hull of -f(-x).
        upper = _hull(
            (-begin, -top), (-torch.minimum(first, begin), -second), (-lo, -bottom), (-last, -first, middle), ratio,
            -above, many,
        )  # fmt: skip
        slopes = torch.stack([lower[0], upper[0]])
        heights = torch.stack([lower[1], -upper[1]])
        centre = (lo + hi) / 2
        values = slopes * centre + heights
        later = torch.stack([values[0, 1] > values[0, 0], values[1, 1] < values[1, 0]])
        last = torch.stack([values[0, 2] > values[0, 1], values[1, 2] < values[1, 1]])
        start = later.long() + (later & last).long()
        size = torch.maximum(lo.abs(), hi.abs())
        mass = torch.maximum(slopes.amax((0, 1)), ratio) * size + heights.abs().amax((0, 1))
        mass = mass + torch.maximum(bottom.abs(), top.abs()) + torch.maximum(below.abs(), above.abs())
        chosen = [torch.gather(x, 1, start[:, None])[:, 0] for x in (slopes, heights)]
        corners = ((lo, bottom), (end, bottom), (first, second), (last, before), (begin, top), (hi, top))
        distance = torch.stack([value - (chosen[0] * x.clamp(lo, hi) + chosen[1]) for x, value in corners])
        gap = torch.stack([distance[:, 0].amax(0), -distance[:, 1].amin(0)]).clamp(min=0)
        return Lines(slopes, heights, start, mass, gap * many, top - bottom)


def _hull(
    first: tuple[Tensor, Tensor], middle: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor],
    band: tuple[Tensor, Tensor, Tensor], ratio: Tensor, offset: Tensor, many: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Three lower lines of ascending slope, ``(3, N, *shape)`` each, below three points and below a band.

    :param first: where the flat bottom ends.
    :param middle: the last point before the top step.
    :param last: where the top ends.
    :param band: smallest and largest x strictly between bottom and top, and whether there is any.
    :param ratio: slope of the line below the band.
    :param offset: its height at x = 0.
    :param many: whether the function is not constant; the lines are flat where it is.
    """
    width = torch.where(many, last[0] - first[0], 1.0)
    chord = (last[1] - first[1]) / width
    inner, outer = middle[0] - first[0], last[0] - middle[0]
    rise = (middle[1] - first[1]) / torch.where(inner > 0, inner, 1.0)
    end = (last[1] - middle[1]) / torch.where(outer > 0, outer, 1.0)
    convex = (inner > 0) & (outer > 0) & (rise <= end)
    slopes = (
        torch.stack([torch.zeros_like(chord), torch.where(convex, rise, chord), torch.where(convex, end, chord)]) * many
    )
    heights = first[1] - slopes * first[0]
    for x, value in (middle, last):
        heights = torch.minimum(heights, value - slopes * x)
    low, high, any_between = band
    for x in (low, high):
        heights = torch.where(any_between, torch.minimum(heights, (ratio - slopes) * x + offset), heights)
    heights[0] = first[1]
    return slopes, heights


def first_at_least(evaluate: Callable[[Int64], Int64], levels: Int64, lo: int, hi: int) -> Int64:
    """Smallest x in ``lo..hi`` with ``f(x) >= level`` by bisection; hi + 1 where there is none.

    :param levels: ``(L, channels)``.
    """
    left, right = np.full(levels.shape, lo, dtype=np.int64), np.full(levels.shape, hi + 1, dtype=np.int64)
    while (left < right).any():
        centre = (left + right) >> 1
        reached = evaluate(np.minimum(centre, hi)) >= levels
        open_ = left < right
        left, right = np.where(open_ & ~reached, centre + 1, left), np.where(open_ & reached, centre, right)
    return left


def band(multiplier: Int64, offset: Int64, shift: Int64, rounding: O.Rounding) -> tuple[Array, Array, Array]:
    """``(ratio, below, above)``: ``round((x*M + B) / 2**k)`` lies between ``ratio*x + below`` and ``ratio*x + above``.

    Common factors of two are cancelled first, so a function without rounding has a band of no width.

    :returns: float64, one entry for each channel; `below` and `above` rounded outwards.
    """
    rows = []
    for factor, add, places in zip(multiplier.tolist(), offset.tolist(), shift.tolist(), strict=True):
        ratio = float(factor) / 2.0**places
        while places > 0 and factor % 2 == 0 and add % 2 == 0:
            factor, add, places = factor // 2, add // 2, places - 1
        least = 0.0 if places == 0 else (-1.0 if rounding == "floor" else -0.5)
        most = 0.0 if places == 0 or rounding == "floor" else 0.5
        fraction = 2.0**-places if 0 < places <= 50 and rounding != "half_even" else 0.0
        shifted = float(add) / 2.0**places
        below, above = shifted + least + fraction, shifted + most
        slack = (abs(shifted) + 1.0) * 2.0**-50 if add != 0 and places > 0 else 0.0
        if factor >= 2**53:
            slack += ratio * 2.0**-34  # |x| ≤ 2**16 times the rounding of the ratio
        rows.append((ratio, below - slack, above + slack))
    columns = np.array(rows, dtype=np.float64).T
    return columns[0], columns[1], columns[2]


def staircase(op: O.Op, inputs: list[tuple[int, int]], device: torch.device) -> Staircase:
    """Compile the staircase of a Requantize, an InputQuantize or an Add (of the sum).

    :param inputs: stated range of each input.
    :raises ArqError: for an input quantizer that falls with the pixel.
    """
    if isinstance(op, O.Add):
        lo, hi = sum(x[0] for x in inputs), sum(x[1] for x in inputs)
        one, zero = np.ones(1), np.zeros(1)
        clip_lo, clip_hi = op.lo, op.hi
        return Staircase(lambda x: np.clip(x, clip_lo, clip_hi), one, zero, zero, lo, hi, device)
    (lo, hi) = inputs[0]
    if isinstance(op, O.InputQuantize):
        quantizer = op
        if int(op.multiplier.min()) < 0:
            raise ArqError(
                f"The input quantizer has the negative multiplier {int(op.multiplier.min())}, and linear bounds need a "
                "non-decreasing one. Negate the first layer's weights of that channel instead."
            )
        columns = _columns(op.multiplier, op.offset, np.array([op.shift]))
        return Staircase(lambda x: input_quantize(x, quantizer), *band(*columns, op.rounding), lo, hi, device)
    assert isinstance(op, O.Requantize)
    step = op
    columns = _columns(op.multiplier, np.zeros(1, dtype=np.int64), op.shift)
    return Staircase(lambda x: requantize(x, step), *band(*columns, op.rounding), lo, hi, device)


def _columns(*values: O.IntArray) -> tuple[Int64, Int64, Int64]:
    count = max(x.size for x in values)
    first, second, third = (np.broadcast_to(np.ravel(x).astype(np.int64), (count,)) for x in values)
    return first, second, third
