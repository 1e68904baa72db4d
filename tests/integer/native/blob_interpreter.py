"""An independent interpreter of blobs: words in, logits out, from the statements of ``arq_blob.h`` alone.

Memory is a real arena that is poisoned before the run and where a step works, so a tensor that is overwritten too
early gives wrong logits. Arithmetic is int64; everything that the blob promises of narrower integers is asserted on
the values that occur: 32-bit forms of requantizations, and the sums of every class in the order of the kernels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Form = Literal["fast", "exact", "both"]

U8, I16, I32 = 0, 1, 2
DTYPES = {U8: "<u1", I16: "<i2", I32: "<i4"}
INPUT, CONV, RESCALE, ADD, SUMPOOL, MAXPOOL, PAD, CHANNELS, SLICE, COPY = range(1, 11)
SUM_ANY, SUM_U8, SUM_PAIRS, SUM_INT16 = range(4)
NO_TENSOR = 0xFFFFFFFF
POISON = 0xA5


def interpret_blob(words: Array, pixels: Array, form: Form = "both", *, check_sums: bool = True) -> list[list[int]]:
    """Run images ``(N, H, W, C)`` through a blob.

    :param form: which arithmetic requantizes where a record has both; "both" asserts that they agree.
    :param check_sums: assert the promises of the sum classes, by simulating lanes (needs memory for every product).
    :returns: N lists of logits.
    """
    blob = Blob(words)
    return [Run(blob, image, form, check_sums).logits() for image in pixels]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@dataclass(frozen=True)
class TensorEntry:
    storage: int
    zero: int
    shape: tuple[int, int, int]
    offset: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(DTYPES[self.storage]).itemsize

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.offset + self.bytes


@dataclass(frozen=True)
class StepEntry:
    kind: int
    fields: list[int]

    @property
    def reads(self) -> list[int]:
        if self.kind == ADD:
            return self.fields[:2]
        if self.kind == CONV and self.fields[19] != NO_TENSOR:
            return [self.fields[0], self.fields[19]]
        return self.fields[:1]

    @property
    def writes(self) -> int:
        return self.fields[2 if self.kind == ADD else 1]

    @property
    def scratch(self) -> tuple[int, int]:
        """First byte and the one behind the last."""
        return (self.fields[25], self.fields[25] + self.fields[26]) if self.kind == CONV else (0, 0)


class Blob:
    """The parts of a blob, its header checked."""

    def __init__(self, words: Array) -> None:
        assert words.dtype == np.uint32 and words.ndim == 1
        self.words = words.tolist()
        head = self.words[:25]
        assert head[0] == int.from_bytes(b"ARQ1", "little") and head[1] == 1 and head[4] == 1
        assert head[2] == len(self.words)
        assert head[3] == zlib.crc32(words[4:].astype("<u4").tobytes())
        self.hash = b"".join(word.to_bytes(4, "big") for word in head[5:13]).hex()
        self.image = tuple(head[13:16])
        self.pixels = signed(head[16]), signed(head[17])
        self.classes, self.arena_bytes, self.output = head[18], head[23], head[24]
        self.tensors = [self._tensor(head[20] + 6 * index) for index in range(head[19])]
        self.steps: list[StepEntry] = []
        at = head[22]
        for _ in range(head[21]):
            self.steps.append(StepEntry(self.words[at], self.words[at + 2 : at + self.words[at + 1]]))
            at += self.words[at + 1]

    def _tensor(self, at: int) -> TensorEntry:
        storage, zero, height, width, channels, offset = self.words[at : at + 6]
        entry = TensorEntry(storage, signed(zero), (height, width, channels), offset)
        assert offset % 64 == 0
        assert storage == U8 or zero == 0
        return entry

    def row(self, at: int, count: int) -> Array:
        """Signed constants."""
        assert at >= 25 and at + count <= len(self.words)
        return np.array([signed(word) for word in self.words[at : at + count]], dtype=np.int64)

    def row64(self, at: int, count: int) -> list[int]:
        pairs = zip(self.words[at : at + 2 * count : 2], self.words[at + 1 : at + 2 * count : 2], strict=True)
        return [(signed(high) << 32) + low for low, high in pairs]

    def codes(self, at: int, count: int, bits: int) -> Array:
        """Packed weights."""
        words = -(-count * bits // 32)
        text = b"".join(word.to_bytes(4, "little") for word in self.words[at : at + words])
        ones = np.unpackbits(np.frombuffer(text, dtype=np.uint8), bitorder="little")[: count * bits]
        values = ones.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
        return np.where(values >= 2 ** (bits - 1), values - 2**bits, values)


class Run:
    """One image on its way through a blob."""

    def __init__(self, blob: Blob, image: Array, form: Form, check_sums: bool) -> None:
        assert image.shape == blob.image
        assert blob.pixels[0] <= image.min() and image.max() <= blob.pixels[1]
        self.blob, self.form, self.check_sums = blob, form, check_sums
        self.image = image.astype(np.int64)
        self.arena = np.full(blob.arena_bytes, POISON, dtype=np.uint8)
        rules = {
            INPUT: self.input, CONV: self.conv, ADD: self.add, SUMPOOL: self.pool, MAXPOOL: self.pool, PAD: self.pad,
            CHANNELS: self.channels, SLICE: self.slice, COPY: self.copy,
        }  # fmt: skip
        for step in blob.steps:
            if step.kind == RESCALE:
                self.store(step.writes, self.rescale(step.fields[2], self.load(step.reads[0])))
            else:
                self.store(step.writes, rules[step.kind](step))

    def logits(self) -> list[int]:
        found: list[int] = self.load(self.blob.output).ravel().tolist()
        assert len(found) == self.blob.classes
        return found

    # ---- memory ------------------------------------------------------------------------------

    def load(self, index: int) -> Array:
        if index == 0:
            return self.image
        entry = self.blob.tensors[index]
        start, stop = entry.span
        stored = self.arena[start:stop].view(DTYPES[entry.storage]).astype(np.int64)
        return stored.reshape(entry.shape) + entry.zero

    def store(self, index: int, values: Array) -> None:
        entry = self.blob.tensors[index]
        start, stop = entry.span
        assert index != 0 and stop <= len(self.arena)
        limits = np.iinfo(DTYPES[entry.storage])
        stored = values.reshape(entry.shape) - entry.zero
        assert limits.min <= stored.min() and stored.max() <= limits.max
        self.arena[start:stop] = np.frombuffer(stored.astype(DTYPES[entry.storage]).tobytes(), dtype=np.uint8)

    # ---- steps -------------------------------------------------------------------------------

    def rescale(self, at: int, x: Array) -> Array:
        """The record at `at` applied to values whose last axis are channels."""
        n, rounding, lo, hi, fast = self.blob.row(at, 5).tolist()
        multiplier, shift = self.blob.row(at + 5, n), self.blob.row(at + 5 + n, n)
        assert 0 <= rounding <= 2 and fast in (0, 1) and lo <= hi
        if fast and self.form != "exact":
            quick = self.fast(at + 5 + 2 * n, n, x, lo, hi)
            if self.form == "fast":
                return quick
        scaled = x * multiplier
        down, rest = np.divmod(scaled, 1 << shift)
        half = 1 << (shift - 1)
        up = {0: rest >= half, 1: (rest > half) | ((rest == half) & (down % 2 == 1)), 2: rest < 0}[rounding]
        exact = np.clip(down + up, lo, hi)
        if fast and self.form == "both":
            assert np.array_equal(quick, exact)
        return exact

    def fast(self, at: int, n: int, x: Array, lo: int, hi: int) -> Array:
        a_lo, a_hi, m, c, s = (self.blob.row(at + row * n, n) for row in range(5))
        inside = np.clip(x, a_lo, a_hi)
        assert (a_lo <= a_hi).all() and (s >= 0).all() and (s <= 31).all() and (m >= 0).all()
        for ends in (a_lo, a_hi, inside):
            _int32(ends * m)
            _int32(ends * m + c)
        return np.asarray(np.clip((inside * m + c) >> s, lo, hi))

    def input(self, step: StepEntry) -> Array:
        n, shift, rounding, *limits, at = step.fields[2:]
        pre_lo, pre_hi, lo, hi = map(signed, limits)
        constants = self.blob.row64(at, 2 * n)
        x = np.clip(self.load(step.reads[0]), pre_lo, pre_hi)
        result = np.empty_like(x)
        for place in np.ndindex(x.shape):
            channel = place[-1] if n > 1 else 0
            total = int(x[place]) * constants[channel] + constants[n + channel]
            assert -(2**63) <= total < 2**63
            quotient, rest = divmod(total, 2**shift)
            double = 2 * rest - 2**shift if shift else -1
            up = {0: double >= 0, 1: double > 0 or (double == 0 and quotient % 2 == 1), 2: False}[rounding]
            result[place] = min(max(quotient + up, lo), hi)
        return result

    def add(self, step: StepEntry) -> Array:
        a, b = (self.load(index) for index in step.reads)
        a = self.rescale(step.fields[3], a) if step.fields[3] else a
        b = self.rescale(step.fields[4], b) if step.fields[4] else b
        return np.asarray(np.clip(a + b, signed(step.fields[5]), signed(step.fields[6])))

    def pool(self, step: StepEntry) -> Array:
        kernel_h, kernel_w, stride_h, stride_w, *padding = step.fields[2:]
        outside = 0 if step.kind == SUMPOOL else -(2**40)
        windows = _windows(self.load(step.reads[0]), (kernel_h, kernel_w), (stride_h, stride_w), padding, outside)
        return np.asarray(windows.sum(axis=(2, 3)) if step.kind == SUMPOOL else windows.max(axis=(2, 3)))

    def pad(self, step: StepEntry) -> Array:
        x = self.load(step.reads[0])
        top, bottom, left, right = step.fields[2:6]
        values = self.blob.row(step.fields[6], x.shape[2])
        result = np.tile(values, (x.shape[0] + top + bottom, x.shape[1] + left + right, 1))
        result[top : top + x.shape[0], left : left + x.shape[1]] = x
        return result

    def channels(self, step: StepEntry) -> Array:
        return np.pad(self.load(step.reads[0]), ((0, 0), (0, 0), tuple(step.fields[2:4])))

    def slice(self, step: StepEntry) -> Array:
        h, w, c = (slice(*step.fields[at : at + 3]) for at in (2, 5, 8))
        return self.load(step.reads[0])[h, w, c]

    def copy(self, step: StepEntry) -> Array:
        return self.load(step.reads[0])

    # ---- convolution -------------------------------------------------------------------------

    def conv(self, step: StepEntry) -> Array:
        field = step.fields
        source, target = self.blob.tensors[field[0]], self.blob.tensors[field[1]]
        x = self.load(field[0])
        x = x.reshape(1, 1, -1) if field[2] else x
        kernel, stride, padding = field[3:5], field[5:7], field[7:11]
        groups, bits, zero = field[11], field[12], signed(field[16])
        stored_u8 = source.storage == U8
        if field[15]:
            x, stored_u8 = self.rescale(field[15], x.reshape(source.shape)).reshape(x.shape), True
        else:
            assert zero == source.zero
        codes = x - zero
        if stored_u8:
            assert codes.min() >= 0 and codes.max() <= field[17] <= 255
        self.scratch(step, x.shape)
        out_channels = target.shape[2]
        per_group = x.shape[2] // groups
        weight = self.blob.codes(field[13], out_channels * kernel[0] * kernel[1] * per_group, bits)
        weight = weight.reshape(out_channels, *kernel, per_group)
        bias = self.blob.row(field[14], out_channels)
        windows = _windows(x, kernel, stride, padding, 0)
        assert windows.shape[:2] == target.shape[:2]
        size = out_channels // groups
        parts = [
            np.einsum(
                "abhwc,ohwc->abo", windows[..., g * per_group : (g + 1) * per_group], weight[g * size : (g + 1) * size]
            )
            for g in range(groups)
        ]
        acc = np.concatenate(parts, axis=2) + bias
        _int32(acc)
        if field[23] != SUM_ANY:
            assert stored_u8 and (groups == 1 or groups == x.shape[2] == out_channels)
            if self.check_sums:
                _check_sums(field[23], field[24], windows - zero, weight, bias, zero, groups > 1, acc)
        y = self.rescale(field[18], acc) if field[18] else acc
        if field[19] == NO_TENSOR:
            assert field[20] == 0
            return y
        residual = self.load(field[19])
        residual = self.rescale(field[20], residual) if field[20] else residual
        return np.asarray(np.clip(y + residual, signed(field[21]), signed(field[22])))

    def scratch(self, step: StepEntry, shape: tuple[int, ...]) -> None:
        """Check the size of the working memory and spoil what lies there."""
        field = step.fields
        top, bottom, left, right = field[7:11]
        height, width, channels = shape
        copy = 0
        if field[23] == SUM_ANY and field[15]:
            copy = _up64(height * width * channels)
        elif field[23] != SUM_ANY and (field[15] or channels % 4 or top or bottom or left or right):
            copy = _up64((height + top + bottom) * (width + left + right) * ((channels + 3) // 4 * 4) + 64)
        start, stop = step.scratch
        assert start % 64 == 0 and stop <= len(self.arena)
        assert stop - start == copy + _up64(8 * field[3] * field[4] * (channels // field[11]))
        self.arena[start:stop] = POISON


def _check_sums(
    sum_class: int, depth: int, codes: Array, weight: Array, bias: Array, zero: int, depthwise: bool, acc: Array
) -> None:
    """What the class promises, for the codes that occur: `codes` (rows, columns, kernel h, kernel w, channels)."""
    assert codes.min() >= 0 and codes.max() <= 255
    assert weight.min() >= -128 and weight.max() <= 127
    moved = bias + zero * weight.reshape(len(weight), -1).sum(axis=1)
    _int32(moved)
    positions = codes.shape[0] * codes.shape[1]
    if depthwise:  # (positions, channels, taps), one lane
        products = codes.reshape(positions, -1, codes.shape[4]).transpose(0, 2, 1) * weight.reshape(len(weight), -1)
        products = np.pad(products, ((0, 0), (0, 0), (0, products.shape[2] % 2)))
        lanes = products.reshape(positions, len(weight), 1, -1, 2)
    else:  # (positions, out channels, 2 lanes, pairs, 2)
        extra = -weight.shape[3] % 4
        a = np.pad(codes.reshape(positions, *codes.shape[2:]), ((0, 0), (0, 0), (0, 0), (0, extra)))
        b = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, extra)))
        products = a.reshape(positions, 1, -1) * b.reshape(1, len(weight), -1)
        lanes = products.reshape(positions, len(weight), -1, 2, 2).transpose(0, 1, 3, 2, 4)
    total = lanes.sum(axis=(2, 3, 4))
    assert np.array_equal(total + moved, acc.reshape(positions, -1))
    for part in (np.maximum(lanes, 0), np.minimum(lanes, 0)):  # the subsets that reach furthest
        subset = part.sum(axis=(2, 3, 4))
        _int32(subset)
        _int32(subset + moved)
        pairs = part.sum(axis=4)
        if sum_class >= SUM_PAIRS:
            assert depth >= 1
            running = np.concatenate([np.zeros_like(pairs[..., :1]), pairs.cumsum(axis=3)], axis=3)
            reach = min(depth, pairs.shape[3])
            _int16(running[..., reach:] - running[..., :-reach])
        if sum_class == SUM_INT16:
            _int16(subset)


def _windows(x: Array, kernel: Any, stride: Any, padding: Any, outside: int) -> Array:
    """(rows, columns, kernel h, kernel w, channels)."""
    top, bottom, left, right = padding
    padded = np.pad(x, ((top, bottom), (left, right), (0, 0)), constant_values=outside)
    view = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), axis=(0, 1))
    return view[:: stride[0], :: stride[1]].transpose(0, 1, 3, 4, 2)


def _up64(size: int) -> int:
    return (size + 63) // 64 * 64


def _int32(values: Array) -> None:
    assert values.min() >= -(2**31) and values.max() < 2**31


def _int16(values: Array) -> None:
    assert values.min() >= -(2**15) and values.max() < 2**15
