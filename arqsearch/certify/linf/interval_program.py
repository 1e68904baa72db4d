"""The interval transformer of an integer program is an integer program itself, with two values for every one.

Channel c of a tensor becomes channels 2c (lower bound) and 2c + 1 (upper bound), in flat tensors alike. A weight w
becomes ``[[w⁺, w⁻], [w⁻, w⁺]]``: the lower bound reads lower bounds where w is positive and upper bounds where it is
negative. Every other operation is monotone and acts on both values alike. A row has the positive and the negative
weights of the original row, so the range proof of the program is that of its interval program, number for number,
and whatever runs programs exactly bounds them exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec

#: An operation and the channels of its input to operations on both bounds, each reading the one before.
Rule: TypeAlias = Callable[[O.Op, int], tuple[O.Op, ...]]


def interval_program(program: IntegerProgram, output: int | None = None) -> IntegerProgram:
    """The program on boxes: pixels ``(H, W, 2C)`` to bounds of one tensor, lower and upper in turn.

    :param output: flat tensor to bound, None = the logits; operations that it does not need are left out.
    :raises ArqError: when the tensor is not flat or is the input.
    """
    target = program.output if output is None else output
    if target == 0 or len(program.tensors[target].shape) != 1:
        raise ArqError(f"Tensor {target} has shape {program.tensors[target].shape}; name a flat tensor to bound.")
    needed = {target}
    for op in reversed(program.ops):
        if op.output in needed:
            needed.update(op.inputs)
    height, width, channels = program.input.shape
    tensors = [TensorSpec((height, width, 2 * channels), program.input.lo, program.input.hi)]
    ops: list[O.Op] = []
    place = {0: 0}
    for op in program.ops:
        if op.output not in needed:
            continue
        inputs, spec = tuple(place[source] for source in op.inputs), program.tensors[op.output]
        for double in RULES[type(op)](op, program.tensors[op.inputs[0]].shape[-1]):
            shape = O.output_shape(double, tensors[inputs[0]].shape)
            ops.append(dataclasses.replace(double, inputs=inputs, output=len(tensors)))
            inputs = (len(tensors),)
            tensors.append(TensorSpec(shape, spec.lo, spec.hi))
        place[op.output] = inputs[0]
    return IntegerProgram(tuple(ops), tuple(tensors), place[target], {"bounds": program.hash, "tensor": target})


def interleave(lo: NDArray[np.integer[Any]], hi: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Bounds ``(..., C)`` as one array ``(..., 2C)`` that an interval program reads."""
    return np.stack([lo, hi], axis=-1).reshape(*lo.shape[:-1], 2 * lo.shape[-1])


def double_weights(weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Weights ``(O, ..., I)`` as ``(2O, ..., 2I)``, rows and columns of lower and upper bounds in turn."""
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    rows = [np.stack(pair, axis=-1) for pair in ((positive, negative), (negative, positive))]
    stacked = np.stack(rows, axis=1)  # (O, 2, ..., I, 2)
    out, _, *inner, channels, _ = stacked.shape
    return stacked.reshape(2 * out, *inner, 2 * channels)


def _twice(values: O.IntArray, channels: int) -> O.IntArray:
    """One entry for all channels, or each entry for both of its bounds."""
    return values if values.size == 1 and channels > 1 else np.repeat(values, 2)


def _alike(op: O.Op, channels: int) -> tuple[O.Op, ...]:
    return (op,)


def _weighted(op: O.Conv2d | O.Linear, channels: int) -> tuple[O.Op, ...]:
    weight = double_weights(op.weight.astype(np.int64)).astype(np.int16)
    return (dataclasses.replace(op, weight=weight, bias=np.repeat(op.bias, 2)),)


def _input_quantize(op: O.InputQuantize, channels: int) -> tuple[O.Op, ...]:
    both = dataclasses.replace(op, multiplier=_twice(op.multiplier, channels), offset=_twice(op.offset, channels))
    falling = np.broadcast_to(op.multiplier < 0, (channels,))
    if not falling.any():
        return (both,)
    pairs = 2 * np.arange(channels)[:, None] + np.where(falling[:, None], (1, 0), (0, 1))
    return both, _choose(pairs.ravel(), 2 * channels)


def _requantize(op: O.Requantize, channels: int) -> tuple[O.Op, ...]:
    return (dataclasses.replace(op, multiplier=_twice(op.multiplier, channels), shift=_twice(op.shift, channels)),)


def _pad(op: O.Pad2d, channels: int) -> tuple[O.Op, ...]:
    return (dataclasses.replace(op, values=np.repeat(op.values, 2)),)


def _pad_channels(op: O.PadChannels, channels: int) -> tuple[O.Op, ...]:
    return (dataclasses.replace(op, before=2 * op.before, after=2 * op.after),)


def _slice(op: O.Slice, channels: int) -> tuple[O.Op, ...]:
    start, stop, step = op.channels
    if step == 1:
        return (dataclasses.replace(op, channels=(2 * start, 2 * stop, 1)),)
    pairs = 2 * np.arange(start, stop, step)[:, None] + np.arange(2)
    return dataclasses.replace(op, channels=(0, 2 * channels, 1)), _choose(pairs.ravel(), 2 * channels)


def _choose(kept: NDArray[np.int64], channels: int) -> O.Op:
    """The given channels in that order, by weights of 1: no slice takes pairs at a distance, or swaps."""
    weight = np.zeros((len(kept), 1, 1, channels), dtype=np.int16)
    weight[np.arange(len(kept)), 0, 0, kept] = 1
    return O.Conv2d((0,), 0, weight, np.zeros(len(kept), dtype=np.int32), (1, 1), (0, 0, 0, 0), 1)


RULES: O.RuleTable = {
    O.InputQuantize: _input_quantize,
    O.Conv2d: _weighted,
    O.Linear: _weighted,
    O.Requantize: _requantize,
    O.Add: _alike,
    O.SumPool2d: _alike,
    O.MaxPool2d: _alike,
    O.Pad2d: _pad,
    O.PadChannels: _pad_channels,
    O.Slice: _slice,
    O.Flatten: _alike,
}
