"""Requantization in exact integers, and proofs that a float expression computes the same integers.

``y = clip(round(acc * M / 2**k), lo, hi)`` is a non-decreasing step function of `acc`. So is
``clip(floor(acc * a + b), lo, hi)`` in IEEE arithmetic for a >= 0, because each float operation is
monotone. Two non-decreasing integer step functions are equal on a range of integers exactly when
they step at the same places. The places are known in integers, so comparing both functions there
proves them equal for every `acc`, and the fast float expression may stand for the integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.integer.ops import InputQuantize, Requantize, Rounding

Int64 = NDArray[np.int64]
#: More steps than this are not worth proving; the int64 expression is used instead.
MAX_STEPS = 1 << 22


def round_shift(value: Int64, shift: Any, rounding: Rounding) -> Int64:
    """``round(value / 2**shift)`` in int64 with a flooring shift; `shift` 0 leaves the value.

    :param value: int64, any shape.
    :param shift: integer or array broadcast against `value`, 0..62.
    :param rounding: how ties (or, for ``floor``, fractions) are resolved.
    """
    shift = np.asarray(shift, dtype=np.int64)
    if rounding == "floor":
        return np.asarray(value >> shift)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    if rounding == "half_up":
        return np.asarray((value + half) >> shift)
    down = value >> shift
    rest = value - (down << shift)
    up = (rest > half) | ((rest == half) & (down & 1 == 1))
    return np.asarray(np.where((shift > 0) & up, down + 1, down))


def requantize(acc: Int64, op: Requantize) -> Int64:
    """Exact integer semantics of :class:`Requantize`; channels are the last axis of `acc`."""
    scaled = acc * op.multiplier.astype(np.int64)
    return np.clip(round_shift(scaled, op.shift, op.rounding), op.lo, op.hi)


def input_quantize(pixels: Int64, op: InputQuantize) -> Int64:
    """Exact integer semantics of :class:`InputQuantize`; channels are the last axis of `pixels`."""
    clipped = np.clip(pixels, op.pre_lo, op.pre_hi)
    scaled = clipped * op.multiplier.astype(np.int64) + op.offset.astype(np.int64)
    return np.clip(round_shift(scaled, op.shift, op.rounding), op.lo, op.hi)


@dataclass(frozen=True)
class FloatPlan:
    """``clip(floor(acc * scale + offset), lo, hi)`` in one float type, proven equal to the integers.

    :param dtype: ``"float32"`` or ``"float64"``.
    :param scale: one entry per channel.
    :param offset: one entry per channel.
    """

    dtype: str
    scale: NDArray[Any]
    offset: NDArray[Any]


def plan_requantize(op: Requantize, channels: int, acc_lo: int, acc_hi: int) -> FloatPlan | None:
    """Find the narrowest float type whose expression equals the integers on ``acc_lo..acc_hi``.

    :param channels: number of channels of the input.
    :returns: the plan, or None when no float type could be proven (then int64 must be used).
    """
    multiplier = np.broadcast_to(op.multiplier.astype(np.int64), (channels,))
    shift = np.broadcast_to(op.shift.astype(np.int64), (channels,))
    if not _fits_int64(multiplier, shift, acc_lo, acc_hi):
        return None
    ends = requantize(np.array([[acc_lo] * channels, [acc_hi] * channels], dtype=np.int64), op)
    # A channel that never steps (dead, or saturated) is a constant; its shift may be extreme.
    moving = ends[0] < ends[1]
    multiplier, shift = np.where(moving, multiplier, 0), np.where(moving, shift, 1)
    levels = np.arange(int(ends.min()) + 1, int(ends.max()) + 1, dtype=np.int64)
    if (
        len(levels) * channels > MAX_STEPS
        or (1 << int(shift.max())) * max(abs(int(ends.min())), abs(int(ends.max())), 1) >= 2**62
    ):
        return None
    steps = _step_positions(levels, multiplier, shift, op.rounding)
    inside = (steps > acc_lo) & (steps <= acc_hi)
    below = np.where(inside, steps - 1, acc_lo)
    above = np.where(inside, steps, acc_hi)
    for dtype in ("float32", "float64"):
        if max(abs(acc_lo), abs(acc_hi)) > (1 << 24 if dtype == "float32" else 1 << 53):
            continue
        plan = _fit(dtype, multiplier, shift, levels, below, above, inside, ends[0])
        if _equal(plan, op, np.array([acc_lo, acc_hi]), below, above):
            return plan
    return None


def plan_input(op: InputQuantize, channels: int, pixel_lo: int, pixel_hi: int) -> FloatPlan | None:
    """As :func:`plan_requantize` for the input quantizer, proven on every pixel value of the range."""
    pixels = np.arange(max(pixel_lo, op.pre_lo), min(pixel_hi, op.pre_hi) + 1, dtype=np.int64)
    if len(pixels) == 0:
        return None
    exact = input_quantize(np.repeat(pixels[:, None], channels, axis=1), op)
    ratio = np.ldexp(op.multiplier.astype(np.float64), -op.shift)
    start = np.ldexp(op.offset.astype(np.float64), -op.shift) + (0.0 if op.rounding == "floor" else 0.5)
    for dtype in (np.float32, np.float64):
        for nudge in (0.0, 2.0**-16, -(2.0**-16), 2.0**-20, -(2.0**-20)):
            scale, offset = ratio.astype(dtype), (start + nudge).astype(dtype)
            if _robustly(scale, offset, pixels[:, None], op.lo, op.hi, exact):
                return FloatPlan(
                    np.dtype(dtype).name, np.broadcast_to(scale, (channels,)), np.broadcast_to(offset, (channels,))
                )
    return None


def _fits_int64(multiplier: Int64, shift: Int64, lo: int, hi: int) -> bool:
    largest = max(abs(lo), abs(hi)) * int(multiplier.max(initial=0))
    return largest + (1 << max(int(shift.max(initial=0)) - 1, 0)) < 2**63


def _step_positions(levels: Int64, multiplier: Int64, shift: Int64, rounding: Rounding) -> Int64:
    """Smallest acc with ``round(acc * M / 2**k) >= level``, shape (levels, channels); huge where M is 0."""
    target = levels[:, None] << shift[None, :]
    if rounding != "floor":
        target = target - (np.int64(1) << (shift - 1))[None, :]
    safe = np.maximum(multiplier, 1)
    position = -((-target) // safe)
    if rounding == "half_even":
        # A tie rounds to the even level: an odd level is reached only strictly above the tie.
        tie = (position * safe == target) & (levels[:, None] % 2 == 1)
        position = position + tie
    return np.where(multiplier > 0, position, np.int64(2**62))


def _fit(
    dtype: str, multiplier: Int64, shift: Int64, levels: Int64, below: Int64, above: Int64, inside: NDArray[np.bool_],
    start: Int64,
) -> FloatPlan:  # fmt: skip
    """Choose each channel's offset in the middle of the interval that separates all its steps."""
    kind = np.dtype(dtype).type
    scale = np.ldexp(multiplier.astype(np.float64), -shift).astype(kind)
    wide = scale.astype(np.float64)
    least = np.where(inside, levels[:, None] - above * wide, -np.inf).max(axis=0, initial=-np.inf)
    most = np.where(inside, levels[:, None] - below * wide, np.inf).min(axis=0, initial=np.inf)
    finite = np.isfinite(least) & np.isfinite(most)
    offset = np.where(finite, np.where(finite, least, 0) / 2 + np.where(finite, most, 0) / 2, start + 0.5)
    return FloatPlan(dtype, scale, offset.astype(kind))


def _equal(plan: FloatPlan, op: Requantize, ends: Int64, below: Int64, above: Int64) -> bool:
    """Whether plan and integers agree on both sides of every step and at both ends of the range."""
    channels = plan.scale.shape[0]
    return all(
        _robustly(plan.scale, plan.offset, acc, op.lo, op.hi, requantize(acc, op))
        for acc in (np.repeat(ends[:, None], channels, axis=1), below, above)
    )


def _robustly(scale: NDArray[Any], offset: NDArray[Any], values: Int64, lo: int, hi: int, exact: Int64) -> bool:
    """Whether the float expression gives `exact` with two units in the last place to spare.

    The margin makes the proof hold for a fused multiply-add as well as for two rounded operations.
    """
    product = values.astype(scale.dtype) * scale
    result = product + offset
    slack = 2 * np.spacing(np.maximum(np.abs(product), np.abs(result)))
    return all(
        np.array_equal(np.clip(np.floor(shifted), lo, hi), exact)
        for shifted in (result, result - slack, result + slack)
    )
