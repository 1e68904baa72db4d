"""The tasks on the table: budgets and mixtures of the reward, each with its known optimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from arqsearch.benchmarks.tabular.table import INTERVAL, SMOOTHED, TabularEvaluator, shared_table
from arqsearch.errors import ArqError, nearest
from arqsearch.policies import SearchProblem
from arqsearch.quantize.cost import Budget

#: Reward of recipe `digits`, and the smoothed radius alone.
BOTH: Mapping[str, float] = {SMOOTHED: 1.0, INTERVAL: 0.5}
SMOOTHED_ALONE: Mapping[str, float] = {SMOOTHED: 1.0}


@dataclass(frozen=True)
class TabularTask:
    """One search problem on the table.

    :param name: short and unique.
    :param title: for people.
    :param limits: the budget as a recipe states it.
    :param weights: weight of each term in the reward.
    """

    name: str
    title: str
    limits: Mapping[str, str]
    weights: Mapping[str, float]

    @cached_property
    def evaluator(self) -> TabularEvaluator:
        """Answers from the committed table."""
        return TabularEvaluator(shared_table(), self.weights)

    @cached_property
    def budget(self) -> Budget:
        """The limits in whole numbers."""
        return Budget.parse(self.limits, self.evaluator.layers)

    def problem(self) -> SearchProblem:
        """What a policy searches; its front trades bit operations for reward."""
        return SearchProblem(
            self.evaluator, self.budget, self.evaluator.table.facts.choices, {}, objectives=("bops", "reward")
        )

    @cached_property
    def optimum(self) -> float:
        """Largest reward within the budget."""
        return self.evaluator.optimum(self.budget).reward

    @cached_property
    def typical(self) -> float:
        """Median reward within the budget."""
        return float(np.median(self.evaluator.rewards[self.evaluator.within(self.budget)]))

    def score(self, reward: float) -> float:
        """A reward on the scale of every task: 1 is the optimum, 0 the median assignment within the budget."""
        return (reward - self.typical) / (self.optimum - self.typical)


TASKS: tuple[TabularTask, ...] = (
    TabularTask("bops-0.9-both", "BOPs ≤ 0.9 %, radius and boxes", {"bops": "0.9%"}, BOTH),
    TabularTask("bops-0.7-both", "BOPs ≤ 0.7 %, radius and boxes", {"bops": "0.7%"}, BOTH),
    TabularTask("bops-0.9-radius", "BOPs ≤ 0.9 %, radius alone", {"bops": "0.9%"}, SMOOTHED_ALONE),
    TabularTask("bops-0.7-radius", "BOPs ≤ 0.7 %, radius alone", {"bops": "0.7%"}, SMOOTHED_ALONE),
    TabularTask(
        "bytes-both", "BOPs ≤ 0.9 % and weights ≤ 12 %, radius and boxes", {"bops": "0.9%", "weight_bytes": "12%"}, BOTH
    ),
)


def task(name: str) -> TabularTask:
    """A task by name.

    :raises ArqError: when there is none.
    """
    found = {known.name: known for known in TASKS}
    if name not in found:
        raise ArqError(f"No tabular task named {name!r}. {nearest(name, found)}")
    return found[name]
