"""Sum classes promise what is true of the worst codes, and the most that is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from arqsearch.integer.native.sums import SumClass, analyse, safe_depth, weight_bits

Weights = np.ndarray[Any, Any]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [((-1, 1), 2), ((-2, 1), 2), ((0, 0), 2), ((0, 2), 3), ((-4, 3), 3), ((-5, 0), 4), ((-127, 127), 8),
     ((-128, 0), 8), ((0, 128), 16), ((-129, 0), 16), ((-(2**15), 0), 16)],
)  # fmt: skip
def test_the_fewest_bits_that_hold_the_codes(codes: tuple[int, int], bits: int) -> None:
    assert weight_bits(np.array(codes, dtype=np.int16)) == bits


def reach(weights: list[int], largest: int) -> tuple[int, int]:
    """Smallest and largest sum of any subset of the terms, over codes 0..largest."""
    return sum(min(w, 0) for w in weights) * largest, sum(max(w, 0) for w in weights) * largest


def lanes_of(channel: Weights, depthwise: bool) -> list[list[int]]:
    """The lanes of one output channel, spelled out from the statement in arq_blob.h."""
    if depthwise:
        taps = [int(w) for w in channel.ravel()]
        return [taps + [0] * (len(taps) % 2)]
    lanes: list[list[int]] = [[], []]
    for row, column in itertools.product(range(channel.shape[0]), range(channel.shape[1])):
        pixel = channel[row, column].tolist()
        pixel += [0] * (-len(pixel) % 4)
        for four in range(0, len(pixel), 4):
            lanes[0] += pixel[four : four + 2]
            lanes[1] += pixel[four + 2 : four + 4]
    return lanes


def depth_by_trial(weight: Weights, largest: int, depthwise: bool) -> int:
    """The largest depth at which every window of pairs of every lane fits int16."""
    lanes = [lane for channel in weight for lane in lanes_of(channel, depthwise)]
    pairs = len(lanes[0]) // 2
    best = 0
    for depth in range(1, pairs + 1):
        for lane in lanes:
            for start in range(pairs - depth + 1):
                low, high = reach(lane[2 * start : 2 * (start + depth)], largest)
                if low < -(2**15) or high >= 2**15:
                    return best
        best = depth
    return best


@pytest.mark.parametrize("seed", range(60))
def test_depth_is_the_largest_safe_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depthwise = seed % 3 == 0
    shape = (2, 3, int(rng.integers(1, 4)), 1 if depthwise else int(rng.integers(1, 7)))
    top = int(rng.choice([3, 7, 31, 127]))
    weight = rng.integers(-top - 1, top + 1, size=shape).astype(np.int8)
    largest = int(rng.choice([15, 127, 255]))
    assert safe_depth(weight, largest, depthwise=depthwise) == depth_by_trial(weight, largest, depthwise)


def classify(weight: Weights, lo: int, hi: int, bias: int = 0, **options: Any) -> tuple[SumClass, int]:
    settings = {"padded": False, "depthwise": False, "zero": min(lo, 0)} | options
    sums = analyse(weight, np.full(len(weight), bias), lo, hi, **settings)
    return sums.sum_class, sums.depth


def test_classes_at_their_limits() -> None:
    def row(*values: int) -> Weights:
        return np.array(values, dtype=np.int16).reshape(1, 1, 1, -1)

    # 128 * 255 = 32640 <= 32767 < 129 * 255, -128 * 255 = -32640 >= -32768.
    assert classify(row(64, 0, 64, 0), 0, 255) == (SumClass.INT16, 1)
    assert classify(row(65, 0, 64, 0), 0, 255) == (SumClass.PAIRS, 1)
    assert classify(row(64, 64, 0, 0, 1, 0, 0, 0), 0, 255) == (SumClass.PAIRS, 1)
    assert classify(row(64, 63, 9, 0, 1, 0, 0, 0), 0, 255) == (SumClass.PAIRS, 2)
    assert classify(row(65, 64, 0, 0), 0, 255) == (SumClass.U8, 1)
    assert classify(row(-64, -64, 0, 0), 0, 255) == (SumClass.INT16, 1)
    assert classify(row(-65, -64, 0, 0), 0, 255) == (SumClass.U8, 1)
    assert classify(row(128, 0, 0, 0), 0, 255) == (SumClass.ANY, 1)
    assert classify(row(127, 127, 127, 127), 0, 15) == (SumClass.INT16, 1)


def test_codes_are_counted_from_the_zero_point() -> None:
    """Values -100..27 are codes 0..127; with padding and only negative values, the code of 0 is the largest."""
    weight = np.full((1, 1, 1, 4), 64, dtype=np.int16)
    assert classify(weight, -100, 27) == (SumClass.INT16, 1)
    assert classify(weight, -100, 28) == (SumClass.PAIRS, 1)
    for padded in (False, True):
        assert classify(weight, -200, -100, padded=padded) == (SumClass.PAIRS, 1)


def test_a_bias_that_would_leave_int32_after_moving() -> None:
    weight = np.full((1, 1, 1, 4), 100, dtype=np.int16)
    assert classify(weight, -100, 100, bias=2**31 - 1 - 400 * 200)[0] == SumClass.U8
    # The last bias upwards: moved by -100 * 400, and then up by 400 * 200, it is 2^31 - 1.
    assert classify(weight, -100, 100, bias=2**31 - 1 - 400 * 100)[0] == SumClass.U8
    assert classify(weight, -100, 100, bias=-(2**31) + 400 * 100 - 1)[0] == SumClass.ANY
    assert classify(weight, 0, 200, bias=2**31 - 400 * 200)[0] == SumClass.ANY


def test_sums_without_their_bias_must_fit_too() -> None:
    """A kernel may add the bias last: 70,000 terms of -128 * 255 are beyond int32, however large the bias is."""
    weight = np.full((1, 1, 1, 70_000), -128, dtype=np.int16)
    assert classify(weight, 0, 255, bias=2**31 - 1)[0] == SumClass.ANY
    assert classify(weight[..., :60_000], 0, 255, bias=2**31 - 1)[0] == SumClass.U8


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_accumulators_are_reached(seed: int) -> None:
    """lo and hi are sums of actual values; code_lo and code_hi contain them."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-8, 8, size=(5, 2, 2, 3)).astype(np.int8)
    bias = rng.integers(-50, 50, size=5)
    lo, hi = sorted(rng.integers(-20, 60, size=2).tolist())
    sums = analyse(weight, bias, lo, hi, padded=False, depthwise=False, zero=min(lo, 0))
    flat = weight.reshape(5, -1).astype(np.int64)
    assert (np.where(flat > 0, flat * lo, flat * hi).sum(axis=1) + bias == sums.lo).all()
    assert (np.where(flat > 0, flat * hi, flat * lo).sum(axis=1) + bias == sums.hi).all()
    assert (sums.code_lo <= sums.lo).all() and (sums.hi <= sums.code_hi).all()
