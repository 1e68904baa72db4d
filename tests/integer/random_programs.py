"""Random valid integer programs over all operations, bit pairs, roundings and extremes, from a seed."""

from __future__ import annotations

import itertools

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import op_range
from arqsearch.integer.structure import check_op
from arqsearch.quantize.bitwidths import ALL_BITS

#: Every (weight bits, activation bits) pair; program number `seed` uses pair ``seed % 49`` first.
BIT_PAIRS = tuple(itertools.product(ALL_BITS, ALL_BITS))
#: Clipped images, noisy images at σ=1, all of int16.
PIXEL_RANGES = ((0, 255), (-2335, 2590), (-(2**15), 2**15 - 1))


class Builder:
    """Appends operations while every range proof holds.

    :param rng: source of all choices.
    :param spec: the input tensor.
    """

    def __init__(self, rng: np.random.Generator, spec: TensorSpec) -> None:
        self.rng = rng
        self.ops: list[O.Op] = []
        self.specs = [spec]

    @property
    def last(self) -> int:
        """Index of the newest tensor."""
        return len(self.specs) - 1

    def append(self, op: O.Op, *, widen: bool = True) -> bool:
        """Add the operation if it is provably safe; a few tensors state a wider range than needed."""
        inputs = [self.specs[source] for source in op.inputs]
        shape = check_op(len(self.ops), op, tuple(spec.shape for spec in inputs))
        found = op_range(op, *inputs)
        limit = 2 ** (found.width - 1)
        if found.partial_lo < -limit or found.partial_hi >= limit:
            return False
        extra = [int(value) for value in self.rng.integers(0, 4, 2)] if widen and self.rng.random() < 0.1 else [0, 0]
        if found.lo - extra[0] < O.INT32_MIN or found.hi + extra[1] > O.INT32_MAX:
            return False
        self.specs.append(TensorSpec(shape, found.lo - extra[0], found.hi + extra[1]))
        self.ops.append(op)
        return True

    def pick(self, *choices: object) -> object:
        """One of the choices, as given."""
        return choices[int(self.rng.integers(len(choices)))]

    def integer(self, lo: int, hi: int) -> int:
        """A Python integer in lo..hi, both included."""
        return int(self.rng.integers(lo, hi, endpoint=True))

    def program(self) -> IntegerProgram:
        """The finished program; its newest tensor is the logits."""
        return IntegerProgram(tuple(self.ops), tuple(self.specs), self.last, {"origin": "random"})


def random_program(seed: int) -> IntegerProgram:
    """A program of 5 to 25 operations on tiny tensors."""
    rng = np.random.default_rng(seed)
    lo, hi = PIXEL_RANGES[int(rng.choice(3, p=(0.4, 0.5, 0.1)))]
    shape = (int(rng.integers(4, 8)), int(rng.integers(4, 8)), int(rng.integers(1, 4)))
    builder = Builder(rng, TensorSpec(shape, lo, hi))
    weight_bits, activation_bits = BIT_PAIRS[seed % len(BIT_PAIRS)]
    if rng.random() < 0.9:
        _input_quantize(builder, activation_bits)
    if rng.random() < 0.3:
        _pad(builder)
    _convolution(builder, weight_bits, activation_bits)
    if rng.random() < 0.5:
        _narrow(builder)
    steps = (_block, _block, _depthwise, _residual, _residual, _max_pool, _sum_pool, _pad, _pad_channels, _slice)
    for index in rng.choice(len(steps), size=int(rng.integers(1, 5))):
        steps[index](builder)
    _head(builder)
    return builder.program()


def random_pixels(program: IntegerProgram, seed: int, random_images: int = 2) -> np.ndarray:
    """Images as int16: all lo, all hi, only lo and hi mixed, and uniform ones."""
    rng = np.random.default_rng(seed + 10_000)
    lo, hi, shape = program.input.lo, program.input.hi, program.input.shape
    images = [np.full(shape, lo), np.full(shape, hi), np.where(rng.random(shape) < 0.5, lo, hi)]
    images += [rng.integers(lo, hi, size=shape, endpoint=True) for _ in range(random_images)]
    return np.stack(images).astype(np.int16)


def weights(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> O.IntArray:
    """Codes of `bits` bits: uniform, or one of the extremes; sometimes two's complement."""
    top = 2 ** (bits - 1) - 1
    kind = int(rng.integers(8))
    if kind == 0:
        values = np.full(shape, top)
    elif kind == 1:
        values = np.full(shape, -top)
    elif kind == 2:
        values = np.where(rng.random(shape) < 0.5, top, -top)
    elif kind == 3:
        values = rng.integers(-top - 1, top, size=shape, endpoint=True)
    elif kind == 4 and rng.random() < 0.3:
        values = np.zeros(shape, dtype=np.int64)
    else:
        values = rng.integers(-top, top, size=shape, endpoint=True)
    return values.astype(np.int8 if bits <= 8 else np.int16)


def activation_range(builder: Builder, bits: int | None = None) -> tuple[int, int]:
    """Unsigned after ReLU, signed symmetric otherwise."""
    bits = builder.integer(2, 8) if bits is None else bits
    top = 2 ** (bits - 1) - 1
    return (0, 2**bits - 1) if builder.rng.random() < 0.6 else (-top, top)


def requantize(builder: Builder, source: int, lo: int, hi: int) -> None:
    """Requantize with a multiplier of 15 or 31 bits or a power of two, so that codes spread over lo..hi."""
    rng, spec = builder.rng, builder.specs[source]
    channels = spec.shape[-1]
    for attempt in range(20):
        count = channels if rng.random() < 0.7 else 1
        ratio = (hi - lo) / max(spec.hi - spec.lo, 1) * rng.uniform(0.3, 6.0, size=count)
        kind = builder.pick("pow2", 15, 31) if attempt < 10 else 15
        if kind == "pow2":
            multiplier, shift = np.ones(count, dtype=np.int64), np.round(-np.log2(ratio))
        else:
            multiplier = rng.integers(2 ** (kind - 1), 2**kind, size=count)
            shift = np.round(np.log2(multiplier / ratio))
        if attempt < 10 and rng.random() < 0.12:
            shift = rng.integers(1, 63, size=count).astype(np.float64)
            multiplier[int(rng.integers(count))] = 0
        multiplier = np.where(shift < 1, np.maximum(np.round(2 * ratio), 1), multiplier).astype(np.int64)
        shift = np.clip(shift, 1, 62).astype(np.int64)
        shift = shift if rng.random() < 0.8 else shift[:1]
        rounding = builder.pick(*O.ROUNDINGS)
        if builder.append(O.Requantize((source,), builder.last + 1, multiplier, shift, rounding, lo, hi)):
            return
    raise AssertionError("no requantization fits")


def _input_quantize(builder: Builder, bits: int) -> None:
    spec = builder.specs[0]
    clip = builder.rng.random() < 0.5
    pre_lo, pre_hi = (0, 255) if clip else (spec.lo, spec.hi)
    lo, hi = activation_range(builder, bits)
    shift = builder.integer(0, 30)
    channels = spec.shape[-1] if builder.rng.random() < 0.7 else 1
    ratio = (hi - lo) / (pre_hi - pre_lo) * builder.rng.uniform(0.5, 2.0, size=channels)
    multiplier = np.maximum(np.round(ratio * 2**shift), 1).astype(np.int64)
    offset = np.round((lo - pre_lo * ratio) * 2**shift).astype(np.int64) + builder.rng.integers(-3, 4, size=channels)
    rounding = builder.pick(*O.ROUNDINGS)
    assert builder.append(O.InputQuantize((0,), 1, multiplier, offset, shift, rounding, pre_lo, pre_hi, lo, hi))


def _padding(builder: Builder, kernel: tuple[int, int], fits: bool = True) -> O.Padding:
    """Asymmetric padding below the kernel, enough for the window to fit the newest tensor."""
    height, width, _ = builder.specs[builder.last].shape
    needed = [max(0, kernel[0] - height), max(0, kernel[1] - width)]
    limits = (kernel[0], kernel[0], kernel[1], kernel[1])
    top, bottom, left, right = (builder.integer(0, limit - 1) if builder.rng.random() < 0.6 else 0 for limit in limits)
    bottom, right = max(bottom, needed[0] - top), max(right, needed[1] - left)
    return top, bottom, left, right


def _conv(builder: Builder, out: int, groups: int, bits: int, source: int) -> None:
    spec = builder.specs[source]
    channels = spec.shape[-1]
    for width in (bits, *range(bits - 1, 1, -1)):
        kernel = (builder.integer(1, 3), builder.integer(1, 3))
        stride = (builder.integer(1, 2), builder.integer(1, 2))
        weight = weights(builder.rng, (out, *kernel, channels // groups), width)
        bias = builder.rng.integers(-3000, 3000, size=out).astype(np.int32)
        if builder.rng.random() < 0.1:
            bias[:] = int(builder.pick(2**31 - 1, -(2**31))) // 2
        padding = _padding(builder, kernel)
        if builder.append(O.Conv2d((source,), builder.last + 1, weight, bias, stride, padding, groups)):
            return
    raise AssertionError("no convolution fits")


def _convolution(builder: Builder, weight_bits: int, activation_bits: int) -> None:
    channels = builder.specs[builder.last].shape[-1]
    groups = 2 if channels % 2 == 0 and builder.rng.random() < 0.4 else 1
    wide = builder.rng.random() < 0.05
    _conv(builder, 2 * builder.integer(1, 4), groups, 16 if wide else weight_bits, builder.last)
    requantize(builder, builder.last, *activation_range(builder, activation_bits))


def _block(builder: Builder) -> None:
    _convolution(builder, builder.integer(2, 8), builder.integer(2, 8))


def _depthwise(builder: Builder) -> None:
    channels = builder.specs[builder.last].shape[-1]
    _conv(builder, channels * builder.integer(1, 2), channels, builder.integer(2, 8), builder.last)
    requantize(builder, builder.last, *activation_range(builder))


def _narrow(builder: Builder) -> None:
    """Drop the lowest bits, as consumers of a stream do: every second to eighth code is a tie."""
    spec = builder.specs[builder.last]
    shift = builder.integer(1, 3)
    rounding = builder.pick(*O.ROUNDINGS)
    lo, hi = spec.lo >> shift, spec.hi >> shift
    assert builder.append(
        O.Requantize((builder.last,), builder.last + 1, np.array([1]), np.array([shift]), rounding, lo, hi)
    )


def _residual(builder: Builder) -> None:
    """Two branches from one stream, each requantized to the stream's scale, added and clipped."""
    stream = builder.last
    channels = builder.specs[stream].shape[-1]
    weight = weights(builder.rng, (channels, 3, 3, channels), builder.integer(2, 8))
    bias = np.zeros(channels, dtype=np.int32)
    if not builder.append(O.Conv2d((stream,), builder.last + 1, weight, bias, (1, 1), (1, 1, 1, 1), 1)):
        return
    lo, hi = activation_range(builder)
    requantize(builder, builder.last, lo, hi)
    branch = builder.last
    requantize(builder, stream, lo, hi)
    assert builder.append(O.Add((branch, builder.last), builder.last + 1, builder.integer(lo, 0), hi))


def _max_pool(builder: Builder) -> None:
    kernel = (builder.integer(1, 3), builder.integer(1, 3))
    height, width, _ = builder.specs[builder.last].shape
    kernel = (min(kernel[0], height), min(kernel[1], width))
    stride = (builder.integer(1, 2), builder.integer(1, 2))
    assert builder.append(O.MaxPool2d((builder.last,), builder.last + 1, kernel, stride, _padding(builder, kernel)))


def _sum_pool(builder: Builder) -> None:
    height, width, _ = builder.specs[builder.last].shape
    kernel = (min(builder.integer(1, 3), height), min(builder.integer(1, 3), width))
    stride = (builder.integer(1, 3), builder.integer(1, 3))
    assert builder.append(O.SumPool2d((builder.last,), builder.last + 1, kernel, stride, _padding(builder, kernel)))
    requantize(builder, builder.last, *activation_range(builder))


def _pad(builder: Builder) -> None:
    spec = builder.specs[builder.last]
    padding = tuple(builder.integer(0, 2) for _ in range(4))
    values = builder.rng.integers(spec.lo, spec.hi, size=spec.shape[-1], endpoint=True)
    if builder.rng.random() < 0.3:
        values[:] = spec.lo
    assert builder.append(O.Pad2d((builder.last,), builder.last + 1, padding, values))


def _pad_channels(builder: Builder) -> None:
    assert builder.append(
        O.PadChannels((builder.last,), builder.last + 1, builder.integer(0, 2), builder.integer(0, 2))
    )


def _slice(builder: Builder) -> None:
    bounds = []
    for size in builder.specs[builder.last].shape:
        start = builder.integer(0, (size - 1) // 2)
        bounds.append((start, builder.integer(start + (size - start + 1) // 2, size), builder.integer(1, 2)))
    assert builder.append(O.Slice((builder.last,), builder.last + 1, *bounds))


def _head(builder: Builder) -> None:
    """Flatten, or pool globally and flatten; then one or two linear layers with raw accumulators at the end."""
    if builder.rng.random() < 0.5:
        kernel = builder.specs[builder.last].shape[:2]
        builder.append(O.SumPool2d((builder.last,), builder.last + 1, kernel, (1, 1), (0, 0, 0, 0)))
        requantize(builder, builder.last, *activation_range(builder))
    builder.append(O.Flatten((builder.last,), builder.last + 1))
    if builder.rng.random() < 0.2:
        builder.append(O.PadChannels((builder.last,), builder.last + 1, 1, 2))
    if builder.rng.random() < 0.3:
        _linear(builder, builder.integer(2, 6))
        requantize(builder, builder.last, *activation_range(builder))
    if builder.rng.random() < 0.8:
        _narrow(builder)
    _linear(builder, builder.integer(2, 10))


def _linear(builder: Builder, out: int) -> None:
    features = builder.specs[builder.last].shape[0]
    bias = builder.rng.integers(-1000, 1000, size=out).astype(np.int32)
    for bits in (builder.integer(2, 8), 2):
        weight = weights(builder.rng, (out, features), bits)
        if builder.append(O.Linear((builder.last,), builder.last + 1, weight, bias)):
            return
    raise AssertionError("no linear layer fits")
