"""Verdicts for a data set: clean answers, then boxes, then complete verification of what stays open.

Every verdict decides others of the same image: robust at ε is robust at every smaller ε, and a counter-example at ε is
one at every ε that it lies within. Nothing is computed that follows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.certify.certificate import LabelledImages
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.robustness_line import RobustnessLine, pack_image, unpack_image
from arqsearch.certify.linf.robustness_schema import Budget
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.certify.smoothing import first_argmax
from arqsearch.integer.program import IntegerProgram

#: Images bounded before their lines are written.
BATCH = 1000

Lines: TypeAlias = dict[tuple[int, int], RobustnessLine]


class ImageVerifier(Protocol):
    """Complete verification; `CompleteVerifier` is one."""

    def verify(self, image: NDArray[np.uint8], label: int, epsilon: int) -> Verdict:
        """Decide one image ``(H, W, C)`` at ε grey levels."""
        ...


@dataclass(frozen=True)
class Question:
    """One image at one ε that is to be decided.

    :param position: of the image in the data set.
    :param epsilon: grey levels.
    """

    position: int
    epsilon: int


class Verification:
    """What is known of a program on a data set, and what is to be asked next.

    :param program: the program.
    :param dataset: images and labels.
    :param positions: images to decide.
    :param epsilons: grey levels, ascending.
    :param budget: work allowed for one image at one ε.
    :param lines: what is known already; is added to.
    """

    def __init__(
        self, program: IntegerProgram, dataset: LabelledImages, positions: Sequence[int], epsilons: Sequence[int],
        budget: Budget, lines: Lines,
    ) -> None:  # fmt: skip
        self.program, self.dataset, self.budget, self.lines = program, dataset, budget, lines
        self.positions, self.epsilons = list(positions), sorted(epsilons)
        self._seen = {epsilon for _, epsilon in lines}
        self._classes: dict[int, int] = {}
        self._bounds: IntervalBounds | None = None

    def open(self, position: int) -> list[int]:
        """ε of an image that nothing has answered and that this budget could, ascending."""
        known = (self.lines.get((self._id(position), epsilon)) for epsilon in self.epsilons)
        return [e for e, line in zip(self.epsilons, known, strict=True) if line is None or not self._stays(line)]

    def _stays(self, line: RobustnessLine) -> bool:
        return line.decided or (line.budget is not None and covers(line.budget, self.budget))

    def follow(self) -> list[RobustnessLine]:
        """Lines that follow from those at hand."""
        return [line for position in self.positions for line in self._follow(position)]

    def by_boxes(self, start: int) -> list[RobustnessLine]:
        """Lines of misclassified images and of those that boxes prove, of the `BATCH` images from `start` on."""
        batch = [position for position in self.positions[start : start + BATCH] if self.open(position)]
        if not batch:
            return []
        begin, found = time.perf_counter(), []
        images, labels = self.dataset.images[batch], self.dataset.labels[batch]
        self._classes |= dict(zip(batch, classes_of(self.program, images), strict=True))
        self._bounds = self._bounds or IntervalBounds(self.program)
        for epsilon in self.epsilons:
            right = [i for i, p in enumerate(batch) if epsilon in self.open(p) and self._classes[p] == labels[i]]
            proven = self._bounds.verify(images[right], labels[right], epsilon).robust.tolist() if right else []
            found += [self._line(batch[i], epsilon, "robust", "boxes") for i, p in zip(right, proven, strict=True) if p]
            if not self.budget.complete:
                rest = [batch[i] for i, p in zip(right, proven, strict=True) if not p]
                found += [self._unknown(position, epsilon, Verdict("unknown", "boxes", limit="boxes only"))
                          for position in rest]  # fmt: skip
        found += [
            self._line(position, epsilon, "misclassified", "run")
            for position, label in zip(batch, labels, strict=True)
            if self._classes[position] != label
            for epsilon in self.open(position)
        ]
        seconds = round((time.perf_counter() - begin) / max(1, len(found)), 7)
        return self._keep([replace(line, seconds=seconds) for line in found])

    def questions(self) -> list[Question]:
        """One ε of each open image that was not asked for yet: the middle one, as its answer may decide the others."""
        found = []
        for position in self.positions:
            if open_ := self.open(position):
                found.append(Question(position, open_[len(open_) // 2]))
        return found

    def answer(self, question: Question, verdict: Verdict) -> list[RobustnessLine]:
        """The line of a verdict and those that follow from it.

        :raises RuntimeError: when a counter-example is none: it is run through the program first.
        """
        position, epsilon = question.position, question.epsilon
        if verdict.status == "unknown":
            return self._keep([self._unknown(position, epsilon, verdict)])
        image = None
        if verdict.status == "non-robust":
            image = verdict.counterexample
            original, label = self.dataset.images[position], self._label(position)
            problem = no_counterexample(self.program, original, label, epsilon, image)
            if problem or image is None:
                raise RuntimeError(f"{verdict.method} on image {self._id(position)}, ε = {epsilon}: {problem}.")
        line = self._line(position, epsilon, verdict.status, verdict.method)
        line = replace(line, domains=verdict.domains, seconds=round(verdict.seconds, 4))
        if image is not None:
            line = replace(line, counterexample=pack_image(image, classes_of(self.program, image[None])[0]))
        return self._keep([line]) + self._follow(position)

    def _follow(self, position: int) -> list[RobustnessLine]:
        image, open_ = self._id(position), self.open(position)
        if not open_:
            return []
        mine = [self.lines[image, e] for e in sorted(self._seen) if (image, e) in self.lines]
        found = []
        for epsilon in open_:
            for line in mine:
                robust = line.verdict == "robust" and line.epsilon > epsilon
                if robust or line.verdict == "misclassified" or self._breaks(line, position, epsilon):
                    found.append(replace(line, epsilon=epsilon, domains=0, seconds=0.0))
                    break
        return self._keep(found)

    def _breaks(self, line: RobustnessLine, position: int, epsilon: int) -> bool:
        if line.counterexample is None:
            return False
        return distance(self.dataset.images[position], unpack_image(line.counterexample)) <= epsilon

    def _keep(self, found: list[RobustnessLine]) -> list[RobustnessLine]:
        self.lines.update({line.key: line for line in found})
        self._seen.update(line.epsilon for line in found)
        return found

    def _id(self, position: int) -> int:
        return int(self.dataset.ids[position])

    def _label(self, position: int) -> int:
        return int(self.dataset.labels[position])

    def _line(self, position: int, epsilon: int, verdict: Any, method: Any) -> RobustnessLine:
        predicted = self._classes.get(position)
        if predicted is None:
            predicted = classes_of(self.program, self.dataset.images[position][None])[0]
            self._classes[position] = predicted
        return RobustnessLine(
            program=self.program.hash, data=self.dataset.identity, image=self._id(position),
            label=self._label(position), epsilon=epsilon, verdict=verdict, method=method, decided_at=epsilon,
            predicted=predicted,
        )  # fmt: skip

    def _unknown(self, position: int, epsilon: int, verdict: Verdict) -> RobustnessLine:
        line = self._line(position, epsilon, "unknown", verdict.method)
        return replace(
            line, limit=verdict.limit or "not stated", budget=self.budget, domains=verdict.domains,
            seconds=round(verdict.seconds, 4),
        )  # fmt: skip


def covers(spent: Budget, allowed: Budget) -> bool:
    """Whether what was spent on an open question is at least what is allowed now, so that asking again is idle."""

    def most(limit: float | None) -> float:
        return float("inf") if limit is None else limit

    return (
        spent.complete >= allowed.complete
        and (not allowed.complete or spent.milp >= allowed.milp)
        and (not allowed.complete or most(spent.seconds) >= most(allowed.seconds))
        and (not allowed.complete or most(spent.domains) >= most(allowed.domains))
    )


def limits_of(budget: Budget) -> Limits:
    """The same as complete verification takes it."""
    return Limits(budget.seconds, budget.domains, budget.milp)


def classes_of(program: IntegerProgram, images: NDArray[np.uint8]) -> list[int]:
    """Class of each image: the first maximum of its logits."""
    return [int(c) for c in first_argmax(program.run(images)).tolist()]


def distance(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    """L∞ distance in grey levels."""
    return int(np.abs(image.astype(np.int16) - other.astype(np.int16)).max(initial=0))


def no_counterexample(
    program: IntegerProgram, image: NDArray[np.uint8], label: int, epsilon: int, found: NDArray[np.uint8] | None
) -> str:
    """Why an image is no counter-example, or ""."""
    if found is None or found.dtype != np.uint8 or found.shape != image.shape:
        return "the counter-example is missing or not of the image's shape"
    if distance(image, found) > epsilon:
        return f"the counter-example is {distance(image, found)} grey levels away"
    if classes_of(program, found[None])[0] == label:
        return f"the counter-example has class {label} by the program"
    return ""


def counted(lines: Iterable[RobustnessLine], epsilons: Sequence[int]) -> list[dict[str, Any]]:
    """Verdicts by ε: counts, and certified accuracy (robust images) with its 95 % Clopper-Pearson interval."""
    from arqsearch.certify.summary import share

    listed = list(lines)
    rows = []
    for epsilon in epsilons:
        here = [line for line in listed if line.epsilon == epsilon]
        if not here:
            continue
        verdicts = Counter(line.verdict for line in here)
        found = share(verdicts["robust"], len(here))
        rows.append(
            {
                "epsilon": epsilon, "images": len(here), "robust": verdicts["robust"],
                "non-robust": verdicts["non-robust"], "misclassified": verdicts["misclassified"],
                "open": verdicts["unknown"],
                "by boxes": sum(line.verdict == "robust" and line.method == "boxes" for line in here),
                "certified accuracy": found.value, "low": found.low, "high": found.high,
            }
        )  # fmt: skip
    return rows
