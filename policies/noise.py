"""HAQ's exploration: the action is drawn from a truncated normal around the actor's action."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

#: Standard deviation that changes no bits, below which a truncated normal cannot be computed stably.
_NEGLIGIBLE = 1e-4


def truncated_normal(actions: NDArray[np.float32], sigma: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Actions drawn around others, normal and truncated to [−1, 1].

    Plain Gaussian noise would be clipped, and so would pile up on the smallest and the largest bits. Source: HAQ (Wang
    et al., CVPR 2019).

    :param actions: the actor's actions in [−1, 1], any shape.
    :param sigma: standard deviation in units of the [0, 1] action.
    :param generator: source of randomness.
    """
    mean = np.asarray(actions, dtype=np.float64)
    scale = 2 * sigma
    if scale < _NEGLIGIBLE:
        return np.asarray(actions, dtype=np.float32)
    low, high = ndtr((-1 - mean) / scale), ndtr((1 - mean) / scale)
    drawn = mean + scale * ndtri(generator.uniform(low, high))
    clipped: NDArray[np.float32] = np.clip(drawn, -1, 1).astype(np.float32)
    return clipped
