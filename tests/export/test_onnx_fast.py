"""Fast ONNX equals the interpreter on every logit, on any processor, and refuses where it could not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from arqsearch.errors import ArqError
from arqsearch.export import onnx_fast
from arqsearch.export.onnx_bytes import ByteGraph
from arqsearch.export.onnx_fast import check_fast, export_fast, fast_metadata, probe_pixels, run_fast
from arqsearch.export.onnx_strict import export_strict
from arqsearch.export.runtime import HASH_KEY, RANGE_KEY, VERSION_KEY
from arqsearch.integer import ops as O
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.export.networks import lowered
from tests.integer.interpreter import interpret
from tests.integer.random_programs import random_pixels, random_program
from tests.quantize.nets import NETS, Residual, build

SHAPE = (8, 8, 2)
FAST = {"conv", "codes"}


def assemble(ops: tuple[O.Op, ...], spec: TensorSpec) -> IntegerProgram:
    """Operations and a flatten at the end."""
    ops = (*ops, O.Flatten((ops[-1].output,), ops[-1].output + 1))
    return IntegerProgram(ops, infer(ops, spec), ops[-1].output)


def noisy(program: IntegerProgram, count: int, seed: int = 0) -> np.ndarray:
    """Uniform pixels over the program's range, and its extremes."""
    return random_pixels(program, seed, random_images=count)


@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("vnni", [False, True])
def test_random_programs_equal_the_interpreter(seed: int, vnni: bool, tmp_path: Path) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    plan = export_fast(program, tmp_path / "fast.onnx", vnni=vnni)
    logits = run_fast(tmp_path / "fast.onnx", pixels)
    assert logits.dtype == np.int32
    assert logits.tolist() == interpret(program, pixels)
    assert sum(plan.values()) >= sum(isinstance(op, O.Requantize) for op in program.ops) - 1


@pytest.mark.parametrize("seed", range(0, 80, 4))
def test_another_runtime_computes_the_same(seed: int, tmp_path: Path) -> None:
    """The proofs need float32 and ties to even, no kernel of onnxruntime."""
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    export_fast(program, tmp_path / "fast.onnx")
    with np.errstate(invalid="ignore"):
        (logits,) = ReferenceEvaluator(str(tmp_path / "fast.onnx")).run(None, {"pixels": pixels})
    assert logits.tolist() == interpret(program, pixels)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize("multiplier", ["31", "15", "pow2"])
@pytest.mark.parametrize("mode", ["wide", "clip"])
def test_lowered_networks(kind: type[nn.Module], rounding: str, multiplier: str, mode: str, tmp_path: Path) -> None:
    for bits in (((8, 8),), ((4, 4),), ((8, 8), (2, 4), (5, 3), (7, 8))):
        program = lowered(build(kind), SHAPE, bits, rounding=rounding, multiplier=multiplier, input_mode=mode)
        pixels = noisy(program, 40)
        export_fast(program, tmp_path / "fast.onnx")
        assert check_fast(tmp_path / "fast.onnx", program, pixels) == len(pixels) * program.num_classes


@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_powers_of_two_are_always_proven(rounding: str, bits: tuple[int, int], tmp_path: Path) -> None:
    program = lowered(build(Residual), SHAPE, (bits,), rounding=rounding, multiplier="pow2")
    assert set(export_fast(program, tmp_path / "fast.onnx")) <= FAST


def test_what_is_not_proven_runs_in_float64(tmp_path: Path) -> None:
    """255 steps of a general ratio among 2**18 accumulators."""
    weight = np.full((1, 1, 1, 8), 127, np.int8)
    conv = O.Conv2d((0,), 1, weight, np.zeros(1, np.int32), (1, 1), (0, 0, 0, 0), 1)
    op = O.Requantize((1,), 2, np.array([1118481063]), np.array([40]), "half_up", 0, 255)
    program = assemble((conv, op), TensorSpec((1, 1, 8), 0, 255))
    assert export_fast(program, tmp_path / "fast.onnx") == {"float64": 1}
    check_fast(tmp_path / "fast.onnx", program, noisy(program, 2000))


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
@pytest.mark.parametrize(("multiplier", "shift"), [(1, 1), (3, 2), (1518500250, 31), (1157450374, 30)])
@pytest.mark.parametrize(("lo", "hi"), [(0, 255), (-127, 127), (-300, 300), (5, 90)])
def test_every_pair_of_operands_of_a_sum(
    rounding: O.Rounding, multiplier: int, shift: int, lo: int, hi: int, tmp_path: Path
) -> None:
    """A branch of eleven bits and a shortcut whose rescale joins the sum: each of 256 by 256 pairs."""
    weight = np.array([[[[9, 0]]]], np.int8)
    ops = (
        O.Conv2d((0,), 1, weight, np.array([-1300], np.int32), (1, 1), (0, 0, 0, 0), 1),
        O.Requantize((1,), 2, np.array([1]), np.array([1]), rounding, -(2**15), 2**15 - 1),
        O.Slice((0,), 3, (0, 1, 1), (0, 1, 1), (1, 2, 1)),
        O.Requantize((3,), 4, np.array([multiplier]), np.array([shift]), rounding, -(2**15), 2**15 - 1),
        O.Add((2, 4), 5, lo, hi),
    )
    program = assemble(ops, TensorSpec((1, 1, 2), 0, 255))
    export_fast(program, tmp_path / "fast.onnx")
    pixels = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).reshape(-1, 1, 1, 2).astype(np.int16)
    check_fast(tmp_path / "fast.onnx", program, pixels, batch=4096)


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
def test_two_branches_without_a_shortcut(rounding: O.Rounding, tmp_path: Path) -> None:
    """Both operands of the sum are layers, each cut into two pieces."""
    weight = np.array([[[[11, -3]]]], np.int8)
    ops = (
        O.Conv2d((0,), 1, weight, np.array([-900], np.int32), (1, 1), (0, 0, 0, 0), 1),
        O.Requantize((1,), 2, np.array([1]), np.array([3]), rounding, -(2**15), 2**15 - 1),
        O.Conv2d((0,), 3, weight[..., ::-1].copy(), np.array([-880], np.int32), (1, 1), (0, 0, 0, 0), 1),
        O.Requantize((3,), 4, np.array([1]), np.array([3]), rounding, -(2**15), 2**15 - 1),
        O.Add((2, 4), 5, 0, 255),
    )
    program = assemble(ops, TensorSpec((1, 1, 2), 0, 255))
    assert export_fast(program, tmp_path / "fast.onnx") == {"conv": 2}
    assert len(layer_weights(tmp_path / "fast.onnx")) == 4
    pixels = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).reshape(-1, 1, 1, 2).astype(np.int16)
    check_fast(tmp_path / "fast.onnx", program, pixels, batch=4096)


@pytest.mark.parametrize("lo", [-7, 0])
def test_a_pad_before_a_maximum_keeps_its_constant(lo: int, tmp_path: Path) -> None:
    ops = (
        O.Pad2d((0,), 1, (0, 0, 1, 2), np.array([0, 0])),
        O.MaxPool2d((1,), 2, (1, 3), (1, 2), (0, 0, 1, 2)),
    )
    program = assemble(ops, TensorSpec((2, 4, 2), lo, -lo // 2 + 3))
    export_fast(program, tmp_path / "fast.onnx")
    check_fast(tmp_path / "fast.onnx", program, random_pixels(program, 3))


# ---- processors without VNNI -----------------------------------------------------------------


def convolution(top: int, shape: tuple[int, int, int] = (3, 3, 16)) -> IntegerProgram:
    """Weights of one size against bytes, requantized by a power of two."""
    weight = np.where(np.indices((16, 3, 3, 16)).sum(0) % 2, top, -top).astype(np.int8)
    weight[:, :, :, :8] = top
    conv = O.Conv2d((0,), 1, weight, np.arange(16, dtype=np.int32), (1, 1), (1, 1, 1, 1), 1)
    shift = max(0, (top * 9 * 16).bit_length() - 1)
    op = O.Requantize((1,), 2, np.array([1]), np.array([shift]), "half_even", 0, 255)
    return assemble((conv, op), TensorSpec(shape, 0, 255))


def layer_weights(path: Path) -> list[np.ndarray]:
    """Weights of every QLinearConv as it reads them, less the zero point; asserts that no pair can saturate."""
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    found = []
    for node in graph.node:
        assert node.op_type != "ConvInteger" or constants[node.input[1]].data_type != onnx.TensorProto.INT8
        if node.op_type == "QLinearConv":
            name = casts[node.input[3]].input[0] if node.input[3] in casts else node.input[3]
            values = numpy_helper.to_array(constants[name]).astype(np.int64)
            zero = numpy_helper.to_array(constants[node.input[5]])
            if zero.dtype == np.int8:
                rows = np.sort(values.reshape(len(values), -1), axis=1)
                assert rows[:, -2:].clip(0).sum(1).max() * 255 <= 2**15 - 1
                assert rows[:, :2].clip(None, 0).sum(1).min() * 255 >= -(2**15)
            found.append(values - int(zero))
    return found


@pytest.mark.parametrize("top", [1, 7, 64, 65, 127])
def test_the_weights_cannot_saturate_16_bits(top: int, tmp_path: Path) -> None:
    program = convolution(top)
    export_fast(program, tmp_path / "fast.onnx")
    (weight,) = layer_weights(tmp_path / "fast.onnx")
    assert np.array_equal(weight, program.ops[0].weight.transpose(0, 3, 1, 2))
    assert json.loads(fast_metadata(tmp_path / "fast.onnx")[onnx_fast.OPTIONS_KEY]) == {}
    check_fast(tmp_path / "fast.onnx", program, random_pixels(program, top, 20))


def test_int8_weights_name_the_option_that_makes_them_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, path = convolution(127), tmp_path / "fast.onnx"
    export_fast(program, path, vnni=True)
    assert json.loads(fast_metadata(path)[onnx_fast.OPTIONS_KEY]) == onnx_fast.PRECISION_OPTION
    for saturates in (False, True):
        opened: list[Any] = []
        real = onnx_fast.load_model

        def counted(*arguments: Any, opened: list[Any] = opened, real: Any = real, **options: Any) -> Any:
            opened.append(options.get("entries"))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(onnx_fast, "saturates", lambda saturates=saturates: saturates)
            patch.setattr(onnx_fast, "load_model", counted)
            check_fast(path, program, random_pixels(program, 5, 20))
        assert opened == [None, onnx_fast.PRECISION_OPTION][: 1 + saturates]


def test_saturation_is_told_from_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's sum is 200 steps when it is exact, about a half when pairs stop at 2**15 - 1."""
    onnx_fast.saturates.cache_clear()
    exact = onnx_fast.saturates()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "flags" in flags:
        assert exact == (not any(name in flags for name in ("avx512_vnni", "avx_vnni", "amx_int8")))

    class Saturating:
        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((1, 64, 1, 1), 200 * (2**15 - 1) // (2 * 127 * 255), np.uint8)]

    onnx_fast.saturates.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(onnx_fast, "open_session", lambda model: Saturating())
        assert onnx_fast.saturates()
    onnx_fast.saturates.cache_clear()


def test_a_session_with_other_logits_is_refused(tmp_path: Path) -> None:
    """Weights that were changed stand for a kernel that computes something else."""
    program, path = convolution(7), tmp_path / "fast.onnx"
    export_fast(program, path)
    model = onnx.load(str(path))
    (weight,) = (tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.raw_data = bytes([weight.raw_data[0] ^ 0x40, *weight.raw_data[1:]])
    onnx.save(model, str(path))
    with pytest.raises(ArqError, match="computes other logits on this processor"):
        run_fast(path, random_pixels(program, 8))


# ---- files -----------------------------------------------------------------------------------


def test_the_model_names_its_program_and_plan(tmp_path: Path) -> None:
    program, path = random_program(6), tmp_path / "deep" / "fast.onnx"
    plan = export_fast(program, path)
    meta = fast_metadata(path)
    assert meta[HASH_KEY] == program.hash and meta[VERSION_KEY] == str(ARITHMETIC_VERSION)
    assert json.loads(meta[RANGE_KEY]) == [program.input.lo, program.input.hi]
    assert json.loads(meta[onnx_fast.PLAN_KEY]) == plan and sum(plan.values()) > 0
    with pytest.raises(ArqError, match=f"states program {program.hash[:12]}, this is"):
        run_fast(path, random_pixels(program, 6), program=random_program(7))


def test_check_counts_and_finds_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, path = random_program(9), tmp_path / "fast.onnx"
    pixels = random_pixels(program, 9)
    export_fast(program, path)
    assert check_fast(path, program, pixels) == len(pixels) * program.num_classes
    wrong = program.run(pixels)
    wrong[0, 0] += 1
    monkeypatch.setattr(IntegerProgram, "run", lambda self, images: wrong)
    with pytest.raises(ArqError, match=f"1 of {wrong.numel()} logits differ"):
        check_fast(path, program, pixels)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_stored_in_their_bits(bits: int, tmp_path: Path) -> None:
    program = convolution(2 ** (bits - 1) - 1)
    export_fast(program, tmp_path / "fast.onnx")
    tensors = {t.data_type: len(t.raw_data) for t in onnx.load(str(tmp_path / "fast.onnx")).graph.initializer
               if len(t.dims) == 4}  # fmt: skip
    stored = 4 if bits == 2 and not hasattr(onnx.TensorProto, "INT2") else bits
    kind = getattr(onnx.TensorProto, {2: "INT2", 4: "INT4", 8: "UINT8"}[stored])
    assert tensors == {kind: 16 * 9 * 16 * stored // 8}


@pytest.mark.parametrize("seed", [4, 9])
def test_logits_do_not_depend_on_batch_or_threads(seed: int, tmp_path: Path) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed, random_images=6)
    export_fast(program, tmp_path / "fast.onnx")
    expected = run_fast(tmp_path / "fast.onnx", pixels)
    for batch, threads in ((1, 1), (2, 1), (64, 2)):
        assert np.array_equal(run_fast(tmp_path / "fast.onnx", pixels, batch=batch, threads=threads), expected)
    assert run_fast(tmp_path / "fast.onnx", pixels[:0]).shape == (0, program.num_classes)


def test_the_file_depends_on_the_program_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_fast(random_program(8), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_known_images_reach_both_ends_and_lie_within() -> None:
    for lo, hi in ((0, 255), (-584, 839), (-(2**15), 2**15 - 1)):
        pixels = probe_pixels(TensorSpec((9, 9, 3), lo, hi))
        assert pixels.dtype == np.int16 and pixels.min() == lo and pixels.max() == hi
        assert len(np.unique(pixels)) > 60


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    program, path = random_program(0), tmp_path / "fast.onnx"
    export_fast(program, path)
    with pytest.raises(ArqError, match="takes integer pixels of shape"):
        run_fast(path, np.zeros((1, *program.input.shape)))
    with pytest.raises(ArqError, match="the proofs cover"):
        run_fast(path, np.full((1, *program.input.shape), program.input.hi + 1))
    with pytest.raises(ArqError, match="No ONNX model"):
        run_fast(tmp_path / "absent.onnx", np.zeros((1, 1, 1, 1), dtype=np.int16))
    export_strict(program, tmp_path / "strict.onnx")
    with pytest.raises(ArqError, match="was not written by `arqsearch export --format onnx-fast`"):
        run_fast(tmp_path / "strict.onnx", random_pixels(program, 0))


def test_what_no_form_can_hold_is_refused(tmp_path: Path) -> None:
    op = O.InputQuantize((0,), 1, np.array([-(2**30)]), np.array([0]), 0, "floor", -100, 100, -300, 5)
    with pytest.raises(ArqError, match=r"cannot hold the result of InputQuantize.*larger shift"):
        export_fast(assemble((op,), TensorSpec((1, 1, 1), -100, 100)), tmp_path / "fast.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_an_absent_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, path = random_program(0), tmp_path / "fast.onnx"
    export_fast(program, path)
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ArqError, match=f"pip install {package}"):
        export_fast(program, path) if package == "onnx" else run_fast(path, random_pixels(program, 0))


def test_many_images_equal_the_torch_backend(tmp_path: Path) -> None:
    """The program's own run may be the native engine; this one is the reference."""
    program = lowered(build(Residual), SHAPE)
    pixels = noisy(program, 500)
    export_fast(program, tmp_path / "fast.onnx")
    expected = program.run(torch.from_numpy(pixels), backend="torch").numpy()
    assert np.array_equal(run_fast(tmp_path / "fast.onnx", pixels), expected)


def test_weights_alone(tmp_path: Path) -> None:
    """int8 is chosen exactly where no pair can saturate, whatever the largest byte is."""
    program = random_program(0)
    for largest, top in ((15, 127), (127, 127), (128, 127), (255, 64), (255, 65)):
        graph = ByteGraph(onnx, program, False, lambda graph, tensor: "")
        graph.weights(np.full((2, 2, 1, 1), top), largest)
        kinds = {tensor.data_type for tensor in graph.initializers}
        exact = 2 * top * largest <= 2**15 - 1
        assert kinds == {onnx.TensorProto.INT8 if exact else onnx.TensorProto.UINT8}
