"""What all stable-baselines3 policies share: an episode is a candidate, learning stops with the last evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import gymnasium
from pydantic import Field
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import preserved_random_state, torch_threads
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.reward import StandardizedReward

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

#: HAQ's random episodes at the start; no more than a fifth of a shorter search.
HAQ_WARMUP_EPISODES = 20


@dataclass(frozen=True)
class Run:
    """The sizes of one search that hyper-parameters are stated in.

    :param evaluations: episodes, one evaluation each.
    :param steps: steps per episode.
    :param seed: seed of the agent.
    """

    evaluations: int
    steps: int
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole search."""
        return self.evaluations * self.steps

    def warmup_episodes(self, wanted: int) -> int:
        """Random episodes at the start: `wanted`, but at most a fifth of the search."""
        return min(wanted, self.evaluations // 5)


class AgentPolicy(ABC):
    """Base of the policies that train one stable-baselines3 agent during the search.

    A subclass names its environment and gives the agent's class and constructor arguments. The agent is trained
    on the CPU with one thread, with discount 1, on rewards standardized over the episodes so far
    (:class:`arqsearch.policies.reward.StandardizedReward`), which are all evaluated.
    """

    name: ClassVar[str]
    environment: ClassVar[type[BitWidthEnv] | type[BitWidthContinuousEnv]]
    algorithm: ClassVar[type[BaseAlgorithm]]

    @abstractmethod
    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent, beside policy, environment, seed and device.

        :param run: sizes of the search.
        """

    def build(self, env: gymnasium.Env[Any, Any], run: Run) -> BaseAlgorithm:
        """A new agent, not yet trained.

        :param env: its environment.
        :param run: sizes of the search.
        """
        return self.algorithm("MlpPolicy", env, seed=run.seed, device="cpu", **self.arguments(run))

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Train the agent for `evaluations` episodes; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        env = self.environment(recorder, problem.budget, problem.choices, problem.fixed)
        run = Run(evaluations, env.steps_per_episode, seed)
        with preserved_random_state(), torch_threads(1):
            model = self.build(StandardizedReward(env), run)
            # Without a logger of its own, learn() makes a new folder in the system's temporary one.
            model.set_logger(Logger(folder=None, output_formats=[]))
            model.learn(total_timesteps=run.total_steps, callback=StopWhenDone(recorder))
        return recorder.outcome()


class StopWhenDone(BaseCallback):
    """End training right after the last evaluation.

    :param recorder: counts the evaluations.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def _on_step(self) -> bool:
        return not self._recorder.done
