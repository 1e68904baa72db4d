"""What is proven of a layer's sums over stored codes: which accumulator widths are safe, and for how long.

The kernels multiply stored codes u = x - zero (0..largest) of the input and move the zero point into the bias. With
only the sums P of the positive and N of the negative weights of some terms, every subset of these terms lies in
N*largest..P*largest. Definitions: "Field 23" in csrc/arq_blob.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from arqsearch.integer.ops import INT32_MAX, INT32_MIN, IntArray
from arqsearch.integer.ranges import INT16_MAX, INT16_MIN

Int64 = NDArray[np.int64]


class SumClass(IntEnum):
    """ARQ_SUM_*."""

    ANY = 0
    U8 = 1
    PAIRS = 2
    INT16 = 3


@dataclass(frozen=True)
class Sums:
    """Class and depth of a layer, and ranges of its accumulators (bias included) for each output channel.

    :param depth: pairs of one lane that can be added up in int16; 1 below PAIRS.
    :param lo: smallest accumulator that can occur.
    :param hi: largest accumulator that can occur.
    :param code_lo: smallest accumulator with any codes 0..255; the same as `lo` for class ANY.
    :param code_hi: largest accumulator with any codes 0..255.
    """

    sum_class: SumClass
    depth: int
    lo: Int64
    hi: Int64
    code_lo: Int64
    code_hi: Int64


def weight_bits(weight: IntArray) -> int:
    """Fewest bits (2..8, or 16) that hold every code in two's complement."""
    low, high = int(weight.min()), int(weight.max())
    bits = max(2, max(high, -low - 1).bit_length() + 1)
    return bits if bits <= 8 else 16


def analyse(
    weight: IntArray, bias: IntArray, value_lo: int, value_hi: int, *, padded: bool, depthwise: bool, zero: int | None
) -> Sums:
    """Classify a layer by interval analysis.

    :param weight: ``(O, KH, KW, I/groups)``.
    :param bias: ``(O,)``.
    :param value_lo: smallest value of the (rescaled) input.
    :param value_hi: largest value of the (rescaled) input.
    :param padded: whether positions outside the image, which hold value 0, take part.
    :param depthwise: one group for each channel.
    :param zero: zero point of the stored codes, or None where there are no codes that kernels can use.
    """
    out = len(weight)
    flat = weight.reshape(out, -1)
    total, bias64 = flat.sum(axis=1, dtype=np.int64), bias.astype(np.int64)
    positive = np.maximum(flat, 0).sum(axis=1, dtype=np.int64)
    negative = total - positive
    if padded:
        value_lo, value_hi = min(value_lo, 0), max(value_hi, 0)
    lo, hi = positive * value_lo + negative * value_hi + bias64, positive * value_hi + negative * value_lo + bias64
    plain = Sums(SumClass.ANY, 1, lo, hi, lo, hi)
    if zero is None or weight_bits(weight) == 16:
        return plain
    largest = max(value_hi, 0) - zero
    moved = bias64 + zero * total
    sum_lo, sum_hi = negative * largest, positive * largest
    if not _within(sum_lo + np.minimum(moved, 0), sum_hi + np.maximum(moved, 0), INT32_MIN, INT32_MAX):
        return plain
    code_lo, code_hi = negative * 255 + moved, positive * 255 + moved
    if _within(sum_lo, sum_hi, INT16_MIN, INT16_MAX):
        # The kernels may rely on this class instead of the codes.
        code_lo, code_hi = np.maximum(code_lo, INT16_MIN + moved), np.minimum(code_hi, INT16_MAX + moved)
        return Sums(SumClass.INT16, _pair_count(weight, depthwise), lo, hi, code_lo, code_hi)
    depth = safe_depth(weight, largest, depthwise=depthwise)
    sum_class = SumClass.PAIRS if depth else SumClass.U8
    return Sums(sum_class, max(depth, 1), lo, hi, code_lo, code_hi)


def safe_depth(weight: IntArray, largest: int, *, depthwise: bool) -> int:
    """How many neighbouring pairs of a lane, wherever they begin, surely sum to an int16 in any part; 0 if not one.

    :param weight: ``(O, KH, KW, I/groups)``, 8 bits.
    :param largest: largest stored code.
    """
    lanes = _lanes(weight.astype(np.int16), depthwise)
    pairs = lanes.shape[-1] // 2
    # Most a window of pairs can reach, up and down, as running totals that begin with 0.
    totals = []
    for signed in (np.maximum(lanes, 0), -np.minimum(lanes, 0)):
        pair_sums = signed.reshape(*lanes.shape[:-1], pairs, 2).sum(axis=-1, dtype=np.int32)
        totals.append(np.concatenate([np.zeros_like(pair_sums[..., :1]), pair_sums.cumsum(axis=-1)], axis=-1))

    def safe(depth: int) -> bool:
        up, down = (int((total[..., depth:] - total[..., :-depth]).max()) * largest for total in totals)
        return up <= INT16_MAX and -down >= INT16_MIN

    low, high = 0, pairs  # safe(low) holds, and safe is monotone
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if safe(middle) else (low, middle - 1)
    return low


def _lanes(weight: IntArray, depthwise: bool) -> IntArray:
    """Weights in the order of the prepared memory, one row for each lane: ``(rows, terms of a lane)``."""
    out, height, width, channels = weight.shape
    if depthwise:
        taps = weight.reshape(out, height * width)
        return np.pad(taps, ((0, 0), (0, taps.shape[1] % 2)))
    fours = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, -channels % 4))).reshape(out, -1, 2, 2)
    return fours.transpose(0, 2, 1, 3).reshape(2 * out, -1)


def _pair_count(weight: IntArray, depthwise: bool) -> int:
    _, height, width, channels = weight.shape
    return int((height * width + 1) // 2 if depthwise else height * width * (-(-channels // 4)))


def _within(low: Int64, high: Int64, least: int, most: int) -> bool:
    return int(low.min()) >= least and int(high.max()) <= most
