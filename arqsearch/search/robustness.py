"""What `arqsearch verify-robustness` does: verdicts at several ε for the test images of a run or of one program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from arqsearch import data as datasets
from arqsearch.certify.linf import robustness_file
from arqsearch.certify.linf.robustness import ImageVerifier, Question, Verification, counted, limits_of
from arqsearch.certify.linf.robustness_check import Checked, check_file
from arqsearch.certify.linf.robustness_file import RobustnessWriter
from arqsearch.certify.linf.robustness_line import RobustnessLine
from arqsearch.certify.linf.robustness_schema import Budget
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.certify.meter import duration
from arqsearch.certify.shards import Shard
from arqsearch.data import Dataset
from arqsearch.errors import ArqError, nearest
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import load_recipe
from arqsearch.search.executor import LocalExecutor, OnProgress, Task
from arqsearch.search.program_export import is_program, program_name
from arqsearch.search.stages import FLOAT, FOUND, compared
from arqsearch.search.workspace import Workspace
from arqsearch.zoo import PREFIX, resolve

FILE_SUFFIX = ".robustness.jsonl"


@dataclass(frozen=True)
class RobustnessOptions:
    """Options of the command.

    :param epsilons: grey levels.
    :param images: how many test images; None = all.
    :param every: every k-th of them.
    :param seconds: wall clock for one image at one ε; None = no limit.
    :param domains: domains bounded for one image at one ε; None = no limit.
    :param milp: hand what stays open to integer programming.
    :param complete: False stops after boxes.
    :param network: compared network of a run.
    :param output: file; default: in the run folder, or beside the program.
    :param shard: ``i/n``.
    :param workers: processes for complete verification.
    :param data: data set of a bare program, with `data_path` and `image_size`.
    """

    epsilons: tuple[int, ...]
    images: int | None = None
    every: int = 1
    seconds: float | None = 20.0
    domains: int | None = None
    milp: bool = True
    complete: bool = True
    network: str = FOUND
    output: Path | None = None
    shard: str | None = None
    workers: int = 1
    data: str | None = None
    data_path: str | None = None
    image_size: int | None = None

    @property
    def budget(self) -> Budget:
        """Work for one image at one ε."""
        return Budget(seconds=self.seconds, domains=self.domains, milp=self.milp, complete=self.complete)


@dataclass(frozen=True)
class Subject:
    """A program file, what it is called, its images, and the file for its verdicts."""

    path: Path
    name: str
    program: IntegerProgram
    test: Dataset
    file: Path


def parse_epsilons(text: str) -> tuple[int, ...]:
    """Grey levels from ``1,2,4`` (or with spaces), ascending.

    :raises ArqError: when it is no list of whole grey levels.
    """
    try:
        found = tuple(sorted({int(part) for part in text.replace(",", " ").split()}))
    except ValueError as error:
        hint = " (8/255 is 8 grey levels)" if "/" in text or "." in text else ""
        raise ArqError(f"ε {text!r} is not in whole grey levels{hint}; write it as --eps 1,2,4.") from error
    if not found or not 1 <= found[0] <= found[-1] <= 255:
        raise ArqError(f"ε {text!r} leaves 1..255 grey levels; write it as --eps 1,2,4.")
    return found


def robustness_path(space: Workspace, name: str) -> Path:
    """Verdicts of a compared network."""
    return space.dir / "robustness" / f"{name}.jsonl"


def verify_robustness(target: str, options: RobustnessOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Decide every asked image at every asked ε; resumes by image and ε.

    :param target: run folder (or recipe), or integer program.
    :returns: the file, and what it says.
    :raises ArqError: when something is missing or does not fit together.
    """
    _check(options)
    subject = find_subject(target, options)
    positions: list[int] | range = range(0, len(subject.test), options.every)[: options.images]
    path = subject.file
    if options.shard is not None:
        shard = Shard.parse(options.shard)
        positions, path = shard.of(positions), shard.path(path)
    begin = time.perf_counter()
    with RobustnessWriter(path) as writer:
        _check_resumable(list(writer.lines.values()), subject, path)
        work = Verification(
            subject.program, subject.test, positions, options.epsilons, options.budget, dict(writer.lines)
        )
        _decide(work, writer, subject, options, on_progress)
        lines = [writer.lines[key] for key in sorted(writer.lines)]
        robustness_file.replace_lines(path, lines)
    asked = {int(subject.test.ids[position]) for position in positions}
    return {
        "verdicts": counted((line for line in lines if line.image in asked), options.epsilons),
        "file": str(path), "program": subject.program.hash, "network": subject.name, "images": len(positions),
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def find_subject(target: str, options: RobustnessOptions) -> Subject:
    """The program, its images and its file.

    :raises ArqError: when one of them is missing or they do not fit together.
    """
    if is_program(target):
        path, name = resolve(target, "program"), program_name(target)
        if options.data is None:
            raise ArqError(
                f"Which data set? Name it: --data {' or --data '.join(datasets.available()[:2])}, or a folder with "
                "--data folder --data-path PATH."
            )
        program = IntegerProgram.load(path)
        test = datasets.load(options.data, "test", path=options.data_path, image_size=options.image_size)
        beside = Path() if target.startswith(PREFIX) else path.parent
        file = options.output or beside / f"{name}{FILE_SUFFIX}"
    else:
        recipe = load_recipe(target)
        space, name = Workspace(recipe), options.network
        if name not in (names := [name for name in compared(recipe) if name != FLOAT]):
            raise ArqError(f"There is no integer program of {name!r} to verify. {nearest(name, names)}")
        path = space.network_dir(name) / "program.safetensors"
        if not path.is_file():
            raise ArqError(f"No integer program at {path}; run `arqsearch certify {space.dir}` first.")
        program, test = IntegerProgram.load(path), space.test_set
        file = options.output or robustness_path(space, name)
    if tuple(test.images.shape[1:]) != program.input.shape:
        raise ArqError(
            f"The program reads images of {program.input.shape}, {test.name} has {test.images.shape[1:]}; name the "
            "data set that it was made for, or scale it: --image-size."
        )
    if int(test.labels.max(initial=0)) >= program.num_classes:
        raise ArqError(f"{test.name} has label {test.labels.max()}, the program {program.num_classes} classes.")
    return Subject(path.absolute(), name, program, test, file)


def _check(options: RobustnessOptions) -> None:
    for name in ("images", "every", "seconds", "domains", "workers"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ArqError(f"--{name} {value:g} leaves nothing to do; give a number above 0.")


def _check_resumable(lines: Sequence[RobustnessLine], subject: Subject, path: Path) -> None:
    labels = dict(zip(subject.test.ids.tolist(), subject.test.labels.tolist(), strict=True))
    for line in lines:
        differing = [
            f"{name} {stated}, now {now}"
            for name, stated, now in (
                ("program", line.program, subject.program.hash), ("data", line.data, subject.test.identity),
                (f"the label of image {line.image}", line.label, labels.get(line.image)),
            )
            if stated != now
        ]  # fmt: skip
        if differing:
            raise ArqError(f"{path} was begun with {'; '.join(differing)}. Choose another --output, or delete it.")


# ---- the work --------------------------------------------------------------------------------


def _decide(
    work: Verification, writer: RobustnessWriter, subject: Subject, options: RobustnessOptions, on_progress: OnProgress
) -> None:
    from arqsearch.certify.linf.robustness import BATCH

    writer.write(work.follow())
    count, begin = len(work.positions), time.perf_counter()
    for start in range(0, count, BATCH):
        writer.write(work.by_boxes(start))
        done = min(start + BATCH, count)
        rate = done / max(time.perf_counter() - begin, 1e-9)
        on_progress(f"boxes {subject.name}", done, count, f"{rate:,.0f} images/s")
    if not options.complete:
        return
    writer.write(work.follow())
    progress = _Progress(work, f"verify {subject.name}", on_progress)
    with LocalExecutor(options.workers) as executor:
        while questions := work.questions():
            asked = {f"image {work.dataset.ids[q.position]}, ε = {q.epsilon}": q for q in questions}
            tasks = [Task(name, decide_one, _arguments(work, subject, q)) for name, q in asked.items()]

            def keep(name: str, verdict: Any, asked: dict[str, Question] = asked) -> None:
                writer.write(work.answer(asked[name], verdict))
                progress.answered(asked[name], verdict)

            executor.map(tasks, lambda *_: None, keep)


def _arguments(work: Verification, subject: Subject, question: Question) -> tuple[Any, ...]:
    image, label = work.dataset.images[question.position], int(work.dataset.labels[question.position])
    return str(subject.path), subject.program.hash, limits_of(work.budget), image, label, question.epsilon


class _Progress:
    """Images left and what was found, with the rate."""

    def __init__(self, work: Verification, task: str, on_progress: OnProgress) -> None:
        self.work, self.task, self.report = work, task, on_progress
        self.begin, self.total = time.monotonic(), len(work.questions())
        self.done = 0
        self.counts = {"robust": 0, "non-robust": 0, "unknown": 0}

    def answered(self, question: Question, verdict: Verdict) -> None:
        """Count a verdict and say how far the work is."""
        self.counts[verdict.status] = self.counts.get(verdict.status, 0) + 1
        self.done += not self.work.open(question.position)
        done, left, spent = self.done, self.total - self.done, time.monotonic() - self.begin
        found = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        rate = f", {60 * done / spent:,.1f} images/min, {duration(left * spent / done)} left" if done and left else ""
        self.report(self.task, done, self.total, found + rate)


def decide_one(
    path: str, program: str, limits: Limits, image: np.ndarray, label: int, epsilon: int, on_progress: OnProgress
) -> Verdict:
    """Complete verification of one image; a process keeps its verifier."""
    return _verifier(path, program, limits).verify(image, label, epsilon)


@lru_cache(maxsize=2)
def _verifier(path: str, program: str, limits: Limits) -> ImageVerifier:
    loaded = IntegerProgram.load(path)
    if loaded.hash != program:
        raise ArqError(f"{path} was changed while its robustness was verified; run the command again.")
    return complete_verifier(loaded, limits)


def complete_verifier(program: IntegerProgram, limits: Limits) -> ImageVerifier:
    """Boxes and linear bounds, branch and bound, attack, integer programming."""
    from arqsearch.certify.linf.verifier import CompleteVerifier

    verifier: ImageVerifier = CompleteVerifier(program, limits)
    return verifier


# ---- checking --------------------------------------------------------------------------------


def check_robustness_file(path: Path, program: IntegerProgram, test: Dataset, images: int) -> Checked:
    """Check a robustness file, as :func:`arqsearch.certify.linf.robustness_check.check_file`.

    :param images: robust lines that boxes do not prove, chosen at random, to prove again; 0 = all.
    """
    rank = {int(image): position for position, image in enumerate(test.ids)}

    def decide(line: RobustnessLine, limits: Limits) -> Verdict:
        position = rank[line.image]
        return complete_verifier(program, limits).verify(test.images[position], line.label, line.epsilon)

    return check_file(path, program, test, decide, images or None)


def find_robust_program(path: Path, given: str | None, folder: Path | None = None) -> IntegerProgram | None:
    """The program that a robustness file is about: the given one, else that of its hash in a run folder.

    :returns: None where it was not found.
    """
    if given is not None:
        return IntegerProgram.load(resolve(given, "program").expanduser())
    wanted = {line.program for line in robustness_file.read_lines(path)}
    for place in [path.absolute().parent.parent, *([] if folder is None else [folder])]:
        for file in sorted(place.glob("networks/*/program.safetensors")):
            program = IntegerProgram.load(file)
            if program.hash in wanted:
                return program
    return None


def described(checked: Checked) -> str:
    """What was checked, in words."""
    return (
        f"verdicts hold: {checked.counterexamples} counter-examples run again, {checked.boxes} robust ones proven "
        f"again by boxes, {checked.complete} by complete verification"
    )
