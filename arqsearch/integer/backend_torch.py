"""The exact torch backend: the reference that runs an `IntegerProgram`.

Integers travel in float32 or float64 tensors (NCHW, channels last in memory) wherever the range proof
shows that every partial sum is exactly representable; requantization uses a float expression only
where :mod:`arqsearch.integer.requantize` proves it equal to the integers, int64 otherwise. A
convolution kernel is trusted for a shape after a known-answer probe (:mod:`arqsearch.integer.probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.execution import check_pixels
from arqsearch.integer.probe import checked_conv2d
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import partial_sum_bound, prove
from arqsearch.integer.requantize import FloatPlan, plan_input, plan_requantize

#: What a compiled operation is: tensors in (NCHW or NC), tensor out.
Kernel: TypeAlias = Callable[..., Tensor]

FLOAT32_EXACT = 1 << 24
FLOAT64_EXACT = 1 << 53


def exact_dtype(magnitude: int) -> torch.dtype:
    """The narrowest float type in which every integer up to `magnitude` is exact.

    :raises ArqError: above 2**53.
    """
    if magnitude <= FLOAT32_EXACT:
        return torch.float32
    if magnitude <= FLOAT64_EXACT:
        return torch.float64
    raise ArqError(f"A partial sum may reach {magnitude}, beyond 2**53: this program cannot run on the torch backend.")


def split_padding(x: Tensor, padding: O.Padding) -> tuple[Tensor, tuple[int, int]]:
    """Return `x` and a symmetric padding that the kernel may apply; asymmetric parts are padded here."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


class TorchBackend:
    """Compiles a program once for a device and runs batches of pixels.

    :param program: the program; its ranges are proven first.
    :param device: torch device.
    :param chunk: images per inner batch, which bounds memory.
    :raises ArqError: when the range proof fails.
    """

    def __init__(self, program: IntegerProgram, device: str = "cpu", chunk: int = 64) -> None:
        prove(program)
        self.program = program
        self.device = torch.device(device)
        self.chunk = chunk
        self._kernels = [RULES[type(op)](op, program, self.device) for op in program.ops]
        last_use: dict[int, int] = {}
        for index, op in enumerate(program.ops):
            for source in op.inputs:
                last_use[source] = index
        self._dead = [[t for t, last in last_use.items() if last == i] for i in range(len(program.ops))]

    @torch.no_grad()
    def run(self, pixels: Any) -> Tensor:
        """Return logits as int32 ``(N, classes)`` for integer pixels ``(N, H, W, C)``.

        :raises ArqError: when type, shape or range do not fit.
        """
        x = check_pixels(self.program, pixels)
        if len(x) == 0:
            return torch.empty((0, self.program.num_classes), dtype=torch.int32)
        return torch.cat([self._run_chunk(part) for part in torch.split(x, self.chunk)])

    def _run_chunk(self, pixels: Tensor) -> Tensor:
        values: dict[int, Tensor] = {0: pixels.to(self.device).permute(0, 3, 1, 2)}
        for op, kernel, dead in zip(self.program.ops, self._kernels, self._dead, strict=True):
            values[op.output] = kernel(*(values[i] for i in op.inputs))
            for source in dead:
                del values[source]
        return values[self.program.output].to(torch.int32).cpu()


def _channels(values: np.ndarray, device: torch.device, dtype: torch.dtype, ndim: int) -> Tensor:
    """Per-channel constants shaped to broadcast over NCHW (or NC)."""
    shape = (1, -1, 1, 1) if ndim == 3 else (1, -1)
    return (
        torch.tensor(
            np.asarray(values).tolist(), dtype=torch.float64 if np.asarray(values).dtype.kind == "f" else torch.int64
        )
        .to(device=device, dtype=dtype)
        .reshape(shape)
    )


def _apply_plan(plan: FloatPlan, lo: int, hi: int, device: torch.device, ndim: int, own: bool) -> Kernel:
    """Multiply-add, floor, clip; in place where this operation is the only reader (`own`).

    The plan is proven with a margin that covers fused and unfused multiply-adds alike.
    """
    dtype = torch.float32 if plan.dtype == "float32" else torch.float64
    scale = _channels(plan.scale, device, dtype, ndim)
    offset = _channels(plan.offset, device, dtype, ndim)

    def kernel(x: Tensor) -> Tensor:
        out = x if own and x.dtype == dtype else None
        result = torch.addcmul(offset, x.to(dtype), scale, out=out).floor_().clamp_(lo, hi)
        return result.to(torch.float32)

    return kernel


def _round_shift(value: Tensor, shift: Tensor, rounding: O.Rounding) -> Tensor:
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), 0)
    if rounding == "floor":
        return value >> shift
    if rounding == "half_up":
        return (value + half) >> shift
    down = value >> shift
    rest = value - (down << shift)
    return down + ((shift > 0) & ((rest > half) | ((rest == half) & (down & 1 == 1)))).to(value.dtype)


def _input_quantize(op: O.InputQuantize, program: IntegerProgram, device: torch.device) -> Kernel:
    spec = program.tensors[op.inputs[0]]
    plan = plan_input(op, spec.shape[-1], spec.lo, spec.hi)
    if plan is not None:
        inner = _apply_plan(plan, op.lo, op.hi, device, 3, own=True)
        return lambda x: inner(x.clamp(op.pre_lo, op.pre_hi).to(torch.float32))
    multiplier = _channels(op.multiplier, device, torch.int64, 3)
    offset = _channels(op.offset, device, torch.int64, 3)
    shift = torch.tensor(op.shift, device=device)

    def kernel(x: Tensor) -> Tensor:
        scaled = x.to(torch.int64).clamp(op.pre_lo, op.pre_hi) * multiplier + offset
        return _round_shift(scaled, shift, op.rounding).clamp(op.lo, op.hi).to(torch.float32)

    return kernel


def _requantize(op: O.Requantize, program: IntegerProgram, device: torch.device) -> Kernel:
    spec = program.tensors[op.inputs[0]]
    plan = plan_requantize(op, spec.shape[-1], spec.lo, spec.hi)
    if plan is not None:
        own = program.readers[op.inputs[0]] == 1 and isinstance(program.producer(op.inputs[0]), O.Conv2d | O.Linear)
        return _apply_plan(plan, op.lo, op.hi, device, len(spec.shape), own)
    multiplier = _channels(op.multiplier, device, torch.int64, len(spec.shape))
    shift = _channels(op.shift, device, torch.int64, len(spec.shape))
    dtype = exact_dtype(max(abs(op.lo), abs(op.hi)))

    def kernel(x: Tensor) -> Tensor:
        scaled = x.to(torch.int64) * multiplier
        return _round_shift(scaled, shift, op.rounding).clamp(op.lo, op.hi).to(dtype)

    return kernel


def _conv2d(op: O.Conv2d, program: IntegerProgram, device: torch.device) -> Kernel:
    dtype = exact_dtype(partial_sum_bound(op, program.tensors[op.inputs[0]]))
    weight = torch.from_numpy(op.weight.astype(np.float64)).permute(0, 3, 1, 2).to(device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.from_numpy(op.bias.astype(np.float64)).to(device=device, dtype=dtype)

    def kernel(x: Tensor) -> Tensor:
        x, padding = split_padding(x.to(dtype), op.padding)
        return checked_conv2d(x, weight, bias, op.stride, padding, op.groups)

    return kernel


def _linear(op: O.Linear, program: IntegerProgram, device: torch.device) -> Kernel:
    dtype = exact_dtype(partial_sum_bound(op, program.tensors[op.inputs[0]]))
    weight = torch.from_numpy(op.weight.astype(np.float64)).to(device=device, dtype=dtype)
    bias = torch.from_numpy(op.bias.astype(np.float64)).to(device=device, dtype=dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


def _add(op: O.Add, program: IntegerProgram, device: torch.device) -> Kernel:
    bound = sum(max(abs(program.tensors[i].lo), abs(program.tensors[i].hi)) for i in op.inputs)
    dtype = exact_dtype(bound)
    return lambda a, b: (a.to(dtype) + b.to(dtype)).clamp_(op.lo, op.hi)


def _sum_pool(op: O.SumPool2d, program: IntegerProgram, device: torch.device) -> Kernel:
    dtype = exact_dtype(partial_sum_bound(op, program.tensors[op.inputs[0]]))
    whole = op.kernel == program.tensors[op.inputs[0]].shape[:2] and not any(op.padding)

    def kernel(x: Tensor) -> Tensor:
        if whole:
            return x.to(dtype).sum((2, 3), keepdim=True)
        top, bottom, left, right = op.padding
        padded = F.pad(x.to(dtype), (left, right, top, bottom))
        return F.avg_pool2d(padded, op.kernel, op.stride, divisor_override=1)

    return kernel


def _max_pool(op: O.MaxPool2d, program: IntegerProgram, device: torch.device) -> Kernel:
    top, bottom, left, right = op.padding
    lowest = float(program.tensors[op.inputs[0]].lo)
    return lambda x: F.max_pool2d(F.pad(x, (left, right, top, bottom), value=lowest), op.kernel, op.stride)


def _pad(op: O.Pad2d, program: IntegerProgram, device: torch.device) -> Kernel:
    top, bottom, left, right = op.padding

    def kernel(x: Tensor) -> Tensor:
        values = _channels(op.values, device, x.dtype, 3)
        return F.pad(x - values, (left, right, top, bottom)).add_(values)

    return kernel


def _pad_channels(op: O.PadChannels, program: IntegerProgram, device: torch.device) -> Kernel:
    return lambda x: F.pad(x, (*(0,) * (2 * (x.ndim - 2)), op.before, op.after))


def _slice(op: O.Slice, program: IntegerProgram, device: torch.device) -> Kernel:
    rows, columns, channels = (slice(*bounds) for bounds in (op.rows, op.columns, op.channels))
    return lambda x: x[:, channels, rows, columns]


def _flatten(op: O.Flatten, program: IntegerProgram, device: torch.device) -> Kernel:
    return lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1) if x.ndim == 4 else x


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
