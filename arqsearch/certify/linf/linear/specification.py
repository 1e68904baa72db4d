"""What is bounded in the end: ``z_y - z_j``, taken at the last tensor or, where that is sharper, one step before it.

Logits that are themselves rounded and clipped, all by one staircase g (``z = g(a)``), need no lines for it: g is
monotone, so ``a_y - a_j >= d`` gives ``z_y - z_j >= ceil(ratio * d + below - above)``, and at least 0 for d >= 0; a
clip brings values closer but never changes their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arqsearch.certify.linf.linear.propagate import Network
from arqsearch.certify.linf.linear.rules import Bounds, Form, magnitude
from arqsearch.certify.linf.linear.staircase import band
from arqsearch.integer import ops as O


class Specification:
    """Rows ``t_y - t_j`` of a tensor t, and how their bounds become margins of the logits.

    :param network: the compiled program.
    :param through: start before the last staircase where one serves all classes; else at the logits.
    """

    def __init__(self, network: Network, through: bool) -> None:
        program = network.program
        self.classes, self.device = program.num_classes, network.device
        self.tensor, self.stop = program.output, len(program.ops)
        #: Operation index of the staircase that is stepped over; None where the rows start at the logits.
        self.over: int | None = None
        writer = next((i for i, op in enumerate(program.ops) if op.output == program.output), None)
        op = program.ops[writer] if writer is not None else None
        if through and isinstance(op, O.Requantize) and writer is not None and _one(op.multiplier) and _one(op.shift):
            self.over, self.stop, self.tensor = writer, writer, op.inputs[0]
            self.lo, self.hi = op.lo, op.hi
            columns = (op.multiplier[:1].astype("int64"), op.shift[:1].astype("int64"))
            ratio, below, above = band(columns[0], 0 * columns[0], columns[1], op.rounding)
            # Common factors of two cancel, so the band is the narrowest.
            self.ratio, self.width = float(ratio[0]), float(above[0] - below[0])
        self.size = magnitude(program, self.tensor)

    def form(self, labels: Tensor, classes: Tensor) -> Form:
        """Rows of the given classes, R each."""
        rows = torch.arange(len(labels), device=self.device)
        start = torch.zeros(len(labels), self.classes, dtype=torch.float64, device=self.device)
        start[rows, labels] = 1.0
        start[rows, classes] -= 1.0
        zero = torch.zeros(len(labels), dtype=torch.float64, device=self.device)
        return Form({self.tensor: start}, zero, zero)

    def margin(self, lower: Tensor, logits: Bounds, owner: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """Margins of the logits from integer bounds of the rows.

        :param lower: int64 ``(R,)``.
        :param logits: bounds of the logits, for the clip.
        :param owner: domain of each row.
        """
        if self.over is None:
            return lower
        value = self.ratio * lower.double() - self.width
        found = (value - (value.abs() + 1.0) * 2.0**-40).ceil()
        found = torch.where(lower >= 0, found.clamp(min=0), found)
        below, above = logits[0][owner, labels] - self.lo, self.hi - logits[1][owner, classes]
        return torch.where(found > 0, torch.minimum(found, torch.minimum(below, above)), found).to(torch.int64)

    def goal(self, wanted: Tensor) -> Tensor:
        """About which bound of a row proves the margin `wanted` (0 or 1); float64 ``(R,)``."""
        if self.over is None:
            return wanted.double()
        first = self.width / max(self.ratio, 2.0**-60) + 1.0
        return torch.where(wanted > 0, torch.full_like(wanted, 1).double() * first, 0.0).floor()


def _one(values: O.IntArray) -> bool:
    return bool((values == values.ravel()[0]).all())
