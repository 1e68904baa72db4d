"""The ``sequential`` rule: a betting confidence sequence that may be looked at again and again.

After T samples with H votes for the class, the wealth of a bettor who mixes over all alternatives with the prior of
Jeffreys is

    W(p) = B(H+½, T−H+½) / (B(½, ½) · p^H · (1−p)^(T−H)).

If the probability is p, W(p) is a non-negative martingale that starts at 1, so by Ville's inequality it ever reaches
1/α with probability α at most: whenever and however often one looks, for all p and hence all radii at once (Voracek,
2024). Radius r is certified once W(Φ(r/σ) + d·τ) ≥ 1/α with more votes than expected there, and refuted once
W(Φ(r/σ) − d·τ) ≥ 1/α with fewer. The counts are looked at after fixed numbers of samples only, so that a decision
does not depend on how they were batched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from arqsearch.certify.binomial import RADIUS_STEP, target_probability
from arqsearch.errors import ArqError

#: First look, and growth from one look to the next as a fraction.
FIRST, GROWTH = 64, Fraction(5, 4)
_DIGITS = 50
_Real: TypeAlias = Any  # An mpmath number; the package has no types.
Decision: TypeAlias = Literal["certified", "refuted", "undecided"]


@lru_cache(maxsize=64)
def look_times(cap: int) -> tuple[int, ...]:
    """Numbers of samples after which the counts are looked at: ⌈64·1.25^k⌉ below the cap, then the cap.

    :param cap: largest number of samples.
    """
    if cap < 1:
        raise ArqError(f"A cap of {cap} samples cannot decide anything; choose at least 1, such as 10000.")
    times: list[int] = []
    while (time := math.ceil(FIRST * GROWTH ** len(times))) < cap:
        times.append(time)
    return (*times, cap)


@dataclass(frozen=True)
class SequentialTable:
    """Integer thresholds of the rule: for each look, the votes that certify or refute each radius.

    :param times: samples at each look.
    :param radii: asked radii in [0,1] pixels, ascending.
    :param certify: for each look and radius, the fewest votes that certify it; T + 1 when none do.
    :param refute: for each look and radius, the most votes that refute it; −1 when none do.
    """

    times: tuple[int, ...]
    radii: tuple[float, ...]
    certify: tuple[tuple[int, ...], ...]
    refute: tuple[tuple[int, ...], ...]

    def decide(self, hits: Sequence[int]) -> tuple[Decision, ...]:
        """Decision on each radius from the votes at the looks so far; the first decision on a radius stays.

        A radius below a certified one is certified, one above a refuted one is refuted.

        :param hits: votes for the class among the first ``times[k]`` samples, k = 0, 1, ...
        """
        low, high = 0, len(self.radii)
        for look, count in enumerate(hits):
            for index in range(low, high):
                if count >= self.certify[look][index]:
                    low = index + 1
            for index in range(high - 1, low - 1, -1):
                if count <= self.refute[look][index]:
                    high = index
        return tuple(
            "certified" if index < low else "undecided" if index < high else "refuted"
            for index in range(len(self.radii))
        )


@lru_cache(maxsize=64)
def sequential_table(
    radii: tuple[float, ...], cap: int, sigma: float, alpha: float, d_tau: float = 0.0
) -> SequentialTable:
    """Compute the thresholds of the rule.

    :param radii: radii to decide, in [0,1] pixels, ascending and not negative.
    :param cap: largest number of samples.
    :param sigma: noise level in [0,1] pixels.
    :param alpha: failure probability, over all looks and radii together.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates.
    :raises ArqError: when a value is out of range.
    """
    _check(sigma, alpha, d_tau)
    if not radii or list(radii) != sorted(set(radii)) or radii[0] < 0:
        raise ArqError(f"Radii {list(radii)} cannot be decided; give distinct radii of at least 0 in ascending order.")
    times = look_times(cap)
    certify = tuple(
        tuple(certifying_count(time, Decimal(str(float(radius))), sigma, alpha, d_tau) for radius in radii)
        for time in times
    )
    refute = tuple(
        tuple(refuting_count(time, Decimal(str(float(radius))), sigma, alpha, d_tau) for radius in radii)
        for time in times
    )
    return SequentialTable(times, tuple(float(radius) for radius in radii), certify, refute)


def certifying_count(samples: int, radius: Decimal, sigma: float, alpha: float, d_tau: float) -> int:
    """Fewest votes of `samples` with which the wealth against Φ(r/σ) + d·τ reaches 1/α from above; T + 1 if none.

    :param radius: in [0,1] pixels.
    """
    p = _probability(radius, sigma, d_tau)
    # ln W is convex in the votes with its minimum, below 0, near p·T: above that it crosses ln 1/α once.
    low, high = min(samples, math.floor(p * samples)), samples + 1
    while high - low > 1:
        middle = (low + high) // 2
        if wealth_reaches(middle, samples, p, alpha):
            high = middle
        else:
            low = middle
    return high


def refuting_count(samples: int, radius: Decimal, sigma: float, alpha: float, d_tau: float) -> int:
    """Most votes of `samples` with which the wealth against Φ(r/σ) − d·τ reaches 1/α from below; −1 if none.

    :param radius: in [0,1] pixels.
    """
    p = _probability(radius, sigma, -d_tau)
    low, high = -1, min(samples, math.ceil(p * samples))
    while high - low > 1:
        middle = (low + high) // 2
        if wealth_reaches(middle, samples, p, alpha):
            low = middle
        else:
            high = middle
    return low


def sequential_radius(hits: int, samples: int, sigma: float, alpha: float, d_tau: float) -> Decimal | None:
    """Largest multiple of 10⁻⁶ that `hits` of `samples` votes certify at one look, or None when they abstain.

    :returns: radius in [0,1] pixels.
    """

    def certified(steps: int) -> bool:
        p = _probability(steps * RADIUS_STEP, sigma, d_tau)
        return bool(hits > p * samples) and wealth_reaches(hits, samples, p, alpha)

    _check(sigma, alpha, d_tau)
    if not certified(0):
        return None
    # Floating point says where to look; what is certified is decided above.
    low = _guess(hits, samples, sigma, alpha, d_tau)
    stride = 1
    while not certified(low):
        low, stride = max(0, low - stride), 2 * stride
    high, stride = low + 1, 1
    while certified(high):
        low, high, stride = high, high + stride, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if certified(middle) else (low, middle)
    return low * RADIUS_STEP


def _guess(hits: int, samples: int, sigma: float, alpha: float, d_tau: float) -> int:
    """The radius in steps, computed in floating point."""
    from scipy.optimize import brentq
    from scipy.special import betaln, ndtri, xlog1py, xlogy

    misses = samples - hits
    needed = betaln(hits + 0.5, misses + 0.5) - betaln(0.5, 0.5) + math.log(alpha)

    def excess(p: float) -> float:
        return float(needed - xlogy(hits, p) - xlog1py(misses, -p))

    if excess(0.5) <= 0:
        return 0
    p = brentq(excess, 0.5, hits / samples, xtol=1e-15)
    return max(0, math.floor(sigma * float(ndtri(max(0.5, p - d_tau))) / float(RADIUS_STEP)))


def wealth_reaches(hits: int, samples: int, p: _Real, alpha: float) -> bool:
    """Tell whether W(p) ≥ 1/α after `hits` votes of `samples`, to 40 digits.

    :param p: mpmath number; where it excludes what was seen, the wealth is infinite.
    """
    import mpmath

    with mpmath.workdps(_DIGITS):
        misses, half = samples - hits, mpmath.mpf(1) / 2
        wealth = mpmath.loggamma(hits + half) + mpmath.loggamma(misses + half)
        wealth -= mpmath.loggamma(samples + 1) + mpmath.log(mpmath.pi)
        for count, chance in ((hits, p), (misses, 1 - p)):
            if count and chance <= 0:
                return True
            wealth -= count * mpmath.log(chance) if count else 0
        return bool(wealth >= -mpmath.log(mpmath.mpf(str(float(alpha)))))


@lru_cache(maxsize=65536)
def _probability(radius: Decimal, sigma: float, shift: float) -> _Real:
    return target_probability(radius, Decimal(str(float(sigma))), shift)


def _check(sigma: float, alpha: float, d_tau: float) -> None:
    if not sigma > 0 or not 0 < alpha < 0.5 or not 0 <= d_tau < 0.5:
        raise ArqError(
            f"sigma = {sigma}, alpha = {alpha}, d_tau = {d_tau} make no certificate; choose sigma > 0 in [0,1] pixels "
            "and alpha in (0, 0.5) such as 0.001."
        )
