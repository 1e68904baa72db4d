"""Certification by many workers: one image of one network is a task, and the caller alone writes the certificate files.

A line depends on its image only, so neither the number of workers nor the order in which they finish shows in a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from arqsearch import __version__
from arqsearch.certify.base import BaseNetwork
from arqsearch.certify.certificate import CertificateWriter, certify_dataset
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import INCREMENTAL, CertificateLine
from arqsearch.certify.meter import Meter
from arqsearch.certify.rules import make_rule
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, program_classifier
from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe
from arqsearch.search import certification as parts
from arqsearch.search.executor import Executor, OnProgress, Task
from arqsearch.search.stages import FLOAT, write_json
from arqsearch.search.weights import state_hash
from arqsearch.search.workspace import Workspace

#: Run folders that this process has opened, by recipe, and their networks; a worker needs one run.
_SPACES: dict[str, tuple[Workspace, dict[str, Subject]]] = {}


@dataclass(frozen=True)
class Subject:
    """A network to certify.

    :param classify: runs it.
    :param identity: hash of its program; of its weights for the float network.
    :param settings: how it is certified.
    :param base: the network that the ``incremental`` rule starts from.
    """

    classify: Classifier
    identity: str
    settings: SmoothingSettings
    base: BaseNetwork | None


def open_subject(space: Workspace, name: str) -> Subject:
    """A compared network of a run folder, with its certificate settings; for the float one, those of an estimate."""
    recipe = space.recipe
    if name == FLOAT:
        net, settings = parts.float_network(space), parts.smoothing_settings(recipe)
        if settings.rule == INCREMENTAL:  # A float network has no program that says which noise it has seen.
            fixed = recipe.certify.model_copy(update={"rule": "fixed"})
            settings = parts.smoothing_settings(recipe.model_copy(update={"certify": fixed}))
        return Subject(parts.float_classifier(net), "float:" + state_hash(net.state_dict()), settings, None)
    program = parts.load_program(space, name)
    settings, base = parts.smoothing_settings(recipe, program.num_classes), None
    if settings.rule == INCREMENTAL:
        base = parts.open_base(recipe.certify, program, recipe.sigma, space.certificate_path(name), space.dir)
    return Subject(program_classifier(program, recipe.sigma), program.hash, settings, base)


def opened(recipe: Recipe, name: str) -> tuple[Workspace, Subject]:
    """The run folder and one of its networks, opened once in each process."""
    key = recipe.model_dump_json()
    if key not in _SPACES:
        _SPACES.clear()
        _SPACES[key] = (Workspace(recipe), {})
    space, subjects = _SPACES[key]
    if name not in subjects:
        subjects[name] = open_subject(space, name)
    return space, subjects[name]


def certify_position(
    recipe: Recipe, name: str, position: int, identity: str, on_progress: OnProgress
) -> tuple[str, int]:
    """Task of a worker: the line of one image, and how many samples it took.

    :param position: in the test set.
    :param identity: of the network and data set that the caller certifies.
    :raises ArqError: when this machine's network or data are others.
    """
    space, subject = opened(recipe, name)
    test = space.test_set
    if _identity(subject, space) != identity:
        raise ArqError(
            f"A worker sees another network {name!r} or other test images than the process that started it. Every "
            "machine needs the same run folder (a shared file system) and data sets under $ARQSEARCH_DATA."
        )
    task, taken, shown = f"certify {name} {position}", 0, time.monotonic()

    def on_samples(samples: int) -> None:
        nonlocal taken, shown
        taken += samples
        if time.monotonic() - shown > parts.SIGN_SECONDS:
            shown = time.monotonic()
            on_progress(task, taken, 0, "")

    job = ImageJob(
        subject.classify, test.images[position], int(test.ids[position]), int(test.labels[position]), subject.settings,
        subject.identity, test.identity, on_samples,
    )  # fmt: skip
    return make_rule(subject.settings, subject.base).certify(job).to_json(), taken


def bound_network(recipe: Recipe, name: str, on_progress: OnProgress) -> dict[str, Any]:
    """Task of a worker: clean accuracy and, for an integer program, interval verdicts."""
    space, subject = opened(recipe, name)
    found: dict[str, Any] = {"network": name, "program": subject.identity}
    found["clean"] = parts.clean_accuracy(subject.classify, space)
    if name != FLOAT:
        found["interval"] = parts.interval_verdicts(parts.load_program(space, name), space)
    return found


def certify_networks(recipe: Recipe, names: Sequence[str], executor: Executor, on_progress: OnProgress) -> None:
    """Certificates (for the float network, estimates) and bounds of networks; resumes by image.

    :raises ArqError: when a certificate file holds lines of something else.
    """
    space = Workspace(recipe)
    with ExitStack() as stack:
        files = {name: _File(space, name, stack, on_progress) for name in names}
        tasks = [Task(f"bounds {name}", bound_network, (recipe, name)) for name in names]
        for name, file in files.items():
            tasks += [
                Task(f"certify {name} {position}", certify_position, (recipe, name, position, file.identity))
                for position in file.missing
            ]

        def on_result(task: str, result: Any) -> None:
            what, name = task.split(" ")[:2]
            if what == "bounds":
                write_json(space.bounds_path(name), result)
            else:
                files[name].add(task, *result)

        def on_sign(task: str, taken: int, total: int, note: str) -> None:
            files[task.split(" ")[1]].sign(task, taken)

        executor.map(tasks, on_sign, on_result)
    for file in files.values():
        file.finish()


class _File:
    """A certificate file that lines are added to as workers deliver them, with its progress."""

    def __init__(self, space: Workspace, name: str, stack: ExitStack, on_progress: OnProgress) -> None:
        self.space, self.name, self._on_progress = space, name, on_progress
        self.subject, self.path = open_subject(space, name), space.certificate_path(name)
        self.identity = _identity(self.subject, space)
        test = space.test_set
        self._order = list(parts.chosen_positions(space.recipe.certify, len(test)))
        self._run([])  # Refuses a file that holds something else.
        self._writer = stack.enter_context(CertificateWriter(self.path))
        done = {line.image for line in self._writer.lines}
        self.missing = [position for position in self._order if int(test.ids[position]) not in done]
        older = {line.version for line in self._writer.lines} - {__version__}
        if older and self.missing:
            raise ArqError(
                f"{self.path} was begun by version {', '.join(sorted(older))}, this is {__version__}. Finish it with "
                "that version, or certify into another file."
            )
        if self.subject.base is not None:
            for position in self.missing:
                self.subject.base.line(int(test.ids[position]))
        self._meter, self._taken, self._shown = Meter(), dict[str, int](), 0.0
        self._left = len(self.missing)

    def _run(self, positions: list[int]) -> list[CertificateLine]:
        subject = self.subject
        return certify_dataset(
            subject.classify, self.space.test_set, subject.identity, subject.settings, self.path, positions=positions,
            base=subject.base,
        )  # fmt: skip

    def sign(self, task: str, taken: int) -> None:
        """Count samples of an image that is being certified."""
        self._meter.took(max(0, taken - self._taken.get(task, 0)))
        self._taken[task] = max(taken, self._taken.get(task, 0))
        if time.monotonic() - self._shown > parts.SIGN_SECONDS:
            self._shown = time.monotonic()
            self._show()

    def add(self, task: str, line: str, taken: int) -> None:
        """Append a finished image; it is on disk afterwards."""
        self._writer.write(CertificateLine.from_json(line, task))
        self._meter.took(max(0, taken - self._taken.pop(task, 0)))
        self._meter.finished()
        self._left -= 1
        self._show()

    def _show(self) -> None:
        done = len(self._order) - self._left
        self._on_progress(f"certify {self.name}", done, len(self._order), self._meter.note(self._left))

    def finish(self) -> None:
        """Put the lines in the order of the data set."""
        self._run(self._order)


def _identity(subject: Subject, space: Workspace) -> str:
    return f"{subject.identity} {space.test_set.identity}"
