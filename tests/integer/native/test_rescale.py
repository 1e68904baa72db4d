"""The 32-bit form of a requantization is the 64-bit one, for every value that can occur."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arqsearch.integer import ops as O
from arqsearch.integer.native.rescale import SMALL_MULTIPLIER, Domain, Fast, fast_form
from arqsearch.integer.ranges import divide_rounded

Int64 = np.ndarray[Any, Any]


def domain(lo: Int64, hi: Int64, room: int = 0) -> Domain:
    """The range lo..hi of each channel; kernels would like some more."""
    lo, hi = np.atleast_1d(lo), np.atleast_1d(hi)
    return Domain(lo, hi, lo - room, hi + room)


def exactly(op: O.Requantize, channel: int, x: int, lo: int, hi: int) -> int:
    """Python integers."""
    multiplier = int(op.multiplier[channel % op.multiplier.size])
    shift = int(op.shift[channel % op.shift.size])
    return min(max(divide_rounded(x * multiplier, shift, op.rounding), lo), hi)


def evaluate(form: Fast, channel: int, x: Int64, lo: int, hi: int) -> Int64:
    """The formula of arq_blob.h; every intermediate value must be an int32."""
    a_lo, a_hi, m, c, s = (
        int(row[channel]) for row in (form.lo, form.hi, form.multiplier, form.offset, form.shift)
    )  # fmt: skip
    assert a_lo <= a_hi and 0 <= s <= 31 and m >= 0
    inside = np.clip(x, a_lo, a_hi)
    for end in (a_lo, a_hi, c, a_lo * m, a_hi * m, a_lo * m + c, a_hi * m + c):
        assert -(2**31) <= end < 2**31
    return np.clip((inside * m + c) >> s, lo, hi)


def check(op: O.Requantize, form: Fast, channels: int, where: Domain, lo: int, hi: int) -> None:
    for channel in range(channels):
        first, last = (int(ends[channel % ends.size]) for ends in (where.lo, where.hi))
        x = np.arange(first, last + 1)
        expected = [exactly(op, channel, value, lo, hi) for value in x.tolist()]
        assert evaluate(form, channel % form.lo.size, x, lo, hi).tolist() == expected


@pytest.mark.parametrize("seed", range(120))
def test_every_value_of_a_range(seed: int) -> None:
    """Random multipliers, shifts, roundings, clips and ranges; a form may be absent, but never wrong."""
    rng = np.random.default_rng(seed)
    channels, entries = int(rng.integers(1, 6)), int(rng.integers(1, 3))
    entries = channels if entries == 2 else 1
    reach = int(rng.choice([40, 300, 2000]))
    bits = int(rng.choice([1, 15, 31]))
    multiplier = rng.integers(2 ** (bits - 1), 2**bits, size=entries) if bits > 1 else np.ones(entries, dtype=np.int64)
    levels = 2 ** int(rng.integers(2, 9))
    ratio = levels / reach * rng.uniform(0.2, 3, size=entries)
    shift = np.clip(np.round(np.log2(multiplier / ratio)), 1, 62).astype(np.int64)
    if rng.random() < 0.2:
        multiplier[int(rng.integers(entries))] = 0
    if rng.random() < 0.1:
        shift[int(rng.integers(entries))] = rng.integers(1, 63)
    rounding = O.ROUNDINGS[seed % 3]
    lo = 0 if rng.random() < 0.5 else -int(rng.integers(1, levels))
    hi = lo + levels - 1
    op = O.Requantize((0,), 1, multiplier, shift, rounding, lo, hi)
    starts = rng.integers(-reach, reach, size=channels)
    where = domain(starts, starts + rng.integers(0, 2 * reach, size=channels), int(rng.integers(0, 500)))
    form = fast_form(op, lo, hi, where)
    if form is not None:
        assert form.lo.size == entries
        if entries == 1:
            where = domain(where.lo.min(), where.hi.max())
        check(op, form, channels, where, lo, hi)


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize("bits", [15, 31])
def test_four_bit_layers_have_the_quickest_form(rounding: O.Rounding, bits: int) -> None:
    """Accumulators of a usual layer, 15 steps: no clip before the multiplication and a small multiplier."""
    rng = np.random.default_rng(bits)
    multiplier = rng.integers(2 ** (bits - 1), 2**bits, size=64)
    shift = np.round(np.log2(multiplier / (15 / rng.uniform(200, 900, size=64)))).astype(np.int64)
    op = O.Requantize((0,), 1, multiplier, shift, rounding, 0, 15)
    where = domain(np.full(64, -4000), np.full(64, 4000), room=20_000)
    form = fast_form(op, 0, 15, where)
    assert form is not None
    assert (form.lo == -24_000).all() and (form.hi == 24_000).all()
    assert (form.multiplier <= SMALL_MULTIPLIER).all()
    check(op, form, 64, where, 0, 15)


def test_wide_sums_are_clipped_first() -> None:
    """Products of far saturated sums would leave int32; the first clip keeps them in."""
    op = O.Requantize((0,), 1, np.array([2**30 + 12345]), np.array([37]), "half_up", 0, 15)
    where = domain(np.array([-(2**31)]), np.array([2**31 - 1]))
    form = fast_form(op, 0, 15, where)
    assert form is not None
    assert -(2**20) < form.lo[0] < form.hi[0] < 2**20
    check(op, form, 1, domain(np.array([-5000]), np.array([5000])), 0, 15)
    for x in (-(2**31), -(2**31) + 1, 2**31 - 1):
        assert evaluate(form, 0, np.array([x]), 0, 15).tolist() == [exactly(op, 0, x, 0, 15)]


def test_powers_of_two_always_have_a_form() -> None:
    op = O.Requantize((0,), 1, np.array([1]), np.array([9]), "half_up", -(2**15) + 1, 2**15 - 1)
    where = domain(np.array([-(2**24)]), np.array([2**24]))
    form = fast_form(op, op.lo, op.hi, where)
    assert form is not None and form.multiplier.tolist() == [1]
    check(op, form, 1, domain(np.array([-3000]), np.array([3000])), op.lo, op.hi)


def test_ties_to_even_have_a_form() -> None:
    """Every fourth value is a tie; the place of a step depends on whether its level is odd."""
    op = O.Requantize((0,), 1, np.array([1]), np.array([2]), "half_even", 0, 15)
    where = domain(np.array([-40]), np.array([200]))
    form = fast_form(op, 0, 3, where)
    assert form is None, "steps at 3, 6, 11 and 14 lie on no line"
    form = fast_form(op, 0, 1, where)
    assert form is not None
    check(op, form, 1, where, 0, 1)


def test_too_many_steps_for_32_bits_are_refused() -> None:
    """65 thousand levels with a full multiplier need more than 32 bits."""
    op = O.Requantize((0,), 1, np.array([2**31 - 12345]), np.array([36]), "half_up", -(2**15) + 1, 2**15 - 1)
    assert fast_form(op, op.lo, op.hi, domain(np.array([-(2**20)]), np.array([2**20]))) is None


def test_one_channel_without_a_form_decides_for_all() -> None:
    multiplier, shift = np.array([1, 2**31 - 12345]), np.array([4, 36])
    op = O.Requantize((0,), 1, multiplier, shift, "half_even", -(2**15) + 1, 2**15 - 1)
    where = domain(np.array([-500, -(2**20)]), np.array([500, 2**20]))
    assert fast_form(op, op.lo, op.hi, where) is None


def test_a_constant_has_a_form_whatever_its_shift() -> None:
    op = O.Requantize((0,), 1, np.array([0, 5]), np.array([62, 62]), "half_even", -3, 7)
    where = domain(np.array([-(2**31), 0]), np.array([2**31 - 1, 2**31 - 1]))
    form = fast_form(op, -3, 7, where)
    assert form is not None
    for channel in range(2):
        ends = np.array([where.lo[channel], where.hi[channel]])
        assert evaluate(form, channel, ends, -3, 7).tolist() == [0, 0]


def test_tighter_clips_are_used() -> None:
    """Only codes 3..5 matter to the caller: the form need not step anywhere else."""
    op = O.Requantize((0,), 1, np.array([2**31 - 12345]), np.array([40]), "half_even", -(2**15) + 1, 2**15 - 1)
    where = domain(np.array([-(2**20)]), np.array([2**20]))
    form = fast_form(op, 3, 5, where)
    assert form is not None
    check(op, form, 1, domain(np.array([-100]), np.array([9000])), 3, 5)
