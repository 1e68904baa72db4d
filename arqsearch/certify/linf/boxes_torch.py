"""Interval transformers on torch, one for each operation: bounds of every tensor, taken apart tensor by tensor.

Slower than running an interval program, but it shows every tensor on the way and takes in what is known of it. Conv
and linear use ``2*hi = W(l+u) + |W|(u-l) + 2b`` and its mirror image, all integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.linf.domain import Interval
from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import FLOAT32_EXACT, FLOAT64_EXACT, exact_dtype, split_padding
from arqsearch.integer.backend_torch import RULES as RUN
from arqsearch.integer.probe import checked_conv2d
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import partial_sum_bound, prove

Bounds: TypeAlias = tuple[Tensor, Tensor]
Transformer: TypeAlias = Callable[..., Bounds]


class TensorBoxes:
    """Boxes of every tensor of a program, NCHW as the torch backend holds them.

    :param program: ranges are proven first.
    :param device: torch device.
    """

    def __init__(self, program: IntegerProgram, device: torch.device) -> None:
        prove(program)
        self.program, self.device = program, device
        self._steps = [(op, RULES[type(op)](op, program, device)) for op in program.ops]

    @torch.no_grad()
    def bound(
        self, lo: Tensor, hi: Tensor, limits: Sequence[Mapping[int, Interval]]
    ) -> tuple[dict[int, Interval], Tensor]:
        """Bounds of every tensor, and which boxes are empty because two of their bounds contradict each other.

        :param lo: integer lower pixels ``(N, H, W, C)``.
        :param hi: integer upper pixels.
        :param limits: what is known besides, by tensor, int64 ``(N, *shape)``: intersected as soon as the tensor is
            bounded.
        :returns: int64 ``(N, *shape)`` by tensor index; bool ``(N,)``. Bounds of an empty box mean nothing.
        """
        empty = torch.zeros(len(lo), dtype=torch.bool, device=self.device)
        values: dict[int, Bounds] = {}
        for tensor, step in [(0, None), *((op.output, (op, transform)) for op, transform in self._steps)]:
            if step is None:
                low, high = _inward(lo, self.device, torch.float32), _inward(hi, self.device, torch.float32)
            else:
                op, transform = step
                low, high = transform(*(values[source] for source in op.inputs))
            for known in limits:
                if tensor in known:
                    least, most = (_inward(x, self.device, low.dtype) for x in known[tensor])
                    low, high = torch.maximum(low, least), torch.minimum(high, most)
            crossed = low > high
            empty |= crossed.flatten(1).any(1)
            values[tensor] = low, torch.where(crossed, low, high)
        return {tensor: (_outward(low), _outward(high)) for tensor, (low, high) in values.items()}, empty.cpu()


def _inward(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As the backend holds it. Values of float32 tensors are proven to be exact; a limit beyond them limits nothing."""
    exact = FLOAT32_EXACT if dtype == torch.float32 else FLOAT64_EXACT
    x = x.to(device).clamp(-exact, exact).to(dtype) if x.dtype == torch.int64 else x.to(device=device, dtype=dtype)
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _outward(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    return x.to(device="cpu", dtype=torch.int64)


def _monotone(op: O.Op, program: IntegerProgram, device: torch.device) -> Transformer:
    """End points go to end points, by the execution rule itself."""
    kernel = RUN[type(op)](op, program, device)

    def step(*bounds: Bounds) -> Bounds:
        return kernel(*(b[0] for b in bounds)), kernel(*(b[1] for b in bounds))

    return step


def _requantize(op: O.Requantize, program: IntegerProgram, device: torch.device) -> Transformer:
    """As `_monotone`; the execution rule may write over its input, which others still want to see here."""
    step = _monotone(op, program, device)
    return lambda bounds: step((bounds[0].clone(), bounds[1].clone()))


def _input_quantize(op: O.InputQuantize, program: IntegerProgram, device: torch.device) -> Transformer:
    """A negative multiplier turns the ends round."""
    step = _monotone(op, program, device)

    def ordered(bounds: Bounds) -> Bounds:
        one, other = step(bounds)
        return torch.minimum(one, other), torch.maximum(one, other)

    return ordered


def _conv2d(op: O.Conv2d, program: IntegerProgram, device: torch.device) -> Transformer:
    dtype = exact_dtype(4 * partial_sum_bound(op, program.tensors[op.inputs[0]]))
    weight = (
        torch.as_tensor(op.weight.astype(np.float64)).permute(0, 3, 1, 2).to(device=device, dtype=dtype).contiguous()
    )
    bias = torch.as_tensor(op.bias.astype(np.float64)).to(device=device, dtype=dtype)
    zero = torch.zeros_like(bias)

    def convolve(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x, padding = split_padding(x, op.padding)
        return checked_conv2d(x, w, b, op.stride, padding, op.groups)

    def step(bounds: Bounds) -> Bounds:
        low, high = (x.to(dtype) for x in bounds)
        centre = convolve(low + high, weight, 2 * bias)
        radius = convolve(high - low, weight.abs(), zero)
        return (centre - radius) / 2, (centre + radius) / 2

    return step


def _linear(op: O.Linear, program: IntegerProgram, device: torch.device) -> Transformer:
    dtype = exact_dtype(4 * partial_sum_bound(op, program.tensors[op.inputs[0]]))
    weight = torch.as_tensor(op.weight.astype(np.float64)).to(device=device, dtype=dtype)
    bias = torch.as_tensor(op.bias.astype(np.float64)).to(device=device, dtype=dtype)

    def step(bounds: Bounds) -> Bounds:
        low, high = (x.to(dtype) for x in bounds)
        centre = torch.nn.functional.linear(low + high, weight, 2 * bias)
        radius = torch.nn.functional.linear(high - low, weight.abs())
        return (centre - radius) / 2, (centre + radius) / 2

    return step


RULES: O.RuleTable = {kind: _monotone for kind in O.OPS} | {
    O.InputQuantize: _input_quantize,
    O.Requantize: _requantize,
    O.Conv2d: _conv2d,
    O.Linear: _linear,
}
