"""Check a robustness file against the program and the data: what `arqsearch verify` does with one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arqsearch.certify.certificate import LabelledImages
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.robustness import classes_of, no_counterexample
from arqsearch.certify.linf.robustness_file import read_lines
from arqsearch.certify.linf.robustness_line import RobustnessLine, unpack_image
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram

_SHOWN = 10
#: A robust line is proven again within this many times the seconds that it took, and this many seconds at least.
PATIENCE, LEAST_SECONDS = 10.0, 60.0

#: Decides one line again within limits.
Decide = Callable[[RobustnessLine, Limits], Verdict]


@dataclass(frozen=True)
class Checked:
    """What was checked without finding a difference.

    :param lines: verdicts; of all of them form, identities, labels, classes of the clean images and counter-examples
        were checked.
    :param counterexamples: of them, images run through the program again.
    :param boxes: robust lines proven again by boxes.
    :param complete: robust lines proven again by complete verification.
    """

    lines: int
    counterexamples: int
    boxes: int
    complete: int


def check_file(
    path: str | Path, program: IntegerProgram, dataset: LabelledImages, decide: Decide, sample: int | None = None
) -> Checked:
    """Check every line, and prove robust ones again: all that boxes prove, and some or all of the others.

    :param decide: complete verification.
    :param sample: robust lines that boxes do not prove, chosen at random, that are proven again; None = all.
    :raises ArqError: listing every difference.
    """
    lines = read_lines(path)
    if not lines:
        raise ArqError(f"{path} holds no verdict; run `arqsearch verify-robustness`.")
    if tuple(dataset.images.shape[1:]) != program.input.shape:
        raise ArqError(f"The program reads images of {program.input.shape}, the data are {dataset.images.shape[1:]}.")
    rank = {int(image): position for position, image in enumerate(dataset.ids)}
    problems = _stated(lines, program, dataset, rank) + _contradictions(lines)
    _require(problems, path)
    problems = _clean_classes(lines, program, dataset, rank)
    broken = [line for line in lines if line.counterexample is not None]
    for line in broken:
        assert line.counterexample is not None
        image, found = dataset.images[rank[line.image]], unpack_image(line.counterexample, _name(line))
        problem = no_counterexample(program, image, line.label, line.epsilon, found)
        if not problem and classes_of(program, found[None])[0] != line.counterexample.predicted:
            problem = f"the counter-example does not have class {line.counterexample.predicted} by the program"
        problems += [f"{_name(line)}: {problem}"] if problem else []
    _require(problems, path)
    robust = [line for line in lines if line.verdict == "robust"]
    rest = _not_boxed(robust, program, dataset, rank)
    problems = [f"{_name(line)}: boxes do not prove it" for line in rest if line.method == "boxes"]
    chosen = rest if sample is None else random.Random(0).sample(rest, min(sample, len(rest)))
    for line in [] if problems else chosen:
        limits = Limits(max(LEAST_SECONDS, PATIENCE * line.seconds))
        verdict = decide(line, limits)
        if verdict.status != "robust":
            what = f"not proven again within {verdict.limit}" if verdict.status == "unknown" else verdict.status
            problems.append(f"{_name(line)}: robust in the file, now {what}")
    _require(problems, path)
    return Checked(len(lines), len(broken), len(robust) - len(rest), len(chosen))


def _name(line: RobustnessLine) -> str:
    return f"image {line.image} at ε = {line.epsilon}"


def _stated(
    lines: Sequence[RobustnessLine], program: IntegerProgram, dataset: LabelledImages, rank: dict[int, int]
) -> list[str]:
    """What lines contradict in themselves, and in program and data at hand."""
    problems = [
        f"it is about {what} {stated}, given is {now}"
        for what, found, now in (
            ("program", {line.program for line in lines}, program.hash),
            ("data", {line.data for line in lines}, dataset.identity),
        )
        for stated in sorted(found - {now})
    ]
    if problems:
        return problems  # Every line would differ.
    for line in lines:
        found = line.problems()
        if line.image not in rank:
            found.append("the data set has no such image")
        elif line.label != dataset.labels[rank[line.image]]:
            found.append(f"label {line.label} is {int(dataset.labels[rank[line.image]])} in the data set")
        problems += [f"{_name(line)}: {problem}" for problem in found]
    return problems


def _contradictions(lines: Sequence[RobustnessLine]) -> list[str]:
    """Images that are robust at one ε and broken at a smaller one."""
    robust: dict[int, int] = defaultdict(lambda: -1)
    for line in lines:
        if line.verdict == "robust":
            robust[line.image] = max(robust[line.image], line.decided_at)
    return [
        f"{_name(line)}: {line.verdict}, but robust at ε = {robust[line.image]}"
        for line in lines
        if line.verdict == "non-robust" and robust[line.image] >= line.epsilon
    ]


def _clean_classes(
    lines: Sequence[RobustnessLine], program: IntegerProgram, dataset: LabelledImages, rank: dict[int, int]
) -> list[str]:
    stated = {line.image: line.predicted for line in lines}
    images = sorted(stated)
    found = dict(zip(images, classes_of(program, dataset.images[[rank[i] for i in images]]), strict=True))
    return [
        f"{_name(line)}: class {line.predicted} in the file, {found[line.image]} by the program"
        for line in lines
        if line.predicted != found[line.image]
    ]


def _not_boxed(
    robust: Sequence[RobustnessLine], program: IntegerProgram, dataset: LabelledImages, rank: dict[int, int]
) -> list[RobustnessLine]:
    """Those that boxes at their own ε do not prove."""
    bounds, rest = IntervalBounds(program), []
    for epsilon in sorted({line.epsilon for line in robust}):
        here = [line for line in robust if line.epsilon == epsilon]
        places = np.array([rank[line.image] for line in here])
        proven = bounds.verify(dataset.images[places], dataset.labels[places], epsilon).robust.tolist()
        rest += [line for line, proof in zip(here, proven, strict=True) if not proof]
    return rest


def _require(problems: list[str], path: str | Path) -> None:
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise ArqError(f"{path} does not hold; run `arqsearch verify-robustness` again:\n  " + "\n  ".join(shown))
