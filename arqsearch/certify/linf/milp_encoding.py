"""An integer program as a mixed-integer linear model: rows and columns for HiGHS.

Every tensor is an affine expression of the model's columns. Columns are made only where an operation is not affine:
pixels (or input codes), rounded codes, clip phases, the winner of a maximum. The encoding of rounding by two
inequalities with an integer column is that of QVIP (Zhang et al., ASE 2022).

Rows never touch an integer point. All values of the arithmetic are integers, so a true row ``expr >= t`` may stand as
``expr >= t - 1/2``: points of the program satisfy every row with a distance of `MARGIN` or more in units of the row's
integer expression, which lies far above the solver's feasibility tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from arqsearch.certify.linf.milp_maps import linear_map, moved, windows
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.requantize import input_quantize

Int64: TypeAlias = NDArray[np.int64]
#: Proven inclusive bounds of a tensor, ``(*shape)``.
Range: TypeAlias = tuple[Int64, Int64]

#: Least distance of a row from the integer points that it lets through, in units of the row's integer expression.
MARGIN = 1e-3
#: Elements that need one binary for each step (rounding to even, a step no line can follow) may have so many steps.
MAX_UNARY = 256


@dataclass(frozen=True)
class Affine:
    """``matrix @ columns + constant``, one row for each element of a tensor in memory order.

    :param matrix: CSR ``(elements, columns so far)``, whole coefficients.
    :param constant: int64 ``(elements,)``.
    """

    matrix: Any
    constant: Int64

    def __getitem__(self, rows: Any) -> Affine:
        return Affine(self.matrix[rows], self.constant[rows])


@dataclass
class Model:
    """Columns and rows, appended one by one."""

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def column(self, low: float, high: float, whole: bool = True) -> int:
        """Append a column; gives its index."""
        self.low.append(float(low))
        self.high.append(float(high))
        self.whole.append(whole)
        return len(self.low) - 1

    def row(self, terms: Any, least: float = -np.inf, most: float = np.inf) -> None:
        """Append ``least <= terms <= most``.

        :param terms: CSR ``(1, columns so far)``, or a mapping from column to coefficient.
        """
        if isinstance(terms, Mapping):
            columns, values = list(terms), list(terms.values())
            terms = sparse.csr_array((values, ([0] * len(columns), columns)), shape=(1, len(self.low)), dtype=float)
        self.blocks.append(terms)
        self.least.append(least)
        self.most.append(most)

    def matrix(self) -> Any:
        """All rows, CSR ``(rows, columns)``."""
        return sparse.vstack([self.widened(block) for block in self.blocks], format="csr")

    def widened(self, matrix: Any) -> Any:
        """The same matrix with all columns made so far."""
        if matrix.shape[1] == len(self.low):
            return matrix
        wide = matrix.tocsr(copy=True)
        wide.resize(matrix.shape[0], len(self.low))
        return wide

    def combined(self, expression: Affine, factor: float, terms: Mapping[int, float]) -> Any:
        """``factor * expression + terms`` without the constant, as a row; `expression` has one element."""
        base = self.widened(expression.matrix) * factor
        columns, values = list(terms), list(terms.values())
        more = sparse.csr_array((values, ([0] * len(columns), columns)), shape=base.shape, dtype=float)
        return sparse.csr_array(base + more)


class Encoder:
    """Encodes one program on one set of images.

    :param program: the integer program; only ancestors of its output matter.
    :param ranges: proven bounds of tensors by index; 0 (the pixels) and every tensor read by a non-affine operation
        or written by one must be there.
    :param whole_pixels: pixels are integers; otherwise reals, which is a relaxation: a proof stays a proof, a point
        must be rounded and may turn out not to be a counter-example.
    """

    def __init__(self, program: IntegerProgram, ranges: Mapping[int, Range], whole_pixels: bool) -> None:
        self.program, self.ranges, self.whole_pixels = program, ranges, whole_pixels
        self.model = Model()
        self.exact = True
        self._pixels: dict[int, int] = {}
        self._decode: list[tuple[int, int, Int64, Int64]] = []
        self.tensors: dict[int, Affine] = {}
        if program.readers[0] > 1 or not any(isinstance(op, O.InputQuantize) for op in program.ops):
            self.tensors[0] = self._enter()
        for op in program.ops:
            self.tensors[op.output] = RULES[type(op)](self, op)

    def constant(self, values: Int64) -> Affine:
        """A tensor without columns."""
        flat = np.asarray(values, dtype=np.int64).reshape(-1)
        return Affine(sparse.csr_array((len(flat), len(self.model.low)), dtype=float), flat)

    def stacked(self, columns: list[int | None], scale: Int64, constant: Int64) -> Affine:
        """One element for each entry: ``scale * column + constant``, or the constant where there is no column."""
        rows = [row for row, column in enumerate(columns) if column is not None]
        places = [column for column in columns if column is not None]
        shape = len(columns), len(self.model.low)
        matrix = sparse.csr_array((scale[rows].astype(float), (rows, places)), shape=shape)
        return Affine(matrix, constant)

    def source(self, tensor: int) -> Affine:
        """An earlier tensor over all columns made so far."""
        found = self.tensors[tensor]
        return Affine(self.model.widened(found.matrix), found.constant)

    def range(self, tensor: int) -> Range:
        """Bounds of a tensor, flat."""
        low, high = self.ranges[tensor]
        return np.asarray(low, dtype=np.int64).reshape(-1), np.asarray(high, dtype=np.int64).reshape(-1)

    def _enter(self) -> Affine:
        low, high = self.range(0)
        columns: list[int | None] = [
            None if a == b else self.model.column(a, b, self.whole_pixels)
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        for place, column in enumerate(columns):
            if column is not None:
                self._decode.append((place, column, np.empty(0, np.int64), np.empty(0, np.int64)))
        return self.stacked(columns, np.ones_like(low), np.where(low == high, low, 0))

    def quantized(self, op: O.InputQuantize) -> Affine:
        """Codes of pixels: columns count equal steps; unequal steps have a binary each."""
        low, high = self.range(0)
        channels = self.program.tensors[0].shape[-1]
        matrix, constants = {}, np.zeros_like(low)
        shared = self.tensors.get(0)
        for place, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            pixels = np.arange(a, b + 1, dtype=np.int64)
            channel = place % channels
            codes = _codes(op, pixels, channel)
            constants[place] = codes[0]
            jumps = np.diff(codes)
            at = np.flatnonzero(jumps)
            if not len(at):
                continue
            firsts, sizes = pixels[at + 1], jumps[at]
            if shared is None and len(set(sizes.tolist())) == 1:
                column = self.model.column(0, len(at), self.whole_pixels)
                matrix[place] = [(column, float(sizes[0]))]
                self._decode.append((place, column, np.array([a]), firsts))
                continue
            steps = [self.model.column(0, 1) for _ in at]
            self._ordered(steps)
            matrix[place] = list(zip(steps, sizes.astype(float).tolist(), strict=True))
            if shared is None:
                count = self.model.column(0, len(at))
                self.model.row({count: 1.0, **{step: -1.0 for step in steps}}, 0.0, 0.0)
                self._decode.append((place, count, np.array([a]), firsts))
            else:
                self._follow(shared[[place]], steps, firsts, a, b)
        entries = [(row, column, value) for row, listed in matrix.items() for column, value in listed]
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        shape = len(low), len(self.model.low)
        return Affine(sparse.csr_array((values, (rows, columns)), shape=shape, dtype=float), constants)

    def _ordered(self, steps: list[int]) -> None:
        for earlier, later in itertools.pairwise(steps):
            self.model.row({earlier: 1.0, later: -1.0}, 0.0)

    def _follow(self, expression: Affine, steps: list[int], firsts: Int64, low: int, high: int) -> None:
        """Binary i says whether the expression is at least ``firsts[i]``; it lies in low..high."""
        base = int(expression.constant[0])
        below = np.diff(np.concatenate([[low], firsts])).astype(float)
        above = np.diff(np.concatenate([firsts, [high + 1]])).astype(float)
        lower = self.model.combined(expression, 1.0, dict(zip(steps, (-below).tolist(), strict=True)))
        self.model.row(lower, low - base - 0.5)
        upper = self.model.combined(expression, 1.0, dict(zip(steps, (-above).tolist(), strict=True)))
        self.model.row(upper, most=float(firsts[0]) - 1 - base + 0.5)

    def staircase(self, op: O.Op, expression: Affine, bounds: Range, steps: _Steps) -> Affine:
        """``clip(round(..))`` of every element, between the codes that are proven possible."""
        least, most = self.range(op.output)
        columns: list[int | None] = []
        units, constants = np.ones_like(least), least.copy()
        for element in range(len(least)):
            a, b = int(least[element]), int(most[element])
            if a >= b:
                columns.append(None)
                self._pin(expression[[element]], a, bounds, element, steps)
                continue
            column = self.model.column(0, b - a)
            columns.append(column)
            span = int(bounds[0][element]), int(bounds[1][element])
            self._step(expression[[element]], column, a, b, span, steps, element)
        return self.stacked(columns, units, constants)

    def _pin(self, expression: Affine, code: int, bounds: Range, element: int, steps: _Steps) -> None:
        """A fixed code restricts its accumulator, where the accumulator's bounds do not say so already."""
        lo, hi = steps.clip
        base = int(expression.constant[0])
        if code > lo:
            first = steps.first(element, code)
            if int(bounds[0][element]) < first:
                self.model.row(expression.matrix, first - base - 0.5)
        if code < hi:
            last = steps.first(element, code + 1) - 1
            if int(bounds[1][element]) > last:
                self.model.row(expression.matrix, most=last - base + 0.5)

    def _step(
        self, expression: Affine, column: int, a: int, b: int, span: tuple[int, int], steps: _Steps, element: int
    ) -> None:
        """Tie ``code = a + column`` to its accumulator; saturation has a binary for each side that can saturate."""
        lo, hi = steps.clip
        base = int(expression.constant[0])
        levels = np.arange(a, b + 1, dtype=np.int64)
        firsts = np.array([steps.first(element, int(level)) for level in levels])
        lasts = np.array([steps.first(element, int(level) + 1) - 1 for level in levels])
        low_free, high_free = a == lo and span[0] < firsts[0], b == hi and span[1] > lasts[-1]
        floor, ceiling = _line(levels - a, firsts, -1), _line(levels - a, lasts, 1)
        if floor is None or ceiling is None:
            if len(levels) - 1 > MAX_UNARY:
                self.exact = False
                floor, ceiling = _outside(levels - a, firsts, -1), _outside(levels - a, lasts, 1)
            else:
                binaries = [self.model.column(0, 1) for _ in levels[1:]]
                self._ordered(binaries)
                self.model.row({column: 1.0, **{binary: -1.0 for binary in binaries}}, 0.0, 0.0)
                low = span[0] if low_free else int(firsts[0])
                high = span[1] if high_free else int(lasts[-1])
                self._follow(expression, binaries, firsts[1:], low, high)
                return
        slope, start = floor
        terms = {column: -slope}
        if low_free:
            phase = self.model.column(0, 1)
            terms[phase] = start - (span[0] - 0.5)
            self.model.row({column: 1.0, phase: float(b - a)}, most=float(b - a))
        self.model.row(self.model.combined(expression, 1.0, terms), start - base)
        slope, start = ceiling
        terms = {column: -slope}
        if high_free:
            phase = self.model.column(0, 1)
            terms[phase] = start + slope * (b - a) - (span[1] + 0.5)
            self.model.row({column: 1.0, phase: -float(b - a)}, 0.0)
        self.model.row(self.model.combined(expression, 1.0, terms), most=start - base)

    def maximum(self, expression: Affine, members: list[list[int]], bounds: Range) -> Affine:
        """The largest member of every window; members that cannot be the largest are left out."""
        low, high = bounds
        pieces = []
        for window in members:
            floor = max(int(low[i]) for i in window)
            able = [i for i in window if int(high[i]) > floor]
            able = able or [max(window, key=lambda i: int(low[i]))]
            # One that always reaches the floor stays, so that the floor is reached by someone.
            if len(able) > 0 and max(int(low[i]) for i in able) < floor:
                able.append(max(window, key=lambda i: int(low[i])))
            if len(able) == 1:
                pieces.append(("element", able[0]))
                continue
            ceiling = max(int(high[i]) for i in able)
            column = self.model.column(floor, ceiling)
            winners = [self.model.column(0, 1) for _ in able]
            self.model.row(dict.fromkeys(winners, 1.0), 1.0, 1.0)
            for i, winner in zip(able, winners, strict=True):
                one, base = expression[[i]], int(expression.constant[i])
                self.model.row(self.model.combined(one, -1.0, {column: 1.0}), base - 0.5)
                room = float(ceiling - int(low[i]))
                self.model.row(self.model.combined(one, -1.0, {column: 1.0, winner: room}), most=base + room + 0.5)
            pieces.append(("column", column))
        matrix = self.model.widened(expression.matrix)
        picked = [matrix[[at]] if kind == "element" else self._unit(at) for kind, at in pieces]
        constants = [int(expression.constant[at]) if kind == "element" else 0 for kind, at in pieces]
        return Affine(sparse.vstack(picked, format="csr"), np.array(constants, dtype=np.int64))

    def _unit(self, column: int) -> Any:
        return sparse.csr_array(([1.0], ([0], [column])), shape=(1, len(self.model.low)))

    def image(self, solution: NDArray[np.float64]) -> Int64:
        """Pixels (flat) of a solution, rounded to integers."""
        pixels = self.range(0)[0].copy()
        for place, column, start, firsts in self._decode:
            value = round(float(solution[column]))
            if len(start):
                pixels[place] = firsts[value - 1] if value > 0 else start[0]
            else:
                pixels[place] = value
        return pixels


@dataclass(frozen=True)
class _Steps:
    """Where a clipped staircase steps: ``first(element, code)`` is the smallest argument that reaches the code.

    The clip is left out of `first`: it says where an endless staircase would step.
    """

    clip: tuple[int, int]
    first: Callable[[int, int], int]


def _line(x: Int64, y: Int64, side: int) -> tuple[float, float] | None:
    """``slope * x + start`` between the integers y and their neighbours ``y + side``, `MARGIN` away from both."""
    slope = float(y[-1] - y[0]) / float(x[-1] - x[0])
    distance = y - slope * x
    spread = float(distance.max() - distance.min())
    if 1 - spread < 2 * MARGIN:
        return None
    middle = float(distance.max() + distance.min() + side) / 2
    return slope, middle


def _outside(x: Int64, y: Int64, side: int) -> tuple[float, float]:
    """As `_line`, but it may let neighbours through too: only sound."""
    slope = float(y[-1] - y[0]) / float(x[-1] - x[0])
    distance = y - slope * x
    return slope, float(distance.max() + 0.5) if side > 0 else float(distance.min() - 0.5)


def _codes(op: O.InputQuantize, pixels: Int64, channel: int) -> Int64:
    """Codes of one channel's pixels."""
    channels = max(op.multiplier.size, op.offset.size)
    spread = np.repeat(pixels[:, None], channels, axis=1)
    return input_quantize(spread, op)[:, channel if channels > 1 else 0]


def _requantize(encoder: Encoder, op: O.Requantize) -> Affine:
    channels = encoder.program.tensors[op.output].shape[-1]
    multipliers = np.broadcast_to(np.ravel(op.multiplier), (channels,)).tolist()
    shifts = np.broadcast_to(np.ravel(op.shift), (channels,)).tolist()

    def first(element: int, code: int) -> int:
        factor, shift = multipliers[element % channels], shifts[element % channels]
        if factor == 0:
            # The staircase never steps: code 0 for everything.
            return -(2**62) if code <= 0 else 2**62
        target = (code << shift) - (0 if op.rounding == "floor" else 1 << (shift - 1))
        position = int(-((-target) // factor))
        if op.rounding == "half_even" and code % 2 and position * factor == target:
            position += 1
        return position

    source = op.inputs[0]
    return encoder.staircase(op, encoder.source(source), encoder.range(source), _Steps((op.lo, op.hi), first))


def _add(encoder: Encoder, op: O.Add) -> Affine:
    one, other = (encoder.source(i) for i in op.inputs)
    total = Affine(one.matrix + other.matrix, one.constant + other.constant)
    (a, b), (c, d) = (encoder.range(i) for i in op.inputs)
    low, high = a + c, b + d
    if (low >= op.lo).all() and (high <= op.hi).all():
        return total
    return encoder.staircase(op, total, (low, high), _Steps((op.lo, op.hi), lambda element, code: code))


def _weighted(encoder: Encoder, op: O.Conv2d | O.Linear | O.SumPool2d) -> Affine:
    source = encoder.source(op.inputs[0])
    matrix, bias = linear_map(op, encoder.program.tensors[op.inputs[0]].shape)
    return Affine(sparse.csr_array(matrix @ source.matrix), (matrix @ source.constant).astype(np.int64) + bias)


def _max_pool(encoder: Encoder, op: O.MaxPool2d) -> Affine:
    source = op.inputs[0]
    members = windows(op, encoder.program.tensors[source].shape)
    return encoder.maximum(encoder.source(source), members, encoder.range(source))


def _gather(encoder: Encoder, op: O.Op) -> Affine:
    """Elements are moved; what is written beside them is constant."""
    source = encoder.source(op.inputs[0])
    shape = encoder.program.tensors[op.inputs[0]].shape
    places, values = moved(op, shape)
    flat, constant = places.reshape(-1), values.reshape(-1)
    matrix = source.matrix[np.maximum(flat, 0)]
    kept = sparse.diags_array((flat >= 0).astype(float))
    return Affine(sparse.csr_array(kept @ matrix), np.where(flat >= 0, source.constant[np.maximum(flat, 0)], constant))


RULES: O.RuleTable = {
    O.InputQuantize: Encoder.quantized,
    O.Conv2d: _weighted,
    O.Linear: _weighted,
    O.Requantize: _requantize,
    O.Add: _add,
    O.SumPool2d: _weighted,
    O.MaxPool2d: _max_pool,
    O.Pad2d: _gather,
    O.PadChannels: _gather,
    O.Slice: _gather,
    O.Flatten: _gather,
}
