"""The environments keep Gymnasium's contract, end within budget and report what they did."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from arqsearch.envs import BitWidthContinuousEnv, BitWidthEnv
from arqsearch.envs.analytic import EMBEDDED_LAYERS, AnalyticEvaluator, embedded_budget
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost

IDS = ("arqsearch/BitWidth-v0", "arqsearch/BitWidthContinuous-v0")


@pytest.fixture(params=IDS)
def env(request: pytest.FixtureRequest) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(request.param).unwrapped


def test_both_checkers_pass_without_warnings(env: gymnasium.Env[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        sb3_check_env(env)


def test_every_random_episode_ends_within_budget(env: gymnasium.Env[Any, Any]) -> None:
    env.action_space.seed(0)
    projected = 0
    for _ in range(50):
        observation, info = env.reset()
        done = False
        while not done:
            assert observation in env.observation_space
            observation, reward, done, truncated, info = env.step(env.action_space.sample())
            projected += info["projected"]
            assert (info["bits"] != info["requested"]) == info["projected"]
            assert not truncated
            assert done or reward == 0
        assert observation in env.observation_space
        assert embedded_budget().met(EMBEDDED_LAYERS, info["bitwidths"])
        expected = AnalyticEvaluator().evaluate(info["bitwidths"])
        assert (reward, info["reward"], info["terms"]) == (expected.reward, expected.reward, expected.terms)
        assert info["cost"] == {
            name: total_cost(name, EMBEDDED_LAYERS, info["bitwidths"]) for name in ("bops", "weight_bytes")
        }
    assert projected > 0


def test_step_after_the_end_is_refused(env: gymnasium.Env[Any, Any]) -> None:
    with pytest.raises(ArqError, match="reset"):
        env.step(env.action_space.sample())


def test_requesting_the_largest_bits_spends_the_budget_on_the_first_layers() -> None:
    env = BitWidthEnv()
    env.reset()
    infos = [env.step(np.int64(48))[-1] for _ in EMBEDDED_LAYERS]
    assert infos[0]["bits"] == infos[0]["requested"] == (8, 8)
    assert infos[-1]["projected"]
    assert infos[-1]["requested"] == (8, 8)


def test_continuous_actions_map_to_equal_intervals() -> None:
    env = BitWidthContinuousEnv(AnalyticEvaluator())
    seen = []
    for value in np.linspace(-1, 1, 71)[:-1] + 1 / 71:
        env.reset()
        seen.append(env.step(np.array([value], dtype=np.float32))[-1]["requested"])
    assert seen == sorted(seen)
    assert [seen.count(bits) for bits in range(2, 9)] == [10] * 7
    for value, bits in ((-1.0, 2), (1.0, 8), (-3.0, 2), (3.0, 8)):
        env.reset()
        assert env.step(np.array([value], dtype=np.float32))[-1]["bits"] == bits


def test_continuous_steps_set_the_activation_then_the_weight() -> None:
    env = BitWidthContinuousEnv(AnalyticEvaluator(), choices=(2, 4, 8))
    observation, _ = env.reset()
    assert observation[8:10].tolist() == [1, 0]
    observation, _, _, _, first = env.step(np.array([-1], dtype=np.float32))
    assert observation[8:10].tolist() == [0, 1]
    _, _, _, _, second = env.step(np.array([0], dtype=np.float32))
    assert (first["part"], first["bits"], second["part"], second["bits"]) == ("activation", 2, "weight", 4)
    for _ in range(10):
        info = env.step(np.array([1], dtype=np.float32))[-1]
    assert info["bitwidths"]["conv1"] == (4, 2)
    assert info["bitwidths"]["fc"] == (8, 8)


def test_observations_hold_the_documented_features() -> None:
    env = BitWidthEnv(fixed={"conv1": (8, 8)})
    observation, _ = env.reset()
    # conv2: not depthwise; c_in 8 of 3..32; c_out 16 of 8..32; stride 2 of 1..2; kernel 3 of 1..3;
    # 1152 weights of 144..9216; input 256 of 1..256; index 1 of 0..5; 8/8 before; whole slacks.
    expected = [0, 5 / 29, 8 / 24, 1, 1, (1152 - 144) / (9216 - 144), 1, 1 / 5, 1, 1, 1, 1]
    assert observation == pytest.approx(expected, abs=1e-6)
    observation, _, _, _, info = env.step(np.int64(2 * 7 + 1))
    assert info["bits"] == (4, 3) and not info["projected"]
    assert observation[0] == 1
    assert observation[8:10] == pytest.approx([2 / 6, 1 / 6])
    assert (observation[10:] < 1).all()


def test_slack_falls_with_the_activation_bits_already() -> None:
    env = BitWidthContinuousEnv(budget=Budget((("bops", embedded_budget().limits[0][1]),)))
    env.reset()
    observation, *_ = env.step(np.array([1], dtype=np.float32))
    assert observation[10] < 1


def test_fixed_layers_are_not_stepped_and_keep_their_bits() -> None:
    for cls, steps in ((BitWidthEnv, 4), (BitWidthContinuousEnv, 8)):
        env = cls(fixed={"conv1": (8, 8), "fc": (8, 6)})
        assert env.steps_per_episode == steps
        env.reset(seed=1)
        env.action_space.seed(1)
        for _ in range(steps):
            _, _, done, _, info = env.step(env.action_space.sample())
        assert done
        assert info["bitwidths"]["conv1"] == (8, 8) and info["bitwidths"]["fc"] == (8, 6)
        assert info["bitwidths"].names == tuple(layer.name for layer in EMBEDDED_LAYERS)


def test_a_network_of_equal_layers_has_zero_features() -> None:
    layers = tuple(LayerInfo(f"fc{i}", "linear", 4, 4) for i in range(3))
    observation, _ = BitWidthEnv(AnalyticEvaluator(layers, [(0.1, 0.1)] * 3)).reset()
    assert observation.tolist() == [0] * 8 + [1, 1]


@pytest.mark.parametrize("action", [-1, 49])
def test_an_action_outside_the_space_is_refused(action: int) -> None:
    env = BitWidthEnv()
    env.reset()
    with pytest.raises(ArqError, match="outside"):
        env.step(np.int64(action))


def test_an_action_that_is_not_finite_is_refused() -> None:
    env = BitWidthContinuousEnv()
    env.reset()
    with pytest.raises(ArqError, match="finite"):
        env.step(np.array([np.nan], dtype=np.float32))


def test_the_analytic_score_has_diminishing_returns() -> None:
    names = [layer.name for layer in EMBEDDED_LAYERS]
    rewards = [AnalyticEvaluator().evaluate(BitWidths.uniform(names, b, b)).reward for b in range(2, 9)]
    gains = np.diff(rewards)
    assert rewards[-1] == 0
    assert (gains > 0).all() and (np.diff(gains) < 0).all()


def test_the_analytic_score_refuses_wrong_sensitivities() -> None:
    with pytest.raises(ArqError, match="one pair a layer"):
        AnalyticEvaluator(EMBEDDED_LAYERS, [(0.5, 0.5)])
    with pytest.raises(ArqError, match=r"\[0, 1\]"):
        AnalyticEvaluator(EMBEDDED_LAYERS[:1], [(0.5, 1.5)])
