"""Small networks against solvers: the true minimum by integer programming, the best slopes by linear programming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.linear import LinearBounds
from arqsearch.integer.program import IntegerProgram
from tests.certify.linf.linear.benchmark import mlp

SHIFT, TOP = 6, 15


def tiny(seed: int) -> tuple[IntegerProgram, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Nine pixels, eight hidden codes of 4 bits, three classes; an image; weights and biases."""
    rng = np.random.default_rng(seed)
    first = rng.integers(-15, 16, (8, 9)), rng.integers(-600, 900, 8)
    second = rng.integers(-15, 16, (3, 8)), rng.integers(-40, 40, 3)
    program = mlp(
        [
            (first[0].astype(np.int16), first[1].astype(np.int32), SHIFT, 0, TOP),
            (second[0].astype(np.int16), second[1].astype(np.int32), 0, 0, 0),
        ],
        (3, 3, 1),
    )
    return program, rng.integers(0, 256, (1, 3, 3, 1)).astype(np.uint8), [first, second]


def minimum(
    layers: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray, row: np.ndarray, constant: int,
    limit: tuple[int, int, int] | None = None,
) -> float | None:  # fmt: skip
    """``min row·h + constant`` over integer pixels; one binary for each step of each code. None where infeasible.

    :param limit: (hidden unit, smallest, largest code).
    """
    (weight, bias), _ = layers
    pixels, hidden = weight.shape[1], weight.shape[0]
    count = pixels + hidden * TOP
    least = np.where(weight > 0, weight * low, weight * high).sum(1) + bias
    most = np.where(weight > 0, weight * high, weight * low).sum(1) + bias
    rows, lower, upper = [], [], []
    cost = np.zeros(count)
    for unit in range(hidden):
        for code in range(1, TOP + 1):
            threshold = (code << SHIFT) - (1 << (SHIFT - 1))
            place = pixels + unit * TOP + code - 1
            line = np.zeros(count)
            line[:pixels] = weight[unit]
            up, down = line.copy(), line.copy()
            up[place] = -(max(threshold - int(least[unit]), 0))
            rows.append(up)  # reached: sum >= threshold
            lower.append(int(least[unit]) - int(bias[unit]))
            upper.append(np.inf)
            down[place] = -(max(int(most[unit]) - threshold + 1, 0))
            rows.append(down)  # not reached: sum <= threshold - 1
            lower.append(-np.inf)
            upper.append(max(threshold - 1, min(int(most[unit]), threshold - 1)) - int(bias[unit]))
            cost[place] = row[unit]
    small, large = np.zeros(count), np.ones(count)
    small[:pixels], large[:pixels] = low, high
    for unit in range(hidden):
        for code in range(1, TOP + 1):
            threshold = (code << SHIFT) - (1 << (SHIFT - 1))
            place = pixels + unit * TOP + code - 1
            if least[unit] >= threshold:
                small[place] = 1
            if most[unit] < threshold:
                large[place] = 0
            if limit is not None and limit[0] == unit:
                if code <= limit[1]:
                    small[place] = 1
                if code > limit[2]:
                    large[place] = 0
    if (small > large).any():
        return None
    result = milp(
        cost, integrality=np.ones(count), bounds=Bounds(small, large),
        constraints=LinearConstraint(np.array(rows), np.array(lower), np.array(upper)),
    )  # fmt: skip
    return None if result.x is None else round(result.fun) + constant


@pytest.mark.parametrize("seed", range(4))
def test_bounds_against_the_true_minimum(seed: int) -> None:
    program, image, layers = tiny(seed)
    label = int(program.run(image).argmax())
    domain = Domain.around(image, np.array([label]), 6)
    low, high = domain.lo.numpy().ravel().astype(int), domain.hi.numpy().ravel().astype(int)
    boxes = IntervalBounds(program).margins(domain.lo, domain.hi, domain.labels)[0]
    cheap = LinearBounds(program).bound(domain).margins[0]
    strong = LinearBounds(program, iterations=60).bound(domain).margins[0]
    second, bias = layers[1]
    for other in range(3):
        if other == label:
            continue
        true = minimum(layers, low, high, second[label] - second[other], int(bias[label] - bias[other]))
        assert true is not None
        assert boxes[other] <= cheap[other] <= strong[other] <= true


@pytest.mark.parametrize("seed", range(4))
def test_split_codes_against_the_true_minimum(seed: int) -> None:
    """Limits on one hidden code, on either side: sound, and together not worse than no split."""
    program, image, layers = tiny(seed)
    label = int(program.run(image).argmax())
    domain = Domain.around(image, np.array([label]), 12)
    low, high = domain.lo.numpy().ravel().astype(int), domain.hi.numpy().ravel().astype(int)
    bounder = LinearBounds(program, iterations=60)
    whole = bounder.bound(domain)
    codes = whole.tensors[3]
    unit = int((codes[1] - codes[0])[0].argmax())
    middle = int((codes[0][0, unit] + codes[1][0, unit]) // 2)
    second, bias = layers[1]
    joined = []
    for smallest, largest in ((0, middle), (middle + 1, TOP)):
        lo, hi = torch.zeros(1, 8, dtype=torch.int64), torch.full((1, 8), TOP)
        lo[0, unit], hi[0, unit] = smallest, largest
        part = bounder.bound(Domain(domain.lo, domain.hi, domain.labels, {3: (lo, hi)}), whole)
        joined.append(part.margins[0])
        for other in range(3):
            row, constant = second[label] - second[other], int(bias[label] - bias[other])
            true = minimum(layers, low, high, row, constant, (unit, smallest, largest))
            if other != label and true is not None:
                assert whole.margins[0, other] <= part.margins[0, other] <= true
    assert (torch.stack(joined).amin(0) >= whole.margins[0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_search_approaches_the_best_slopes(seed: int) -> None:
    """With one hidden layer the best choice of lines is a linear program over pixels and hidden values."""
    program, image, layers = tiny(seed)
    label = int(program.run(image).argmax())
    domain = Domain.around(image, np.array([label]), 10)
    cheap, strong = (LinearBounds(program, iterations=n).bound(domain).margins[0] for n in (0, 150))
    from tests.certify.linf.linear.test_rounding import compiled

    network, state, _ = compiled(program, domain)
    lines = network.rules[2].relax(state.inner[2])
    (weight, offset), (second, bias) = layers
    needed = (torch.arange(3) < label).long()
    for other in range(3):
        if other == label or cheap[other] >= needed[other]:
            continue
        rows, upper = [], []
        for side, sign in ((0, 1.0), (1, -1.0)):
            for choice in range(3):
                slope, height = lines.slopes[side, choice, 0].numpy(), lines.heights[side, choice, 0].numpy()
                rows.append(np.hstack([sign * slope[:, None] * weight, -sign * np.eye(8)]))
                upper.append(-sign * (height + slope * offset))
        row, constant = second[label] - second[other], int(bias[label] - bias[other])
        low, high = domain.lo.numpy().ravel(), domain.hi.numpy().ravel()
        best = milp(
            np.concatenate([np.zeros(9), row]),
            bounds=Bounds(np.concatenate([low, np.full(8, -1e9)]), np.concatenate([high, np.full(8, 1e9)])),
            constraints=LinearConstraint(np.vstack(rows), -np.inf, np.concatenate(upper)),
        )
        optimum = best.fun + constant
        assert cheap[other] <= strong[other] <= np.ceil(optimum - 1e-6)
        assert optimum - strong[other] <= max(2.0, 0.25 * (optimum - float(cheap[other])))
