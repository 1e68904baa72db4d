"""HAQ's exploration: the action is drawn from a truncated normal around the actor's action, narrower each episode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from stable_baselines3.common.noise import ActionNoise

#: Standard deviation that changes no bits, below which a truncated normal cannot be computed stably.
_NEGLIGIBLE = 1e-4


class TruncatedNormalNoise(ActionNoise):
    """Noise such that action + noise is normal around the action, truncated to [−1, 1].

    Plain Gaussian noise would be clipped, and so would pile up on the smallest and the largest bits. Source:
    HAQ (Wang et al., CVPR 2019): σ = 0.5 · 0.99^k of the [0, 1] action in the k-th episode after the warm-up.

    :param action: gives the actor's current action, array (1,) in [−1, 1].
    :param sigma: standard deviation in the first episode after the warm-up, in units of the [0, 1] action.
    :param decay: factor of sigma per episode.
    :param seed: seed of the noise.
    """

    def __init__(
        self,
        action: Callable[[], NDArray[np.float32]],
        sigma: float,
        decay: float,
        seed: int,
    ) -> None:
        super().__init__()
        self._action = action
        self._sigma = sigma
        self._decay = decay
        self._generator = np.random.default_rng(seed)
        # The agent resets its noise once before the first episode, and then after each.
        self._episode = -1

    @property
    def sigma(self) -> float:
        """Standard deviation of the current episode in units of the [0, 1] action."""
        return self._sigma * self._decay ** max(self._episode, 0)

    def reset(self) -> None:
        """Go to the next episode."""
        self._episode += 1

    def __call__(self) -> NDArray[np.float32]:
        """Draw the noise for the current action; array (1,)."""
        mean = np.asarray(self._action(), dtype=np.float64).reshape(-1)
        scale = 2 * self.sigma
        if scale < _NEGLIGIBLE:
            return np.zeros(mean.shape, dtype=np.float32)
        low, high = ndtr((-1 - mean) / scale), ndtr((1 - mean) / scale)
        drawn = np.clip(mean + scale * ndtri(self._generator.uniform(low, high)), -1, 1)
        return np.asarray(drawn - mean, dtype=np.float32)
