"""Lines below and above staircases: exactly, at every integer of every interval."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from arqsearch.certify.linf.linear.staircase import MAX_TABLE, Lines, Staircase, staircase
from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.requantize import input_quantize, requantize

CPU = torch.device("cpu")


def cases() -> list[tuple[str, O.Op, tuple[int, int]]]:
    """Steep, flat, jumping, constant, saturated; every rounding; with and without factors of two."""
    found: list[tuple[str, O.Op, tuple[int, int]]] = []
    for rounding in O.ROUNDINGS:
        for multiplier, shift, lo, hi in (
            (1, 3, 0, 7), (5, 4, -3, 3), (13, 6, 0, 3), (8, 3, -8, 8), (3, 1, -9, 20), (11, 2, 0, 63), (0, 5, 0, 7),
            (1, 1, -20, 20), (7, 40, 0, 3), (2**31 - 1, 34, -2, 2),
        ):  # fmt: skip
            op = O.Requantize((0,), 1, np.array([multiplier]), np.array([shift]), rounding, lo, hi)
            found.append((f"{rounding}-{multiplier}-{shift}", op, (-25, 25)))
        op = O.InputQuantize((0,), 1, np.array([5]), np.array([-37]), 4, rounding, -10, 15, -2, 3)
        found.append((f"input-{rounding}", op, (-20, 25)))
        op = O.InputQuantize((0,), 1, np.array([3]), np.array([7]), 0, rounding, -10, 15, -20, 30)
        found.append((f"exact-{rounding}", op, (-20, 25)))
    return found


CASES = cases()


def values_of(op: O.Op, x: np.ndarray) -> np.ndarray:
    """The function on a line of integers."""
    column = x.astype(np.int64)[:, None]
    return (requantize(column, op) if isinstance(op, O.Requantize) else input_quantize(column, op))[:, 0]


def all_intervals(function: Staircase, op: O.Op, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, Lines]:
    """Every interval within `span`, as a batch."""
    pairs = [(a, b) for a in range(span[0], span[1] + 1) for b in range(a, span[1] + 1)]
    lo, hi = np.array(pairs).T

    def at(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(values_of(op, x.numpy().ravel()).astype(np.float64)).reshape(x.shape)

    low, high = (torch.from_numpy(x.astype(np.float64))[:, None] for x in (lo, hi))
    return lo, hi, function.lines(low, high, at)


@pytest.mark.parametrize(("name", "op", "span"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("table", [MAX_TABLE, 0], ids=["table", "ends"])
def test_lines_hold(name: str, op: O.Op, span: tuple[int, int], table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arqsearch.certify.linf.linear.staircase.MAX_TABLE", table)
    lo, hi, lines = all_intervals(staircase(op, [span], CPU), op, span)
    unit = Fraction(16, 2**53)
    for place in range(0, len(lo), 41):
        x = range(int(lo[place]), int(hi[place]) + 1)
        y = values_of(op, np.arange(x[0], x[-1] + 1)).tolist()
        slack = unit * Fraction(float(lines.mass[place, 0]))
        ends = []
        for choice in range(3):
            for side in range(2):
                slope = Fraction(float(lines.slopes[side, choice, place, 0]))
                height = Fraction(float(lines.heights[side, choice, place, 0]))
                distances = [(b - slope * a - height) * (1 if side == 0 else -1) for a, b in zip(x, y, strict=True)]
                assert min(distances) >= -slack, f"choice {choice} of side {side} cuts the function"
                ends.append(min(distances))
                assert abs(slope) * max(abs(x[0]), abs(x[-1])) + abs(height) <= Fraction(float(lines.mass[place, 0]))
        if y[0] == y[-1]:
            assert all(value == 0 for value in ends), "a constant is met exactly"
        assert (lines.slopes[:, 1:, place] >= lines.slopes[:, :-1, place]).all() and (lines.slopes >= 0).all()


@pytest.mark.parametrize(("name", "op", "span"), CASES, ids=[case[0] for case in CASES])
def test_two_values_give_the_hull(name: str, op: O.Op, span: tuple[int, int]) -> None:
    """With one step the steepest lines pass through the corners beside it and the far end."""
    lo, hi, lines = all_intervals(staircase(op, [span], CPU), op, span)
    for place in range(len(lo)):
        y = values_of(op, np.arange(lo[place], hi[place] + 1))
        if y[-1] != y[0] + 1:
            continue
        step = int(lo[place]) + int((y == y[0]).sum())
        below, above = lines.slopes[0, 2, place, 0].item(), lines.slopes[1, 2, place, 0].item()
        assert below == pytest.approx(1 / (hi[place] - step + 1)) and above == pytest.approx(1 / (step - lo[place]))


@pytest.mark.parametrize(("name", "op", "span"), CASES, ids=[case[0] for case in CASES])
def test_preimage_is_exact(name: str, op: O.Op, span: tuple[int, int]) -> None:
    function = staircase(op, [span], CPU)
    x = np.arange(span[0], span[1] + 1)
    y = values_of(op, x)
    for lo in range(int(y.min()) - 1, int(y.max()) + 2):
        for hi in range(lo, int(y.max()) + 2):
            low, high = (v.item() for v in function.preimage(torch.tensor([[float(lo)]]), torch.tensor([[float(hi)]])))
            expected = x[(y >= lo) & (y <= hi)].tolist()
            assert [a for a in x.tolist() if low <= a <= high] == expected


def test_convex_combinations_are_between_the_lines() -> None:
    """The choice that starts is the one closest in the middle of the interval."""
    _, op, span = CASES[0]
    lo, hi, lines = all_intervals(staircase(op, [span], CPU), op, span)
    centre = torch.from_numpy((lo + hi) / 2)[:, None]
    values = lines.slopes * centre + lines.heights
    start = lines.start[:, None]
    chosen = torch.gather(values, 1, start)[:, 0]
    assert torch.allclose(chosen[0], values[0].amax(0)) and torch.allclose(chosen[1], values[1].amin(0))


def test_falling_quantizers_are_refused() -> None:
    op = O.InputQuantize((0,), 1, np.array([-1]), np.array([0]), 0, "floor", 0, 9, -9, 0)
    with pytest.raises(ArqError, match="negative multiplier"):
        staircase(op, [(0, 9)], CPU)
