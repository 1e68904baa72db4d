"""The rate of false certificates of every rule, on classifiers whose probabilities are known.

A certificate of class c at radius r is false when P(F(x+Z)=c) < Φ(r/σ). Classifiers sit just below the edge of a
radius, where a bound errs most. One judge sees all rules; it also sees rules that are wrong, and must convict them.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import cache, lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm

from arqsearch.certify.binomial import certified_radius, clopper_pearson, minimal_count
from arqsearch.certify.incremental import Pairs, Split, near_probability
from arqsearch.certify.line import first_maximum
from arqsearch.certify.noise import NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.sequential import (
    certifying_count,
    look_times,
    refuting_count,
    sequential_radius,
    sequential_table,
)
from arqsearch.certify.smoothing import SmoothingSettings, program_classifier
from arqsearch.certify.two_class import two_class_radius
from tests.certify.false_rates import crossing_probability, judge
from tests.certify.tiny_programs import half_space

SIGMA, ALPHA = 0.5, 0.05
EDGE = 1e-9  # How far below an edge the true probability lies.
Votes = NDArray[np.int64]
#: Votes of the select and of the estimate stage to the class and its claimed radius, None when it abstains.
Rule = Callable[[Votes, Votes], tuple[int, float | None]]


def false_certificates(rule: Rule, truth: NDArray[np.float64], n0: int, n: int, runs: int, seed: int) -> int:
    """Runs in which the rule claims a radius that the true probability of its class does not reach."""
    rng = np.random.default_rng(seed)
    stages = zip(rng.multinomial(n0, truth, size=runs), rng.multinomial(n, truth, size=runs), strict=True)
    edges, wrong = (SIGMA * norm.ppf(truth)).tolist(), 0
    for select, estimate in stages:
        name, radius = rule(select, estimate)
        wrong += radius is not None and radius > edges[name]
    return wrong


def fixed(select: Votes, estimate: Votes) -> tuple[int, float | None]:
    """The rule `fixed`: the class from the select stage, its radius from the estimate stage."""
    name = first_maximum(dict(enumerate(select.tolist())))
    radius = certified_radius(int(estimate[name]), int(estimate.sum()), SIGMA, ALPHA, 0.0)
    return name, None if radius is None else float(radius)


def chosen_by_its_own_votes(select: Votes, estimate: Votes) -> tuple[int, float | None]:
    """Unsound: the votes that are bounded have chosen the class."""
    return fixed(estimate, estimate)


def normal_approximation(select: Votes, estimate: Votes) -> tuple[int, float | None]:
    """Unsound: the textbook interval p̂ − z·√(p̂(1 − p̂)/n) instead of Clopper-Pearson's."""
    name, n = int(select.argmax()), int(estimate.sum())
    share = estimate[name] / n
    low = share - norm.isf(ALPHA) * np.sqrt(share * (1 - share) / n)
    return name, float(SIGMA * norm.ppf(low)) if low >= 0.5 else None


def at_the_edge_of(k: int, n: int) -> NDArray[np.float64]:
    """The largest probability of which k votes certify a radius too large, and the rest."""
    radius = certified_radius(k, n, SIGMA, ALPHA, 0.0)
    assert radius is not None
    p = float(norm.cdf(float(radius) / SIGMA)) - EDGE
    return np.array([p, 1 - p])


#: Two classes of one half each: the select stage may choose either, and no certificate is true.
HALVES = np.array([0.5 - EDGE, 0.5 - EDGE, 2 * EDGE])


@pytest.mark.parametrize("truth", ["halves", "k=130", "k=170", "k=199", "ten classes"])
def test_fixed(truth: str) -> None:
    n = 200
    shares = HALVES if truth == "halves" else at_the_edge_of(int(truth[2:] if truth[0] == "k" else 170), n)
    if truth == "ten classes":
        shares = np.append(shares[:1], np.full(9, (1 - shares[0]) / 9))
    judge(false_certificates(fixed, shares, 10, n, 10_000, seed=1), 10_000, ALPHA)


def test_fixed_spends_its_alpha_exactly() -> None:
    """The worst probability for each count k errs with P(Bin(n, p) ≥ k) = α, less what rounding down costs."""
    n = 200
    for k in range(115, n + 1, 5):
        assert 0.9999 * ALPHA < binom.sf(k - 1, n, at_the_edge_of(k, n)[0]) <= ALPHA


def test_the_judge_convicts_unsound_rules() -> None:
    wrong = false_certificates(chosen_by_its_own_votes, HALVES, 10, 200, 10_000, seed=1)
    with pytest.raises(AssertionError, match="unsound"):
        judge(wrong, 10_000, ALPHA)
    wrong = false_certificates(normal_approximation, at_the_edge_of(199, 200), 10, 200, 10_000, seed=1)
    with pytest.raises(AssertionError, match="unsound"):
        judge(wrong, 10_000, ALPHA)
    with pytest.raises(AssertionError, match="vacuous"):
        judge(false_certificates(lambda s, e: (0, None), HALVES, 10, 200, 100, seed=1), 100, ALPHA)


def test_fixed_on_the_drawn_noise() -> None:
    """From the generator to the line, on a half-space through the image: p = Φ(½/s), next to ½."""
    sigma, alpha, n, images = 1.0, 0.1, 102, 1500
    table = NoiseTable.for_sigma(sigma)
    classify = program_classifier(half_space((1,), 128, table.hi), sigma)
    settings = SmoothingSettings(sigma=sigma, n0=9, n=n, alpha=alpha, seed=77)
    image, truth = np.full((1, 1, 1), 128, dtype=np.uint8), 0.5 / 255
    wrong = naive = 0
    for identity in range(images):
        line = certify_image(classify, image, identity, None, settings, program="p", data="d")
        wrong += line.certified and (line.predicted == 0 or line.radius > truth)
        top = first_maximum(line.estimate)
        radius = certified_radius(line.estimate[top], n, sigma, alpha, line.d_tau)
        naive += radius is not None and (top == 0 or float(radius) > truth)
    judge(wrong, images, alpha)
    with pytest.raises(AssertionError, match="unsound"):
        judge(naive, images, alpha)


@lru_cache(maxsize=8)
def every_look(radius: float, samples: int) -> tuple[dict[int, int], dict[int, int]]:
    """Thresholds of the betting rule after every single sample."""
    exact, times = Decimal(str(radius)), range(1, samples + 1)
    return (
        {time: certifying_count(time, exact, SIGMA, ALPHA, 0.0) for time in times},
        {time: refuting_count(time, exact, SIGMA, ALPHA, 0.0) for time in times},
    )


@pytest.mark.parametrize("radius", [0.0, 0.25, 0.5])
def test_sequential_whoever_stops_it(radius: float) -> None:
    """The exact chance of the best stopper, who looks after every sample and waits for a false decision."""
    samples, p = 500, float(norm.cdf(radius / SIGMA))
    certify, refute = every_look(radius, samples)
    one_sided = crossing_probability(p, samples, certify)
    # Certificates and refutations share one martingale: both together err with probability α at most.
    both = crossing_probability(p, samples, certify, refute)
    assert 0.15 * ALPHA < one_sided < both <= ALPHA
    assert both > 0.4 * ALPHA


def test_repeated_fixed_bounds_are_convicted() -> None:
    """Clopper-Pearson at every look of the sequential rule errs several times as often as α."""
    certify = {time: minimal_count(time, 0.25, SIGMA, ALPHA) for time in look_times(1000)}
    naive = crossing_probability(float(norm.cdf(0.5)), 1000, certify)
    assert naive > 3 * ALPHA
    rng = np.random.default_rng(5)
    hits = np.cumsum(rng.random((2000, 1000)) < norm.cdf(0.5), axis=1)
    wrong = int(np.any([hits[:, time - 1] >= count for time, count in certify.items()], axis=0).sum())
    assert wrong / 2000 == pytest.approx(naive, abs=0.04)
    with pytest.raises(AssertionError, match="unsound"):
        judge(wrong, 2000, ALPHA)


@pytest.mark.parametrize("p", [0.5 - EDGE, 0.7, 0.9])
def test_sequential_decisions_on_many_radii_at_once(p: float) -> None:
    """Any wrong decision among radii on both sides of the truth, at the rule's own looks: still α in all."""
    edge = SIGMA * norm.ppf(p)
    radii = tuple(
        sorted({max(0.0, round(edge + step, 6)) for step in (-0.2, -0.05, -1e-6, 1e-6, 0.02, 0.05, 0.2, 0.5)})
    )
    table = sequential_table(radii, 2000, SIGMA, ALPHA)
    right = ["refuted" if norm.cdf(radius / SIGMA) > p else "certified" for radius in radii]
    rng, runs, wrong = np.random.default_rng(6), 5000, 0
    steps = np.diff((0, *table.times))
    for hits in np.cumsum(rng.binomial(steps[None].repeat(runs, 0), p), axis=1).tolist():
        decided = table.decide(hits)
        wrong += any(d not in ("undecided", r) for d, r in zip(decided, right, strict=True))
    judge(wrong, runs, ALPHA)


def test_sequential_stopper_who_claims_the_largest_radius_ever_seen() -> None:
    """After every sample it could claim `sequential_radius`; it claims the best of all times afterwards."""
    p, runs, samples = 0.8, 2000, 150
    edge = Decimal(float(SIGMA * norm.ppf(p))).quantize(Decimal("0.000001"))
    hits = np.cumsum(np.random.default_rng(7).random((runs, samples)) < p, axis=1)
    certify = {
        time: certifying_count(time, edge + Decimal("0.000001"), SIGMA, ALPHA, 0.0) for time in range(1, samples + 1)
    }
    needed = np.array([certify[time] for time in range(1, samples + 1)])
    wrong = np.flatnonzero((hits >= needed).any(1))
    judge(len(wrong), runs, ALPHA)
    for run in wrong[:20]:
        time = int((hits[run] >= needed).argmax())
        claimed = sequential_radius(int(hits[run, time]), time + 1, SIGMA, ALPHA, 0.0)
        assert claimed is not None and claimed > edge


CELLS = {  # P(f=A), P(lost), P(gained), and the shared part of the 2000 samples.
    "few lost, all samples shared": (0.9, 0.001, 0.0, 2000),
    "few lost, some samples shared": (0.9, 0.001, 0.0, 500),
    "lost and gained": (0.93, 0.002, 0.004, 2000),
    "next to one half": (0.52, 0.001, 0.001, 2000),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("gained", [False, True])
def test_incremental_with_correlated_networks(name: str, gained: bool) -> None:
    """f and f' see the same noise, so votes and pairs are correlated; the split of α must cover that."""
    p_base, p_lost, p_gained, shared = CELLS[name]
    if gained and p_gained == 0.0:
        p_gained = 0.002
    alpha, n, runs, rng = 0.2, 2000, 3000, np.random.default_rng(8)
    truth, split = p_base - p_lost + p_gained, Split.of(alpha, gained)
    cells = rng.multinomial(shared, [p_base - p_lost, p_lost, p_gained, 1 - p_base - p_gained], size=runs)
    others = rng.binomial(n - shared, p_base, size=runs)
    wrong = 0
    for (both, lost, won, _), other in zip(cells.tolist(), others.tolist(), strict=True):
        wrong += near_probability(both + lost + other, n, Pairs(shared, lost, won), split) > truth * 2**40
    judge(wrong, runs, alpha)


def test_near_network_chosen_on_the_shared_noise_is_convicted() -> None:
    """Of 200 equally good near networks, the one with the fewest lost pairs on this noise."""
    alpha, n, runs, p_base, p_lost = ALPHA, 4000, 300, 0.999, 0.02
    rng, split = np.random.default_rng(9), Split.of(ALPHA)
    votes = rng.binomial(n, p_base, size=runs)
    lost = rng.binomial(400, p_lost, size=(runs, 200))
    independent, chosen = (
        sum(
            near_probability(int(v), n, Pairs(400, int(bad), 0), split) > (p_base - p_lost) * 2**40
            for v, bad in zip(votes, pairs, strict=True)
        )
        for pairs in (lost[:, 0], lost.min(1))
    )
    assert independent <= 2 * alpha * runs
    with pytest.raises(AssertionError, match="unsound"):
        judge(chosen, runs, alpha)


TRUTHS = {
    "two classes": [0.55, 0.45 - 1e-6, 1e-6],
    "three classes": [0.4, 0.35, 0.25],
    "one half": [0.5 - EDGE, 0.5 - EDGE, 2 * EDGE],
    "many runners-up": [0.4, 0.3, 0.3],
}


@pytest.mark.parametrize("name", TRUTHS)
def test_two_classes(name: str) -> None:
    truth, alpha, n, runs = np.array(TRUTHS[name]), 0.2, 500, 4000
    edge = SIGMA / 2 * (norm.ppf(truth[0]) - norm.ppf(truth[1]))
    rng = np.random.default_rng(10)

    @cache
    def radius(top: int, runner_up: int) -> float:
        rest = {1: runner_up, 2: min(runner_up, n - top - runner_up)}
        found = two_class_radius({0: top, **rest}, 0, n, SIGMA, alpha, 0.0)
        return -1.0 if found is None else float(found)

    wrong = sum(radius(int(votes[0]), int(votes[1:].max())) > edge for votes in rng.multinomial(n, truth, size=runs))
    judge(wrong, runs, alpha)


def test_two_classes_with_the_runner_up_taken_at_its_share_is_convicted() -> None:
    truth, n, runs = np.array([0.4, 0.35, 0.25]), 500, 4000
    edge = SIGMA / 2 * (norm.ppf(truth[0]) - norm.ppf(truth[1]))
    wrong = 0
    for votes in np.random.default_rng(11).multinomial(n, truth, size=runs):
        low, share = clopper_pearson(int(votes[0]), n, ALPHA / 2), votes[1:].max() / n
        wrong += SIGMA / 2 * (norm.ppf(low) - norm.ppf(share)) > edge
    with pytest.raises(AssertionError, match="unsound"):
        judge(wrong, runs, ALPHA)
