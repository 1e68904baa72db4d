"""Fake quantization: values against integers, gradients against the LSQ formula."""

from __future__ import annotations

import pytest
import torch

from arqsearch.quantize.quantizers import ActivationQuantizer, best_steps, code_range, fake_quantize, snap_power_of_two


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (3, False), (8, False)])
def test_gradients_follow_lsq(per_channel: bool, bits: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, 4, generator=generator, dtype=torch.float64)
    x = x if signed else x.relu() + 1e-3
    step = (torch.rand(6, 1, 1, 1, dtype=torch.float64, generator=generator) + 0.5) / 2 ** (bits - 1)
    step = step if per_channel else step[0, 0, 0, 0]
    x, step = x.requires_grad_(), step.clone().requires_grad_()
    lo, hi = code_range(bits, signed)
    out = fake_quantize(x, step, lo, hi)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (out * weight).sum().backward()  # type: ignore[no-untyped-call]
    ratio = (x / step).detach()
    codes = ratio.round().clamp(lo, hi)
    torch.testing.assert_close(out.detach(), codes * step.detach())
    inside = ((ratio > lo) & (ratio < hi)).double()
    torch.testing.assert_close(x.grad, weight * inside)
    per_value = weight * (codes - ratio * inside)
    values = x.numel() / 6
    expected = per_value.flatten(1).sum(1).reshape(6, 1, 1, 1) if per_channel else per_value.sum()
    torch.testing.assert_close(step.grad, expected / (values * max(hi, 1)) ** 0.5)


def test_signed_codes_are_symmetric_and_two_bits_are_ternary() -> None:
    assert code_range(2, True) == (-1, 1)
    assert code_range(8, True) == (-127, 127)
    assert code_range(4, False) == (0, 15)


def test_best_step_beats_its_neighbours() -> None:
    values = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    step = best_steps(values, -7, 7)

    def error(s: torch.Tensor) -> torch.Tensor:
        return ((values / s[:, None]).round().clamp(-7, 7) * s[:, None] - values).square().sum(1)

    assert (error(step) <= error(step * 1.15)).all() and (error(step) <= error(step * 0.85)).all()


def test_snapped_steps_are_fixed_points() -> None:
    step = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1e-3
    for unit in (1.0, 1 / 9):
        once = snap_power_of_two(step, unit)
        assert torch.equal(once, snap_power_of_two(once, unit))
        exponent = torch.log2(once / unit)
        torch.testing.assert_close(exponent, exponent.round(), atol=1e-5, rtol=0)


def test_sum_rounds_each_operand_first() -> None:
    quantizer = ActivationQuantizer(signed=True, power_of_two=False, rounding="half_up")
    a, b = torch.tensor([0.4, 0.5, 90.0]), torch.tensor([0.4, -0.6, 90.0])
    assert quantizer.add(a, b, 8, float("-inf"), float("inf")).tolist() == [0.0, 0.0, 127.0]
