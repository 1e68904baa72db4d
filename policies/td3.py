"""`td3`: twin delayed DDPG on the continuous environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
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
class TD3Policy(OffPolicyAgent):
    """Twin delayed deep deterministic policy gradient (Fujimoto et al., 2018).

    Network and batch as `ddpg`; delay and target noise as in the paper; a constant Gaussian exploration noise.

    :param learning_rate: Adam's, for actor and critics.
    :param hidden: widths of the hidden layers of actor and critics.
    :param batch_size: transitions per gradient step.
    :param tau: rate of the target networks.
    :param warmup_episodes: episodes at the start where there is no model, at most a fifth of the search.
    :param updates_per_step: gradient steps for each step of an episode, after every generation.
    :param generation: proposals evaluated together.
    :param imagined: episodes that the agent plays against the model in each generation; 0: no model.
    :param noise: σ of the exploration noise, in units of the [−1, 1] action.
    :param policy_delay: critic updates per actor update.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (300, 300)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 1
    generation: PositiveInt = 4
    imagined: Count = 8
    noise: PositiveFloat = 0.3
    policy_delay: PositiveInt = 2
    name: ClassVar[str] = "td3"
    environment = BitWidthContinuousEnv
    algorithm = TD3

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent."""
        noise = NormalActionNoise(np.zeros(1), np.full(1, self.noise))
        own = {"tau": self.tau, "policy_delay": self.policy_delay, "action_noise": noise}
        return self.off_policy_arguments(run) | own

    def explore(
        self,
        model: OffPolicyAlgorithm,
        observations: NDArray[np.float32],
        progress: float,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """The actor's actions with Gaussian noise, clipped."""
        actions = model.predict(observations, deterministic=True)[0]
        noisy = actions + generator.normal(0, self.noise, actions.shape)
        return np.clip(noisy, -1, 1).astype(np.float32)
