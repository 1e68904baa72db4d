"""Discordant pairs and the two-class bound: exact bounds, the published ζ bound, simulated error rates."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, norm

from arqsearch.certify.binomial import certified_radius
from arqsearch.certify.incremental import (
    Pairs,
    Split,
    check_independent,
    incremental_radius,
    lower_bound,
    near_probability,
    published_probability,
    upper_bound,
)
from arqsearch.certify.two_class import two_class_radius
from arqsearch.errors import ArqError

ONE = 1 << 40


@given(st.integers(1, 500), st.data())
def test_bounds_are_clopper_pearson_rounded_to_the_safe_side(n, data):
    k = data.draw(st.integers(0, n))
    alpha = data.draw(st.sampled_from([0.0005, 0.001, 0.05]))
    low = beta.ppf(alpha, k, n - k + 1) if k else 0.0
    high = beta.ppf(1 - alpha, k + 1, n - k) if k < n else 1.0
    assert lower_bound(k, n, alpha) / ONE == pytest.approx(low, abs=2e-12)
    assert upper_bound(k, n, alpha) / ONE == pytest.approx(high, abs=2e-12)
    assert lower_bound(k, n, alpha) <= low * ONE + 1e-3 * ONE * 1e-9


@given(st.integers(1, 2000), st.integers(1, 2000), st.data())
def test_never_looser_than_the_published_bound(n, samples, data):
    votes = data.draw(st.integers(n // 2, n))
    lost = data.draw(st.integers(0, samples))
    gained = data.draw(st.integers(0, samples - lost))
    other = data.draw(st.integers(0, samples - lost - gained))  # f ≠ A and f' ≠ f, f' ≠ A
    split = Split.of(0.001)
    ours = near_probability(votes, n, Pairs(samples, lost, gained), split)
    assert ours >= published_probability(votes, n, lost + gained + other, samples, split)


def test_gained_pairs_can_raise_the_radius_above_the_cached_one():
    cached = certified_radius(8000, 10_000, 0.5, 0.001, 0.0)
    bound = near_probability(8000, 10_000, Pairs(10_000, 5, 900), Split.of(0.001, gained=True))
    radius = incremental_radius(bound, 0.5, 0.0)
    assert cached is not None and radius is not None and radius > cached


def test_radius_is_that_of_the_bound_rounded_down():
    assert incremental_radius(ONE // 2 - 1, 0.5, 0.0) is None
    assert incremental_radius(ONE // 2, 0.5, 0.0) == 0
    for share in (0.6, 0.9, 0.99):
        radius = incremental_radius(int(share * ONE), 0.5, 1e-9)
        assert radius is not None
        assert 0 <= 0.5 * norm.ppf(share - 1e-9) - float(radius) < 1.1e-6


@pytest.mark.parametrize("gained", [False, True])
def test_error_rate_at_the_edge(gained):
    """The near network's probability lies just below what is certified at most α of the time."""
    rng, runs, alpha, n = np.random.default_rng(3), 4000, 0.05, 400
    p_lost, p_gained, p_base = 0.03, 0.05, 0.85
    p_near = p_base - p_lost + p_gained
    split = Split.of(alpha, gained)
    cells = rng.multinomial(n, [p_base - p_lost, p_lost, p_gained, 1 - p_base - p_gained], size=runs)
    bounds = [
        near_probability(int(both + lost), n, Pairs(n, int(lost), int(won)), split) for both, lost, won, _ in cells
    ]
    wrong = sum(Fraction(bound, ONE) > Fraction(p_near) for bound in bounds)
    assert binomtest(int(wrong), runs, alpha, alternative="greater").pvalue > 1e-6


def test_shared_noise_that_chose_the_network_is_refused():
    check_independent([(7, 0), (8, 2)], seed=7, stage=2)
    with pytest.raises(ArqError, match="entered the selection or training"):
        check_independent([(7, 0), (8, 2)], seed=8, stage=2)
    with pytest.raises(ArqError, match="does not say"):
        check_independent(None, seed=8, stage=2)


def test_impossible_pairs_are_refused():
    with pytest.raises(ArqError, match="cannot be"):
        Pairs(10, 8, 3)


def test_two_class_radius_uses_the_runner_up():
    counts = {3: 7000, 1: 1500, 0: 900, 2: 600}
    standard = certified_radius(7000, 10_000, 0.5, 0.001, 1e-12)
    radius = two_class_radius(counts, 3, 10_000, 0.5, 0.001, 1e-12)
    assert standard is not None and radius is not None and radius > standard
    high = beta.ppf(0.0005, 7000, 3001)
    low = beta.ppf(1 - 0.0005, 1501, 8500)
    assert float(radius) == pytest.approx(0.25 * (norm.ppf(high) - norm.ppf(low)), abs=1.1e-6)
    assert two_class_radius({0: 500, 1: 500}, 0, 1000, 0.5, 0.001, 0.0) is None
    assert two_class_radius({1: 10}, 0, 10, 0.5, 0.001, 0.0) is None


def test_two_class_error_rate():
    rng, runs, alpha, n = np.random.default_rng(4), 3000, 0.05, 500
    truth = np.array([0.5, 0.3, 0.15, 0.05])
    edge = 0.25 * (norm.ppf(truth[0]) - norm.ppf(truth[1]))
    wrong = 0
    for votes in rng.multinomial(n, truth, size=runs):
        radius = two_class_radius(dict(enumerate(votes.tolist())), 0, n, 0.5, alpha, 0.0)
        wrong += radius is not None and float(radius) > edge
    assert binomtest(wrong, runs, alpha, alternative="greater").pvalue > 1e-6
