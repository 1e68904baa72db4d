"""`CompleteVerifier`: every method in the order of its cost, until the image is decided or a limit is hit.

The image itself, boxes, linear bounds, a short attack, optimised linear bounds, a longer attack; then branch and bound
and integer programming share what time is left: small models go to integer programming first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.certify.linf.attack import Attack, Budget
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.branch import Answer, BranchAndBound
from arqsearch.certify.linf.domain import Bound, Bounder, Domain, needed
from arqsearch.certify.linf.linear import LinearBounds
from arqsearch.certify.linf.milp import MilpSolver
from arqsearch.certify.linf.verdict import Limits, Method, Verdict
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram

#: Steps of the slopes' optimisation: at the root, and in branch and bound.
ROOT_STEPS, BRANCH_STEPS = 20, 10
#: Neurons of one tensor that get linear bounds of their own.
REFINE = 512
#: Undecided codes up to which integer programming comes first.
SMALL = 400
#: Part of the remaining time for the first of the two complete methods.
SHARE = 0.75
QUICK, LONG = Budget(20, 4, 0), Budget(40, 8, 100)


class CompleteVerifier:
    """Decides images of one program.

    :param program: the integer program; its pixels must take in 0..255.
    :param limits: work allowed for each image.
    :raises ArqError: when the program does not take all grey levels.
    """

    def __init__(self, program: IntegerProgram, limits: Limits | None = None) -> None:
        if program.input.lo > 0 or program.input.hi < 255:
            raise ArqError(
                f"The program takes pixels {program.input.lo}..{program.input.hi}, grey levels are 0..255; lower the "
                "network for an input range that contains them."
            )
        self.program, self.limits = program, limits or Limits()
        self._boxes: Bounder = IntervalBounds(program)
        self._linear: tuple[Bounder, ...] = (
            LinearBounds(program), LinearBounds(program, iterations=ROOT_STEPS, refine=REFINE),
        )  # fmt: skip
        self._attack, self._milp = Attack(program), MilpSolver(program)
        self._branch = BranchAndBound(
            program, LinearBounds(program, iterations=BRANCH_STEPS, refine=REFINE), attack=self._seek
        )

    def verify(self, image: NDArray[np.uint8], label: int, epsilon: int) -> Verdict:
        """Decide whether every integer image within `epsilon` grey levels (L∞) keeps the label.

        :param image: uint8 ``(H, W, C)``.
        :param label: the true class.
        :param epsilon: whole grey levels, at least 0.
        :raises ArqError: when image, label or ε do not fit.
        """
        self._check(image, label, epsilon)
        if int(self.program.run(image[None].astype(np.int16))[0].argmax()) != label:
            return Verdict("misclassified", "run")
        case = _Case(self, Domain.around(image[None], np.array([label]), epsilon), self.limits)
        if epsilon == 0:
            return case.verdict("robust", "run")
        return case.decide()

    def _check(self, image: NDArray[np.uint8], label: int, epsilon: int) -> None:
        if image.dtype != np.uint8 or tuple(image.shape) != self.program.input.shape:
            raise ArqError(
                f"The image is {image.dtype} {tuple(image.shape)}; this program takes uint8 {self.program.input.shape}."
            )
        if not 0 <= label < self.program.num_classes:
            raise ArqError(f"Label {label} is no class of this program; it has 0..{self.program.num_classes - 1}.")
        if epsilon != int(epsilon) or epsilon < 0:
            raise ArqError(f"ε = {epsilon} is no whole number of grey levels; give 0, 1, 2, ...")

    def _seek(self, domain: Domain, targets: Tensor, seed: int) -> Tensor | None:
        found, images = self._attack.run(domain, targets, Budget(20, 4, 20), seed)
        return images[0] if bool(found[0]) else None


@dataclass
class _Case:
    """One image at one ε on its way through the methods."""

    owner: CompleteVerifier
    domain: Domain
    limits: Limits

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.deadline = None if self.limits.seconds is None else self.start + self.limits.seconds
        self.goal = needed(self.domain.labels, self.owner.program.num_classes)
        self.known: Bound | None = None
        self.domains = 0
        self.last: Method = "boxes"
        self.hit = "" if self.limits.seconds is None else f"{self.limits.seconds:g} s"

    def decide(self) -> Verdict:
        """All methods in order."""
        quick, strong = self.owner._linear
        steps: tuple[Callable[[], Verdict | None], ...] = (
            partial(self._bound, self.owner._boxes, "boxes"), partial(self._bound, quick, "linear"),
            partial(self._attack, QUICK), partial(self._bound, strong, "linear"), partial(self._attack, LONG),
            self._complete,
        )  # fmt: skip
        for step in steps:
            found = step()
            if found is not None:
                return found
            if self.left() == 0 or self._spent():
                return self.unknown()
        return self.unknown()

    def _spent(self) -> bool:
        """Whether no more domains may be bounded."""
        if self.limits.domains is None or self.domains < self.limits.domains:
            return False
        self.hit = f"{self.limits.domains} domains"
        return True

    def left(self) -> float | None:
        """Seconds left; None = no limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def verdict(self, status: Answer, method: Method, image: Tensor | None = None) -> Verdict:
        """Close the case; a counter-example is run through the program once more."""
        seconds = time.monotonic() - self.start
        if status != "non-robust":
            return Verdict(status, method, None, self.domains, None, seconds)
        assert image is not None
        label = int(self.domain.labels[0])
        inside = bool(((image >= self.domain.lo[0]) & (image <= self.domain.hi[0])).all())
        if not inside or int(self.owner.program.run(image[None])[0].argmax()) == label:
            raise AssertionError(f"{method} reported an image that is no counter-example")
        return Verdict(status, method, image.numpy().astype(np.uint8), self.domains, None, seconds)

    def unknown(self) -> Verdict:
        """Give up, with the limit that was hit."""
        return Verdict("unknown", self.last, None, self.domains, self.hit, time.monotonic() - self.start)

    def _bound(self, bounder: Bounder, method: Method) -> Verdict | None:
        self.last = method
        self.known = bounder.bound(self.domain, self.known)
        self.domains += 1
        closed = bool((self.known.margins >= self.goal).all()) or bool(self.known.empty[0])
        return self.verdict("robust", method) if closed else None

    def _targets(self) -> Tensor:
        assert self.known is not None
        return self.known.margins < self.goal

    def _attack(self, budget: Budget) -> Verdict | None:
        deadline = float("inf") if self.deadline is None else self.deadline
        found, images = self.owner._attack.run(self.domain, self._targets(), budget, 0, deadline)
        return self.verdict("non-robust", "attack", images[0]) if bool(found[0]) else None

    def _complete(self) -> Verdict | None:
        """Branch and bound and integer programming, the likelier one first; the second has all the time left."""
        if not self.limits.milp:
            return self._branch(1.0)
        if self.owner._milp.columns(self.known, self.domain) <= SMALL:
            return self._milp(SHARE) or self._branch(1.0)
        return self._branch(SHARE) or self._milp(1.0)

    def _branch(self, share: float) -> Verdict | None:
        self.last = "branch-and-bound"
        left = self.left()
        deadline = None if left is None else time.monotonic() + share * left
        most = None if self.limits.domains is None else self.limits.domains - self.domains

        def leaf(domain: Domain, bound: Bound) -> tuple[Answer, Tensor | None]:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            found = self.owner._milp.solve(domain, bound, None, seconds)
            return found.answer, found.image

        result = self.owner._branch.run(self.domain, self.known, deadline, most, leaf if self.limits.milp else None)
        self.domains += result.domains
        if result.limit == "domains":
            self.hit = f"{self.limits.domains} domains"
        return None if result.answer == "unknown" else self.verdict(result.answer, "branch-and-bound", result.image)

    def _milp(self, share: float) -> Verdict | None:
        self.last = "milp"
        left = self.left()
        result = self.owner._milp.solve(
            self.domain, self.known, self._targets(), None if left is None else share * left
        )
        return None if result.answer == "unknown" else self.verdict(result.answer, "milp", result.image)
