"""Every registered family: convert, calibrate, lower at mixed bits, prove, and run to the same integers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arqsearch import models
from arqsearch.export.onnx_strict import export_strict, run_strict
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import prove
from arqsearch.quantize.bitwidths import ALL_BITS, BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from tests.integer.interpreter import interpret

CLASSES, NOISE = 7, 300
#: Name, image side, channels, options, settings, and whether the interpreter (True) or onnxruntime repeats it.
FAMILIES: list[tuple[str, int, int, dict[str, Any], dict[str, Any], bool]] = [
    ("cnn_tiny", 8, 1, {}, {"input_mode": "clip"}, True),
    ("cnn_small", 8, 1, {"width": 4}, {"rounding": "floor"}, True),
    ("cnn_medium", 8, 1, {"width": 4, "batch_norm": False}, {"multiplier": "15"}, True),
    ("cnn_qaibp_small", 13, 1, {"width": 2}, {"input_mode": "clip"}, True),
    ("cnn_residual", 8, 3, {"width": 4}, {"input_mode": "clip", "multiplier": "pow2"}, True),
    ("resnet20", 8, 3, {"width": 4}, {"rounding": "half_even"}, True),
    ("mobilenet_v2", 8, 3, {"strides": "cifar", "width_mult": 0.1}, {}, True),
    ("resnet20", 32, 3, {}, {}, False),
    ("resnet18", 64, 3, {}, {}, False),
    ("resnet50", 32, 3, {}, {}, False),
    ("mobilenet_v2", 64, 3, {}, {}, False),
    ("mobilenet_v2", 32, 3, {"strides": "cifar", "width_mult": 0.5}, {"input_mode": "clip"}, False),
    ("efficientnet_lite0", 64, 3, {}, {}, False),
]


def network(name: str, side: int, channels: int, options: dict[str, Any], settings: dict[str, Any]) -> QuantizedNet:
    """A network with random weights and lively batch norms, calibrated on random pixels."""
    shape = (side, side, channels)
    model = models.build(name, CLASSES, **{**models.image_options(name, shape), **options})
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.bias.normal_(0.0, 0.2, generator=generator)
            module.running_mean.normal_(0.0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
    normal = models.default_normalization(name, channels)
    net = QuantizedNet(model, (channels, side, side), normal.mean, normal.std, QuantizeSettings(**settings)).eval()
    scale_to_unit_variance(net, images(net, 4))
    net.calibrate([images(net, 4)])
    return net


def images(net: QuantizedNet, count: int) -> Tensor:
    """Random pixels ``(N, C, H, W)`` in grey levels, smooth enough that logits differ."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, net.input_shape[0], 2, 2), generator=generator)
    fine = torch.rand((count, *net.input_shape), generator=generator)
    grown = torch.nn.functional.interpolate(coarse, size=net.input_shape[1:], mode="nearest")
    return (255 * (0.6 * grown + 0.4 * fine)).round()


@torch.no_grad()
def scale_to_unit_variance(net: QuantizedNet, pixels: Tensor) -> None:
    """Statistics near those of the data, as training leaves them; otherwise deep random networks explode."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.8
            module.train()
    net.quantized = False
    net(pixels)
    net.eval()
    net.quantized = True


def mixed(net: QuantizedNet, seed: int) -> BitWidths:
    source = random.Random(seed)
    return BitWidths.from_mapping(
        [(n, (source.choice(ALL_BITS), source.choice(ALL_BITS))) for n in net.bitwidths.names]
    )


def int_pixels(net: QuantizedNet, program: IntegerProgram, count: int) -> np.ndarray:
    """Noisy images, the last one at both ends of the proven range."""
    generator = np.random.default_rng(0)
    pixels = images(net, count).permute(0, 2, 3, 1).numpy().astype(np.int16)
    pixels += generator.integers(-60, 61, pixels.shape).astype(np.int16)
    pixels[-1] = generator.choice([program.input.lo, program.input.hi], pixels[-1].shape)
    return pixels


@pytest.mark.parametrize(
    ("name", "side", "channels", "options", "settings", "small"), FAMILIES, ids=lambda v: str(v) if v != {} else "-"
)
def test_a_family_goes_all_the_way(
    name: str, side: int, channels: int, options: dict[str, Any], settings: dict[str, Any], small: bool, tmp_path: Path
) -> None:
    net = network(name, side, channels, options, settings)
    # At 8 bits the program decides as the fake-quantized network does.
    pixels = images(net, 4)
    with torch.no_grad():
        fake = net(pixels)
    assert len({tuple(row) for row in fake.tolist()}) == 4 and fake.std() > 0, "the images are told apart"
    program = lower(net, noise_limit=NOISE)
    logits = program.run(pixels.permute(0, 2, 3, 1).to(torch.int16)) * program.metadata["logit_scale"]
    top = fake.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 0.2 * fake.std()
    assert clear.any()
    assert torch.equal(logits.argmax(1)[clear], fake.argmax(1)[clear])
    assert (logits - fake).abs().mean() < 0.1 * fake.std()
    # At mixed bits every range is proven and another implementation computes the same integers.
    bits = mixed(net, len(net.bitwidths))
    net.set_bitwidths(bits)
    program = lower(net, noise_limit=NOISE)
    assert prove(program).program_hash == program.hash
    assert (program.input.lo, program.input.hi) == (-NOISE, 255 + NOISE)
    assert program.metadata["bitwidths"] == {layer: list(pair) for layer, pair in bits}
    noisy = int_pixels(net, program, 2)
    got = program.run(noisy)
    if small:
        assert got.tolist() == interpret(program, noisy)
    else:
        export_strict(program, tmp_path / "strict.onnx")
        assert np.array_equal(got.numpy(), run_strict(tmp_path / "strict.onnx", noisy))


def test_every_family_is_here() -> None:
    families = {"resnet32": "resnet20", "resnet44": "resnet20", "resnet56": "resnet20", "resnet110": "resnet20",
                "resnet34": "resnet18", "cnn_qaibp": "cnn_qaibp_small"}  # fmt: skip
    assert {families.get(name, name) for name in models.available()} == {row[0] for row in FAMILIES}


@pytest.mark.parametrize("name", ["resnet32", "resnet110", "resnet34"])
def test_deeper_members_of_a_family_convert(name: str) -> None:
    net = QuantizedNet(models.build(name, CLASSES), (3, 32, 32), (0.5,) * 3, (0.25,) * 3, QuantizeSettings())
    depth = int(name.removeprefix("resnet"))
    # One layer a step of depth; projected shortcuts (three, in resnet34) come on top.
    assert len(net.layer_infos) == depth + (3 if depth == 34 else 0)
