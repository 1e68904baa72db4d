"""Verify somebody else's integer network: read it, state it as an `IntegerProgram`, save it, ask about it.

The network is the 6-bit MNIST MLP of Henzinger, Lechner and Žikelić (AAAI 2021), four integer arrays in an ``.npz``::

    python examples/henzinger2021.py mnist_int6.npz henzinger2021.safetensors
    arqsearch verify-robustness henzinger2021.safetensors --eps 1,2,4

What an operation means is stated in ``arqsearch.integer.ops``, in exact integers; a network of any origin can be
verified, exported and run once it is written in these operations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer, prove


def as_program(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> IntegerProgram:
    """The published semantics, operation by operation.

    ``hidden = clip((x W1 + (b1 << 9) + 256) >> 9, 0, 63)``; ``logits = clip((hidden W2 + (b2 << 5) + 16) >> 5, -32,
    31)``; the class is the first maximum.

    :param w1: integers ``(784, hidden)`` on raw pixels 0..255.
    :param b1: integers ``(hidden,)``.
    :param w2: integers ``(hidden, classes)``.
    :param b2: integers ``(classes,)``.
    """
    one = np.array([1], dtype=np.int64)
    operations = (
        O.Flatten((0,), 1),
        O.Linear((1,), 2, np.ascontiguousarray(w1.T, dtype=np.int32), b1.astype(np.int32) << 9),
        # "half_up" with multiplier 1 and shift 9 is (x + 256) >> 9.
        O.Requantize((2,), 3, one, np.array([9]), "half_up", 0, 63),
        O.Linear((3,), 4, np.ascontiguousarray(w2.T, dtype=np.int32), b2.astype(np.int32) << 5),
        O.Requantize((4,), 5, one, np.array([5]), "half_up", -32, 31),
    )
    # `infer` derives every tensor's shape and range; `prove` shows that nothing can overflow.
    tensors = infer(operations, TensorSpec((28, 28, 1), 0, 255))
    program = IntegerProgram(operations, tensors, 5, {"origin": "Henzinger, Lechner, Žikelić 2021"})
    prove(program)
    return program


def main() -> None:
    """Read the arrays, write the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arrays", type=Path, help=".npz with W1, b1, W2 and b2")
    parser.add_argument("program", type=Path, help="program file to write")
    given = parser.parse_args()
    with np.load(given.arrays) as arrays:
        program = as_program(*(arrays[name] for name in ("W1", "b1", "W2", "b2")))
    program.save(given.program)
    print(f"Wrote {given.program}: {len(program.ops)} operations, hash {program.hash}")


if __name__ == "__main__":
    main()
