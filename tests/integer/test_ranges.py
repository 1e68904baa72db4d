"""Range proofs: tight where they can be, never broken by any input, and strict about what they refuse."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer, partial_sum_bound, prove
from tests.integer.interpreter import interpret, leaves
from tests.integer.random_programs import random_pixels, random_program

NO_PADDING = (0, 0, 0, 0)


def conv(weight: np.ndarray, bias: int = 0, padding: O.Padding = NO_PADDING) -> O.Conv2d:
    return O.Conv2d((0,), 1, weight, np.array([bias], dtype=np.int64), (1, 1), padding, 1)


def one_op(op: O.Op, spec: TensorSpec) -> IntegerProgram:
    """A program of one operation and a flatten."""
    ops = (op, O.Flatten((1,), 2))
    return IntegerProgram(ops, infer(ops, spec), 2)


@pytest.mark.parametrize("seed", range(40))
def test_every_value_of_every_tensor_lies_in_its_inferred_range(seed: int) -> None:
    program = random_program(seed)
    proof = prove(program)
    assert proof.program_hash == program.hash
    tight = infer(program.ops, program.input)
    program = dataclasses.replace(program, tensors=tight)
    prove(program)
    # The interpreter itself checks each value against its tensor's range.
    interpret(program, random_pixels(program, seed), every=True)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_a_sum_are_attained(seed: int) -> None:
    """Some input reaches both ends of a convolution's interval exactly."""
    rng = np.random.default_rng(seed)
    lo, hi = sorted(rng.integers(-50, 200, size=2).tolist())
    weight = rng.integers(-9, 10, size=(1, 1, 1, 4))
    program = one_op(conv(weight, bias=int(rng.integers(-9, 9))), TensorSpec((1, 1, 4), lo, hi))
    corners = np.array(list(itertools.product((lo, hi), repeat=4))).reshape(-1, 1, 1, 4)
    values = leaves(interpret(program, corners))
    assert (min(values), max(values)) == (program.tensors[1].lo, program.tensors[1].hi)


@pytest.mark.parametrize("seed", range(20))
def test_partial_sum_bound_is_the_worst_subset(seed: int) -> None:
    """Brute force over every subset of the terms and the bias, and every corner of the input box."""
    rng = np.random.default_rng(seed)
    lo, hi = sorted(rng.integers(-20, 30, size=2).tolist())
    weight = rng.integers(-5, 6, size=(1, 1, 1, 4))
    bias = int(rng.integers(-60, 60))
    worst = 0
    for corner in itertools.product((lo, hi), repeat=4):
        terms = [int(w) * x for w, x in zip(weight.ravel(), corner, strict=True)] + [bias]
        for subset in itertools.product((0, 1), repeat=5):
            worst = max(worst, abs(sum(t for t, used in zip(terms, subset, strict=True) if used)))
    assert partial_sum_bound(conv(weight, bias), TensorSpec((1, 1, 4), lo, hi)) == worst


def test_padding_brings_zero_into_the_range() -> None:
    spec = TensorSpec((2, 2, 1), 5, 9)
    weight = np.array([[[[1], [1]]]])
    assert infer((conv(weight),), spec)[1].lo == 10
    assert infer((conv(weight, padding=(0, 0, 1, 0)),), spec)[1].lo == 0
    pool = O.SumPool2d((0,), 1, (2, 2), (1, 1), (1, 0, 0, 0))
    assert infer((pool,), spec)[1] == TensorSpec((2, 1, 1), 0, 36)
    assert infer((O.PadChannels((0,), 1, 0, 1),), spec)[1] == TensorSpec((2, 2, 2), 0, 9)
    assert infer((O.Pad2d((0,), 1, (1, 0, 0, 0), np.array([77])),), spec)[1] == TensorSpec((3, 2, 1), 5, 77)
    assert infer((O.MaxPool2d((0,), 1, (2, 2), (1, 1), (1, 0, 0, 0)),), spec)[1] == TensorSpec((2, 1, 1), 5, 9)


def test_a_sum_that_cancels_in_the_end_is_still_refused() -> None:
    """The full sum is small, a subset of its terms leaves int32."""
    terms = 70_000
    weight = np.ones((1, 1, 1, terms), dtype=np.int16)
    weight[..., ::2] = -1
    spec = TensorSpec((1, 1, terms), 32_767, 32_767)
    ok = conv(weight)
    assert infer((ok,), spec)[1] == TensorSpec((1, 1, 1), 0, 0)
    assert prove(one_op(ok, spec)).ranges[0].partial_sum == 35_000 * 32_767
    with pytest.raises(ArqError, match=r"Operation 0 \(Conv2d\), tensor 1: intermediate .* leave int32"):
        prove(one_op(conv(2 * weight), spec))


def test_the_bias_counts_on_its_own_side_only() -> None:
    weight = np.array([[[[1]]]])
    spec = TensorSpec((1, 1, 1), 0, 255)
    assert partial_sum_bound(conv(weight, bias=-1000), spec) == 1000
    assert prove(one_op(conv(weight, bias=2**31 - 256), spec)).ranges[0].partial_sum_bits == 31
    with pytest.raises(ArqError, match="leave int32"):
        prove(one_op(conv(weight, bias=2**31 - 255), spec))


def test_int64_limits_of_requantization() -> None:
    spec = TensorSpec((1, 1, 1), -(2**15), 2**15 - 1)
    widest = O.Requantize((1,), 2, np.array([2**31 - 1]), np.array([62]), "half_up", -8, 7)
    ops = (conv(np.array([[[[2**15 - 1]]]])), widest, O.Flatten((2,), 3))
    program = IntegerProgram(ops, infer(ops, spec), 3)
    assert prove(program).ranges[1].width == 64
    stretched = O.InputQuantize((0,), 1, np.array([2**50]), np.array([0]), 40, "half_up", -(2**15), 2**15, -8, 7)
    with pytest.raises(ArqError, match=r"InputQuantize.* leave int64 .*smaller multiplier"):
        prove(one_op(stretched, spec))


def test_stated_ranges_may_be_wider_and_not_narrower() -> None:
    program = one_op(conv(np.array([[[[3]]]])), TensorSpec((1, 1, 1), 0, 10))

    def stated(lo: int, hi: int) -> IntegerProgram:
        tensors = (program.tensors[0], TensorSpec((1, 1, 1), lo, hi), TensorSpec((1,), lo, hi))
        return dataclasses.replace(program, tensors=tensors)

    prove(stated(-128, 127))
    with pytest.raises(ArqError, match=r"tensor 1 can hold 0\.\.30, but the program states 0\.\.29"):
        prove(stated(0, 29))
    with pytest.raises(ArqError, match="beyond int32"):
        prove(stated(-(2**31) - 1, 30))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (O.Requantize((0,), 1, np.array([1]), np.array([0]), "half_up", 0, 1), r"shifts 0\.\.0"),
        (O.Requantize((0,), 1, np.array([-1]), np.array([1]), "half_up", 0, 1), r"multipliers -1\.\.-1"),
        (O.Requantize((0,), 1, np.array([1, 1]), np.array([1]), "half_up", 0, 1), "multiplier of shape"),
        (O.Requantize((0,), 1, np.array([1]), np.array([1]), "nearest", 0, 1), "rounding 'nearest'"),  # type: ignore[arg-type]
        (O.Requantize((0,), 1, np.array([1.0]), np.array([1]), "floor", 0, 1), "float64"),  # type: ignore[arg-type]
        (O.Requantize((0,), 1, np.array([1]), np.array([1]), "floor", 2, 1), r"empty range 2\.\.1"),
        (O.MaxPool2d((0,), 1, (2, 2), (1, 1), (2, 0, 0, 0)), "smaller than the kernel"),
        (O.MaxPool2d((0,), 1, (9, 9), (1, 1), NO_PADDING), "produces shape"),
        (O.SumPool2d((0,), 1, (2, 2), (0, 1), NO_PADDING), "stride"),
        (O.Slice((0,), 1, (0, 5, 1), (0, 4, 1), (0, 3, 1)), "axis of 4"),
        (O.Linear((0,), 1, np.ones((2, 3), dtype=np.int8), np.zeros(2, dtype=np.int32)), "its input has shape"),
        (conv(np.ones((1, 1, 1, 2), dtype=np.int8)), "does not fit 3 input channels"),
        (O.Add((0,), 1, 0, 1), "has 1 inputs"),
        (O.Flatten((5,), 1), "reads tensor 5"),
        (O.Flatten((0,), 4), "writes tensor 4"),
    ],
)
def test_malformed_operations_are_refused_by_name(op: O.Op, message: str) -> None:
    spec = TensorSpec((4, 4, 3), 0, 255)
    with pytest.raises(ArqError, match=message):
        infer((op,), spec)
    with pytest.raises(ArqError, match=f"Operation 0.*{message}"):
        prove(IntegerProgram((op,), (spec, TensorSpec((48,), 0, 255)), 1))


def test_malformed_programs_are_refused() -> None:
    program = random_program(1)
    for broken, message in (
        (dataclasses.replace(program, ops=()), "no operations"),
        (dataclasses.replace(program, ops=program.ops[::-1]), "no earlier operation"),
        (dataclasses.replace(program, output=len(program.tensors)), "no operation writes"),
        (dataclasses.replace(program, output=1), "The logits have shape"),
        (dataclasses.replace(program, tensors=(TensorSpec((4, 4, 3), 0, 70_000), *program.tensors[1:])), "Operation 0"),
    ):
        with pytest.raises(ArqError, match=message):
            prove(broken)
