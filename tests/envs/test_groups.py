"""Groups are one step and every budget holds for all their layers; the feasible set is compared with brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from arqsearch.envs import BitWidthContinuousEnv, BitWidthEnv, Feasibility
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import Budget, LayerInfo, known_costs, total_cost
from tests.envs.test_feasibility import through_bits, through_masks

CHOICES = (2, 3, 4)


def measured(layer: LayerInfo, number: int) -> LayerInfo:
    """A layer with a memory plan and made-up latencies, monotone in both bits."""
    latency = {LayerBits(w, a): (number + 1) * (10 * w + 7 * a) for w, a in product(range(2, 9), repeat=2)}
    return replace(layer, activation_bytes=100 * (number + 1), latency=latency)


#: The second and the fourth layer share their bits; so do no others.
LAYERS = tuple(
    replace(measured(layer, number), tie="pair" if number in (1, 3) else None)
    for number, layer in enumerate(EMBEDDED_LAYERS[:4])
)
NAMES = [layer.name for layer in LAYERS]
EVALUATOR = AnalyticEvaluator(LAYERS, [(0.5, 0.5)] * 4)


def within(budget: Budget) -> set[BitWidths]:
    """Every assignment that meets the budget and the tie, by brute force over the definition of each cost."""
    found = set()
    for bits in product(list(product(CHOICES, repeat=2)), repeat=4):
        if bits[1] != bits[3]:
            continue
        bops = sum(layer.macs * w * a for layer, (w, a) in zip(LAYERS, bits, strict=True))
        latency = sum((number + 1) * (10 * w + 7 * a) for number, (w, a) in enumerate(bits))
        costs = {"bops": bops, "latency": latency, "peak_activation_bytes": 400}
        if all(costs[name] <= limit for name, limit in budget.limits):
            found.add(BitWidths.from_mapping(zip(NAMES, bits, strict=True)))
    return found


BUDGETS = [
    Budget((("latency", 420),)),
    Budget((("bops", 700_000), ("latency", 480), ("peak_activation_bytes", 400))),
]


@pytest.mark.parametrize("budget", BUDGETS)
def test_masks_reach_exactly_the_assignments_that_are_allowed(budget: Budget) -> None:
    reached = list(through_masks(BitWidthEnv(EVALUATOR, budget, CHOICES)))
    assert len(reached) == len(set(reached))
    assert set(reached) == within(budget)
    assert 0 < len(reached) < 9**3


def test_continuous_steps_reach_them_too() -> None:
    reached = set(through_bits(BitWidthContinuousEnv(EVALUATOR, BUDGETS[0], CHOICES)))
    assert reached == within(BUDGETS[0])


def test_a_group_is_one_step_at_the_place_of_its_first_layer() -> None:
    env = BitWidthEnv(EVALUATOR, BUDGETS[0], CHOICES)
    assert [layer.name for layer in env.feasibility.searched] == [NAMES[0], NAMES[1], NAMES[2]]
    env.reset()
    for action in (4, 5, 0):
        *_, done, _, info = env.step(np.int64(action))
    assert done and info["bitwidths"][NAMES[1]] == info["bitwidths"][NAMES[3]]
    assert set(info["cost"]) == {"bops", "weight_bytes", "peak_activation_bytes", "latency"}


def test_a_tie_that_no_other_layer_has_changes_nothing() -> None:
    lone = (replace(LAYERS[0], tie=LAYERS[2].name), *LAYERS[1:])
    assert len(Feasibility(lone, Budget(()), CHOICES).searched) == 3


def test_a_layer_tied_to_a_fixed_one_is_refused() -> None:
    with pytest.raises(ArqError, match=f"Layer '{NAMES[3]}' shares its bits with '{NAMES[1]}', which is fixed at"):
        Feasibility(LAYERS, Budget(()), CHOICES, {NAMES[1]: (8, 8)})


def test_budgets_that_cannot_be_met_name_the_minimum() -> None:
    with pytest.raises(ArqError, match=r"latency <= 0.1 us cannot be met: the smallest assignment needs 0.3 us"):
        Feasibility(LAYERS, Budget((("latency", 100),)), CHOICES)
    with pytest.raises(ArqError, match="the network needs 400 whatever its bits are"):
        Feasibility(LAYERS, Budget((("peak_activation_bytes", 399),)), CHOICES)


def test_costs_that_layers_do_not_carry_are_refused_by_name() -> None:
    assert known_costs(EMBEDDED_LAYERS) == ("bops", "weight_bytes")
    eight = BitWidths.uniform([layer.name for layer in EMBEDDED_LAYERS], 8, 8)
    with pytest.raises(ArqError, match="arqsearch profile"):
        total_cost("latency", EMBEDDED_LAYERS, eight)


@pytest.mark.parametrize(
    ("text", "nanoseconds"), [("850us", 850_000), ("1.2ms", 1_200_000), (85, 85_000), ("12.5", 12_500), ("90ns", 90)]
)
def test_latencies_are_read_with_their_unit(text: str | int, nanoseconds: int) -> None:
    assert Budget.parse({"latency": text}, LAYERS).limits == (("latency", nanoseconds),)


def test_a_share_of_fp32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ArqError, match="not in per cent"):
        Budget.parse({"peak_activation_bytes": "10%"}, LAYERS)
    with pytest.raises(ArqError, match="write '850us'"):
        Budget.parse({"latency": "10%"}, LAYERS)
