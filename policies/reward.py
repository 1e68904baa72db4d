"""`StandardizedReward`: terminal rewards with zero mean and unit variance over the episodes so far."""

from __future__ import annotations

import math
from typing import Any

import gymnasium


class StandardizedReward(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Replace each episode's terminal reward r by (r − mean) / standard deviation of all terminal rewards so far.

    The spread of the rewards depends on the terms (hundredths of a radius, or tens of per cent), while an agent's
    learning rate and entropy bonus do not. HAQ subtracts a moving average for the same reason. The first reward, and
    rewards that never vary, become 0. The unchanged reward stays in ``info["reward"]``.

    :param env: environment whose reward is 0 before the last step of an episode.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment and standardize the last reward of the episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not (terminated or truncated):
            return observation, float(reward), terminated, truncated, info
        return observation, self._standardize(float(reward)), terminated, truncated, info

    def _standardize(self, reward: float) -> float:
        """Welford's update of mean and variance, then the standard score."""
        self._count += 1
        deviation = reward - self._mean
        self._mean += deviation / self._count
        self._squares += deviation * (reward - self._mean)
        spread = math.sqrt(self._squares / self._count)
        return (reward - self._mean) / spread if spread > 0 else 0.0
