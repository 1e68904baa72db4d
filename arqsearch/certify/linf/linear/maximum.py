"""Lines for the maximum over windows of a pooling.

Below: the window's element with the largest lower bound L (it is at least as large as any). Above, the tighter in the
middle of the box of: the largest upper bound; and ``L-element + sum max(x_i - L, 0)`` over the others that can exceed
L, each term under its chord. Both hold for every point of the box, hence for the integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.integer import ops as O

#: Stands for a padded position, which never wins.
NEVER = -(2.0**40)


@dataclass(frozen=True)
class WindowLines:
    """Coefficients of every window element, ``(N, C, kh*kw, positions)``, and the upper line's height.

    :param lower: one 1 in each window.
    :param upper: of the upper line.
    :param height: of the upper line, ``(N, C, positions)``.
    :param mass: bounds the magnitudes of all terms of either line, ``(N, C, positions)``.
    """

    lower: Tensor
    upper: Tensor
    height: Tensor
    mass: Tensor

    def __getitem__(self, which: Tensor) -> WindowLines:
        return WindowLines(self.lower[which], self.upper[which], self.height[which], self.mass[which])

    def to(self, dtype: torch.dtype) -> WindowLines:
        """The same in another float type (for the optimisation only)."""
        return WindowLines(self.lower.to(dtype), self.upper.to(dtype), self.height.to(dtype), self.mass.to(dtype))


class Maximum:
    """A max pool, compiled.

    :param op: the operation.
    :param shape: of its input, ``(H, W, C)``.
    """

    def __init__(self, op: O.MaxPool2d, shape: tuple[int, ...]) -> None:
        self.op, self.shape = op, shape

    def windows(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, kh*kw, positions)``."""
        top, bottom, left, right = self.op.padding
        padded = F.pad(x, (left, right, top, bottom), value=NEVER)
        count = self.op.kernel[0] * self.op.kernel[1]
        return F.unfold(padded, self.op.kernel, stride=self.op.stride).reshape(len(x), x.shape[1], count, -1)

    def lines(self, lo: Tensor, hi: Tensor) -> WindowLines:
        """Lines on the box ``lo..hi``, float64 integers ``(N, C, H, W)``."""
        low, high = self.windows(lo), self.windows(hi)
        floor, best = low.max(2, keepdim=True)
        winner = torch.zeros_like(low).scatter_(2, best, 1.0)
        live = (high > floor) & (winner == 0)
        width = torch.where(live, high - low, 1.0)
        # Where low equals the floor the chord is x - low itself.
        chord = torch.where(live, (high - floor) / width, 0.0)
        upper = winner + chord
        shift = torch.where(live, -chord * low, 0.0)
        height = shift.sum(2)
        ceiling = high.amax(2)
        centre = torch.where(high > NEVER / 2, (low + high) / 2, 0.0)
        sum_wins = (upper * centre).sum(2) + height <= ceiling
        upper = torch.where(sum_wins[:, :, None], upper, 0.0)
        height = torch.where(sum_wins, height, ceiling)
        size = torch.where(low > NEVER / 2, torch.maximum(low.abs(), high.abs()), 0.0)
        mass = ((upper + winner) * size).sum(2) + torch.where(live, chord * low.abs(), 0.0).sum(2) + ceiling.abs()
        return WindowLines(winner, upper, height, mass)
