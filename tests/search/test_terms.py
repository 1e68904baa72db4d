"""Reward terms by hand, and the refusal of a term that does not vary."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest

from arqsearch.errors import ArqError
from arqsearch.recipe import Evaluate
from arqsearch.search import terms as T

COUNTS = {
    "votes": [9, 8, 4, 0],
    "robust": {"1": [1, 1, 0, 0], "4": [1, 0, 0, 0]},
    "margins": {"1": [2000, 500, -100, -400], "4": [1000, -1000, -2000, -2000]},
}


def settings(smoothed: dict[str, Any] | None = None, interval: dict[str, Any] | None = None, **more: Any) -> Evaluate:
    both = {"smoothed": {"samples": 9, **(smoothed or {})}, "interval": {"epsilons": [1, 4], **(interval or {})}}
    return Evaluate.model_validate(both | more)


def test_plug_in_radii_by_hand() -> None:
    # 9 samples: p = (k + ½) / 10 is .95, .85, .45 and .05; the last two are no majority.
    found = T.estimated_radii([9, 8, 4, 0], 9, 0.25)
    normal = NormalDist()
    assert found.tolist() == pytest.approx([0.25 * normal.inv_cdf(0.95), 0.25 * normal.inv_cdf(0.85), 0.0, 0.0])
    assert found[0] == pytest.approx(0.41121, abs=1e-5)


def test_a_radius_is_finite_monotone_and_zero_at_one_half() -> None:
    found = T.estimated_radii(range(33), 32, 0.5)
    assert all(math.isfinite(r) and r >= 0 for r in found)
    assert list(found) == sorted(found)
    assert found[16] == 0.0 and found[17] > 0.0, "p = 16.5 / 33 is one half exactly"


def test_terms_by_hand() -> None:
    radii = T.estimated_radii(COUNTS["votes"], 9, 0.25)
    assert T.terms(COUNTS, settings(), 0.25) == {"smoothed_radius": pytest.approx(radii.sum() / 4)}
    accuracy = settings({"measure": "accuracy", "radii": [0.0, 0.25, 0.4]})
    assert T.terms(COUNTS, accuracy, 0.25) == {"smoothed_accuracy": pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)}
    both = settings(interval={"weight": 0.5})
    assert T.terms(COUNTS, both, 0.25)["interval_accuracy"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    margin = settings({"weight": 0.0}, {"weight": 1.0, "measure": "margin"})
    # Thousandths of a logit: means of .5 and -1.
    assert T.terms(COUNTS, margin, 0.25) == {"interval_margin": pytest.approx((0.5 - 1.0) / 2)}


def test_reward_is_the_weighted_difference_from_the_reference() -> None:
    both = settings({"weight": 2.0}, {"weight": 0.5})
    candidate = {"smoothed_radius": 0.3, "interval_accuracy": 0.6}
    reference = {"smoothed_radius": 0.4, "interval_accuracy": 0.2}
    assert T.reward(candidate, reference, both) == pytest.approx(2.0 * -0.1 + 0.5 * 0.4)
    assert T.reward(reference, reference, both) == 0.0
    assert set(T.weights(both)) == set(T.terms(COUNTS, both, 0.25))


def test_without_any_weight_there_is_no_reward() -> None:
    with pytest.raises(ArqError, match=r"set evaluate\.smoothed\.weight or evaluate\.interval\.weight"):
        T.weights(settings({"weight": 0.0}))


def test_spread_is_the_standard_deviation_of_each_term() -> None:
    values = [{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 5.0}]
    assert T.spread(values) == {"a": 1.0, "b": 0.0}
    assert T.spread([]) == {}


@pytest.mark.parametrize(
    ("term", "section"),
    [("smoothed_radius", "smoothed"), ("smoothed_accuracy", "smoothed"), ("interval_accuracy", "interval"),
     ("interval_margin", "interval")],
)  # fmt: skip
def test_a_constant_term_is_refused_with_both_fixes(term: str, section: str) -> None:
    # Twenty equal numbers have a deviation of some 1e-17 in floating point.
    spreads = T.spread([{term: 0.1 + 0.2}] * 20)
    with pytest.raises(ArqError) as error:
        T.require_varying(spreads, settings())
    for part in (repr(term), f"evaluate.{section}.weight=0", "train.objective", "evaluate.allow_constant_term=true"):
        assert part in str(error.value)
    T.require_varying(spreads, settings(allow_constant_term=True))
    T.require_varying({term: 0.01}, settings())
