"""Backward substitution: one rule for each operation.

A `Form` holds R rows, each ``sum_t <coefficient_t, tensor_t> + constant``. A rule moves the coefficients of its
operation's output to its inputs so that the new form bounds the old one from below on every image of the row's domain.
Affine operations are substituted exactly; staircases and maxima by lines, lower ones where the coefficient is positive
and upper ones where it is negative. Whatever float64 rounding can have added is summed in `Form.error`.
Tensors are NCHW here, rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.certify.linf.linear.maximum import Maximum, WindowLines
from arqsearch.certify.linf.linear.rounding import gamma
from arqsearch.certify.linf.linear.staircase import Lines, staircase
from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import RULES as RUN
from arqsearch.integer.program import IntegerProgram

Bounds = tuple[Tensor, Tensor]


@dataclass
class Form:
    """R linear forms over the program's tensors.

    :param coefficients: by tensor index, ``(R, *NCHW shape)``.
    :param constant: ``(R,)``.
    :param error: ``(R,)`` bound on all rounding so far, or None where nothing is claimed (during optimisation).
    """

    coefficients: dict[int, Tensor]
    constant: Tensor
    error: Tensor | None

    def add(self, constant: Tensor) -> None:
        """Add to the constants."""
        self.constant = self.constant + constant
        self.charge(self.constant.abs() * gamma(2))

    def charge(self, error: Tensor) -> None:
        """Account for rounding."""
        if self.error is not None:
            self.error = self.error + error

    def move(self, tensor: int, coefficient: Tensor, size: float) -> None:
        """Add coefficients to a tensor whose values are at most `size` in magnitude."""
        before = self.coefficients.get(tensor)
        if before is not None:
            coefficient = before + coefficient
            if self.error is not None:
                self.charge(total(coefficient.abs()) * (size * gamma(2)))
        self.coefficients[tensor] = coefficient

    def relax(self, tensor: int, extra: Multipliers, size: float) -> None:
        """Take in the limits of a tensor whose values are at most `size` in magnitude."""
        self.move(tensor, extra.coefficient, size)
        self.add(-extra.paid)
        self.charge(extra.size * gamma(2 * extra.coefficient[0].numel()))


def total(x: Tensor) -> Tensor:
    """Sum over everything but the rows."""
    return x.flatten(1).sum(1)


def inner(rows: Tensor, values: Tensor) -> Tensor:
    """Inner product of each row with its own values, or with the only ones."""
    if len(values) == 1:
        return rows.flatten(1) @ values.flatten()
    return total(rows * values)


@dataclass(frozen=True)
class Slopes:
    """The lines of one staircase as chosen for R rows, or one row for all: middle and half width of the two lines.

    The lower line is ``slope - slope_half`` and ``height - height_half``, the upper one their sum.

    :param mass: see :class:`~arqsearch.certify.linf.linear.staircase.Lines`; None during the search.
    """

    slope: Tensor
    slope_half: Tensor
    height: Tensor
    height_half: Tensor
    mass: Tensor | None

    @classmethod
    def between(cls, slopes: tuple[Tensor, Tensor], heights: tuple[Tensor, Tensor], mass: Tensor | None) -> Slopes:
        """From the lower and the upper line."""
        return cls(
            (slopes[0] + slopes[1]) / 2,
            (slopes[1] - slopes[0]) / 2,
            (heights[0] + heights[1]) / 2,
            (heights[1] - heights[0]) / 2,
            mass,
        )


@dataclass(frozen=True)
class Multipliers:
    """Lagrangian terms for known limits ``lo <= x <= hi`` of R rows: coefficients to add and the constant to pay.

    :param coefficient: ``(R, *shape)``, the multipliers of the upper limits less those of the lower ones.
    :param paid: ``(R,)``, ``sum upper * hi - lower * lo``.
    :param size: ``(R,)``, sum of the absolute values of all terms of `paid`, for its rounding.
    """

    coefficient: Tensor
    paid: Tensor
    size: Tensor


class Rule(Protocol):
    """One operation, compiled."""

    #: Whether the operation is replaced by lines, which depend on bounds.
    nonlinear: bool

    def relax(self, bounds: Bounds) -> Any:
        """Lines on the domains, from bounds of what the non-linearity acts on."""
        ...

    def back(self, form: Form, coefficient: Tensor, chosen: Any, extra: Multipliers | None) -> None:
        """Substitute the operation: move `coefficient`, those of its output, to its inputs."""
        ...


def magnitude(program: IntegerProgram, tensor: int) -> float:
    """Largest absolute value a tensor can hold."""
    spec = program.tensors[tensor]
    return float(max(abs(spec.lo), abs(spec.hi)))


class _Affine:
    """An affine operation ``A x + b``: its transpose, its constant and what it does to magnitudes.

    :param transpose: coefficients of the output ``(R, *out)`` to those of the input.
    :param constant: b, broadcastable against the output; None is 0.
    :param reach: ``|A| |x| + |b|`` for the largest x, broadcastable against the output; None where nothing is computed
        and values only move.
    :param terms: products in one coefficient of the result.
    """

    nonlinear = False

    def __init__(
        self, op: O.Op, program: IntegerProgram, transpose: Callable[[Tensor], Tensor],
        constant: Tensor | None = None, reach: Tensor | None = None, terms: int = 1,
    ) -> None:  # fmt: skip
        self.source, self.size = op.inputs[0], magnitude(program, op.inputs[0])
        self.transpose, self.constant, self.reach = transpose, constant, reach
        count = int(np.prod(program.tensors[op.output].shape))
        self.gamma = gamma(terms + count)
        self._narrow: Tensor | None = None

    def relax(self, bounds: Bounds) -> None:
        return None

    def back(self, form: Form, coefficient: Tensor, chosen: Any, extra: Multipliers | None) -> None:
        form.move(self.source, self.transpose(coefficient), self.size)
        if self.constant is not None:
            form.add(total(coefficient * self.constant.to(coefficient.dtype)))
        if self.reach is not None and form.error is not None:
            form.charge(total(coefficient.abs() * self.reach) * self.gamma)


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(values), dtype=np.float64)).to(device)


class _Typed:
    """A constant in the float type that is asked for, converted once for each type."""

    def __init__(self, value: Tensor) -> None:
        self._values = {value.dtype: value}

    def like(self, other: Tensor) -> Tensor:
        if other.dtype not in self._values:
            self._values[other.dtype] = next(iter(self._values.values())).to(other.dtype)
        return self._values[other.dtype]


def _linear(op: O.Linear, program: IntegerProgram, device: torch.device) -> _Affine:
    weight = _tensor(op.weight, device)
    bias, typed = _tensor(op.bias, device)[None], _Typed(weight)
    reach = weight.abs().sum(1)[None] * magnitude(program, op.inputs[0]) + bias.abs()
    return _Affine(op, program, lambda x: x @ typed.like(x), bias, reach, weight.shape[0])


def _conv2d(op: O.Conv2d, program: IntegerProgram, device: torch.device) -> _Affine:
    out, rows, columns, inner = op.weight.shape
    groups, shape = op.groups, program.tensors[op.inputs[0]].shape
    flat = _tensor(op.weight, device).permute(0, 3, 1, 2).reshape(groups, out // groups, inner * rows * columns)
    typed = _Typed(flat.transpose(1, 2).contiguous()[None])
    fold = _fold(shape, (rows, columns), op.stride, op.padding)
    bias = _tensor(op.bias, device).reshape(1, -1, 1, 1)
    reach = flat.abs().sum(2).reshape(1, -1, 1, 1) * magnitude(program, op.inputs[0]) + bias.abs()

    def transpose(x: Tensor) -> Tensor:
        # A matrix product and a plain sum: no transform whose rounding errors are larger.
        patches = typed.like(x) @ x.reshape(x.shape[0], groups, out // groups, -1)
        return fold(patches.reshape(x.shape[0], groups * inner * rows * columns, -1))

    return _Affine(op, program, transpose, bias, reach, out // groups * rows * columns)


def _fold(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int], padding: O.Padding
) -> Callable[[Tensor], Tensor]:
    """Sum of windows ``(R, C*kh*kw, positions)`` into an image ``(R, C, H, W)``, padding cut off."""
    top, bottom, left, right = padding
    height, width = shape[0], shape[1]

    def fold(patches: Tensor) -> Tensor:
        canvas = F.fold(patches, (height + top + bottom, width + left + right), kernel, stride=stride)
        return canvas[:, :, top : top + height, left : left + width]

    return fold


def _sum_pool(op: O.SumPool2d, program: IntegerProgram, device: torch.device) -> _Affine:
    shape = program.tensors[op.inputs[0]].shape
    window = op.kernel[0] * op.kernel[1]
    fold = _fold(shape, op.kernel, op.stride, op.padding)
    reach = torch.full((1, 1, 1, 1), window * magnitude(program, op.inputs[0]), dtype=torch.float64, device=device)

    def transpose(x: Tensor) -> Tensor:
        patches = x.flatten(2)[:, :, None].expand(-1, -1, window, -1)
        return fold(patches.reshape(x.shape[0], x.shape[1] * window, -1))

    return _Affine(op, program, transpose, None, reach, window)


def _pad(op: O.Pad2d, program: IntegerProgram, device: torch.device) -> _Affine:
    top, bottom, left, right = op.padding
    height, width, channels = program.tensors[op.inputs[0]].shape
    values = _tensor(np.broadcast_to(op.values, (channels,)), device).reshape(1, -1, 1, 1)
    outside = torch.ones(1, 1, height + top + bottom, width + left + right, dtype=torch.float64, device=device)
    outside[:, :, top : top + height, left : left + width] = 0
    constant = values * outside
    return _Affine(op, program, lambda x: x[:, :, top : top + height, left : left + width], constant, constant.abs())


def _pad_channels(op: O.PadChannels, program: IntegerProgram, device: torch.device) -> _Affine:
    channels = program.tensors[op.inputs[0]].shape[-1]
    return _Affine(op, program, lambda x: x[:, op.before : op.before + channels])


def _slice(op: O.Slice, program: IntegerProgram, device: torch.device) -> _Affine:
    height, width, channels = program.tensors[op.inputs[0]].shape
    rows, columns, which = (slice(*bounds) for bounds in (op.rows, op.columns, op.channels))

    def transpose(x: Tensor) -> Tensor:
        result = x.new_zeros(x.shape[0], channels, height, width)
        result[:, which, rows, columns] = x
        return result

    return _Affine(op, program, transpose)


def _flatten(op: O.Flatten, program: IntegerProgram, device: torch.device) -> _Affine:
    shape = program.tensors[op.inputs[0]].shape

    def transpose(x: Tensor) -> Tensor:
        if len(shape) == 1:
            return x
        return x.reshape(x.shape[0], *shape).permute(0, 3, 1, 2)

    return _Affine(op, program, transpose)


class StaircaseRule:
    """Requantize, the input quantizer, and the sum with a clip: lines of one staircase of the (summed) inputs."""

    nonlinear = True

    def __init__(self, op: O.Op, program: IntegerProgram, device: torch.device) -> None:
        ranges = [(program.tensors[i].lo, program.tensors[i].hi) for i in op.inputs]
        self.function = staircase(op, ranges, device)
        self.sources = op.inputs
        self.sizes = [magnitude(program, i) for i in op.inputs]
        self.gamma = gamma(2 * int(np.prod(program.tensors[op.output].shape)))
        self._run: Callable[[Tensor], Tensor]
        if isinstance(op, O.Add):
            lo, hi = op.lo, op.hi
            self._run = lambda x: x.clamp(lo, hi)
        else:
            kernel = RUN[type(op)](op, program, device)
            self._run = lambda x: kernel(x.clone())  # Kernels may work in place.

    def at(self, x: Tensor) -> Tensor:
        """The staircase on float64 integers (of an Add: of the sum)."""
        return self._run(x).double()

    def relax(self, bounds: Bounds) -> Lines:
        return self.function.lines(*bounds, self.at)

    def back(self, form: Form, coefficient: Tensor, chosen: Slopes, extra: Multipliers | None) -> None:
        size = coefficient.abs()
        below = coefficient * chosen.slope - size * chosen.slope_half
        form.add(inner(coefficient, chosen.height) - inner(size, chosen.height_half))
        if form.error is not None:
            assert chosen.mass is not None
            form.charge(inner(size, chosen.mass) * self.gamma)
        if extra is not None:
            below = below + extra.coefficient
            form.add(-extra.paid)
            form.charge(extra.size * self.gamma + total(below.abs()) * (sum(self.sizes) * gamma(2)))
        for source, most in zip(self.sources, self.sizes, strict=True):
            form.move(source, below, most)


class MaxPoolRule:
    """The maximum over windows: below by one of its elements, above by a sum over those that can win."""

    nonlinear = True

    def __init__(self, op: O.MaxPool2d, program: IntegerProgram, device: torch.device) -> None:
        self.function = Maximum(op, program.tensors[op.inputs[0]].shape)
        self.source, self.size = op.inputs[0], magnitude(program, op.inputs[0])
        window = op.kernel[0] * op.kernel[1]
        shape = program.tensors[op.inputs[0]].shape
        self._fold = _fold(shape, op.kernel, op.stride, op.padding)
        self.gamma = gamma(2 * window + int(np.prod(program.tensors[op.output].shape)))

    def relax(self, bounds: Bounds) -> WindowLines:
        return self.function.lines(*bounds)

    def back(self, form: Form, coefficient: Tensor, chosen: WindowLines, extra: Multipliers | None) -> None:
        positive, negative = coefficient.clamp(min=0).flatten(2), coefficient.clamp(max=0).flatten(2)
        patches = positive[:, :, None] * chosen.lower + negative[:, :, None] * chosen.upper
        form.add((negative * chosen.height).sum((1, 2)))
        if form.error is not None:
            form.charge(((positive - negative) * chosen.mass).sum((1, 2)) * self.gamma)
        form.move(self.source, self._fold(patches.flatten(1, 2)), self.size)


RULES: O.RuleTable = {
    O.InputQuantize: StaircaseRule,
    O.Conv2d: _conv2d,
    O.Linear: _linear,
    O.Requantize: StaircaseRule,
    O.Add: StaircaseRule,
    O.SumPool2d: _sum_pool,
    O.MaxPool2d: MaxPoolRule,
    O.Pad2d: _pad,
    O.PadChannels: _pad_channels,
    O.Slice: _slice,
    O.Flatten: _flatten,
}
