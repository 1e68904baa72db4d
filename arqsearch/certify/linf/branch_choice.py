"""Where branch and bound splits: the code or pixel that is likely to gain most, and the whole number to cut at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arqsearch.certify.linf.attack import worst
from arqsearch.certify.linf.attack_surrogate import Surrogate
from arqsearch.certify.linf.domain import Bound, Domain
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

#: A clip is split off when at least this share of the accumulator's range lies beyond it.
PHASE_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """One element of one tensor (0: pixels), its range, and the last number of the lower part.

    As a restriction, `cut` has no meaning.
    """

    tensor: int
    element: int
    low: int
    high: int
    cut: int = 0


class Chooser:
    """Chooses a split for every open set.

    :param program: the integer program.
    """

    def __init__(self, program: IntegerProgram) -> None:
        self.program = program
        self._surrogate = Surrogate(program)
        self._staircases = {op.output: op for op in program.ops if isinstance(op, O.Requantize | O.Add)}

    def choose(self, domain: Domain, bound: Bound, slack: Tensor) -> list[Split]:
        """A neuron by the bounder's `influence`; where it names none, a pixel by its slope times its range.

        :param slack: int64 ``(N,)``, worst margin less what is needed; negative.
        """
        chosen: list[Split | None] = [None] * len(domain)
        best = torch.zeros(len(domain), dtype=torch.float64)
        for tensor, influence in sorted(bound.influence.items()):
            if tensor not in bound.tensors or tensor not in self._staircases:
                continue
            low, high = (x.flatten(1) for x in bound.tensors[tensor])
            score, element = torch.where(low < high, influence.flatten(1), 0.0).max(1)
            for row in (score > best).nonzero()[:, 0].tolist():
                at = int(element[row])
                best[row] = score[row]
                chosen[row] = self._neuron(bound, tensor, row, at, int(low[row, at]), int(high[row, at]))
        rest = torch.tensor([row for row, split in enumerate(chosen) if split is None], dtype=torch.int64)
        if len(rest):
            for row, split in zip(rest.tolist(), self._pixels(domain[rest]), strict=True):
                chosen[row] = split
        return [split for split in chosen if split is not None]

    def _neuron(self, bound: Bound, tensor: int, row: int, element: int, low: int, high: int) -> Split:
        """Cut a clip off where much lies beyond it, else halve the codes."""
        op = self._staircases[tensor]
        middle = (low + high) // 2
        source = op.inputs[0]
        if isinstance(op, O.Requantize) and source in bound.tensors:
            least, most = (int(x[row].flatten()[element]) for x in bound.tensors[source])
            channel = element % self.program.tensors[tensor].shape[-1]
            factor = int(op.multiplier.reshape(-1)[channel if op.multiplier.size > 1 else 0])
            shift = int(op.shift.reshape(-1)[channel if op.shift.size > 1 else 0])
            width = max(most - least, 1) * factor / 2**shift
            below = (op.lo + 0.5) - least * factor / 2**shift
            above = most * factor / 2**shift - (op.hi - 0.5)
            if low == op.lo and below > PHASE_SHARE * width:
                return Split(tensor, element, low, high, low)
            if high == op.hi and above > PHASE_SHARE * width:
                return Split(tensor, element, low, high, high - 1)
        return Split(tensor, element, low, high, middle)

    def _pixels(self, domain: Domain) -> list[Split]:
        """The pixel with the largest slope times range; where no pixel has a slope, the widest."""
        low, high = domain.lo.flatten(1).long(), domain.hi.flatten(1).long()
        x = torch.div(domain.lo + domain.hi, 2, rounding_mode="floor").float().requires_grad_()
        with torch.enable_grad():
            logits = self._surrogate.logits(x).cpu()
            (slope,) = torch.autograd.grad(worst(logits, domain.labels).sum(), x)
        width = (high - low).double()
        score = slope.flatten(1).abs().double() * width
        score = torch.where(score.amax(1, keepdim=True) > 0, score, width)
        found = []
        for row, element in enumerate(score.argmax(1).tolist()):
            a, b = int(low[row, element]), int(high[row, element])
            found.append(Split(0, element, a, b, (a + b) // 2))
        return found
