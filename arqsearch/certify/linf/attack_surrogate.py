"""A differentiable copy of an integer program, for the search of counter-examples; it proves nothing.

Forward it rounds and clips as the program does (sums in float32: exact below 2**24, near above);
backward, rounding is the identity and a clip lets a small part of the gradient through, so that saturated codes can
still be moved. A last rounding and clip of the logits is left out, so that one sees how near two codes are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

#: Part of the gradient that passes a saturated clip.
LEAK = 0.1

Step: TypeAlias = Callable[..., Tensor]


class Surrogate:
    """Logits of images as a differentiable function.

    :param program: the integer program.
    :param device: torch device.
    """

    def __init__(self, program: IntegerProgram, device: str = "cpu") -> None:
        self.program, self.device = program, torch.device(device)
        last = program.producer(program.output)
        self._steps = []
        for op in program.ops:
            open_end = op is last and isinstance(op, O.Requantize)
            rule: Callable[..., Step] = _scaled if open_end else RULES[type(op)]
            self._steps.append((op, rule(op, program, self.device)))
        #: The logits' clip, half a code wider on both sides; None where the program has none.
        self.clip: tuple[float, float] | None = None
        if isinstance(last, O.Requantize):
            middle = 0.5 if last.rounding == "floor" else 0.0
            self.clip = last.lo - 0.5 + middle, last.hi + 0.5 + middle

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits as reals, ``(N, K)``, for float32 pixels ``(N, H, W, C)``."""
        values = {0: pixels.to(self.device).permute(0, 3, 1, 2)}
        for op, step in self._steps:
            values[op.output] = step(*(values[i] for i in op.inputs))
        return values[self.program.output].float()

    def clipped(self, logits: Tensor, leak: Tensor) -> Tensor:
        """Logits beyond the program's clip drawn near to it: `leak` ``(N, 1)`` of the excess remains."""
        if self.clip is None:
            return logits
        return leak * logits + (1 - leak) * logits.clamp(*self.clip)


def _straight(value: Tensor, rounding: O.Rounding, lo: int, hi: int) -> Tensor:
    """``clip(round(value))`` forward; identity inside the clip and `LEAK` outside of it backward."""
    fixed = value.detach()
    shifted = fixed if rounding == "floor" else fixed + 0.5
    rounded = fixed.round() if rounding == "half_even" else shifted.floor()
    path = LEAK * value + (1 - LEAK) * value.clamp(lo - 0.5, hi + 0.5)
    # float64 in: a multiplier's product is exact, so that ties fall as in the program.
    return rounded.clamp(lo, hi).float() + (path - path.detach()).float()


def _constants(values: np.ndarray, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One entry for each channel, or one for all, broadcast over NCHW or NC."""
    flat = torch.as_tensor(np.ravel(values).astype(np.float64), device=device)
    return flat.reshape((1, -1, 1, 1) if len(shape) == 3 else (1, -1))


def _scaled(op: O.Requantize, program: IntegerProgram, device: torch.device) -> Step:
    """A requantization without rounding and clip."""
    scale = _constants(np.ldexp(op.multiplier.astype(float), -op.shift), program.tensors[op.output].shape, device)
    return lambda x: x.double() * scale


def _requantize(op: O.Requantize, program: IntegerProgram, device: torch.device) -> Step:
    scaled = _scaled(op, program, device)
    return lambda x: _straight(scaled(x), op.rounding, op.lo, op.hi)


def _input_quantize(op: O.InputQuantize, program: IntegerProgram, device: torch.device) -> Step:
    shape = program.tensors[op.output].shape
    scale = _constants(np.ldexp(op.multiplier.astype(float), -op.shift), shape, device)
    offset = _constants(np.ldexp(op.offset.astype(float), -op.shift), shape, device)
    return lambda x: _straight(x.double().clamp(op.pre_lo, op.pre_hi) * scale + offset, op.rounding, op.lo, op.hi)


def _conv2d(op: O.Conv2d, program: IntegerProgram, device: torch.device) -> Step:
    weight = torch.as_tensor(op.weight.astype(np.float32), device=device).permute(0, 3, 1, 2).contiguous()
    bias = torch.as_tensor(op.bias.astype(np.float32), device=device)
    top, bottom, left, right = op.padding

    def step(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, op.stride, 0, 1, op.groups)

    return step


def _linear(op: O.Linear, program: IntegerProgram, device: torch.device) -> Step:
    weight = torch.as_tensor(op.weight.astype(np.float32), device=device)
    bias = torch.as_tensor(op.bias.astype(np.float32), device=device)
    return lambda x: F.linear(x, weight, bias)


def _add(op: O.Add, program: IntegerProgram, device: torch.device) -> Step:
    return lambda a, b: _straight(a + b, "half_up", op.lo, op.hi)


def _sum_pool(op: O.SumPool2d, program: IntegerProgram, device: torch.device) -> Step:
    top, bottom, left, right = op.padding
    return lambda x: F.avg_pool2d(F.pad(x, (left, right, top, bottom)), op.kernel, op.stride, divisor_override=1)


def _max_pool(op: O.MaxPool2d, program: IntegerProgram, device: torch.device) -> Step:
    top, bottom, left, right = op.padding
    least = float(O.INT32_MIN)
    return lambda x: F.max_pool2d(F.pad(x, (left, right, top, bottom), value=least), op.kernel, op.stride)


def _pad(op: O.Pad2d, program: IntegerProgram, device: torch.device) -> Step:
    top, bottom, left, right = op.padding
    values = torch.as_tensor(op.values.astype(np.float32), device=device).reshape(1, -1, 1, 1)
    return lambda x: F.pad(x - values, (left, right, top, bottom)) + values


def _pad_channels(op: O.PadChannels, program: IntegerProgram, device: torch.device) -> Step:
    def step(x: Tensor) -> Tensor:
        edges = (0, 0, 0, 0, op.before, op.after) if x.ndim == 4 else (op.before, op.after)
        return F.pad(x, edges)

    return step


def _slice(op: O.Slice, program: IntegerProgram, device: torch.device) -> Step:
    return lambda x: x[:, slice(*op.channels), slice(*op.rows), slice(*op.columns)]


def _flatten(op: O.Flatten, program: IntegerProgram, device: torch.device) -> Step:
    return lambda x: x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


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
