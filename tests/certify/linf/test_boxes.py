"""Interval bounds against exhaustive enumeration on small programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from arqsearch.certify.linf.boxes import IntervalBounds, box, is_robust
from arqsearch.integer.lowering import lower
from tests.quantize.nets import NETS
from tests.quantize.test_lowering import quantized


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("bits", [(8, 8), (3, 2)])
def test_margins_bound_every_sampled_image(kind: type[nn.Module], bits: tuple[int, int]) -> None:
    net, pixels = quantized(kind, {"input_mode": "clip"}, bits)
    program = lower(net)
    images = pixels[:8].permute(0, 2, 3, 1).numpy().astype(np.uint8)
    labels = program.run(images).argmax(1)
    bounds = IntervalBounds(program)
    generator = np.random.default_rng(0)
    for epsilon in (0, 1, 3):
        low, high = box(images, epsilon)
        margins = bounds.margins(low, high, labels)
        assert torch.equal(margins[torch.arange(8), labels], torch.zeros(8, dtype=torch.int64))
        tightest = np.full(margins.shape, np.iinfo(np.int64).max)
        for _ in range(50):
            sample = generator.integers(low, high, endpoint=True).astype(np.int16)
            logits = program.run(sample).to(torch.int64)
            tightest = np.minimum(tightest, (logits[torch.arange(8), labels][:, None] - logits).numpy())
        assert (margins.numpy() <= tightest).all()
        if epsilon == 0:
            assert np.array_equal(margins.numpy(), tightest)


def test_first_layer_bounds_are_attained() -> None:
    """With one linear layer the fused bound is exact: enumeration finds an image that attains it."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.flatten(x, 1))

    from arqsearch.quantize.network import QuantizedNet, QuantizeSettings

    torch.manual_seed(0)
    net = QuantizedNet(Line(), (1, 2, 2), (0.5,), (0.25,), QuantizeSettings(input_mode="clip"))
    net.calibrate([torch.randint(0, 256, (16, 1, 2, 2)).float()])
    program = lower(net)
    image = np.array([[[[0], [17]], [[250], [255]]]], dtype=np.uint8)
    low, high = box(image, 2)
    every = [range(int(a), int(b) + 1) for a, b in zip(low.ravel(), high.ravel(), strict=True)]
    grid = np.array(list(itertools.product(*every)), dtype=np.int16).reshape(-1, 2, 2, 1)
    logits = program.run(grid).to(torch.int64)
    for label in range(3):
        got = IntervalBounds(program).margins(low, high, [label])[0]
        assert torch.equal(got, (logits[:, label][:, None] - logits).min(0).values)


def test_ties_count_by_the_first_maximum() -> None:
    margins = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]])
    labels = torch.tensor([0, 1, 1])
    assert is_robust(margins, labels).tolist() == [True, True, False]
