"""A floor turns the search around: the cheapest candidate whose estimate keeps it wins, found here by brute force."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from arqsearch import policies
from arqsearch.certify.binomial import accepts
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget, total_cost
from arqsearch.search.require import Requirement, RequirementEvaluator, objective_term
from arqsearch.search.require_estimates import Estimator, Measure, lower_bound
from arqsearch.search.require_options import with_options
from tests.search.tiny import tiny_recipe

LAYERS = EMBEDDED_LAYERS[1:3]
NAMES = [layer.name for layer in LAYERS]
CHOICES = (2, 3, 4)
ALL = [BitWidths.from_mapping(zip(NAMES, b, strict=True)) for b in product(product(CHOICES, repeat=2), repeat=2)]
QUALITY = AnalyticEvaluator(LAYERS, [(0.9, 0.2), (0.3, 0.8)])
IMAGES, SAMPLES = 120, 60
ESTIMATOR = Estimator((Measure("certified", 0.25), Measure("acr")), 0.25, SAMPLES, 1000, 0.001)


def counts(bitwidths: BitWidths) -> dict[str, Any]:
    """Votes of a made-up task: every image has its own hardness, and quality decides how many images are easy."""
    quality = QUALITY.evaluate(bitwidths).terms["quality"]
    hardness = np.linspace(0.0, 1.0, IMAGES)
    return {"votes": np.round(SAMPLES * np.clip(1.3 * quality - 0.5 * hardness, 0, 1)).astype(int).tolist()}


def evaluator(text: str | None) -> RequirementEvaluator:
    largest = BitWidths.uniform(NAMES, 4, 4)
    requirement = Requirement.parse(text) if text else None
    return RequirementEvaluator(QUALITY, counts, ESTIMATOR, LAYERS, requirement, "bops", largest)


@cache
def least_votes() -> int:
    """Votes of 1000 that certify r = 0.25: no fewer than the mean at that radius can."""
    return next(k for k in range(841, 1001) if accepts(k, 1000, 0.25, 0.25, 0.001, 0.0))  # type: ignore[arg-type]


def certified(bitwidths: BitWidths) -> float:
    """Lower bound of certified accuracy, from the definition: the p at which so many successes are 5 % likely."""
    held = sum((k + 0.5) / (SAMPLES + 1) >= least_votes() / 1000 for k in counts(bitwidths)["votes"])
    if held == 0:
        return 0.0
    if held == IMAGES:
        return float(0.05 ** (1 / IMAGES))
    return float(brentq(lambda p: binom.sf(held - 1, IMAGES, p) - 0.05, 1e-9, 1 - 1e-9))


@pytest.mark.parametrize("floor", [0.2, 0.45, 0.7])
def test_the_best_reward_is_the_cheapest_assignment_above_the_floor(floor: float) -> None:
    searched = evaluator(f"certified@0.25 >= {floor}")
    best = max(ALL, key=lambda b: searched.evaluate(b).reward)
    bounds = {bitwidths: certified(bitwidths) for bitwidths in ALL}
    allowed = [b for b in ALL if bounds[b] >= floor]
    assert 0 < len(allowed) < len(ALL)
    cheapest = min(total_cost("bops", LAYERS, b) for b in allowed)
    assert best in allowed and total_cost("bops", LAYERS, best) == cheapest
    for bitwidths in ALL:
        reward = searched.evaluate(bitwidths).reward
        assert (reward >= -1) == (bitwidths in allowed)
        if bitwidths not in allowed:
            assert reward == pytest.approx(-1 - (floor - bounds[bitwidths]), abs=1e-6)


def test_a_policy_finds_it() -> None:
    searched = evaluator("certified@0.25 >= 0.45")
    problem = SearchProblem(searched, Budget(()), CHOICES, {}, ("reward",))
    outcome = policies.create("greedy").search(problem, len(ALL), seed=0)
    assert outcome.best.reward == max(searched.evaluate(b).reward for b in ALL)


def test_a_floor_that_nothing_meets_leads_to_the_nearest_candidate() -> None:
    searched = evaluator("certified@0.25 >= 100% and acr >= 9")
    best = max(ALL, key=lambda b: searched.evaluate(b).reward)
    assert searched.evaluate(best).reward < -1
    assert best == BitWidths.uniform(NAMES, 4, 4)


def test_without_a_floor_the_reward_is_left_and_the_estimates_are_called_so() -> None:
    found, plain = evaluator(None).evaluate(ALL[5]), QUALITY.evaluate(ALL[5])
    assert found.reward == plain.reward
    assert set(found.terms) == {"quality", "estimated certified@0.25", "estimated acr"}


def test_generations_are_scored_together_and_as_one_by_one() -> None:
    class Batch(AnalyticEvaluator):
        calls = 0

        def evaluate_many(self, candidates: list[BitWidths]) -> list[Evaluation]:
            self.calls += 1
            return [self.evaluate(bitwidths) for bitwidths in candidates]

    inner = Batch(LAYERS, [(0.9, 0.2), (0.3, 0.8)])
    searched = evaluator("acr >= 0.1")
    searched.inner = inner
    assert searched.evaluate_many(ALL[:6]) == [evaluator("acr >= 0.1").evaluate(b) for b in ALL[:6]]
    assert inner.calls == 1


# ---- estimates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "images"), [(0, 20), (1, 20), (13, 20), (20, 20), (150, 200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_lower_bound_is_that_of_clopper_and_pearson(count: int, images: int, confidence: float) -> None:
    bound = lower_bound(count, images, confidence)
    if count == 0:
        assert bound == 0.0
    else:
        assert binom.sf(count - 1, images, bound) == pytest.approx(1 - confidence, rel=1e-6)


def test_votes_asked_are_the_certificates_own() -> None:
    asked = ESTIMATOR.votes_asked(Measure("certified", 0.25))
    assert accepts(asked, 1000, 0.25, 0.25, 0.001, 0.0)  # type: ignore[arg-type]
    assert not accepts(asked - 1, 1000, 0.25, 0.25, 0.001, 0.0)  # type: ignore[arg-type]


def test_no_estimated_radius_is_above_what_the_certificate_could_give() -> None:
    everything = ESTIMATOR.estimate(Measure("acr"), {"votes": [SAMPLES] * 9})
    assert everything.value <= 0.25 * norm.ppf(0.001 ** (1 / 1000)) + 1e-12


def test_interval_verdicts_are_shares() -> None:
    found = ESTIMATOR.estimate(Measure("ibp", 2), {"robust": {"2": [1, 1, 0, 1]}})
    assert found.value == 0.75 and found.bound < 0.75 and found.low < found.bound < found.high < 1


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("certified@0.5 > 40%", "'certified@0.5 > 40%' is not understood; write it as"),
        ("certified >= 40%", "There is no measure 'certified'"),
        ("acr >= 40%", "a radius in .0,1. pixels, not a share"),
        ("certified@0.5 >= 40", "40 is no share; write 40% or 0.4"),
        ("ibp@0.5 >= 40%", "whole number of grey levels"),
        ("acr >= 0.1 and acr >= 0.2", "states acr twice"),
    ],
)
def test_requirements_that_say_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(ArqError, match=says):
        Requirement.parse(text)


def test_several_floors_are_read() -> None:
    floors = Requirement.parse("certified@0.50 >= 40% and ibp@1 ≥ 0.3 and acr >= 0.4").floors
    assert [floor.text for floor in floors] == ["certified@0.5 >= 40%", "ibp@1 >= 30%", "acr >= 0.4"]


@pytest.mark.parametrize(
    ("measure", "changes", "says"),
    [
        ("certified@2", {}, "No image can be certified at r = 2 with 200 samples"),
        ("certified@0.3", {}, "8 noise samples cannot tell .*evaluate.smoothed.samples to at least"),
        ("ibp@3", {}, "evaluate.interval.epsilons to include 3"),
        ("acr", {"evaluate": {"smoothed": {"weight": 0}, "interval": {"weight": 1}}}, "evaluate.smoothed.weight"),
    ],
)
def test_measures_that_the_search_cannot_see_are_refused(
    tmp_path: Path, measure: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ArqError, match=says):
        Estimator.of(tiny_recipe(tmp_path, **changes), [Measure.parse(measure)])


def test_the_stated_least_number_of_samples_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ArqError) as caught:
        Estimator.of(tiny_recipe(tmp_path), [Measure("certified", 0.3)])
    least = int(str(caught.value).rstrip(".").split()[-1])
    for samples, fine in ((least, True), (least - 1, False)):
        recipe = tiny_recipe(tmp_path, evaluate={"smoothed": {"images": 40, "samples": samples}})
        if fine:
            Estimator.of(recipe, [Measure("certified", 0.3)])
        else:
            with pytest.raises(ArqError, match="cannot tell"):
                Estimator.of(recipe, [Measure("certified", 0.3)])


def test_objectives_get_the_names_of_the_terms() -> None:
    usual = Measure("certified", 0.25)
    costs, terms = ("bops",), ["smoothed_radius"]
    named = [objective_term(n, costs, terms, usual) for n in ("bops", "certified", "certified@0.50", "acr", "reward")]
    assert named == ["bops", "estimated certified@0.25", "estimated certified@0.5", "estimated acr", "reward"]
    with pytest.raises(ArqError, match=r"no objective 'bop'\. Did you mean 'bops'"):
        objective_term("bop", costs, terms, usual)


def test_a_floor_takes_the_place_of_the_default_budget_only(tmp_path: Path) -> None:
    floor = {"require": "acr >= 0.1"}
    assert tiny_recipe(tmp_path, search=floor).search.budget.bops is None
    assert tiny_recipe(tmp_path, search={**floor, "budget": {"bops": "2%"}}).search.budget.bops == "2%"
    assert tiny_recipe(tmp_path, search={}).search.budget.bops == "1.62%"


def test_options_are_overrides_of_the_search() -> None:
    found = with_options(["seed=1"], "2,4,8", ["fc*=8,8"], ["a,b.*", "c,d"], "acr >= 0.1", "bops,certified")
    assert found == [
        "seed=1", "search.bits=[2, 4, 8]", 'search.freeze={"fc*": [8, 8]}', 'search.group=[["a", "b.*"], ["c", "d"]]',
        'search.require="acr >= 0.1"', 'search.objectives=["bops", "certified"]',
    ]  # fmt: skip
    assert with_options(None, None, None, None, None, None) == []
    with pytest.raises(ArqError, match="write --freeze layer=8,8"):
        with_options(None, None, ["fc"], None, None, None)
    with pytest.raises(ArqError, match="write --bits 2,4,8"):
        with_options(None, "two", None, None, None, None)
