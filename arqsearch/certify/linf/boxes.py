"""Interval bounds of the integer program in exact integers: QA-IBP certified accuracy.

A box of pixels becomes a box of every tensor. Monotone operations map both end points; conv and
linear use ``2*hi = W(l+u) + |W|(u-l) + 2b`` and its mirror image, all integers; the last linear layer
is fused with the specification ``z_y - z_j`` (Lechner et al., AAAI 2023). A verified image is robust
under the shipped program: for every integer image within ε grey levels the class stays the label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import RULES as RUN
from arqsearch.integer.backend_torch import exact_dtype, split_padding
from arqsearch.integer.probe import checked_conv2d
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import partial_sum_bound, prove

Bounds: TypeAlias = tuple[Tensor, Tensor]


def box(images: np.ndarray, epsilon: int) -> tuple[np.ndarray, np.ndarray]:
    """All images within `epsilon` grey levels (L∞), clipped to 0..255.

    :param images: uint8 ``(N, H, W, C)``.
    :param epsilon: whole grey levels.
    :returns: int16 lower and upper images.
    """
    wide = images.astype(np.int16)
    return np.clip(wide - epsilon, 0, 255).astype(np.int16), np.clip(wide + epsilon, 0, 255).astype(np.int16)


def is_robust(margins: Tensor, labels: Tensor) -> Tensor:
    """Whether lower bounds of ``z_y - z_j`` prove class y: at least 1 for j < y, at least 0 for j > y.

    :param margins: ``(N, K)``.
    :param labels: ``(N,)``.
    :returns: bool ``(N,)``.
    """
    classes = torch.arange(margins.shape[1])
    needed = (classes[None] < labels[:, None]).to(margins.dtype)
    return ((margins >= needed) | (classes[None] == labels[:, None])).all(1)


@dataclass(frozen=True)
class IntervalResult:
    """Outcome for a set of images at one ε.

    :param robust: bool ``(N,)``, proven.
    :param margins: int64 ``(N,)``, smallest lower bound of ``z_y - z_j`` over j != y.
    """

    robust: Tensor
    margins: Tensor


class IntervalBounds:
    """Compiles a program's interval transformers once.

    :param program: ranges are proven first.
    :param device: torch device.
    :param chunk: images per inner batch.
    """

    def __init__(self, program: IntegerProgram, device: str = "cpu", chunk: int = 128) -> None:
        prove(program)
        self.program = program
        self.device = torch.device(device)
        self.chunk = chunk
        last = program.ops[-1]
        self._fused = last if isinstance(last, O.Linear) and last.output == program.output else None
        body = program.ops[:-1] if self._fused else program.ops
        self._steps = [(op, RULES[type(op)](op, program, self.device)) for op in body]

    @torch.no_grad()
    def margins(self, lo: Any, hi: Any, labels: Any) -> Tensor:
        """Lower bounds of ``z_label - z_j`` over boxes of pixels.

        :param lo: integer lower pixels ``(N, H, W, C)``.
        :param hi: integer upper pixels.
        :param labels: ``(N,)``.
        :returns: int64 ``(N, K)``, 0 at the label.
        """
        low, high = torch.as_tensor(np.asarray(lo)), torch.as_tensor(np.asarray(hi))
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        parts = zip(
            torch.split(low, self.chunk), torch.split(high, self.chunk), torch.split(wanted, self.chunk), strict=True
        )
        return torch.cat([self._chunk(*part) for part in parts])

    def verify(self, images: np.ndarray, labels: np.ndarray, epsilon: int) -> IntervalResult:
        """Bound uint8 images ``(N, H, W, C)`` at `epsilon` grey levels."""
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        margins = self.margins(*box(images, epsilon), wanted)
        others = margins.clone()
        others[torch.arange(len(wanted)), wanted] = torch.iinfo(torch.int64).max
        return IntervalResult(is_robust(margins, wanted), others.min(1).values)

    def _chunk(self, lo: Tensor, hi: Tensor, labels: Tensor) -> Tensor:
        values: dict[int, Bounds] = {0: (self._enter(lo), self._enter(hi))}
        for op, step in self._steps:
            values[op.output] = step(*(values[i] for i in op.inputs))
        if self._fused is None:
            low, high = (x.double().cpu() for x in values[self.program.output])
            rows = torch.arange(len(labels))
            margins = low[rows, labels][:, None] - high
            margins[rows, labels] = 0
            return margins.to(torch.int64)
        return self._specification(self._fused, values[self._fused.inputs[0]], labels)

    def _enter(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device).permute(0, 3, 1, 2)

    def _specification(self, op: O.Linear, bounds: Bounds, labels: Tensor) -> Tensor:
        """``(w_y - w_j) x + b_y - b_j`` bounded in float64, where every sum is exact."""
        exact_dtype(4 * partial_sum_bound(op, self.program.tensors[op.inputs[0]]))
        low, high = (x.double() for x in bounds)
        weight = torch.as_tensor(op.weight.astype(np.float64), device=self.device)
        bias = torch.as_tensor(op.bias.astype(np.float64), device=self.device)
        where = labels.to(self.device)
        rows = weight[where][:, None, :] - weight[None]
        twice = torch.einsum("nki,ni->nk", rows, low + high) - torch.einsum("nki,ni->nk", rows.abs(), high - low)
        return (twice / 2 + bias[where][:, None] - bias[None]).to(torch.int64).cpu()


Transformer: TypeAlias = Callable[..., Bounds]


def _monotone(op: O.Op, program: IntegerProgram, device: torch.device) -> Transformer:
    """End points go to end points, by the execution rule itself."""
    kernel = RUN[type(op)](op, program, device)

    def step(*bounds: Bounds) -> Bounds:
        return kernel(*(b[0] for b in bounds)), kernel(*(b[1] for b in bounds))

    return step


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


RULES: O.RuleTable = {kind: _monotone for kind in O.OPS} | {O.Conv2d: _conv2d, O.Linear: _linear}
