"""The two-class bound: a second, larger radius from the runner-up's votes, reported beside the standard one.

With p_A a lower bound on the top class and p_B an upper bound on every other, Cohen et al. (ICML 2019, Theorem 1)
certify (σ/2)·(Φ⁻¹(p_A) − Φ⁻¹(p_B)). The usual protocol takes p_B = 1 − p_A. Bounding p_B from votes is valid for the
same samples when α is halved between the two. The most votes of any other class serve: those of the true runner-up are
at most as many, and the bound grows with the votes, so it fails no more often than the runner-up's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from arqsearch.certify.binomial import RADIUS_STEP
from arqsearch.certify.incremental import lower_bound, upper_bound

_BITS, _DIGITS = 40, 50


def two_class_radius(
    counts: Mapping[int, int], top: int, n: int, sigma: float, alpha: float, d_tau: float
) -> Decimal | None:
    """Largest multiple of 10⁻⁶ that the two-class bound certifies, or None when it abstains.

    :param counts: votes by class in the estimate stage; classes without votes may be left out.
    :param top: the class selected by other samples.
    :param n: samples of the estimate stage.
    :param sigma: noise level in [0,1] pixels.
    :param alpha: failure probability of this figure.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates.
    :returns: radius in [0,1] pixels.
    """
    import mpmath

    runner_up = max((votes for name, votes in counts.items() if name != top), default=0)
    with mpmath.workdps(_DIGITS):
        high = mpmath.ldexp(lower_bound(counts.get(top, 0), n, alpha / 2), -_BITS) - mpmath.mpf(d_tau)
        low = mpmath.ldexp(upper_bound(runner_up, n, alpha / 2), -_BITS) + mpmath.mpf(d_tau)
        low = min(low, 1 - high)  # What is not the top class bounds the runner-up, too.
        if high <= low or high <= 0:
            return None
        root = mpmath.sqrt(2)
        distance = root * (mpmath.erfinv(2 * high - 1) - mpmath.erfinv(2 * low - 1))
        radius = mpmath.mpf(str(float(sigma))) / 2 * distance
        # 10⁻³⁰ is far above the error of 50 digits and far below a step: the floor is never too high.
        return int(mpmath.floor(radius / mpmath.mpf(str(RADIUS_STEP)) - mpmath.mpf(10) ** -30)) * RADIUS_STEP
