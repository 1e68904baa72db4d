"""What the policies with a replay buffer share: whole-episode returns and updates after each episode."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.base import SearchProblem
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.reward import StandardizedReward
from arqsearch.policies.uniform import uniform_candidates


class OffPolicyAgent(AgentPolicy):
    """Base of the replay-buffer agents.

    The only reward comes with the last step, and a search has few episodes: returns are taken over the rest of the
    episode (n-step with n = its length), so that every step sees the reward at once instead of after as many updates
    as there are steps. Updates follow each episode, as in HAQ. The first `demonstrations` episodes play the fullest
    uniform assignments into the replay buffer: a search that does not know its baseline cannot be trusted to beat it.
    """

    learning_rate: float
    hidden: tuple[int, ...]
    batch_size: int
    warmup_episodes: int
    updates_per_step: int
    demonstrations: int

    def demonstrate(
        self, model: BaseAlgorithm, env: BitWidthEnv | BitWidthContinuousEnv, problem: SearchProblem, recorder: Recorder
    ) -> None:
        """Play uniform assignments, fullest first, at most a tenth of the search, into the replay buffer."""
        assert isinstance(model, OffPolicyAlgorithm) and model.replay_buffer is not None and model.env is not None
        wrapped = model.env.envs[0]  # type: ignore[attr-defined]
        assert isinstance(wrapped.env, StandardizedReward)
        for candidate in uniform_candidates(problem)[: min(self.demonstrations, recorder.allowed // 10)]:
            observation, _ = wrapped.reset()
            ended = False
            for layer in (name for name in candidate.names if name not in problem.fixed):
                for _ in range(env.steps_per_episode // len(env.feasibility.searched)):
                    action = env.action_for(candidate[layer])
                    following, reward, ended, _, info = wrapped.step(action)
                    model.replay_buffer.add(
                        observation[None], following[None], np.asarray(action).reshape(1, -1), np.array([reward]),
                        np.array([ended]), [info],
                    )  # fmt: skip
                    observation = following
            assert ended

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
