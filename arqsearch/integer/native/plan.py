"""`compile_program`: from an integer program to the blob that the C runtime executes.

The range proof comes first; then operations are fused to steps, tensors get their storage, every layer and every
requantization the quickest arithmetic that is proven exact, and all memory a place in the arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.native import arena
from arqsearch.integer.native.blob import Layer, PlacedStep, Rescale, packed_words, serialize
from arqsearch.integer.native.fuse import Step, fuse
from arqsearch.integer.native.rescale import Domain, fast_form
from arqsearch.integer.native.storage import MAX_WINDOW, Kind, Tensor, choose_storage, narrow_storage
from arqsearch.integer.native.sums import SumClass, Sums, analyse, weight_bits
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import divide_rounded, prove

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NativeProgram:
    """A compiled program.

    :param words: the blob, uint32; csrc/arq_blob.h states its format.
    :param arena_bytes: working memory of one run, in all.
    :param peak_activation_bytes: most bytes of activations that are alive at one step, without working copies.
    :param weight_bytes: weights alone, packed at their own bit-widths.
    :param steps: what is executed, a line for each step, for people.
    :param hash: of the integer program.
    """

    words: NDArray[np.uint32]
    arena_bytes: int
    peak_activation_bytes: int
    weight_bytes: int
    steps: tuple[str, ...]
    hash: str


def compile_program(program: IntegerProgram) -> NativeProgram:
    """Compile a program; the same program gives the same words everywhere.

    :raises ArqError: when the range proof fails, or the program is larger than the runtime can address.
    """
    proof = prove(program)
    tensors = choose_storage(program, proof)
    steps = fuse(program, tensors)
    planned = [_plan_step(step, tensors) for step in steps]
    blocks, owners = _memory(planned, tensors, program.output)
    offsets, arena_bytes = arena.place(blocks)
    if arena_bytes >= 2**32:
        raise ArqError(f"A run needs {arena_bytes} bytes of memory, the runtime addresses 2^32. Use smaller images.")
    words = serialize(
        program,
        {index: tensors[index] for index in sorted({0, *owners, *_read_or_written(steps)})},
        planned,
        {index: offsets[block] for index, block in owners.items()},
        offsets[len(blocks) - len(planned) :],
        arena_bytes,
    )
    activations = blocks[: len(blocks) - len(planned)]
    weight_bytes = sum(4 * packed_words(step.layer.weight.size, step.layer.bits) for step in planned if step.layer)
    lines = tuple(_describe(step, tensors) for step in planned)
    return NativeProgram(words, arena_bytes, arena.peak(activations), weight_bytes, lines, program.hash)


# ---- arithmetic of a step ----------------------------------------------------------------------


def _plan_step(step: Step, tensors: Mapping[int, Tensor]) -> PlacedStep:
    _check_windows(step.op)
    if isinstance(step.op, O.Conv2d | O.Linear):
        return _plan_layer(step, tensors)
    before = tuple(
        _rescale_stored(op, tensors[tensor]) if op else None for op, tensor in zip(step.before, step.reads, strict=True)
    )
    if isinstance(step.op, O.Add) and any(before):
        before = _narrowed_operands(step, tensors, before)
    return PlacedStep(step, before, None, 0)


def _plan_layer(step: Step, tensors: Mapping[int, Tensor]) -> PlacedStep:
    op = step.op
    assert isinstance(op, O.Conv2d | O.Linear)
    weight = (op.weight if isinstance(op, O.Conv2d) else op.weight[:, None, None, :]).astype(np.int16)
    source = tensors[step.reads[0]]
    flat = isinstance(op, O.Linear) and source.shape[2] != op.weight.shape[1]
    height, width, channels = (1, 1, source.elements) if flat else source.shape
    groups = op.groups if isinstance(op, O.Conv2d) else 1
    padding = op.padding if isinstance(op, O.Conv2d) else (0, 0, 0, 0)
    depthwise = groups > 1 and groups == channels == len(weight)

    before = _rescale_stored(step.before[0], source) if step.before[0] else None
    lo, hi, storage = source.lo, source.hi, source.storage
    if before:
        lo, hi = before.value_lo, before.value_hi
        narrow = narrow_storage(lo, hi)
        assert narrow is not None
        storage = narrow
    codes = storage.kind == Kind.U8 and (groups == 1 or depthwise)
    sums = analyse(
        weight, op.bias, lo, hi, padded=any(padding), depthwise=depthwise, zero=storage.zero if codes else None
    )
    copy = _copy_bytes(sums.sum_class, (height, width, channels), padding, before is not None)
    after, residual, clip = _epilogue(step, tensors, sums)
    layer = Layer(
        weight=weight, bias=op.bias, bits=weight_bits(weight), flat=flat,
        stride=op.stride if isinstance(op, O.Conv2d) else (1, 1), padding=padding, groups=groups,
        zero=storage.zero, largest=max(hi, 0) - storage.zero if storage.kind == Kind.U8 else 0,
        after=after, clip=clip, sum_class=sums.sum_class, depth=sums.depth,
    )  # fmt: skip
    scratch = copy + arena.align(8 * weight[0].size)
    return PlacedStep(step, (before, *residual), layer, scratch)


def _copy_bytes(sum_class: SumClass, shape: tuple[int, int, int], padding: O.Padding, rescaled: bool) -> int:
    """Bytes of the input's copy in a layer's scratch memory; the formula is part of the format (arq_blob.h)."""
    height, width, channels = shape
    if sum_class == SumClass.ANY:
        return arena.align(height * width * channels) if rescaled else 0
    if not (any(padding) or rescaled or channels % 4):
        return 0
    top, bottom, left, right = padding
    return arena.align((height + top + bottom) * (width + left + right) * (-(-channels // 4) * 4) + 64)


def _epilogue(
    step: Step, tensors: Mapping[int, Tensor], sums: Sums
) -> tuple[Rescale | None, tuple[Rescale | None, ...], tuple[int, int]]:
    """Rescaling of the accumulators, of the residual (no entry without one), and the clip of their sum.

    A requantized operand of a sum may be clipped to what the final clip lets through whatever the other operand is.
    """
    if step.after is None:
        return None, (), (O.INT32_MIN, O.INT32_MAX)
    domain = Domain(sums.lo, sums.hi, sums.code_lo, sums.code_hi)
    if step.add is None:
        return _rescale(step.after, domain), (), (O.INT32_MIN, O.INT32_MAX)
    other = tensors[step.reads[1]]
    ends = _result_range(step.before[1], _stored_domain(other)) if step.before[1] else (other.lo, other.hi)
    after = _rescale(step.after, domain, (step.add.lo - ends[1], step.add.hi - ends[0]))
    residual = None
    if step.before[1]:
        limits = (step.add.lo - after.value_hi, step.add.hi - after.value_lo)
        residual = _rescale(step.before[1], _stored_domain(other), limits)
    return after, (residual,), (_int32(step.add.lo), _int32(step.add.hi))


def _narrowed_operands(
    step: Step, tensors: Mapping[int, Tensor], before: tuple[Rescale | None, ...]
) -> tuple[Rescale | None, ...]:
    """As in `_epilogue`, for a sum that is a step of its own."""
    assert isinstance(step.op, O.Add)
    result = list(before)
    for position in (0, 1):
        requantize, other = step.before[position], result[1 - position]
        if requantize is not None:
            tensor = tensors[step.reads[1 - position]]
            lo, hi = (other.value_lo, other.value_hi) if other else (tensor.lo, tensor.hi)
            domain = _stored_domain(tensors[step.reads[position]])
            result[position] = _rescale(requantize, domain, (step.op.lo - hi, step.op.hi - lo))
    return tuple(result)


def _rescale_stored(op: O.Requantize, tensor: Tensor) -> Rescale:
    return _rescale(op, _stored_domain(tensor))


def _stored_domain(tensor: Tensor) -> Domain:
    lo, hi = tensor.value_range
    return Domain(*(np.array([value], dtype=np.int64) for value in (tensor.lo, tensor.hi, lo, hi)))


def _rescale(op: O.Requantize, domain: Domain, limits: tuple[int, int] = (O.INT32_MIN, O.INT32_MAX)) -> Rescale:
    """The rescale of a requantization whose result only matters within `limits`."""
    least, most = _result_range(op, domain)
    lo = min(max(least, limits[0]), most)
    hi = max(min(most, limits[1]), lo)
    return Rescale(op, lo, hi, fast_form(op, lo, hi, domain))


def _result_range(op: O.Requantize, domain: Domain) -> tuple[int, int]:
    """Smallest and largest result; the map is monotone in x."""
    count = max(op.multiplier.size, op.shift.size, domain.lo.size)
    columns = (np.broadcast_to(v, (count,)).tolist() for v in (op.multiplier, op.shift, domain.lo, domain.hi))
    lows, highs = [], []
    for multiplier, shift, lo, hi in zip(*columns, strict=True):
        lows.append(divide_rounded(lo * multiplier, shift, op.rounding))
        highs.append(divide_rounded(hi * multiplier, shift, op.rounding))
    return min(max(min(lows), op.lo), op.hi), max(min(max(highs), op.hi), op.lo)


def _int32(value: int) -> int:
    """A clip's limit: values beyond int32 clip nothing."""
    return min(max(value, O.INT32_MIN), O.INT32_MAX)


def _check_windows(op: O.Op) -> None:
    numbers = [*getattr(op, "stride", ()), *getattr(op, "padding", ()), *getattr(op, "kernel", ())]
    if isinstance(op, O.Conv2d):
        numbers += op.weight.shape[1:3]
    if max(numbers, default=0) > MAX_WINDOW:
        raise ArqError(
            f"{type(op).__name__}, tensor {op.output}: a kernel, stride or padding of {max(numbers)} is beyond the "
            f"native engine's {MAX_WINDOW}. Use smaller windows."
        )


# ---- memory ------------------------------------------------------------------------------------


def _read_or_written(steps: Sequence[Step]) -> set[int]:
    return {tensor for step in steps for tensor in (*step.reads, step.writes)}


def _memory(
    steps: Sequence[PlacedStep], tensors: Mapping[int, Tensor], output: int
) -> tuple[list[arena.Block], dict[int, int]]:
    """What needs a place: blocks for tensors, then one of scratch memory for each step; and each tensor's block.

    Views lie in the block of their source. A step that goes element by element writes over an operand that is not
    read again, where the elements have the same size.
    """
    last_read: dict[int, int] = {tensors[output].root: len(steps)}
    for index, placed in enumerate(steps):
        for tensor in placed.step.reads:
            root = tensors[tensor].root
            last_read[root] = max(last_read.get(root, 0), index)
    block_of: dict[int, int] = {}
    sizes: list[int] = []
    spans: list[list[int]] = []
    for index, placed in enumerate(steps):
        target = placed.step.writes
        until = max(index, last_read.get(target, index))
        operand = _overwritten(placed.step, tensors)
        for source in operand:
            block = block_of.get(tensors[source].root)
            if block is not None and spans[block][1] == index:
                block_of[target] = block
                spans[block][1] = until
                break
        else:
            block_of[target] = len(sizes)
            sizes.append(tensors[target].bytes)
            spans.append([index, until])
    blocks = [arena.Block(size, *span) for size, span in zip(sizes, spans, strict=True)]
    blocks += [arena.Block(placed.scratch, index, index) for index, placed in enumerate(steps)]
    owners = {index: block_of[tensor.root] for index, tensor in tensors.items() if tensor.root in block_of}
    return blocks, owners


def _overwritten(step: Step, tensors: Mapping[int, Tensor]) -> tuple[int, ...]:
    """Operands in whose place the result may be written."""
    target = tensors[step.writes]
    if isinstance(step.op, O.Conv2d | O.Linear):
        source = tensors[step.reads[0]].root
        operands = tuple(tensor for tensor in step.reads[1:] if tensors[tensor].root != source)
    elif isinstance(step.op, O.Requantize | O.Add | O.Flatten):
        operands = step.reads
    else:
        return ()
    return tuple(tensor for tensor in operands if tensors[tensor].storage.bytes == target.storage.bytes)


# ---- for people --------------------------------------------------------------------------------


def _describe(placed: PlacedStep, tensors: Mapping[int, Tensor]) -> str:
    """One line: what, on which tensors, with which arithmetic."""
    step, layer = placed.step, placed.layer
    name = type(step.op).__name__
    reads = ", ".join(_tensor_text(tensors, tensor) for tensor in step.reads)
    text = f"{name} {reads} -> {_tensor_text(tensors, step.writes)}"
    rescales = [rescale for rescale in (*placed.before, layer.after if layer else None) if rescale]
    if layer is not None:
        kernel = "x".join(map(str, layer.weight.shape[1:3]))
        text += f"; kernel {kernel}, stride {layer.stride[0]}x{layer.stride[1]}, groups {layer.groups}, "
        text += f"{layer.bits}-bit weights, sums {layer.sum_class.name}"
        text += f" of {layer.depth} pairs" if layer.sum_class == SumClass.PAIRS else ""
        fused = [
            (placed.before[0] is not None, "requantizes its input"),
            (layer.after is not None, "requantizes its sums"),
            (step.add is not None, "adds a residual"),
        ]
        text += "".join(f", {what}" for holds, what in fused if holds)
    if rescales:
        fast = sum(rescale.fast is not None for rescale in rescales)
        text += f"; {fast} of {len(rescales)} requantizations in 32 bits"
    return text


def _tensor_text(tensors: Mapping[int, Tensor], index: int) -> str:
    tensor = tensors[index]
    return f"{index} ({'x'.join(map(str, tensor.shape))} {tensor.storage.kind.name})"
