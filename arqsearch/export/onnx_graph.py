"""Building blocks of ONNX graphs: nodes, shared constants, exact sums of products, rounding shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arqsearch.export.runtime import INPUT, OUTPUT
from arqsearch.integer import ops as O
from arqsearch.integer.program import TensorSpec

#: First opset with 4-bit and first with 2-bit tensors, and the file format of each.
OPSET, OPSET_INT2 = 21, 25
IR_VERSIONS = {OPSET: 10, OPSET_INT2: 13}
#: Bits of an entry of the types that share bytes.
PACKED_BITS = {"UINT4": 4, "INT4": 4, "UINT2": 2, "INT2": 2}
FLOATS = {"FLOAT": np.float32, "DOUBLE": np.float64}


class GraphBuilder:
    """Collects the nodes and initializers of a graph.

    :param onnx: the onnx package.
    """

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its result."""
        name = output or f"t{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, values: Any, kind: str = "INT64", name: str | None = None) -> str:
        """Name of an initializer of the given ONNX type; unnamed equal ones are shared."""
        array = np.asarray(values, dtype=FLOATS.get(kind, np.int64))
        key = (kind, array.shape, array.tobytes())
        if name is None and key in self._constants:
            return self._constants[key]
        label = name or self._constants.setdefault(key, f"c{len(self._constants)}")
        element, content = getattr(self.onnx.TensorProto, kind), raw_content(array, kind)
        self.initializers.append(self.onnx.helper.make_tensor(label, element, array.shape, content, raw=True))
        return label

    def cast(self, value: str, kind: str) -> str:
        """Convert to another type."""
        return self.node("Cast", value, to=getattr(self.onnx.TensorProto, kind))

    def model(
        self,
        name: str,
        pixels: tuple[str, Sequence[int]],
        logits: tuple[str, Sequence[int]],
        facts: Mapping[str, str],
        opset: int = OPSET,
    ) -> Any:
        """The graph as a checked ONNX model.

        :param name: of the graph.
        :param pixels: type and shape of the input, without the batch axis.
        :param logits: the same of the output.
        :param facts: metadata.
        """
        helper, types = self.onnx.helper, self.onnx.TensorProto
        values = [
            helper.make_tensor_value_info(label, getattr(types, kind), ["N", *shape])
            for label, (kind, shape) in ((INPUT, pixels), (OUTPUT, logits))
        ]
        model = helper.make_model(
            helper.make_graph(self.nodes, name, values[:1], values[1:], self.initializers),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=IR_VERSIONS[opset],
            producer_name="arqsearch",
        )
        helper.set_model_props(model, dict(facts))
        self.onnx.checker.check_model(model, full_check=True)
        return model


def save_model(onnx: Any, model: Any, path: str | Path) -> None:
    """Write a model; folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


class IntegerGraph(GraphBuilder):
    """A graph over the tensors of a program, whose values are integer tensors.

    :param onnx: the onnx package.
    :param specs: shape and range of each tensor of the program; they choose digits and safe shifts.
    """

    def __init__(self, onnx: Any, specs: tuple[TensorSpec, ...]) -> None:
        super().__init__(onnx)
        self.specs = specs
        #: Names of the int32 NCHW (or NC) values of the program's tensors.
        self.values: dict[int, str] = {}
        self._digits: dict[tuple[int, int], list[tuple[str, int]]] = {}

    def clip(self, value: str, lo: int, hi: int) -> str:
        """Clip an int32 value; bounds beyond int32 are those of int32."""
        bounds = (min(max(bound, O.INT32_MIN), O.INT32_MAX) for bound in (lo, hi))
        return self.node("Clip", value, *(self.constant(bound, "INT32") for bound in bounds))

    def per_channel(self, values: Sequence[float], tensor: int, kind: str = "INT64") -> str:
        """A constant with one entry for each channel (or one for all), shaped to broadcast over a tensor."""
        return self.constant(np.reshape(values, (1, -1) + (1,) * (len(self.specs[tensor].shape) - 1)), kind)

    def digits(self, tensor: int) -> list[tuple[str, int]]:
        """A tensor as uint8 base-256 digits with zero points: ``x = sum 256**d * (digit_d - zero_d)``."""
        spec = self.specs[tensor]
        low, high = min(spec.lo, 0), max(spec.hi, 0)
        key = (tensor, low)
        if key not in self._digits:
            count = max(1, -(-(high - low).bit_length() // 8))
            self._digits[key] = self._split(self.values[tensor], low, count)
        return self._digits[key]

    def _split(self, value: str, low: int, count: int) -> list[tuple[str, int]]:
        if count == 1:
            shifted = self.node("Add", value, self.constant(-low, "INT32")) if low else value
            return [(self.cast(shifted, "UINT8"), -low)]
        shifted = self.node("Sub", self.cast(value, "INT64"), self.constant(low))
        base, parts = self.constant(256), []
        for place in range(count):
            digit = self.node("Mod", shifted, base) if place < count - 1 else shifted
            parts.append((self.cast(digit, "UINT8"), (-low >> (8 * place)) & 255))
            shifted = self.node("Div", shifted, base)
        return parts

    def weight_digits(self, weight: O.IntArray) -> list[tuple[str, int]]:
        """Weights as uint8 digits with zero points; the stored form is uint4 where 4 bits suffice."""
        values = weight.astype(np.int64)
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if low >= -8 and high < 8:
            return [(self.cast(self.constant(values + 8, "UINT4"), "UINT8"), 8)]
        if low >= -128 and high < 128:
            return [(self.constant(values + 128, "UINT8"), 128)]
        shifted = values + 2**15
        return [(self.constant(shifted & 255, "UINT8"), 0), (self.constant(shifted >> 8, "UINT8"), 128)]

    def sum_products(self, tensor: int, weight: O.IntArray, kind: str, **attributes: Any) -> str:
        """``ConvInteger`` or ``MatMulInteger`` of a tensor with constant weights, as int32.

        Each digit pair is exact modulo 2**32 and so is their sum; the true sum is proven to be an int32.
        """
        total: str | None = None
        weights = self.weight_digits(weight)
        inputs = self.digits(tensor)
        for i, (x, x_zero) in enumerate(inputs):
            for j, (w, w_zero) in enumerate(weights):
                zeros = (self.constant(x_zero, "UINT8"), self.constant(w_zero, "UINT8"))
                part = self.node(kind, x, w, *zeros, **attributes)
                if len(inputs) == len(weights) == 1:
                    return part
                wide = self.cast(part, "INT64")
                wide = self.node("Mul", wide, self.constant(256 ** (i + j))) if i + j else wide
                total = wide if total is None else self.node("Add", total, wide)
        assert total is not None
        return self.cast(total, "INT32")

    def floor_shift(self, value: str, shift: O.IntArray, lo: list[int], hi: list[int], tensor: int) -> str:
        """``floor(value / 2**shift)`` of an int64 value that lies in lo..hi, all per channel."""
        shifts: list[int] = np.broadcast_to(shift, (len(lo),)).tolist()
        lifts = [-(-max(-low, 0) >> k) for low, k in zip(lo, shifts, strict=True)]
        if all(high + (lift << k) < 2**63 for high, lift, k in zip(hi, lifts, shifts, strict=True)):
            lift = self.per_channel([lift << k for lift, k in zip(lifts, shifts, strict=True)], tensor)
            bits = self.cast(self.node("Add", value, lift), "UINT64")
            moved = self.node("BitShift", bits, self.per_channel(shifts, tensor, "UINT64"), direction="RIGHT")
            return self.node("Sub", self.cast(moved, "INT64"), self.per_channel(lifts, tensor))
        power = self.per_channel([1 << k for k in shifts], tensor)
        return self.node("Div", self.node("Sub", value, self.node("Mod", value, power)), power)

    def round_shift(
        self, value: str, shift: O.IntArray, rounding: O.Rounding, lo: list[int], hi: list[int], tensor: int
    ) -> str:
        """``round(value / 2**shift)``; ties to even add half - 1 and the parity of the floor."""
        shifts: list[int] = np.broadcast_to(shift, (len(lo),)).tolist()
        if rounding == "floor" or not any(shifts):
            return self.floor_shift(value, shift, lo, hi, tensor)
        halves = [1 << (k - 1) for k in shifts]
        if rounding == "half_even":
            parity = self.node("Mod", self.floor_shift(value, shift, lo, hi, tensor), self.constant(2))
            value = self.node("Add", value, parity)
            halves = [half - 1 for half in halves]
        value = self.node("Add", value, self.per_channel(halves, tensor))
        lo = [low + half for low, half in zip(lo, halves, strict=True)]
        hi = [high + half + (rounding == "half_even") for high, half in zip(hi, halves, strict=True)]
        return self.floor_shift(value, shift, lo, hi, tensor)


def raw_content(array: np.ndarray, kind: str) -> bytes:
    """Little-endian content of a tensor; entries of 4 or 2 bits share a byte, the first in its lowest bits."""
    if kind in FLOATS:
        return bytes(array.astype(np.dtype(FLOATS[kind]).newbyteorder("<")).tobytes())
    if kind not in PACKED_BITS:
        return bytes(array.astype(np.dtype(kind.lower()).newbyteorder("<")).tobytes())
    bits = PACKED_BITS[kind]
    places = 8 // bits
    flat = np.append(array.ravel(), np.zeros(-array.size % places, dtype=np.int64)) & (2**bits - 1)
    packed = sum(flat[place::places] << (bits * place) for place in range(places))
    return bytes(np.asarray(packed).astype(np.uint8).tobytes())


def onnx_pads(padding: O.Padding) -> list[int]:
    """Top, bottom, left, right in ONNX order: begins, then ends."""
    top, bottom, left, right = padding
    return [top, left, bottom, right]
