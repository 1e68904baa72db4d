"""The last linear layer fused with what is asked of it: exact bounds of ``(w_y - w_j) x + b_y - b_j`` over boxes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.linf.interval_program import interleave
from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import exact_dtype
from arqsearch.integer.program import TensorSpec

#: Bytes of rows that are kept; those of larger networks are made again for each batch.
KEPT_BYTES = 1 << 26


class LastLayer:
    """Rows ``w_y - w_j`` for every class y, positive and negative parts apart, as interval programs lie in memory.

    :param op: the layer that makes the logits.
    :param spec: stated range of its input.
    :param device: torch device.
    :raises ArqError: when a sum may leave 53 bits.
    """

    def __init__(self, op: O.Linear, spec: TensorSpec, device: torch.device) -> None:
        self.weight, self.bias = op.weight.astype(np.int64), op.bias.astype(np.int64)
        # |w_y - w_j| <= |w_y| + |w_j|: no sum, in any order, is larger than this.
        largest = np.abs(self.weight).sum(axis=1) * max(abs(spec.lo), abs(spec.hi)) + np.abs(self.bias)
        self.dtype, self.device = exact_dtype(2 * int(largest.max())), device
        self._keep = 2 * self.weight.size * len(self.weight) * 8 <= KEPT_BYTES
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def margins(self, bounds: Tensor, labels: Tensor) -> Tensor:
        """Lower bounds of ``z_y - z_j``.

        :param bounds: integers ``(N, 2I)``: lower and upper bound of each input in turn.
        :param labels: y, int64 ``(N,)``.
        :returns: int64 ``(N, K)``, 0 in the column of y.
        """
        x = bounds.to(device=self.device, dtype=self.dtype)
        found = torch.empty((len(x), len(self.bias)), dtype=torch.int64)
        for label in sorted(set(labels.tolist())):
            which = torch.nonzero(labels == label).ravel()
            rows, bias = self._of(label)
            found[which] = torch.addmm(bias, x[which.to(self.device)], rows).to(torch.int64).cpu()
        return found

    def _of(self, label: int) -> tuple[Tensor, Tensor]:
        """Rows ``(2I, K)`` and biases of one class."""
        if label in self._rows:
            return self._rows[label]
        difference = self.weight[label] - self.weight
        both = interleave(np.maximum(difference, 0), np.minimum(difference, 0)).T
        made = tuple(
            torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self.device, self.dtype)
            for values in (both, self.bias[label] - self.bias)
        )
        if self._keep:
            self._rows[label] = (made[0], made[1])
        return made[0], made[1]
