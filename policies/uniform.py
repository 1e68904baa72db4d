"""`uniform`: the same bits for every layer, every pair within budget: what search has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.recorder import Recorder
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import total_cost


@dataclass(frozen=True)
class UniformPolicy:
    """Enumerate the (weight, activation) pairs that meet the budget, the fullest first.

    How full is the largest share of any limit that the assignment takes (BOPs where there is no limit); on a tie the
    pair with more weight bits comes first. Makes fewer evaluations than allowed when there are fewer such
    pairs (at most 49). Draws no random numbers.
    """

    name: ClassVar[str] = "uniform"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Evaluate the pairs in order; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        recorder.evaluate_many(uniform_candidates(problem)[:evaluations])
        return recorder.outcome()


def uniform_candidates(problem: SearchProblem) -> list[BitWidths]:
    """Every uniform assignment within budget, the fullest first; at least the smallest one.

    :param problem: what is searched.
    :raises ArqError: when the budget cannot be met.
    """
    layers = problem.evaluator.layers
    feasibility = problem.feasibility()
    limits = problem.budget.limits or (("bops", 1),)

    def fullness(bitwidths: BitWidths) -> Fraction:
        return max(Fraction(total_cost(name, layers, bitwidths), max(limit, 1)) for name, limit in limits)

    candidates = [
        (pair, BitWidths.uniform([layer.name for layer in layers], *pair, fixed=feasibility.fixed))
        for pair in feasibility.pairs
    ]
    within = [(pair, bits) for pair, bits in candidates if problem.budget.met(layers, bits)]
    within.sort(key=lambda item: (fullness(item[1]), item[0].weight), reverse=True)
    return [bits for _, bits in within]
