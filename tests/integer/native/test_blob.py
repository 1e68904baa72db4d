"""A compiled program gives the integers of the program, whichever arithmetic requantizes, and keeps its promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from arqsearch.integer import ops as O
from arqsearch.integer.native import compile_program
from arqsearch.integer.native.blob import pack
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.integer.interpreter import interpret
from tests.integer.native.blob_interpreter import (
    ADD,
    CONV,
    COPY,
    INPUT,
    NO_TENSOR,
    RESCALE,
    SUM_ANY,
    SUM_INT16,
    SUM_PAIRS,
    SUM_U8,
    Blob,
    Form,
    StepEntry,
    interpret_blob,
)
from tests.integer.native.examples import example, lowered
from tests.integer.native.random_graphs import random_graph
from tests.integer.random_programs import random_pixels, random_program
from tests.quantize.nets import NETS

SEEDS = range(100)
#: Bits of weights and activations, multipliers and rounding of lowered networks.
SETTINGS: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((8, 8), {}),
    ((4, 4), {"multiplier": "15"}),
    ((2, 4), {"multiplier": "pow2"}),
    ((4, 4), {"input_mode": "clip", "rounding": "half_even"}),
    ((3, 5), {"rounding": "floor"}),
)


@pytest.mark.parametrize("form", ["fast", "exact", "both"])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs(seed: int, form: Form) -> None:
    program, pixels, expected = example(seed)
    assert interpret_blob(compile_program(program).words, pixels, form) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs(seed: int) -> None:
    program = random_graph(seed)
    pixels = random_pixels(program, seed)
    assert interpret_blob(compile_program(program).words, pixels) == interpret(program, pixels)


@pytest.mark.parametrize(("bits", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("kind", NETS)
def test_lowered_networks(kind: type[torch.nn.Module], bits: tuple[int, int], settings: dict[str, Any]) -> None:
    program, pixels = lowered(kind.__name__, bits, **settings)
    assert interpret_blob(compile_program(program).words, pixels) == interpret(program, pixels)


@pytest.mark.parametrize("bits", [(4, 4), pytest.param((8, 8), marks=pytest.mark.slow)])
def test_resnet20(bits: tuple[int, int]) -> None:
    program, pixels = lowered("resnet20", bits, multiplier="15")
    words = compile_program(program).words
    expected = program.run(pixels[:1], backend="torch").tolist()
    assert interpret_blob(words, pixels[:1]) == expected


def test_the_header_describes_the_program() -> None:
    for seed in range(20):
        program, _, _ = example(seed)
        native = compile_program(program)
        blob = Blob(native.words)
        assert blob.hash == program.hash == native.hash
        assert (blob.image, blob.pixels) == (program.input.shape, (program.input.lo, program.input.hi))
        assert (blob.classes, blob.arena_bytes) == (program.num_classes, native.arena_bytes)
        assert len(blob.steps) == len(native.steps)
        assert blob.tensors[blob.output].storage == 2, "logits are int32"


def test_compiling_is_deterministic() -> None:
    for seed in range(10):
        words = compile_program(random_program(seed)).words
        assert np.array_equal(words, compile_program(random_program(seed)).words)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_packing(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=count)
    whole = sum((code % 2**bits) << (bits * index) for index, code in enumerate(codes.tolist()))
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 32)
    assert [int(word) for word in packed] == [whole >> (32 * index) & 0xFFFFFFFF for index in range(len(packed))]


def test_the_programs_cover_the_format() -> None:
    """Every kind of step, fusion and sum class occurs; otherwise the tests above would prove little."""
    kinds: Counter[int] = Counter()
    fused: Counter[str] = Counter()
    programs = [example(seed)[0] for seed in SEEDS] + [random_graph(seed) for seed in SEEDS]
    for program in programs:
        blob = Blob(compile_program(program).words)
        kinds.update(step.kind for step in blob.steps)
        for step in blob.steps:
            fused.update(_features(blob, step))
        written = {0, *(step.writes for step in blob.steps)}
        fused["view"] += len(blob.tensors) - len(written)
    assert set(kinds) == set(range(INPUT, COPY + 1))
    wanted = {"input rescale", "input rescale without class", "rescale", "residual", "residual rescale"}
    wanted |= {"operand rescale", "flat image", "view", "in place", "fast", "exact"}
    wanted |= {f"class {sum_class}" for sum_class in (SUM_ANY, SUM_U8, SUM_PAIRS, SUM_INT16)}
    assert {name for name, count in fused.items() if count} >= wanted


def _features(blob: Blob, step: StepEntry) -> set[str]:
    field = step.fields
    records = {CONV: [15, 18, 20], RESCALE: [2], ADD: [3, 4]}.get(step.kind, [])
    found = {("fast" if blob.words[field[at] + 4] else "exact") for at in records if field[at]}
    if step.kind == ADD and (field[3] or field[4]):
        found.add("operand rescale")
    if step.kind == CONV:
        found |= {f"class {field[23]}"} | ({"flat image"} if field[2] else set())
        for at, name in ((15, "input rescale"), (18, "rescale"), (20, "residual rescale")):
            found |= {name} if field[at] else set()
        found |= {"residual"} if field[19] != NO_TENSOR else set()
        found |= {"input rescale without class"} if field[15] and field[23] == SUM_ANY else set()
    target = blob.tensors[step.writes]
    if any(index and blob.tensors[index].span == target.span for index in step.reads):
        found.add("in place")
    return found


# ---- what a broken compiler would do -----------------------------------------------------------


def _without(field: int, empty: int) -> Any:
    def damage(blob: Blob, step: StepEntry) -> None:
        step.fields[field] = empty

    return damage


def _clip_moved(blob: Blob, step: StepEntry) -> None:
    if step.fields[19] != NO_TENSOR:
        step.fields[22] -= 1


def _record(field: int, position: int) -> Any:
    """Change one word of a rescale: 2 lo, 3 hi, 5 first multiplier."""

    def damage(blob: Blob, step: StepEntry) -> None:
        if step.fields[field]:
            at = step.fields[field] + position
            blob.words[at] = blob.words[at] + 1 if position < 5 else blob.words[at] // 2

    return damage


def _weights(blob: Blob, step: StepEntry) -> None:
    blob.words[step.fields[13]] ^= 1


def _bias(blob: Blob, step: StepEntry) -> None:
    blob.words[step.fields[14]] = (blob.words[step.fields[14]] + 7) % 2**32


DAMAGES = {
    "no residual": _without(19, NO_TENSOR), "no residual rescale": _without(20, 0), "no rescale": _without(18, 0),
    "clip of the sum": _clip_moved, "input multiplier": _record(15, 5), "multiplier": _record(18, 5),
    "residual multiplier": _record(20, 5), "lower end": _record(18, 2), "weight": _weights, "bias": _bias,
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_blob_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake changes logits, or breaks a promise, in some of the programs: the comparison is sensitive to it."""
    noticed = 0
    original = Blob.__init__

    def damaged(self: Blob, words: np.ndarray[Any, Any]) -> None:
        original(self, words)
        for step in self.steps:
            if step.kind == CONV:
                DAMAGES[name](self, step)

    monkeypatch.setattr(Blob, "__init__", damaged)
    for seed in range(60):
        program, pixels, expected = example(seed)
        try:
            noticed += interpret_blob(compile_program(program).words, pixels, "exact") != expected
        except AssertionError:
            noticed += 1
    assert noticed > 0


def test_wide_limits_of_clips() -> None:
    """Clips beyond int32 clip nothing and must not wrap around."""
    weight = np.ones((1, 1, 1, 1), dtype=np.int8)
    ops = (
        O.InputQuantize((0,), 1, np.array([1]), np.array([0]), 0, "floor", -(2**40), 2**40, -(2**50), 2**50),
        O.Conv2d((1,), 2, weight, np.zeros(1, dtype=np.int32), (1, 1), (0, 0, 0, 0), 1),
        O.Requantize((2,), 3, np.array([1]), np.array([1]), "half_up", -(2**40), 2**40),
        O.Add((3, 1), 4, -(2**40), 2**40),
        O.Add((4, 4), 5, -(2**40), 2**40),
        O.Flatten((5,), 6),
    )
    program = IntegerProgram(ops, infer(ops, TensorSpec((1, 2, 1), -3000, 3000)), 6)
    pixels = np.array([[[[-3000], [3000]]], [[[7], [-7]]]])
    assert interpret_blob(compile_program(program).words, pixels) == interpret(program, pixels)
