"""What the policies with a replay buffer share: whole-episode returns and updates after each episode."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.base import SearchProblem
from arqsearch.policies.random_search import sample_feasible
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.self_imitation import SelfImitation
from arqsearch.policies.uniform import uniform_candidates

#: Warm-up episodes that play uniform assignments, at most half of the warm-up.
UNIFORM_EPISODES = 5
#: Sweeps of the sampler that draws the other ones.
SWEEPS = 30


class OffPolicyAgent(AgentPolicy):
    """Base of the replay-buffer agents.

    The only reward comes with the last step, and a search has few episodes: returns are taken over the rest of the
    episode (n-step with n = its length), so that every step sees the reward at once instead of after as many updates
    as there are steps. Updates follow each episode, as in HAQ. The warm-up
    does not act at random (that spends the budget on the first layers and starves the last ones): it plays the fullest
    uniform assignments, then uniform samples of the feasible set, into the replay buffer, and the agent learns from
    them before it acts. A search that has not seen its baseline cannot be trusted to beat it.
    """

    learning_rate: float
    hidden: tuple[int, ...]
    batch_size: int
    warmup_episodes: int
    updates_per_step: int

    def demonstrate(
        self, model: BaseAlgorithm, env: BitWidthEnv | BitWidthContinuousEnv, problem: SearchProblem, run: Run
    ) -> None:
        """Play the warm-up episodes into the replay buffer and learn from them."""
        assert isinstance(model, OffPolicyAlgorithm) and model.replay_buffer is not None and model.env is not None
        wrapped = model.env.envs[0]  # type: ignore[attr-defined]
        episodes = run.warmup_episodes(self.warmup_episodes)
        source = random.Random(run.seed)
        candidates = uniform_candidates(problem)[: min(UNIFORM_EPISODES, (episodes + 1) // 2)]
        while len(candidates) < episodes:
            candidates.append(sample_feasible(env.feasibility, source, SWEEPS).bitwidths())
        for candidate in candidates:
            observation, _ = wrapped.reset()
            ended = False
            while not ended:
                action = env.action_for(candidate)
                following, reward, ended, _, info = wrapped.step(action)
                model.replay_buffer.add(
                    observation[None], following[None], np.asarray(action).reshape(1, -1), np.array([reward]),
                    np.array([ended]), [info],
                )  # fmt: skip
                observation = following
        if episodes:
            model.train(gradient_steps=episodes * run.steps * self.updates_per_step, batch_size=self.batch_size)

    def callbacks(self, recorder: Recorder, env: BitWidthEnv | BitWidthContinuousEnv, run: Run) -> list[BaseCallback]:
        """Self-imitation for agents with an actor."""
        return [SelfImitation(recorder, env, run.seed)] if isinstance(env, BitWidthContinuousEnv) else []

    def off_policy_arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments common to the replay-buffer agents.

        :param run: sizes of the search.
        """
        return {
            "learning_rate": self.learning_rate,
            "policy_kwargs": {"net_arch": list(self.hidden)},
            "batch_size": self.batch_size,
            "buffer_size": run.total_steps,
            "learning_starts": 0,
            "train_freq": (1, "episode"),
            "gradient_steps": run.steps * self.updates_per_step,
            "gamma": 1.0,
            "n_steps": run.steps,
        }
