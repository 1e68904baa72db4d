"""Every registered policy keeps the promises, and each does its own idea."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from arqsearch import policies
from arqsearch.envs.analytic import AnalyticEvaluator, embedded_budget
from arqsearch.envs.feasibility import Feasibility
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost
from tests.policies.conformance import PolicyConformance

SMALL_OFF_POLICY: dict[str, Any] = {"hidden": (16,), "batch_size": 8, "imagined": 2, "generation": 2}


class TestDDPG(PolicyConformance):
    policy_name = "ddpg"
    settings = SMALL_OFF_POLICY


class TestTD3(PolicyConformance):
    policy_name = "td3"
    settings = SMALL_OFF_POLICY


class TestSAC(PolicyConformance):
    policy_name = "sac"
    settings = SMALL_OFF_POLICY


class TestDDPGWithoutModel(PolicyConformance):
    policy_name = "ddpg"
    settings = SMALL_OFF_POLICY | {"imagined": 0, "warmup_episodes": 2}


class TestDQN(PolicyConformance):
    policy_name = "dqn"
    settings = SMALL_OFF_POLICY


class TestPPO(PolicyConformance):
    policy_name = "ppo"
    settings = {"hidden": (16,), "epochs": 2}  # noqa: RUF012


class TestMaskedPPO(PolicyConformance):
    policy_name = "masked_ppo"
    settings = {"hidden": (16,), "epochs": 2}  # noqa: RUF012


class TestRandom(PolicyConformance):
    policy_name = "random"


class TestGreedy(PolicyConformance):
    policy_name = "greedy"


class TestILP(PolicyConformance):
    policy_name = "ilp"
    evaluations = 20


class TestNSGA2(PolicyConformance):
    policy_name = "nsga2"
    settings = {"population": 4}  # noqa: RUF012


class TestTPE(PolicyConformance):
    policy_name = "tpe"
    settings = {"startup": 4, "batch": 3}  # noqa: RUF012


class TestAdaQAT(PolicyConformance):
    policy_name = "adaqat"


class TestARQStyle(PolicyConformance):
    policy_name = "arq_style"
    settings = {"hidden": (16,), "batch_size": 8}  # noqa: RUF012


class TestUniform(PolicyConformance):
    policy_name = "uniform"


def test_every_registered_policy_is_tested() -> None:
    tested = {cls.policy_name for cls in PolicyConformance.__subclasses__()}
    assert tested == set(policies.available())


@pytest.mark.parametrize(
    "name",
    ["ddpg", "td3", "sac", "dqn", "ppo", "masked_ppo", "random", "nsga2", "tpe", "adaqat", "arq_style"],
)
def test_seeds_differ(name: str) -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    # Without a model the agents act after the first evaluation; with one they measure first.
    settings = {"imagined": 0} if "imagined" in policies.hyperparameters(name) else {}
    first, second = (policies.create(name, **settings).search(problem, 5, seed).history for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("name", [name for name in policies.available() if name != "uniform"])
def test_one_searched_layer_is_enough(name: str) -> None:
    layers = (LayerInfo("a", "linear", 4, 4), LayerInfo("b", "linear", 4, 4))
    problem = SearchProblem(AnalyticEvaluator(layers, [(0.5, 0.5)] * 2), Budget(()), (2, 4), {"a": (8, 8)})
    assert len(policies.create(name).search(problem, 12, 0).history) == 12


@pytest.mark.parametrize("name", ["td3", "dqn"])
def test_agents_learn_without_a_model_too(name: str) -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    rewards = [e.reward for e in policies.create(name, imagined=0).search(problem, 80, 0).history]
    assert np.mean(rewards[-15:]) > np.mean(rewards[:15]) + 0.03


def test_random_samples_the_feasible_set_uniformly() -> None:
    layers = (LayerInfo("a", "linear", 16, 4), LayerInfo("b", "linear", 8, 4))
    budget = Budget((("bops", 32 * 4 * 9),))
    problem = SearchProblem(AnalyticEvaluator(layers, [(0.5, 0.5)] * 2), budget, (2, 4))
    pairs = Feasibility(layers, budget, (2, 4)).pairs
    everything = [BitWidths.from_mapping([("a", p), ("b", q)]) for p in pairs for q in pairs]
    feasible = {bits for bits in everything if budget.met(layers, bits)}
    history = policies.create("random", sweeps=8).search(problem, 4000, 0).history
    counts = {bits: sum(e.bitwidths == bits for e in history) for bits in feasible}
    expected = len(history) / len(feasible)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert sum(counts.values()) == len(history)
    assert 1 < len(feasible) < len(everything)
    # Mean and standard deviation of chi-square are k and sqrt(2k).
    degrees = len(feasible) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_uniform_enumerates_from_the_fullest_down_and_ends() -> None:
    evaluator, budget = AnalyticEvaluator(), embedded_budget()
    history = policies.create("uniform").search(SearchProblem(evaluator, budget), 100, 0).history
    names = [layer.name for layer in evaluator.layers]
    everything = [BitWidths.uniform(names, w, a) for w in range(2, 9) for a in range(2, 9)]
    assert {e.bitwidths for e in history} == {bits for bits in everything if budget.met(evaluator.layers, bits)}

    def fullness(bits: BitWidths) -> float:
        return max(total_cost(name, evaluator.layers, bits) / limit for name, limit in budget.limits)

    shares = [fullness(e.bitwidths) for e in history]
    assert shares == sorted(shares, reverse=True)
    assert all(a != b for a, b in pairwise(e.bitwidths for e in history))
