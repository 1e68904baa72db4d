"""The smoothed classifier without sampling: exact class probabilities of a tiny network, by enumeration of the noise.

Probabilities are integers in units of 2^(−64·d), so nothing is rounded before the last comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from arqsearch.certify.binomial import grey_levels_squared
from arqsearch.certify.smoothing import Classifier

#: What a comparison of two probits may lose to float64.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class SmoothedGrid:
    """Exact class probabilities at every integer image of a box.

    :param points: the images, ``(points, d)``.
    :param weights: 2^(64·d)·P(F(x+Z)=c) as Python integers, ``(points, classes)``.
    :param s: standard deviation of the noise in grey levels.
    :param d_tau: distance of the noise from the ideal rounded Gaussian, summed over the coordinates.
    """

    points: NDArray[np.int64]
    weights: NDArray[np.object_]
    s: float
    d_tau: float

    @property
    def total(self) -> int:
        """Weight of certainty, 2^(64·d)."""
        return 1 << (64 * int(self.points.shape[1]))

    @property
    def squared_distances(self) -> NDArray[np.int64]:
        """‖x' − x‖² in grey levels, ``(points, points)``."""
        squares: NDArray[np.int64] = (self.points[:, None] - self.points[None]) ** 2
        return np.asarray(squares.sum(2))

    @property
    def classes(self) -> NDArray[np.int64]:
        """The smoothed class of every image, the first one among equals."""
        return np.array([max(range(len(row)), key=lambda c: (row[c], -c)) for row in self.weights])

    def probabilities(self) -> NDArray[np.float64]:
        """P(F(x+Z)=c), correctly rounded, ``(points, classes)``."""
        return _share(self.weights, self.total)

    def steepest(self) -> float:
        """Largest change of a probit Φ⁻¹(P(F(x+Z)=c)) over ‖x' − x‖/s: the theorem says 1 at most.

        The classes and their complements are compared between all pairs of images; each probability counts with
        the d·τ that favours the theorem.
        """
        distance = np.sqrt(self.squared_distances) / self.s
        apart = distance > 0
        worst = 0.0
        for name in range(self.weights.shape[1]):
            low, high = self._probits(self.weights[:, name])
            with np.errstate(invalid="ignore"):  # Two certainties, ∞ − ∞, do not differ.
                rise = np.nan_to_num(low[None] - high[:, None], nan=0.0, posinf=np.inf, neginf=-np.inf)
            worst = max(worst, float(((rise[apart] - TOLERANCE) / distance[apart]).max(initial=0.0)))
        return worst

    def _probits(self, weights: NDArray[np.object_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Φ⁻¹(P − d·τ) and Φ⁻¹(P + d·τ), each from the smaller tail."""
        p, q = _share(weights, self.total), _share(self.total - weights, self.total)
        ends = []
        for shift in (-self.d_tau, self.d_tau):
            lower, upper = np.clip(p + shift, 0, 1), np.clip(q - shift, 0, 1)
            ends.append(np.where(p < q, ndtri(lower), -ndtri(upper)))
        return ends[0], ends[1]

    def radii(self) -> NDArray[np.float64]:
        """Certified radius of the smoothed class in [0,1] pixels, rounded down to 10⁻⁶; −1 where there is none."""
        best = self.weights[np.arange(len(self.points)), self.classes]
        certain = 40.0  # A probit beyond every distance that matters: certainty without d·τ has an infinite one.
        probits = np.minimum(self._probits(best)[0], certain)
        steps = np.floor((self.s / 255 * probits - TOLERANCE) * 1e6)
        return np.where(steps >= 0, steps / 1e6, -1.0)

    def contradictions(self, inflate: float = 1.0) -> int:
        """Pairs (certified image, image in its certified set) of different smoothed classes.

        :param inflate: factor on the radii, for sets that are not certified.
        """
        distances, classes, found = self.squared_distances, self.classes, 0
        for index, radius in enumerate(self.radii()):
            if radius >= 0:
                inside = distances[index] <= grey_levels_squared(radius * inflate)
                found += int((classes[inside] != classes[index]).sum())
        return found


def smoothed_grid(
    classify: Classifier, shape: tuple[int, int, int], centre: int, reach: int, masses: Sequence[int], s: float,
    d_tau: float, classes: int,
) -> SmoothedGrid:  # fmt: skip
    """Enumerate the noise at every image whose pixels lie in ``centre − reach .. centre + reach``.

    :param classify: deterministic function of int16 ``(N, H, W, C)``.
    :param shape: ``(H, W, C)``, three pixels at most.
    :param masses: 2^64·P(Z=k) for k = −h .. h; sums to 2^64.
    :param s: standard deviation of the noise in grey levels.
    :param d_tau: distance of the noise from the ideal, summed over the coordinates.
    :param classes: number of classes.
    """
    assert sum(masses) == 1 << 64
    dimensions, h = int(np.prod(shape)), len(masses) // 2
    side = np.arange(centre - reach - h, centre + reach + h + 1, dtype=np.int16)
    noisy = np.stack(np.meshgrid(*[side] * dimensions, indexing="ij"), -1).reshape(-1, *shape)
    answers = classify(torch.from_numpy(noisy)).numpy().reshape((len(side),) * dimensions)
    weights = []
    for name in range(classes):
        grid = (answers == name).astype(object)
        for axis in range(dimensions):
            grid = _correlate(grid, masses, axis, 2 * reach + 1)
        weights.append(grid.ravel())
    inner = range(centre - reach, centre + reach + 1)
    points = np.array(list(itertools.product(inner, repeat=dimensions)), dtype=np.int64)
    grid = SmoothedGrid(points, np.stack(weights, 1), s, d_tau)
    assert all(sum(row) == grid.total for row in grid.weights)
    return grid


def _correlate(grid: NDArray[np.object_], masses: Sequence[int], axis: int, length: int) -> NDArray[np.object_]:
    lines = np.moveaxis(grid, axis, 0)
    return np.moveaxis(sum(mass * lines[k : k + length] for k, mass in enumerate(masses) if mass), 0, axis)


def _share(weights: NDArray[np.object_], total: int) -> NDArray[np.float64]:
    """Integers over an integer, each correctly rounded."""
    return np.array([int(w) / total for w in weights.ravel()]).reshape(weights.shape)
