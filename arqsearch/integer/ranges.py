"""Static range proofs: no value and no partial sum of a program ever leaves its integer type.

Every rule is interval analysis in Python integers over the stated range of the inputs and the actual
weights. For a sum of terms ``w*x`` with x in lo..hi only the sum P of the positive and the sum N of
the negative weights matter: the full sum lies in ``P*lo + N*hi .. P*hi + N*lo``, and every subset of
the terms in ``P*min(lo,0) + N*max(hi,0) .. P*max(hi,0) + N*min(lo,0)``, so any order of summation,
any split over vector lanes and any early stop is covered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.structure import check_op, check_structure

if TYPE_CHECKING:
    from arqsearch.integer.ops import Op

INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1


@dataclass(frozen=True)
class OpRange:
    """What one operation can produce.

    :param lo: smallest value written.
    :param hi: largest value written.
    :param partial_lo: smallest intermediate value, over every subset of the terms of a sum.
    :param partial_hi: largest intermediate value.
    :param width: bits of the integer type that must hold the intermediate values, 32 or 64.
    """

    lo: int
    hi: int
    partial_lo: int
    partial_hi: int
    width: int = 32

    @property
    def partial_sum(self) -> int:
        """Largest absolute intermediate value."""
        return max(abs(self.partial_lo), abs(self.partial_hi))

    @property
    def partial_sum_bits(self) -> int:
        """Bits of the largest absolute intermediate value: 24 fit float32 exactly, 53 fit float64."""
        return self.partial_sum.bit_length()


@dataclass(frozen=True)
class RangeProof:
    """The ranges of every operation of a program, in order; existing means that all checks passed."""

    program_hash: str
    ranges: tuple[OpRange, ...]

    @property
    def accumulator_bits(self) -> int:
        """Signed bits that hold every 32-bit intermediate value of the program."""
        return 1 + max((entry.partial_sum_bits for entry in self.ranges if entry.width == 32), default=0)


def infer(ops: Iterable[Op], input_spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """Derive shape and tightest interval of every tensor.

    :param ops: in execution order; output indices count up from 1 without gaps.
    :param input_spec: shape ``(H, W, C)`` and pixel range of tensor 0.
    :returns: one spec for each tensor, ``[0]`` being `input_spec`.
    :raises ArqError: when an operation reads a tensor not yet written or does not fit its input's shape.
    """
    tensors = [input_spec]
    for index, op in enumerate(ops):
        if op.output != len(tensors):
            raise ArqError(f"Operation {index} ({_name(op)}) writes tensor {op.output}; it must write {len(tensors)}.")
        for source in op.inputs:
            if not 0 <= source < len(tensors):
                raise ArqError(
                    f"Operation {index} ({_name(op)}) reads tensor {source}, which no earlier operation writes."
                )
        shape = check_op(index, op, tuple(tensors[source].shape for source in op.inputs))
        found = op_range(op, *(tensors[source] for source in op.inputs))
        tensors.append(TensorSpec(shape, found.lo, found.hi))
    return tuple(tensors)


def prove(program: IntegerProgram) -> RangeProof:
    """Prove that every value stays in its stated range and every intermediate value in its integer type.

    Sums are covered for every subset of their terms with or without the bias (int32); products and
    rounding of requantization in int64.

    :raises ArqError: naming the operation, its tensor, the numbers and the fix.
    """
    check_structure(program)
    tensors = program.tensors
    if tensors[0].lo < INT16_MIN or tensors[0].hi > INT16_MAX:
        raise ArqError(f"The input spans {tensors[0].lo}..{tensors[0].hi}; pixels are int16, state a range inside it.")
    ranges = []
    for index, op in enumerate(program.ops):
        where = f"Operation {index} ({_name(op)}), tensor {op.output}"
        found = op_range(op, *(tensors[source] for source in op.inputs))
        limit = 2 ** (found.width - 1)
        if found.partial_lo < -limit or found.partial_hi >= limit:
            raise ArqError(
                f"{where}: intermediate values span {found.partial_lo}..{found.partial_hi} and leave "
                f"int{found.width} ({-limit}..{limit - 1}). {_remedy(op)}"
            )
        stated = tensors[op.output]
        if found.lo < stated.lo or found.hi > stated.hi:
            raise ArqError(
                f"{where} can hold {found.lo}..{found.hi}, but the program states {stated.lo}..{stated.hi}. "
                f"State a range that contains it, or clip to the stated range."
            )
        if stated.lo < O.INT32_MIN or stated.hi > O.INT32_MAX:
            raise ArqError(f"{where} states {stated.lo}..{stated.hi}, beyond int32. State {found.lo}..{found.hi}.")
        ranges.append(found)
    return RangeProof(program.hash, tuple(ranges))


def op_range(op: Op, *inputs: TensorSpec) -> OpRange:
    """Range of one operation's result and intermediate values from the ranges of its inputs."""
    found: OpRange = RULES[type(op)](op, *inputs)
    return found


def partial_sum_bound(op: O.Conv2d | O.Linear | O.SumPool2d, spec: TensorSpec) -> int:
    """Largest absolute value of any partial sum, in any order, with or without the bias.

    :param spec: the stated range of the operation's input.
    """
    return op_range(op, spec).partial_sum


def _name(op: Op) -> str:
    return type(op).__name__


def _remedy(op: Op) -> str:
    if isinstance(op, O.Conv2d | O.Linear):
        return "Use fewer weight or activation bits in this layer, or a narrower input range."
    if isinstance(op, O.Requantize | O.InputQuantize):
        return "Use a smaller multiplier with a smaller shift (15 bits instead of 31)."
    if isinstance(op, O.SumPool2d):
        return "Pool over smaller windows, or requantize to fewer bits first."
    return "Requantize the operands to fewer bits first."


def divide_rounded(value: int, shift: int, rounding: O.Rounding) -> int:
    """``round(value / 2**shift)`` in Python integers, which cannot overflow."""
    if shift == 0 or rounding == "floor":
        return value >> shift
    half = 1 << (shift - 1)
    if rounding == "half_up":
        return (value + half) >> shift
    down, rest = value >> shift, value & ((1 << shift) - 1)
    return down + int(rest > half or (rest == half and down % 2 == 1))


def _clip(value: int, lo: int, hi: int) -> int:
    return min(max(value, lo), hi)


def _scaled(
    ends: tuple[int, int],
    multiplier: O.IntArray,
    offset: O.IntArray,
    shift: O.IntArray,
    rounding: O.Rounding,
    lo: int,
    hi: int,
) -> OpRange:
    """Range of ``clip(round((x*M + B) / 2**k), lo, hi)`` over all channels; the map is monotone in x."""
    count = max(multiplier.size, offset.size, shift.size)
    columns = (np.broadcast_to(np.ravel(values), (count,)).tolist() for values in (multiplier, offset, shift))
    values, partials = [], [0, *ends]
    for factor, add, places in set(zip(*columns, strict=True)):
        half = 0 if rounding == "floor" or places == 0 else 1 << (places - 1)
        for end in ends:
            total = end * factor + add
            partials += [end * factor, total, total + half]
            values.append(_clip(divide_rounded(total, places, rounding), lo, hi))
    return OpRange(min(values), max(values), min(partials), max(partials), 64)


def _input_quantize(op: O.InputQuantize, x: TensorSpec) -> OpRange:
    ends = (_clip(x.lo, op.pre_lo, op.pre_hi), _clip(x.hi, op.pre_lo, op.pre_hi))
    return _scaled(ends, op.multiplier, op.offset, np.array([op.shift]), op.rounding, op.lo, op.hi)


def _requantize(op: O.Requantize, x: TensorSpec) -> OpRange:
    return _scaled((x.lo, x.hi), op.multiplier, np.array([0]), op.shift, op.rounding, op.lo, op.hi)


def _weighted(weight: O.IntArray, bias: O.IntArray, x: TensorSpec, padded: bool) -> OpRange:
    """Range of ``sum w*x + bias`` per output channel (the first axis of `weight`), joined."""
    flat = weight.reshape(weight.shape[0], -1).astype(np.int64)
    positive, negative = np.maximum(flat, 0).sum(axis=1).tolist(), np.minimum(flat, 0).sum(axis=1).tolist()
    low0, high0 = min(x.lo, 0), max(x.hi, 0)
    lo, hi = (low0, high0) if padded else (x.lo, x.hi)
    rows = list(zip(positive, negative, bias.tolist(), strict=True))
    return OpRange(
        min(p * lo + n * hi + b for p, n, b in rows),
        max(p * hi + n * lo + b for p, n, b in rows),
        min(p * low0 + n * high0 + min(b, 0) for p, n, b in rows),
        max(p * high0 + n * low0 + max(b, 0) for p, n, b in rows),
    )


def _conv2d(op: O.Conv2d, x: TensorSpec) -> OpRange:
    return _weighted(op.weight, op.bias, x, any(op.padding))


def _linear(op: O.Linear, x: TensorSpec) -> OpRange:
    return _weighted(op.weight, op.bias, x, False)


def _add(op: O.Add, a: TensorSpec, b: TensorSpec) -> OpRange:
    lo, hi = a.lo + b.lo, a.hi + b.hi
    return OpRange(_clip(lo, op.lo, op.hi), _clip(hi, op.lo, op.hi), min(lo, a.lo, b.lo), max(hi, a.hi, b.hi))


def _sum_pool(op: O.SumPool2d, x: TensorSpec) -> OpRange:
    terms = op.kernel[0] * op.kernel[1]
    low0, high0 = min(x.lo, 0), max(x.hi, 0)
    lo, hi = (low0, high0) if any(op.padding) else (x.lo, x.hi)
    return OpRange(terms * lo, terms * hi, terms * low0, terms * high0)


def _max_pool(op: O.MaxPool2d, x: TensorSpec) -> OpRange:
    return _unchanged(x)


def _pad(op: O.Pad2d, x: TensorSpec) -> OpRange:
    return _unchanged(x, *op.values.tolist()) if any(op.padding) else _unchanged(x)


def _pad_channels(op: O.PadChannels, x: TensorSpec) -> OpRange:
    return _unchanged(x, 0) if op.before or op.after else _unchanged(x)


def _slice(op: O.Slice, x: TensorSpec) -> OpRange:
    return _unchanged(x)


def _flatten(op: O.Flatten, x: TensorSpec) -> OpRange:
    return _unchanged(x)


def _unchanged(x: TensorSpec, *more: int) -> OpRange:
    """Values are copied; `more` are constants written beside them."""
    lo, hi = min(x.lo, *more) if more else x.lo, max(x.hi, *more) if more else x.hi
    return OpRange(lo, hi, lo, hi)


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
