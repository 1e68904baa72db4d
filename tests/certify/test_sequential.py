"""The sequential rule: published counts, rational arithmetic, and its error rate on simulated classifiers."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from arqsearch.certify.sequential import (
    certifying_count,
    look_times,
    refuting_count,
    sequential_radius,
    sequential_table,
    wealth_reaches,
)
from arqsearch.errors import ArqError


def exact_wealth(hits: int, samples: int, p: Fraction) -> Fraction:
    """W(p) as a fraction: B(H+½, M+½)/π = (2H)! (2M)! / (4^T H! M! T!)."""
    misses = samples - hits
    f = math.factorial
    beta = Fraction(f(2 * hits) * f(2 * misses), 4**samples * f(hits) * f(misses) * f(samples))
    return beta / (p**hits * (1 - p) ** misses)


def test_counts_of_the_reference():
    expected = {100: 98, 200: 189, 500: 456, 1000: 892, 10_000: 8588, 100_000: 84_719}
    assert {n: certifying_count(n, Decimal("0.5"), 0.5, 0.001, 0.0) for n in expected} == expected


@given(st.integers(1, 40), st.data())
def test_wealth_equals_rational_arithmetic(samples, data):
    hits = data.draw(st.integers(0, samples))
    p = Fraction(data.draw(st.integers(1, 19)), 20)
    alpha = data.draw(st.sampled_from([0.001, 0.05, 0.3]))
    with mpmath.workdps(50):
        real = mpmath.mpf(p.numerator) / p.denominator
    assert wealth_reaches(hits, samples, real, alpha) == (exact_wealth(hits, samples, p) >= 1 / Fraction(str(alpha)))


def test_wealth_is_a_martingale():
    p = Fraction(7, 10)
    for samples in range(12):
        for hits in range(samples + 1):
            after = p * exact_wealth(hits + 1, samples + 1, p) + (1 - p) * exact_wealth(hits, samples + 1, p)
            assert after == exact_wealth(hits, samples, p)


@given(st.integers(1, 300), st.sampled_from(["0", "0.1", "0.25", "0.5"]), st.sampled_from([0.001, 0.05]))
def test_thresholds_are_the_outermost_counts(samples, radius, alpha):
    sigma, d_tau, exact = 0.25, 1e-9, Decimal(radius)
    p = float(norm.cdf(float(radius) / sigma))
    reached = [wealth_reaches(hits, samples, mpmath.mpf(p), alpha) for hits in range(samples + 1)]
    above = [hits for hits in range(samples + 1) if reached[hits] and hits > p * samples]
    below = [hits for hits in range(samples + 1) if reached[hits] and hits < p * samples]
    assert certifying_count(samples, exact, sigma, alpha, d_tau) == min(above, default=samples + 1)
    assert refuting_count(samples, exact, sigma, alpha, d_tau) == max(below, default=-1)
    assert not below or reached[: max(below) + 1] == [True] * (max(below) + 1)
    assert not above or all(reached[min(above) :])


def test_looks_do_not_depend_on_more_than_the_cap():
    assert look_times(100) == (64, 80, 100)
    assert look_times(64) == (64,) and look_times(10) == (10,)
    assert look_times(10_000)[-2:] == (8674, 10_000)
    assert look_times(100_000)[:20] == look_times(10_000)[:20]
    with pytest.raises(ArqError, match="cap of 0"):
        look_times(0)


def test_a_decision_stays_and_orders_the_radii():
    table = sequential_table((0.0, 0.25, 0.5, 1.0), 1000, 0.5, 0.001, 1e-9)
    first = table.certify[0][1]
    assert table.decide([first])[:2] == ("certified", "certified")
    worse = [first, *(max(0, count) for count in (row[1] for row in table.refute[1:]))]
    assert table.decide(worse)[:2] == ("certified", "certified"), "a look is no reason to take a certificate back"
    assert table.decide([0]) == ("refuted",) * 4
    assert table.decide([]) == ("undecided",) * 4
    assert table.decide([table.refute[0][1]]) == ("undecided", "refuted", "refuted", "refuted")


def test_radius_agrees_with_the_thresholds():
    for samples in (64, 1000):
        for hits in range(samples // 2, samples + 1, 7):
            radius = sequential_radius(hits, samples, 0.5, 0.001, 1e-9)
            assert (radius is not None) == (hits >= certifying_count(samples, Decimal(0), 0.5, 0.001, 1e-9))
            if radius is not None:
                assert hits >= certifying_count(samples, radius, 0.5, 0.001, 1e-9)
                assert hits < certifying_count(samples, radius + Decimal("0.000001"), 0.5, 0.001, 1e-9)


@pytest.mark.parametrize("radius", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("side", ["just below", "just above"])
def test_error_rate_with_a_look_after_every_batch(radius, side):
    """Classifiers at the edge of a radius, looked at at every time of the table: false decisions stay rare."""
    alpha, sigma, runs = 0.05, 0.5, 20_000
    table = sequential_table((radius,), 5000, sigma, alpha, 0.0)
    p = float(norm.cdf(radius / sigma)) + (-1e-9 if side == "just below" else 1e-9)
    rng = np.random.default_rng(1)
    steps = np.diff((0, *table.times))
    hits = np.cumsum(rng.binomial(steps[None, :].repeat(runs, 0), p), axis=1)
    if side == "just below":
        wrong = (hits >= np.array(table.certify)[:, 0]).any(1).sum()
    else:
        wrong = (hits <= np.array(table.refute)[:, 0]).any(1).sum()
    assert binomtest(int(wrong), runs, alpha, alternative="greater").pvalue > 1e-6
    assert wrong > 0, "a bound that never errs here tests nothing"


def test_error_rate_with_adversarial_stopping():
    """Looking after every single sample, stopping at the first success: Ville's inequality still holds."""
    alpha, runs, samples, p = 0.05, 4000, 400, 0.8
    thresholds = np.array(
        [
            next(
                (
                    h
                    for h in range(math.floor(0.8 * t), t + 1)
                    if h > p * t and exact_wealth(h, t, Fraction(4, 5)) >= 20
                ),
                t + 1,
            )
            for t in range(1, samples + 1)
        ]
    )
    hits = np.cumsum(np.random.default_rng(2).random((runs, samples)) < p, axis=1)
    wrong = int((hits >= thresholds).any(1).sum())
    assert binomtest(wrong, runs, alpha, alternative="greater").pvalue > 1e-6
    assert wrong > runs * alpha / 20


def test_bad_settings_are_refused():
    for radii in ((), (0.5, 0.25), (-0.1,), (0.1, 0.1)):
        with pytest.raises(ArqError, match="Radii"):
            sequential_table(radii, 100, 0.25, 0.001)
    with pytest.raises(ArqError, match="alpha"):
        sequential_table((0.0,), 100, 0.25, 0.7)
