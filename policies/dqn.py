"""`dqn`: deep Q-network on the discrete environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.policies.agent import (
    HAQ_WARMUP_EPISODES,
    Count,
    PositiveFloat,
    PositiveInt,
    Run,
    UnitFloat,
    Widths,
)
from arqsearch.policies.off_policy import OffPolicyAgent


@dataclass(frozen=True)
class DQNPolicy(OffPolicyAgent):
    """Deep Q-network (Mnih et al., 2015); exploration ends after a share of the search.

    :param learning_rate: Adam's.
    :param hidden: widths of the hidden layers.
    :param batch_size: transitions per gradient step.
    :param warmup_episodes: episodes at the start where there is no model, at most a fifth of the search.
    :param updates_per_step: gradient steps for each step of an episode, after every generation.
    :param generation: proposals evaluated together.
    :param imagined: episodes that the agent plays against the model in each generation; 0: no model.
    :param exploration_fraction: share of the search over which the random share of actions falls.
    :param exploration_final: random share of actions after that.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (128, 128)
    batch_size: PositiveInt = 64
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 2
    generation: PositiveInt = 4
    imagined: Count = 8
    exploration_fraction: UnitFloat = 0.5
    exploration_final: UnitFloat = 0.05
    name: ClassVar[str] = "dqn"
    environment = BitWidthEnv
    algorithm = DQN

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent; the target network follows every five episodes."""
        return self.off_policy_arguments(run) | {
            "exploration_fraction": self.exploration_fraction,
            "exploration_final_eps": self.exploration_final,
            "target_update_interval": 5 * run.steps,
        }

    def explore(
        self,
        model: OffPolicyAlgorithm,
        observations: NDArray[np.float32],
        progress: float,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """The greedy actions, of which a share is replaced by random ones."""
        actions = model.predict(observations, deterministic=True)[0]
        share = 1 - (1 - self.exploration_final) * min(progress / max(self.exploration_fraction, 1e-9), 1)
        drawn = generator.integers(model.action_space.n, size=actions.shape)  # type: ignore[attr-defined]
        return np.where(generator.random(actions.shape) < share, drawn, actions)
