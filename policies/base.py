"""The one protocol of everything that chooses bit-widths: `Policy`, its problem and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from arqsearch.envs.evaluator import Evaluation, Evaluator
from arqsearch.envs.feasibility import Feasibility
from arqsearch.errors import ArqError
from arqsearch.policies.front import front
from arqsearch.quantize.bitwidths import ALL_BITS
from arqsearch.quantize.cost import Budget

#: Called after each evaluation with its 0-based index and the evaluation.
OnEvaluation = Callable[[int, Evaluation], None]


@dataclass(frozen=True)
class SearchProblem:
    """What is searched, independent of how.

    :param evaluator: scores a candidate.
    :param budget: limits that every evaluated candidate meets.
    :param choices: bits a searched layer may take.
    :param fixed: layers whose (weight bits, activation bits) are not searched.
    :param objectives: what the front of the outcome trades off: ``"reward"``, costs (to be small) and terms of the
        evaluation (to be large); see `arqsearch.policies.front`.
    """

    evaluator: Evaluator
    budget: Budget
    choices: tuple[int, ...] = ALL_BITS
    fixed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    objectives: tuple[str, ...] = ("reward",)

    def feasibility(self) -> Feasibility:
        """The set that is searched.

        :raises ArqError: when the budget cannot be met, or a choice or a fixed layer is not valid.
        """
        return Feasibility(self.evaluator.layers, self.budget, self.choices, self.fixed)


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    :param best: the evaluation with the largest reward, the earliest one on a tie; one that was stopped early only
        where all were.
    :param history: every evaluation, in the order in which it was made.
    :param front: the full evaluations of the history that no other one dominates in the problem's objectives.
    """

    best: Evaluation
    history: tuple[Evaluation, ...]
    front: tuple[Evaluation, ...] = ()

    @classmethod
    def of(cls, history: tuple[Evaluation, ...], problem: SearchProblem) -> SearchOutcome:
        """Pick the best of a history, and its front.

        :param history: evaluations in order.
        :param problem: what was searched.
        :raises ArqError: when the history is empty, or an objective is unknown.
        """
        if not history:
            raise ArqError("The search evaluated no candidate; ask for at least one evaluation.")
        full = tuple(evaluation for evaluation in history if evaluation.stopped is None) or history
        return cls(
            best=max(full, key=lambda evaluation: evaluation.reward),
            history=history,
            front=front(full, problem.objectives, problem.evaluator.layers),
        )


class Policy(Protocol):
    """A searcher: proposes candidates within budget, learns from their rewards.

    An implementation promises: every evaluated candidate meets the budget; exactly `evaluations` are made
    (at most, where a policy enumerates a finite list); the same seed gives the same history, whatever the evaluator
    does to the global random generators, so that a search is resumed by replaying it on a cached evaluator.
    """

    @property
    def name(self) -> str:
        """The name under which the policy is registered."""
        ...

    def search(
        self,
        problem: SearchProblem,
        evaluations: int,
        seed: int,
        on_evaluation: OnEvaluation | None = None,
    ) -> SearchOutcome:
        """Search for the bit-widths with the largest reward.

        :param problem: what is searched.
        :param evaluations: number of candidates to score; repeated candidates count.
        :param seed: seed of every random choice.
        :param on_evaluation: called after each evaluation with its 0-based index.
        :raises ArqError: when the budget cannot be met or `evaluations` is below 1.
        """
        ...
