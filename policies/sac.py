"""`sac`: soft actor-critic on the continuous environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import SAC
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
class SACPolicy(OffPolicyAgent):
    """Soft actor-critic (Haarnoja et al., 2018) with a fixed temperature.

    The automatic temperature needs more steps than a search has, so it is a hyper-parameter, in units of the
    standardized reward's spread.

    :param learning_rate: Adam's, for actor and critics.
    :param hidden: widths of the hidden layers of actor and critics.
    :param batch_size: transitions per gradient step.
    :param tau: rate of the target networks.
    :param warmup_episodes: episodes at the start where there is no model, at most a fifth of the search.
    :param updates_per_step: gradient steps for each step of an episode, after every generation.
    :param generation: proposals evaluated together.
    :param imagined: episodes that the agent plays against the model in each generation; 0: no model.
    :param temperature: weight of the entropy.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (256, 256)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 1
    generation: PositiveInt = 4
    imagined: Count = 8
    temperature: PositiveFloat = 0.02
    name: ClassVar[str] = "sac"
    environment = BitWidthContinuousEnv
    algorithm = SAC

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent."""
        return self.off_policy_arguments(run) | {"tau": self.tau, "ent_coef": self.temperature}

    def explore(
        self,
        model: OffPolicyAlgorithm,
        observations: NDArray[np.float32],
        progress: float,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """Samples of the stochastic actor."""
        return model.predict(observations, deterministic=False)[0]
