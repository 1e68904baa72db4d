"""What the Optuna policies share: generations of fixed size, projection into the budget, an optional dashboard study.

The study that a sampler reads lives in memory and is made anew by every search, so that the same seed gives the same
history whatever a storage holds. With a `storage` URL every evaluation is also written to a study there, for
``optuna-dashboard``; a resumed search adds only what is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from pydantic import Field

from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import blas_threads, preserved_random_state
from arqsearch.policies.front import is_cost, objective_values
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.sensitivity import balanced
from arqsearch.policies.space import ChoiceSpace, Point

Population = Annotated[int, Field(ge=2)]

PARTS = ("weight", "activation")


class OptunaPolicy(ABC):
    """Base of the policies that ask an Optuna sampler.

    A candidate is one integer for each part (weights, activations of a layer): its choice number. What a sampler
    proposes over budget is shrunk to the nearest feasible point on the way to the smallest assignment
    (:meth:`ChoiceSpace.shrunk`) and evaluated there; the sampler keeps its own proposal, whose value that is (a
    Baldwinian repair). Each generation is asked for as a whole, evaluated together and told in order.

    The first candidate is the balanced uniform assignment; with several objectives all b/b assignments below it follow.

    The objectives are the problem's: costs are minimised, reward and terms maximised.
    """

    name: ClassVar[str]
    storage: str | None
    study: str | None

    @property
    @abstractmethod
    def generation(self) -> int:
        """Candidates asked for before any of them is told."""

    @abstractmethod
    def sampler(self, seed: int, parameters: int) -> BaseSampler:
        """The Optuna sampler.

        :param seed: its seed.
        :param parameters: number of parameters.
        """

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Ask, evaluate, tell; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        space = ChoiceSpace(problem)
        distributions = _distributions(space)
        directions = [
            StudyDirection.MINIMIZE if is_cost(name) else StudyDirection.MAXIMIZE for name in problem.objectives
        ]
        with preserved_random_state(), blas_threads(1), _quiet():
            view = self._view(directions, seed) if self.storage else None
            study = optuna.create_study(sampler=self.sampler(seed, len(distributions)), directions=directions)
            for point in _first(space, len(directions)):
                study.enqueue_trial(dict(zip(distributions, point.reshape(-1).tolist(), strict=True)))
            while not recorder.done:
                trials = [study.ask(distributions) for _ in range(min(self.generation, recorder.left))]
                points = [space.shrunk(_point(trial.params, distributions)) for trial in trials]
                found = recorder.evaluate_many([space.bitwidths(point) for point in points])
                for trial, evaluation in zip(trials, found, strict=True):
                    values = objective_values(evaluation, problem.objectives, problem.evaluator.layers)
                    study.tell(trial, list(values))
                    if view is not None:
                        _write(view, trial.number, trial.params, distributions, values, evaluation)
        return recorder.outcome()

    def _view(self, directions: Sequence[StudyDirection], seed: int) -> optuna.Study:
        """The study in the storage; refused when it is another one's."""
        name = self.study or f"arqsearch-{self.name}-seed{seed}"
        try:
            view = optuna.create_study(
                study_name=name, storage=self.storage, directions=directions, load_if_exists=True
            )
        except Exception as error:  # Whatever the database's driver raises.
            raise ArqError(
                f"The Optuna storage {self.storage!r} cannot be used ({error}); give a URL such as sqlite:///optuna.db."
            ) from error
        if list(view.directions) != list(directions):
            raise ArqError(
                f"The Optuna study {name!r} has other objectives than this search; give another name in `study`."
            )
        return view


def _distributions(space: ChoiceSpace) -> dict[str, BaseDistribution]:
    """One integer parameter a part, in the order of a flattened point."""
    top = len(space.choices) - 1
    return {f"{name}.{part}": IntDistribution(0, top) for name in space.names for part in PARTS}


def _first(space: ChoiceSpace, objectives: int) -> list[Point]:
    """The candidates that a search begins with."""
    start = balanced(space)
    if objectives == 1:
        return [start]
    equal = [point for point in space.uniform() if point[0, 0] == point[0, 1] and not np.array_equal(point, start)]
    return [start, *equal]


def _point(params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> Point:
    return np.array([params[name] for name in distributions], dtype=np.int64).reshape(-1, len(PARTS))


def _write(
    view: optuna.Study,
    number: int,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    values: Sequence[float],
    evaluation: Evaluation,
) -> None:
    """Add an evaluation to the dashboard's study, unless it has that many already."""
    if number < len(view.get_trials(deepcopy=False)):
        return
    attributes = {"bitwidths": evaluation.bitwidths.to_json(), "reward": evaluation.reward, **evaluation.terms}
    view.add_trial(
        optuna.trial.create_trial(
            params=params, distributions=distributions, values=list(values), user_attrs=attributes
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No log line for each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
