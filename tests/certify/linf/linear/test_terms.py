"""The lines of a maximum and the Lagrangian terms of split limits, each on its own, at every integer point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from arqsearch.certify.linf.linear.maximum import Maximum
from arqsearch.certify.linf.linear.optimize import _Splits
from arqsearch.certify.linf.linear.propagate import Network
from arqsearch.certify.linf.linear.rules import Form, Multipliers, Slopes, StaircaseRule
from arqsearch.certify.linf.linear.specification import Specification
from arqsearch.integer import ops as O
from tests.certify.linf.linear.benchmark import mlp

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(12))
def test_lines_of_a_maximum(seed: int) -> None:
    """Over all points of random boxes of one padded 2x2 window and of one with four values."""
    rng = np.random.default_rng(seed)
    padding = (0, 0, 0, 0) if seed % 2 == 0 else (1, 1, 1, 1)
    op = O.MaxPool2d((0,), 1, (2, 2), (1, 1), padding)
    low = rng.integers(-6, 4, size=(1, 1, 2, 2))
    high = low + rng.integers(0, 6, size=low.shape)
    lines = Maximum(op, (2, 2, 1)).lines(*(torch.from_numpy(x.astype(np.float64)) for x in (low, high)))
    axes = [range(a, b + 1) for a, b in zip(low.ravel().tolist(), high.ravel().tolist(), strict=True)]
    points = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64).reshape(-1, 1, 2, 2)
    windows = Maximum(op, (2, 2, 1)).windows(points)
    largest = windows.amax(2)
    seen = torch.where(windows > -1000, windows, 0.0)
    below, above = (lines.lower * seen).sum(2), (lines.upper * seen).sum(2) + lines.height
    assert (below <= largest).all() and (above >= largest - 1e-12).all()
    assert (above.amin(0) <= torch.from_numpy(high.astype(np.float64)).amax() + 1e-12).all()


def splits(seed: int) -> tuple[torch.Tensor, torch.Tensor, Multipliers]:
    """Limits of five values on some sides, and multipliers at random weights."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.full((1, 5), -9.0, dtype=torch.float64), torch.full((1, 5), 9.0, dtype=torch.float64)
    low = torch.where(torch.rand(1, 5, generator=generator) < 0.5, free[0], -4.0)
    high = torch.where(torch.rand(1, 5, generator=generator) < 0.5, free[1], 6.0)
    terms = _Splits((low, high), free, 0.5, torch.zeros(3, dtype=torch.int64), torch.float64)
    weight = 4 * torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    return low, high, terms.multipliers(weight)


@pytest.mark.parametrize("seed", range(8))
def test_limits_only_lower_a_form_inside_them(seed: int) -> None:
    """Added terms are at most 0 at points within the limits, 0 where every limited value touches its limit."""
    low, high, extra = splits(seed)
    zero = torch.zeros(3, dtype=torch.float64)
    form = Form({}, zero, zero)
    form.relax(7, extra, 9.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        point = low + torch.rand(low.shape, generator=generator, dtype=torch.float64) * (high - low)
        assert ((form.coefficients[7] * point).sum(1) + form.constant <= 1e-12).all()
    sides = torch.where(form.coefficients[7] > 0, high, low)
    top = (form.coefficients[7] * sides).sum(1) + form.constant
    one_sided = (low > -9) != (high < 9)
    only = one_sided.all()
    assert (top <= 1e-12).all() and (not only or torch.allclose(top, zero))
    assert form.error is not None and (form.error > 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_limits_through_a_staircase(seed: int) -> None:
    """The rule of a staircase takes the same terms: below at all integers within the limits."""
    program = mlp([(np.eye(5, dtype=np.int16), np.full(5, -9, dtype=np.int32), 1, -3, 3)], (1, 5, 1))
    rule = StaircaseRule(program.ops[2], program, CPU)
    low, high, extra = splits(seed)
    lines = rule.relax((low, high))
    chosen = Slopes.between(
        (lines.slopes[0, 1], lines.slopes[1, 1]), (lines.heights[0, 1], lines.heights[1, 1]), lines.mass
    )
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    form = Form({}, zero, zero)
    rule.back(form, start, chosen, extra)
    (coefficient,) = form.coefficients.values()
    rng = np.random.default_rng(seed)
    for _ in range(300):
        point = torch.from_numpy(
            rng.integers(low.numpy().astype(int), high.numpy().astype(int), endpoint=True)
        ).double()
        true = (start * rule.at(point)).sum(1)
        assert ((coefficient * point).sum(1) + form.constant <= true + 1e-9).all()


@pytest.mark.parametrize(("shift", "lo", "hi"), [(2, -4, 3), (3, 0, 7), (1, -20, 20)])
def test_margins_through_the_last_staircase(shift: int, lo: int, hi: int) -> None:
    """Every pair of sums: the margin promised for their difference never exceeds the true one."""
    weight = np.array([[1], [1]], dtype=np.int16)
    program = mlp([(weight, np.full(2, -128, dtype=np.int32), shift, lo, hi)], (1, 1, 1))
    specification = Specification(Network(program, CPU), True)
    assert specification.over is not None
    rule = StaircaseRule(program.ops[2], program, CPU)
    sums = torch.arange(-40, 41, dtype=torch.float64)
    codes = rule.at(torch.stack([sums, sums], 1))[:, 0]
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for first, second in itertools.product(range(len(sums)), repeat=2):
        logits = torch.stack([codes[first], codes[second]])[None]
        for loss in (0, 3):
            difference = (sums[first] - sums[second]).long().reshape(1) - loss
            found = specification.margin(difference, (logits, logits), zero, zero, one)
            assert found <= codes[first] - codes[second]
    goal = int(specification.goal(one))
    assert int(specification.margin(torch.tensor([goal]), (torch.tensor([[hi, lo]]),) * 2, zero, zero, one)) >= 1
    assert int(specification.margin(zero, (torch.tensor([[hi, lo]]),) * 2, zero, zero, one)) == 0
