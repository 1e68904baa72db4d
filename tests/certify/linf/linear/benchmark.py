"""The public 6-bit MNIST network (Henzinger, Lechner, Žikelić 2021) as an integer program, from its own arrays."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import op_range


def program_of(ops: list[O.Op], spec: TensorSpec) -> IntegerProgram:
    """A program of the given operations in order, every range as tight as its proof."""
    specs = [spec]
    for op in ops:
        inputs = [specs[i] for i in op.inputs]
        found = op_range(op, *inputs)
        specs.append(TensorSpec(O.output_shape(op, inputs[0].shape), found.lo, found.hi))
    return IntegerProgram(tuple(ops), tuple(specs), len(specs) - 1)


def mlp(layers: list[tuple[np.ndarray, np.ndarray, int, int, int]], shape: tuple[int, int, int]) -> IntegerProgram:
    """Linear layers (weight ``(O, I)``, bias, shift, lo, hi), each rounded half up; shift 0 leaves the sums."""
    ops: list[O.Op] = [O.Flatten((0,), 1)]
    for weight, bias, shift, lo, hi in layers:
        ops.append(O.Linear((len(ops),), len(ops) + 1, weight, bias))
        if shift:
            one, by = np.ones(1, dtype=np.int64), np.full(1, shift, dtype=np.int64)
            ops.append(O.Requantize((len(ops),), len(ops) + 1, one, by, "half_up", lo, hi))
    return program_of(ops, TensorSpec(shape, 0, 255))


def data_folder() -> Path:
    """Where shared data lies."""
    return Path(os.environ.get("ARQSEARCH_DATA", "../shared")) / "data" / "verification"


def benchmark_program() -> IntegerProgram:
    """784-64-32, weights of 6 bits, raw pixels."""
    arrays = np.load(data_folder() / "henzinger2021_mnist_int6.npz")
    first, second = (arrays[name].astype(np.int64) for name in ("b1", "b2"))
    return mlp(
        [
            (arrays["W1"].T.astype(np.int16), (first << 9).astype(np.int32), 9, 0, 63),
            (arrays["W2"].T.astype(np.int16), (second << 5).astype(np.int32), 5, -32, 31),
        ],
        (28, 28, 1),
    )
