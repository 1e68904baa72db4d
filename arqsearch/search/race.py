"""Early stopping of losing candidates by a valid sequential test.

A candidate is compared with a frozen incumbent on the same images and the same noise. Let d_1, ..., d_N be its value
minus the incumbent's on each of the N images of a full evaluation. Hypothesis: the mean of all N is at least m, the
amount by which the candidate would win or draw. The images come in a random order that depends on nothing but the
candidate's bits, so the differences are a sample without replacement from a fixed list, however the incumbent and the
candidate were chosen. Given the first t-1 of them, with sum S, the mean of the rest is at least
m_t = (N·m - S) / (N - t + 1), and with a stake f in [0, 1]

    K_t = K_{t-1} · (1 + f · (m_t - d_t) / (high - m_t)),    K_0 = 1

is a non-negative supermartingale, where no difference exceeds `high`: by Ville's inequality it ever reaches 1/δ with
probability at most δ. So does the mean over several stakes. (Waudby-Smith and Ramdas, "Estimating means of bounded
random variables by betting", JRSS-B 2024, section on sampling without replacement.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Stakes f; few large differences are told by small ones, many small differences by large ones.
STAKES = (0.15, 0.4, 0.7, 0.95)


@dataclass(frozen=True)
class Race:
    """What a candidate is raced against, and how.

    :param values: the incumbent's value on each image, ``(N,)``, in the unit of the term.
    :param high: largest value that a candidate can have on an image.
    :param goal: the candidate is good enough when its mean exceeds the incumbent's by at least this.
    :param delta: probability of stopping such a candidate, at most.
    :param block: images between two looks.
    """

    values: tuple[float, ...]
    high: float
    goal: float
    delta: float
    block: int

    def stops(self, order: Sequence[int], scores: Sequence[float]) -> int | None:
        """After how many images the candidate is stopped; None when it is not, so far.

        :param order: positions of the images in their random order, at least as many as scores.
        :param scores: the candidate's values on the first of them.
        """
        differences = np.asarray(scores, dtype=float) - np.asarray(self.values)[list(order[: len(scores)])]
        # A candidate's difference on an image is at most the largest value less the incumbent's smallest one.
        bound = self.high - min(self.values)
        found = capital(differences, len(self.values), self.goal, bound)
        sums = np.cumsum(differences)
        for seen in range(self.block, len(differences) + 1, self.block):
            # The second condition costs no validity; with it, a stopped candidate's estimate lies below the incumbent.
            if seen < len(self.values) and found[seen - 1] >= 1 / self.delta and sums[seen - 1] < seen * self.goal:
                return seen
        return None


def capital(differences: NDArray[np.float64], population: int, mean: float, high: float) -> NDArray[np.float64]:
    """Capital K_t of the test after each difference, the mean over :data:`STAKES`; inf once the hypothesis cannot be.

    :param differences: the first of them, in random order.
    :param population: N, how many there are in all.
    :param mean: m, the smallest mean of all N that the hypothesis allows.
    :param high: no difference is larger.
    """
    stakes = np.asarray(STAKES)
    current, total = np.ones(len(stakes)), 0.0
    path = np.empty(len(differences))
    for index, difference in enumerate(differences):
        expected = (population * mean - total) / (population - index)
        room = high - expected
        if room < -1e-9 * max(1.0, abs(high)):  # Even the largest values on all other images would not do.
            current = np.full(len(stakes), np.inf)
        elif room > 1e-12:
            current = current * (1 + stakes * (expected - difference) / room)
        path[index] = current.mean()
        total += float(difference)
    return path


def random_order(seed: int, bitwidths: str, images: int) -> list[int]:
    """The candidate's order of images: random, the same everywhere, and nothing that a searcher could have used.

    :param bitwidths: the candidate, as JSON.
    :param images: N.
    """
    prefix = f"order of images {seed} {bitwidths} ".encode()
    return sorted(range(images), key=lambda image: hashlib.sha256(prefix + str(image).encode()).digest())
