"""`ppo`: proximal policy optimization on the discrete environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.policies.agent import AgentPolicy, PositiveFloat, PositiveInt, Run, UnitFloat, Widths


@dataclass(frozen=True)
class PPOPolicy(AgentPolicy):
    """Proximal policy optimization (Schulman et al., 2017) with rollouts of a few episodes.

    Clipping 0.2 and ten epochs as in the paper; λ = 1, since the only reward comes at the end. The large learning rate
    and the short rollout were picked for about 100 evaluations, with three seeds on a synthetic 13-layer task.

    :param learning_rate: Adam's.
    :param hidden: widths of the hidden layers of actor and critic.
    :param episodes_per_update: episodes in a rollout.
    :param epochs: passes over a rollout.
    :param clip: clipping range of the probability ratio.
    :param entropy: weight of the entropy bonus.
    """

    learning_rate: PositiveFloat = 3e-3
    hidden: Widths = (64, 64)
    episodes_per_update: PositiveInt = 2
    epochs: PositiveInt = 10
    clip: UnitFloat = 0.2
    entropy: UnitFloat = 0.01
    name: ClassVar[str] = "ppo"
    environment = BitWidthEnv
    algorithm: ClassVar[type[BaseAlgorithm]] = PPO

    def arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments of the agent; a minibatch has the size of an episode (at least 2)."""
        batch_size = max(run.steps, 2)
        return {
            "learning_rate": self.learning_rate,
            "policy_kwargs": {"net_arch": list(self.hidden)},
            "n_steps": self.episodes_per_update * batch_size,
            "batch_size": batch_size,
            "n_epochs": self.epochs,
            "clip_range": self.clip,
            "ent_coef": self.entropy,
            "gamma": 1.0,
            "gae_lambda": 1.0,
        }
