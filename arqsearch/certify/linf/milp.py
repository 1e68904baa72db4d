"""Complete verification of one set of images by integer programming (HiGHS, through scipy).

One model for each class that could win, with that class winning as a row: no solution of any of them is a proof. The
pixels are reals first, which is a relaxation and far cheaper; only a solution whose rounded image is no counter-example
asks for integer pixels.

What is trusted here: a counter-example rests on nothing but the integer program, which is run on it. A proof rests on
HiGHS: that its search is complete and that "infeasible" is right in float64 up to its tolerances (1e-6 for rows and
integrality). Every row leaves at least `milp_encoding.MARGIN` (1/2 wherever sums are compared with whole thresholds)
between itself and all points of the program, in units of its integer expression, so that tolerances and the rounding of
coefficients cannot cut off a true point; the tolerances may let in false points, which cost time, not soundness. Proofs
by bounds (`branch`) need no such trust.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeWarning, milp
from torch import Tensor

from arqsearch.certify.linf.boxes_torch import TensorBoxes
from arqsearch.certify.linf.domain import Bound, Domain, Interval, needed
from arqsearch.certify.linf.milp_encoding import Encoder, Range
from arqsearch.integer.program import IntegerProgram

Answer: TypeAlias = Literal["robust", "non-robust", "unknown"]
#: HiGHS' answers, by scipy.
INFEASIBLE, STOPPED = 2, 1


@dataclass(frozen=True)
class MilpResult:
    """Outcome for one domain.

    :param answer: robust, non-robust, or unknown: out of time, or a solution that only the relaxation has.
    :param image: for non-robust: int16 ``(H, W, C)``, re-run through the program.
    :param stopped: a time limit was hit.
    """

    answer: Answer
    image: Tensor | None = None
    stopped: bool = False


class MilpSolver:
    """Integer programming on domains of one program.

    :param program: the integer program.
    """

    def __init__(self, program: IntegerProgram) -> None:
        self.program = program
        self._boxes = TensorBoxes(program, torch.device("cpu"))

    def columns(self, bound: Bound | None, domain: Domain) -> int:
        """How many codes are undecided, about the size of the model."""
        ranges = self._ranges(domain, bound)
        if ranges is None:
            return 0
        written = {op.output for op in self.program.ops if type(op).__name__ in ("Requantize", "Add", "MaxPool2d")}
        return sum(int((high > low).sum()) for tensor, (low, high) in ranges.items() if tensor in written)

    def solve(
        self, domain: Domain, bound: Bound | None = None, targets: Tensor | None = None, seconds: float | None = None
    ) -> MilpResult:
        """Decide one domain; its `limits` are kept to, except that a counter-example may lie outside of them.

        :param domain: of length 1.
        :param bound: what is proven about it, which makes the model smaller.
        :param targets: bool ``(1, K)``: classes not yet excluded; default: those whose margin in `bound` is open.
        :param seconds: wall clock; None = no limit.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        label, goal = int(domain.labels[0]), needed(domain.labels, self.program.num_classes)[0]
        if targets is None:
            margins = None if bound is None else bound.margins[0]
            targets = (torch.ones_like(goal, dtype=torch.bool) if margins is None else margins < goal)[None]
        ranges = self._ranges(domain, bound)
        if ranges is None or (bound is not None and bool(bound.empty[0])):
            return MilpResult("robust")
        unsure = stopped = False
        for target in targets[0].nonzero()[:, 0].tolist():
            if target == label:
                continue
            most = int(goal[target]) - 1
            for whole in (False, True):
                found = self._ask(domain, ranges, label, target, most, whole, deadline)
                if found.answer != "unknown":
                    break
                if found.stopped:
                    break
            if found.answer == "non-robust":
                return found
            if found.answer == "unknown":
                unsure, stopped = True, stopped or found.stopped
        return MilpResult("unknown", stopped=stopped) if unsure else MilpResult("robust")

    def _ask(
        self, domain: Domain, ranges: Mapping[int, Range], label: int, target: int, most: int, whole: bool,
        deadline: float | None,
    ) -> MilpResult:  # fmt: skip
        """Whether some image has ``z_label - z_target <= most``."""
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            return MilpResult("unknown", stopped=True)
        encoder = Encoder(self.program, ranges, whole)
        logits, model = encoder.source(self.program.output), encoder.model
        difference = logits.matrix[[label]] - logits.matrix[[target]]
        constant = int(logits.constant[label]) - int(logits.constant[target])
        if difference.nnz == 0 and constant > most:
            return MilpResult("robust")
        if not model.low:
            return self._judged(domain, encoder.image(np.empty(0)))
        model.row(difference, most=most + 0.5 - constant)
        options = {} if remaining is None else {"time_limit": remaining}
        rows = LinearConstraint(model.matrix(), np.array(model.least), np.array(model.most))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            result: Any = milp(
                np.zeros(len(model.low)), integrality=np.array(model.whole, dtype=np.int64), constraints=rows,
                bounds=Bounds(np.array(model.low), np.array(model.high)), options=options,
            )  # fmt: skip
        if result.status == INFEASIBLE:
            return MilpResult("robust")
        if result.x is None:
            return MilpResult("unknown", stopped=result.status == STOPPED)
        return self._judged(domain, encoder.image(np.asarray(result.x)))

    def _judged(self, domain: Domain, pixels: NDArray[np.int64]) -> MilpResult:
        """A solution counts when the integer program, run on it, answers another class."""
        shape = self.program.input.shape
        image = torch.from_numpy(pixels.reshape(shape)).to(torch.int16)
        image = torch.minimum(torch.maximum(image, domain.lo[0]), domain.hi[0])
        if int(self.program.run(image[None])[0].argmax()) != int(domain.labels[0]):
            return MilpResult("non-robust", image)
        return MilpResult("unknown")

    def _ranges(self, domain: Domain, bound: Bound | None) -> dict[int, Range] | None:
        """Bounds of every tensor; None when the domain holds no image."""
        known: list[Mapping[int, Interval]] = [domain.limits]
        if bound is not None:
            known.append(bound.tensors)
        ranges, empty = self._boxes.bound(domain.lo, domain.hi, known)
        if bool(empty[0]):
            return None
        return {tensor: (low[0].numpy(), high[0].numpy()) for tensor, (low, high) in ranges.items()}
