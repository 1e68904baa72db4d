"""Every policy keeps groups, frozen layers and all budgets, without knowing of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arqsearch import policies
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget, total_cost
from tests.envs.test_groups import measured

#: Two groups, one of neighbours; the last layer is frozen.
TIES = {"conv1": "a", "conv3.pointwise": "a", "conv3.depthwise": "b", "conv4": "b"}
LAYERS = tuple(
    replace(measured(layer, number), tie=TIES.get(layer.name)) for number, layer in enumerate(EMBEDDED_LAYERS)
)
FIXED = {"fc": (8, 8)}


def problem() -> SearchProblem:
    four = BitWidths.uniform([layer.name for layer in LAYERS], 4, 4, FIXED)
    names = ("bops", "weight_bytes", "latency", "peak_activation_bytes")
    budget = Budget(tuple((name, total_cost(name, LAYERS, four) * 102 // 100) for name in names))
    return SearchProblem(AnalyticEvaluator(LAYERS), budget, (2, 3, 4, 5, 6, 8), FIXED)


@pytest.mark.parametrize("name", policies.available())
def test_policy_keeps_groups_and_budgets(name: str) -> None:
    searched = problem()
    history = policies.create(name).search(searched, 16, seed=3).history
    assert 0 < len(history) <= 16
    for evaluation in history:
        bits = evaluation.bitwidths
        assert bits.names == tuple(layer.name for layer in LAYERS)
        assert bits["conv1"] == bits["conv3.pointwise"] and bits["conv3.depthwise"] == bits["conv4"]
        assert bits["fc"] == (8, 8)
        assert searched.budget.met(LAYERS, bits)
    assert len({evaluation.bitwidths for evaluation in history}) > 2
