"""The figures of the comparison: against rliable's on the same scores, scipy's and cases that are known by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, trim_mean

from arqsearch.benchmarks import statistics
from arqsearch.errors import ArqError

MEASURES = {
    "iqm": statistics.interquartile_mean, "mean": statistics.mean, "median": statistics.median,
    "gap": statistics.optimality_gap,
}  # fmt: skip


@pytest.fixture(scope="module")
def rliable() -> dict[str, Any]:
    path = Path(__file__).with_name("rliable_values.json")
    return dict(json.loads(path.read_text()))


def scores_of(values: dict[str, Any], name: str) -> np.ndarray:
    return np.array(values["scores"][name], dtype=np.float64)


@pytest.mark.parametrize("measure", MEASURES)
def test_point_estimates_are_rliables(rliable: dict[str, Any], measure: str) -> None:
    for name, known in rliable["aggregates"].items():
        found = MEASURES[measure](scores_of(rliable, name))
        assert float(found) == pytest.approx(known[measure]["value"], rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("measure", MEASURES)
def test_intervals_are_rliables_up_to_the_bootstraps_own_noise(rliable: dict[str, Any], measure: str) -> None:
    for name, known in rliable["aggregates"].items():
        scores = scores_of(rliable, name)
        found = statistics.aggregate(scores, MEASURES[measure], repetitions=20000)
        width = known[measure]["high"] - known[measure]["low"]
        # Ends of two bootstraps of 20,000 differ by a few hundredths of the interval's width.
        assert found.low == pytest.approx(known[measure]["low"], abs=0.05 * width), name
        assert found.high == pytest.approx(known[measure]["high"], abs=0.05 * width), name


def test_probability_of_improvement_is_rliables(rliable: dict[str, Any]) -> None:
    for known in rliable["improvement"]:
        x, y = scores_of(rliable, known["x"]), scores_of(rliable, known["y"])
        found = statistics.probability_of_improvement(x, y)
        assert found.value == pytest.approx(known["value"], abs=1e-12)
        width = known["high"] - known["low"]
        assert found.low == pytest.approx(known["low"], abs=0.1 * width)
        assert found.high == pytest.approx(known["high"], abs=0.1 * width)


def test_performance_profiles_are_rliables(rliable: dict[str, Any]) -> None:
    thresholds = np.array(rliable["thresholds"])
    for name, known in rliable["profiles"].items():
        found = statistics.performance_profile(scores_of(rliable, name), thresholds, repetitions=10)
        np.testing.assert_allclose(found["share"], known, atol=1e-12)


def test_the_bootstrap_resamples_within_tasks() -> None:
    scores = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    drawn = statistics.resampled(scores, statistics.resamples(3, 2, 500))
    assert set(np.unique(drawn[:, :, 0])) == {0.0, 1.0, 2.0}
    assert set(np.unique(drawn[:, :, 1])) == {10.0, 11.0, 12.0}
    # Tasks are drawn independently of each other: the same seed need not go together.
    assert (drawn[:, :, 1] - drawn[:, :, 0] != 10).any()


def test_a_constant_policy_has_an_interval_of_no_width() -> None:
    estimate = statistics.aggregate(np.full((5, 2), 0.3))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.3, 0.3, 0.3))


def test_interquartile_mean_over_leading_axes() -> None:
    scores = np.random.default_rng(1).random((7, 9, 3))
    expected = [trim_mean(one, 0.25, axis=None) for one in scores]
    np.testing.assert_allclose(statistics.interquartile_mean(scores), expected)


def test_improvement_is_the_mann_whitney_statistic() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.integers(0, 5, (11, 1)).astype(float), generator.integers(0, 5, (8, 1)).astype(float)
    assert statistics.improvement(x, y) == pytest.approx(mannwhitneyu(x[:, 0], y[:, 0]).statistic / 88)
    assert statistics.improvement(x, y) + statistics.improvement(y, x) == pytest.approx(1.0)


def test_the_interval_of_improvement_covers_as_often_as_it_says() -> None:
    generator, hits = np.random.default_rng(3), 0
    for seed in range(100):
        found = statistics.probability_of_improvement(
            generator.normal(size=(30, 1)), generator.normal(size=(30, 1)), repetitions=300, seed=seed
        )
        hits += found.low <= 0.5 <= found.high
    assert 86 <= hits <= 100


def test_curves_and_bands_agree_with_the_aggregate_of_each_point() -> None:
    values = np.sort(np.random.default_rng(4).random((10, 2, 6)), axis=2)
    frame = statistics.curve(values, repetitions=400)
    for point in range(6):
        one = statistics.aggregate(values[:, :, point], repetitions=400)
        row = frame.iloc[point]
        assert (row["value"], row["low"], row["high"]) == pytest.approx((one.value, one.low, one.high))


def test_holms_method_by_hand() -> None:
    generator = np.random.default_rng(5)
    scores = {name: generator.normal(shift, 1, (25, 1)) for name, shift in (("a", 0), ("b", 0.6), ("c", 1.5))}
    frame = statistics.paired_tests(scores)
    assert list(zip(frame["a"], frame["b"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    order, running = np.argsort(frame["p"].to_numpy()), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (3 - rank) * frame["p"].iloc[position]))
        assert frame["p_holm"].iloc[position] == pytest.approx(running)
    assert (frame["significant"] == (frame["p_holm"] <= 0.05)).all()


def test_equal_runs_have_p_one_and_other_shapes_are_refused() -> None:
    same = np.random.default_rng(6).random((6, 2))
    frame = statistics.paired_tests({"a": same, "b": same.copy()})
    assert frame["p_holm"].tolist() == [1.0] and not frame["significant"].any()
    with pytest.raises(ArqError, match="same seeds and tasks"):
        statistics.paired_tests({"a": same, "b": same[:3]})


@pytest.mark.parametrize("tasks", [1, 4])
def test_the_mixed_model_finds_planted_effects(tasks: int) -> None:
    generator = np.random.default_rng(7)
    task, seed = generator.normal(0, 0.3, tasks), generator.normal(0, 0.2, (20, tasks))
    effects = {"random": 0.0, "better": 0.25, "worse": -0.25}
    scores = {name: effect + task + seed + generator.normal(0, 0.05, (20, tasks)) for name, effect in effects.items()}
    model = statistics.mixed_model(scores, "random")
    assert list(model.effects["policy"]) == ["better", "worse"]
    for row in model.effects.to_dict("records"):
        # In a balanced design the effect is the difference of the means.
        assert row["effect"] == pytest.approx(scores[row["policy"]].mean() - scores["random"].mean(), abs=1e-6)
        assert row["low"] < effects[row["policy"]] < row["high"]
        assert row["p"] < 1e-6
    assert 0.03 < model.deviations["residual"] < 0.07
    assert 0.1 < model.deviations["seed"] < 0.35


def test_the_mixed_model_says_when_there_is_nothing_to_fit() -> None:
    one = {"a": np.ones((1, 2)), "b": np.zeros((1, 2))}
    assert "two seeds" in statistics.mixed_model(one, "a").note
    flat = {"a": np.ones((3, 2)), "b": np.ones((3, 2))}
    assert "same score" in statistics.mixed_model(flat, "a").note


def test_leaders_are_in_order_of_the_interquartile_mean() -> None:
    scores = {"low": np.full((4, 1), 0.1), "high": np.full((4, 1), 0.9), "middle": np.full((4, 1), 0.5)}
    assert list(statistics.leaders(scores)) == ["high", "middle", "low"]
