"""Evaluations per minute over the number of workers, and what an executor adds to a task.

Behind ``arqsearch bench scaling``. The candidates are random assignments for a small digits network; every number of
workers scores the same ones, from an empty record each time, on workers that have opened the network already, as in a
search after its first generation. Rounds are interleaved, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from arqsearch.benchmarks.results import this_machine
from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe, parse_recipe
from arqsearch.search.executor import Executor, OnProgress, Task, open_executor

#: Noise samples of an image: an evaluation takes some tenths of a second, as with few images of a larger network.
SAMPLES = 768
CANDIDATES, ROUNDS, TRIVIAL = 48, 5, 400
QUICK_CANDIDATES, QUICK_ROUNDS, QUICK_TRIVIAL = 12, 3, 100


def recipe_in(folder: Path, workers: int) -> Recipe:
    """A digits network that is hardly trained: the time of an evaluation does not depend on how good it is."""
    short = {"epochs": 0.5, "objective": {"smoothing": "gaussian"}}
    return parse_recipe(
        {
            "name": "scaling", "run": str(folder), "workers": workers, "train": short,
            "evaluate": {"training": short, "smoothed": {"images": 297, "samples": SAMPLES}},
            "search": {"budget": {"bops": "3%"}},
        }
    )  # fmt: skip


def nothing(on_progress: OnProgress) -> None:
    """The task whose whole time is overhead."""


def measure(
    workers: Sequence[int], where: str, folder: Path, on_progress: OnProgress, quick: bool = False
) -> list[dict[str, Any]]:
    """Time the same evaluations with each number of workers.

    :param workers: numbers of workers; the first one is what the others are compared with.
    :param where: executor, as a recipe names it.
    :param folder: empty folder for the run.
    :returns: one row for each number of workers.
    :raises ArqError: when a number of workers gives other scores.
    """
    from arqsearch.search import stages
    from arqsearch.search.workspace import Workspace

    count = QUICK_CANDIDATES if quick else CANDIDATES
    recipe = recipe_in(folder, workers[0])
    space = Workspace(recipe)
    stages.train_base(recipe, on_progress)
    stages.prepare_weights(recipe, on_progress)
    drawn = stages.random_candidates(space, space.net(), count, "scaling")
    times: dict[int, list[float]] = {number: [] for number in workers}
    drivers: dict[int, list[float]] = {number: [] for number in workers}
    rewards: set[tuple[float, ...]] = set()
    with ExitStack() as stack:
        # The largest first: Ray on this machine has as many CPUs as the executor that starts it asks for.
        opened = {number: stack.enter_context(open_executor(where, number)) for number in sorted(workers, reverse=True)}
        executors = {number: opened[number] for number in workers}
        turns = 1 + (QUICK_ROUNDS if quick else ROUNDS)
        for turn in range(turns):
            for number, executor in executors.items():
                (folder / "record.sqlite").unlink(missing_ok=True)
                evaluator = stages.open_evaluator(space, executor)
                wall, driver = time.perf_counter(), time.process_time()
                rewards.add(tuple(evaluation.reward for evaluation in evaluator.evaluate_many(drawn)))
                if turn > 0:  # In the first one, workers start and open the network.
                    times[number].append(time.perf_counter() - wall)
                    drivers[number].append(time.process_time() - driver)
            on_progress("rounds", turn + 1, turns, "")
        overhead = {
            number: _overhead(executor, QUICK_TRIVIAL if quick else TRIVIAL) for number, executor in executors.items()
        }
    if len(rewards) > 1:
        raise ArqError("Scores differ between numbers of workers; please report this with `pip freeze`.")
    first = median(times[workers[0]])
    return [
        {
            "recipe": "scaling", "hardware": this_machine(), "executor": where, "workers": number,
            "evaluations": len(drawn), "rounds": len(times[number]), "seconds": round(median(times[number]), 3),
            "fastest": round(min(times[number]), 3), "slowest": round(max(times[number]), 3),
            "evaluations_per_minute": round(60 * len(drawn) / median(times[number]), 1),
            "speedup": round(first / median(times[number]), 3),
            "caller_cpu_ms_per_evaluation": round(1000 * median(drivers[number]) / len(drawn), 2),
            "overhead_ms": round(overhead[number], 3),
        }
        for number in workers
    ]  # fmt: skip


def _overhead(executor: Executor, count: int) -> float:
    """Milliseconds that a task without work takes, among many."""
    tasks = [Task(f"nothing {index}", nothing, ()) for index in range(count)]
    executor.map(tasks[: 2 * executor.workers], _silent)
    start = time.perf_counter()
    executor.map(tasks, _silent)
    return 1000 * (time.perf_counter() - start) / count


def _silent(task: str, done: int, total: int, note: str) -> None:
    """Progress that nobody watches."""


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures by number of workers, for the last line of the output."""
    found: dict[str, Any] = {"hardware": rows[0]["hardware"], "executor": rows[0]["executor"]}
    for row in rows:
        found[f"evaluations_per_minute_{row['workers']}"] = row["evaluations_per_minute"]
    return found | {"overhead_ms": rows[-1]["overhead_ms"], "speedup": rows[-1]["speedup"]}


def write_rows(rows: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """Write a CSV file.

    :param target: the file, or a folder, where it gets its own name.
    :returns: the file.
    """
    first = rows[0]
    kind = str(first["executor"]).split(":")[0]
    path = target if target.suffix == ".csv" else target / f"scaling-{kind}-{first['hardware']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
