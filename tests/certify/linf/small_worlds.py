"""Integer networks so small that every image of a box can be run, of every operation that bounds cover."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer, prove
from tests.integer.interpreter import interpret

#: Shape of the image: three pixels move by ε = 2 in 125 ways.
SHAPES = ((1, 3, 1), (2, 2, 1), (1, 2, 2))


def world(seed: int) -> IntegerProgram:
    """A program of two or three layers; the seed chooses roundings, clips and what lies between the layers."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    ops: list[O.Op] = []

    def put(make: Any, *fields: Any, sources: tuple[int, ...] | None = None) -> int:
        ops.append(make(sources if sources is not None else (len(ops),), len(ops) + 1, *fields))
        return len(ops)

    def scale(bits: int = 4, signed: bool = False, channels: int = 1) -> int:
        spec = infer(ops, TensorSpec(shape, 0, 255))[-1]
        top = max(abs(spec.lo), abs(spec.hi), 1)
        lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        shift = int(rng.integers(6, 12))
        factor = max(1, round(rng.uniform(2, 12) * hi * 2**shift / top))
        rounding = O.ROUNDINGS[int(rng.integers(3))]
        factors = np.maximum(1, factor + rng.integers(-factor // 4 - 1, factor // 4 + 1, channels))
        return put(O.Requantize, factors.astype(np.int64), np.full(channels, shift), rounding, lo, hi)

    def weights(*size: int) -> np.ndarray:
        return rng.integers(-8, 8, size).astype(np.int32)

    if seed % 4:
        multiplier = np.array([int(rng.integers(1, 6))])
        offset = np.array([int(rng.integers(-40, 40))])
        put(O.InputQuantize, multiplier, offset, int(rng.integers(0, 3)), O.ROUNDINGS[seed % 3], 0, 255, -40, 300)
    kind = seed % 7
    if kind in (1, 2, 3, 4):
        put(O.Conv2d, weights(3, 1, 2, shape[2]), rng.integers(-50, 50, 3).astype(np.int32), (1, 1), (0, 0, 1, 0), 1)
        first = scale(channels=3)
        if kind == 1:
            put(O.MaxPool2d, (1, 2), (1, 1), (0, 0, 1, 0))
        elif kind == 2:
            put(O.Pad2d, (1, 0, 0, 1), rng.integers(0, 9, 3).astype(np.int32))
            put(O.SumPool2d, (1, 2), (1, 2), (0, 0, 0, 1))
            scale()
        elif kind == 3:
            put(O.Conv2d, weights(3, 1, 1, 3), rng.integers(-9, 9, 3).astype(np.int32), (1, 1), (0, 0, 0, 0), 1)
            branch = scale(signed=True, channels=3)
            put(O.Add, 0, 12, sources=(first, branch))
        else:
            put(O.PadChannels, 1, 0)
            height, width, _ = infer(ops, TensorSpec(shape, 0, 255))[-1].shape
            put(O.Slice, (0, height, 1), (0, width, 2), (1, 4, 1))
    put(O.Flatten)
    features = infer(ops, TensorSpec(shape, 0, 255))[-1].shape[0]
    if kind in (0, 5, 6):
        put(O.Linear, weights(4, features), rng.integers(-200, 200, 4).astype(np.int32))
        scale(channels=4)
        features = 4
    put(O.Linear, weights(3, features), rng.integers(-20, 20, 3).astype(np.int32))
    if kind == 6:
        scale(3, signed=True)
    program = IntegerProgram(tuple(ops), infer(ops, TensorSpec(shape, 0, 255)), len(ops), {"origin": "small world"})
    prove(program)
    return program


def instances(seed: int, epsilon: int) -> list[tuple[IntegerProgram, np.ndarray, int]]:
    """Questions of one world that boxes leave open: ``(program, image uint8 (H, W, C), class)``.

    As far as 300 random images hold them: one of a robust and one of a non-robust image.
    """
    program = world(seed)
    rng = np.random.default_rng(10_000 + seed)
    images = rng.integers(0, 256, (300, *program.input.shape)).astype(np.uint8)
    classes = program.run(images).long().argmax(1)
    open_ones = np.flatnonzero(~IntervalBounds(program).verify(images, classes, epsilon).robust.numpy())
    found: dict[bool, tuple[IntegerProgram, np.ndarray, int]] = {}
    for at in open_ones.tolist():
        answers = program.run(box_points(images[at], epsilon)).long().argmax(1)
        found.setdefault(bool((answers == classes[at]).all()), (program, images[at], int(classes[at])))
        if len(found) == 2:
            break
    return list(found.values())


def box_points(image: np.ndarray, epsilon: int) -> np.ndarray:
    """Every image of the box, int16 ``(N, H, W, C)``."""
    spans = [range(max(0, int(p) - epsilon), min(255, int(p) + epsilon) + 1) for p in image.reshape(-1)]
    return np.array(list(itertools.product(*spans)), dtype=np.int16).reshape(-1, *image.shape)


def robust(program: IntegerProgram, image: np.ndarray, label: int, epsilon: int) -> bool:
    """Whether every image of the box has the class, by running each through the independent interpreter."""
    logits = interpret(program, box_points(image, epsilon))
    return all(row.index(max(row)) == label for row in logits)
