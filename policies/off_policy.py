"""What the policies with a replay buffer share: whole-episode returns and updates after each episode."""

from __future__ import annotations

from typing import Any

from arqsearch.policies.agent import AgentPolicy, Run


class OffPolicyAgent(AgentPolicy):
    """Base of the replay-buffer agents.

    The only reward comes with the last step, and a search has few episodes: returns are taken over the rest of the
    episode (n-step with n = its length), so that every step sees the reward at once instead of after as many updates
    as there are steps. Updates follow each episode, as in HAQ.
    """

    learning_rate: float
    hidden: tuple[int, ...]
    batch_size: int
    warmup_episodes: int
    updates_per_step: int

    def off_policy_arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments common to the replay-buffer agents.

        :param run: sizes of the search.
        """
        return {
            "learning_rate": self.learning_rate,
            "policy_kwargs": {"net_arch": list(self.hidden)},
            "batch_size": self.batch_size,
            "buffer_size": run.total_steps,
            "learning_starts": run.warmup_episodes(self.warmup_episodes) * run.steps,
            "train_freq": (1, "episode"),
            "gradient_steps": run.steps * self.updates_per_step,
            "gamma": 1.0,
            "n_steps": run.steps,
        }
