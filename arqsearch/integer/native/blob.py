"""The blob: steps, tensors and constants as 32-bit words. csrc/arq_blob.h states the format word by word."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.native.fuse import Step
from arqsearch.integer.native.rescale import Fast
from arqsearch.integer.native.storage import Tensor
from arqsearch.integer.native.sums import SumClass
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram

MAGIC, FORMAT_VERSION = 0x31515241, 1
HEADER_WORDS, TENSOR_WORDS = 25, 6
NO_TENSOR = 0xFFFFFFFF

Words = NDArray[np.uint32]


class StepKind(IntEnum):
    """ARQ_STEP_*."""

    INPUT = 1
    CONV = 2
    RESCALE = 3
    ADD = 4
    SUMPOOL = 5
    MAXPOOL = 6
    PAD = 7
    CHANNELS = 8
    SLICE = 9
    COPY = 10


@dataclass(frozen=True, eq=False)
class Rescale:
    """A requantization with the clip that it needs here, and its 32-bit form if there is one."""

    op: O.Requantize
    value_lo: int
    value_hi: int
    fast: Fast | None


@dataclass(frozen=True, eq=False)
class Layer:
    """What a convolution step says beyond its tensors.

    :param weight: int16 ``(O, KH, KW, I/groups)``.
    :param bits: of the packed weights.
    :param flat: whether the input is read as one vector.
    :param zero: zero point of the (rescaled) input.
    :param largest: largest stored code of the (rescaled) input, padding included.
    :param after: rescaling of the accumulators.
    :param clip: of the sum with the residual.
    """

    weight: NDArray[np.int16]
    bias: O.IntArray
    bits: int
    flat: bool
    stride: tuple[int, int]
    padding: O.Padding
    groups: int
    zero: int
    largest: int
    after: Rescale | None
    clip: tuple[int, int]
    sum_class: SumClass
    depth: int


@dataclass(frozen=True, eq=False)
class PlacedStep:
    """A step with its arithmetic: `before` rescales what is read, `scratch` are the bytes that it works in."""

    step: Step
    before: tuple[Rescale | None, ...]
    layer: Layer | None
    scratch: int


def serialize(
    program: IntegerProgram,
    tensors: Mapping[int, Tensor],
    steps: Sequence[PlacedStep],
    offsets: Mapping[int, int],
    scratch: Sequence[int],
    arena_bytes: int,
) -> Words:
    """Write the blob.

    :param tensors: those that steps name, in ascending order, with the image (0) first.
    :param offsets: place of every tensor but the image.
    :param scratch: place of every step's scratch memory.
    :raises ArqError: when the blob would have 2^32 words or more.
    """
    writer = _Writer({tensor: index for index, tensor in enumerate(tensors)})
    for placed, place in zip(steps, scratch, strict=True):
        writer.step(placed, place)
    table = [
        word
        for index, tensor in tensors.items()
        for word in (tensor.storage.kind, tensor.storage.zero, *tensor.shape, offsets.get(index, 0))
    ]
    steps_at = HEADER_WORDS + len(table)
    fields, constants = writer.finish(steps_at)
    total = steps_at + len(fields) + len(constants)
    if total >= 2**32:
        raise ArqError(f"The network takes {total} words of 32 bits, the runtime addresses 2^32. Use a smaller one.")
    digest = np.frombuffer(bytes.fromhex(program.hash), dtype=">u4").tolist()
    height, width, channels = program.input.shape
    header = [
        MAGIC, FORMAT_VERSION, total, 0, ARITHMETIC_VERSION, *digest, height, width, channels, program.input.lo,
        program.input.hi, program.num_classes, len(tensors), HEADER_WORDS, len(steps), steps_at, arena_bytes,
        writer.numbers[program.output],
    ]  # fmt: skip
    words = np.concatenate([_words([*header, *table, *fields]), constants])
    words[3] = zlib.crc32(words[4:].astype("<u4").tobytes())
    return words


def packed_words(codes: int, bits: int) -> int:
    """Words that hold so many codes."""
    return -(-codes * bits // 32)


def pack(codes: O.IntArray, bits: int) -> Words:
    """Two's complement codes of `bits` bits without gaps, the first in the lowest bits of the first word."""
    flat = codes.ravel().astype(np.int64) & (2**bits - 1)
    rows = np.zeros((-(-flat.size // 32), 32), dtype=np.uint64)
    rows.ravel()[: flat.size] = flat
    # 32 codes fill `bits` words; a code may span two.
    packed = np.zeros((len(rows), bits), dtype=np.uint64)
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        shifted = rows[:, position] << np.uint64(shift)
        packed[:, word] |= shifted & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            packed[:, word + 1] |= shifted >> np.uint64(32)
    return packed.ravel()[: packed_words(flat.size, bits)].astype(np.uint32)


def _words(values: Iterable[int]) -> Words:
    """Integers of 32 bits, signed or not."""
    return np.array([int(value) & 0xFFFFFFFF for value in values], dtype=np.uint32)


class _Constant(int):
    """Place among the constants; it becomes an offset from the start of the blob."""


class _Writer:
    """Collects the fields of the steps and the constants behind them; equal constants are kept once."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers
        self.fields: list[int] = []
        self.constants: list[Words] = []
        self.length = 0
        self.known: dict[bytes, int] = {}

    def finish(self, steps_at: int) -> tuple[list[int], Words]:
        start = steps_at + len(self.fields)
        fields = [start + field if isinstance(field, _Constant) else field for field in self.fields]
        return fields, np.concatenate([np.zeros(0, dtype=np.uint32), *self.constants])

    def constant(self, words: Words) -> _Constant:
        key = words.tobytes()
        if key not in self.known:
            self.known[key] = self.length
            self.constants.append(words)
            self.length += len(words)
        return _Constant(self.known[key])

    def rescale(self, rescale: Rescale | None) -> int:
        """Place of a rescale record; 0 for none."""
        if rescale is None:
            return 0
        op, fast = rescale.op, rescale.fast
        count = max(op.multiplier.size, op.shift.size)
        head = [count, O.ROUNDINGS.index(op.rounding), rescale.value_lo, rescale.value_hi, int(fast is not None)]
        rows = [op.multiplier, op.shift]
        rows += [fast.lo, fast.hi, fast.multiplier, fast.offset, fast.shift] if fast else []
        return self.constant(_words(head + [v for row in rows for v in np.broadcast_to(row, (count,)).tolist()]))

    def step(self, placed: PlacedStep, scratch: int) -> None:
        """Append one step."""
        step, op = placed.step, placed.step.op
        reads, writes = [self.numbers[tensor] for tensor in step.reads], self.numbers[step.writes]
        if isinstance(op, O.Add):
            rescales = [self.rescale(rescale) for rescale in placed.before]
            kind, fields = StepKind.ADD, [*reads, writes, *rescales, *_int32(op.lo, op.hi)]
        else:
            kind, fields = self._one_operand(placed, scratch)
            fields = [reads[0], writes, *fields]
        self.fields += [kind, len(fields) + 2, *fields]

    def _one_operand(self, placed: PlacedStep, scratch: int) -> tuple[StepKind, list[int]]:
        """Kind of a step and its fields behind the tensors read and written."""
        op = placed.step.op
        if placed.layer is not None:
            return StepKind.CONV, self._layer(placed, placed.layer, scratch)
        if isinstance(op, O.InputQuantize):
            return StepKind.INPUT, self._input(op)
        if isinstance(op, O.Requantize):
            return StepKind.RESCALE, [self.rescale(placed.before[0])]
        if isinstance(op, O.SumPool2d | O.MaxPool2d):
            kind = StepKind.SUMPOOL if isinstance(op, O.SumPool2d) else StepKind.MAXPOOL
            return kind, [*op.kernel, *op.stride, *op.padding]
        if isinstance(op, O.Pad2d):
            return StepKind.PAD, [*op.padding, self.constant(_words(op.values.tolist()))]
        if isinstance(op, O.PadChannels):
            return StepKind.CHANNELS, [op.before, op.after]
        if isinstance(op, O.Slice):
            return StepKind.SLICE, [*op.rows, *op.columns, *op.channels]
        assert isinstance(op, O.Flatten)
        return StepKind.COPY, []

    def _input(self, op: O.InputQuantize) -> list[int]:
        count = max(op.multiplier.size, op.offset.size)
        values = [v for row in (op.multiplier, op.offset) for v in np.broadcast_to(row, (count,)).tolist()]
        at = self.constant(_words(part for value in values for part in (value, value >> 32)))
        limits = _int32(op.pre_lo, op.pre_hi, op.lo, op.hi)
        return [count, op.shift, O.ROUNDINGS.index(op.rounding), *limits, at]

    def _layer(self, placed: PlacedStep, layer: Layer, scratch: int) -> list[int]:
        residual = self.numbers[placed.step.reads[1]] if placed.step.add else NO_TENSOR
        residual_rescale = self.rescale(placed.before[1]) if placed.step.add else 0
        return [
            int(layer.flat), *layer.weight.shape[1:3], *layer.stride, *layer.padding, layer.groups, layer.bits,
            self.constant(pack(layer.weight, layer.bits)), self.constant(_words(layer.bias.tolist())),
            self.rescale(placed.before[0]), layer.zero, layer.largest, self.rescale(layer.after), residual,
            residual_rescale, *layer.clip, layer.sum_class, layer.depth, scratch, placed.scratch,
        ]  # fmt: skip


def _int32(*limits: int) -> list[int]:
    """Limits of a clip: those beyond int32 clip nothing."""
    return [min(max(limit, O.INT32_MIN), O.INT32_MAX) for limit in limits]
