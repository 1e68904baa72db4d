"""From the runs of a comparison to the frames of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from arqsearch.benchmarks import statistics
from arqsearch.benchmarks.policies_targets import Target
from arqsearch.benchmarks.statistics import Scores
from arqsearch.policies.front import hypervolume

#: Points of the curves, at most.
POINTS = 48


@dataclass(frozen=True)
class Runs:
    """The finished runs of a comparison, by policy.

    :param target: what was searched.
    :param runs: as :func:`arqsearch.benchmarks.policies.run_one` gives them, with task, policy and seed.
    :param policies: names, in the order of the tables.
    :param seeds: of each policy on each task.
    :param evaluations: of each run, at most.
    """

    target: Target
    runs: Sequence[Mapping[str, Any]]
    policies: tuple[str, ...]
    seeds: int
    evaluations: int

    def of(self, policy: str) -> list[list[Mapping[str, Any]]]:
        """Runs of a policy: seeds, then tasks."""
        return [[self._by_name[task, policy, seed] for task in self.target.tasks] for seed in range(self.seeds)]

    @cached_property
    def _by_name(self) -> dict[tuple[str, str, int], Mapping[str, Any]]:
        return {(run["task"], run["policy"], run["seed"]): run for run in self.runs}

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Final scores of each policy, (seeds, tasks)."""
        return {
            policy: np.array([[self.target.score(r["task"], r["best_reward"]) for r in row] for row in self.of(policy)])
            for policy in self.policies
        }

    @cached_property
    def best_so_far(self) -> dict[str, NDArray[np.float64]]:
        """Best score after each evaluation, (seeds, tasks, evaluations); a policy that ends early stays where it is."""
        found = {}
        for policy in self.policies:
            rows = []
            for row in self.of(policy):
                series = []
                for run in row:
                    rewards = np.maximum.accumulate(np.array(run["rewards"], dtype=np.float64))
                    rewards = np.pad(rewards, (0, self.evaluations - len(rewards)), mode="edge")
                    series.append([self.target.score(run["task"], float(reward)) for reward in rewards])
                rows.append(series)
            found[policy] = np.array(rows)
        return found

    def seconds_of(self, policy: str) -> NDArray[np.float64]:
        """Seconds of whole runs, (seeds, tasks)."""
        return np.array([[run["seconds"][-1] for run in row] for row in self.of(policy)])

    def at_seconds(self, policy: str, grid: NDArray[np.float64]) -> NDArray[np.float64]:
        """Best score within each number of seconds, (seeds, tasks, grid); NaN before the first evaluation is made."""
        best, found = self.best_so_far[policy], np.full((self.seeds, len(self.target.tasks), len(grid)), np.nan)
        for s, row in enumerate(self.of(policy)):
            for t, run in enumerate(row):
                made = np.searchsorted(np.array(run["seconds"]), grid, side="right")
                found[s, t, made > 0] = best[s, t, made[made > 0] - 1]
        return found


def ranking(runs: Runs, volumes: Mapping[str, Scores]) -> pd.DataFrame:
    """One row a policy, the largest interquartile mean first."""
    rows = []
    for policy in statistics.leaders(runs.scores):
        scores = runs.scores[policy]
        estimate = statistics.aggregate(scores)
        row: dict[str, Any] = {
            "policy": policy, "iqm": estimate.value, "low": estimate.low, "high": estimate.high,
            "mean": float(scores.mean()), "worst": float(scores.min()), "best": float(scores.max()),
        }  # fmt: skip
        if runs.target.title.endswith("tabular benchmark"):
            row["optimum found"] = float((scores >= 1 - 1e-9).mean())
        volume = statistics.aggregate(volumes[policy])
        row |= {"hypervolume": volume.value, "hypervolume low": volume.low, "hypervolume high": volume.high}
        rows.append(row)
    return pd.DataFrame(rows)


def speed(runs: Runs, seconds: float) -> pd.DataFrame:
    """One row a policy: its score within a number of seconds, and how long its runs and their finds took."""
    rows = []
    for policy in statistics.leaders(runs.scores):
        timed = runs.at_seconds(policy, np.array([seconds]))[:, :, 0]
        rows.append({
            "policy": policy,
            # A run that has not scored anything by then has no value; then there is no mean either.
            f"within {seconds:.3g} s": float(statistics.interquartile_mean(timed)),
            "seconds of a run": float(np.median(runs.seconds_of(policy))),
            "evaluations": max(len(run["rewards"]) for row in runs.of(policy) for run in row),
            "best found at evaluation": float(np.median([run["found_at"] for row in runs.of(policy) for run in row])),
        })  # fmt: skip
    return pd.DataFrame(rows)


def all_runs(runs: Runs) -> pd.DataFrame:
    """One row a run."""
    return pd.DataFrame(
        {
            "task": run["task"], "policy": run["policy"], "seed": run["seed"],
            "score": runs.target.score(run["task"], run["best_reward"]), "best_reward": run["best_reward"],
            "evaluations": len(run["rewards"]), "found_at": run["found_at"], "seconds": run["seconds"][-1],
            **run["terms"],
        }
        for run in runs.runs
    )  # fmt: skip


def profiles(runs: Runs) -> pd.DataFrame:
    """Performance profiles on a grid from the lowest to the highest score."""
    every = np.concatenate([scores.ravel() for scores in runs.scores.values()])
    low = max(float(every.min()), float(np.quantile(every, 0.02)))
    grid = np.linspace(low, float(every.max()), POINTS)
    parts = [
        statistics.performance_profile(scores, grid).assign(policy=policy) for policy, scores in runs.scores.items()
    ]
    return pd.concat(parts, ignore_index=True)


def improvement(runs: Runs) -> pd.DataFrame:
    """Probability of improvement for every ordered pair."""
    rows = []
    for x in runs.policies:
        for y in runs.policies:
            if x < y:
                found = statistics.probability_of_improvement(runs.scores[x], runs.scores[y])
                rows.append({"x": x, "y": y, "probability": found.value, "low": found.low, "high": found.high})
                mirrored = {"probability": 1 - found.value, "low": 1 - found.high, "high": 1 - found.low}
                rows.append({"x": y, "y": x, **mirrored})
    return pd.DataFrame(rows)


def curves(runs: Runs) -> pd.DataFrame:
    """Best score so far over evaluations."""
    at = np.unique(np.geomspace(1, runs.evaluations, POINTS).round().astype(int))
    parts = []
    for policy in runs.policies:
        found = statistics.curve(runs.best_so_far[policy][:, :, at - 1])
        parts.append(found.assign(policy=policy, evaluation=at))
    return pd.concat(parts, ignore_index=True)


def time_curves(runs: Runs) -> pd.DataFrame:
    """Best score so far over seconds, from where every run of a policy has scored something."""
    first = min(float(run["seconds"][0]) for run in runs.runs)
    last = max(float(run["seconds"][-1]) for run in runs.runs)
    grid = np.geomspace(max(first, 1e-3), max(last, 2e-3), POINTS)
    parts = []
    for policy in runs.policies:
        values = runs.at_seconds(policy, grid)
        known = ~np.isnan(values).any(axis=(0, 1))
        if known.any():
            found = statistics.curve(values[:, :, known])
            parts.append(found.assign(policy=policy, seconds=grid[known]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def bitwidths(runs: Runs) -> pd.DataFrame:
    """Bits of each policy's best run of the first task, one row a layer."""
    first, columns = runs.target.tasks[0], {}
    layers: list[str] = []
    for policy in statistics.leaders(runs.scores):
        own = [run for run in runs.runs if run["policy"] == policy and run["task"] == first]
        best = max(own, key=lambda run: run["best_reward"])
        layers = list(best["bitwidths"])
        columns[f"{policy}.weight"] = [bits[0] for bits in best["bitwidths"].values()]
        columns[f"{policy}.activation"] = [bits[1] for bits in best["bitwidths"].values()]
    return pd.DataFrame({"layer": layers, **columns})


def _two(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Bit operations and reward of a run's front; empty where it trades other things."""
    if list(run["objectives"]) != ["bops", "reward"]:
        return []
    return [(float(bops), float(reward)) for bops, reward in run["front"]]


def volumes(runs: Runs) -> dict[str, Scores]:
    """Hypervolume of each run's front: the share of the area between no bit operations and the most of any run, and
    between score 0 and 1 (for a recipe: between the lowest and the highest reward of any front), that it dominates.
    """
    scales = {task: _scale(runs, task) for task in runs.target.tasks}

    def volume(run: Mapping[str, Any]) -> float:
        most, low, high = scales[run["task"]]
        points = [(bops / most, -(reward - low) / (high - low)) for bops, reward in _two(run)]
        return hypervolume(points, (1.0 + 1e-9, 0.0))

    return {policy: np.array([[volume(r) for r in row] for row in runs.of(policy)]) for policy in runs.policies}


def _scale(runs: Runs, task: str) -> tuple[float, float, float]:
    """Most bit operations, and the rewards at hypervolume's 0 and 1."""
    points = [point for run in runs.runs if run["task"] == task for point in _two(run)] or [(1.0, 0.0)]
    most = max(bops for bops, _ in points)
    rewards = [reward for _, reward in points]
    low, high = min(rewards), max(rewards)
    origin, slope = runs.target.score(task, 0.0), runs.target.score(task, 1.0) - runs.target.score(task, 0.0)
    if runs.target.title.endswith("tabular benchmark"):
        low, high = -origin / slope, (1 - origin) / slope
    return most, low, high if high > low else low + 1.0


def fronts(runs: Runs, volumes: Mapping[str, Scores]) -> pd.DataFrame:
    """For each task, the front of each policy's run of median hypervolume; on the table also the exact front."""
    rows = []
    for index, task in enumerate(runs.target.tasks):
        for policy in runs.policies:
            column = volumes[policy][:, index]
            middle = int(np.argsort(column, kind="stable")[(len(column) - 1) // 2])
            points = _two(runs.of(policy)[middle][index])
            rows += [{"task": task, "policy": policy, "bops": bops, "reward": reward} for bops, reward in points]
        rows += [{"task": task, "policy": EXACT, "bops": b, "reward": r} for b, r in _exact(runs, task)]
    return pd.DataFrame(rows)


#: Under this name the table's own front stands beside the policies'.
EXACT = "exact front of the table"


def _exact(runs: Runs, name: str) -> list[tuple[float, float]]:
    """The front of every assignment within the budget."""
    if not runs.target.title.endswith("tabular benchmark"):
        return []
    from arqsearch.benchmarks.tabular import task

    known = task(name)
    positions = known.evaluator.within(known.budget)
    bops, rewards = known.evaluator.table.costs("bops")[positions], known.evaluator.rewards[positions]
    order = np.lexsort((-rewards, bops))
    best, kept = -np.inf, []
    for position in order:
        if rewards[position] > best:
            best = float(rewards[position])
            kept.append((float(bops[position]), best))
    return kept
