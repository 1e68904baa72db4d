"""Well-formedness of a program: every operation's fields are legal and fit the shapes of its inputs.

Programs may come from files that someone else wrote; a backend, prover or exporter that indexes arrays
by their stated shapes can rely on what is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

Shape: TypeAlias = tuple[int, ...]
MAX_MULTIPLIER = 2**31 - 1
MAX_SHIFT = 62


def check_structure(program: IntegerProgram) -> None:
    """Check indices, fields and shapes of a whole program.

    :raises ArqError: naming the operation, the field and what would be valid.
    """
    count = len(program.tensors)
    if not program.ops or count == 0:
        raise ArqError("The program holds no operations; lower a network into it first.")
    if len(program.input.shape) != 3 or min(program.input.shape) < 1:
        raise ArqError(f"The input has shape {program.input.shape}; images are (H, W, C) with no empty axis.")
    for tensor, spec in enumerate(program.tensors):
        if spec.lo > spec.hi:
            raise ArqError(f"Tensor {tensor} states the empty range {spec.lo}..{spec.hi}; state lo <= hi.")
    written = {0}
    for index, op in enumerate(program.ops):
        name = f"Operation {index} ({type(op).__name__})"
        if not written.issuperset(op.inputs):
            missing = sorted(set(op.inputs) - written)
            raise ArqError(f"{name} reads tensor {missing[0]}, which no earlier operation writes; sort them.")
        if not 0 < op.output < count or op.output in written:
            raise ArqError(f"{name} writes tensor {op.output}; each of tensors 1..{count - 1} is written exactly once.")
        shape = check_op(index, op, tuple(program.tensors[source].shape for source in op.inputs))
        if shape != tuple(program.tensors[op.output].shape):
            raise ArqError(
                f"{name} produces shape {shape}, but tensor {op.output} states "
                f"{program.tensors[op.output].shape}; state {shape}."
            )
        written.add(op.output)
    if program.output not in written:
        raise ArqError(f"The output is tensor {program.output}, which no operation writes; name one of 0..{count - 1}.")
    if len(program.tensors[program.output].shape) != 1:
        raise ArqError(f"The logits have shape {program.tensors[program.output].shape}; end with Linear or Flatten.")


def check_op(index: int, op: O.Op, shapes: tuple[Shape, ...]) -> Shape:
    """Check one operation's fields against its input shapes and return its output shape.

    :param index: position in the program, for the message.
    :param shapes: shape of each input, no batch axis.
    :raises ArqError: when a field is illegal or does not fit.
    """
    where = f"Operation {index} ({type(op).__name__})"
    wanted = 2 if isinstance(op, O.Add) else 1
    _require(len(shapes) == wanted, where, f"has {len(shapes)} inputs; give it {wanted}")
    spatial = isinstance(op, O.Conv2d | O.SumPool2d | O.MaxPool2d | O.Pad2d | O.Slice | O.InputQuantize)
    _require(not spatial or len(shapes[0]) == 3, where, f"needs an (H, W, C) input, got shape {shapes[0]}")
    for name in ("stride", "kernel"):
        value = getattr(op, name, None)
        _require(value is None or min(value) >= 1, where, f"has {name} {value}; use positive integers")
    padding = getattr(op, "padding", None)
    _require(padding is None or min(padding) >= 0, where, f"has padding {padding}; use non-negative integers")
    if hasattr(op, "lo") and hasattr(op, "hi"):
        _require(op.lo <= op.hi, where, f"clips to the empty range {op.lo}..{op.hi}; give lo <= hi")
    check = _CHECKS.get(type(op))
    if check is not None:
        check(op, shapes, where)
    shape = O.output_shape(op, shapes[0])
    _require(min(shape, default=0) >= 1, where, f"produces shape {shape} from {shapes[0]}; nothing is left")
    return shape


def _require(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise ArqError(f"{where} {problem}.")


def _integers(values: Any, what: str, where: str) -> None:
    fits = isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.dtype != np.uint64
    _require(fits, where, f"holds {what} of type {getattr(values, 'dtype', type(values))}; use a signed integer array")


def _per_channel(values: O.IntArray, what: str, channels: int, where: str) -> None:
    """One entry for each channel, or one for all."""
    _integers(values, what, where)
    _require(
        values.ndim == 1 and values.size in (1, channels),
        where,
        f"has {what} of shape {values.shape}; give ({channels},) or (1,)",
    )


def _rounding(op: O.Requantize | O.InputQuantize, where: str) -> None:
    _require(op.rounding in O.ROUNDINGS, where, f"has rounding {op.rounding!r}; choose from {', '.join(O.ROUNDINGS)}")


def _input_quantize(op: O.InputQuantize, shapes: tuple[Shape, ...], where: str) -> None:
    _per_channel(op.multiplier, "multiplier", shapes[0][-1], where)
    _per_channel(op.offset, "offset", shapes[0][-1], where)
    _require(0 <= op.shift <= MAX_SHIFT, where, f"has shift {op.shift}; use 0..{MAX_SHIFT}")
    _require(op.pre_lo <= op.pre_hi, where, f"clips pixels to the empty range {op.pre_lo}..{op.pre_hi}")
    _rounding(op, where)


def _requantize(op: O.Requantize, shapes: tuple[Shape, ...], where: str) -> None:
    _per_channel(op.multiplier, "multiplier", shapes[0][-1], where)
    _per_channel(op.shift, "shift", shapes[0][-1], where)
    low, high = int(op.multiplier.min()), int(op.multiplier.max())
    _require(low >= 0 and high <= MAX_MULTIPLIER, where, f"has multipliers {low}..{high}; use 0..{MAX_MULTIPLIER}")
    low, high = int(op.shift.min()), int(op.shift.max())
    _require(low >= 1 and high <= MAX_SHIFT, where, f"has shifts {low}..{high}; use 1..{MAX_SHIFT}")
    _rounding(op, where)


def _weights(op: O.Conv2d | O.Linear, where: str) -> None:
    _integers(op.weight, "weight", where)
    _integers(op.bias, "bias", where)
    low, high = int(op.weight.min(initial=0)), int(op.weight.max(initial=0))
    _require(low >= -(2**15) and high < 2**15, where, f"has weights {low}..{high}; use int16 or narrower")
    low, high = int(op.bias.min(initial=0)), int(op.bias.max(initial=0))
    _require(low >= O.INT32_MIN and high <= O.INT32_MAX, where, f"has bias {low}..{high}; use int32")
    out = op.weight.shape[0]
    _require(op.bias.shape == (out,), where, f"has bias of shape {op.bias.shape}; give ({out},)")


def _conv2d(op: O.Conv2d, shapes: tuple[Shape, ...], where: str) -> None:
    _require(op.weight.ndim == 4, where, f"has weight of shape {op.weight.shape}; give (O, KH, KW, I/groups)")
    _weights(op, where)
    channels, out = shapes[0][-1], op.weight.shape[0]
    _require(
        op.groups >= 1 and out % op.groups == 0 and op.weight.shape[3] * op.groups == channels,
        where,
        f"has weight {op.weight.shape} in {op.groups} groups, which does not fit {channels} input channels",
    )


def _linear(op: O.Linear, shapes: tuple[Shape, ...], where: str) -> None:
    _require(op.weight.ndim == 2, where, f"has weight of shape {op.weight.shape}; give (O, I)")
    _weights(op, where)
    _require(
        shapes[0] == (op.weight.shape[1],), where, f"takes ({op.weight.shape[1]},), its input has shape {shapes[0]}"
    )


def _add(op: O.Add, shapes: tuple[Shape, ...], where: str) -> None:
    _require(shapes[0] == shapes[1], where, f"adds shapes {shapes[0]} and {shapes[1]}; make them equal")


def _max_pool(op: O.MaxPool2d, shapes: tuple[Shape, ...], where: str) -> None:
    top, bottom, left, right = op.padding
    _require(
        max(top, bottom) < op.kernel[0] and max(left, right) < op.kernel[1],
        where,
        f"has padding {op.padding} with kernel {op.kernel}; keep the padding smaller than the kernel",
    )


def _pad(op: O.Pad2d, shapes: tuple[Shape, ...], where: str) -> None:
    _integers(op.values, "values", where)
    _require(
        op.values.shape == (shapes[0][-1],), where, f"has values of shape {op.values.shape}; give ({shapes[0][-1]},)"
    )


def _pad_channels(op: O.PadChannels, shapes: tuple[Shape, ...], where: str) -> None:
    _require(min(op.before, op.after) >= 0, where, f"pads by {op.before} and {op.after}; use non-negative integers")


def _slice(op: O.Slice, shapes: tuple[Shape, ...], where: str) -> None:
    for size, bounds in zip(shapes[0], (op.rows, op.columns, op.channels), strict=True):
        start, stop, step = bounds
        _require(0 <= start < stop <= size and step >= 1, where, f"takes {bounds} of an axis of {size}; stay inside it")


_CHECKS: dict[type[O.Op], Callable[[Any, tuple[Shape, ...], str], None]] = {
    O.InputQuantize: _input_quantize,
    O.Requantize: _requantize,
    O.Conv2d: _conv2d,
    O.Linear: _linear,
    O.Add: _add,
    O.MaxPool2d: _max_pool,
    O.Pad2d: _pad,
    O.PadChannels: _pad_channels,
    O.Slice: _slice,
}
