"""Proofs that onnxruntime's float rescale computes the program's integers.

``QLinearConv`` ends with ``saturate(rint(float32(acc + bias) * scale) + zero)`` in float32, ties to even; with input
and output scale 1 the factor is the weight scale itself. This is a non-decreasing step function of `acc`, as is the
program's requantization, because converting, multiplying and rounding are monotone. Two such functions are equal on a
range exactly when they agree on both sides of every step of one of them, and at both ends; there are at most 255 steps
in a byte. So the factor is searched among the float32 numbers next to the true ratio, and accepted when it agrees
at all these places. Ties that round up instead of to even are met by a factor slightly above the ratio, after the
integer bias has made the values non-negative; rounding down is rounding with the bias lowered by half a step.

``QuantizeLinear`` of a sum of bytes has at most 256 inputs for each term: all are tried, with a margin to the nearest
tie that is larger than the error of any order of evaluation, fused or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.integer import ops as O
from arqsearch.integer.requantize import input_quantize, requantize

Int64 = NDArray[np.int64]
#: Largest code of a byte.
TOP = 255
#: Zero points to try after the natural one, which needs no bias.
ZERO_POINTS = (0, 128, 64, 192, 32, 96, 160, 224)
#: Distances from the nearest float32 to the true ratio, in units in the last place.
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3, 4, -4)
#: Least distance to a tie. Products of bytes stay below `LARGEST` and sums below `SUM_LIMIT`: each of at most two
#: products (code and zero point) and four sums is then wrong by at most 2**-15.
MARGIN, LARGEST, SUM_LIMIT = 2.0**-12, 2.0**9, 2.0**10
#: Channels that are tried first: where nothing can be proven, one of them shows it.
FEW_CHANNELS = 8
#: Relative distances from a true ratio that move ties off themselves, yet no other value across one.
NUDGES = (0.0, 2.0**-10, -(2.0**-10), 2.0**-12, -(2.0**-12))
#: A channel that never steps gets this factor, with which no accumulator leaves 0.
DEAD = 2.0**-64


@dataclass(frozen=True)
class ConvRescale:
    """``saturate(rint(float32(acc + bias[c]) * scale[c]) + zero_point)``, proven for one requantization.

    :param scale: float32, one entry for each channel.
    :param bias: int64, one entry for each channel; to be added to the layer's own bias.
    :param zero_point: of the output, 0..255.
    :param clip: limits that the bytes must still be clipped to; None where they cannot leave them.
    """

    scale: NDArray[np.float32]
    bias: Int64
    zero_point: int
    clip: tuple[int, int] | None = None

    def codes(self, acc: Int64) -> Int64:
        """The bytes that onnxruntime computes; channels are the last axis."""
        product = (acc + self.bias).astype(np.float32) * self.scale
        whole = np.rint(np.clip(product, np.float32(-1024), np.float32(1024)))
        return np.asarray(np.clip(whole.astype(np.int64) + self.zero_point, 0, TOP))


@dataclass(frozen=True)
class CodeRescale:
    """``rint((code - zero) * scale + offset)``, proven for every code of a byte.

    :param scale: positive float32.
    :param offset: float32.
    :param lo: smallest value before the operation's clip.
    :param hi: largest.
    :param ties: whether ties occur: they go to even, so the result is right with an even zero point only.
    """

    scale: float
    offset: float
    lo: int
    hi: int
    ties: bool = False


@dataclass(frozen=True)
class PixelRescale:
    """``rint(x * scale[c] + offset[c])`` in float32, proven for every pixel value.

    :param scale: float32, one entry for each channel.
    :param offset: float32, one entry for each channel.
    """

    scale: NDArray[np.float32]
    offset: NDArray[np.float32]


def fit_conv(op: O.Requantize, channels: int, lo: int, hi: int, floor: int) -> ConvRescale | None:
    """Find numbers with which QLinearConv gives the bytes ``result - floor`` for every accumulator in ``lo..hi``.

    :param channels: of the accumulators.
    :param floor: result that the byte 0 stands for; results outside ``floor..floor+255`` saturate.
    :returns: None when nothing could be proven.
    """
    op = replace(op, lo=max(op.lo, floor), hi=min(op.hi, floor + TOP))
    if op.lo > op.hi:
        return None
    places = step_places(op, channels, lo, hi)
    wanted = requantize(places, op) - floor
    ratio = np.ldexp(np.broadcast_to(op.multiplier, channels).astype(np.float64), -op.shift.astype(np.int64))
    ratio = np.maximum(ratio, DEAD)
    limits = op.lo - floor, op.hi - floor
    half = 0.5 if op.rounding == "floor" else 0.0
    natural = (-floor,) if 0 <= -floor <= TOP else ()
    for zero_point in dict.fromkeys((*natural, *ZERO_POINTS)):
        start = np.where(ratio > 2.0**-31, np.rint((-floor - zero_point - half) / ratio), 0)
        if np.abs(start).max() + max(abs(lo), abs(hi)) >= O.INT32_MAX:
            continue
        bias = start.astype(np.int64)
        few = slice(0, FEW_CHANNELS)
        if _fit_channels(bias[few], ratio[few], zero_point, places[:, few], wanted[:, few], limits) is None:
            continue
        found = _fit_channels(bias, ratio, zero_point, places, wanted, limits)
        if found is not None:
            # The first two places are the ends of the range, so no byte lies outside theirs.
            ends = found.codes(places[:2])
            inside = limits[0] <= int(ends[0].min()) and int(ends[1].max()) <= limits[1]
            return found if inside else replace(found, clip=limits)
    return None


def step_places(op: O.Requantize, channels: int, lo: int, hi: int) -> Int64:
    """Both ends of ``lo..hi`` and both sides of every step of the operation in between, ``(places, channels)``.

    Every step is found by bisection with the exact operation.
    """
    ends = np.repeat(np.array([[lo], [hi]], dtype=np.int64), channels, axis=1)
    first, last = requantize(ends, op)
    levels = np.arange(int(first.min()) + 1, int(last.max()) + 1, dtype=np.int64)[:, None]
    # `low` is below the step (or at the lower end), `high` at or above it (or at the upper end).
    low, high = (np.broadcast_to(end, (len(levels), channels)).copy() for end in ends)
    while len(levels) and int((high - low).max()) > 1:
        middle = (low + high) >> 1
        reached = requantize(middle, op) >= levels
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.concatenate([ends, low, high])


def _fit_channels(
    start: Int64, ratio: NDArray[np.float64], zero_point: int, places: Int64, wanted: Int64, limits: tuple[int, int]
) -> ConvRescale | None:
    """The first factor and bias of each channel that agree at every place."""
    nearest = ratio.astype(np.float32)
    scale, bias, found = nearest.copy(), start.copy(), np.zeros(len(start), dtype=np.bool_)
    for near in (0, 1, -1):
        for distance in NEIGHBOURS:
            factor = nearest
            for _ in range(abs(distance)):
                factor = np.nextafter(factor, np.float32(np.inf if distance > 0 else 0))
            trial = ConvRescale(factor, start + near, zero_point)
            agrees = (np.clip(trial.codes(places), *limits) == wanted).all(axis=0) & ~found
            scale, bias, found = np.where(agrees, factor, scale), np.where(agrees, start + near, bias), found | agrees
            if found.all():
                return ConvRescale(scale, bias, zero_point)
    return None


def fit_codes(op: O.Requantize, lo: int, hi: int, *, offset: bool = True) -> CodeRescale | None:
    """Find a float32 line through every code in ``lo..hi`` of a byte tensor, for one multiplier.

    The result is right after clipping it to the operation's clip.

    :param lo: smallest code; ``hi - lo`` is at most 255.
    :param offset: whether an offset may be used; a term of a larger sum has none.
    """
    if op.multiplier.size != 1 or op.shift.size != 1:
        return None
    codes = np.arange(lo, hi + 1, dtype=np.int64)
    wanted = requantize(codes[:, None], op)[:, 0]
    ratio = float(np.ldexp(float(op.multiplier.reshape(-1)[0]), -int(op.shift.reshape(-1)[0])))
    if not 2.0**-40 <= ratio < LARGEST / TOP:
        return None
    for nudge in NUDGES:
        scale = float(np.float32(ratio * (1 + nudge)))
        line = codes * scale
        least, most = _offsets(line, wanted, op.lo, op.hi, MARGIN)
        middle = _middle(least, most) if offset else np.float32(0)
        if least <= middle <= most and abs(middle) < LARGEST:
            ends = np.rint(line[[0, -1]] + float(middle)).astype(np.int64)
            return CodeRescale(scale, float(middle), int(ends[0]), int(ends[1]))
    line = codes * ratio
    wide = line + SUM_LIMIT
    # With exact products and sums a tie is a tie.
    if np.float32(ratio) == ratio and np.array_equal(wide.astype(np.float32).astype(np.float64), wide):
        rounded = np.rint(line)
        if np.array_equal(np.clip(rounded, op.lo, op.hi), wanted):
            return CodeRescale(ratio, 0.0, int(rounded[0]), int(rounded[-1]), ties=True)
    return None


def fit_pixels(op: O.InputQuantize, channels: int, lo: int, hi: int) -> PixelRescale | None:
    """Find a float32 line for each channel through every pixel value, clipped as the operation clips it.

    The result is right after clipping it to ``op.lo..op.hi``.
    """
    pixels = np.arange(max(lo, op.pre_lo), min(hi, op.pre_hi) + 1, dtype=np.int64)[:, None]
    if not len(pixels):
        return None
    wanted = input_quantize(np.repeat(pixels, channels, axis=1), op)
    ratio = np.broadcast_to(np.ldexp(op.multiplier.astype(np.float64), -op.shift), (channels,))
    centre = np.abs(np.ldexp(op.offset.astype(np.float64), -op.shift))
    scale = ratio.astype(np.float32)
    line = pixels * scale.astype(np.float64)
    slack = 4 * np.spacing(np.maximum(np.abs(line), centre + 1).astype(np.float32)).astype(np.float64)
    least, most = _offsets(line, wanted, op.lo, op.hi, slack)
    offset = _middle(least, most)
    proven = (least <= offset) & (offset <= most) & (np.abs(offset) <= centre + 1)
    return PixelRescale(scale, offset) if proven.all() else None


def _offsets(line: Any, wanted: Int64, lo: int, hi: int, margin: Any) -> tuple[Any, Any]:
    """Between which offsets rounding the line gives `wanted`, `margin` away from every tie; per channel.

    Where the clip holds, only one side of a value matters.
    """
    least = np.where(wanted > lo, wanted - 0.5 - line + margin, -np.inf).max(axis=0)
    most = np.where(wanted < hi, wanted + 0.5 - line - margin, np.inf).min(axis=0)
    return least, most


def _middle(least: Any, most: Any) -> Any:
    """A float32 in the middle of two bounds, or as near to the only one as if the other were 1 away."""
    low = np.where(np.isfinite(least), least, np.where(np.isfinite(most), most - 1, 0.0))
    high = np.where(np.isfinite(most), most, low + 1)
    return ((low + high) / 2).astype(np.float32)


def saturating_pairs(weight: O.IntArray, largest: int) -> bool:
    """Whether two products of a byte and a signed weight can leave int16.

    Processors without VNNI add such pairs in 16 bits and saturate; which weights form a pair is the kernel's choice.

    :param weight: ``(O, ...)``.
    :param largest: largest byte, zero point included.
    """
    rows = np.sort(weight.reshape(len(weight), -1).astype(np.int64), axis=1)
    up, down = np.maximum(rows[:, -2:], 0).sum(axis=1), np.minimum(rows[:, :2], 0).sum(axis=1)
    return bool(int(up.max(initial=0)) * largest > 2**15 - 1 or int(down.min(initial=0)) * largest < -(2**15))
