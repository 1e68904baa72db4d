"""The operations of an integer program: small frozen records that know only their integers.

Tensors are NHWC without the batch axis in their stated shape: ``(H, W, C)`` or ``(C,)``. Weights are
OHWI. What an operation *means* is stated here, in exact integers; each consumer (execution, ranges,
interval bounds, ONNX, C) holds one rule for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.integer[Any]]
Rounding: TypeAlias = Literal["half_up", "half_even", "floor"]
#: top, bottom, left, right
Padding: TypeAlias = tuple[int, int, int, int]

ROUNDINGS: tuple[Rounding, ...] = ("half_up", "half_even", "floor")
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True, eq=False)
class Op:
    """Base record: `inputs` are tensor indices, `output` is the index of the one tensor written."""

    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True, eq=False)
class InputQuantize(Op):
    """Pixels to codes: ``clip(round((clip(x, pre_lo, pre_hi) * multiplier[c] + offset[c]) / 2**shift), lo, hi)``.

    `multiplier` and `offset` are per channel, int64; `shift` 0..62.
    """

    multiplier: IntArray
    offset: IntArray
    shift: int
    rounding: Rounding
    pre_lo: int
    pre_hi: int
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class Conv2d(Op):
    """Accumulators ``sum w*x + bias``; padded positions hold 0. `weight` is ``(O, KH, KW, I/groups)``."""

    weight: IntArray
    bias: IntArray
    stride: tuple[int, int]
    padding: Padding
    groups: int


@dataclass(frozen=True, eq=False)
class Linear(Op):
    """Accumulators ``W x + bias`` over a flat tensor; `weight` is ``(O, I)``."""

    weight: IntArray
    bias: IntArray


@dataclass(frozen=True, eq=False)
class Requantize(Op):
    """``clip(round(x * multiplier[c] / 2**shift[c]), lo, hi)``.

    `multiplier` (0..2**31-1) and `shift` (1..62) hold one entry for each channel, or one for all.
    Rounding: ``half_up`` is ``(x*M + 2**(k-1)) >> k``; ``half_even`` rounds ties to the even integer;
    ``floor`` is ``(x*M) >> k``; all in int64 with a flooring shift.
    """

    multiplier: IntArray
    shift: IntArray
    rounding: Rounding
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class Add(Op):
    """``clip(a + b, lo, hi)`` of two tensors on one scale."""

    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class SumPool2d(Op):
    """Sum over each window (the division belongs to the next multiplier); padded positions hold 0."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding


@dataclass(frozen=True, eq=False)
class MaxPool2d(Op):
    """Maximum over each window; padded positions never win. Padding is smaller than the kernel."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding


@dataclass(frozen=True, eq=False)
class Pad2d(Op):
    """Spatial padding with one constant for each channel (`values`, shape ``(C,)``)."""

    padding: Padding
    values: IntArray


@dataclass(frozen=True, eq=False)
class PadChannels(Op):
    """Zero channels put before and after (option-A shortcuts)."""

    before: int
    after: int


@dataclass(frozen=True, eq=False)
class Slice(Op):
    """``x[h0:h1:hs, w0:w1:ws, c0:c1:cs]`` with non-negative bounds and positive steps."""

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    channels: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Flatten(Op):
    """``(H, W, C)`` to ``(H*W*C,)`` in that memory order."""


#: Every operation of the arithmetic. Each consumer must have a rule for each; a test walks the grid.
OPS: tuple[type[Op], ...] = (
    InputQuantize,
    Conv2d,
    Linear,
    Requantize,
    Add,
    SumPool2d,
    MaxPool2d,
    Pad2d,
    PadChannels,
    Slice,
    Flatten,
)

#: A consumer's table: one rule for each operation.
RuleTable: TypeAlias = dict[type[Op], Callable[..., Any]]


def window_output(size: int, kernel: int, stride: int, pad: int) -> int:
    """Output length of a sliding window along one axis (`pad` = both sides together)."""
    return (size + pad - kernel) // stride + 1


def slice_length(bounds: tuple[int, int, int]) -> int:
    """Number of entries a (start, stop, step) slice selects."""
    start, stop, step = bounds
    return max(0, -(-(stop - start) // step))


def output_shape(op: Op, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an operation's result from its (first) input's shape, batch axis left out."""
    if isinstance(op, Conv2d):
        kernel = (op.weight.shape[1], op.weight.shape[2])
        channels = int(op.weight.shape[0])
    elif isinstance(op, SumPool2d | MaxPool2d):
        kernel = op.kernel
        channels = shape[-1]
    elif isinstance(op, Linear):
        return (int(op.weight.shape[0]),)
    elif isinstance(op, Pad2d):
        top, bottom, left, right = op.padding
        return (shape[0] + top + bottom, shape[1] + left + right, shape[2])
    elif isinstance(op, PadChannels):
        return (*shape[:-1], shape[-1] + op.before + op.after)
    elif isinstance(op, Slice):
        return (slice_length(op.rows), slice_length(op.columns), slice_length(op.channels))
    elif isinstance(op, Flatten):
        return (int(np.prod(shape)),)
    else:
        return shape
    top, bottom, left, right = op.padding
    return (
        window_output(shape[0], kernel[0], op.stride[0], top + bottom),
        window_output(shape[1], kernel[1], op.stride[1], left + right),
        channels,
    )
