"""The report of a comparison: frames, verdict and provenance put together and written."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from arqsearch import __version__
from arqsearch.benchmarks import policies_frames as frames
from arqsearch.benchmarks import statistics
from arqsearch.benchmarks.policies_frames import Runs
from arqsearch.benchmarks.policies_targets import RecipeTarget, Target
from arqsearch.benchmarks.policies_verdict import verdict
from arqsearch.benchmarks.results import this_machine
from arqsearch.report.policies import ComparisonContent, write_comparison

if TYPE_CHECKING:
    from arqsearch.benchmarks.policies import Settings

#: The mixed model's effects are differences from this policy where it was run.
FLOOR = "random"


def write(settings: Settings, target: Target, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the report of finished runs.

    :returns: ``policies``, ``seeds``, ``best``, ``report`` and the verdict.
    """
    runs = Runs(target, found, settings.policies, settings.seeds, settings.evaluations)
    content = make_content(settings, runs)
    path = write_comparison(settings.output, content)
    first = content.ranking.iloc[0]
    return {
        "policies": list(settings.policies), "seeds": settings.seeds, "tasks": list(target.tasks),
        "evaluations": settings.evaluations, "best": str(first["policy"]), "iqm": round(float(first["iqm"]), 4),
        "verdict": content.verdict, "report": str(path),
    }  # fmt: skip


def make_content(settings: Settings, runs: Runs) -> ComparisonContent:
    """Everything the report says."""
    target = runs.target
    every = np.concatenate([runs.seconds_of(policy).ravel() for policy in runs.policies])
    seconds = settings.seconds if settings.seconds is not None else _rounded(float(np.median(every)))
    volumes = frames.volumes(runs)
    ranking = frames.ranking(runs, volumes)
    tests = statistics.paired_tests(runs.scores) if runs.seeds > 1 else pd.DataFrame()
    improvement = frames.improvement(runs)
    reference = FLOOR if FLOOR in runs.policies else str(ranking["policy"].iloc[-1])
    model = statistics.mixed_model(runs.scores, reference)
    return ComparisonContent(
        title=f"Searchers on {target.title}",
        verdict=verdict(ranking, tests, improvement, runs.seeds, len(target.tasks)),
        score=target.score_name,
        ranking=ranking,
        runs=frames.all_runs(runs),
        tiles=_tiles(runs, ranking),
        facts={
            "Policies": ", ".join(runs.policies), "Seeds of each policy": runs.seeds, "Tasks": len(target.tasks),
            "Evaluations of a run, at most": runs.evaluations, "Runs": len(runs.runs),
        },
        tasks=pd.DataFrame([target.describe(name) for name in target.tasks]),
        profiles=frames.profiles(runs),
        improvement=improvement,
        curves=frames.curves(runs),
        time_curves=frames.time_curves(runs),
        seconds=seconds,
        speed=frames.speed(runs, seconds),
        tests=tests,
        effects=model.effects,
        reference=reference,
        model=_model_notes(model),
        bitwidths=frames.bitwidths(runs),
        fronts=frames.fronts(runs, volumes),
        radius=_radius(target),
        notes=_notes(runs),
        provenance={
            "arqsearch": __version__, "machine": this_machine(),
            **{f"task {name}": target.key(name) for name in target.tasks},
        },
    )  # fmt: skip


def _rounded(value: float) -> float:
    """To two significant digits."""
    return float(f"{value:.2g}") if value > 0 and math.isfinite(value) else 1.0


def _tiles(runs: Runs, ranking: pd.DataFrame) -> list[tuple[str, str]]:
    first = ranking.iloc[0]
    tiles = [(str(first["policy"]), "largest interquartile mean"), (f"{first['iqm']:.3f}", "its score")]
    if "optimum found" in ranking.columns:
        tiles.append((f"{first['optimum found']:.0%}", "of its runs find the optimum"))
    tiles.append((f"{int(runs.evaluations)}", "evaluations of each run, at most"))
    tiles.append((f"{runs.seeds * len(runs.target.tasks)}", "runs of each policy"))
    return tiles


def _model_notes(model: statistics.MixedModel) -> list[str]:
    notes = [model.note] if model.note else []
    if model.deviations:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in model.deviations.items())
        notes.append(f"Standard deviations of its random parts: {parts}.")
    return notes


def _notes(runs: Runs) -> list[str]:
    notes = [
        "Every policy had the same number of evaluations, budget, scores and seeds; repeated candidates and an agent's "
        "warm-up count as evaluations. A policy that enumerates a finite list may need fewer.",
        "Scores are estimates on held-out training images that steer a search; nothing in this comparison is a "
        "certificate, except the section on certified accuracy where there is one.",
        "Aggregates and their stratified bootstrap follow Agarwal et al., NeurIPS 2021 (rliable).",
    ]
    if isinstance(runs.target, RecipeTarget):
        notes.append("One recipe is one task: a ranking on it says little about other networks and budgets.")
    else:
        notes.append(
            "On the tabular benchmark an evaluation is a look-up, so seconds are the searchers' own; and every "
            "assignment was scored once on one network, so the ranking is about this network and these tasks."
        )
    return notes


def _radius(target: Target) -> pd.DataFrame:
    """Certified accuracy over the radius from the recipe's run folder; empty where there are no certificates."""
    if not isinstance(target, RecipeTarget):
        return pd.DataFrame()
    from arqsearch.search.reporting import RunFiles, curves
    from arqsearch.search.workspace import Workspace

    files = RunFiles(Workspace(target.recipe))
    return curves(files) if files.lines else pd.DataFrame()


def one_line(outcome: dict[str, Any]) -> str:
    """The last line of the command."""
    return json.dumps(outcome, ensure_ascii=False)
