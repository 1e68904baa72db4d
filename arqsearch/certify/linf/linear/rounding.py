"""Rigorous rounding errors of float64 sums, after Higham, *Accuracy and Stability of Numerical Algorithms*, chapter 3.

A sum of n products of float64 numbers, in any order and with or without fused multiply-adds, differs from the exact
one by at most ``gamma(n) * sum |a_i b_i|``. The magnitudes are themselves summed in float64; `INFLATE` makes up for
that. What is compared with a bound is an integer, so an error far below one costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Unit roundoff of float64, round to nearest.
UNIT = 2.0**-53
#: Sums of non-negative terms are computed to a relative accuracy far better than this.
INFLATE = 1.0 + 1e-6
#: Operations on one number outside of the sums: interpolating and storing a line, adding multipliers.
EXTRA_OPERATIONS = 32
#: Bounds beyond this say nothing and are treated as unknown.
UNKNOWN = 2**40


def gamma(terms: int) -> float:
    """``n u / (1 - n u)`` for n = `terms` and some operations to spare, rounded up."""
    count = (terms + EXTRA_OPERATIONS) * UNIT
    return count / (1.0 - count) * INFLATE


def integer_above(lower: Tensor, error: Tensor) -> Tensor:
    """The smallest integer that an integer can be of which ``lower - error`` is a lower bound.

    :param lower: float64, the computed bound.
    :param error: float64 ≥ 0, what rounding can have added to it; not yet inflated.
    :returns: int64; ``-UNKNOWN`` where the numbers are not finite or too large to mean anything.
    """
    safe = lower - (error * INFLATE + lower.abs() * (8 * UNIT))
    known = safe.isfinite() & (safe.abs() < UNKNOWN)
    return torch.where(known, safe.nan_to_num(0.0).clamp(-UNKNOWN, UNKNOWN).ceil(), -float(UNKNOWN)).to(torch.int64)
