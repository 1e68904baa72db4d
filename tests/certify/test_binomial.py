"""Counts to radii: against published values, plain rational arithmetic and statsmodels."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm

from arqsearch.certify.binomial import (
    accepts,
    certified_radius,
    clopper_pearson,
    grey_levels_squared,
    minimal_count,
    upper_tail,
)
from arqsearch.errors import ArqError


@pytest.mark.parametrize(
    ("n", "expected"),
    [(100_000, (69598, 84492, 93563, 97870)), (10_000, (7058, 8526, 9409, 9818)), (1_000, (737, 877, 957, 991))],
)
def test_minimal_counts_of_the_reference(n, expected):
    assert tuple(minimal_count(n, ratio * 0.25, 0.25, 0.001) for ratio in (0.5, 1, 1.5, 2)) == expected


@given(st.integers(1, 60), st.integers(0, 61), st.integers(0, 50))
def test_upper_tail_equals_rational_arithmetic(n, k, fiftieths):
    p = Fraction(fiftieths, 50)
    exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    with mpmath.workdps(50):
        got = upper_tail(k, n, mpmath.mpf(p.numerator) / p.denominator)
        assert abs(got - mpmath.mpf(exact.numerator) / exact.denominator) < mpmath.mpf(10) ** -38


@given(st.integers(1, 400), st.sampled_from([0.0, 0.1, 0.25, 0.7]), st.sampled_from([0.001, 0.05]))
def test_minimal_count_is_the_least_accepted(n, radius, alpha):
    k = minimal_count(n, radius, 0.25, alpha, 1e-13)
    exact = Decimal(str(radius))
    assert not accepts(k - 1, n, exact, 0.25, alpha, 1e-13)
    assert k == n + 1 or accepts(k, n, exact, 0.25, alpha, 1e-13)


@pytest.mark.parametrize("n", [100, 10_000, 100_000])
@pytest.mark.parametrize("share", [0.51, 0.6, 0.8, 0.95, 0.999, 1.0])
def test_radius_is_the_clopper_pearson_radius_rounded_down(n, share):
    k, sigma, d_tau = round(n * share), 0.5, 1e-13
    bound = clopper_pearson(k, n, 0.001) - d_tau
    assert bound == pytest.approx(beta.ppf(0.001, k, n - k + 1) - d_tau, rel=1e-12)
    radius = certified_radius(k, n, sigma, 0.001, d_tau)
    if bound <= 0.5:
        assert radius is None
    else:
        assert radius is not None
        assert 0 <= sigma * norm.ppf(bound) - float(radius) < 1.000001e-6
        assert k >= minimal_count(n, float(radius), sigma, 0.001, d_tau)
        assert k < minimal_count(n, float(radius + Decimal("0.000001")), sigma, 0.001, d_tau)


def test_radius_cap_of_unanimous_votes():
    caps = [certified_radius(n, n, 1.0, 0.001, 0.0) for n in (100, 1_000, 10_000, 100_000)]
    assert [round(float(cap), 2) for cap in caps] == [1.50, 2.46, 3.20, 3.81]


def test_distance_of_the_table_lowers_the_radius():
    assert certified_radius(900, 1000, 0.5, 0.001, 0.01) < certified_radius(900, 1000, 0.5, 0.001, 0.0)
    assert certified_radius(560, 1000, 0.5, 0.001, 0.0) is not None
    assert certified_radius(560, 1000, 0.5, 0.001, 0.02) is None


def test_certified_set_in_grey_levels():
    assert [grey_levels_squared(r) for r in (0.25, 0.5, 0.75, 1.0)] == [4064, 16256, 36576, 65025]
    assert grey_levels_squared(0.0) == 0


@pytest.mark.parametrize("change", [{"n": 0}, {"sigma": 0.0}, {"alpha": 0.5}, {"radius": -0.1}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ArqError):
        minimal_count(**{"n": 10, "radius": 0.1, "sigma": 0.25, "alpha": 0.001, **change})
