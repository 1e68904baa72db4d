"""An independent interpreter of integer programs: Python integers, nested lists, plain loops.

Written from the statements in ``arqsearch.integer.ops`` alone. It shares no arithmetic with the package
(numpy only holds the arrays that are read), cannot overflow and does nothing clever, so agreement with it
is evidence. Tensors are lists ``[row][column][channel]`` or flat lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

Nested = list[Any]


def interpret(program: IntegerProgram, pixels: Any, *, every: bool = False) -> Any:
    """Run a program on a batch.

    :param pixels: integers ``(N, H, W, C)``, array or nested lists.
    :param every: return all tensors of each image instead of the logits.
    :returns: logits as N lists of Python integers.
    :raises AssertionError: when a value leaves the range stated for its tensor.
    """
    images = pixels.tolist() if hasattr(pixels, "tolist") else pixels
    results = []
    for image in images:
        values: dict[int, Nested] = {0: image}
        _check(program, 0, image)
        for op in program.ops:
            values[op.output] = RULES[type(op)](op, *(values[source] for source in op.inputs))
            _check(program, op.output, values[op.output])
        results.append(values if every else values[program.output])
    return results


def leaves(value: Any) -> list[int]:
    """All integers of a nested list, in memory order."""
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a nested list."""
    return (len(value), *shape_of(value[0])) if isinstance(value, list) else ()


def _check(program: IntegerProgram, tensor: int, value: Nested) -> None:
    spec = program.tensors[tensor]
    assert shape_of(value) == tuple(spec.shape), f"tensor {tensor}: {shape_of(value)} is not {spec.shape}"
    for leaf in leaves(value):
        assert type(leaf) is int
        assert spec.lo <= leaf <= spec.hi, f"tensor {tensor}: {leaf} outside {spec.lo}..{spec.hi}"


def _clip(value: int, lo: int, hi: int) -> int:
    if value < lo:
        return lo
    return hi if value > hi else value


def _divide(value: int, shift: int, rounding: str) -> int:
    """``value / 2**shift`` rounded, from quotient and remainder."""
    divisor = 2**shift
    quotient, remainder = divmod(value, divisor)
    if rounding == "half_up":
        return quotient + 1 if 2 * remainder >= divisor and shift > 0 else quotient
    if rounding == "half_even":
        if 2 * remainder == divisor:
            return quotient if quotient % 2 == 0 else quotient + 1
        return quotient + 1 if 2 * remainder > divisor else quotient
    assert rounding == "floor"
    return quotient


def _channelwise(value: Nested, function: Callable[[int, int], int]) -> Nested:
    """Apply ``function(entry, channel)``; channels are the innermost axis."""
    if isinstance(value[0], list):
        return [_channelwise(part, function) for part in value]
    return [function(entry, channel) for channel, entry in enumerate(value)]


def _entry(values: Any, channel: int) -> int:
    """The channel's entry of a list with one entry for each channel, or one for all."""
    listed = values.tolist()
    return listed[channel] if len(listed) > 1 else listed[0]


def _input_quantize(op: O.InputQuantize, x: Nested) -> Nested:
    def quantize(entry: int, channel: int) -> int:
        pixel = _clip(entry, op.pre_lo, op.pre_hi)
        total = pixel * _entry(op.multiplier, channel) + _entry(op.offset, channel)
        assert -(2**63) <= total < 2**63
        return _clip(_divide(total, op.shift, op.rounding), op.lo, op.hi)

    return _channelwise(x, quantize)


def _requantize(op: O.Requantize, x: Nested) -> Nested:
    def requantize(entry: int, channel: int) -> int:
        product = entry * _entry(op.multiplier, channel)
        assert -(2**63) <= product < 2**63
        return _clip(_divide(product, _entry(op.shift, channel), op.rounding), op.lo, op.hi)

    return _channelwise(x, requantize)


def _accumulate(start: int, terms: list[int]) -> int:
    """Add terms one by one; every partial sum must be an int32."""
    total = start
    for term in terms:
        total += term
        assert -(2**31) <= total < 2**31
    return total


def _conv2d(op: O.Conv2d, x: Nested) -> Nested:
    height, width, _ = shape_of(x)
    weight, bias = op.weight.tolist(), op.bias.tolist()
    out_channels, kernel_h, kernel_w, per_group = shape_of(weight)
    top, bottom, left, right = op.padding
    rows = (height + top + bottom - kernel_h) // op.stride[0] + 1
    columns = (width + left + right - kernel_w) // op.stride[1] + 1
    result = []
    for r in range(rows):
        line = []
        for c in range(columns):
            cell = []
            for o in range(out_channels):
                first = (o // (out_channels // op.groups)) * per_group
                terms = []
                for i in range(kernel_h):
                    for j in range(kernel_w):
                        y, z = r * op.stride[0] + i - top, c * op.stride[1] + j - left
                        if 0 <= y < height and 0 <= z < width:
                            for k in range(per_group):
                                terms.append(weight[o][i][j][k] * x[y][z][first + k])
                cell.append(_accumulate(bias[o], terms))
            line.append(cell)
        result.append(line)
    return result


def _linear(op: O.Linear, x: Nested) -> Nested:
    rows, bias = op.weight.tolist(), op.bias.tolist()
    return [_accumulate(bias[o], [w * entry for w, entry in zip(row, x, strict=True)]) for o, row in enumerate(rows)]


def _add(op: O.Add, a: Nested, b: Nested) -> Nested:
    if isinstance(a, list):
        return [_add(op, left, right) for left, right in zip(a, b, strict=True)]
    return _clip(_accumulate(a, [b]), op.lo, op.hi)


def _windows(op: O.SumPool2d | O.MaxPool2d, x: Nested, reduce: Callable[[list[int]], int]) -> Nested:
    """Reduce the entries of each window that lie inside the tensor."""
    height, width, channels = shape_of(x)
    top, bottom, left, right = op.padding
    result = []
    for r in range((height + top + bottom - op.kernel[0]) // op.stride[0] + 1):
        line = []
        for c in range((width + left + right - op.kernel[1]) // op.stride[1] + 1):
            places = [
                (y, z)
                for y in range(r * op.stride[0] - top, r * op.stride[0] - top + op.kernel[0])
                for z in range(c * op.stride[1] - left, c * op.stride[1] - left + op.kernel[1])
                if 0 <= y < height and 0 <= z < width
            ]
            line.append([reduce([x[y][z][k] for y, z in places]) for k in range(channels)])
        result.append(line)
    return result


def _sum_pool(op: O.SumPool2d, x: Nested) -> Nested:
    return _windows(op, x, lambda entries: _accumulate(0, entries))


def _max_pool(op: O.MaxPool2d, x: Nested) -> Nested:
    return _windows(op, x, max)


def _pad(op: O.Pad2d, x: Nested) -> Nested:
    height, width, _ = shape_of(x)
    top, bottom, left, right = op.padding
    return [
        [
            list(x[r][c]) if 0 <= r < height and 0 <= c < width else op.values.tolist()
            for c in range(-left, width + right)
        ]
        for r in range(-top, height + bottom)
    ]


def _pad_channels(op: O.PadChannels, x: Nested) -> Nested:
    if isinstance(x[0], list):
        return [_pad_channels(op, part) for part in x]
    return [0] * op.before + x + [0] * op.after


def _slice(op: O.Slice, x: Nested) -> Nested:
    rows, columns, channels = (range(*bounds) for bounds in (op.rows, op.columns, op.channels))
    return [[[x[r][c][k] for k in channels] for c in columns] for r in rows]


def _flatten(op: O.Flatten, x: Nested) -> Nested:
    return leaves(x)


RULES: O.RuleTable = {
    O.InputQuantize: _input_quantize,
    O.Conv2d: _conv2d,
    O.Linear: _linear,
    O.Requantize: _requantize,
    O.Add: _add,
    O.SumPool2d: _sum_pool,
    O.MaxPool2d: _max_pool,
    O.Pad2d: _pad,
    O.PadChannels: _pad_channels,
    O.Slice: _slice,
    O.Flatten: _flatten,
}
