"""What is bounded and what a bound says: the words that boxes, linear bounds and complete verification share.

A `Domain` is a batch of sets of images, each with the class that it must keep. A `Bounder` encloses what the
integer program can answer on each; branch and bound splits the domains that stay open, at integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

#: Lower and upper integer bounds of one tensor, inclusive, ``(N, *shape)``.
Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Domain:
    """A batch of N sets of integer images.

    :param lo: smallest pixels, int16 ``(N, H, W, C)``.
    :param hi: largest pixels, inclusive.
    :param labels: class that each set must keep, int64 ``(N,)``.
    :param limits: restrictions by neuron splits: tensor index → inclusive integer bounds ``(N, *shape)`` (int64, NHWC
        as the program states its tensors) that the tensor's values are taken to lie in. Images whose values lie outside
        belong to another domain and need not be covered.
    """

    lo: Tensor
    hi: Tensor
    labels: Tensor
    limits: dict[int, Interval] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.lo.shape[0])

    @classmethod
    def around(cls, images: np.ndarray, labels: np.ndarray, epsilon: int) -> Domain:
        """All images within `epsilon` grey levels (L∞) of uint8 ``(N, H, W, C)``, clipped to 0..255."""
        wide = images.astype(np.int16)
        low, high = np.clip(wide - epsilon, 0, 255), np.clip(wide + epsilon, 0, 255)
        return cls(torch.from_numpy(low), torch.from_numpy(high), torch.as_tensor(labels, dtype=torch.int64))

    def __getitem__(self, which: Tensor) -> Domain:
        """The domains at the given positions (index or mask tensor)."""
        limits = {tensor: (lo[which], hi[which]) for tensor, (lo, hi) in self.limits.items()}
        return Domain(self.lo[which], self.hi[which], self.labels[which], limits)


@dataclass(frozen=True)
class Bound:
    """What is proven about a batch of N domains.

    :param margins: int64 ``(N, K)``, sound lower bounds of ``z_y - z_j``; 0 in the column of y.
    :param empty: bool ``(N,)``, proven to hold no image at all (its splits contradict each other).
    :param tensors: proven integer bounds of the program's tensors by index (int64 ``(N, *shape)``), splits included;
        those of an earlier, larger domain may be given back to a bounder, which then never answers looser.
    :param influence: by tensor index ``(N, *shape)``, float64 ≥ 0: about how much of the worst margin would be gained
        by splitting that element; guides branching, proves nothing.
    """

    margins: Tensor
    empty: Tensor
    tensors: dict[int, Interval] = field(default_factory=dict)
    influence: dict[int, Tensor] = field(default_factory=dict)


class Bounder(Protocol):
    """Sound bounds of one program on batches of domains."""

    name: str

    def bound(self, domain: Domain, known: Bound | None = None) -> Bound:
        """Bound every domain of the batch.

        :param known: bounds proven for these domains or for larger ones that contain them, position by position.
        """
        ...


def needed(labels: Tensor, classes: int) -> Tensor:
    """Smallest ``z_y - z_j`` that keeps class y under the first-maximum rule: 1 for j < y, else 0; int64 ``(N, K)``.

    The column of y itself needs 0.
    """
    return (torch.arange(classes)[None] < labels[:, None]).to(torch.int64)
