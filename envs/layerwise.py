"""What both environments share: an episode walks the searched layers and ends with one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.analytic import AnalyticEvaluator, embedded_budget
from arqsearch.envs.evaluator import Evaluator
from arqsearch.envs.feasibility import Allocation, Feasibility
from arqsearch.envs.features import STATIC_FEATURES, static_features
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import ALL_BITS
from arqsearch.quantize.cost import Budget, known_costs, total_cost

Observation = NDArray[np.float32]
Action = TypeVar("Action")


class LayerwiseEnv(gymnasium.Env[Observation, Action], Generic[Action]):
    """Base of the environments that assign bits layer by layer; subclasses define the action.

    :param evaluator: scores the finished assignment; None for the embedded task.
    :param budget: limits that every episode meets; None for the embedded task's own budget, or for no
        limit when an evaluator is given.
    :param choices: bits that a searched layer may take.
    :param fixed: layers with given (weight bits, activation bits).
    :raises ArqError: when the budget cannot be met, or a choice or a fixed layer is not valid.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (declared so by Gymnasium)
    #: The id under which Gymnasium knows the environment.
    id: ClassVar[str]
    #: Steps that assign one layer.
    steps_per_layer: ClassVar[int]

    def __init__(
        self,
        evaluator: Evaluator | None = None,
        budget: Budget | None = None,
        choices: Sequence[int] = ALL_BITS,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        if budget is None:
            budget = embedded_budget() if evaluator is None else Budget(())
        self.evaluator: Evaluator = evaluator if evaluator is not None else AnalyticEvaluator()
        self.feasibility = Feasibility(self.evaluator.layers, budget, choices, fixed)
        position = {layer.name: index for index, layer in enumerate(self.feasibility.layers)}
        rows = static_features(self.feasibility.layers)
        self._static = rows[[position[layer.name] for layer in self.feasibility.searched]]
        size = len(STATIC_FEATURES) + 2 + len(budget.limits)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32)
        self._step_index = self.steps_per_episode
        self._allocation = Allocation(self.feasibility)

    @property
    def steps_per_episode(self) -> int:
        """Length of every episode."""
        return self.steps_per_layer * len(self.feasibility.searched)

    @property
    def _layer(self) -> int:
        """Position of the current layer among the searched ones (the last one when the episode is over)."""
        return min(self._step_index // self.steps_per_layer, len(self.feasibility.searched) - 1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with every searched layer open.

        :param seed: seeds `np_random` (the dynamics draw nothing from it).
        :param options: not used.
        :returns: (observation, empty info).
        """
        super().reset(seed=seed)
        self._allocation = Allocation(self.feasibility)
        self._step_index = 0
        return self._observation(), {}

    def _dynamic_features(self) -> tuple[float, float]:
        """The two features that depend on earlier actions, each in [0, 1]."""
        raise NotImplementedError

    def _observation(self) -> Observation:
        dynamic = [*self._dynamic_features(), *self._allocation.slack_fractions()]
        return np.concatenate([self._static[self._layer], np.array(dynamic, dtype=np.float32)])

    def _require_running(self) -> None:
        if self._step_index >= self.steps_per_episode:
            raise ArqError("The episode is over; call reset() before step().")

    def _advance(self, info: dict[str, Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Finish a step, and with the last one evaluate the assignment."""
        self._step_index += 1
        done = self._step_index >= self.steps_per_episode
        reward = 0.0
        if done:
            bitwidths = self._allocation.bitwidths()
            evaluation = self.evaluator.evaluate(bitwidths)
            reward = float(evaluation.reward)
            layers = self.feasibility.layers
            cost = {name: total_cost(name, layers, bitwidths) for name in known_costs(layers)}
            info |= {"bitwidths": bitwidths, "terms": dict(evaluation.terms), "cost": cost, "reward": reward}
        return self._observation(), reward, done, False, info
