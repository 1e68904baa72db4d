"""The judge of simulated certificates, and exact error rates of rules that look again and again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import binomtest

#: Below this p-value an excess over α is no accident; seeds are fixed, so a verdict does not change between runs.
SIGNIFICANCE = 1e-6


def judge(wrong: int, runs: int, alpha: float) -> None:
    """Fail when false certificates are more frequent than α explains, and when there are none at all.

    :param wrong: runs that ended with a false certificate.
    """
    p_value = binomtest(int(wrong), runs, alpha, alternative="greater").pvalue
    assert p_value > SIGNIFICANCE, f"unsound: {wrong} of {runs} certificates are false, alpha is {alpha}"
    assert wrong > 0, f"vacuous: no false certificate in {runs} runs"


def crossing_probability(
    p: float, samples: int, certify: Mapping[int, int], refute: Mapping[int, int] | None = None
) -> float:
    """P(the votes of Bernoulli(p) samples reach a threshold at any look), by the forward equations.

    No stopper errs more often, whatever it sees: a wrong decision needs a crossing.

    :param certify: fewest votes that decide, by number of samples.
    :param refute: most votes that decide, by number of samples; −1 for none.
    """
    alive, crossed = np.zeros(samples + 2), 0.0
    alive[0] = 1.0
    for time in range(1, samples + 1):
        after = alive * (1 - p)
        after[1:] += alive[:-1] * p
        for decided in (
            slice(certify[time], None) if time in certify else slice(0),
            slice((refute or {}).get(time, -1) + 1),
        ):
            crossed += float(after[decided].sum())
            after[decided] = 0.0
        alive = after
    assert abs(crossed + alive.sum() - 1) < 1e-9
    return crossed
