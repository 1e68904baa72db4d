"""The parts of the agents: exploration noise, standardized reward, recorder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from arqsearch.envs import BitWidthContinuousEnv, BitWidthEnv
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator, embedded_budget
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.policies import SearchProblem, create
from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.determinism import torch_threads
from arqsearch.policies.noise import TruncatedNormalNoise
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.reward import StandardizedReward
from arqsearch.policies.uniform import uniform_candidates
from arqsearch.quantize.bitwidths import BitWidths


@pytest.mark.parametrize("mean", [-1.0, 0.2, 0.9])
def test_noise_gives_a_truncated_normal_action(mean: float) -> None:
    noise = TruncatedNormalNoise(lambda: np.array([mean], dtype=np.float32), 0.25, 0.9, seed=0)
    noise.reset()
    actions = np.array([mean + noise()[0] for _ in range(4000)])
    expected = truncnorm((-1 - mean) / 0.5, (1 - mean) / 0.5, loc=mean, scale=0.5)
    assert np.abs(actions).max() <= 1 + 1e-6
    assert actions.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / 4000**0.5)
    assert actions.std() == pytest.approx(expected.std(), rel=0.1)


def test_noise_decays_by_episode() -> None:
    noise = TruncatedNormalNoise(lambda: np.zeros(1, dtype=np.float32), 0.5, 0.9, seed=0)
    sigmas = []
    for _ in range(3):
        noise.reset()
        sigmas.append(noise.sigma)
    assert sigmas == pytest.approx([0.5, 0.45, 0.405])


def test_noise_vanishes_without_becoming_undefined() -> None:
    noise = TruncatedNormalNoise(lambda: np.ones(1, dtype=np.float32), 0.5, 1e-5, seed=0)
    for _ in range(100):
        noise.reset()
        assert np.isfinite(noise()).all()


def test_ddpg_compresses_the_schedule_of_the_source() -> None:
    policy = create("ddpg")
    assert isinstance(policy, AgentPolicy)
    for evaluations, last in ((600, 0.2 * 0.997**580), (100, 0.2 * 0.997**580), (1200, 0.2 * 0.997**1180)):
        model = policy.build(BitWidthContinuousEnv(), Run(evaluations, 12, 0))
        noise = model.action_noise  # type: ignore[attr-defined]
        # The agent acts in the episodes after the warm-up of 20, and resets once more before the first.
        for _ in range(evaluations - 20 + 1):
            noise.reset()
        assert noise.sigma == pytest.approx(last)


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
def test_replay_agents_start_with_the_fullest_uniform_assignments(name: str) -> None:
    problem = SearchProblem(AnalyticEvaluator(), embedded_budget())
    shown = create(name, warmup_episodes=6).search(problem, 30, seed=0)
    assert [e.bitwidths for e in shown.history[:3]] == uniform_candidates(problem)[:3]
    other = create(name, warmup_episodes=6).search(problem, 30, seed=1)
    assert [e.bitwidths for e in other.history[3:6]] != [e.bitwidths for e in shown.history[3:6]]
