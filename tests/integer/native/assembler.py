"""Blobs written by hand, from the statements of ``arq_blob.h`` alone: an oracle for the format.

`Assembler` lays out tensors, steps and constants; `plain_blob` translates a program op by op, with no fusion, no
liveness and a place of its own for every tensor.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

MAGIC, HEADER_WORDS, NO_TENSOR = 0x31515241, 25, 0xFFFFFFFF
U8, I16, I32 = 0, 1, 2
BYTES = {U8: 1, I16: 2, I32: 4}
ROUNDINGS = {"half_up": 0, "half_even": 1, "floor": 2}
INPUT, CONV, RESCALE, ADD, SUMPOOL, MAXPOOL, PAD, CHANNELS, SLICE, COPY = range(1, 11)
ANY, SUM_U8, SUM_PAIRS, SUM_INT16 = range(4)


class At(int):
    """A place in the constants, counted from their beginning; it becomes a word offset of the blob."""


def _align(size: int) -> int:
    return (size + 63) // 64 * 64


class Assembler:
    """A blob in the making.

    :param shape: (height, width, channels) of the image.
    :param pixels: lowest and highest pixel.
    """

    def __init__(self, shape: Sequence[int], pixels: tuple[int, int]) -> None:
        self.shape, self.pixels = tuple(shape), pixels
        self.tensors: list[list[int]] = [[I16, 0, *shape, 0]]
        self.steps: list[list[int]] = []
        self.constants: list[int] = []
        self.arena = 0

    def tensor(self, storage: int, zero: int, height: int, width: int, channels: int, at: int | None = None) -> int:
        """Add a tensor, by default behind all others in the arena; its index."""
        if at is None:
            at, self.arena = self.arena, self.arena + _align(height * width * channels * BYTES[storage])
        self.tensors.append([storage, zero, height, width, channels, at])
        return len(self.tensors) - 1

    def scratch(self, size: int) -> tuple[int, int]:
        """Offset and bytes of working memory."""
        at, self.arena = self.arena, self.arena + _align(size)
        return at, _align(size)

    def constant(self, words: Sequence[int]) -> At:
        """Words, each an int32 or uint32."""
        self.constants += [int(word) & 0xFFFFFFFF for word in words]
        return At(len(self.constants) - len(words))

    def constant64(self, values: Sequence[int]) -> At:
        """64-bit values, low word first."""
        return self.constant([word for value in values for word in (value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)])

    def rescale(
        self, multiplier: Sequence[int], shift: Sequence[int], rounding: str, lo: int, hi: int,
        fast: Sequence[Sequence[int]] | None = None,
    ) -> At:  # fmt: skip
        """A rescale; `fast` are its five lists a_lo, a_hi, m, c, s."""
        n = max(len(multiplier), len(shift))
        lists = [[*values] * n if len(values) == 1 else [*values] for values in (multiplier, shift, *(fast or ()))]
        head = [n, ROUNDINGS[rounding], lo, hi, int(fast is not None)]
        return self.constant(head + [value for part in lists for value in part])

    def step(self, kind: int, *fields: int) -> int:
        """Append a step; its index."""
        self.steps.append([kind, len(fields) + 2, *fields])
        return len(self.steps) - 1

    def conv(
        self, source: int, target: int, weight: np.ndarray[Any, Any], bias: Sequence[int], *,
        bits: int = 8, stride: tuple[int, int] = (1, 1), padding: Sequence[int] = (0, 0, 0, 0), groups: int = 1,
        flat: int = 0, in_rescale: int = 0, in_zero: int | None = None, in_max: int = 255, rescale: int = 0,
        residual: int = NO_TENSOR, residual_rescale: int = 0, clip: tuple[int, int] = (-(2**31), 2**31 - 1),
        sum_class: int = ANY, depth: int = 1,
    ) -> int:  # fmt: skip
        """Append a convolution, with its scratch memory."""
        _, kernel_h, kernel_w, per_group = weight.shape
        height, width, channels = self.tensors[source][2:5]
        if flat:
            height, width, channels = 1, 1, height * width * channels
        copy, rescaled = 0, isinstance(in_rescale, At)
        if sum_class and (any(padding) or rescaled or channels % 4):
            wide = width + padding[2] + padding[3]
            copy = _align((height + padding[0] + padding[1]) * wide * ((channels + 3) // 4 * 4) + 64)
        elif rescaled:
            copy = _align(height * width * channels)
        scratch = self.scratch(copy + _align(8 * kernel_h * kernel_w * per_group))
        zero = self.tensors[source][1] if in_zero is None else in_zero
        return self.step(
            CONV, source, target, flat, kernel_h, kernel_w, *stride, *padding, groups, bits,
            self.constant(pack(weight, bits)), self.constant(bias), in_rescale, zero, in_max, rescale, residual,
            residual_rescale, *clip, sum_class, depth, *scratch,
        )  # fmt: skip

    def words(self, output: int) -> np.ndarray[Any, Any]:
        """The finished blob, uint32."""
        tensors_at = HEADER_WORDS
        steps_at = tensors_at + 6 * len(self.tensors)
        constants_at = steps_at + sum(len(step) for step in self.steps)
        fields = [field for step in self.steps for field in step]
        body = [word for tensor in self.tensors for word in tensor]
        body += [constants_at + field if isinstance(field, At) else field for field in fields]
        body += self.constants
        _, _, height, width, channels, _ = self.tensors[output]
        header = [
            MAGIC, 1, HEADER_WORDS + len(body), 0, 1, *range(0x01020304, 0x01020304 + 8), *self.shape, *self.pixels,
            height * width * channels, len(self.tensors), tensors_at, len(self.steps), steps_at, self.arena, output,
        ]  # fmt: skip
        return seal(np.array([word & 0xFFFFFFFF for word in header + body], dtype=np.uint32))


def seal(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Write the right checksum into a blob (in place) and return it."""
    words[3] = zlib.crc32(words[4:].astype("<u4").tobytes())
    return words


def pack(weight: np.ndarray[Any, Any], bits: int) -> list[int]:
    """Codes of `bits` bits without gaps, the first in the lowest bits."""
    text = sum((int(code) & (2**bits - 1)) << (bits * index) for index, code in enumerate(weight.ravel().tolist()))
    words = -(-weight.size * bits // 32)
    return list(struct.unpack(f"<{words}I", text.to_bytes(4 * words, "little")))


def _storage(lo: int, hi: int) -> tuple[int, int]:
    """Storage and zero point for values lo..hi."""
    if lo >= 0 and hi <= 255:
        return U8, 0
    if hi - lo <= 255:
        return U8, lo
    return (I16, 0) if lo >= -(2**15) and hi < 2**15 else (I32, 0)


def plain_blob(program: IntegerProgram) -> np.ndarray[Any, Any]:
    """The program, op by op."""
    blob = Assembler(program.input.shape, (program.input.lo, program.input.hi))
    for spec in program.tensors[1:]:
        shape = spec.shape if len(spec.shape) == 3 else (1, 1, *spec.shape)
        blob.tensor(*_storage(spec.lo, spec.hi), *shape)
    for op in program.ops:
        source, target = op.inputs[0], op.output
        if isinstance(op, O.InputQuantize):
            constants = blob.constant64([*op.multiplier.tolist(), *op.offset.tolist()])
            blob.step(
                INPUT, source, target, len(op.multiplier), op.shift, ROUNDINGS[op.rounding], op.pre_lo, op.pre_hi,
                op.lo, op.hi, constants,
            )  # fmt: skip
        elif isinstance(op, O.Conv2d | O.Linear):
            _convolution(blob, op)
        elif isinstance(op, O.Requantize):
            rescale = blob.rescale(op.multiplier.tolist(), op.shift.tolist(), op.rounding, op.lo, op.hi)
            blob.step(RESCALE, source, target, rescale)
        elif isinstance(op, O.Add):
            blob.step(ADD, *op.inputs, target, 0, 0, op.lo, op.hi)
        elif isinstance(op, O.SumPool2d | O.MaxPool2d):
            kind = SUMPOOL if isinstance(op, O.SumPool2d) else MAXPOOL
            blob.step(kind, source, target, *op.kernel, *op.stride, *op.padding)
        elif isinstance(op, O.Pad2d):
            blob.step(PAD, source, target, *op.padding, blob.constant(op.values.tolist()))
        elif isinstance(op, O.PadChannels):
            blob.step(CHANNELS, source, target, op.before, op.after)
        elif isinstance(op, O.Slice):
            blob.step(SLICE, source, target, *op.rows, *op.columns, *op.channels)
        else:
            assert isinstance(op, O.Flatten)
            blob.step(COPY, source, target)
    return blob.words(program.output)


def _convolution(blob: Assembler, op: O.Conv2d | O.Linear) -> None:
    """A sum over stored codes where that is obviously safe, else over values."""
    source = op.inputs[0]
    storage, zero = blob.tensors[source][:2]
    weight = op.weight if op.weight.ndim == 4 else op.weight[:, None, None, :]
    low, high = int(weight.min()), int(weight.max())
    bits = max(2, (max(high, -low - 1)).bit_length() + 1)
    bits = bits if bits <= 8 else 16
    small = abs(zero) <= 255 and weight[0].size * 2 * 255 * 128 + int(np.abs(op.bias).max()) < 2**31
    codes = storage == U8 and zero <= 0 and bits <= 8 and small
    extra: dict[str, Any] = {}
    if isinstance(op, O.Conv2d):
        extra = {"stride": op.stride, "padding": op.padding, "groups": op.groups}
    blob.conv(
        source, op.output, weight, op.bias.tolist(), bits=bits, flat=int(isinstance(op, O.Linear)),
        sum_class=SUM_U8 if codes else ANY, **extra,
    )  # fmt: skip
