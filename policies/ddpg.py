"""`ddpg`: HAQ's agent, deep deterministic policy gradient on the continuous environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DDPG
from stable_baselines3.common.base_class import BaseAlgorithm

from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.agent import (
    HAQ_WARMUP_EPISODES,
    PositiveFloat,
    PositiveInt,
    Run,
    UnitFloat,
    Widths,
)
from arqsearch.policies.noise import TruncatedNormalNoise
from arqsearch.policies.off_policy import OffPolicyAgent

#: Learning episodes after which HAQ's noise schedule ends (600 less 20 of warm-up).
HAQ_LEARNING_EPISODES = 580


@dataclass(frozen=True)
class DDPGPolicy(OffPolicyAgent):
    """Deep deterministic policy gradient (Lillicrap et al., 2016) with HAQ's settings (Wang et al., CVPR 2019).

    Differences from HAQ: stable-baselines3 has one learning rate for actor and critic (HAQ: 1e-4 and 1e-3); the
    reward is given once, with returns over the whole episode, instead of at each step; the warm-up plays feasible
    assignments and the actor imitates its best episodes (`self_imitation.py`), so less noise is needed (HAQ: .5, .99).

    :param learning_rate: Adam's, for actor and critic.
    :param hidden: widths of the hidden layers of actor and critic.
    :param batch_size: transitions per gradient step.
    :param tau: rate of the target networks.
    :param warmup_episodes: episodes at the start that are played to the agent, at most a fifth of the search.
    :param updates_per_step: gradient steps per environment step.
    :param noise: σ of the truncated normal exploration noise, in units of the [0, 1] action.
    :param noise_decay: its factor per episode in a search of HAQ's length; a shorter search goes through the same
        schedule faster.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (300, 300)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 1
    noise: PositiveFloat = 0.2
    noise_decay: UnitFloat = 0.997
    name: ClassVar[str] = "ddpg"
    environment = BitWidthContinuousEnv
    algorithm = DDPG

    def build(self, env: gymnasium.Env[Any, Any], run: Run) -> BaseAlgorithm:
        """A new agent with the exploration noise, which follows its own actions."""
        model = super().build(env, run)
        assert isinstance(model, DDPG)

        def current_action() -> NDArray[np.float32]:
            assert isinstance(model._last_obs, np.ndarray)
            return model.predict(model._last_obs, deterministic=True)[0]

        warmup = run.warmup_episodes(self.warmup_episodes)
        speed = max(HAQ_LEARNING_EPISODES / (run.evaluations - warmup), 1.0)
        model.action_noise = TruncatedNormalNoise(current_action, self.noise, self.noise_decay**speed, run.seed)
        return model

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent."""
        return self.off_policy_arguments(run) | {"tau": self.tau}
