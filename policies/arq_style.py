"""`arq_style`: HAQ's agent under a BOPs budget, a reconstruction of what ARQ describes ("ARQ-style", never ARQ itself).

ARQ's own state, reward and hyper-parameters are not known to us. This is HAQ's search (Wang et al., CVPR 2019), which
ARQ builds on, with the reward of this project; meant for ``evaluate.mode=finetune``, one short training a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.agent import PositiveFloat, PositiveInt, UnitFloat, Widths
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import blas_threads, preserved_random_state, torch_threads
from arqsearch.policies.episodes import Unscored
from arqsearch.policies.noise import truncated_normal
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.space import ChoiceSpace, Point
from arqsearch.quantize.cost import Budget

#: HAQ's factor between a gain in accuracy and the reward, and the memory of its moving average of rewards.
REWARD_SCALE, BASELINE_MEMORY = 0.1, 0.95


@dataclass(frozen=True)
class ARQStylePolicy:
    """ARQ-style: DDPG with HAQ's settings, the budget enforced after each episode.

    As HAQ: ten features of a layer and two continuous actions a layer; the agent does not see the budget, and after an
    episode bits are lowered from the last layer to the first, again and again, until it is met; every step of the
    episode gets the reward 0.1 · gain, less a moving average of earlier rewards; discount 1; random episodes at the
    start, then truncated normal noise that narrows each episode; as many updates as steps after each episode. None
    of the other agents' warm-up, model or imitation.

    Differences from HAQ: the gain is over the W8A8 program instead of FP32; warm-up is at most a fifth of the search.

    :param actor_rate: Adam's learning rate of the actor.
    :param critic_rate: Adam's learning rate of the critic.
    :param hidden: widths of the hidden layers of both.
    :param batch_size: transitions per gradient step.
    :param tau: rate of the target networks.
    :param warmup_episodes: random episodes at the start.
    :param noise: σ of the exploration noise in units of the [0, 1] action.
    :param noise_decay: its factor per episode after the warm-up.
    :param memory: transitions of the replay buffer for each layer.
    """

    actor_rate: PositiveFloat = 1e-4
    critic_rate: PositiveFloat = 1e-3
    hidden: Widths = (300, 300)
    batch_size: PositiveInt = 64
    tau: UnitFloat = 0.01
    warmup_episodes: PositiveInt = 20
    noise: PositiveFloat = 0.5
    noise_decay: UnitFloat = 0.99
    memory: PositiveInt = 128
    name: ClassVar[str] = "arq_style"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Play, lower, evaluate, update; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        space = ChoiceSpace(problem)
        unlimited = Budget(())
        env = BitWidthContinuousEnv(Unscored(problem.evaluator.layers), unlimited, problem.choices, problem.fixed)
        generator = np.random.default_rng((seed, 13))
        warmup = min(self.warmup_episodes, evaluations // 5)
        with preserved_random_state(), torch_threads(1), blas_threads(1):
            model = self._agent(env, seed)
            buffer = model.replay_buffer
            assert isinstance(buffer, BaselineBuffer)
            for episode in range(evaluations):
                sigma = self.noise * self.noise_decay ** (episode - warmup) if episode >= warmup else None
                observations, actions, point = _played(env, space, model, sigma, generator)
                gain = recorder.evaluate(space.bitwidths(lowered(space, point))).reward
                buffer.observe(observations, actions, REWARD_SCALE * gain)
                if episode >= warmup and not recorder.done:
                    model.train(gradient_steps=env.steps_per_episode, batch_size=self.batch_size)
        return recorder.outcome()

    def _agent(self, env: BitWidthContinuousEnv, seed: int) -> DDPG:
        """HAQ's agent, which has two learning rates."""
        model = TwoRateDDPG(
            "MlpPolicy", env, seed=seed, device="cpu", learning_rate=self.critic_rate, gamma=1.0, tau=self.tau,
            batch_size=self.batch_size, buffer_size=self.memory * len(env.feasibility.searched),
            replay_buffer_class=BaselineBuffer, policy_kwargs={"net_arch": list(self.hidden)},
        )  # fmt: skip
        model.actor_rate = self.actor_rate
        model.set_logger(Logger(folder=None, output_formats=[]))
        return model


class TwoRateDDPG(DDPG):
    """stable-baselines3's DDPG with a learning rate of the actor's own."""

    actor_rate: float

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        for group in self.actor.optimizer.param_groups:
            group["lr"] = self.actor_rate


class BaselineBuffer(ReplayBuffer):
    """A replay buffer of whole episodes that gives rewards less HAQ's moving average of them."""

    baseline: float | None = None

    def observe(self, observations: NDArray[np.float32], actions: NDArray[np.float32], reward: float) -> None:
        """Add an episode whose every step has the same reward.

        :param observations: (steps + 1, features).
        :param actions: (steps, 1) in [−1, 1].
        :param reward: of each step.
        """
        self.baseline = (
            reward if self.baseline is None else BASELINE_MEMORY * self.baseline + (1 - BASELINE_MEMORY) * reward
        )
        for step, action in enumerate(actions):
            self.add(
                observations[step][None], observations[step + 1][None], action[None], np.array([reward]),
                np.array([step == len(actions) - 1]), [{}],
            )  # fmt: skip

    def _get_samples(self, batch_inds: NDArray[np.int64], env: Any = None) -> ReplayBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(rewards=samples.rewards - (self.baseline or 0.0))


def _played(
    env: BitWidthContinuousEnv, space: ChoiceSpace, model: DDPG, sigma: float | None, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], Point]:
    """One episode without a budget: observations, actions, and the wanted choice numbers.

    :param sigma: of the exploration noise; None acts at random.
    """
    observations, actions = [env.reset()[0]], []
    while True:
        if sigma is None:
            action = generator.uniform(-1, 1, 1).astype(np.float32)
        else:
            action = truncated_normal(model.predict(observations[-1], deterministic=True)[0], sigma, generator)
        observation, _, done, _, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        if done:
            return np.stack(observations), np.stack(actions), space.point(info["bitwidths"])


def lowered(space: ChoiceSpace, point: Point) -> Point:
    """The point after HAQ's enforcement of the budget.

    From the last layer to the first, each part that can be lowered loses one choice, weights before activations; again
    from the last layer, until every limit is met.

    :param space: the feasible set.
    :param point: choice numbers (layers, 2).
    """
    point = point.copy()
    while not space.met(point):
        for layer in reversed(range(space.layers)):
            for part in (0, 1):
                if point[layer, part] > 0 and not space.met(point):
                    point[layer, part] -= 1
    return point
