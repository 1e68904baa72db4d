"""`greedy`: bits where they gain most per cost, by measured sensitivities, then local improvement."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.sensitivity import Sensitivities, measure
from arqsearch.policies.space import ChoiceSpace, Point


@dataclass(frozen=True)
class GreedyPolicy:
    """Greedy allocation by sensitivity.

    1. Measure how much reward each part (weights or activations of a layer) costs when it alone is lowered
       (`sensitivity.py`); these evaluations count.
    2. From the smallest assignment, raise the part with the largest predicted gain per cost by one choice, as long as
       one fits. Cost is the largest share of any limit's slack.
    3. With what evaluations are left, try exchanges at the best assignment so far, those of the largest predicted
       gain first: one part is raised by a choice, and one is lowered if the budget asks for that. An exchange that
       improves the reward is kept, and all become candidates again. When none is left, uniform samples of
       the feasible set are tried, and exchanges go on from one that is better.

    Prediction is additive, with the noise power 4^−bits. Draws random numbers in the last step only.
    """

    name: ClassVar[str] = "greedy"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Measure, allocate, improve; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        space = ChoiceSpace(problem)
        known = measure(recorder, space)
        generator = random.Random(seed)
        if not recorder.done:
            recorder.evaluate(space.bitwidths(allocate(space, known)))
        while not recorder.done:
            best = space.point(recorder.outcome().best.bitwidths)
            seen = {evaluation.bitwidths for evaluation in recorder.history}
            candidates = (space.bitwidths(point) for point in exchanges(space, known, best))
            fresh = next((bitwidths for bitwidths in candidates if bitwidths not in seen), None)
            recorder.evaluate(fresh or space.bitwidths(space.sample(generator)))
        return recorder.outcome()


def allocate(space: ChoiceSpace, known: Sensitivities) -> Point:
    """Raise the part of the largest predicted gain per cost, choice by choice, until nothing fits.

    :param space: the feasible set.
    :param known: measured sensitivities.
    """
    point = space.smallest
    while True:
        best, rate = None, -1.0
        for layer, part in product(range(space.layers), (0, 1)):
            if point[layer, part] + 1 >= len(space.choices):
                continue
            raised = point.copy()
            raised[layer, part] += 1
            if not space.met(raised):
                continue
            gain = known.loss(layer, part, int(point[layer, part])) - known.loss(layer, part, int(raised[layer, part]))
            cost = float((space.shares(raised) - space.shares(point)).max(initial=0.0))
            if gain / max(cost, 1e-12) > rate:
                best, rate = raised, gain / max(cost, 1e-12)
        if best is None:
            return point
        point = best


def exchanges(space: ChoiceSpace, known: Sensitivities, point: Point) -> list[Point]:
    """Neighbours of an assignment, the largest predicted gain first: one part up, and at most one other down.

    :param space: the feasible set.
    :param known: measured sensitivities.
    :param point: feasible choice numbers (layers, 2).
    """
    parts = list(product(range(space.layers), (0, 1)))
    top = len(space.choices) - 1
    found: list[tuple[float, int, Point]] = []
    for up in parts:
        if point[up] >= top:
            continue
        raised = point.copy()
        raised[up] += 1
        gain = known.loss(*up, int(point[up])) - known.loss(*up, int(raised[up]))
        if space.met(raised):
            found.append((-gain, len(found), raised))
            continue
        for down in parts:
            if down == up or point[down] == 0:
                continue
            for steps in range(1, int(point[down]) + 1):
                swapped = raised.copy()
                swapped[down] -= steps
                if space.met(swapped):
                    loss = known.loss(*down, int(swapped[down])) - known.loss(*down, int(point[down]))
                    found.append((loss - gain, len(found), swapped))
                    break
    return [neighbour for _, _, neighbour in sorted(found, key=lambda item: item[:2])]
