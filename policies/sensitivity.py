"""Sensitivities by measurement: what the reward loses when one part of the network gets fewer bits.

A *part* is the weights or the activations of one layer. Every evaluated candidate of a search meets the budget, so the
parts are not lowered from 8 bits everywhere but from a uniform assignment within budget (`balanced`). A part that has
the smallest bits there is raised by one choice instead, where that fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arqsearch.policies.recorder import Recorder
from arqsearch.policies.space import ChoiceSpace, Point

#: Factor by which the mean squared error of uniform quantization falls with each bit.
DECAY = 4.0


@dataclass(frozen=True)
class Sensitivities:
    """What was measured.

    :param base: the assignment that parts were lowered from, choice numbers (layers, 2).
    :param base_reward: its reward.
    :param scale: reward lost per unit of noise power, (layers, 2), never negative.
    :param measured: whether the part was measured, (layers, 2); the others have the median of the measured ones.
    :param noise: noise power of each choice, 4^−(bits − 2), (choices,).
    """

    base: Point
    base_reward: float
    scale: NDArray[np.float64]
    measured: NDArray[np.bool_]
    noise: NDArray[np.float64]

    def loss(self, layer: int, part: int, choice: int) -> float:
        """Predicted reward lost by a part at a choice, against no quantization of it.

        :param layer: position among the searched layers.
        :param part: 0 for weights, 1 for activations.
        :param choice: choice number.
        """
        return float(self.scale[layer, part] * self.noise[choice])


def noise_power(bits: NDArray[np.int64]) -> NDArray[np.float64]:
    """4^−(b − 2): relative mean squared error of uniform quantization to b bits.

    :param bits: bits of each choice.
    """
    power: NDArray[np.float64] = DECAY ** -(bits - 2).astype(np.float64)
    return power


def balanced(space: ChoiceSpace) -> Point:
    """The uniform assignment within budget whose weights and activations have the least noise power together.

    The fullest one may be lopsided: 8/2 costs as many BOPs as 4/4.

    :param space: the feasible set.
    """
    noise = noise_power(space.choices)
    return min(space.uniform(), key=lambda point: float(noise[point].sum()))


def measure(recorder: Recorder, space: ChoiceSpace, limit: int | None = None) -> Sensitivities:
    """Evaluate the base and one change of each part, as far as evaluations are left; parts of large cost first.

    All are handed over together. At most 1 + 2 · layers evaluations.

    :param recorder: where they are counted.
    :param space: the feasible set.
    :param limit: most evaluations to make, at least 1; default: as many as there are parts, and one.
    """
    base = balanced(space)
    noise = noise_power(space.choices)
    probes: list[tuple[int, int, Point]] = []
    for layer, part in _by_cost(space):
        changed = base.copy()
        if base[layer, part] > 0:
            changed[layer, part] = 0
        elif len(space.choices) > 1:
            changed[layer, part] = 1
        if not np.array_equal(changed, base) and space.met(changed):
            probes.append((layer, part, changed))
    probes = probes[: min(recorder.left, limit or recorder.left) - 1]
    found = recorder.evaluate_many([space.bitwidths(base), *(space.bitwidths(point) for _, _, point in probes)])
    reward = found[0].reward
    scale, measured = np.zeros((space.layers, 2)), np.zeros((space.layers, 2), dtype=np.bool_)
    for (layer, part, point), evaluation in zip(probes, found[1:], strict=True):
        step = noise[point[layer, part]] - noise[base[layer, part]]
        scale[layer, part] = max((reward - evaluation.reward) / step, 0.0)
        measured[layer, part] = True
    if measured.any():
        scale[~measured] = np.median(scale[measured])
    else:
        scale[:] = 1.0
    return Sensitivities(base, reward, scale, measured, noise)


def _by_cost(space: ChoiceSpace) -> list[tuple[int, int]]:
    """(layer, part), the part whose most bits cost the largest share of a limit first."""
    count = len(space.choices)
    top = {0: (count - 1) * count, 1: count - 1}
    share = {
        (layer, part): float((space.excess[layer, top[part]] / np.maximum(space.slack, 1)).max(initial=0.0))
        for layer in range(space.layers)
        for part in (0, 1)
    }
    return sorted(share, key=lambda key: (-share[key], key))
