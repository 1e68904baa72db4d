"""`random`: independent uniform samples of all assignments within budget."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from arqsearch.envs.feasibility import Allocation, Feasibility
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.recorder import Recorder

#: Candidates handed over at once, for workers to share; what is found does not depend on it.
GENERATION = 8


@dataclass(frozen=True)
class RandomPolicy:
    """Sample candidates uniformly from *all* assignments that meet every budget.

    Drawing layer after layer among the feasible bits would starve the layers that come last. Instead each candidate
    is the end of a Gibbs chain: from the smallest assignment, each sweep visits the layers in a random order and
    redraws each one's pair uniformly among those that fit beside all the others. The chain's stationary distribution
    is uniform over the feasible set (every assignment is connected to every other through the smallest one), so
    candidates fill the budget as the set itself does.

    :param sweeps: sweeps of the chain per candidate.
    """

    sweeps: Annotated[int, Field(ge=1)] = 30
    name: ClassVar[str] = "random"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Evaluate independent samples; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        feasibility = problem.feasibility()
        generator = random.Random(seed)
        while not recorder.done:
            size = min(GENERATION, recorder.left)
            recorder.evaluate_many(
                [sample_feasible(feasibility, generator, self.sweeps).bitwidths() for _ in range(size)]
            )
        return recorder.outcome()


def sample_feasible(feasibility: Feasibility, generator: random.Random, sweeps: int) -> Allocation:
    """One assignment, distributed (in the limit of many sweeps) uniformly over the feasible set.

    :param feasibility: the feasible set.
    :param generator: source of randomness.
    :param sweeps: visits of each layer.
    """
    allocation = Allocation(feasibility)
    order = list(range(len(feasibility.searched)))
    for _ in range(sweeps):
        generator.shuffle(order)
        for index in order:
            fitting = [pair for pair in feasibility.pairs if allocation.fits(index, pair)]
            allocation.assign(index, generator.choice(fitting))
    return allocation
