"""`ChoiceSpace`: the feasible set as integer arrays, for searchers that compute over all layers at once."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.feasibility import Feasibility
from arqsearch.policies.base import SearchProblem
from arqsearch.policies.random_search import sample_feasible
from arqsearch.policies.uniform import uniform_candidates
from arqsearch.quantize.bitwidths import BitWidths, LayerBits

#: Choice numbers of every searched layer: int array (layers, 2), columns weights and activations.
Point = NDArray[np.int64]

WEIGHT, ACTIVATION = 0, 1
#: Sweeps of the sampler behind :meth:`ChoiceSpace.sample`.
SWEEPS = 30


class ChoiceSpace:
    """Assignments of the searched layers as arrays of choice numbers.

    A *part* is the weights or the activations of one layer; choice number i means ``choices[i]`` bits.

    :param problem: what is searched.
    :raises ArqError: when the budget cannot be met.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        self.feasibility: Feasibility = problem.feasibility()
        self.choices = np.array(self.feasibility.choices, dtype=np.int64)
        self.names = tuple(layer.name for layer in self.feasibility.searched)
        pairs = self.feasibility.pairs
        #: Cost above the smallest bits, int array (layers, pairs, limits); pair = weight · choices + activation.
        self.excess = np.array(
            [[self.feasibility.excess(index, pair) for pair in pairs] for index in range(len(self.names))],
            dtype=np.int64,
        ).reshape(len(self.names), len(pairs), len(self.feasibility.initial_slack))
        self.slack = np.array(self.feasibility.initial_slack, dtype=np.int64)

    @property
    def layers(self) -> int:
        """Number of searched layers."""
        return len(self.names)

    @property
    def smallest(self) -> Point:
        """The smallest assignment; always feasible."""
        return np.zeros((self.layers, 2), dtype=np.int64)

    def bitwidths(self, point: Point) -> BitWidths:
        """The assignment of every layer, fixed ones included.

        :param point: choice numbers (layers, 2).
        """
        bits = {name: LayerBits(int(w), int(a)) for name, (w, a) in zip(self.names, self.choices[point], strict=True)}
        return self.feasibility.complete(bits)

    def point(self, bitwidths: BitWidths) -> Point:
        """Inverse of :meth:`bitwidths`.

        :param bitwidths: bits of every layer, those of the searched ones among the choices.
        """
        bits = np.array([bitwidths[name] for name in self.names], dtype=np.int64)
        return np.searchsorted(self.choices, bits).astype(np.int64)

    def points(self, candidates: Iterable[BitWidths]) -> NDArray[np.int64]:
        """Choice numbers of several assignments, (candidates, layers, 2)."""
        return np.array([self.point(bitwidths) for bitwidths in candidates], dtype=np.int64).reshape(-1, self.layers, 2)

    def costs(self, point: Point) -> NDArray[np.int64]:
        """Cost above the smallest assignment, one for each limit.

        :param point: choice numbers (layers, 2).
        """
        pair = point[:, WEIGHT] * len(self.choices) + point[:, ACTIVATION]
        total: NDArray[np.int64] = self.excess[np.arange(self.layers), pair].sum(axis=0)
        return total

    def shares(self, point: Point) -> NDArray[np.float64]:
        """:meth:`costs` as shares of what each limit leaves above the smallest assignment.

        :param point: choice numbers (layers, 2).
        """
        return self.costs(point) / np.maximum(self.slack, 1)

    def met(self, point: Point) -> bool:
        """Whether an assignment meets every limit.

        :param point: choice numbers (layers, 2).
        """
        return bool((self.costs(point) <= self.slack).all())

    def shrunk(self, point: Point) -> Point:
        """The nearest feasible point on the way to the smallest assignment.

        Choice numbers i become round(t · i) for the largest t ≤ 1 that meets every limit, so that the proportions
        between layers are kept. A feasible point stays as it is.

        :param point: choice numbers (layers, 2).
        """
        if self.met(point):
            return point
        # round(t·i) steps where t·i = k − ½; between two such t nothing changes.
        steps = sorted({(k - 0.5) / i for i in np.unique(point).tolist() if i > 0 for k in range(1, i + 1)})
        low, high = -1, len(steps) - 1  # steps[high] is infeasible, everything below steps[0] is the smallest.
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.met(_scaled(point, steps[middle])) else (low, middle)
        return _scaled(point, steps[low]) if low >= 0 else self.smallest

    def sample(self, generator: random.Random) -> Point:
        """One assignment, uniform over the feasible set in the limit.

        :param generator: source of randomness.
        """
        return self.point(sample_feasible(self.feasibility, generator, SWEEPS).bitwidths())

    def uniform(self) -> list[Point]:
        """The uniform assignments within budget, the fullest first."""
        return [self.point(bitwidths) for bitwidths in uniform_candidates(self.problem)]


def _scaled(point: Point, factor: float) -> Point:
    # A hair above the step itself, so that rounding errors cannot hide it.
    scaled: Point = np.floor(point * (factor * (1 + 1e-12)) + 0.5).astype(np.int64)
    return scaled
