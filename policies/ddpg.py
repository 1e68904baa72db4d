"""`ddpg`: HAQ's agent, deep deterministic policy gradient on the continuous environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DDPG
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
from arqsearch.policies.noise import truncated_normal
from arqsearch.policies.off_policy import OffPolicyAgent

#: Learning episodes after which HAQ's noise schedule ends (600 less 20 of warm-up).
HAQ_LEARNING_EPISODES = 580


@dataclass(frozen=True)
class DDPGPolicy(OffPolicyAgent):
    """Deep deterministic policy gradient (Lillicrap et al., 2016) with HAQ's settings (Wang et al., CVPR 2019).

    Differences from HAQ: everything in :class:`OffPolicyAgent`; one learning rate for actor and critic (HAQ: 1e-4 and
    1e-3); the reward is given once, with returns over the whole episode, instead of at each step; the actor imitates
    its best episodes (`self_imitation.py`), so less noise is needed (HAQ: .5, .99). `arq_style` is HAQ's agent
    without these.

    :param learning_rate: Adam's, for actor and critic.
    :param hidden: widths of the hidden layers of actor and critic.
    :param batch_size: transitions per gradient step.
    :param tau: rate of the target networks.
    :param warmup_episodes: episodes at the start where there is no model, at most a fifth of the search.
    :param updates_per_step: gradient steps for each step of an episode, after every generation.
    :param generation: proposals evaluated together.
    :param imagined: episodes that the agent plays against the model in each generation; 0: no model.
    :param noise: σ of the truncated normal exploration noise, in units of the [0, 1] action.
    :param noise_decay: its factor per episode in a search of HAQ's length; every search goes through that schedule
        once.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (300, 300)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 1
    generation: PositiveInt = 4
    imagined: Count = 8
    noise: PositiveFloat = 0.2
    noise_decay: UnitFloat = 0.997
    name: ClassVar[str] = "ddpg"
    environment = BitWidthContinuousEnv
    algorithm = DDPG

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent."""
        return self.off_policy_arguments(run) | {"tau": self.tau}

    def explore(
        self,
        model: OffPolicyAlgorithm,
        observations: NDArray[np.float32],
        progress: float,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """The actor's actions with HAQ's noise, whose schedule is compressed to this search."""
        sigma = self.noise * self.noise_decay ** (progress * HAQ_LEARNING_EPISODES)
        return truncated_normal(model.predict(observations, deterministic=True)[0], sigma, generator)
