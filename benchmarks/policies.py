"""``arqsearch bench policies``: every policy × seed × task under one budget of evaluations, then the report.

A run is one JSON file in ``runs/`` of the output folder, so that a killed comparison goes on where it stopped. Runs are
processes of one thread each. Seconds are processor seconds of the searcher plus what its evaluations cost when they
were computed: what another policy has left in the record is not free.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arqsearch.benchmarks.policies_targets import TABULAR, Opened, Target, open_target
from arqsearch.envs.evaluator import BatchEvaluator, Evaluation, Evaluator
from arqsearch.errors import ArqError, nearest
from arqsearch.policies import create
from arqsearch.policies.front import objective_values
from arqsearch.policies.registry import available
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo
from arqsearch.search.executor import LocalExecutor, OnProgress, Task

#: Written into every run; runs of another version are made again.
FORMAT = 1
QUICK_POLICIES = ("ddpg", "greedy", "ilp", "random", "uniform")
QUICK_TASKS, QUICK_SEEDS, QUICK_EVALUATIONS = ("bops-0.9-both",), 3, 40
#: What `arqsearch bench policies` compares unless told otherwise.
DEFAULT_POLICIES = ("ddpg", "masked_ppo", "ilp", "nsga2", "random")


@dataclass(frozen=True)
class Settings:
    """One comparison.

    :param target: ``tabular``, a recipe, or a run folder.
    :param policies: names, in the order of the tables.
    :param seeds: seeds 0, 1, … of each policy on each task.
    :param evaluations: candidates that every run may score.
    :param output: folder of runs and report.
    :param workers: processes of one thread each.
    :param seconds: budget of the second view; None takes the median run's time.
    :param tasks: of the tabular benchmark; empty for all.
    :raises ArqError: for an unknown policy, or a number below 1.
    """

    target: str
    policies: tuple[str, ...]
    seeds: int
    evaluations: int
    output: Path
    workers: int = 2
    seconds: float | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = available()
        for policy in self.policies:
            if policy not in known:
                raise ArqError(f"No policy named {policy!r}. {nearest(policy, known)}")
        if len(set(self.policies)) < len(self.policies) or not self.policies:
            raise ArqError("Name at least one policy, and each once: --policies ddpg,ilp,random")
        for name in ("seeds", "evaluations", "workers"):
            if getattr(self, name) < 1:
                raise ArqError(f"--{name} is {getattr(self, name)}; give at least 1.")
        if self.seconds is not None and self.seconds <= 0:
            raise ArqError(f"--budget-seconds is {self.seconds:g}; give a positive number.")


def settings(
    target: str, policies: str | None, seeds: int | None, evaluations: int | None, output: Path, workers: int,
    seconds: float | None, tasks: str | None, quick: bool,
) -> Settings:  # fmt: skip
    """Settings from what the command line was given.

    :param policies: names with commas between them, or ``all``; None takes the default.
    :param tasks: names with commas between them.
    :param quick: the smallest comparison that still has something to say, unless the others are given.
    :raises ArqError: for an unknown name, or ``quick`` on something other than the tabular benchmark.
    """
    if quick and target != TABULAR:
        raise ArqError(f"--quick compares on the tabular benchmark; leave {target!r} out, or leave --quick out.")
    chosen: tuple[str, ...] = QUICK_POLICIES if quick else DEFAULT_POLICIES
    if policies is not None:
        chosen = available() if policies == "all" else _names(policies)
    if tasks and target != TABULAR:
        raise ArqError("--tasks names tasks of the tabular benchmark; a recipe is one task.")
    return Settings(
        target=target, policies=chosen, output=output, workers=workers, seconds=seconds,
        seeds=(QUICK_SEEDS if quick else 5) if seeds is None else seeds,
        evaluations=(QUICK_EVALUATIONS if quick else 100) if evaluations is None else evaluations,
        tasks=_names(tasks) if tasks else QUICK_TASKS if quick else (),
    )  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class Stopwatch:
    """An evaluator that keeps the time of its evaluations apart from the searcher's own.

    :param inner: scores candidates.
    :param cost: seconds that an evaluation takes when it is computed.
    """

    def __init__(self, inner: Evaluator, opened: Opened) -> None:
        self._inner, self._cost = inner, opened.cost
        self._begun = time.process_time()
        #: Processor seconds spent inside evaluations, and what they cost when computed.
        self.inside, self.charged = 0.0, 0.0

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self._inner.layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one candidate."""
        return self.evaluate_many([bitwidths])[0]

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        """Score candidates, together where the evaluator can."""
        begun = time.process_time()
        if isinstance(self._inner, BatchEvaluator):
            found = self._inner.evaluate_many(candidates)
        else:
            found = [self._inner.evaluate(bitwidths) for bitwidths in candidates]
        self.charged += sum(self._cost(bitwidths) for bitwidths in candidates)
        self.inside += time.process_time() - begun
        return found

    @property
    def seconds(self) -> float:
        """Seconds of the search so far."""
        return time.process_time() - self._begun - self.inside + self.charged


def run_one(target: Target, name: str, policy: str, seed: int, evaluations: int, on_progress: OnProgress) -> Any:
    """Task of a worker: one search.

    :param name: of the task.
    :returns: what its file holds.
    """
    opened = target.open(name)
    searcher = create(policy)
    watch = Stopwatch(opened.problem.evaluator, opened)
    problem = replace(opened.problem, evaluator=watch)
    seconds: list[float] = []
    outcome = searcher.search(problem, evaluations, seed, lambda index, evaluation: seconds.append(watch.seconds))
    rewards = [evaluation.reward for evaluation in outcome.history]
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return {
        "rewards": [round(reward, 9) for reward in rewards],
        "seconds": [round(value, 4) for value in seconds],
        "best_reward": outcome.best.reward,
        "found_at": best + 1,
        "terms": outcome.best.terms,
        "bitwidths": json.loads(outcome.best.bitwidths.to_json()),
        "objectives": list(problem.objectives),
        "front": [list(objective_values(point, problem.objectives, watch.layers)) for point in outcome.front],
    }


def run_path(output: Path, task: str, policy: str, seed: int) -> Path:
    """File of one run."""
    return output / "runs" / task / f"{policy}-{seed:04d}.json"


def compare(settings: Settings, on_progress: OnProgress) -> dict[str, Any]:
    """Run what is missing and write the report.

    :returns: ``policies``, ``seeds``, ``best``, ``report``, and what stands behind them.
    :raises ArqError: when the folder holds runs of other settings.
    """
    from arqsearch.benchmarks.policies_report import write

    target = open_target(settings.target, settings.tasks, settings.output)
    target.prepare(on_progress)
    runs = run_all(settings, target, on_progress)
    return write(settings, target, runs)


def run_all(settings: Settings, target: Target, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Every run, from its file where it was made before.

    :raises ArqError: when a file was made with other settings.
    """
    keys = {name: target.key(name) for name in target.tasks}
    wanted: dict[str, tuple[str, str, int]] = {}
    # Seeds first: a comparison that is looked at early has every policy in it.
    for seed in range(settings.seeds):
        for name in target.tasks:
            for policy in settings.policies:
                wanted[f"{name} {policy} {seed}"] = (name, policy, seed)
    found: dict[str, dict[str, Any]] = {}
    for label, run in wanted.items():
        path = run_path(settings.output, *run)
        if path.is_file():
            found[label] = _read(path, keys[run[0]], settings.evaluations)
    tasks = [
        Task(label, run_one, (target, *run, settings.evaluations))
        for label, run in wanted.items()
        if label not in found
    ]

    def keep(label: str, result: Any) -> None:
        task, policy, seed = wanted[label]
        facts = {
            "format": FORMAT, "key": keys[task], "task": task, "policy": policy, "seed": seed,
            "evaluations": settings.evaluations,
        }  # fmt: skip
        found[label] = facts | result
        path = run_path(settings.output, task, policy, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found[label]))
        partial.replace(path)
        on_progress("runs", len(found), len(wanted), label)

    with LocalExecutor(settings.workers) as executor:
        executor.map(tasks, on_progress, keep)
    return [found[label] for label in wanted]


def _read(path: Path, key: str, evaluations: int) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text())
    same = run.get("format") == FORMAT and run.get("key") == key and run.get("evaluations") == evaluations
    if not same:
        raise ArqError(
            f"{path} was made with other settings ({run.get('evaluations')} evaluations). Choose another --output, or "
            f"delete {path.parent.parent}."
        )
    return run
