"""From counts to radii: the Clopper-Pearson decision in exact arithmetic, so that no rounding favours a certificate.

The ``fixed`` rule accepts radius r iff P(Bin(n, p₀) ≥ k) ≤ α with p₀ = Φ(r/σ) + d·τ: were the true probability p₀ or
less, k or more votes would be that rare. This is the one-sided Clopper-Pearson bound of Cohen, Rosenfeld and Kolter
(ICML 2019), stated as an integer threshold on k.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

from arqsearch.errors import ArqError

#: Radii are stored as multiples of this, rounded down, in [0,1] pixels.
RADIUS_STEP = Decimal("0.000001")
_DIGITS = 50
_FIXED = 160  # Fractional bits of the sum over the tail, relative to its largest term.
_Real: TypeAlias = Any  # An mpmath number; the package has no types.


def upper_tail(k: int, n: int, p: _Real) -> _Real:
    """P(Bin(n, p) ≥ k) to about 40 digits.

    :param p: mpmath number in 0..1.
    """
    import mpmath

    with mpmath.workdps(_DIGITS):
        if k <= 0 or p >= 1:
            return mpmath.mpf(1 if k <= n else 0)
        if k > n or p <= 0:
            return mpmath.mpf(0)
        if k <= n * p:
            return 1 - upper_tail(n - k + 1, n, 1 - p)
        choose = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
        first = mpmath.exp(choose + k * mpmath.log(p) + (n - k) * mpmath.log(1 - p))
        odds = int(mpmath.ldexp(p / (1 - p), _FIXED)) + 1
        # Above the mean each term is smaller than the one before it, by a growing factor.
        term = total = 1 << _FIXED
        for successes in range(k, n):
            term = (term * (n - successes) // (successes + 1) * odds >> _FIXED) + 1
            total += term
            if term <= 2:
                break
        return first * mpmath.ldexp(total, -_FIXED)


def target_probability(radius: Decimal, sigma: Decimal, d_tau: float) -> _Real:
    """p₀ = Φ(r/σ) + d·τ, the probability that a radius asks for.

    :param radius: in [0,1] pixels.
    :param sigma: noise level in [0,1] pixels.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates (negative: the other side).
    """
    import mpmath

    with mpmath.workdps(_DIGITS):
        ratio = Fraction(radius) / Fraction(sigma)
        return mpmath.ncdf(mpmath.mpf(ratio.numerator) / ratio.denominator) + mpmath.mpf(d_tau)


def accepts(k: int, n: int, radius: Decimal, sigma: float, alpha: float, d_tau: float) -> bool:
    """Tell whether k of n votes certify a radius.

    :param radius: in [0,1] pixels.
    :param sigma: noise level in [0,1] pixels.
    :param alpha: failure probability.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates.
    """
    import mpmath

    _check(n, sigma, alpha, d_tau)
    with mpmath.workdps(_DIGITS):
        limit = mpmath.mpf(str(float(alpha)))
        return bool(upper_tail(k, n, target_probability(radius, Decimal(str(float(sigma))), d_tau)) <= limit)


@lru_cache(maxsize=4096)
def minimal_count(n: int, radius: float, sigma: float, alpha: float, d_tau: float = 0.0) -> int:
    """K(n, r) = min{k : P(Bin(n, Φ(r/σ) + d·τ) ≥ k) ≤ α}: the votes that certify radius r.

    :param n: samples.
    :param radius: in [0,1] pixels.
    :param sigma: noise level in [0,1] pixels.
    :param alpha: failure probability.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates.
    :returns: 0..n+1; n + 1 when not even n votes of n suffice.
    """
    from scipy.stats import binom, norm

    _check(n, sigma, alpha, d_tau)
    exact = Decimal(str(float(radius)))
    if exact < 0:
        raise ArqError(f"radius = {radius} is negative; radii are L2 distances in [0,1] pixels.")
    start = binom.isf(alpha, n, min(1.0, float(norm.cdf(radius / sigma)) + d_tau))
    k = min(n + 1, int(start) + 1)
    while k > 0 and accepts(k - 1, n, exact, sigma, alpha, d_tau):
        k -= 1
    while k <= n and not accepts(k, n, exact, sigma, alpha, d_tau):
        k += 1
    return k


def clopper_pearson(k: int, n: int, alpha: float) -> float:
    """Lower confidence bound on a probability, one-sided at 1 − α, as statsmodels computes it.

    :param k: successes of n.
    """
    from statsmodels.stats.proportion import proportion_confint

    return float(proportion_confint(k, n, 2 * alpha, method="beta")[0])


@lru_cache(maxsize=65536)
def certified_radius(k: int, n: int, sigma: float, alpha: float, d_tau: float) -> Decimal | None:
    """Largest multiple of 10⁻⁶ that k of n votes certify, or None when they abstain.

    The Clopper-Pearson bound of statsmodels is only the starting point; :func:`accepts` decides.

    :returns: radius in [0,1] pixels.
    """
    from scipy.stats import norm

    if not accepts(k, n, Decimal(0), sigma, alpha, d_tau):
        return None
    bound = clopper_pearson(k, n, alpha) - d_tau
    steps = max(0, math.floor(sigma * float(norm.ppf(bound)) / float(RADIUS_STEP))) if bound > 0.5 else 0
    while not accepts(k, n, steps * RADIUS_STEP, sigma, alpha, d_tau):
        steps -= 1
    while accepts(k, n, (steps + 1) * RADIUS_STEP, sigma, alpha, d_tau):
        steps += 1
    return steps * RADIUS_STEP


def grey_levels_squared(radius: float) -> int:
    """⌊255²·r²⌋: an image x' is covered iff its integer pixels satisfy ‖x' − x‖² ≤ this, in grey levels.

    :param radius: certified L2 radius in [0,1] pixels.
    """
    return math.floor((255 * Fraction(str(float(radius)))) ** 2)


def _check(n: int, sigma: float, alpha: float, d_tau: float) -> None:
    if n < 1 or not sigma > 0 or not 0 < alpha < 0.5 or not 0 <= d_tau < 0.5:
        raise ArqError(
            f"n = {n}, sigma = {sigma}, alpha = {alpha}, d_tau = {d_tau} make no certificate; choose n >= 1, sigma > 0 "
            "in [0,1] pixels, alpha in (0, 0.5) such as 0.001."
        )
