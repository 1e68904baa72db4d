"""The race: its capital against exact enumeration in fractions, its error rate by simulation, its order of images."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import binomtest

from arqsearch.search.race import STAKES, Race, capital, random_order


def exact_capital(differences: Sequence[Fraction], population: int, mean: Fraction, high: Fraction) -> list[Fraction]:
    """The capital as its definition says, with a plain product for each stake."""
    stakes = [Fraction(stake).limit_denominator(1000) for stake in STAKES]
    product, path = [Fraction(1)] * len(stakes), []
    for index, difference in enumerate(differences):
        expected = (population * mean - sum(differences[:index], Fraction(0))) / (population - index)
        product = [
            k * (1 + f * (expected - difference) / (high - expected)) for k, f in zip(product, stakes, strict=True)
        ]
        path.append(sum(product, Fraction(0)) / len(stakes))
    return path


POPULATIONS = [
    [Fraction(x, 10) for x in (-3, 1, 2, 0, -1, 1)],
    [Fraction(x, 10) for x in (-2, -2, -2, -2, 4, 4)],
    [Fraction(x, 10) for x in (-1, -1, -1, -1, -1, 5)],
]


@pytest.mark.parametrize("population", POPULATIONS)
def test_capital_is_a_fair_game_on_the_edge_of_the_hypothesis(population: list[Fraction]) -> None:
    """Over all orders of a list with exactly the mean m, the expected capital is 1 after each step."""
    mean, high = sum(population, Fraction(0)) / 6, Fraction(6, 10)
    orders = list(permutations(population))
    totals = [Fraction(0)] * 6
    for order in orders:
        for step, value in enumerate(exact_capital(order, 6, mean, high)):
            assert value >= 0
            totals[step] += value
    assert totals == [len(orders)] * 6
    for order in orders[::97]:
        found = capital(np.array([float(x) for x in order]), 6, float(mean), float(high))
        assert found == pytest.approx([float(x) for x in exact_capital(order, 6, mean, high)], rel=1e-9)


def test_it_is_over_when_even_the_best_rest_would_not_do() -> None:
    """-4 after two of six: the other four would need a mean of 1, but 0.5 is the most."""
    path = capital(np.array([-2.0, -2.0, 0.5]), 6, 0.0, 0.5)
    assert np.isfinite(path[0]) and path[2] == np.inf


def shapes(images: int, generator: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Candidates that draw with their incumbent exactly: (candidate's values, incumbent's values), in [0, 1]."""
    incumbent = generator.uniform(0.2, 0.8, images)
    swing = np.where(np.arange(images) % 2 == 0, 0.15, -0.15)
    rare = np.full(images, -0.02)
    rare[: images // 10] = 0.18
    coin = np.arange(images) % 2.0
    return {
        "small and even": (incumbent + swing, incumbent),
        "many small losses, few large wins": (incumbent + rare, incumbent),
        "all or nothing": (coin, 1 - coin),
    }


@pytest.mark.parametrize("shape", ["small and even", "many small losses, few large wins", "all or nothing"])
@pytest.mark.parametrize(("delta", "goal"), [(0.1, 0.0), (0.05, -0.03)])
def test_a_candidate_that_is_as_good_is_stopped_at_most_as_often_as_stated(
    shape: str, delta: float, goal: float
) -> None:
    """Exact binomial test: the rate is not above δ. A goal of -0.03 asks less, and the candidates give less by that."""
    images, runs = 60, 1500
    generator = np.random.default_rng(5)
    candidate, incumbent = shapes(images, generator)[shape]
    candidate = candidate + goal
    race = Race(tuple(incumbent.tolist()), max(1.0, float(candidate.max())), goal, delta, block=5)
    stopped = 0
    for _ in range(runs):
        order = generator.permutation(images)
        stopped += race.stops(order.tolist(), candidate[order].tolist()) is not None
    assert binomtest(stopped, runs, delta, alternative="greater").pvalue > 1e-3, stopped


def test_a_clear_loser_is_stopped_soon_and_its_estimate_lies_below() -> None:
    generator = np.random.default_rng(6)
    incumbent = generator.uniform(0.4, 1.0, 200)
    candidate = np.clip(incumbent - generator.uniform(0.0, 0.6, 200), 0, 1)
    race = Race(tuple(incumbent.tolist()), 1.0, 0.0, 0.01, block=10)
    order = random_order(0, "{}", 200)
    images = race.stops(order, candidate[order].tolist())
    assert images is not None and images <= 60 and images % 10 == 0
    seen = order[:images]
    assert (candidate[seen] - incumbent[seen]).mean() < 0


def test_what_comes_later_does_not_change_when_it_is_stopped() -> None:
    """So an evaluation that another search has in full gives the same answer as one that stops."""
    generator = np.random.default_rng(7)
    incumbent = generator.uniform(0.4, 1.0, 100)
    candidate = incumbent - generator.uniform(0.0, 0.6, 100)
    race = Race(tuple(incumbent.tolist()), 1.0, 0.0, 0.05, block=8)
    order = random_order(1, "bits", 100)
    scores = candidate[order].tolist()
    images = race.stops(order, scores)
    assert images is not None
    assert race.stops(order, scores[:images]) == images
    assert race.stops(order, scores[: images - 1]) is None


def test_a_race_that_has_seen_every_image_is_a_full_evaluation() -> None:
    race = Race((1.0,) * 8, 1.0, 0.0, 0.4, block=8)
    assert race.stops(range(8), [0.0] * 8) is None


def test_the_order_is_a_permutation_of_its_own_for_every_candidate() -> None:
    first, second = random_order(0, "a", 50), random_order(0, "b", 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != random_order(1, "a", 50) and first == random_order(0, "a", 50)
    # The first image is any image: over many candidates, none is preferred.
    places = np.bincount([random_order(0, str(index), 10)[0] for index in range(2000)], minlength=10)
    assert binomtest(int(places.max()), 2000, 0.1).pvalue > 1e-4
