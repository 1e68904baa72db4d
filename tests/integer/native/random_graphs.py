"""Random programs with many readers for each tensor: the shapes in which a fusion could go wrong.

All spatial tensors have one shape, so that any of them can be read, requantized and added again anywhere.
"""

from __future__ import annotations

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from tests.integer.random_programs import Builder, activation_range, requantize, weights

SHAPE = (4, 5, 4)


def random_graph(seed: int) -> IntegerProgram:
    """A program of about 15 operations, in some of which sums, layers and requantizations share their inputs."""
    rng = np.random.default_rng(seed + 50_000)
    builder = Builder(rng, TensorSpec(SHAPE, -40, 295))
    values = [0]
    for _ in range(builder.integer(4, 8)):
        kind = builder.pick("layer", "layer", "sum", "sum", "sum", "codes", "pool", "flat")
        source = values[-1] if rng.random() < 0.6 else int(rng.choice(values))
        if kind == "layer":
            values += _layer(builder, _maybe_codes(builder, source))
        elif kind == "sum":
            values += _sum(builder, source, int(rng.choice(values)))
        elif kind == "codes":
            requantize(builder, source, *activation_range(builder))
            values.append(builder.last)
        elif kind == "pool":
            builder.append(O.MaxPool2d((source,), builder.last + 1, (3, 3), (1, 1), (1, 1, 1, 1)))
            values.append(builder.last)
        else:
            _vector(builder, source)
    _vector(builder, values[-1])
    return builder.program()


def _maybe_codes(builder: Builder, source: int) -> int:
    if builder.rng.random() < 0.6:
        requantize(builder, source, *activation_range(builder))
        return builder.last
    return source


def _layer(builder: Builder, source: int) -> list[int]:
    """A convolution, in most cases with requantized accumulators; what may be read later."""
    groups = builder.pick(1, 1, 2, 4)
    weight = weights(builder.rng, (4, 3, 3, 4 // groups), builder.integer(2, 8))
    bias = builder.rng.integers(-500, 500, size=4).astype(np.int32)
    if not builder.append(O.Conv2d((source,), builder.last + 1, weight, bias, (1, 1), (1, 1, 1, 1), groups)):
        return []
    accumulators = builder.last
    if builder.rng.random() < 0.15:
        return [accumulators]
    requantize(builder, accumulators, *activation_range(builder))
    return [accumulators, builder.last] if builder.rng.random() < 0.2 else [builder.last]


def _sum(builder: Builder, first: int, second: int) -> list[int]:
    """A sum of any two values; layers and requantizations stand before some operands."""
    operands = []
    for value in (first, second):
        operand = value
        if builder.rng.random() < 0.5:
            operand = [operand, *_layer(builder, operand)][-1]
        if builder.rng.random() < 0.5 or builder.specs[operand].hi > 2**20 or builder.specs[operand].lo < -(2**20):
            requantize(builder, operand, *builder.pick((-(2**15) + 1, 2**15 - 1), activation_range(builder)))
            operand = builder.last
        operands.append(operand)
    lo, hi = builder.pick((0, 255), (-127, 127), (-(2**20), 2**20))
    builder.append(O.Add((operands[0], operands[1]), builder.last + 1, lo, hi))
    return [builder.last]


def _vector(builder: Builder, source: int) -> None:
    """Flatten and, in most cases, layers behind it; the last vector of a program is its output."""
    builder.append(O.Flatten((source,), builder.last + 1))
    if builder.rng.random() < 0.3:
        return
    if builder.rng.random() < 0.5:
        requantize(builder, builder.last, *activation_range(builder))
    features = builder.specs[builder.last].shape[0]
    weight = weights(builder.rng, (3, features), builder.integer(2, 4))
    builder.append(O.Linear((builder.last,), builder.last + 1, weight, np.array([5, -70, 0], dtype=np.int32)))
