"""What policies are compared on: the tasks of the tabular benchmark, or the search of one recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from arqsearch.benchmarks.tabular import TASKS, TabularTask, task
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.recipe import Recipe, load_recipe
from arqsearch.search import require_problem, stages
from arqsearch.search.executor import OnProgress
from arqsearch.search.record import canonical_hash
from arqsearch.search.workspace import Workspace

#: The name that stands for the tabular benchmark.
TABULAR = "tabular"
OBJECTIVES = ("bops", "reward")


@dataclass(frozen=True)
class Opened:
    """A task in the process that searches it.

    :param problem: what a policy searches.
    :param cost: seconds that an evaluation takes when it is computed, whether or not it was this time.
    """

    problem: SearchProblem
    cost: Callable[[BitWidths], float]


class Target(Protocol):
    """Something to compare policies on; picklable, so that workers open its tasks themselves."""

    @property
    def title(self) -> str:
        """For the heading of the report."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        ...

    @property
    def score_name(self) -> str:
        """What :meth:`score` gives."""
        ...

    def prepare(self, on_progress: OnProgress) -> None:
        """Train and check what every run needs."""
        ...

    def key(self, name: str) -> str:
        """Hash of what the rewards of a task depend on."""
        ...

    def open(self, name: str) -> Opened:
        """The search problem of a task."""
        ...

    def score(self, name: str, reward: float) -> float:
        """A reward on a scale that tasks share."""
        ...

    def describe(self, name: str) -> dict[str, Any]:
        """Facts of a task, for the report."""
        ...


@dataclass(frozen=True)
class TabularTarget:
    """Tasks of the tabular benchmark.

    :param names: which of :data:`arqsearch.benchmarks.tabular.TASKS`, in order.
    :raises ArqError: for an unknown one.
    """

    names: tuple[str, ...] = tuple(known.name for known in TASKS)

    def __post_init__(self) -> None:
        for name in self.names:
            task(name)

    @property
    def title(self) -> str:
        """For the heading of the report."""
        return "the tabular benchmark"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        return self.names

    @property
    def score_name(self) -> str:
        """What :meth:`score` gives."""
        return "rewards on a scale where 0 is the median assignment within the budget and 1 the best one"

    def prepare(self, on_progress: OnProgress) -> None:
        """Nothing to train: the table is committed."""

    def key(self, name: str) -> str:
        """Hash of the table's provenance, the budget and the reward."""
        known = task(name)
        facts = known.evaluator.table.facts
        return canonical_hash(
            {"weights": facts.weights_hash, "settings": facts.settings_hash, "limits": list(known.budget.limits),
             "reward": dict(known.weights)}
        )  # fmt: skip

    def open(self, name: str) -> Opened:
        """The search problem of a task; a look-up costs nothing."""
        return Opened(task(name).problem(), lambda bitwidths: 0.0)

    def score(self, name: str, reward: float) -> float:
        """A reward on the scale of the task's own optimum."""
        return task(name).score(reward)

    def describe(self, name: str) -> dict[str, Any]:
        """Size, optimum and median of a task."""
        known: TabularTask = task(name)
        return {
            "task": name, "what": known.title, "assignments": len(known.evaluator.within(known.budget)),
            "best reward": known.optimum, "median reward": known.typical,
        }  # fmt: skip


@dataclass(frozen=True)
class RecipeTarget:
    """The search of one recipe, on shared weights that are trained once.

    :param recipe: the resolved recipe.
    """

    recipe: Recipe

    @property
    def title(self) -> str:
        """For the heading of the report."""
        return f"recipe {self.recipe.name}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        return (self.recipe.name,)

    @property
    def score_name(self) -> str:
        """What :meth:`score` gives."""
        return "rewards: 0 is as robust as W8A8"

    def prepare(self, on_progress: OnProgress) -> None:
        """Base network, weights for scoring, and the check that every reward term varies."""
        Workspace(self.recipe).save_recipe()
        stages.check_search(self.recipe)
        stages.train_base(self.recipe, on_progress)
        stages.prepare_weights(self.recipe, on_progress)
        stages.measure_spread(self.recipe, on_progress)

    def key(self, name: str) -> str:
        """Hash of weights, data, scoring, budget and reward."""
        search = self.recipe.search.model_dump(mode="json", exclude={"policy", "options", "compare", "seed", "record"})
        return canonical_hash({"keys": self._keys, "search": search | {"evaluations": 0}, "reward": self._weights})

    @property
    def _weights(self) -> list[float]:
        return [self.recipe.evaluate.smoothed.weight, self.recipe.evaluate.interval.weight]

    @cached_property
    def _keys(self) -> list[str]:
        evaluator = stages.open_evaluator(Workspace(self.recipe))
        return [evaluator.key.weights_hash, evaluator.key.settings_hash]

    def open(self, name: str) -> Opened:
        """The search problem of the recipe; the record says what an evaluation cost when it was computed."""
        space = Workspace(self.recipe)
        evaluator = stages.open_evaluator(space, racing=not require_problem.needs_full_scores(self.recipe))
        problem = require_problem.problem(space, require_problem.constrained(space, evaluator), evaluator.net)

        def cost(bitwidths: BitWidths) -> float:
            entry = evaluator.record.get(evaluator.key, bitwidths)
            return 0.0 if entry is None else float(entry.seconds)

        if len(problem.objectives) < 2:
            problem = replace(problem, objectives=OBJECTIVES)
        return Opened(problem, cost)

    def score(self, name: str, reward: float) -> float:
        """The reward itself: the optimum is not known."""
        return reward

    def describe(self, name: str) -> dict[str, Any]:
        """Budget and choices."""
        search, space = self.recipe.search, Workspace(self.recipe)
        limits = search.budget.model_dump(exclude_none=True)
        return {
            "task": name, "what": ", ".join(f"{cost} ≤ {limit}" for cost, limit in limits.items()),
            "layers": len(space.net().layer_infos), "bits": ", ".join(map(str, search.bits)),
        }  # fmt: skip


def open_target(name: str, tasks: Sequence[str], output: Path) -> Target:
    """The tabular benchmark, or a recipe's search.

    :param name: ``tabular``, a recipe, or a run folder.
    :param tasks: of the tabular benchmark; empty for all.
    :param output: folder of the comparison, which holds the run of a recipe that names none.
    :raises ArqError: when there is no such recipe or task.
    """
    if name == TABULAR:
        return TabularTarget(tuple(tasks)) if tasks else TabularTarget()
    recipe = load_recipe(name)
    return RecipeTarget(recipe if Path(name).is_dir() else recipe.model_copy(update={"run": str(output / "run")}))
