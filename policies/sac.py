"""`sac`: soft actor-critic on the continuous environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stable_baselines3 import SAC

from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.agent import (
    HAQ_WARMUP_EPISODES,
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
    :param warmup_episodes: episodes at the start that are played to the agent, at most a fifth of the search.
    :param updates_per_step: gradient steps per environment step.
    :param temperature: weight of the entropy.
    """

    learning_rate: PositiveFloat = 1e-3
    hidden: Widths = (256, 256)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = HAQ_WARMUP_EPISODES
    updates_per_step: PositiveInt = 1
    temperature: PositiveFloat = 0.02
    name: ClassVar[str] = "sac"
    environment = BitWidthContinuousEnv
    algorithm = SAC

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent."""
        return self.off_policy_arguments(run) | {"tau": self.tau, "ent_coef": self.temperature}
