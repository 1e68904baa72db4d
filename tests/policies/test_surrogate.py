"""The surrogate against direct Gaussian process formulas, hill climbing against exhaustive enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from arqsearch.policies.local_search import Climber
from arqsearch.policies.space import ChoiceSpace
from arqsearch.policies.surrogate import BROAD, FLOOR, Quadratic, Scale, Surrogate, _Prior
from tests.policies import problems

BITS = np.array([2, 4, 8])


def random_quadratic(parts: int, choices: int, seed: int) -> Quadratic:
    generator = np.random.default_rng(seed)
    pairs = generator.normal(size=(parts, choices, parts, choices))
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(parts), :, np.arange(parts), :] = 0
    return Quadratic(0.3, generator.normal(size=(parts, choices)), pairs)


def test_values_are_sums_over_parts_and_pairs() -> None:
    function = random_quadratic(4, 3, 0)
    points = np.random.default_rng(1).integers(0, 3, size=(5, 2, 2))
    for point, value in zip(points, function.values(points), strict=True):
        row = point.reshape(-1)
        expected = 0.3 + sum(function.linear[p, c] for p, c in enumerate(row))
        expected += sum(function.pairs[p, row[p], q, row[q]] for p in range(4) for q in range(p))
        assert value == pytest.approx(expected)


def test_the_posterior_mean_is_that_of_the_kernel_written_out() -> None:
    generator = np.random.default_rng(0)
    points = generator.integers(0, 3, size=(12, 3, 2))
    rewards = generator.normal(size=12)
    model = Surrogate(BITS, points, rewards)
    settings, prior = model.settings, _Prior(BITS, model.settings.decay, model.settings.length, 6)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        slopes = [prior.noise[x[part::2]].sum() / np.sqrt(6) for part in (0, 1) for x in (a, b)]
        broad = BROAD * (1 + slopes[0] * slopes[1] + slopes[2] * slopes[3])
        single = [prior.table[x, y] for x, y in zip(a, b, strict=True)]
        pair = sum(single[p] * single[q] for p in range(6) for q in range(p))
        return broad + (1 - settings.pair_share) * sum(single) / 6 + settings.pair_share * pair / 15

    rows = points.reshape(12, 6)
    gram = np.array([[kernel(a, b) for b in rows] for a in rows])
    scale = Scale.of(rewards)
    weights = np.linalg.solve(
        gram + (settings.noise + 1e-9) * np.eye(12), np.maximum(scale.standardized(rewards), FLOOR)
    )
    others = generator.integers(0, 3, size=(5, 3, 2))
    expected = [scale.centre + scale.spread * sum(w * kernel(o, r) for w, r in zip(weights, rows, strict=True))
                for o in others.reshape(5, 6)]  # fmt: skip
    np.testing.assert_allclose(model.mean().values(others), expected, rtol=1e-6)


def test_draws_have_the_mean_and_the_variance_of_the_posterior() -> None:
    generator = np.random.default_rng(0)
    points = generator.integers(0, 3, size=(20, 3, 2))
    function = random_quadratic(6, 3, 0)
    model = Surrogate(BITS, points[:14], function.values(points[:14]))
    draws = np.array([model.sample(generator).values(points) for _ in range(1500)])
    settings, prior = model.settings, _Prior(BITS, model.settings.decay, model.settings.length, 6)
    hot = np.zeros((20, 6, 3))
    np.put_along_axis(hot, points.reshape(20, 6, 1), 1.0, axis=2)
    broad, single, pair = prior.grams(hot.reshape(20, 18))
    gram = broad + (1 - settings.pair_share) * single + settings.pair_share * pair
    known = np.linalg.solve(gram[:14, :14] + (settings.noise + 1e-9) * np.eye(14), gram[:14])
    variance = np.maximum(np.diag(gram - gram[:, :14] @ known), 0) * model._deviation**2 * model._scale.spread**2
    np.testing.assert_allclose(draws.std(axis=0), np.sqrt(variance), rtol=0.12)
    standard = (draws.mean(axis=0) - model.mean().values(points)) / (np.sqrt(variance) / np.sqrt(1500))
    assert np.abs(standard).max() < 4.5


def test_most_bits_have_no_effect_in_the_prior() -> None:
    prior = _Prior(np.arange(2, 9), 2.5, 1.0, 4)
    assert prior.table[-1].tolist() == prior.table[:, -1].tolist() == [0.0] * 7
    assert np.linalg.eigvalsh(prior.table).min() > -1e-9
    drawn = prior.draw(np.random.default_rng(0), 0.5)
    assert np.abs(drawn.pairs[:, -1]).max() < 1e-6


def test_it_predicts_an_additive_reward_from_a_few_evaluations() -> None:
    task = problems.problem(4, choices=(2, 3, 4, 5, 6))
    space = ChoiceSpace(task)
    generator = np.random.default_rng(0)
    points = generator.integers(0, 5, size=(120, 4, 2))
    rewards = np.array([task.evaluator.evaluate(space.bitwidths(p)).reward for p in points])
    for pairs in (True, False):
        model = Surrogate(space.choices, points[:60], rewards[:60], pairs)
        predicted = model.mean().values(points[60:])
        good = rewards[60:] > np.quantile(rewards, 0.3)
        assert np.corrcoef(predicted[good], rewards[60:][good])[0, 1] > 0.9


@pytest.mark.parametrize("rewards", [[0.5], [0.5, 0.5, 0.5]])
def test_one_evaluation_or_a_constant_reward_is_enough(rewards: list[float]) -> None:
    points = np.zeros((len(rewards), 2, 2), dtype=np.int64)
    model = Surrogate(BITS, points, np.array(rewards))
    assert np.isfinite(model.mean().values(points)).all()
    assert np.isfinite(model.sample(np.random.default_rng(0)).values(points)).all()


@pytest.mark.parametrize("seed", range(6))
def test_climbing_ends_where_no_move_of_one_or_two_layers_helps(seed: int) -> None:
    task = problems.problem(3, seed=seed)
    space = ChoiceSpace(task)
    function = random_quadratic(6, 3, seed)
    end = Climber(space).climb(function, space.smallest)
    assert space.met(end)
    value = float(function.values(end[None])[0])
    points = space.points(problems.everything(task))
    changed = (points != end).any(axis=2)
    distance = np.abs(points - end).sum(axis=2)
    one = changed.sum(axis=1) <= 1
    two = (changed.sum(axis=1) == 2) & (distance <= 2).all(axis=1)
    assert function.values(points[one | two]).max() <= value + 1e-9


def test_gains_of_moves_are_differences_of_values() -> None:
    task = problems.problem(3)
    space = ChoiceSpace(task)
    function = random_quadratic(6, 3, 7)
    point = np.array([[0, 1], [1, 0], [0, 0]])
    moves = Climber(space)._moves(function, point, 2)
    reached = np.array([moves.apply(point, index) for index in range(len(moves.gains))])
    before = function.values(point[None])[0]
    np.testing.assert_allclose(function.values(reached) - before, moves.gains, atol=1e-9)
    assert all(space.met(p) for p in reached)
    assert (np.diff(moves.gains) <= 0).all()


def test_climbing_avoids_what_is_known() -> None:
    task = problems.problem(2)
    space = ChoiceSpace(task)
    function, climber = random_quadratic(4, 3, 3), Climber(space)
    avoid: set[bytes] = set()
    for _ in range(6):
        found = climber.climb(function, space.smallest, frozenset(avoid))
        assert Climber.key(found) not in avoid
        avoid.add(Climber.key(found))


def test_climbing_reaches_the_best_of_an_additive_reward() -> None:
    for seed, count in product(range(4), (2, 3)):
        task = problems.problem(count, seed=seed)
        space = ChoiceSpace(task)
        evaluator = task.evaluator
        assert isinstance(evaluator, problems.AdditiveEvaluator)
        scale = np.array(evaluator._sensitivities).reshape(-1)
        linear = -scale[:, None] * 4.0 ** (2 - space.choices)
        function = Quadratic(0.0, linear, np.zeros((len(scale), 3, len(scale), 3)))
        starts = [space.smallest, *space.uniform()]
        reached = [function.values(Climber(space).climb(function, s)[None])[0] for s in starts]
        assert max(reached) == pytest.approx(problems.optimum(task), rel=0.05)
