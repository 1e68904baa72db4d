"""Feasible sets are exact: nothing over budget is offered, nothing within budget is lost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arqsearch.envs import Allocation, BitWidthContinuousEnv, BitWidthEnv, Feasibility
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator, embedded_budget
from arqsearch.envs.feasibility import nearest_bits, nearest_pair
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import Budget, total_cost

LAYERS = EMBEDDED_LAYERS[1:4]
CHOICES = (2, 3, 4)
NAMES = [layer.name for layer in LAYERS]


def budget_at(share: int, *names: str) -> Budget:
    """Limits `share` per cent of the way from the smallest to the largest assignment."""
    low, high = (BitWidths.uniform(NAMES, b, b) for b in (2, 4))
    costs = [(name, total_cost(name, LAYERS, low), total_cost(name, LAYERS, high)) for name in names]
    return Budget(tuple((name, lo + (hi - lo) * share // 100) for name, lo, hi in costs))


def within(budget: Budget, fixed: dict[str, tuple[int, int]] | None = None) -> set[BitWidths]:
    """Every assignment that meets the budget, by brute force."""
    options = [[fixed[n]] if fixed and n in fixed else list(product(CHOICES, repeat=2)) for n in NAMES]
    candidates = (BitWidths.from_mapping(zip(NAMES, bits, strict=True)) for bits in product(*options))
    return {bits for bits in candidates if budget.met(LAYERS, bits)}


def through_masks(env: BitWidthEnv, prefix: tuple[int, ...] = ()) -> Iterator[BitWidths]:
    """Every assignment that a sequence of unmasked actions ends in."""
    env.reset()
    for action in prefix:
        _, _, done, _, info = env.step(np.int64(action))
        assert not info["projected"]
        if done:
            yield info["bitwidths"]
            return
    for action in np.flatnonzero(env.action_masks()):
        yield from through_masks(env, (*prefix, int(action)))


def through_bits(env: BitWidthContinuousEnv, prefix: tuple[int, ...] = ()) -> Iterator[BitWidths]:
    """Every assignment that a sequence of feasible continuous actions ends in."""
    env.reset()
    for bits in prefix:
        action = np.array([2 * (CHOICES.index(bits) + 0.5) / len(CHOICES) - 1], dtype=np.float32)
        _, _, done, _, info = env.step(action)
        assert not info["projected"] and info["requested"] == info["bits"] == bits
        if done:
            yield info["bitwidths"]
            return
    for bits in env.feasible_bits():
        yield from through_bits(env, (*prefix, bits))


@pytest.mark.parametrize("names", [("bops",), ("weight_bytes",), ("bops", "weight_bytes")])
@pytest.mark.parametrize("share", [0, 30, 70])
def test_masks_reach_exactly_the_assignments_within_budget(names: tuple[str, ...], share: int) -> None:
    budget = budget_at(share, *names)
    evaluator = AnalyticEvaluator(LAYERS, [(0.5, 0.5)] * 3)
    reached = list(through_masks(BitWidthEnv(evaluator, budget, CHOICES)))
    assert len(reached) == len(set(reached))
    assert set(reached) == within(budget)
    assert 0 < len(reached) < 9**3


def test_masks_respect_fixed_layers() -> None:
    fixed = {NAMES[1]: (8, 8)}
    budget = budget_at(60, "bops", "weight_bytes")
    env = BitWidthEnv(AnalyticEvaluator(LAYERS, [(0.5, 0.5)] * 3), budget, CHOICES, fixed)
    reached = set(through_masks(env))
    assert reached == within(budget, fixed)
    assert 0 < len(reached) < 81


@pytest.mark.parametrize("names", [("bops",), ("bops", "weight_bytes")])
def test_continuous_bits_reach_exactly_the_assignments_within_budget(names: tuple[str, ...]) -> None:
    budget = budget_at(25, *names)
    env = BitWidthContinuousEnv(AnalyticEvaluator(LAYERS, [(0.5, 0.5)] * 3), budget, CHOICES)
    assert set(through_bits(env)) == within(budget)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_assignment_stays_within_budget(data: st.DataObject) -> None:
    share = data.draw(st.integers(0, 100))
    budget = budget_at(share, "bops", "weight_bytes")
    allocation = Allocation(Feasibility(LAYERS, budget, CHOICES))
    for index in data.draw(st.lists(st.sampled_from(range(3)), min_size=1, max_size=9)):
        feasible = [p for p, ok in zip(allocation.feasibility.pairs, allocation.feasible(index), strict=True) if ok]
        assert feasible[0] == (2, 2)
        allocation.assign(index, data.draw(st.sampled_from(feasible)))
        bitwidths = allocation.bitwidths()
        assert budget.met(LAYERS, bitwidths)
        spent = [limit - total_cost(name, LAYERS, bitwidths) for name, limit in budget.limits]
        assert allocation.slack == spent
        assert all(0 <= fraction <= 1 for fraction in allocation.slack_fractions())


def test_bits_that_do_not_fit_are_refused() -> None:
    allocation = Allocation(Feasibility(LAYERS, budget_at(0, "bops"), CHOICES))
    with pytest.raises(ArqError, match=r"\(3, 2\) for layer 'conv2'.*within budget"):
        allocation.assign(0, LayerBits(3, 2))


def test_a_budget_below_the_minimum_is_refused() -> None:
    with pytest.raises(ArqError, match="cannot be met"):
        Feasibility(LAYERS, Budget((("bops", 1),)), CHOICES)


def test_an_unknown_fixed_layer_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArqError, match=r"'conv22'.*Did you mean 'conv2'"):
        Feasibility(LAYERS, Budget(()), CHOICES, {"conv22": (8, 8)})


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(ArqError, match="free at least one"):
        Feasibility(LAYERS, Budget(()), CHOICES, dict.fromkeys(NAMES, (8, 8)))


@pytest.mark.parametrize("choices", [(), (1, 2), (4, 9)])
def test_choices_outside_the_range_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(ArqError, match="choices"):
        Feasibility(LAYERS, Budget(()), choices)


def test_projection_ties() -> None:
    assert nearest_bits(5, [2, 4, 6]) == 4
    pairs = [LayerBits(4, 3), LayerBits(3, 4), LayerBits(2, 2)]
    assert nearest_pair(LayerBits(4, 4), pairs) == (3, 4)
    assert nearest_pair(LayerBits(4, 4), [LayerBits(4, 5), LayerBits(4, 3)]) == (4, 3)


def test_the_embedded_budget_binds() -> None:
    names = [layer.name for layer in EMBEDDED_LAYERS]
    assert embedded_budget().met(EMBEDDED_LAYERS, BitWidths.uniform(names, 4, 4))
    assert not embedded_budget().met(EMBEDDED_LAYERS, BitWidths.uniform(names, 5, 4))
