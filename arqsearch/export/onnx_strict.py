"""Strict-integer ONNX: the program as a graph in which no tensor is a float, equal on every logit.

It is the proof artefact: slow, but any runtime that follows the ONNX specification computes the same
integers. Three choices make it right on every processor without session options:

- Sums run as ``ConvInteger``/``MatMulInteger`` of uint8 by uint8 with zero points. Mixed signs are
  avoided: uint8 by int8 saturates in 16 bits on AVX2 without VNNI, int8 by uint8 is wrong in places.
  An operand wider than 8 bits is split into base-256 digits, whose sums are joined in int64.
- Requantization is int64: a flooring shift is a logical shift of the value made non-negative by a
  multiple of ``2**shift``, or, where that could leave int64, ``(v - v mod 2**shift) / 2**shift``.
  Clipping is int32: on x86 onnxruntime compares int64 by halves (``Clip``, ``Min``, ``Max`` are wrong for
  some values beyond 32 bits), so accumulators are clipped before a product whose result would not fit.
- Maxima are taken over shifted slices: onnxruntime merges a constant ``Pad`` into a following
  ``MaxPool`` even where the constant can win.

Tensors are NCHW int32 between the operations; weights of up to 4 bits are stored as uint4, of up to 8
bits as uint8.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from arqsearch.errors import ArqError
from arqsearch.export.onnx_graph import IntegerGraph, onnx_pads, save_model
from arqsearch.export.runtime import (
    FORM_KEYS,
    HASH_KEY,
    INPUT,
    OUTPUT,
    RANGE_KEY,
    VERSION_KEY,
    load_model,
    read_metadata,
    require,
)
from arqsearch.integer import ops as O
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram
from arqsearch.integer.ranges import divide_rounded, prove

FORM = "onnx"


def export_strict(program: IntegerProgram, path: str | Path) -> None:
    """Write the program as an ONNX model with integer tensors only.

    The input ``pixels`` is int16 ``(N, H, W, C)`` with any N, the output ``logits`` int32 ``(N, K)``. The
    model's metadata holds the program's hash, the arithmetic version and the proven pixel range.

    :param path: where to write; folders are made.
    :raises ArqError: when the range proof fails or the package onnx is missing.
    """
    graph = IntegerGraph(require("onnx"), program.tensors)
    prove(program)
    graph.values[0] = channels_first(graph)
    for op in program.ops:
        graph.values[op.output] = RULES[type(op)](graph, op)
    graph.node("Identity", graph.values[program.output], output=OUTPUT)
    write_integers(graph, program, path, {FORM_KEYS[FORM]: "integer tensors only"})


def channels_first(graph: IntegerGraph) -> str:
    """The input as int32 NCHW."""
    return graph.node("Transpose", graph.cast(INPUT, "INT32"), perm=[0, 3, 1, 2])


def write_integers(
    graph: IntegerGraph, program: IntegerProgram, path: str | Path, facts: dict[str, str], **options: int
) -> None:
    """Write a graph from int16 pixels to int32 logits with what identifies its program."""
    identity = {
        HASH_KEY: program.hash,
        VERSION_KEY: str(ARITHMETIC_VERSION),
        RANGE_KEY: json.dumps([program.input.lo, program.input.hi]),
    }
    pixels, logits = ("INT16", program.input.shape), ("INT32", (program.num_classes,))
    save_model(graph.onnx, graph.model("arqsearch", pixels, logits, {**identity, **facts}, **options), path)


def run_strict(path: str | Path, pixels: Any, *, batch: int = 64, threads: int = 1) -> np.ndarray:
    """Run an exported model with onnxruntime on the CPU.

    :param pixels: integers ``(N, H, W, C)`` within the proven pixel range.
    :param batch: images per call, which bounds memory.
    :param threads: threads within an operator; the logits do not depend on it.
    :returns: logits, int32 ``(N, K)``.
    :raises ArqError: when the file is missing or not such a model, or the pixels do not fit it.
    """
    model = load_model(path, FORM, threads=threads)
    return model.run(model.integer_pixels(pixels), batch, np.int32)


def strict_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an exported model: program hash, arithmetic version, pixel range."""
    return read_metadata(path, FORM)


def _input_quantize(graph: IntegerGraph, op: O.InputQuantize) -> str:
    spec = graph.specs[op.inputs[0]]
    clipped = graph.clip(graph.values[op.inputs[0]], op.pre_lo, op.pre_hi)
    ends = tuple(_clip(end, (op.pre_lo, op.pre_hi)) for end in (spec.lo, spec.hi))
    return _rescale(graph, op, clipped, ends, op.offset, np.array([op.shift]))


def _requantize(graph: IntegerGraph, op: O.Requantize) -> str:
    spec = graph.specs[op.inputs[0]]
    return _rescale(graph, op, graph.values[op.inputs[0]], (spec.lo, spec.hi), np.array([0]), op.shift)


def _rescale(
    graph: IntegerGraph,
    op: O.InputQuantize | O.Requantize,
    value: str,
    ends: tuple[int, ...],
    offset: O.IntArray,
    shift: O.IntArray,
) -> str:
    """``clip(round((x*M + B) / 2**k), lo, hi)`` of an int32 value within `ends`, as int32."""
    tensor = op.inputs[0]
    multiplier, offset, shift = np.broadcast_arrays(*(v.astype(np.int64) for v in (op.multiplier, offset, shift)))
    columns = list(zip(multiplier.tolist(), offset.tolist(), shift.tolist(), strict=True))
    limits = [_limits(factor, add, places, op, ends) for factor, add, places in columns]
    if any(limit != ends for limit in limits):
        low, high = (graph.per_channel(list(side), tensor, "INT32") for side in zip(*limits, strict=True))
        value = graph.node("Min", graph.node("Max", value, low), high)
    scaled = graph.cast(value, "INT64")
    if set(multiplier.tolist()) != {1}:
        scaled = graph.node("Mul", scaled, graph.per_channel(op.multiplier.tolist(), tensor))
    if offset.any():
        scaled = graph.node("Add", scaled, graph.per_channel(offset.tolist(), tensor))
    spans = [
        sorted(_clip(end, limit) * factor + add for end in ends)
        for (factor, add, _), limit in zip(columns, limits, strict=True)
    ]
    lows, highs = [span[0] for span in spans], [span[1] for span in spans]
    rounded = graph.round_shift(scaled, shift, op.rounding, lows, highs, tensor)
    return graph.clip(graph.cast(rounded, "INT32"), op.lo, op.hi)


def _limits(
    factor: int, add: int, places: int, op: O.InputQuantize | O.Requantize, ends: tuple[int, ...]
) -> tuple[int, ...]:
    """Where one channel's x may be clipped without changing the result, so that it fits int32 before clipping.

    :raises ArqError: when no such place exists.
    """

    def result(x: int) -> int:
        return divide_rounded(x * factor + add, places, op.rounding)

    def fits(x: int) -> bool:
        return O.INT32_MIN <= result(x) <= O.INT32_MAX

    if all(fits(end) for end in ends):
        return ends
    if factor > 0:
        # Over all of int32, not `ends`: a channel that always saturates is clipped to one place outside.
        everywhere = range(O.INT32_MIN, O.INT32_MAX + 1)
        low = max(bisect_right(everywhere, op.lo, key=result) - 1, 0)
        high = min(bisect_left(everywhere, op.hi, key=result), len(everywhere) - 1)
        limits = (everywhere[min(low, high)], everywhere[max(low, high)])
        if all(fits(_clip(end, limits)) for end in ends):
            return limits
    raise ArqError(
        f"Strict ONNX cannot hold the result of {type(op).__name__} (tensor {op.output}): multiplier {factor} with "
        f"shift {places} reaches {result(ends[0])}..{result(ends[1])} before clipping to {op.lo}..{op.hi}, "
        "beyond int32. Use a larger shift or a narrower clip."
    )


def _clip(value: int, limits: tuple[int, ...]) -> int:
    return min(max(value, limits[0]), limits[1])


def _with_bias(graph: IntegerGraph, value: str, bias: O.IntArray, tensor: int) -> str:
    return graph.node("Add", value, graph.per_channel(bias.tolist(), tensor, "INT32")) if bias.any() else value


def _conv2d(graph: IntegerGraph, op: O.Conv2d) -> str:
    value = graph.sum_products(
        op.inputs[0],
        op.weight.transpose(0, 3, 1, 2),
        "ConvInteger",
        kernel_shape=list(op.weight.shape[1:3]),
        strides=list(op.stride),
        pads=onnx_pads(op.padding),
        group=op.groups,
    )
    return _with_bias(graph, value, op.bias, op.output)


def _linear(graph: IntegerGraph, op: O.Linear) -> str:
    value = graph.sum_products(op.inputs[0], op.weight.T, "MatMulInteger")
    return _with_bias(graph, value, op.bias, op.output)


def _add(graph: IntegerGraph, op: O.Add) -> str:
    total = graph.node("Add", *(graph.values[source] for source in op.inputs))
    return graph.clip(total, op.lo, op.hi)


def _sum_pool(graph: IntegerGraph, op: O.SumPool2d) -> str:
    shape = graph.specs[op.inputs[0]].shape
    if op.kernel == shape[:2] and not any(op.padding):
        return graph.node("ReduceSum", graph.values[op.inputs[0]], graph.constant([2, 3]), keepdims=1)
    ones = np.ones((shape[2], 1, *op.kernel), dtype=np.int64)
    return graph.sum_products(
        op.inputs[0],
        ones,
        "ConvInteger",
        kernel_shape=list(op.kernel),
        strides=list(op.stride),
        pads=onnx_pads(op.padding),
        group=shape[2],
    )


def _max_pool(graph: IntegerGraph, op: O.MaxPool2d) -> str:
    spec, out = graph.specs[op.inputs[0]], graph.specs[op.output].shape
    value = graph.values[op.inputs[0]]
    if any(op.padding):
        value = _spatial_pad(graph, value, op.padding, graph.constant(spec.lo, "INT32"))
    parts = []
    for row in range(op.kernel[0]):
        for column in range(op.kernel[1]):
            starts = (row, column)
            ends = [start + (n - 1) * step + 1 for start, n, step in zip(starts, out[:2], op.stride, strict=True)]
            bounds = (graph.constant(values) for values in (starts, ends, (2, 3), op.stride))
            parts.append(graph.node("Slice", value, *bounds))
    return graph.node("Max", *parts)


def _spatial_pad(graph: IntegerGraph, value: str, padding: O.Padding, fill: str) -> str:
    top, left, bottom, right = onnx_pads(padding)
    return graph.node("Pad", value, graph.constant([0, 0, top, left, 0, 0, bottom, right]), fill)


def _pad(graph: IntegerGraph, op: O.Pad2d) -> str:
    value = graph.values[op.inputs[0]]
    if len(set(op.values.tolist())) == 1:
        return _spatial_pad(graph, value, op.padding, graph.constant(op.values[0], "INT32"))
    # Only zeros can be padded for all channels at once; int64, as the difference may leave int32.
    values = graph.per_channel(op.values.tolist(), op.inputs[0])
    centred = graph.node("Sub", graph.cast(value, "INT64"), values)
    return graph.cast(graph.node("Add", _spatial_pad(graph, centred, op.padding, graph.constant(0)), values), "INT32")


def _pad_channels(graph: IntegerGraph, op: O.PadChannels) -> str:
    rest = [0] * (len(graph.specs[op.inputs[0]].shape) - 1)
    pads = graph.constant([0, op.before, *rest, 0, op.after, *rest])
    return graph.node("Pad", graph.values[op.inputs[0]], pads, graph.constant(0, "INT32"))


def _slice(graph: IntegerGraph, op: O.Slice) -> str:
    starts, ends, steps = zip(op.channels, op.rows, op.columns, strict=True)
    bounds = (graph.constant(values) for values in (starts, ends, (1, 2, 3), steps))
    return graph.node("Slice", graph.values[op.inputs[0]], *bounds)


def _flatten(graph: IntegerGraph, op: O.Flatten) -> str:
    value = graph.values[op.inputs[0]]
    if len(graph.specs[op.inputs[0]].shape) == 1:
        return value
    rows = graph.node("Transpose", value, perm=[0, 2, 3, 1])
    return graph.node("Reshape", rows, graph.constant([-1, *graph.specs[op.output].shape]))


RULES: dict[type[O.Op], Callable[..., str]] = {
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
