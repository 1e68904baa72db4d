"""Hill climbing of a quadratic function over the feasible set, by moves of one layer or two layers at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arqsearch.policies.space import ChoiceSpace, Point
from arqsearch.policies.surrogate import Quadratic

#: A layer of a two-layer move changes its choice numbers by at most this much in sum.
REACH = 2
#: Improvements below this share of the function's largest table entry are rounding errors.
TOLERANCE = 1e-9


class Climber:
    """Best-improvement hill climbing; deterministic.

    A move gives one layer any other pair, or changes two layers by at most two bits each: one pays for the other, which
    a tight budget demands.

    :param space: the feasible set.
    """

    def __init__(self, space: ChoiceSpace) -> None:
        self._space = space
        count = len(space.choices)
        grid = np.arange(count * count)
        self._weight, self._activation = grid // count, grid % count

    def climb(self, function: Quadratic, start: Point, avoid: frozenset[bytes] = frozenset()) -> Point:
        """A local maximum reached from `start` that is none of `avoid` where there is another in reach.

        :param function: what is maximised.
        :param start: feasible choice numbers (layers, 2).
        :param avoid: :meth:`key` of points that are wanted no more; the best neighbour is taken instead.
        :returns: feasible choice numbers (layers, 2).
        """
        point = start
        tolerance = TOLERANCE * max(float(np.abs(function.linear).max()), 1e-300)
        while True:
            moves = self._moves(function, point, 0)
            if not len(moves.gains) or moves.gains[0] <= tolerance:
                moves = self._moves(function, point, REACH)
            if not len(moves.gains) or moves.gains[0] <= tolerance:
                break
            point = moves.apply(point, 0)
        return self.neighbour(function, point, avoid) if self.key(point) in avoid else point

    def neighbour(self, function: Quadratic, point: Point, avoid: frozenset[bytes]) -> Point:
        """The best point one move away that is none of `avoid`; the point itself when there is no such.

        :param function: what is maximised.
        :param point: feasible choice numbers (layers, 2).
        :param avoid: :meth:`key` of points that are wanted no more.
        """
        moves = self._moves(function, point, REACH)
        reached = (moves.apply(point, index) for index in range(len(moves.gains)))
        return next((found for found in reached if self.key(found) not in avoid), point)

    @staticmethod
    def key(point: Point) -> bytes:
        """A hashable name of a point."""
        return point.tobytes()

    def _moves(self, function: Quadratic, point: Point, reach: int) -> _Moves:
        """Feasible moves, the best first: single layers for reach 0, else also two layers within that reach."""
        space, layers = self._space, self._space.layers
        count = len(space.choices)
        part_gain, pairs = _part_gains(function, point)
        held_w, held_a = point[:, 0], point[:, 1]
        rows = np.arange(layers)
        w, a = self._weight, self._activation
        # Within a layer, weights and activations interact as well.
        block = pairs.reshape(layers, 2, count, layers, 2, count)[rows, 0, :, rows, 1, :]
        inner = (
            block[:, w, a]
            - block[rows[:, None], w[None, :], held_a[:, None]]
            - block[rows[:, None], held_w[:, None], a[None, :]]
            + block[rows, held_w, held_a][:, None]
        )
        gain = part_gain[0::2][:, w] + part_gain[1::2][:, a] + inner
        held = held_w * count + held_a
        extra = space.excess - space.excess[rows, held][:, None, :]
        slack = space.slack - space.costs(point)
        fits = (extra <= slack).all(axis=2)
        fits[rows, held] = False
        layer, pair = np.nonzero(fits)
        single = _Moves(gain[layer, pair], np.stack([layer, pair], axis=1)[:, None, :], count)
        if reach == 0 or layers < 2:
            return single.sorted()
        near = np.abs(w[None, :] - held_w[:, None]) + np.abs(a[None, :] - held_a[:, None])
        layer, pair = np.nonzero((near <= reach) & (near > 0))
        change = np.zeros((len(layer), layers, 2, count))
        index = np.arange(len(layer))
        change[index, layer, 0, w[pair]] += 1
        change[index, layer, 0, held_w[layer]] -= 1
        change[index, layer, 1, a[pair]] += 1
        change[index, layer, 1, held_a[layer]] -= 1
        flat = change.reshape(len(layer), -1)
        size = flat.shape[1]
        joint = gain[layer, pair][:, None] + gain[layer, pair][None, :] + flat @ pairs.reshape(size, size) @ flat.T
        allowed = layer[:, None] < layer[None, :]
        for limit in range(len(slack)):
            cost = extra[layer, pair, limit]
            allowed &= cost[:, None] + cost[None, :] <= slack[limit]
        first, second = np.nonzero(allowed)
        double = _Moves(
            joint[first, second],
            np.stack([np.stack([layer[i], pair[i]], axis=1) for i in (first, second)], axis=1),
            count,
        )
        return single.joined(double).sorted()


class _Moves:
    """Changes of one or two layers, (moves, layers changed, (layer, pair)), with their gains."""

    def __init__(self, gains: NDArray[np.float64], changes: NDArray[np.int64], choices: int) -> None:
        self.gains, self._changes, self._choices = gains, changes, choices

    def joined(self, other: _Moves) -> _Moves:
        """Both lists; a one-layer move is written as the same change twice."""
        twice = np.repeat(self._changes, 2, axis=1)
        return _Moves(np.concatenate([self.gains, other.gains]), np.concatenate([twice, other._changes]), self._choices)

    def sorted(self) -> _Moves:
        """The best first, in the order of enumeration on a tie."""
        order = np.argsort(-self.gains, kind="stable")
        return _Moves(self.gains[order], self._changes[order], self._choices)

    def apply(self, point: Point, index: int) -> Point:
        """The point after a move."""
        changed = point.copy()
        for layer, pair in self._changes[index]:
            changed[layer] = divmod(int(pair), self._choices)
        return changed


def _part_gains(function: Quadratic, point: Point) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain of changing one part alone, (parts, choices), and the pairs' table, (parts, choices, parts, choices)."""
    row = point.reshape(-1)
    parts = np.arange(len(row))
    gradient = function.linear + function.pairs[:, :, parts, row].sum(axis=2)
    return gradient - gradient[parts, row][:, None], function.pairs
