"""Building blocks of fast ONNX: byte tensors, their sums, weights in few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from arqsearch.export.onnx_graph import OPSET, OPSET_INT2, IntegerGraph
from arqsearch.export.onnx_rescale import TOP, saturating_pairs
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram


@dataclass(frozen=True)
class Codes:
    """A byte tensor, ``value = (code - zero) * scale``, or a term of a sum that is no byte.

    :param name: of the ONNX value, uint8 NCHW.
    :param zero: zero point, 0..255.
    :param lo: smallest value that it stands for, rounded.
    :param hi: largest.
    :param scale: 1 but for a term whose rounding is left to the sum.
    :param real: whether the ONNX value is float32 and holds whole numbers as they are.
    """

    name: str
    zero: int
    lo: int
    hi: int
    scale: float = 1.0
    real: bool = False


def natural_zero(lo: int, hi: int) -> int:
    """Zero point of bytes that hold ``lo..hi`` and 0: even where possible, as ties depend on its parity."""
    if lo >= 0:
        return 0
    return 128 if lo >= -128 and hi < 128 else -lo


def fits_byte(lo: int, hi: int) -> bool:
    """Whether bytes can hold ``lo..hi`` and 0."""
    return max(hi, 0) - min(lo, 0) <= TOP


class ByteGraph(IntegerGraph):
    """A graph whose tensors are bytes where that is possible, and int32 where something needs that.

    :param onnx: the onnx package.
    :param program: the program.
    :param vnni: keep 8-bit weights as int8 where processors without VNNI would saturate.
    :param widen: how to make a tensor int32 that is neither; adds nodes and returns the name.
    """

    def __init__(self, onnx: Any, program: IntegerProgram, vnni: bool, widen: Callable[[ByteGraph, int], str]) -> None:
        super().__init__(onnx, program.tensors)
        self.producers: dict[int, O.Op] = {op.output: op for op in program.ops}
        self.readers: dict[int, list[O.Op]] = {}
        for op in program.ops:
            for source in op.inputs:
                self.readers.setdefault(source, []).append(op)
        self.vnni = vnni
        self.values = _Values(self, widen)
        self.codes: dict[int, Codes] = {}
        #: How many requantizations run in which form.
        self.plan: Counter[str] = Counter()
        #: Whether some layer needs a session option on processors without VNNI.
        self.may_saturate = False
        self.opset = OPSET

    def digits(self, tensor: int) -> list[tuple[str, int]]:
        if tensor in self.codes:
            return [(self.codes[tensor].name, self.codes[tensor].zero)]
        return super().digits(tensor)

    def bytes_of(self, tensor: int) -> Codes | None:
        """A tensor as bytes; None when its range does not fit."""
        spec = self.specs[tensor]
        if tensor not in self.codes and fits_byte(spec.lo, spec.hi):
            ((name, zero),) = super().digits(tensor)
            self.codes[tensor] = Codes(name, zero, spec.lo, spec.hi)
        return self.codes.get(tensor)

    def byte(self, value: int) -> str:
        """A scalar uint8 constant."""
        return self.constant(value, "UINT8")

    def real(self, value: float) -> str:
        """A scalar float32 constant."""
        return self.constant(value, "FLOAT")

    def clip_bytes(self, name: str, lo: int, hi: int) -> str:
        """Clip a byte tensor."""
        return self.node("Clip", name, self.byte(lo), self.byte(hi))

    def quantized_sum(self, terms: list[Codes], lo: int, hi: int, offset: float = 0.0) -> Codes:
        """``clip(rint(sum of the terms + offset), lo, hi)`` as bytes; onnxruntime merges two terms into one operator.

        :param offset: with a single term only.
        """
        zero = natural_zero(lo, hi)
        parts = [
            t.name if t.real else self.node("DequantizeLinear", t.name, self.real(t.scale), self.byte(t.zero))
            for t in terms
        ]
        if len(parts) == 1:
            # A constant as the second term, so that it is merged as well; its sign lies in its code. It has a name of
            # its own: onnxruntime reshapes it, and zero points shared with it would no longer count as constants.
            code = self.constant(int(offset > 0), "UINT8", f"offset{len(self.nodes)}")
            step, sign = self.real(abs(offset) or 1.0), self.byte(int(offset < 0))
            parts.append(self.node("DequantizeLinear", code, step, sign))
        total = parts[0]
        for part in parts[1:]:
            total = self.node("Add", total, part)
        name = self.node("QuantizeLinear", total, self.real(1.0), self.byte(zero))
        low, high = sum(t.lo for t in terms), sum(t.hi for t in terms)
        if max(low, -zero) < lo or min(high, TOP - zero) > hi:
            name = self.clip_bytes(name, lo + zero, hi + zero)
        return Codes(name, zero, lo, hi)

    def weights(self, weight: O.IntArray, largest: int) -> tuple[str, str]:
        """A layer's weights for QLinearConv and their zero point.

        :param weight: OIHW, -128..127.
        :param largest: largest input byte.
        """
        values = weight.astype(np.int64)
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if saturating_pairs(values, largest):
            if not self.vnni:
                return self.constant(values + 128, "UINT8"), self.byte(128)
            self.may_saturate = True
            # Not shared with another node: onnxruntime replaces them one by one when it has to turn them into uint8.
            label = f"w{len(self.nodes)}"
            return self.constant(values, "INT8", label), self.constant(0, "INT8", f"{label}.zero")
        kind = "INT8"
        if low >= -2 and high < 2 and hasattr(self.onnx.TensorProto, "INT2"):
            kind, self.opset = "INT2", OPSET_INT2
        elif low >= -8 and high < 8:
            kind = "INT4"
        stored = self.constant(values, kind)
        return stored if kind == "INT8" else self.cast(stored, "INT8"), self.constant(0, "INT8")


class _Values(dict[int, str]):
    """Int32 values, made when first asked for."""

    def __init__(self, graph: ByteGraph, widen: Callable[[ByteGraph, int], str]) -> None:
        super().__init__()
        self.graph, self.widen = graph, widen

    def __missing__(self, tensor: int) -> str:
        graph = self.graph
        if tensor in graph.codes:
            codes = graph.codes[tensor]
            value = graph.cast(codes.name, "INT32")
            self[tensor] = graph.node("Sub", value, graph.constant(codes.zero, "INT32")) if codes.zero else value
        else:
            self[tensor] = self.widen(graph, tensor)
        return self[tensor]
