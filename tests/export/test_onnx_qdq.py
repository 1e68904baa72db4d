"""The QDQ model carries the network's numbers: it follows fake quantization, in range and type, on two runtimes."""

from __future__ import annotations

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
from arqsearch.export.onnx_qdq import BITS_KEY, NOTE_KEY, export_qdq, run_qdq
from arqsearch.export.runtime import HASH_KEY
from arqsearch.integer import ops as O
from arqsearch.integer.lowering import lower
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.quantizers import code_range
from tests.quantize.nets import NETS, Bottleneck, Plain, Residual, build

SHAPE, MEAN, STD = (2, 8, 8), (0.4, 0.55), (0.25, 0.3)


def quantized(kind: type[nn.Module], bits: tuple[int, int], **settings: Any) -> QuantizedNet:
    """A network calibrated on pixels."""
    net = QuantizedNet(build(kind), SHAPE, MEAN, STD, QuantizeSettings(**settings)).eval()
    net.calibrate([torch.from_numpy(images(64, 1)).permute(0, 3, 1, 2).float()])
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, *bits))
    return net


def images(count: int, seed: int, noise: int = 0) -> np.ndarray:
    """Pixels NHWC, int16, with uniform noise."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 8, 8, 2)) + generator.integers(-noise, noise + 1, (count, 8, 8, 2))
    return pixels.astype(np.int16)


def fake(net: QuantizedNet, pixels: np.ndarray) -> np.ndarray:
    """Logits of the fake-quantized network."""
    with torch.no_grad():
        return net(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).numpy()


def check_close(got: np.ndarray, expected: np.ndarray, different: float = 0.05) -> None:
    """Few images differ at all, and those by the few codes that a tie can move.

    :param different: largest part of the images with another logit.
    """
    spread = expected.std()
    assert got.shape == expected.shape and got.dtype == np.float32 and spread > 0
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.95
    assert np.abs(got - expected).mean() <= 0.01 * spread
    assert (np.abs(got - expected).max(1) > 1e-3 * spread).mean() <= different


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("mode", ["wide", "clip"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 3), (5, 2)])
def test_follows_fake_quantization(kind: type[nn.Module], mode: str, bits: tuple[int, int], tmp_path: Path) -> None:
    net, pixels = quantized(kind, bits, input_mode=mode), images(200, 2, noise=40)
    export_qdq(net, tmp_path / "qdq.onnx")
    check_close(run_qdq(tmp_path / "qdq.onnx", pixels), fake(net, pixels))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("rounding", "different"), [("half_even", 0.05), ("floor", 0.1)])
def test_follows_other_roundings(kind: type[nn.Module], rounding: str, different: float, tmp_path: Path) -> None:
    """Rounding down breaks at zero, which sums of products hit more often than a half."""
    net, pixels = quantized(kind, (4, 5), rounding=rounding, residual_bits=6), images(200, 3)
    export_qdq(net, tmp_path / "qdq.onnx")
    check_close(run_qdq(tmp_path / "qdq.onnx", pixels), fake(net, pixels), different)


@pytest.mark.parametrize("kind", NETS)
def test_another_runtime_computes_the_same(kind: type[nn.Module], tmp_path: Path) -> None:
    net, pixels = quantized(kind, (3, 6)), images(20, 4)
    export_qdq(net, tmp_path / "qdq.onnx")
    (logits,) = ReferenceEvaluator(onnx.load(tmp_path / "qdq.onnx")).run(None, {"pixels": pixels.astype(np.float32)})
    expected = run_qdq(tmp_path / "qdq.onnx", pixels)
    assert np.isclose(logits, expected, rtol=1e-4, atol=1e-3 * expected.std()).all(1).mean() >= 0.95


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_clipped_pixels_have_exactly_the_program_s_codes(bits: int, tmp_path: Path) -> None:
    """Every grey level, ties included: the code of the model is that of the program's input operation."""
    net = quantized(Plain, (8, bits), input_mode="clip")
    export_qdq(net, tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    first = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("t"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], onnx.TensorProto.INT8, None))
    grey = np.arange(-20, 280, dtype=np.float32)
    pixels = np.resize(grey, (3, 8, 8, 2))
    codes = ReferenceEvaluator(model).run([first.input[0]], {"pixels": pixels})[0]
    op = next(op for op in lower(net).ops if isinstance(op, O.InputQuantize))
    centred = np.clip(pixels, op.pre_lo, op.pre_hi).astype(np.int64) + op.offset
    half = (1 << op.shift) >> 1
    expected = np.clip((centred + half) >> op.shift, op.lo, op.hi)
    assert codes.transpose(0, 2, 3, 1).tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [(2, 3), (4, 4), (5, 8)])
def test_stored_numbers_are_the_program_s(bits: tuple[int, int], tmp_path: Path) -> None:
    net = quantized(Residual, bits)
    export_qdq(net, tmp_path / "qdq.onnx")
    graph = onnx.load(tmp_path / "qdq.onnx").graph
    stored = {t.name: t for t in graph.initializer}
    convolutions = [op for op in lower(net).ops if isinstance(op, O.Conv2d)]
    for name, op in zip(["stem", "conv1", "conv2"], convolutions, strict=True):
        weight = stored[f"{name}.weight"]
        assert weight.data_type == (onnx.TensorProto.INT4 if bits[0] <= 4 else onnx.TensorProto.INT8)
        codes = numpy_helper.to_array(weight).astype(np.int64)
        assert codes.transpose(0, 2, 3, 1).tolist() == op.weight.tolist()
        scales = numpy_helper.to_array(stored[f"{name}.weight_scale"])
        assert scales.tolist() == net.layer(name).weight_scale().tolist()
        assert numpy_helper.to_array(stored[f"{name}.bias"]).tolist() == op.bias.tolist()
    assert numpy_helper.to_array(stored["out.weight_scale"]).shape == ()


@pytest.mark.parametrize(("kind", "bits"), [(Residual, (8, 3)), (Bottleneck, (3, 8)), (Plain, (8, 2))])
def test_codes_stay_in_the_range_of_their_bits(kind: type[nn.Module], bits: tuple[int, int], tmp_path: Path) -> None:
    net, pixels = quantized(kind, bits), images(30, 5, noise=200)
    with torch.no_grad():
        for parameter in net.quantizer_parameters():
            parameter.mul_(0.95 + 0.1 * torch.rand_like(parameter))
    export_qdq(net, tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [n.input for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    pairs = [names for names in pairs if constants[names[2]].dtype != np.int16]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(names[0]) for names in pairs)
    values = ReferenceEvaluator(model).run([names[0] for names in pairs], {"pixels": pixels.astype(np.float32)})
    found = {float(constants[names[1]]): codes for names, codes in zip(pairs, values, strict=True)}
    tables = [(net.layer(name).activation, pair.activation) for name, pair in net.bitwidths]
    tables += [(net.stream(name), 8) for name in net.graph.streams]
    assert len(found) == len(pairs) == len(tables)
    for table, width in tables:
        codes, (low, high) = found[table.step(width).item()], code_range(width, table.signed)
        assert codes.dtype == (np.int8 if table.signed else np.uint8)
        assert low <= codes.min() and codes.max() <= high
    first = found[tables[0][0].step(bits[1]).item()]
    assert {first.min(), first.max()} == set(code_range(bits[1], True)), "the noise reaches both ends"


def test_integer_pixels_are_accepted_and_checked(tmp_path: Path) -> None:
    net, pixels = quantized(Plain, (4, 4)), images(10, 6)
    export_qdq(net, tmp_path / "float.onnx")
    export_qdq(net, tmp_path / "int16.onnx", "int16")
    export_qdq(net, tmp_path / "uint8.onnx", "uint8")
    expected = run_qdq(tmp_path / "float.onnx", pixels)
    for name in ("int16", "uint8"):
        logits = run_qdq(tmp_path / f"{name}.onnx", pixels, batch=3)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * expected.std())
    with pytest.raises(ArqError, match="uint8 pixels"):
        run_qdq(tmp_path / "uint8.onnx", pixels - 300)
    with pytest.raises(ArqError, match="no whole numbers"):
        run_qdq(tmp_path / "int16.onnx", pixels + 0.5)
    with pytest.raises(ArqError, match=r"shape \(N, 8, 8, 2\)"):
        run_qdq(tmp_path / "float.onnx", pixels.transpose(0, 3, 1, 2))
    assert run_qdq(tmp_path / "float.onnx", pixels[:0]).shape == (0, 5)


def test_unknown_pixel_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="Did you mean 'float32'"):
        export_qdq(quantized(Plain, (8, 8)), tmp_path / "qdq.onnx", "float16")  # type: ignore[arg-type]


def test_metadata_names_the_program_and_the_limits(tmp_path: Path) -> None:
    net = quantized(Bottleneck, (4, 6))
    program = lower(net, noise_limit=10)
    export_qdq(net, tmp_path / "new" / "qdq.onnx", program=program)
    facts = {p.key: p.value for p in onnx.load(tmp_path / "new" / "qdq.onnx").metadata_props}
    assert facts[HASH_KEY] == program.hash
    assert BitWidths.from_json(facts[BITS_KEY]) == net.bitwidths
    assert "Not bit-exact" in facts[NOTE_KEY] and "rounding at ties" in facts[NOTE_KEY]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="No ONNX model"):
        run_qdq(tmp_path / "absent.onnx", images(1, 0))
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ArqError, match="cannot load"):
        run_qdq(tmp_path / "broken.onnx", images(1, 0))
