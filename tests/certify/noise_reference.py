"""The noise once more in plain Python integers and exact decimals, written from the definition alone."""

from __future__ import annotations

from fractions import Fraction

import mpmath

MASK = 0xFFFFFFFF


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32."""
    a, b, c, d = counter
    for turn in range(10):
        first = (key[0] + turn * 0x9E3779B9) & MASK
        second = (key[1] + turn * 0xBB67AE85) & MASK
        left, right = divmod(0xD2511F53 * a, 1 << 32), divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = right[0] ^ b ^ first, right[1], left[0] ^ d ^ second, left[1]
    return a, b, c, d


def uniform(seed: int, stage: int, image: int, sample: int, coordinate: int) -> int:
    """The 64-bit word of one coordinate."""
    halves = [
        philox_words((coordinate // 4, sample, image, stage << 24 | stream), (seed & MASK, seed >> 32))[coordinate % 4]
        for stream in (0, 1)
    ]
    return halves[0] << 32 | halves[1]


def cdf(k: int, sigma: str) -> mpmath.mpf:
    """Ideal P(Z <= k), to 80 digits."""
    with mpmath.workdps(80):
        scale = 255 * Fraction(sigma)
        return mpmath.ncdf((mpmath.mpf(k) + mpmath.mpf("0.5")) * scale.denominator / scale.numerator)


def value(word: int, sigma: str) -> int:
    """The noise value of a word: the smallest k whose threshold exceeds it."""
    lo, hi = -4096, 4096
    while lo < hi:
        middle = (lo + hi) // 2
        with mpmath.workdps(80):
            threshold = int(mpmath.nint(cdf(middle, sigma) * 2**64))
        lo, hi = (lo, middle) if word < threshold else (middle + 1, hi)
    return lo
