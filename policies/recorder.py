"""`Recorder`: the evaluator a policy sees, which keeps the history and shields the policy's random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from arqsearch.envs.evaluator import BatchEvaluator, Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import preserved_random_state, torch_threads
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo


class Recorder:
    """An :class:`arqsearch.envs.Evaluator` that records, counts and reports.

    The evaluator behind it runs with the caller's number of threads, and the global random states are put back after
    it: a policy makes the same choices whether a score is computed or read from a record.

    :param problem: what is searched.
    :param evaluations: how many evaluations are allowed.
    :param on_evaluation: called after each evaluation with its 0-based index.
    :raises ArqError: when `evaluations` is below 1.
    """

    def __init__(self, problem: SearchProblem, evaluations: int, on_evaluation: OnEvaluation | None = None) -> None:
        import torch

        if evaluations < 1:
            raise ArqError(f"The search was given {evaluations} evaluations; ask for at least 1.")
        self._problem = problem
        self._evaluations = evaluations
        self._on_evaluation = on_evaluation
        self._history: list[Evaluation] = []
        self._threads = torch.get_num_threads()

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self._problem.evaluator.layers

    @property
    def allowed(self) -> int:
        """Evaluations of the whole search."""
        return self._evaluations

    @property
    def done(self) -> bool:
        """Whether all evaluations are made."""
        return len(self._history) >= self._evaluations

    @property
    def left(self) -> int:
        """Evaluations still allowed."""
        return self._evaluations - len(self._history)

    @property
    def history(self) -> tuple[Evaluation, ...]:
        """Every evaluation so far, in order."""
        return tuple(self._history)

    def outcome(self) -> SearchOutcome:
        """What the search found so far."""
        return SearchOutcome.of(self.history, self._problem)

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one candidate and record it.

        :param bitwidths: the candidate.
        :raises ArqError: when all evaluations are made, or the candidate exceeds the budget.
        """
        return self.evaluate_many([bitwidths])[0]

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        """Score several candidates and record them in this order.

        They are handed over together where the evaluator is a :class:`arqsearch.envs.evaluator.BatchEvaluator`, and
        one by one elsewhere; the history is the same.

        :param candidates: at most as many as are left.
        :raises ArqError: when fewer evaluations are left, or a candidate exceeds the budget.
        """
        if len(candidates) > self.left:
            raise ArqError(
                f"All {self._evaluations} evaluations of this search are made."
                if not self.left
                else f"{len(candidates)} candidates, but only {self.left} of {self._evaluations} evaluations are left."
            )
        for bitwidths in candidates:
            if not self._problem.budget.met(self.layers, bitwidths):
                raise ArqError(
                    f"Candidate {bitwidths.to_json()} exceeds the budget; a policy may only propose feasible ones."
                )
        evaluator = self._problem.evaluator
        if len(candidates) > 1 and isinstance(evaluator, BatchEvaluator):
            with preserved_random_state(), torch_threads(self._threads):
                found = evaluator.evaluate_many(candidates)
                for evaluation in found:
                    self._append(evaluation)
            return found
        return [self._evaluate_one(bitwidths) for bitwidths in candidates]

    def _evaluate_one(self, bitwidths: BitWidths) -> Evaluation:
        with preserved_random_state(), torch_threads(self._threads):
            evaluation = self._problem.evaluator.evaluate(bitwidths)
            self._append(evaluation)
        return evaluation

    def _append(self, evaluation: Evaluation) -> None:
        self._history.append(evaluation)
        if self._on_evaluation is not None:
            self._on_evaluation(len(self._history) - 1, evaluation)
