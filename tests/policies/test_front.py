"""Fronts against the definition, hypervolumes against counting and against Optuna's."""

from __future__ import annotations

import numpy as np
import pytest

from arqsearch.envs.analytic import EMBEDDED_LAYERS
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies import SearchOutcome, create
from arqsearch.policies.front import dominates, front, hypervolume, losses, objective_values
from arqsearch.quantize.bitwidths import BitWidths
from tests.policies import problems

NAMES = [layer.name for layer in EMBEDDED_LAYERS]
OBJECTIVES = ("bops", "reward")


def evaluations(count: int) -> list[Evaluation]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        weight, activation = (int(b) for b in generator.integers(2, 9, 2))
        reward = (weight * activation // 8 + int(generator.integers(0, 4))) / 8
        bits = BitWidths.uniform(NAMES, weight, activation)
        found.append(Evaluation(bits, reward, {"ibp@1": float(generator.random())}))
    return found


def test_nothing_dominates_the_front_and_it_dominates_all_else() -> None:
    history = evaluations(60)
    kept = front(history, OBJECTIVES, EMBEDDED_LAYERS)
    points = [losses(e, OBJECTIVES, EMBEDDED_LAYERS) for e in kept]
    assert len(set(points)) == len(points) > 1
    assert points == sorted(points)
    for evaluation in history:
        point = losses(evaluation, OBJECTIVES, EMBEDDED_LAYERS)
        assert not any(dominates(point, other) for other in points)
        assert point in points or any(dominates(other, point) for other in points)


def test_of_equal_values_the_first_is_kept() -> None:
    bits = BitWidths.uniform(NAMES, 4, 4)
    first, second = Evaluation(bits, 0.5, {}), Evaluation(bits, 0.5, {"other": 1.0})
    assert front([first, second], ("reward",), EMBEDDED_LAYERS) == (first,)


def test_terms_are_objectives_too() -> None:
    history = evaluations(20)
    (best,) = front(history, ("ibp@1",), EMBEDDED_LAYERS)
    assert best.terms["ibp@1"] == max(e.terms["ibp@1"] for e in history)
    assert objective_values(best, ("ibp@1",), EMBEDDED_LAYERS) == (best.terms["ibp@1"],)


def test_an_unknown_objective_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArqError, match=r"No objective named 'bop'.*Did you mean 'bops'"):
        front(evaluations(2), ("bop", "reward"), EMBEDDED_LAYERS)
    with pytest.raises(ArqError, match="at least one objective"):
        front(evaluations(2), (), EMBEDDED_LAYERS)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_hypervolume_counts_the_dominated_cells(dimensions: int) -> None:
    generator = np.random.default_rng(dimensions)
    points = generator.integers(0, 8, size=(9, dimensions))
    reference = np.full(dimensions, 6)
    cells = np.stack(np.meshgrid(*[np.arange(6)] * dimensions, indexing="ij"), axis=-1).reshape(-1, dimensions)
    expected = sum(bool((points <= cell).all(axis=1).any()) for cell in cells)
    assert hypervolume(points.tolist(), reference.tolist()) == pytest.approx(expected)


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0.0
    assert hypervolume([(1.0, 0.0)], (1.0, 1.0)) == 0.0


def test_every_policy_gives_the_front_of_its_history() -> None:
    from dataclasses import replace

    problem = replace(problems.embedded(), objectives=OBJECTIVES)
    for name in ("random", "uniform", "greedy", "nsga2"):
        outcome = create(name).search(problem, 20, 0)
        assert outcome.front == front(outcome.history, OBJECTIVES, problem.evaluator.layers)
        assert len(outcome.front) > 1


def test_an_evaluation_that_was_stopped_early_is_not_the_best() -> None:
    bits = BitWidths.uniform(NAMES, 4, 4)
    full, stopped = Evaluation(bits, 0.1, {}), Evaluation(bits, 0.5, {}, stopped=20)
    outcome = SearchOutcome.of((stopped, full), problems.embedded())
    assert outcome.best is full and outcome.front == (full,)
    assert SearchOutcome.of((stopped,), problems.embedded()).best is stopped
