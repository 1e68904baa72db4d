"""A small program on images of four pixels, a data set, and a verifier that enumerates: the truth at every ε."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer


@dataclass(frozen=True)
class Images:
    """What verification needs of a data set."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    identity: str = "world"
    name: str = "world"

    def __len__(self) -> int:
        return len(self.images)


def world_program() -> IntegerProgram:
    """Two layers whose boxes lose what the first layer's neurons share, so that some images need enumeration."""
    rng = np.random.default_rng(3)
    first, second = rng.integers(-9, 10, (6, 4)).astype(np.int8), rng.integers(-9, 10, (3, 6)).astype(np.int8)
    operations = (
        O.Flatten((0,), 1),
        O.Linear((1,), 2, first, np.full(6, 300, dtype=np.int32)),
        O.Requantize((2,), 3, np.array([1]), np.array([3]), "half_up", 0, 255),
        O.Linear((3,), 4, second, np.zeros(3, dtype=np.int32)),
    )
    return IntegerProgram(operations, infer(operations, TensorSpec((2, 2, 1), 0, 255)), 4)


def world_images(program: IntegerProgram, count: int = 40) -> Images:
    """Images close to the border of two classes, labelled by the program, every eighth one wrongly."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (100 * count, 2, 2, 1)).astype(np.uint8)
    top = program.run(images).sort(1).values
    images = images[(top[:, -1] - top[:, -2]).argsort()[::4].numpy()[:count]]
    labels = program.run(images).argmax(1).numpy().astype(np.int64)
    labels[::8] = (labels[::8] + 1) % 3
    return Images(images, labels, np.arange(count, dtype=np.int64))


class Enumerator:
    """Runs every image of the box."""

    def __init__(self, program: IntegerProgram, limits: Limits = Limits()) -> None:  # noqa: B008
        self.program, self.limits, self.asked = program, limits, []  # type: ignore[var-annotated]

    def verify(self, image: np.ndarray, label: int, epsilon: int) -> Verdict:
        self.asked.append(epsilon)
        sides = [range(max(0, int(p) - epsilon), min(255, int(p) + epsilon) + 1) for p in image.ravel()]
        every = np.array(list(itertools.product(*sides)), dtype=np.uint8).reshape(-1, *image.shape)
        if self.limits.domains is not None and len(every) > self.limits.domains:
            return Verdict("unknown", "branch-and-bound", None, self.limits.domains, f"{self.limits.domains} domains")
        wrong = every[(self.program.run(every).argmax(1) != label).numpy()]
        if len(wrong):
            return Verdict("non-robust", "attack", wrong[0], len(every))
        return Verdict("robust", "branch-and-bound", None, len(every))
