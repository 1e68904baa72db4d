"""Fast ONNX, operation by operation: layers with their requantization, residual sums, the input, moves.

A tensor becomes bytes when its operation is visited. Layers wait for the requantization that reads them, operands of
sums for the sum; what nothing takes up as bytes is made int32 when something reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from arqsearch.export import onnx_strict as strict
from arqsearch.export.onnx_bytes import ByteGraph, Codes, fits_byte, natural_zero
from arqsearch.export.onnx_graph import onnx_pads
from arqsearch.export.onnx_rescale import SUM_LIMIT, TOP, ConvRescale, fit_codes, fit_conv, fit_pixels
from arqsearch.export.runtime import INPUT
from arqsearch.integer import ops as O
from arqsearch.integer.requantize import plan_requantize

#: Most bytes that the branch of a sum is cut into.
MAX_PIECES = 4


# ---- layers and their requantization ---------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A sum of products as QLinearConv takes it: OIHW weights in int8 and a bias for each output channel."""

    source: int
    weight: O.IntArray
    bias: O.IntArray
    attributes: dict[str, Any]


def _layer(graph: ByteGraph, tensor: int) -> _Layer | None:
    """The convolution behind accumulators; linear layers and sums over windows are convolutions too."""
    op = graph.producers.get(tensor)
    kernel: tuple[int, ...] = (1, 1)
    stride, padding, groups = (1, 1), (0, 0, 0, 0), 1
    if isinstance(op, O.Conv2d):
        kernel, stride, padding, groups = op.weight.shape[1:3], op.stride, op.padding, op.groups
        weight, bias = op.weight.transpose(0, 3, 1, 2), op.bias
    elif isinstance(op, O.Linear):
        weight, bias = op.weight[:, :, None, None], op.bias
    elif isinstance(op, O.SumPool2d):
        kernel, stride, padding, groups = op.kernel, op.stride, op.padding, graph.specs[tensor].shape[-1]
        weight, bias = np.ones((groups, 1, *kernel), np.int8), np.zeros(groups, np.int32)
    else:
        return None
    if weight.min(initial=0) < -128 or weight.max(initial=0) > 127:
        return None
    attributes = {"kernel_shape": list(kernel), "strides": list(stride), "pads": onnx_pads(padding), "group": groups}
    return _Layer(op.inputs[0], weight, bias, attributes)


def _fit(graph: ByteGraph, op: O.Requantize, floors: list[int]) -> list[ConvRescale] | None:
    """The rescale of the layer behind a requantization for each floor; None unless all are proven."""
    accumulators = op.inputs[0]
    layer = _layer(graph, accumulators)
    if layer is None or graph.bytes_of(layer.source) is None:
        return None
    spec, found = graph.specs[accumulators], []
    for floor in floors:
        rescale = fit_conv(op, spec.shape[-1], spec.lo, spec.hi, floor)
        if rescale is None:
            return None
        bias = layer.bias + rescale.bias
        if bias.min(initial=0) < O.INT32_MIN or bias.max(initial=0) > O.INT32_MAX:
            return None
        found.append(rescale)
    return found


def _convolve(graph: ByteGraph, accumulators: int, rescale: ConvRescale) -> str:
    """A layer as one QLinearConv with a proven rescale; bytes."""
    layer = _layer(graph, accumulators)
    assert layer is not None
    source = graph.codes[layer.source]
    weight, zero = graph.weights(layer.weight, source.zero + max(source.hi, 0))
    one, x, flat = graph.real(1.0), source.name, len(graph.specs[accumulators].shape) == 1
    if flat:
        x = graph.node("Unsqueeze", x, graph.constant([2, 3]))
    name = graph.node(
        "QLinearConv", x, one, graph.byte(source.zero), weight, graph.constant(rescale.scale, "FLOAT"), zero, one,
        graph.byte(rescale.zero_point), graph.constant(layer.bias + rescale.bias, "INT32"), **layer.attributes,
    )  # fmt: skip
    if flat:
        name = graph.node("Squeeze", name, graph.constant([2, 3]))
    return name if rescale.clip is None else graph.clip_bytes(name, *rescale.clip)


def _requantize(graph: ByteGraph, op: O.Requantize) -> None:
    """Bytes where the result fits; operands of sums are left to the sum."""
    readers = graph.readers.get(op.output, [])
    if readers and all(isinstance(reader, O.Add) for reader in readers):
        return
    _requantize_bytes(graph, op)


def _requantize_bytes(graph: ByteGraph, op: O.Requantize) -> Codes | None:
    """The result as bytes, by the fastest form that is proven; None when it does not fit a byte."""
    lo, hi = _result_range(graph, op)
    if not fits_byte(lo, hi) or op.output in graph.codes:
        return graph.codes.get(op.output)
    zero, source = natural_zero(lo, hi), _source_bytes(graph, op)
    line = None if source is None else fit_codes(op, source.lo, source.hi)
    if source is not None and line is not None and not (line.ties and zero % 2):
        term = Codes(source.name, source.zero, line.lo, line.hi, line.scale)
        graph.codes[op.output] = graph.quantized_sum([term], lo, hi, line.offset)
        graph.plan["codes"] += 1
        return graph.codes[op.output]
    found = _fit(graph, op, [-zero])
    if found is not None:
        name = _convolve(graph, op.inputs[0], found[0])
        graph.plan["conv"] += 1
    else:
        name = _separate(graph, op, lo, hi, "UINT8", zero)
    graph.codes[op.output] = Codes(name, zero, lo, hi)
    return graph.codes[op.output]


def _source_bytes(graph: ByteGraph, op: O.Requantize) -> Codes | None:
    """What a requantization reads, as bytes; None for the accumulators of a layer, which may join it."""
    return None if _layer(graph, op.inputs[0]) is not None else graph.bytes_of(op.inputs[0])


def _result_range(graph: ByteGraph, op: O.Requantize | O.Add) -> tuple[int, int]:
    """What an operation's results lie in: its clip and its stated range."""
    spec = graph.specs[op.output]
    return max(op.lo, spec.lo), min(op.hi, spec.hi)


def _separate(graph: ByteGraph, op: O.Requantize, lo: int, hi: int, kind: str, zero: int = 0) -> str:
    """``clip(result, lo, hi) + zero`` of int32 values by operators of its own.

    :param kind: of the result: ``UINT8``, ``INT32`` or ``FLOAT``.
    """
    tensor, value = op.inputs[0], graph.values[op.inputs[0]]
    spec = graph.specs[tensor]
    # With fewer steps more is proven.
    plan = plan_requantize(replace(op, lo=max(op.lo, lo), hi=min(op.hi, hi)), spec.shape[-1], spec.lo, spec.hi)
    if plan is None or max(abs(lo), abs(hi)) + zero > 2**24:
        graph.plan["int64"] += 1
        inner, value = "INT32", strict.RULES[O.Requantize](graph, op)
    else:
        graph.plan[plan.dtype] += 1
        inner = {"float32": "FLOAT", "float64": "DOUBLE"}[plan.dtype]
        value = graph.node("Mul", graph.cast(value, inner), graph.per_channel(plan.scale.tolist(), tensor, inner))
        value = graph.node("Add", value, graph.per_channel(plan.offset.tolist(), tensor, inner))
        value = graph.node("Floor", value)
    value = graph.node("Clip", value, graph.constant(lo, inner), graph.constant(hi, inner))
    value = graph.node("Add", value, graph.constant(zero, inner)) if zero else value
    return value if inner == kind else graph.cast(value, kind)


def widen(graph: ByteGraph, tensor: int) -> str:
    """A tensor as int32 by separate operators, in float where that is proven, else by the strict rule."""
    op = graph.producers.get(tensor)
    if op is None:
        return strict.channels_first(graph)
    if isinstance(op, O.Requantize):
        return _separate(graph, op, *_result_range(graph, op), "INT32")
    return strict.RULES[type(op)](graph, op)


# ---- residual sums ---------------------------------------------------------------------------


def _add(graph: ByteGraph, op: O.Add) -> None:
    """A sum of bytes; an operand that fits no byte comes in pieces, or as float where nothing is proven."""
    lo, hi = _result_range(graph, op)
    first, second = (graph.specs[tensor] for tensor in op.inputs)
    # An operand beyond these limits decides the sum whatever the other one is.
    limits = (lo - second.hi, hi - second.lo), (lo - first.hi, hi - first.lo)
    if not fits_byte(lo, hi) or max(abs(end) for pair in limits for end in pair) > 2**22:
        return
    # Proofs of scaled terms hold in sums of limited size; pieces reach past an operand's limits by less than a byte.
    reach = [
        min(max(abs(spec.lo), abs(spec.hi)), max(map(abs, pair)))
        for spec, pair in zip((first, second), limits, strict=True)
    ]
    scaled = sum(reach) + 2 * TOP < SUM_LIMIT
    left, right = (_operand(graph, tensor, *pair, scaled) for tensor, pair in zip(op.inputs, limits, strict=True))
    if len(left) < len(right):
        left, right = right, left
    if len(left) == 2 and len(right) == 1:
        below, above, other = *left, right[0]
        # At most one piece is not 0, so the clip between the two sums changes nothing that the other would undo.
        if other.lo >= lo:
            left, right = [above], [graph.quantized_sum([below, other], lo, hi)]
        elif other.hi <= hi:
            left, right = [below], [graph.quantized_sum([above, other], lo, hi)]
    graph.codes[op.output] = graph.quantized_sum([*left, *right], lo, hi)


def _operand(graph: ByteGraph, tensor: int, low: int, high: int, scaled: bool) -> list[Codes]:
    """An operand of a sum as terms to be added up; it may be clipped to anything that holds ``low..high``.

    :param scaled: whether its rounding may be left to the sum.
    :returns: one term, or pieces, the lower ones first.
    """
    op, spec = graph.producers.get(tensor), graph.specs[tensor]
    lo, hi = (spec.lo, spec.hi) if not isinstance(op, O.Requantize) else _result_range(graph, op)
    if fits_byte(lo, hi) and not isinstance(op, O.Requantize):
        found = graph.bytes_of(tensor)
        assert found is not None
        return [found]
    # Limits outside the operand's own range leave nothing to clip; a constant is left of one inside.
    inner = min(max(lo, low), hi), max(min(hi, high), lo)
    if isinstance(op, O.Requantize):
        terms = _requantized_operand(graph, op, *inner, scaled)
        if terms is not None:
            return terms
        return [Codes(_separate(graph, op, *inner, "FLOAT"), 0, *inner, real=True)]
    value = graph.cast(graph.clip(graph.values[tensor], *inner), "FLOAT")
    return [Codes(value, 0, *inner, real=True)]


def _requantized_operand(graph: ByteGraph, op: O.Requantize, low: int, high: int, scaled: bool) -> list[Codes] | None:
    """A requantized operand as bytes; None when they do not suffice or nothing is proven."""
    lo, hi = _result_range(graph, op)
    source = _source_bytes(graph, op) if scaled and op.output not in graph.codes else None
    if source is not None:
        line = fit_codes(op, source.lo, source.hi, offset=False)
        if line is not None and not line.ties and op.lo <= line.lo and line.hi <= op.hi:
            graph.plan["codes"] += 1
            return [Codes(source.name, source.zero, line.lo, line.hi, line.scale)]
    if fits_byte(lo, hi):
        found = _requantize_bytes(graph, op)
        return None if found is None else [found]
    floors = [-natural_zero(low, high)] if fits_byte(low, high) else list(range(low // TOP * TOP, high, TOP))
    rescales = _fit(graph, op, floors) if len(floors) <= MAX_PIECES else None
    if rescales is None:
        return None
    graph.plan["conv"] += 1
    return [
        _piece(_convolve(graph, op.inputs[0], rescale), floor, len(floors) > 1, lo, hi)
        for floor, rescale in zip(floors, rescales, strict=True)
    ]


def _piece(name: str, floor: int, cut: bool, lo: int, hi: int) -> Codes:
    """Bytes of the results ``floor..floor+255``; pieces of a cut range stand for the part on their side of 0."""
    if not cut:
        return Codes(name, -floor, max(lo, floor), min(hi, floor + TOP))
    return Codes(name, TOP, max(lo - floor, 0) - TOP, 0) if floor < 0 else Codes(name, 0, 0, min(hi - floor, TOP))


# ---- input and moves -------------------------------------------------------------------------


def _input_quantize(graph: ByteGraph, op: O.InputQuantize) -> None:
    """Pixels to bytes in float32, before the channels are moved to the front."""
    spec, codes = graph.specs[op.inputs[0]], graph.specs[op.output]
    lo, hi = max(op.lo, codes.lo), min(op.hi, codes.hi)
    found = fit_pixels(op, spec.shape[-1], spec.lo, spec.hi) if fits_byte(lo, hi) and op.inputs == (0,) else None
    if found is None:
        return
    value, zero = graph.cast(INPUT, "FLOAT"), natural_zero(lo, hi)
    if op.pre_lo > spec.lo or op.pre_hi < spec.hi:
        value = graph.node("Clip", value, graph.real(op.pre_lo), graph.real(op.pre_hi))
    # A row of constants: onnxruntime is slow where only the three channels are alike.
    scale, offset = (np.tile(row, (spec.shape[1], 1)) for row in (found.scale, found.offset))
    value = graph.node("Mul", value, graph.constant(scale, "FLOAT"))
    value = graph.node("Add", value, graph.constant(offset, "FLOAT"))
    name = graph.node("QuantizeLinear", value, graph.real(1.0), graph.byte(zero))
    if (lo + zero, hi + zero) != (0, TOP):
        name = graph.clip_bytes(name, lo + zero, hi + zero)
    graph.codes[op.output] = Codes(graph.node("Transpose", name, perm=[0, 3, 1, 2]), zero, lo, hi)


def _move(graph: ByteGraph, op: O.Op) -> None:
    """Operations that copy values copy bytes."""
    source = graph.codes.get(op.inputs[0])
    if source is None:
        return
    name, spec = source.name, graph.specs[op.output]
    if isinstance(op, O.MaxPool2d):
        if isinstance(graph.producers[op.inputs[0]], O.Pad2d | O.PadChannels):
            return  # onnxruntime would merge the constant padding into the maximum.
        name = graph.node(
            "MaxPool", name, kernel_shape=list(op.kernel), strides=list(op.stride), pads=onnx_pads(op.padding)
        )
    elif isinstance(op, O.Pad2d):
        value = int(op.values[0]) + source.zero
        if len(set(op.values.tolist())) != 1 or not 0 <= value <= TOP:
            return
        top, left, bottom, right = onnx_pads(op.padding)
        name = graph.node("Pad", name, graph.constant([0, 0, top, left, 0, 0, bottom, right]), graph.byte(value))
    elif isinstance(op, O.PadChannels):
        rest = [0] * (len(spec.shape) - 1)
        pads = graph.constant([0, op.before, *rest, 0, op.after, *rest])
        name = graph.node("Pad", name, pads, graph.byte(source.zero))
    elif isinstance(op, O.Slice):
        starts, ends, steps = zip(op.channels, op.rows, op.columns, strict=True)
        name = graph.node("Slice", name, *(graph.constant(bounds) for bounds in (starts, ends, (1, 2, 3), steps)))
    elif len(graph.specs[op.inputs[0]].shape) > 1:
        rows = graph.node("Transpose", name, perm=[0, 2, 3, 1])
        name = graph.node("Reshape", rows, graph.constant([-1, *spec.shape]))
    graph.codes[op.output] = Codes(name, source.zero, spec.lo, spec.hi)


#: What runs as bytes. Layers wait for what reads them; everything else is widened when something reads it.
RULES: dict[type[O.Op], Callable[..., None]] = {
    O.InputQuantize: _input_quantize,
    O.Requantize: _requantize,
    O.Add: _add,
    O.MaxPool2d: _move,
    O.Pad2d: _move,
    O.PadChannels: _move,
    O.Slice: _move,
    O.Flatten: _move,
}
