"""Make rliable_values.json: what rliable says about made-up scores. Run once, in an environment of its own:

python -m venv /tmp/rliable && /tmp/rliable/bin/pip install rliable 'pandas<3'
/tmp/rliable/bin/python tests/benchmarks/rliable_values.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

REPETITIONS = 20000


def made_up() -> dict[str, np.ndarray]:
    """Scores (seeds, tasks) with ties, skew and different numbers of seeds."""
    generator = np.random.default_rng(20260101)
    return {
        "steady": generator.normal(0.8, 0.05, (12, 3)).round(3),
        "skewed": (1 - generator.exponential(0.2, (12, 3))).round(2),
        "coarse": generator.integers(0, 6, (12, 3)) / 5,
        "few": generator.normal(0.7, 0.2, (5, 3)).round(3),
        "single task": generator.normal(0.75, 0.1, (9, 1)).round(3),
    }


def main() -> None:
    """Write the file beside this one."""
    from rliable import library, metrics

    scores = made_up()
    aggregates = {
        "iqm": metrics.aggregate_iqm, "mean": metrics.aggregate_mean, "median": metrics.aggregate_median,
        "gap": metrics.aggregate_optimality_gap,
    }  # fmt: skip

    def every(values: np.ndarray) -> np.ndarray:
        return np.array([function(values) for function in aggregates.values()])

    points, intervals = library.get_interval_estimates(scores, every, reps=REPETITIONS)
    values = {
        name: {
            key: {"value": float(points[name][i]), "low": float(intervals[name][0, i]),
                  "high": float(intervals[name][1, i])}
            for i, key in enumerate(aggregates)
        }
        for name in scores
    }  # fmt: skip
    pairs = [("steady", "skewed"), ("coarse", "steady"), ("few", "coarse"), ("skewed", "few")]
    improvement = []
    for x, y in pairs:
        point, interval = library.get_interval_estimates(
            {"pair": (scores[x], scores[y])}, metrics.probability_of_improvement, reps=2000
        )
        low, high = interval["pair"].ravel()
        improvement.append({"x": x, "y": y, "value": float(point["pair"]), "low": float(low), "high": float(high)})
    thresholds = np.linspace(0, 1, 11)
    profiles, _ = library.create_performance_profile(scores, thresholds, reps=10)
    data = {
        "made with": {"rliable": version("rliable"), "numpy": version("numpy"), "repetitions": REPETITIONS},
        "scores": {name: values_.tolist() for name, values_ in scores.items()},
        "aggregates": values,
        "improvement": improvement,
        "thresholds": thresholds.tolist(),
        "profiles": {name: profile.tolist() for name, profile in profiles.items()},
    }
    Path(__file__).with_name("rliable_values.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
