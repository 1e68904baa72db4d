"""What float64 computes against the same bound in fractions, and the rules against the operations themselves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.linear.maximum import WindowLines
from arqsearch.certify.linf.linear.propagate import Network
from arqsearch.certify.linf.linear.rounding import UNKNOWN, integer_above
from arqsearch.certify.linf.linear.rules import RULES, Form
from arqsearch.certify.linf.linear.substitute import box_of, spread, starting_slopes, substitute
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from tests.certify.linf.linear.benchmark import mlp
from tests.certify.linf.linear.worlds import corner_box, domain_of, tensors_of
from tests.integer.random_programs import random_program

CPU = torch.device("cpu")
AFFINE = (O.Conv2d, O.Linear, O.SumPool2d, O.Pad2d, O.PadChannels, O.Slice, O.Flatten)


def test_every_operation_has_a_rule() -> None:
    assert set(RULES) == set(O.OPS)


def channels_first(x: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(x.astype(np.float64))
    return values.permute(0, 3, 1, 2) if values.ndim == 4 else values


@pytest.mark.parametrize("seed", range(30))
def test_affine_rules_are_the_operations(seed: int) -> None:
    """``<c, op(x)> = <transposed c, x> + constant`` in whole numbers, where float64 is exact."""
    program = random_program(seed)
    low, _ = corner_box(program, seed, 0, 1)
    values = tensors_of(program, low[None])
    rng = np.random.default_rng(seed)
    for op in program.ops:
        if not isinstance(op, AFFINE):
            continue
        rule = RULES[type(op)](op, program, CPU)
        out = channels_first(values[op.output])
        start = torch.from_numpy(rng.integers(-9, 10, size=(4, *out.shape[1:])).astype(np.float64))
        form = Form({}, torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
        rule.back(form, start, None, None)
        before = (form.coefficients[op.inputs[0]] * channels_first(values[op.inputs[0]])).flatten(1).sum(1)
        assert torch.equal(before + form.constant, (start * out).flatten(1).sum(1))


@pytest.mark.parametrize("seed", range(12))
def test_nonlinear_rules_are_below(seed: int) -> None:
    """Every tensor in turn: the form after substitution does not exceed the value of the form before it."""
    program = random_program(seed)
    low, high = corner_box(program, seed, 6, 9)
    rng = np.random.default_rng(seed)
    images = rng.integers(low, high, size=(40, *low.shape), endpoint=True)
    values = tensors_of(program, images)
    network, _, chosen = compiled(program, domain_of(low, high, 0))
    for index, op in enumerate(program.ops):
        if not network.rules[index].nonlinear:
            continue
        out = channels_first(values[op.output])
        start = torch.from_numpy(rng.normal(size=(1, *out.shape[1:])))
        form = Form({}, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        network.rules[index].back(form, start, spread(chosen[index], torch.zeros(1, dtype=torch.int64)), None)
        below = form.constant - form.error
        for tensor, coefficient in form.coefficients.items():
            below = below + (coefficient * channels_first(values[tensor])).flatten(1).sum(1)
        assert (below <= (start * out).flatten(1).sum(1) + 1e-9).all()


def compiled(program: IntegerProgram, domain: Domain):  # type: ignore[no-untyped-def]
    """Network, layers and starting lines of a batch of domains."""
    network = Network(program, CPU)
    limits = network.limits(domain, None)
    layers = network.start(domain, limits)
    chosen = {}
    for index, rule in enumerate(network.rules):
        bounds = network.enter(layers, index, limits)
        network.settle(layers, index, bounds, limits)
        if rule.nonlinear:
            lines = rule.relax(layers.inner[index])
            chosen[index] = lines if isinstance(lines, WindowLines) else starting_slopes(lines)
    return network, layers, chosen


def exactly(x: torch.Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.flatten().tolist()]


@pytest.mark.parametrize("seed", range(6))
def test_rounding_stays_within_its_bound(seed: int) -> None:
    """A three-layer network in fractions with the same slopes; the difference is within what was allowed for."""
    rng = np.random.default_rng(seed)
    sizes = (12, 9, 7, 4)
    layers_ = [
        (rng.integers(-31, 32, (b, a)).astype(np.int16), rng.integers(-900, 900, b).astype(np.int32), s, 0, 63)
        for a, b, s in zip(sizes, sizes[1:], (7, 6, 0), strict=False)
    ]
    program = mlp(layers_, (3, 4, 1))
    image = rng.integers(0, 256, (1, 3, 4, 1)).astype(np.uint8)
    network, layers, chosen = compiled(program, Domain.around(image, np.zeros(1), 5))
    start = torch.from_numpy(rng.normal(size=(3, sizes[-1])) / 3)
    zero = torch.zeros(3, dtype=torch.float64)
    owner = torch.zeros(3, dtype=torch.int64)
    found = substitute(
        network,
        Form({program.output: start}, zero, zero),
        len(program.ops),
        lambda i: (spread(chosen[i], owner), None),
        box_of(layers, owner),
    )
    low, high = (exactly(x) for x in layers.tensors[0])
    assert found.error is not None
    for row in range(3):
        coefficient, constant = exactly(start[row]), Fraction(0)
        for index in range(len(program.ops) - 1, 0, -1):
            op = program.ops[index]
            if isinstance(op, O.Linear):
                constant += sum(c * int(b) for c, b in zip(coefficient, op.bias, strict=True))
                columns = op.weight.T.tolist()
                coefficient = [sum(c * w for c, w in zip(coefficient, column, strict=True)) for column in columns]
            else:
                lines = chosen[index]
                slope, half = exactly(lines.slope), exactly(lines.slope_half)
                height, height_half = exactly(lines.height), exactly(lines.height_half)
                constant += sum(c * h - abs(c) * q for c, h, q in zip(coefficient, height, height_half, strict=True))
                coefficient = [c * s - abs(c) * q for c, s, q in zip(coefficient, slope, half, strict=True)]
        true = constant + sum(min(c * a, c * b) for c, a, b in zip(coefficient, low, high, strict=True))
        distance = abs(Fraction(found.lower[row].item()) - true)
        assert 0 <= distance <= Fraction(found.error[row].item())
        assert found.error[row] < 1e-6, "so small that integer margins do not notice it"


def test_integers_above() -> None:
    lower = torch.tensor([-0.5, 0.0, 1.0 + 1e-9, 2.0, -1.0, float("nan"), float("-inf"), 1e30], dtype=torch.float64)
    error = torch.tensor([0.0, 0.0, 1e-6, 0.5, 1e-12, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = [0, 0, 1, 2, -1, -UNKNOWN, -UNKNOWN, -UNKNOWN]
    assert integer_above(lower, error).tolist() == expected
