"""Strict ONNX equals the interpreter on every logit, holds no float, and survives the worst cases of its kernels."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from arqsearch.errors import ArqError
from arqsearch.export.onnx_strict import export_strict, run_strict, strict_metadata
from arqsearch.export.runtime import HASH_KEY, RANGE_KEY, VERSION_KEY
from arqsearch.integer import ops as O
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.integer.interpreter import interpret
from tests.integer.random_programs import random_pixels, random_program

NO_PADDING = (0, 0, 0, 0)
INTEGERS = {
    getattr(onnx.TensorProto, name)
    for name in ("INT8", "INT16", "INT32", "INT64", "UINT4", "UINT8", "UINT32", "UINT64")
}


def check(program: IntegerProgram, pixels: np.ndarray, path: Path) -> onnx.ModelProto:
    """Export, run, compare every logit; return the model."""
    export_strict(program, path / "strict.onnx")
    logits = run_strict(path / "strict.onnx", pixels)
    assert logits.dtype == np.int32
    assert logits.tolist() == interpret(program, pixels)
    return onnx.load(path / "strict.onnx")


def assemble(ops: tuple[O.Op, ...], spec: TensorSpec) -> IntegerProgram:
    """Operations and a flatten at the end."""
    ops = (*ops, O.Flatten((ops[-1].output,), ops[-1].output + 1))
    return IntegerProgram(ops, infer(ops, spec), ops[-1].output)


def bias(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32) - 2


@pytest.mark.parametrize("seed", range(80))
def test_random_programs_equal_the_interpreter(seed: int, tmp_path: Path) -> None:
    program = random_program(seed)
    check(program, random_pixels(program, seed), tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_no_tensor_is_a_float(seed: int, tmp_path: Path) -> None:
    export_strict(random_program(seed), tmp_path / "strict.onnx")
    model = onnx.load(tmp_path / "strict.onnx")
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {name for node in graph.node for name in (*node.input, *node.output)} <= set(kinds), "a type is unknown"
    assert set(kinds.values()) <= INTEGERS
    assert not [
        attribute.name
        for node in graph.node
        for attribute in node.attribute
        if attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS, onnx.AttributeProto.TENSOR)
    ]


@pytest.mark.parametrize(("lo", "hi"), [(0, 255), (-128, 127), (-255, 0), (-1, 255), (-(2**15), 2**15 - 1)])
@pytest.mark.parametrize("extreme", [127, -127, -128, "alternating"])
@pytest.mark.parametrize("groups", [1, 8])
def test_extreme_products_do_not_saturate(lo: int, hi: int, extreme: int | str, groups: int, tmp_path: Path) -> None:
    """Pairs of products of up to 255*128 leave int16, where byte kernels may saturate; zeros are padded around."""
    shape = (8, 3, 3, 8 // groups)
    weight = np.where(np.indices(shape).sum(0) % 2, 127, -128) if extreme == "alternating" else np.full(shape, extreme)
    op = O.Conv2d((0,), 1, weight.astype(np.int8), bias(8), (1, 1), (1, 1, 1, 1), groups)
    program = assemble((op,), TensorSpec((3, 3, 8), lo, hi))
    check(program, random_pixels(program, 1), tmp_path)


@pytest.mark.parametrize("weight", [127, -128, 7, -8, 2**15 - 1, -(2**15)])
@pytest.mark.parametrize("features", [1, 2, 65])
def test_linear_with_extreme_weights(weight: int, features: int, tmp_path: Path) -> None:
    layer = O.Linear((1,), 2, np.full((3, features), weight, dtype=np.int16), bias(3))
    ops = (O.Flatten((0,), 1), layer)
    program = IntegerProgram(ops, infer(ops, TensorSpec((1, 1, features), -300, 500)), 2)
    check(program, random_pixels(program, 2), tmp_path)


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize(
    ("multiplier", "shift"), [(1, 1), (1, 5), (3, 3), (2**15 - 1, 18), (2**31 - 1, 34), (2**31 - 1, 62), (2**31 - 1, 1)]
)
def test_requantization_of_every_accumulator_in_a_range(
    rounding: O.Rounding, multiplier: int, shift: int, tmp_path: Path
) -> None:
    op = O.Requantize((0,), 1, np.array([multiplier]), np.array([shift]), rounding, -20, 27)
    pixels = np.arange(-300, 301).reshape(-1, 1, 1, 1)
    check(assemble((op,), TensorSpec((1, 1, 1), -300, 300)), pixels, tmp_path)


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
def test_results_around_four_billion_are_clipped(rounding: O.Rounding, tmp_path: Path) -> None:
    """Between 2**31 and 2**33 onnxruntime's own int64 Clip fails on x86; one channel always saturates."""
    op = O.Requantize((1,), 2, np.array([2**31 - 1, 2**31 - 1, 3]), np.array([20, 24, 1]), rounding, -31, 31)
    weight = np.eye(3, dtype=np.int64).reshape(3, 1, 1, 3)
    weight[1] = 0
    conv = O.Conv2d((0,), 1, weight, np.array([0, 10**6, 0]), (1, 1), NO_PADDING, 1)
    pixels = np.arange(-3000, 3000, 7).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    check(assemble((conv, op), TensorSpec((1, 1, 3), -3000, 3000)), pixels, tmp_path)


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
def test_shifts_at_the_edge_of_int64(rounding: O.Rounding, tmp_path: Path) -> None:
    """Products near ±2**62 with shift 62: made non-negative they would leave int64, so remainders are used."""
    weight = np.full((1, 1, 1, 2), 2**15 - 1, dtype=np.int16)
    conv = O.Conv2d((0,), 1, weight, np.array([0], dtype=np.int32), (1, 1), NO_PADDING, 1)
    op = O.Requantize((1,), 2, np.array([2**31 - 1]), np.array([62]), rounding, -3, 3)
    program = assemble((conv, op), TensorSpec((1, 1, 2), -(2**15), 2**15 - 1))
    pixels = np.array([[-(2**15)] * 2, [2**15 - 1] * 2, [-(2**14), -(2**14) - 1], [2**14, 2**14 + 1], [0, 0], [-1, 0]])
    model = check(program, pixels.reshape(-1, 1, 1, 2), tmp_path)
    shifts = [node for node in model.graph.node if node.op_type == "BitShift"]
    assert len(shifts) == {"floor": 1, "half_up": 0, "half_even": 1}[rounding]


def test_what_has_no_place_in_int32_is_refused(tmp_path: Path) -> None:
    op = O.InputQuantize((0,), 1, np.array([-(2**30)]), np.array([0]), 0, "floor", -100, 100, -5, 5)
    with pytest.raises(ArqError, match=r"cannot hold the result of InputQuantize.*larger shift"):
        export_strict(assemble((op,), TensorSpec((1, 1, 1), -100, 100)), tmp_path / "strict.onnx")


@pytest.mark.parametrize("lo", [-7, 0, -3000])
def test_a_pad_before_a_maximum_keeps_its_constant(lo: int, tmp_path: Path) -> None:
    """onnxruntime merges Pad into MaxPool although the padded zero may be the maximum."""
    ops = (
        O.Pad2d((0,), 1, (0, 0, 1, 2), np.array([0, 0])),
        O.MaxPool2d((1,), 2, (1, 3), (1, 2), (0, 0, 1, 2)),
    )
    program = assemble(ops, TensorSpec((2, 4, 2), lo, -lo // 2 + 3))
    check(program, random_pixels(program, 3), tmp_path)


def test_weights_of_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    sizes = []
    for top in (7, 8):
        weight = np.full((64, 3, 3, 64), top, dtype=np.int8)
        op = O.Conv2d((0,), 1, weight, bias(64), (1, 1), NO_PADDING, 1)
        program = assemble((op,), TensorSpec((3, 3, 64), 0, 15))
        check(program, random_pixels(program, 4, random_images=0)[:2], tmp_path)
        sizes.append((tmp_path / "strict.onnx").stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(64 * 3 * 3 * 64 / 2, rel=0.05)


@pytest.mark.parametrize("seed", [4, 9])
def test_logits_do_not_depend_on_batch_or_threads(seed: int, tmp_path: Path) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed, random_images=6)
    export_strict(program, tmp_path / "strict.onnx")
    expected = run_strict(tmp_path / "strict.onnx", pixels)
    for batch, threads in ((1, 1), (2, 1), (64, 2)):
        assert np.array_equal(run_strict(tmp_path / "strict.onnx", pixels, batch=batch, threads=threads), expected)
    assert run_strict(tmp_path / "strict.onnx", pixels[:0]).shape == (0, program.num_classes)


def test_the_model_names_its_program(tmp_path: Path) -> None:
    program = random_program(6)
    export_strict(program, tmp_path / "deep" / "strict.onnx")
    meta = strict_metadata(tmp_path / "deep" / "strict.onnx")
    assert meta[HASH_KEY] == program.hash
    assert meta[VERSION_KEY] == str(ARITHMETIC_VERSION)
    assert json.loads(meta[RANGE_KEY]) == [program.input.lo, program.input.hi]


def test_the_file_depends_on_the_program_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_strict(random_program(8), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    for seed in (12, 13):
        program = random_program(seed)
        check(program, random_pixels(program, seed), tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    program = random_program(0)
    path = tmp_path / "strict.onnx"
    export_strict(program, path)
    with pytest.raises(ArqError, match="takes integer pixels of shape"):
        run_strict(path, np.zeros((1, 9, 9, 9), dtype=np.int16))
    with pytest.raises(ArqError, match="takes integer pixels of shape"):
        run_strict(path, np.zeros((1, *program.input.shape)))
    with pytest.raises(ArqError, match="the proofs cover"):
        run_strict(path, np.full((1, *program.input.shape), program.input.hi + 1))
    with pytest.raises(ArqError, match="No ONNX model"):
        run_strict(tmp_path / "absent.onnx", np.zeros((1, 1, 1, 1), dtype=np.int16))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ArqError, match="cannot load"):
        run_strict(tmp_path / "broken.onnx", np.zeros((1, 1, 1, 1), dtype=np.int16))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_an_absent_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = random_program(0)
    path = tmp_path / "strict.onnx"
    export_strict(program, path)
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ArqError, match=f"pip install {package}"):
        export_strict(program, path) if package == "onnx" else run_strict(path, random_pixels(program, 0))
