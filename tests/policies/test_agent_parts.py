"""The parts of the agents: exploration noise, standardized reward, recorder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.envs import BitWidthContinuousEnv, BitWidthEnv
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator, embedded_budget
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies import SearchProblem, create
from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.ddpg import DDPGPolicy
from arqsearch.policies.determinism import torch_threads
from arqsearch.policies.dqn import DQNPolicy
from arqsearch.policies.episodes import Stage, refill
from arqsearch.policies.noise import truncated_normal
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.reward import StandardizedReward
from arqsearch.policies.self_imitation import SelfImitation
from arqsearch.policies.uniform import uniform_candidates
from arqsearch.quantize.bitwidths import BitWidths


@pytest.mark.parametrize("mean", [-1.0, 0.2, 0.9])
def test_noise_gives_a_truncated_normal_action(mean: float) -> None:
    actions = truncated_normal(np.full(4000, mean, dtype=np.float32), 0.25, np.random.default_rng(0))
    expected = truncnorm((-1 - mean) / 0.5, (1 - mean) / 0.5, loc=mean, scale=0.5)
    assert np.abs(actions).max() <= 1
    assert actions.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / 4000**0.5)
    assert actions.std() == pytest.approx(expected.std(), rel=0.1)


def test_noise_vanishes_without_becoming_undefined() -> None:
    actions = np.array([-1, 0.3, 1], dtype=np.float32)
    for sigma in (1e-3, 1e-6, 0.0):
        np.testing.assert_allclose(truncated_normal(actions, sigma, np.random.default_rng(0)), actions, atol=0.01)


def test_ddpg_goes_through_the_schedule_of_the_source_once() -> None:
    policy = create("ddpg")
    assert isinstance(policy, DDPGPolicy)
    model = policy.build(BitWidthContinuousEnv(), Run(100, 12, 0))
    assert isinstance(model, OffPolicyAlgorithm)
    observations = np.zeros((2000, model.observation_space.shape[0]), dtype=np.float32)  # type: ignore[index]
    for progress, sigma in ((0.0, 0.2), (0.5, 0.2 * 0.997**290), (1.0, 0.2 * 0.997**580)):
        actions = policy.explore(model, observations, progress, np.random.default_rng(0))
        assert actions.std() == pytest.approx(2 * sigma, rel=0.1)


def test_dqn_explores_less_and_less() -> None:
    policy = create("dqn")
    assert isinstance(policy, DQNPolicy)
    model = policy.build(BitWidthEnv(), Run(100, 6, 0))
    assert isinstance(model, OffPolicyAlgorithm)
    observations = np.zeros((2000, model.observation_space.shape[0]), dtype=np.float32)  # type: ignore[index]
    for progress, share in ((0.0, 1.0), (0.25, 0.525), (0.5, 0.05), (1.0, 0.05)):
        actions = policy.explore(model, observations, progress, np.random.default_rng(0))
        assert (actions == np.bincount(actions).argmax()).mean() == pytest.approx(1 - share * 48 / 49, abs=0.05)


def test_episodes_end_with_the_bits_they_were_asked_for() -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    for kind in (BitWidthEnv, BitWidthContinuousEnv):
        stage = Stage(kind, problem)
        candidate = uniform_candidates(problem)[0]
        episode = stage.episode(candidate)
        env = kind(AnalyticEvaluator(), embedded_budget())
        env.reset()
        for action in episode.actions:
            _, _, done, _, info = env.step(action if kind is BitWidthContinuousEnv else action[0])
            assert not info["projected"]
        assert done and info["bitwidths"] == candidate
        assert len(episode.observations) == len(episode.actions) + 1


def test_the_replay_buffer_gives_each_step_the_reward_of_its_episode() -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    stage = Stage(BitWidthContinuousEnv, problem)
    policy = create("td3")
    assert isinstance(policy, AgentPolicy)
    buffer = policy.build(stage.env, Run(10, 12, 0)).replay_buffer  # type: ignore[attr-defined]
    episodes = [stage.episode(candidate) for candidate in uniform_candidates(problem)[:3]]
    for rewards in ([5.0, 5.0, 5.0], [1.0, -2.0, 0.5]):
        refill(buffer, episodes, np.array(rewards))
        samples = buffer._get_samples(np.arange(36))
        assert samples.rewards.reshape(3, 12).tolist() == [[reward] * 12 for reward in rewards]
        assert samples.dones.min() == 1
        np.testing.assert_array_equal(samples.actions.reshape(3, 12), [e.actions[:, 0] for e in episodes])


def test_imitation_moves_the_actor_to_the_best_episodes() -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    stage = Stage(BitWidthContinuousEnv, problem)
    policy = create("td3", hidden=(32,))
    assert isinstance(policy, AgentPolicy)
    model = policy.build(stage.env, Run(10, 12, 0))
    episode = stage.episode(uniform_candidates(problem)[0])
    imitation = SelfImitation(model, 0)

    def distance() -> float:
        return float(np.abs(model.predict(episode.observations[:-1], deterministic=True)[0] - episode.actions).mean())

    before = distance()
    for _ in range(10):
        imitation.learn([(episode.observations[:-1], episode.actions)])
    assert distance() < 0.5 * before


def test_rewards_are_standardized_over_the_episodes_so_far() -> None:
    env = StandardizedReward(BitWidthEnv())
    env.action_space.seed(0)
    raw: list[float] = []
    for _ in range(6):
        env.reset()
        for _ in EMBEDDED_LAYERS:
            _, reward, done, _, info = env.step(env.action_space.sample())
            assert done or reward == 0
        raw.append(info["reward"])
        expected = (raw[-1] - np.mean(raw)) / np.std(raw) if len(raw) > 1 else 0
        assert reward == pytest.approx(expected)


def test_the_recorder_refuses_what_a_policy_may_not_do() -> None:
    names = [layer.name for layer in EMBEDDED_LAYERS]
    recorder = Recorder(SearchProblem(AnalyticEvaluator(), embedded_budget()), 1)
    with pytest.raises(ArqError, match="exceeds the budget"):
        recorder.evaluate(BitWidths.uniform(names, 8, 8))
    recorder.evaluate(BitWidths.uniform(names, 2, 2))
    assert recorder.done
    with pytest.raises(ArqError, match="1 evaluations of this search are made"):
        recorder.evaluate(BitWidths.uniform(names, 2, 2))


def test_the_evaluator_runs_with_the_callers_threads() -> None:
    seen = []

    class Watching(AnalyticEvaluator):
        def evaluate(self, bitwidths: BitWidths) -> Evaluation:
            seen.append(torch.get_num_threads())
            return super().evaluate(bitwidths)

    with torch_threads(2):
        create("ppo", hidden=[8]).search(SearchProblem(Watching(), embedded_budget()), 3, 0)
        assert torch.get_num_threads() == 2
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("name", ["ddpg", "dqn"])
def test_agents_without_a_model_start_with_the_fullest_uniform_assignments(name: str) -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    shown = create(name, hidden=(16,), warmup_episodes=6, imagined=0).search(problem, 30, seed=0)
    assert [e.bitwidths for e in shown.history[:3]] == uniform_candidates(problem)[:3]
    other = create(name, hidden=(16,), warmup_episodes=6, imagined=0).search(problem, 30, seed=1)
    assert [e.bitwidths for e in other.history[3:6]] != [e.bitwidths for e in shown.history[3:6]]


def test_agents_with_a_model_start_as_greedy_and_then_beat_it() -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    agent = create("ddpg", hidden=(16,)).search(problem, 60, seed=0)
    greedy = create("greedy").search(problem, 60, seed=0)
    assert [e.bitwidths for e in agent.history[:14]] == [e.bitwidths for e in greedy.history[:14]]
    assert agent.best.reward >= greedy.best.reward
    assert len({e.bitwidths for e in agent.history[14:]}) == 46  # Nothing is evaluated twice.


def test_a_batch_is_recorded_as_one_by_one() -> None:
    class Batch(AnalyticEvaluator):
        sizes: ClassVar[list[int]] = []

        def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
            self.sizes.append(len(candidates))
            np.random.seed(1)
            return [self.evaluate(candidate) for candidate in candidates]

    names = [layer.name for layer in EMBEDDED_LAYERS]
    candidates = [BitWidths.uniform(names, 2, b) for b in (2, 3, 2)]
    seen: list[tuple[int, Evaluation]] = []
    histories = []
    for evaluator in (AnalyticEvaluator(), Batch()):
        seen.clear()
        state = np.random.get_state()[1].tolist()
        recorder = Recorder(SearchProblem(evaluator, embedded_budget()), 5, lambda i, e: seen.append((i, e)))
        found = recorder.evaluate_many(candidates)
        assert np.random.get_state()[1].tolist() == state
        assert tuple(found) == recorder.history == tuple(e for _, e in seen)
        assert [i for i, _ in seen] == [0, 1, 2] and recorder.left == 2
        histories.append(recorder.history)
        with pytest.raises(ArqError, match="3 candidates, but only 2 of 5"):
            recorder.evaluate_many(candidates)
    assert histories[0] == histories[1]
    assert Batch.sizes == [3]
