"""The torch backend gives the integers of the independent interpreter; programs keep their identity on disk."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import TorchBackend
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.integer import interpreter
from tests.integer.interpreter import interpret
from tests.integer.random_programs import BIT_PAIRS, random_pixels, random_program

#: More than the 49 bit pairs, so that every pair leads at least one program.
SEEDS = range(80)
CONSUMERS = (
    "arqsearch.integer.backend_torch",
    "arqsearch.integer.ranges",
    "arqsearch.certify.linf.boxes",
    "arqsearch.export.onnx_strict",
)


@pytest.mark.parametrize("module", CONSUMERS)
def test_every_consumer_has_a_rule_for_every_operation(module: str) -> None:
    assert set(importlib.import_module(module).RULES) == set(O.OPS)


def test_the_interpreter_has_a_rule_for_every_operation() -> None:
    assert set(interpreter.RULES) == set(O.OPS)


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_equals_the_interpreter(seed: int) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    got = TorchBackend(program).run(pixels)
    assert got.dtype == torch.int32
    assert got.tolist() == interpret(program, pixels)


def test_the_programs_cover_every_operation_pair_and_rounding() -> None:
    programs = [random_program(seed) for seed in SEEDS]
    listed = [op for program in programs for op in program.ops]
    assert {type(op) for op in listed} == set(O.OPS)
    assert {op.rounding for op in listed if isinstance(op, O.Requantize)} == set(O.ROUNDINGS)
    assert len(SEEDS) >= len(BIT_PAIRS)
    convolutions = [op for op in listed if isinstance(op, O.Conv2d)]
    assert any(op.groups == op.weight.shape[0] > 1 for op in convolutions), "depthwise"
    assert any(op.groups == 2 for op in convolutions), "grouped"
    assert any(op.padding[0] != op.padding[1] for op in convolutions), "asymmetric"
    assert any(program.input.lo == -2335 for program in programs), "noisy pixels"


@pytest.mark.parametrize("seed", [3, 11, 29])
def test_logits_do_not_depend_on_the_batch(seed: int) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed, random_images=6)
    together = TorchBackend(program).run(pixels)
    assert torch.equal(together, TorchBackend(program, chunk=4).run(pixels))
    assert torch.equal(together, torch.cat([TorchBackend(program).run(image[None]) for image in pixels]))
    assert torch.equal(together.flip(0), TorchBackend(program).run(pixels[::-1].copy()))


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize(("multiplier", "shift"), [(1, 1), (1, 4), (3, 3), (2**15 - 1, 18), (2**31 - 1, 34), (5, 62)])
def test_requantization_of_every_accumulator_in_a_range(rounding: O.Rounding, multiplier: int, shift: int) -> None:
    """Ties and both sides of every step, negative ones included."""
    op = O.Requantize((0,), 1, np.array([multiplier]), np.array([shift]), rounding, -20, 27)
    flat = O.Flatten((1,), 2)
    program = _assemble((op, flat), TensorSpec((1, 1, 1), -400, 400))
    pixels = np.arange(-400, 401).reshape(-1, 1, 1, 1)
    for backend in ("torch", "auto"):
        assert program.run(pixels, backend=backend).tolist() == interpret(program, pixels)


def test_sums_beyond_float32_stay_exact() -> None:
    """Sums next to 2**31 with odd terms, which float32 cannot hold."""
    weight = np.full((1, 1, 1, 512), 127, dtype=np.int8)
    weight[..., 0] = 126
    ops = (
        O.Conv2d((0,), 1, weight, np.array([3], dtype=np.int32), (1, 1), (0, 0, 0, 0), 1),
        O.Flatten((1,), 2),
    )
    program = _assemble(ops, TensorSpec((1, 1, 512), -(2**15), 2**15 - 1))
    pixels = np.stack([np.full((1, 1, 512), 2**15 - 1), np.full((1, 1, 512), -(2**15))])
    pixels[0, 0, 0, 1] -= 2
    for backend in ("torch", "auto"):
        assert program.run(pixels, backend=backend).tolist() == interpret(program, pixels)
    assert abs(int(program.run(pixels)[0, 0])) > 2**30


@pytest.mark.parametrize("seed", range(6))
def test_save_and_load_keep_hash_and_logits(seed: int, tmp_path: Path) -> None:
    program = random_program(seed)
    program.save(tmp_path / "program.safetensors")
    loaded = IntegerProgram.load(tmp_path / "program.safetensors")
    pixels = random_pixels(program, seed)
    assert loaded.hash == program.hash
    assert loaded.metadata == program.metadata
    assert loaded.tensors == program.tensors
    assert torch.equal(loaded.run(pixels), program.run(pixels))


def test_the_hash_sees_every_field_and_no_metadata() -> None:
    program = random_program(7)
    hashes = {program.hash}
    assert dataclasses.replace(program, metadata={"name": "another"}).hash == program.hash
    variants = [
        dataclasses.replace(program, output=program.output - 1),
        dataclasses.replace(program, tensors=(TensorSpec((9, 9, 9), 0, 1), *program.tensors[1:])),
        dataclasses.replace(program, ops=program.ops[:-1]),
    ]
    for index, op in enumerate(program.ops):
        for field in dataclasses.fields(op):
            changed = dataclasses.replace(op, **{field.name: _other(getattr(op, field.name))})
            variants.append(
                dataclasses.replace(program, ops=(*program.ops[:index], changed, *program.ops[index + 1 :]))
            )
    hashes.update(variant.hash for variant in variants)
    assert len(hashes) == 1 + len(variants)


def test_the_hash_does_not_depend_on_the_storage_type() -> None:
    program = random_program(7)
    widened = [
        dataclasses.replace(op, weight=op.weight.astype(np.int64)) if isinstance(op, O.Conv2d) else op
        for op in program.ops
    ]
    assert dataclasses.replace(program, ops=tuple(widened)).hash == program.hash


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.safetensors"
    random_program(5).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArqError, match="altered"):
        IntegerProgram.load(path)


@pytest.mark.parametrize("content", [b"", b"not a program at all", b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_file_that_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "program.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArqError, match="not an integer program"):
        IntegerProgram.load(path)
    with pytest.raises(ArqError, match="No integer program"):
        IntegerProgram.load(tmp_path / "absent.safetensors")


def test_pixels_that_do_not_fit_are_refused() -> None:
    program = random_program(0)
    with pytest.raises(ArqError, match="shape"):
        program.run(np.zeros((1, 2, 2, 7), dtype=np.int16))
    with pytest.raises(ArqError, match="the proofs cover"):
        program.run(np.full((1, *program.input.shape), program.input.hi + 1, dtype=np.int32))


def _assemble(ops: tuple[O.Op, ...], spec: TensorSpec) -> IntegerProgram:
    return IntegerProgram(ops, infer(ops, spec), ops[-1].output)


def _other(value: object) -> object:
    """A different value of the same kind."""
    if isinstance(value, np.ndarray):
        changed = value.astype(np.int64)
        changed.flat[-1] += 1
        return changed
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] + 1)
    if isinstance(value, str):
        return "half_even" if value == "floor" else "floor"
    assert isinstance(value, int)
    return value + 1
