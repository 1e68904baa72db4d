"""Learned-step quantizers with one step size for each bit-width.

Gradients follow LSQ (Esser et al., ICLR 2020): straight-through inside the range, and a step-size
gradient scaled by 1/sqrt(values * largest code). Weight codes are symmetric, activations unsigned
after a ReLU and signed symmetric otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from arqsearch.integer.ops import Rounding
from arqsearch.quantize.bitwidths import ALL_BITS, MIN_BITS

#: Steps are kept above this, so that a dead channel has a finite scale.
MIN_STEP = 1e-8
#: Smallest step of a channel, relative to the layer's largest.
DEAD_CHANNEL = 2.0**-12
#: Added before flooring. A value that is a code in the program (0 above all) is one only up to float rounding here;
#: without the nudge, floor would put half of them one code too low.
ROUNDING_OFFSET: dict[Rounding, float] = {"half_up": 0.5, "floor": 2.0**-14}


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code: ±(2^(b-1)-1) signed, 0..2^b-1 unsigned."""
    if signed:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def round_real(x: Tensor, rounding: Rounding) -> Tensor:
    """Round reals as the integer program rounds, without a gradient."""
    if rounding == "half_even":
        return x.round()
    return torch.floor(x + ROUNDING_OFFSET[rounding])


class _FakeQuantize(torch.autograd.Function):
    """``clip(round(x / s), lo, hi) * s`` with LSQ gradients; `s` is a scalar or per channel (dimension 0).

    With g the gradient of the result and g' = g inside the range, 0 outside, LSQ's step gradient
    ``sum g * (code - [inside] x/s)`` equals ``(sum g * result - sum g' * x) / s``: two products of
    tensors that are kept anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, scale: float, rounding: Rounding) -> Tensor:
        codes = x / step
        codes = codes.round_() if rounding == "half_even" else codes.add_(ROUNDING_OFFSET[rounding]).floor_()
        result = codes.clamp_(lo, hi).mul_(step)
        ctx.save_for_backward(x, result, step)
        ctx.lo, ctx.hi, ctx.scale = lo, hi, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad,) = grads
        x, result, step = ctx.saved_tensors
        if step.ndim == 0:
            low, high = ctx.lo * step.item(), ctx.hi * step.item()
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, low, high)
            total = _dot(grad, result) - _dot(grad_x, x)
        else:
            grad_x = grad * ((x >= ctx.lo * step) & (x <= ctx.hi * step))
            total = (grad * result - grad_x * x).flatten(1).sum(1).reshape(step.shape)
        return grad_x, total / step * ctx.scale, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors, without a temporary where both lie in memory the same way."""
    if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def fake_quantize(x: Tensor, step: Tensor, lo: int, hi: int, rounding: Rounding = "half_even") -> Tensor:
    """Quantize to codes lo..hi and back, with learned-step gradients.

    :param x: any shape; with a per-channel step the channel is dimension 0.
    :param step: scalar, or shape ``(C, 1, ...)`` with the rank of `x`.
    """
    values = x.numel() / (step.numel() if step.ndim else max(x.shape[0], 1))
    scale = 1.0 / math.sqrt(max(values * max(hi, 1), 1.0))
    result: Tensor = _FakeQuantize.apply(x, step, lo, hi, scale, rounding)  # type: ignore[no-untyped-call]
    return result


def snap_power_of_two(step: Tensor, unit: float = 1.0) -> Tensor:
    """Nearest ``unit * 2**k``, with the gradient of the identity."""
    snapped = unit * torch.exp2(torch.log2(step.detach() / unit).round())
    return snapped + (step - step.detach())


def best_steps(values: Tensor, lo: int, hi: int, candidates: int = 24) -> Tensor:
    """Step of least squared error for each row.

    :param values: ``(rows, n)``.
    :returns: ``(rows,)``, at least :data:`MIN_STEP`.
    """
    peak = torch.maximum(
        values.amax(1) / max(hi, 1), values.amin(1) / min(lo, -1) if lo else values.amax(1) / max(hi, 1)
    )
    peak = peak.clamp_min(MIN_STEP)
    best, chosen = torch.full_like(peak, math.inf), peak.clone()
    for index in range(candidates):
        step = peak * (1.0 - 0.92 * index / candidates)
        codes = (values / step[:, None]).round_().clamp_(lo, hi)
        error = (codes.mul_(step[:, None]) - values).square_().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, step, chosen)
    return chosen


class StepTable(nn.Module):
    """Learned steps, one row for each of 2..8 bits.

    :param channels: entries in a row (1 for a tensor scale).
    :param signed: whether codes are symmetric.
    :param power_of_two: snap every step to ``unit * 2**k``.
    """

    def __init__(self, channels: int, signed: bool, power_of_two: bool) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.ones(len(ALL_BITS), channels))
        self.signed = signed
        self.power_of_two = power_of_two
        self.unit = 1.0

    def step(self, bits: int) -> Tensor:
        """Step sizes at `bits`, shape ``(channels,)``."""
        row = self.steps[bits - MIN_BITS].clamp_min(MIN_STEP)
        return snap_power_of_two(row, self.unit) if self.power_of_two else row

    def fit(self, values: Tensor) -> None:
        """Set every row to the least-squares steps of ``(channels, n)`` values."""
        with torch.no_grad():
            for bits in ALL_BITS:
                steps = best_steps(values, *code_range(bits, self.signed))
                # A dead channel's own scale would blow its bias up beyond int32 on the accumulators' grid.
                self.steps[bits - MIN_BITS] = steps.clamp_min(DEAD_CHANNEL * float(steps.max()))


class ActivationQuantizer(StepTable):
    """Quantizer of one tensor of activations.

    :param signed: whether the tensor can be negative.
    :param power_of_two: snap the step to a power of two.
    :param rounding: how the integer program will round here.
    """

    def __init__(self, signed: bool, power_of_two: bool, rounding: Rounding) -> None:
        super().__init__(1, signed, power_of_two)
        self.rounding: Rounding = rounding

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantize at `bits`."""
        return fake_quantize(x, self.step(bits).squeeze(0), *code_range(bits, self.signed), self.rounding)

    def add(self, left: Tensor, right: Tensor, bits: int, lo: float, hi: float) -> Tensor:
        """Sum of two operands, each rounded to this scale first, as the integer program does.

        :param lo: lower clip in real units (0 after ReLU).
        :param hi: upper clip in real units.
        """
        step = self.step(bits).squeeze(0)
        low, high = code_range(bits, self.signed)
        # Straight through the two roundings; the clip and the step keep their gradients.
        a = left + (round_real(left / step, self.rounding) * step - left).detach()
        b = right + (round_real(right / step, self.rounding) * step - right).detach()
        return fake_quantize((a + b).clamp(lo, hi), step, low, high)


class LogAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) on the logarithm of positive parameters: steps stay positive.

    Channels differ in scale by orders of magnitude; a relative update moves each at the same pace, where
    plain gradient steps would push small ones through zero.

    :param params: step sizes.
    :param lr: largest relative change in one update, about.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-10})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["count"] = torch.zeros(())
                    state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                gradient = parameter.grad * parameter
                state["count"] += 1
                state["mean"].lerp_(gradient, 1 - first)
                state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                count = float(state["count"])
                mean = state["mean"] / (1 - first**count)
                root = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
                parameter.mul_(torch.exp(-group["lr"] * mean / root))
