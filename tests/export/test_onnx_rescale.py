"""Proofs of float rescales, checked on every value of their range against plain integers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from arqsearch.export import onnx_rescale
from arqsearch.export.onnx_rescale import (
    CodeRescale,
    ConvRescale,
    fit_codes,
    fit_conv,
    fit_pixels,
    saturating_pairs,
    step_places,
)
from arqsearch.integer import ops as O


def requantize(multiplier: list[int], shift: list[int], rounding: O.Rounding, lo: int, hi: int) -> O.Requantize:
    return O.Requantize((0,), 1, np.array(multiplier), np.array(shift), rounding, lo, hi)


def divided(value: Fraction, rounding: str) -> int:
    """The integer that a fraction rounds to."""
    if rounding == "floor":
        return floor(value)
    if rounding == "half_up":
        return floor(value + Fraction(1, 2))
    return ceil(value - Fraction(1, 2)) if floor(value) % 2 == 0 else floor(value + Fraction(1, 2))


def exact(op: O.Requantize, acc: int, channel: int = 0) -> int:
    multiplier, shift = (int(v[channel % v.size]) for v in (op.multiplier, op.shift))
    return min(max(divided(Fraction(acc * multiplier, 2**shift), op.rounding), op.lo), op.hi)


def runtime_byte(found: ConvRescale, acc: int, channel: int) -> int:
    """What a QLinearConv kernel does to one accumulator, in scalar float32."""
    total = np.float32(np.int32(acc + int(found.bias[channel])))
    byte = int(np.rint(total * found.scale[channel])) + found.zero_point
    byte = min(max(byte, 0), 255)
    return byte if found.clip is None else min(max(byte, found.clip[0]), found.clip[1])


RATIOS = [([1], [3]), ([1], [6]), ([2**31 - 1], [36]), ([1518500250], [38]), ([23170], [21]), ([3], [2]), ([0], [5])]


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize(("lo", "hi", "bottom"), [(0, 255, 0), (0, 15, 0), (-127, 127, -128), (-3, 3, -128)])
@pytest.mark.parametrize(("multiplier", "shift"), RATIOS)
def test_every_accumulator_gives_the_exact_byte(
    multiplier: list[int], shift: list[int], rounding: O.Rounding, lo: int, hi: int, bottom: int
) -> None:
    op = requantize(multiplier, shift, rounding, lo, hi)
    found = fit_conv(op, 1, -3000, 3500, bottom)
    if found is None:
        # Rounding down needs half a step in the integer bias; odd and general ratios seldom have it.
        assert rounding == "floor" and multiplier != [1]
        return
    for acc in range(-3000, 3501):
        assert runtime_byte(found, acc, 0) == exact(op, acc) - bottom, acc


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize("shift", [1, 3, 5])
def test_two_pieces_hold_a_result_of_nine_bits(rounding: O.Rounding, shift: int) -> None:
    op, limit = requantize([1], [shift], rounding, -(2**15) + 1, 2**15 - 1), 300 << shift
    lower, upper = (fit_conv(op, 1, -limit, limit, bottom) for bottom in (-255, 0))
    assert lower is not None and upper is not None and lower.clip is upper.clip is None
    for acc in range(-limit, limit + 1):
        total = runtime_byte(lower, acc, 0) - 255 + runtime_byte(upper, acc, 0)
        assert total == min(max(exact(op, acc), -255), 255)


@pytest.mark.parametrize("seed", range(60))
def test_random_channels_at_every_accumulator(seed: int) -> None:
    """Any proof that is given must hold; general multipliers in a small range mostly get one."""
    rng = np.random.default_rng(seed)
    channels, top = 3, int(rng.choice([3, 15, 127, 255]))
    limit = int(rng.choice([300, 2000, 9000]))
    bits = int(rng.choice([1, 15, 31]))
    multiplier = rng.integers(2 ** (bits - 1), 2**bits, channels)
    ratio = top / limit * rng.uniform(0.5, 4, channels)
    shift = np.rint(np.log2(multiplier / ratio)).astype(np.int64).clip(1, 62)
    rounding: O.Rounding = O.ROUNDINGS[seed % 3]
    op = O.Requantize((0,), 1, multiplier, shift, rounding, 0, top)
    found = fit_conv(op, channels, -limit, limit, 0)
    if found is None:
        assert rounding == "floor"
        return
    for acc, channel in itertools.product(range(-limit, limit + 1), range(channels)):
        assert runtime_byte(found, acc, channel) == exact(op, acc, channel), (acc, channel)


def test_a_range_beyond_float32_is_proven_for_powers_of_two_alone() -> None:
    """255 steps among millions of accumulators: a general ratio has places nearer to a tie than float32 resolves."""
    for rounding in O.ROUNDINGS:
        op = requantize([1], [13], rounding, 0, 255)
        found = fit_conv(op, 1, -(2**26), 2**26, 0)
        assert found is not None
        steps = [level * 2**13 + offset for level in range(-2, 260) for offset in (-4097, -4096, -4095, -1, 0, 1)]
        assert [runtime_byte(found, acc, 0) for acc in steps] == [exact(op, acc) for acc in steps]
    general = requantize([2029345951], [44], "half_up", 0, 255)
    assert fit_conv(general, 1, -(2**24), 2**24, 0) is None


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
def test_the_places_see_a_wrong_factor_offset_or_zero_point(rounding: O.Rounding) -> None:
    op = requantize([1], [5], rounding, 0, 255)
    found = fit_conv(op, 1, -9000, 9000, 0)
    assert found is not None
    places = step_places(op, 1, -9000, 9000)
    right = found.codes(places)
    for wrong in (
        ConvRescale(found.scale * np.float32(1 + 2**-8), found.bias, found.zero_point),
        ConvRescale(found.scale * np.float32(1 - 2**-8), found.bias, found.zero_point),
        ConvRescale(found.scale, found.bias + 1, found.zero_point),
        ConvRescale(found.scale, found.bias, found.zero_point + 1),
    ):
        assert (wrong.codes(places) != right).any()


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize(("multiplier", "shift"), RATIOS)
def test_places_are_both_sides_of_every_step(multiplier: list[int], shift: list[int], rounding: O.Rounding) -> None:
    op = requantize(multiplier, shift, rounding, -9, 30)
    places = set(step_places(op, 1, -500, 700)[:, 0].tolist())
    steps = [acc for acc in range(-499, 701) if exact(op, acc) != exact(op, acc - 1)]
    # A step of several levels (a factor above 1) has one pair of places.
    assert places == {-500, 700, *steps, *(acc - 1 for acc in steps)}


def code_byte(found: CodeRescale, value: int, zero: int, order: int) -> int:
    """One value through the operators apart, or merged as onnxruntime merges them, in scalar float32."""
    scale, offset, f = np.float32(found.scale), np.float32(found.offset), np.float32
    if order == 0:
        return int(np.rint(f(f(value) * scale) + offset))
    code = f(value + zero)
    if order == 1:
        fixed = f(f(128) - f(scale * f(zero))) + offset
        return int(np.rint(f(fixed + f(scale * code)))) - 128
    fixed = f(f(128) + offset) - f(scale * f(zero))
    # A fused multiply-add rounds once.
    return int(np.rint(f(np.float64(fixed) + np.float64(scale) * np.float64(code)))) - 128


@pytest.mark.parametrize("seed", range(200))
def test_every_code_in_every_order_of_evaluation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lo = int(rng.choice([0, -128, -40]))
    values, rounding = range(lo, lo + 256), O.ROUNDINGS[seed % 3]
    bits = int(rng.choice([1, 15, 31]))
    multiplier = int(rng.integers(2 ** (bits - 1), 2**bits))
    op = requantize([multiplier], [bits + int(rng.integers(0, 4))], rounding, min(lo, 0), int(rng.choice([15, 255])))
    found = fit_codes(op, lo, lo + 255, offset=seed % 2 == 0)
    if found is None:
        # Without an offset nothing moves a value off a tie in both directions, or half a step down.
        assert rounding == "floor" or seed % 2 or rounding == "half_even"
        return
    assert not found.ties or rounding == "half_even"
    for value, order in itertools.product(values, range(3)):
        rounded = code_byte(found, value, -lo, order)
        assert found.lo <= rounded <= found.hi
        assert min(max(rounded, op.lo), op.hi) == exact(op, value), (value, order)


@pytest.mark.parametrize("seed", range(40))
def test_every_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lo, hi = ((0, 255), (-584, 839), (-2335, 2590))[seed % 3]
    rounding, top = O.ROUNDINGS[seed % 3], int(rng.choice([3, 15, 127]))
    step = rng.uniform(0.5, 2, 2) * top / (hi - lo) * 2
    multiplier = np.rint(step * 2**30).astype(np.int64)
    offset = -np.rint(multiplier * rng.uniform(100, 140, 2)).astype(np.int64)
    op = O.InputQuantize((0,), 1, multiplier, offset, 30, rounding, lo + 3, hi - 2, -top, top)
    found = fit_pixels(op, 2, lo, hi)
    assert found is not None
    for pixel, channel in itertools.product(range(lo, hi + 1), range(2)):
        clipped = min(max(pixel, lo + 3), hi - 2)
        scaled = np.float32(clipped) * found.scale[channel] + found.offset[channel]
        wanted = divided(Fraction(clipped * int(multiplier[channel]) + int(offset[channel]), 2**30), rounding)
        assert min(max(int(np.rint(scaled)), -top), top) == min(max(wanted, -top), top), (pixel, channel)


@pytest.mark.parametrize("seed", range(60))
def test_no_pair_of_products_leaves_16_bits_unseen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top, largest = int(rng.integers(40, 128)), int(rng.choice([15, 127, 254, 255]))
    weight = rng.integers(-top, top, (3, 2, 2, 2), endpoint=True)
    sums = [
        int(a * low + b * high)
        for row in weight.reshape(3, -1)
        for a, b in itertools.combinations(row, 2)
        for low, high in itertools.product((0, largest), repeat=2)
    ]
    assert saturating_pairs(weight, largest) == (max(sums) > 2**15 - 1 or min(sums) < -(2**15))


def test_seven_bits_never_saturate() -> None:
    for weight, largest in ((63, 255), (127, 127), (64, 255)):
        assert not saturating_pairs(np.full((1, 9), weight), largest)
        assert not saturating_pairs(np.full((1, 9), -weight), largest)
    assert saturating_pairs(np.full((1, 9), 127), 255) and saturating_pairs(np.full((1, 9), 65), 255)


def test_the_margin_covers_the_error_of_six_roundings() -> None:
    """At most two products and four sums, each below 1024, where float32 is wrong by 2**-15 at most."""
    largest = np.float32(onnx_rescale.SUM_LIMIT) - np.spacing(np.float32(1000))
    assert 6 * float(np.spacing(largest)) / 2 < onnx_rescale.MARGIN
