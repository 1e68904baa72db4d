"""Interval bounds in training: they contain what they bound, follow the integer program, and keep a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arqsearch.certify.linf.boxes import IntervalBounds, box
from arqsearch.integer.lowering import lower
from arqsearch.quantize import intervals
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.intervals import bounded_forward, interval_margins
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from tests.quantize.nets import NETS, Plain, build

MODES: tuple[dict[str, Any], ...] = (
    {"input_mode": "clip"},
    {"input_mode": "wide"},
    {"input_mode": "clip", "multiplier": "pow2"},
    {"input_mode": "clip", "rounding": "half_even"},
)
#: Cycled over the layers, so that neighbours differ.
MIXED = [(8, 8), (4, 6), (3, 5), (2, 4)]


def network(
    kind: type[nn.Module], settings: dict[str, Any] | None = None, bits: list[tuple[int, int]] | None = None
) -> tuple[QuantizedNet, np.ndarray]:
    """A calibrated network in double precision, where float rounding hides no error; and uint8 images."""
    net = QuantizedNet(build(kind), (2, 8, 8), (0.4, 0.55), (0.25, 0.3), QuantizeSettings(**(settings or {})))
    images = np.random.default_rng(1).integers(0, 256, (32, 8, 8, 2), dtype=np.uint8)
    net.calibrate([pixels(images).float()])
    net = net.double().eval()
    names = net.bitwidths.names
    cycle = bits or [(8, 8)]
    net.set_bitwidths(BitWidths.from_mapping([(name, cycle[i % len(cycle)]) for i, name in enumerate(names)]))
    return net, images


def pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)


def differences(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]) - logits


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("settings", MODES, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("bits", [[(8, 8)], MIXED], ids=["8-8", "mixed"])
def test_bounds_contain_random_points(
    kind: type[nn.Module], settings: dict[str, Any], bits: list[tuple[int, int]]
) -> None:
    """24 parameter sets of 32 boxes and 16 points each: more than 10,000 points in all."""
    net, images = network(kind, settings, bits)
    labels = torch.arange(32) % 5
    generator = np.random.default_rng(2)
    for epsilon in (1, 6):
        low, high = box(images, epsilon)
        with torch.no_grad():
            bounds = interval_margins(net, pixels(low), pixels(high), labels)
            for index in range(8):
                inside = generator.integers(low, high, endpoint=True)
                if index % 2:  # Corners are nearer to the bounds.
                    inside = np.where(inside > images, high, low)
                values = differences(net(pixels(inside)), labels)
                assert (values >= bounds - 1e-9).all()


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("settings", MODES[:2] + MODES[3:], ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("bits", [[(8, 8)], MIXED], ids=["8-8", "mixed"])
def test_bounds_follow_those_of_the_integer_program(
    kind: type[nn.Module], settings: dict[str, Any], bits: list[tuple[int, int]]
) -> None:
    """Equal up to the program's 31-bit multipliers; an end point on a rounding tie may differ by one code."""
    net, images = network(kind, settings, bits)
    labels = torch.arange(32) % 5
    program = lower(net)
    for epsilon in (0, 2):
        low, high = box(images, epsilon)
        with torch.no_grad():
            ours = interval_margins(net, pixels(low), pixels(high), labels).numpy()
        exact = IntervalBounds(program).margins(low, high, labels).numpy() * program.metadata["logit_scale"]
        spread = exact.std()
        apart = np.abs(ours - exact).max(axis=1)
        assert (apart > 1e-3 * spread).mean() <= 0.2
        assert apart.max() <= 0.35 * spread


def test_a_box_of_one_point_gives_the_logits() -> None:
    for kind in NETS:
        net, images = network(kind, {"input_mode": "clip"}, MIXED)
        labels = torch.arange(32) % 5
        x = pixels(images)
        with torch.no_grad():
            found = bounded_forward(net, x, x, labels, x)
            expected = net(x)
        assert found.logits is not None
        torch.testing.assert_close(found.logits, expected)
        torch.testing.assert_close(found.margins, differences(expected, labels), atol=1e-9, rtol=0.0)
        assert all(float(width) == 0.0 for width in found.widths)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_live_batch_norm_uses_the_clean_images(kind: type[nn.Module], quantized: bool) -> None:
    """In training mode the pass updates the statistics as a forward pass does, and the bounds hold for them."""
    first, images = network(kind, {"input_mode": "clip"})
    second, _ = network(kind, {"input_mode": "clip"})
    labels = torch.arange(32) % 5
    for net in (first, second):
        net.quantized = quantized
        net.train()
    x, low, high = pixels(images), *(pixels(end) for end in box(images, 3))
    expected = second(x)
    found = bounded_forward(first, low, high, labels, x)
    assert found.logits is not None
    torch.testing.assert_close(found.logits, expected)
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    # The bounds are those of the network whose running statistics are the batch's. Undo the quantization, which
    # follows the running statistics and would differ.
    if not quantized:
        for module in second.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        reference, _ = network(kind, {"input_mode": "clip"})
        reference.quantized = False
        _adopt_batch_statistics(reference, x)
        margins = interval_margins(reference, low, high, labels)
        torch.testing.assert_close(found.margins, margins, atol=1e-6, rtol=1e-6)


def _adopt_batch_statistics(net: QuantizedNet, x: Tensor) -> None:
    """Running statistics := those of this batch, biased variance, layer after layer."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def adopt(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        variance, mean = torch.var_mean(arguments[0].detach(), (0, 2, 3), correction=0)
        module.running_var, module.running_mean = variance, mean

    handles = [norm.register_forward_pre_hook(adopt) for norm in norms]
    net.source.eval()
    scaled = (x - net.mean) * net.clip_scale
    ratio = net.layer(net.graph.layers[0].name).input_ratio.reshape(1, -1, 1, 1)
    net.source((scaled * ratio).to(x.dtype))
    for handle in handles:
        handle.remove()
    net.eval()


def test_a_saturated_bound_keeps_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps so small that every activation clips, plain straight-through gradients of early layers vanish."""

    def first_gradient() -> float:
        net, images = network(Plain, {"input_mode": "clip"})
        with torch.no_grad():
            for node in net.graph.layers[1:]:
                net.layer(node.name).activation.steps.mul_(1e-4)
        low, high = (pixels(end) for end in box(images, 4))
        bounded_forward(net, low, high, torch.arange(32) % 5).margins.sum().backward()
        weight = net.layer(net.graph.layers[0].name).layer.weight
        assert weight.grad is not None
        return float(weight.grad.abs().max())

    kept = first_gradient()
    monkeypatch.setattr(intervals, "SATURATED_SLOPE", 0.0)
    assert first_gradient() < 1e-3 * kept


def test_inside_the_range_the_gradient_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for slope in (0.1, 0.0):
        monkeypatch.setattr(intervals, "SATURATED_SLOPE", slope)
        net, images = network(Plain, {"input_mode": "clip"})
        with torch.no_grad():
            for node in net.graph.layers[1:]:
                net.layer(node.name).activation.steps.mul_(4.0)
            for name in net.graph.streams:
                net.stream(name).steps.mul_(4.0)
        low, high = (pixels(end) for end in box(images, 1))
        bounded_forward(net, low, high, torch.arange(32) % 5).margins.sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
