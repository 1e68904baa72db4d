"""Boxes of every operation against the pure-Python interpreter, on every image of a small box."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from arqsearch.certify.linf import boxes, interval_program
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.domain import Bound, Domain
from arqsearch.certify.linf.interval_program import double_weights, interleave
from arqsearch.integer import ops as O
from arqsearch.integer.native.engine import native_available
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer, prove
from tests.integer.interpreter import interpret, leaves
from tests.integer.random_programs import random_program

SEEDS = range(40)
FREE = 3


def small_box(program: IntegerProgram, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper image of a box with three free pixels, and every image in it."""
    rng = np.random.default_rng(seed)
    spec = program.input
    low = rng.integers(spec.lo, spec.hi - 40, size=spec.shape, endpoint=True)
    free = rng.choice(low.size, FREE, replace=False)
    wide = np.zeros(low.size, dtype=np.int64)
    wide[free] = rng.integers(1, 40, FREE)
    steps = [sorted({0, int(wide[i]), int(wide[i]) // 2}) for i in free]
    images = []
    for added in itertools.product(*steps):
        image = low.copy().ravel()
        image[free] += added
        images.append(image.reshape(spec.shape))
    return low[None].astype(np.int16), (low + wide.reshape(low.shape))[None].astype(np.int16), np.stack(images)


def linear(weight: list[list[int]], source: int = 1) -> O.Linear:
    return O.Linear((source,), source + 1, np.array(weight, dtype=np.int8), np.zeros(len(weight), dtype=np.int32))


def assemble(operations: tuple[O.Op, ...], spec: TensorSpec) -> IntegerProgram:
    return IntegerProgram(operations, infer(operations, spec), len(operations))


def test_every_operation_has_a_rule() -> None:
    assert set(interval_program.RULES) == set(O.OPS) == set(boxes.RULES)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_hold_every_tensor_of_every_image(seed: int) -> None:
    program = random_program(seed)
    low, high, images = small_box(program, seed)
    logits = program.run(images.astype(np.int16))
    label = int(logits[0].argmax())
    bound = IntervalBounds(program).bound(Domain(torch.from_numpy(low), torch.from_numpy(high), torch.tensor([label])))
    assert not bound.empty.any()
    assert sorted(bound.tensors) == list(range(len(program.tensors)))
    for values in interpret(program, images[:: max(1, len(images) // 6)], every=True):
        for tensor, (lo, hi) in bound.tensors.items():
            found = np.array(leaves(values[tensor]))
            assert (lo.numpy().ravel() <= found).all() and (found <= hi.numpy().ravel()).all(), tensor
    tightest = (logits[:, label][:, None] - logits).to(torch.int64).min(0).values
    assert (bound.margins[0] <= tightest).all()
    assert bound.margins[0, label] == 0
    backends = ("torch", "native") if native_available() else ("torch",)
    for backend in backends:  # Two more ways to the same integers.
        assert torch.equal(IntervalBounds(program, backend=backend).margins(low, high, [label]), bound.margins)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_the_range_proof_of_the_interval_program_is_that_of_the_program(seed: int) -> None:
    program = random_program(seed)
    double = interval_program.interval_program(program)
    ours, theirs = prove(program), prove(double)
    if len(program.ops) == len(double.ops):
        assert theirs.ranges == ours.ranges
    assert theirs.accumulator_bits == ours.accumulator_bits


@pytest.mark.parametrize("seed", SEEDS[:8])
def test_a_box_of_one_image_is_that_image(seed: int) -> None:
    program = random_program(seed)
    low, _, _ = small_box(program, seed)
    double = interval_program.interval_program(program)
    logits = program.run(low)
    assert torch.equal(double.run(interleave(low, low)), logits.repeat_interleave(2, dim=1))


def test_weights_are_split_by_sign() -> None:
    assert double_weights(np.array([[3, -2]])).tolist() == [[3, 0, 0, -2], [0, 3, -2, 0]]


def test_a_falling_quantizer_and_a_slice_at_a_distance() -> None:
    """Channel 1 is negated on entry; the slice takes channels 0 and 2: enumeration attains both bounds."""
    multiplier, offset = np.array([1, -2, 3]), np.array([0, 300, 5])
    operations = (
        O.InputQuantize((0,), 1, multiplier, offset, 1, "half_up", 0, 255, -20, 200),
        O.Slice((1,), 2, (0, 2, 1), (0, 1, 1), (0, 3, 2)),
        O.Slice((1,), 3, (0, 2, 1), (0, 1, 1), (1, 3, 1)),
        O.Add((2, 3), 4, -1000, 1000),
        O.Flatten((4,), 5),
    )
    program = assemble(operations, TensorSpec((2, 1, 3), 0, 255))
    low = np.array([[[[3, 100, 7]], [[9, 40, 20]]]], dtype=np.int16)
    high = low + np.array([[[[2, 1, 1]], [[1, 2, 0]]]], dtype=np.int16)
    every = itertools.product(*(range(a, b + 1) for a, b in zip(low.ravel(), high.ravel(), strict=True)))
    logits = program.run(np.array(list(every), dtype=np.int16).reshape(-1, 2, 1, 3)).to(torch.int64)
    bound = IntervalBounds(program).bound(Domain(torch.from_numpy(low), torch.from_numpy(high), torch.tensor([0])))
    lo, hi = bound.tensors[program.output]
    assert lo[0].tolist() == logits.min(0).values.tolist()
    assert hi[0].tolist() == logits.max(0).values.tolist()
    for backend in ("auto", "torch"):
        margins = IntervalBounds(program, backend=backend).margins(low, high, [0])[0]
        assert margins.tolist() == [0, *(lo[0, 0] - hi[0, 1:]).tolist()]


def test_limits_are_taken_in_and_contradictions_are_empty() -> None:
    program = assemble((O.Flatten((0,), 1), linear([[1, 1], [1, -1]])), TensorSpec((1, 2, 1), 0, 255))
    low, high = torch.tensor([[[[10], [10]]]] * 3), torch.tensor([[[[20], [20]]]] * 3)
    least = torch.tensor([[-(2**40), -(2**40)], [35, -100], [41, -100]])
    most = torch.full_like(least, 2**40)
    domain = Domain(low.short(), high.short(), torch.tensor([0, 0, 0]), {2: (least, most)})
    bounder = IntervalBounds(program)
    bound = bounder.bound(domain)
    assert bound.empty.tolist() == [False, False, True]
    assert bound.tensors[2][0][:2].tolist() == [[20, -10], [35, -10]]
    assert bound.margins[:2, 1].tolist() == [20, 25]  # 2 x2 by the fused layer; 35 - 10 by the limit.
    again = bounder.bound(Domain(domain.lo, domain.hi, domain.labels), bound)
    assert torch.equal(again.tensors[2][0][:2], bound.tensors[2][0][:2])
    assert (again.margins[:2] >= bound.margins[:2]).all()
    assert again.empty.tolist() == [False, False, True]


def test_known_bounds_never_loosen() -> None:
    program = random_program(4)
    low, high, _ = small_box(program, 4)
    bounder = IntervalBounds(program)
    wide = Domain(torch.from_numpy(low), torch.from_numpy(high), torch.tensor([0]))
    narrow = Domain(wide.lo, torch.maximum(wide.lo, wide.hi - 3), wide.labels)
    known = bounder.bound(wide)
    better = Bound(known.margins + 1, known.empty)
    assert torch.equal(bounder.bound(wide, better).margins, better.margins)
    inside = bounder.bound(narrow, known)
    for tensor, (lo, hi) in inside.tensors.items():
        assert (lo >= known.tensors[tensor][0]).all() and (hi <= known.tensors[tensor][1]).all()


@pytest.mark.parametrize("seed", [0, 7, 14])
def test_margins_fall_with_epsilon_and_not_with_the_chunk(seed: int) -> None:
    program = random_program(seed)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(9, *program.input.shape)).astype(np.uint8)
    labels = program.run(images).argmax(1)
    before = None
    for epsilon in (0, 1, 2, 5, 255):
        found = IntervalBounds(program).verify(images, labels, epsilon)
        assert torch.equal(found.margins, IntervalBounds(program, chunk=2).verify(images, labels, epsilon).margins)
        if before is not None:
            assert (found.margins <= before).all()
        before = found.margins
    assert IntervalBounds(program).margins(images[:0], images[:0], labels[:0]).shape == (0, program.num_classes)


@pytest.mark.slow
def test_a_million_points_lie_in_their_box() -> None:
    program = random_program(16)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=program.input.shape).astype(np.uint8)
    label = int(program.run(image[None]).argmax())
    low, high = boxes.box(image[None], 9)
    margins = IntervalBounds(program).margins(low, high, [label])[0]
    for _ in range(100):
        points = rng.integers(low, high, size=(10_000, *program.input.shape), endpoint=True).astype(np.int16)
        logits = program.run(points).to(torch.int64)
        assert (logits[:, label][:, None] - logits >= margins).all()
