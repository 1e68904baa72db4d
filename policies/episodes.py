"""Episodes as arrays: played from bit-widths, acted by an agent, written into a replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.envs.evaluator import Evaluation
from arqsearch.policies.base import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo

LayerEnv = BitWidthEnv | BitWidthContinuousEnv
#: Chooses actions for a batch of observations, (n, features) to (n, ...).
Act = Callable[[NDArray[np.float32]], NDArray[Any]]


class Unscored:
    """An evaluator that answers 0, for episodes whose score comes from elsewhere.

    :param layers: every conv and linear layer.
    """

    def __init__(self, layers: tuple[LayerInfo, ...]) -> None:
        self.layers = layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Reward 0."""
        return Evaluation(bitwidths, 0.0, {})


@dataclass(frozen=True)
class Episode:
    """One way through the environment.

    :param observations: (steps + 1, features).
    :param actions: (steps, action size), those that give the assigned bits.
    """

    observations: NDArray[np.float32]
    actions: NDArray[Any]


class Stage:
    """Plays episodes of one environment.

    :param kind: class of the environment.
    :param problem: what is searched.
    """

    def __init__(self, kind: type[LayerEnv], problem: SearchProblem) -> None:
        self._kind = kind
        self._problem = problem
        self._known: dict[BitWidths, Episode] = {}
        self.env: LayerEnv = self._new()

    def _new(self) -> LayerEnv:
        problem = self._problem
        return self._kind(Unscored(problem.evaluator.layers), problem.budget, problem.choices, problem.fixed)

    def episode(self, bitwidths: BitWidths) -> Episode:
        """The episode that ends with `bitwidths`.

        :param bitwidths: a feasible assignment.
        """
        if bitwidths not in self._known:
            observations, actions = [self.env.reset()[0]], []
            for _ in range(self.env.steps_per_episode):
                action = self.env.action_for(bitwidths)
                actions.append(np.asarray(action).reshape(-1))
                observations.append(self.env.step(action)[0])  # type: ignore[arg-type]
            self._known[bitwidths] = Episode(np.stack(observations), np.stack(actions))
        return self._known[bitwidths]

    def act(self, act: Act, count: int) -> list[BitWidths]:
        """Play `count` episodes side by side.

        :param act: chooses the actions of a step for all of them.
        :param count: number of episodes.
        :returns: their assignments.
        """
        envs = [self._new() for _ in range(count)]
        observations = np.stack([env.reset()[0] for env in envs])
        found: list[BitWidths] = []
        for _ in range(self.env.steps_per_episode):
            chosen = act(observations)
            taken = [env.step(action) for env, action in zip(envs, chosen, strict=True)]
            observations = np.stack([step[0] for step in taken])
            found = [step[4]["bitwidths"] for step in taken if step[2]]
        return found


def refill(buffer: Any, episodes: Iterable[Episode], rewards: NDArray[np.float64]) -> None:
    """Replace what a replay buffer holds by whole episodes, whose reward comes with the last step.

    :param buffer: of stable-baselines3, for one environment; it keeps the last episodes where it is too small.
    :param episodes: the episodes.
    :param rewards: one for each.
    """
    buffer.reset()
    for episode, reward in zip(episodes, rewards, strict=True):
        last = len(episode.actions) - 1
        for step, action in enumerate(episode.actions):
            done = step == last
            buffer.add(
                episode.observations[step][None], episode.observations[step + 1][None], action[None],
                np.array([reward if done else 0.0]), np.array([done]), [{}],
            )  # fmt: skip
