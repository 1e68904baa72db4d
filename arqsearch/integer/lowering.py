"""From a `QuantizedNet` with chosen bit-widths to the `IntegerProgram` that is shipped.

Scales become multipliers and shifts here, in float64 (correctly rounded operations only, so that the
same weights give the same integers on every machine). Nothing downstream sees a float again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from arqsearch.quantize.graph import LAYERS, TRANSPARENT, Node
from arqsearch.quantize.layer import QuantizedLayer
from arqsearch.quantize.network import CLIP_CENTRE, QuantizedNet
from arqsearch.quantize.quantizers import StepTable, code_range, round_real

#: Operands of a sum are requantized to the stream's scale within this range, then added and clipped.
OPERAND_LIMIT = 2**15 - 1
#: Precision of the input quantizer's multiplier: normalisation of a pixel to far below one code.
INPUT_SHIFT = 30


@dataclass(frozen=True)
class _Value:
    """A lowered tensor: its index, its real value for each integer step, and the code of real zero."""

    tensor: int
    scale: np.ndarray
    zero: np.ndarray
    layer: str | None = None


def multiplier_and_shift(ratio: np.ndarray, bits: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers with ``M / 2**k`` closest to `ratio`, one pair for each entry.

    :param ratio: positive float64.
    :param bits: ``"31"``, ``"15"`` or ``"pow2"``.
    :raises ArqError: when a ratio needs a shift outside 1..62, or is no power of two in pow2 mode.
    """
    if bits == "pow2":
        power = np.rint(np.log2(ratio)).astype(np.int64)
        if not np.allclose(np.ldexp(ratio, -power), 1.0, rtol=1e-5):
            raise ArqError("A scale ratio is not a power of two although quantize.multiplier is 'pow2'.")
        multiplier, shift = np.ones(ratio.shape, np.int64), -power
    else:
        mantissa, exponent = np.frexp(ratio)
        width = int(bits)
        multiplier = np.rint(np.ldexp(mantissa, width)).astype(np.int64)
        shift = width - exponent.astype(np.int64)
        full = multiplier == 1 << width
        multiplier, shift = np.where(full, multiplier >> 1, multiplier), np.where(full, shift - 1, shift)
    # Ratios of 1 and more: grow the multiplier so that the shift stays at least 1.
    grow = np.maximum(1 - shift, 0)
    multiplier, shift = multiplier << np.minimum(grow, 31), shift + grow
    # Vanishing ratios (dead channels): drop low bits of the multiplier.
    drop = np.maximum(shift - 62, 0)
    multiplier, shift = multiplier >> np.minimum(drop, 62), shift - drop
    if int(multiplier.max(initial=0)) >= 2**31:
        raise ArqError(f"A scale ratio of {float(ratio.max()):.3g} is too large to requantize; calibrate again.")
    return multiplier.astype(np.int32), shift.astype(np.int8)


def lower(net: QuantizedNet, noise_limit: int = 0, metadata: dict[str, Any] | None = None) -> IntegerProgram:
    """Lower the network at its current bit-widths.

    :param net: a calibrated or trained network; its batch norm statistics are used as they are.
    :param noise_limit: largest absolute noise in grey levels; the proofs cover pixels
        ``-noise_limit .. 255 + noise_limit``.
    :param metadata: provenance to keep beside the program (not hashed).
    :raises ArqError: when a scale or a bias does not fit the integer arithmetic.
    """
    return _Lowering(net, noise_limit).build(metadata or {})


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())


class _Lowering:
    def __init__(self, net: QuantizedNet, noise_limit: int) -> None:
        self.net = net
        self.graph = net.graph
        self.settings = net.settings
        channels, height, width = net.input_shape
        self.input = TensorSpec((height, width, channels), -noise_limit, 255 + noise_limit)
        self.ops: list[O.Op] = []
        self.names: dict[str, str] = {"0": "input"}
        self.values: dict[str, _Value] = {}

    def build(self, metadata: dict[str, Any]) -> IntegerProgram:
        for node in self.graph.nodes:
            self.values[node.name] = self._node(node)
        logits = self.values[self.graph.output]
        facts = {
            "bitwidths": {name: list(bits) for name, bits in self.net.bitwidths},
            "logit_scale": float(logits.scale.reshape(-1)[0]),
            "tensor_names": self.names,
            "input_mode": self.settings.input_mode,
            "grey_levels_per_code": self._grey_levels_per_code(),
        }
        ops = tuple(self.ops)
        return IntegerProgram(ops, infer(ops, self.input), logits.tensor, {**facts, **metadata})

    def _grey_levels_per_code(self) -> float:
        """How many grey levels one code of the first quantizer spans (the widest channel)."""
        first = next(op for op in self.ops if isinstance(op, O.InputQuantize))
        return float(2.0**first.shift / first.multiplier.min())

    def _put(self, name: str, kind: type[O.Op], inputs: tuple[int, ...], **fields: Any) -> int:
        output = len(self.ops) + 1
        self.ops.append(kind(inputs=inputs, output=output, **fields))
        self.names[str(output)] = name
        return output

    # ---- nodes -------------------------------------------------------------------------------

    def _node(self, node: Node) -> _Value:
        if node.kind == "input":
            return self._input()
        if node.kind in TRANSPARENT:
            return self._move(node, self.values[node.inputs[0]])
        if node.kind == "add":
            return self._add(node)
        source = self.values[node.inputs[0]]
        if node.kind in LAYERS:
            value = self._layer(node, source)
        elif node.kind == "avgpool":
            value = self._sum_pool(node, source)
        else:
            value = source
        placement, target = self.net.placements[node.name]
        if placement == "stream":
            return self._requantize(
                f"{node.name}.codes", value, self.net.stream(node.name), self.settings.residual_bits, node
            )
        if placement == "layer":
            layer = self.net.layer(target)
            codes = self._requantize(f"{node.name}.codes", value, layer.activation, layer.bits[1], node)
            return replace(codes, layer=target)
        return value

    def _input(self) -> _Value:
        placement, target = self.net.placements["input"]
        layer = self.net.layer(target) if placement == "layer" else None
        bits = layer.bits[1] if layer else self.settings.residual_bits
        channels = self.net.input_shape[0]
        if self.settings.input_mode == "clip":
            shift = 8 - bits
            tensor = self._put(
                "input.codes", O.InputQuantize, (0,), multiplier=np.ones(channels, np.int64),
                offset=np.full(channels, -CLIP_CENTRE, np.int64), shift=shift, rounding="half_up",
                pre_lo=0, pre_hi=255, lo=-(2 ** (bits - 1)), hi=2 ** (bits - 1) - 1,
            )  # fmt: skip
            zero = _numpy(self.net.clip_zero(bits)).astype(np.int64)
            return _Value(tensor, np.array(self.net.clip_step(bits)), zero, target)
        table: StepTable = layer.activation if layer else self.net.stream("input")
        step = float(_numpy(table.step(bits))[0])
        mean, std = _numpy(self.net.mean).reshape(-1), _numpy(self.net.std).reshape(-1)
        multiplier = np.rint(np.ldexp(1.0 / (std * step), INPUT_SHIFT)).astype(np.int64)
        offset = -np.rint(multiplier * mean).astype(np.int64)
        lo, hi = code_range(bits, True)
        tensor = self._put(
            "input.codes", O.InputQuantize, (0,), multiplier=multiplier, offset=offset, shift=INPUT_SHIFT,
            rounding=self.settings.rounding, pre_lo=self.input.lo, pre_hi=self.input.hi, lo=lo, hi=hi,
        )  # fmt: skip
        return _Value(tensor, np.array(step), np.zeros(channels, np.int64), target if layer else None)

    def _move(self, node: Node, source: _Value) -> _Value:
        tensor, zero = source.tensor, source.zero
        attrs = node.attrs
        if node.kind == "maxpool":
            tensor = self._put(
                node.name,
                O.MaxPool2d,
                (tensor,),
                kernel=attrs["kernel"],
                stride=attrs["stride"],
                padding=attrs["padding"],
            )
        elif node.kind == "pad":
            tensor = self._pad(node.name, source, attrs["padding"])
        elif node.kind == "padchannels":
            tensor = self._put(node.name, O.PadChannels, (tensor,), before=attrs["before"], after=attrs["after"])
            if zero.any():
                raise ArqError(f"{node.name!r} pads channels of raw pixels; set quantize.input_mode to 'wide'.")
        elif node.kind == "slice":
            bounds = {axis: attrs[axis] for axis in ("rows", "columns", "channels")}
            tensor = self._put(node.name, O.Slice, (tensor,), **bounds)
            zero = zero[slice(*attrs["channels"])] if zero.any() else zero
        else:
            channels_first = self.graph[node.inputs[0]].shape
            if zero.any():
                zero = np.tile(zero, int(np.prod(channels_first[1:])))
            tensor = self._put(node.name, O.Flatten, (tensor,))
        return replace(source, tensor=tensor, zero=zero)

    def _pad(self, name: str, source: _Value, padding: O.Padding) -> int:
        channels = self._channels(source.tensor)
        values = np.broadcast_to(source.zero if source.zero.any() else np.zeros(1, np.int64), (channels,)).copy()
        return self._put(name, O.Pad2d, (source.tensor,), padding=tuple(padding), values=values)

    def _channels(self, tensor: int) -> int:
        return infer(tuple(self.ops), self.input)[tensor].shape[-1]

    def _layer(self, node: Node, source: _Value) -> _Value:
        layer = self.net.layer(node.name)
        if source.layer != node.name:
            source = self._requantize(f"{node.name}.input", source, layer.activation, layer.bits[1])
        weight_scale = _numpy(layer.weight_scale())
        weight = self._weight_codes(layer, weight_scale)
        scale = source.scale * weight_scale
        bias = np.rint(_numpy(layer.folded_bias()) / scale)
        tensor, padding = source.tensor, None
        if node.kind == "conv":
            padding = tuple(node.attrs["padding"])
            weight = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
            if source.zero.any():
                if any(padding):
                    tensor, padding = self._pad(f"{node.name}.pad", source, padding), (0, 0, 0, 0)
                groups = node.attrs["groups"]
                zeros = np.repeat(source.zero.reshape(groups, -1), len(weight) // groups, axis=0)
                bias = bias - np.einsum("ohwi,oi->o", weight.astype(np.int64), zeros)
        else:
            weight = self._flatten_order(node, weight)
            if source.zero.any():
                bias = bias - weight.astype(np.int64) @ source.zero
        if np.abs(bias).max(initial=0) > O.INT32_MAX:
            raise ArqError(f"The bias of {node.name!r} does not fit int32 at its accumulator scale; calibrate again.")
        fields: dict[str, Any] = {"weight": weight, "bias": bias.astype(np.int32)}
        if node.kind == "linear":
            tensor = self._put(node.name, O.Linear, (tensor,), **fields)
        else:
            tensor = self._put(
                node.name, O.Conv2d, (tensor,), **fields, stride=node.attrs["stride"], padding=padding,
                groups=node.attrs["groups"],
            )  # fmt: skip
        return _Value(tensor, scale, np.zeros(1, np.int64))

    def _weight_codes(self, layer: QuantizedLayer, scale: np.ndarray) -> np.ndarray:
        """Codes as fake quantization rounds them: float32 division, ties to even, clip."""
        weight = layer.folded_weight().detach().cpu()
        step = layer.weight_scale().detach().cpu().reshape(-1, *(1,) * (weight.ndim - 1))
        lo, hi = code_range(layer.bits[0], True)
        return np.asarray((weight / step).round().clamp(lo, hi).numpy().astype(np.int8))

    def _flatten_order(self, node: Node, weight: np.ndarray) -> np.ndarray:
        """Reorder columns from the module's (C, H, W) flattening to the program's (H, W, C)."""
        source = self.graph[node.inputs[0]]
        while source.kind != "flatten" and source.kind in TRANSPARENT:
            source = self.graph[source.inputs[0]]
        shape = self.graph[source.inputs[0]].shape if source.kind == "flatten" else ()
        if len(shape) != 3:
            return weight
        return np.ascontiguousarray(weight.reshape(-1, *shape).transpose(0, 2, 3, 1).reshape(len(weight), -1))

    def _sum_pool(self, node: Node, source: _Value) -> _Value:
        if source.zero.any():
            raise ArqError(f"{node.name!r} pools raw pixels; set quantize.input_mode to 'wide'.")
        kernel = node.attrs["kernel"]
        tensor = self._put(
            node.name,
            O.SumPool2d,
            (source.tensor,),
            kernel=kernel,
            stride=node.attrs["stride"],
            padding=node.attrs["padding"],
        )
        return _Value(tensor, source.scale / (kernel[0] * kernel[1]), source.zero)

    def _add(self, node: Node) -> _Value:
        table = self.net.stream(node.name)
        step = _numpy(table.step(self.settings.residual_bits))
        operands = []
        for position, name in enumerate(node.inputs):
            source = self.values[name]
            producer = self.graph[name]
            lo, hi = -OPERAND_LIMIT, OPERAND_LIMIT
            if producer.kind not in TRANSPARENT and self.net.placements[name][0] == "add":
                lo, hi = self._activation_limits(producer, lo, hi, step, self.settings.rounding)
            multiplier, shift = multiplier_and_shift(np.atleast_1d(source.scale / step), self.settings.multiplier)
            operands.append(
                self._put(
                    f"{node.name}.operand{position}", O.Requantize, (source.tensor,), multiplier=multiplier,
                    shift=shift, rounding=self.settings.rounding, lo=lo, hi=hi,
                )
            )  # fmt: skip
        lo, hi = code_range(self.settings.residual_bits, table.signed)
        # The sum of two codes is a code: only its cap can fall between codes, and the sum rounds to the nearest.
        lo, hi = self._activation_limits(node, lo, hi, step, "half_even")
        tensor = self._put(node.name, O.Add, tuple(operands), lo=lo, hi=hi)
        return _Value(tensor, step.reshape(()), np.zeros(1, np.int64))

    def _activation_limits(
        self, node: Node | None, lo: int, hi: int, step: np.ndarray, rounding: O.Rounding
    ) -> tuple[int, int]:
        """Clip limits in codes, narrowed by a node's activation function; the cap is rounded as values are."""
        if node is not None and node.relu:
            lo = max(lo, 0)
        if node is not None and node.cap is not None:
            cap = torch.tensor(node.cap) / torch.tensor(float(step[0]))
            hi = min(hi, int(round_real(cap, rounding)))
        return lo, hi

    def _requantize(self, name: str, source: _Value, table: StepTable, bits: int, node: Node | None = None) -> _Value:
        """Codes of `table` at `bits`; `node` is the producer whose activation function is applied here."""
        step = _numpy(table.step(bits))
        lo, hi = self._activation_limits(node, *code_range(bits, table.signed), step, self.settings.rounding)
        multiplier, shift = multiplier_and_shift(np.atleast_1d(source.scale / step), self.settings.multiplier)
        tensor = self._put(
            name, O.Requantize, (source.tensor,), multiplier=multiplier, shift=shift,
            rounding=self.settings.rounding, lo=lo, hi=hi,
        )  # fmt: skip
        return _Value(tensor, step.reshape(()), np.zeros(1, np.int64))
