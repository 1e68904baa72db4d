"""What every policy promises, as one test class: subclass it and set `policy_name` to prove an implementation."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arqsearch import policies
from arqsearch.envs.analytic import AnalyticEvaluator, embedded_budget
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies import SearchOutcome, SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget


class MeddlingEvaluator(AnalyticEvaluator):
    """Scores as the analytic evaluator, and draws from (and seeds) every global generator on the way."""

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        random.random()
        np.random.seed(3)
        torch.manual_seed(5)
        return super().evaluate(bitwidths)


class PolicyConformance:
    """Promises of `arqsearch.policies.Policy`, tested on the embedded task.

    Settings make learning begin early on small networks, so that a few episodes go through all of a policy.
    """

    policy_name: str
    #: Hyper-parameters that make a policy fast.
    settings: dict[str, Any] = {}  # noqa: RUF012
    evaluations = 12

    @classmethod
    def search(cls, seed: int = 0, problem: SearchProblem | None = None, **kwargs: Any) -> SearchOutcome:
        problem = problem or SearchProblem(AnalyticEvaluator(), embedded_budget())
        policy = policies.create(cls.policy_name, **cls.settings)
        return policy.search(problem, kwargs.pop("evaluations", cls.evaluations), seed, **kwargs)

    @pytest.fixture(scope="class")
    @classmethod
    def outcome(cls) -> SearchOutcome:
        return cls.search()

    def test_has_its_registered_name(self) -> None:
        assert policies.create(self.policy_name).name == self.policy_name

    def test_makes_exactly_the_evaluations_asked_for(self, outcome: SearchOutcome) -> None:
        assert len(outcome.history) == self.evaluations

    @pytest.mark.parametrize("evaluations", [1, 2, 7])
    def test_makes_few_evaluations_too(self, evaluations: int) -> None:
        assert len(self.search(evaluations=evaluations).history) == evaluations

    def test_the_best_is_the_first_maximum(self, outcome: SearchOutcome) -> None:
        rewards = [evaluation.reward for evaluation in outcome.history]
        assert outcome.best is outcome.history[rewards.index(max(rewards))]

    def test_every_candidate_meets_every_budget(self, outcome: SearchOutcome) -> None:
        layers = AnalyticEvaluator().layers
        assert all(embedded_budget().met(layers, evaluation.bitwidths) for evaluation in outcome.history)

    def test_choices_and_fixed_layers_are_kept(self) -> None:
        evaluator = AnalyticEvaluator()
        problem = SearchProblem(evaluator, Budget(()), (3, 6), {"fc": (8, 8)})
        for evaluation in self.search(problem=problem, evaluations=4).history:
            assert evaluation.bitwidths.names == tuple(layer.name for layer in evaluator.layers)
            assert evaluation.bitwidths["fc"] == (8, 8)
            assert {b for name, bits in evaluation.bitwidths if name != "fc" for b in bits} <= {3, 6}

    def test_the_same_seed_gives_the_same_history(self, outcome: SearchOutcome) -> None:
        torch.manual_seed(99)
        assert self.search() == outcome

    def test_the_evaluator_cannot_disturb_the_choices(self, outcome: SearchOutcome) -> None:
        assert self.search(problem=SearchProblem(MeddlingEvaluator(), embedded_budget())) == outcome

    def test_the_callers_random_state_and_threads_are_untouched(self) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
        self.search(evaluations=3)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    def test_leaves_no_files_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        self.search(evaluations=3)
        assert not list(tmp_path.iterdir())

    def test_each_evaluation_is_reported_once_in_order(self) -> None:
        seen: list[tuple[int, Evaluation]] = []
        outcome = self.search(evaluations=5, on_evaluation=lambda index, e: seen.append((index, e)))
        assert seen == list(enumerate(outcome.history))

    def test_an_interrupted_search_is_a_prefix_of_the_replay(self, outcome: SearchOutcome) -> None:
        seen: list[Evaluation] = []

        def interrupt(index: int, evaluation: Evaluation) -> None:
            seen.append(evaluation)
            if index == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.search(on_evaluation=interrupt)
        assert tuple(seen) == outcome.history[:9]

    def test_a_budget_that_cannot_be_met_is_refused(self) -> None:
        with pytest.raises(ArqError, match="cannot be met"):
            self.search(problem=SearchProblem(AnalyticEvaluator(), Budget((("bops", 10),))))

    def test_no_evaluations_are_refused(self) -> None:
        with pytest.raises(ArqError, match="at least 1"):
            self.search(evaluations=0)

    def test_an_unknown_hyper_parameter_is_refused(self) -> None:
        with pytest.raises(ArqError, match="no hyper-parameter 'lerning_rate'"):
            policies.create(self.policy_name, lerning_rate=1.0)
