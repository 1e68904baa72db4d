"""What is fused, what must not be, and how tensors are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.native import compile_program
from arqsearch.integer.native.plan import NativeProgram
from arqsearch.integer.native.storage import Kind, Storage, narrow_storage
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.integer.interpreter import interpret
from tests.integer.native.blob_interpreter import (
    ADD,
    CONV,
    COPY,
    I16,
    I32,
    INPUT,
    MAXPOOL,
    NO_TENSOR,
    RESCALE,
    SLICE,
    U8,
    Blob,
    StepEntry,
    interpret_blob,
)

SHAPE = (4, 4, 4)


class Net:
    """A program written down op by op; every method returns the new tensor."""

    def __init__(self) -> None:
        self.ops: list[O.Op] = []

    def put(self, op: O.Op) -> int:
        self.ops.append(op)
        return op.output

    @property
    def next(self) -> int:
        return len(self.ops) + 1

    def codes(self, lo: int = 0, hi: int = 255) -> int:
        return self.put(O.InputQuantize((0,), self.next, np.array([1]), np.array([0]), 0, "floor", 0, 255, lo, hi))

    def conv(self, source: int) -> int:
        weight = np.random.default_rng(self.next).integers(-7, 8, size=(4, 3, 3, 4)).astype(np.int8)
        bias = np.arange(4, dtype=np.int32)
        return self.put(O.Conv2d((source,), self.next, weight, bias, (1, 1), (1, 1, 1, 1), 1))

    def requantize(self, source: int, lo: int = 0, hi: int = 255, shift: int = 6) -> int:
        multiplier = np.array([3, 5, 7, 9])
        return self.put(O.Requantize((source,), self.next, multiplier, np.array([shift]), "half_up", lo, hi))

    def add(self, a: int, b: int, lo: int = 0, hi: int = 255) -> int:
        return self.put(O.Add((a, b), self.next, lo, hi))

    def pool(self, source: int) -> int:
        return self.put(O.MaxPool2d((source,), self.next, (3, 3), (1, 1), (1, 1, 1, 1)))

    def flatten(self, source: int) -> int:
        return self.put(O.Flatten((source,), self.next))

    def linear(self, source: int) -> int:
        weight = np.random.default_rng(1).integers(-2, 2, size=(3, 64)).astype(np.int8)
        return self.put(O.Linear((source,), self.next, weight, np.zeros(3, dtype=np.int32)))

    def compiled(self) -> tuple[NativeProgram, Blob]:
        """Compile, compare with the interpreter, and give the parts of the blob."""
        ops = tuple(self.ops)
        program = IntegerProgram(ops, infer(ops, TensorSpec(SHAPE, -20, 275)), ops[-1].output)
        pixels = np.random.default_rng(0).integers(-20, 276, size=(2, *SHAPE))
        native = compile_program(program)
        assert interpret_blob(native.words, pixels) == interpret(program, pixels)
        return native, Blob(native.words)


def kinds(blob: Blob) -> list[int]:
    return [step.kind for step in blob.steps]


def convs(blob: Blob) -> list[StepEntry]:
    return [step for step in blob.steps if step.kind == CONV]


def fused(step: StepEntry) -> tuple[bool, bool, bool, bool]:
    """Whether a convolution rescales its input, its sums, has a residual, and rescales that."""
    field = step.fields
    return bool(field[15]), bool(field[18]), field[19] != NO_TENSOR, bool(field[20])


def test_requantized_accumulators() -> None:
    net = Net()
    net.linear(net.flatten(net.requantize(net.conv(net.codes()))))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, CONV]
    assert fused(convs(blob)[0]) == (False, True, False, False)
    assert blob.tensors[blob.steps[1].writes].storage == U8


def test_accumulators_with_two_readers_are_stored() -> None:
    net = Net()
    acc = net.conv(net.codes())
    a, b = net.requantize(acc), net.pool(acc)
    net.linear(net.flatten(net.requantize(net.add(a, net.requantize(b)))))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, MAXPOOL, ADD, RESCALE, CONV]
    assert fused(convs(blob)[0]) == (False, False, False, False)
    assert [bool(blob.steps[3].fields[at]) for at in (3, 4)] == [True, True]


def test_residual_with_its_own_requantization() -> None:
    """The stream has other readers: it stays, and each reader requantizes for itself."""
    net = Net()
    stream = net.codes()
    branch = net.requantize(net.conv(net.requantize(stream, 0, 15, 8)), -(2**15) + 1, 2**15 - 1)
    total = net.add(branch, net.requantize(stream, -(2**15) + 1, 2**15 - 1, 3))
    net.linear(net.flatten(total))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, CONV]
    assert fused(convs(blob)[0]) == (True, True, True, True)
    assert convs(blob)[0].reads == [1, 1], "input and residual are the stream"
    # What the sum's clip lets through of an operand that meets values 0..r is -r..255.
    lo, hi = blob.row(convs(blob)[0].fields[18] + 2, 2)
    assert -300 < lo <= 0 and 0 < hi <= 255


def test_the_order_of_operands_does_not_matter() -> None:
    for swapped in (False, True):
        net = Net()
        stream = net.codes()
        residual = net.requantize(stream, 0, 100, 3)
        branch = net.requantize(net.conv(stream), 0, 200)
        net.linear(net.flatten(net.add(residual, branch) if swapped else net.add(branch, residual)))
        _, blob = net.compiled()
        assert kinds(blob) == [INPUT, CONV, CONV]
        assert fused(convs(blob)[0]) == (False, True, True, True)


def test_of_two_layers_the_later_one_adds() -> None:
    net = Net()
    stream = net.codes()
    first, second = net.conv(stream), net.conv(stream)
    a, b = net.requantize(first, -900, 900, 3), net.requantize(second, -900, 900, 3)
    net.linear(net.flatten(net.add(a, b)))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, CONV, CONV]
    assert [fused(step) for step in convs(blob)[:2]] == [(False, True, False, False), (False, True, True, False)]
    assert blob.tensors[convs(blob)[0].writes].storage == I16
    assert convs(blob)[1].reads[1] == convs(blob)[0].writes


def test_a_requantized_value_that_is_read_twice_is_stored() -> None:
    net = Net()
    stream = net.codes()
    value = net.requantize(net.conv(stream))
    total = net.add(value, stream)
    net.linear(net.flatten(net.add(total, net.pool(value))))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, ADD, MAXPOOL, ADD, CONV]


def test_a_value_added_to_itself() -> None:
    net = Net()
    value = net.requantize(net.conv(net.codes()))
    net.linear(net.flatten(net.add(value, value)))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, ADD, CONV]


def test_each_layer_requantizes_the_stream_for_itself() -> None:
    net = Net()
    stream = net.codes()
    a = net.requantize(net.conv(net.requantize(stream, 0, 15, 8)))
    b = net.requantize(net.conv(net.requantize(stream, 0, 3, 9)))
    net.linear(net.flatten(net.add(a, b)))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, CONV, CONV]
    assert [fused(step)[0] for step in convs(blob)] == [True, True, False]
    assert [step.fields[17] for step in convs(blob)[:2]] == [9, 3], "largest codes: 255 * 9 / 256 rounded, clipped to 3"


def test_codes_shared_by_two_layers_are_stored_once() -> None:
    net = Net()
    codes = net.requantize(net.codes(), 0, 15, 8)
    net.linear(net.flatten(net.add(net.requantize(net.conv(codes)), net.requantize(net.conv(codes)))))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, RESCALE, CONV, CONV, CONV]


@pytest.mark.parametrize("hi", [255, 256])
def test_only_codes_of_eight_bits_are_made_on_reading(hi: int) -> None:
    net = Net()
    net.linear(net.flatten(net.requantize(net.conv(net.requantize(net.codes(), 0, hi, 2)))))
    _, blob = net.compiled()
    assert kinds(blob) == ([INPUT, CONV, CONV] if hi == 255 else [INPUT, RESCALE, CONV, CONV])


def test_wide_streams_are_requantized_by_a_step() -> None:
    net = Net()
    stream = net.add(net.codes(), 1, 0, 300)
    net.linear(net.flatten(net.requantize(net.conv(net.requantize(stream, 0, 15, 8)))))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, ADD, RESCALE, CONV, CONV]
    assert blob.tensors[blob.steps[1].writes].storage == I16


def test_the_output_is_never_fused_away() -> None:
    """The output is read by nobody else, or also by a layer; it is there, as int32."""
    for read in (False, True):
        net = Net()
        flat = net.flatten(net.requantize(net.conv(net.codes())))
        if read:
            net.linear(flat)
        ops = tuple(net.ops)
        program = IntegerProgram(ops, infer(ops, TensorSpec(SHAPE, 0, 255)), flat)
        pixels = np.random.default_rng(0).integers(0, 256, size=(2, *SHAPE))
        words = compile_program(program).words
        assert interpret_blob(words, pixels) == interpret(program, pixels)
        assert Blob(words).tensors[Blob(words).output].storage == I32


def test_logits_that_are_requantized() -> None:
    """Raw accumulators are the output: their other reader gets them from memory."""
    net = Net()
    logits = net.linear(net.flatten(net.codes()))
    net.put(O.Requantize((logits,), net.next, np.array([1]), np.array([3]), "floor", -50, 50))
    ops = tuple(net.ops)
    program = IntegerProgram(ops, infer(ops, TensorSpec(SHAPE, 0, 255)), logits)
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, *SHAPE))
    words = compile_program(program).words
    assert interpret_blob(words, pixels) == interpret(program, pixels)
    assert kinds(Blob(words)) == [INPUT, CONV, RESCALE]


def test_the_output_outlives_what_is_computed_after_it() -> None:
    net = Net()
    logits = net.linear(net.flatten(net.codes()))
    value = net.requantize(1, 0, 15, 8)
    for _ in range(3):
        value = net.put(O.Pad2d((value,), net.next, (6, 6, 6, 6), np.zeros(4, dtype=np.int64)))
    ops = tuple(net.ops)
    program = IntegerProgram(ops, infer(ops, TensorSpec(SHAPE, 0, 255)), logits)
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, *SHAPE))
    assert interpret_blob(compile_program(program).words, pixels) == interpret(program, pixels)


def test_flattening_costs_nothing() -> None:
    net = Net()
    pooled = net.pool(net.codes())
    net.linear(net.flatten(pooled))
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, MAXPOOL, CONV]
    view, source = blob.tensors[blob.steps[2].reads[0]], blob.tensors[blob.steps[1].writes]
    assert (view.offset, view.storage, view.zero) == (source.offset, source.storage, source.zero)
    assert view.shape == (1, 1, 64)


def test_linear_layers_read_the_image_itself() -> None:
    net = Net()
    net.linear(net.flatten(0))
    _, blob = net.compiled()
    assert kinds(blob) == [CONV]
    assert blob.steps[0].fields[:3] == [0, 1, 1]


def test_a_flat_image_that_others_read_is_copied() -> None:
    net = Net()
    flat = net.flatten(0)
    net.linear(net.put(O.Add((flat, flat), net.next, 0, 255)))
    _, blob = net.compiled()
    assert kinds(blob) == [COPY, ADD, CONV]


def test_a_flat_output_leaves_its_source_narrow() -> None:
    """The source is also read by a layer, which wants codes of 8 bits."""
    net = Net()
    value = net.requantize(net.conv(net.codes()))
    net.put(O.Slice((net.requantize(net.conv(value)),), net.next, (0, 1, 1), (0, 1, 1), (0, 4, 1)))
    net.flatten(value)
    _, blob = net.compiled()
    assert kinds(blob) == [INPUT, CONV, CONV, SLICE, COPY]
    assert blob.tensors[blob.steps[1].writes].storage == U8


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [(0, 255, 0), (0, 256, None), (-128, 127, -128), (-1, 255, None), (-255, 0, -255), (-256, -200, None),
     (-200, -100, -200), (3, 255, 0), (3, 256, None), (-7, 248, -7), (5, 5, 0)],
)  # fmt: skip
def test_storage_of_eight_bits_holds_the_value_0(lo: int, hi: int, expected: int | None) -> None:
    found = narrow_storage(lo, hi)
    assert found == (None if expected is None else Storage(Kind.U8, expected))
    if found is not None:
        assert {0 <= value - found.zero <= 255 for value in (0, lo, hi)} == {True}


def test_readable_steps() -> None:
    net = Net()
    stream = net.codes()
    net.linear(net.flatten(net.add(net.requantize(net.conv(stream)), stream)))
    native, _ = net.compiled()
    assert len(native.steps) == 3
    assert native.steps[1].startswith("Conv2d 1 (4x4x4 U8), 1 (4x4x4 U8) -> 4 (4x4x4 U8); kernel 3x3, stride 1x1")
    assert "adds a residual" in native.steps[1] and "1 of 1 requantizations in 32 bits" in native.steps[1]


def test_sizes() -> None:
    """Weights at their own bits: 144 codes of 4 bits in 18 words, 192 codes of 2 bits in 12."""
    net = Net()
    net.linear(net.flatten(net.requantize(net.conv(net.codes()))))
    native, blob = net.compiled()
    assert [step.fields[12] for step in convs(blob)] == [4, 2]
    assert native.weight_bytes == 4 * (18 + 12)
    assert native.peak_activation_bytes == 64 + 64
    assert native.arena_bytes == 64 + 64 + (36 * 4 + 64 + 63) // 64 * 64 + (8 * 36 + 63) // 64 * 64


def refused(ops: Sequence[O.Op], spec: TensorSpec) -> IntegerProgram:
    return IntegerProgram(tuple(ops), infer(ops, spec), ops[-1].output)


def test_what_cannot_be_proven_is_refused() -> None:
    weight = np.full((1, 1, 1, 4), 2**15 - 1, dtype=np.int16)
    conv = O.Conv2d((0,), 1, weight, np.zeros(1, dtype=np.int32), (1, 1), (0, 0, 0, 0), 1)
    program = refused((conv, O.Flatten((1,), 2)), TensorSpec((1, 1, 4), -(2**15), 2**15 - 1))
    with pytest.raises(ArqError, match="int32"):
        compile_program(program)


def test_what_the_runtime_cannot_address_is_refused() -> None:
    pad = O.Pad2d((0,), 1, (70_000, 0, 0, 0), np.array([0]))
    program = refused((pad, O.Flatten((1,), 2)), TensorSpec((1, 1, 1), 0, 255))
    with pytest.raises(ArqError, match="70000"):
        compile_program(program)
    pad = O.Pad2d((0,), 1, (60_000, 0, 60_000, 0), np.array([0]))
    program = refused((pad, O.Flatten((1,), 2)), TensorSpec((1, 1, 1), 0, 255))
    with pytest.raises(ArqError, match="elements"):
        compile_program(program)
