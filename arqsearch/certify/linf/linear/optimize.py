"""Projected ascent over the slopes of all lines and the multipliers of split limits, for each row on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arqsearch.certify.linf.linear.maximum import WindowLines
from arqsearch.certify.linf.linear.propagate import Layers, Limits, Network
from arqsearch.certify.linf.linear.rules import Bounds, Form, Multipliers, Slopes, total
from arqsearch.certify.linf.linear.specification import Specification
from arqsearch.certify.linf.linear.staircase import Lines
from arqsearch.certify.linf.linear.substitute import Minimum, box_of, substitute

#: The search needs no proof; what it finds is bounded once more in float64.
SEARCH = torch.float32
#: Rows whose computed bound exceeds the goal by so little are not trusted to be proven; they go on.
TRUST = 1e-2
#: Steps between looks at which rows are done.
PERIOD = 10
#: Decay of the step size over the whole run (to this share of it).
FINAL_RATE = 0.02
#: Largest multiplier, in units of the steepest slope.
MOST = 1e6
#: Short memory: the objective has a kink wherever a pixel's coefficient changes sign.
FIRST_DECAY, SECOND_DECAY, SMALL = 0.8, 0.8, 1e-12


class _Staircase:
    """One staircase for R rows: three lines each way and a position 0..2 between them for each element.

    :param lines: of the domains.
    :param owner: domain of each row.
    """

    def __init__(self, lines: Lines, owner: Tensor, dtype: torch.dtype) -> None:
        self.slopes, self.heights = (x[:, :, owner].to(dtype) for x in (lines.slopes, lines.heights))
        self.mass: Tensor | None = lines.mass[owner] if dtype == torch.float64 else None

    def slopes_at(self, position: Tensor) -> Slopes:
        """Between choice 0 and 1, or between 1 and 2: convex combinations of valid lines."""
        first, second = position.clamp(max=1), (position - 1).clamp(min=0)
        sides: list[list[Tensor]] = [[], []]
        for side in range(2):
            for kind, values in enumerate((self.slopes[side], self.heights[side])):
                low, middle, high = values
                sides[kind].append(low + first[side] * (middle - low) + second[side] * (high - middle))
        return Slopes.between((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1]), self.mass)


class _Splits:
    """The split limits of what one staircase acts on, for R rows.

    :param limits: of the domains.
    :param free: bounds that hold without the limits; a limit that does not cut them gets no multiplier.
    :param unit: ``(N, *shape)`` or a number, size of one unit of the multipliers, so that one step size fits all.
    """

    def __init__(self, limits: Bounds, free: Bounds, unit: Tensor | float, owner: Tensor, dtype: torch.dtype) -> None:
        low, high = (x[owner] for x in limits)
        active = torch.stack([low > free[0][owner], high < free[1][owner]])
        self.low, self.high = torch.where(active[0], low, 0.0).to(dtype), torch.where(active[1], high, 0.0).to(dtype)
        self.unit = (active * (unit[owner] if isinstance(unit, Tensor) else unit)).to(dtype)

    def multipliers(self, weight: Tensor) -> Multipliers:
        """The Lagrangian terms at the given weights ``(2, R, *shape)``."""
        lower, upper = weight * self.unit
        paid = lower * self.low, upper * self.high
        return Multipliers(upper - lower, total(paid[1] - paid[0]), total(paid[0].abs() + paid[1].abs()))


class _Variables:
    """Adam on one tensor ``(2, R, *shape)``, kept within ``0..most``, with the best value seen by each row."""

    def __init__(self, start: Tensor, most: Tensor) -> None:
        self.value, self.most, self.best = torch.minimum(start, most), most, torch.minimum(start, most)
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)

    def remember(self, rows: Tensor, which: Tensor) -> None:
        """Keep the current values of some rows; `rows` are their places in `best`."""
        self.best[:, rows[which]] = self.value.detach()[:, which]

    def step(self, gradient: Tensor, rate: float, count: int) -> None:
        """Ascend."""
        self.first.mul_(FIRST_DECAY).add_(gradient, alpha=1 - FIRST_DECAY)
        self.second.mul_(SECOND_DECAY).addcmul_(gradient, gradient, value=1 - SECOND_DECAY)
        speed = (self.second / (1 - SECOND_DECAY**count)).sqrt_().add_(SMALL)
        moved = self.value.detach() + rate / (1 - FIRST_DECAY**count) * self.first / speed
        self.value = torch.minimum(moved.clamp_(min=0), self.most)

    def pick(self, which: Tensor) -> None:
        """Go on with some rows."""
        self.value, self.most = self.value.detach()[:, which], self.most[:, which]
        self.first, self.second = self.first[:, which], self.second[:, which]


class Optimizer:
    """Ascends the bound of each row by Adam, projected; rows that reach their goal leave.

    :param owner: domain of each row.
    :param specification: where the rows start.
    :param iterations: steps.
    :param rate: first step size, in positions (0..2).
    """

    def __init__(
        self, network: Network, layers: Layers, limits: Limits, lines: dict[int, Lines | WindowLines], owner: Tensor,
        specification: Specification, iterations: int, rate: float,
    ) -> None:  # fmt: skip
        self.specification = specification
        self.network, self.layers, self.limits, self.lines = network, layers, limits, lines
        self.owner, self.iterations, self.rate = owner, iterations, rate
        self.positions = {
            i: _Variables(x.start[:, owner].to(SEARCH), _last(x)[:, owner].to(SEARCH))
            for i, x in lines.items()
            if isinstance(x, Lines) and i < specification.stop
        }
        self.weights: dict[int, _Variables] = {}

    def run(self, form: Callable[[Tensor], Form], goal: Tensor) -> Minimum:
        """Search in float32, then bound once more in float64 with the best of each row.

        :param form: the rows at given places, float64, with error.
        :param goal: ``(R,)``, smallest integer that proves the row.
        """
        self._search(form, goal)
        chosen = self._compile(self.owner, torch.float64), self._splits(self.owner, torch.float64)
        best = {i: v.best.double() for i, v in self.positions.items()}
        weights = {i: v.best.double() for i, v in self.weights.items()}
        everything = torch.arange(len(self.owner), device=self.owner.device)
        return self._bound(chosen, best, weights, form(everything), self.owner, keep=True)

    def _compile(self, owner: Tensor, dtype: torch.dtype) -> dict[int, _Staircase | WindowLines]:
        return {
            index: lines[owner].to(dtype) if isinstance(lines, WindowLines) else _Staircase(lines, owner, dtype)
            for index, lines in self.lines.items()
            if index < self.specification.stop
        }

    def _splits(self, owner: Tensor, dtype: torch.dtype) -> dict[int, _Splits]:
        found = {}
        for index, limits in self.limits.inner.items():
            if index == self.specification.over:
                found[index] = _Splits(limits, self.layers.free[index], 1.0, owner, dtype)
            elif index < self.specification.stop:
                lines = self.lines[index]
                assert isinstance(lines, Lines)
                found[index] = _Splits(limits, self.layers.free[index], lines.slopes.amax((0, 1)), owner, dtype)
        return found

    def _bound(
        self, compiled: tuple[dict[int, _Staircase | WindowLines], dict[int, _Splits]], positions: dict[int, Tensor],
        weights: dict[int, Tensor], form: Form, owner: Tensor, keep: bool = False,
    ) -> Minimum:  # fmt: skip
        lines, splits = compiled
        extra = {index: splits[index].multipliers(weight) for index, weight in weights.items()}

        def choose(index: int) -> tuple[Slopes | WindowLines, Multipliers | None]:
            item = lines[index]
            if isinstance(item, WindowLines):
                return item, None
            return item.slopes_at(positions[index]), extra.get(index)

        over = self.specification.over
        if over is not None and over in extra:
            form.relax(self.specification.tensor, extra[over], self.specification.size)
        dtype = form.constant.dtype
        centre, radius = (x.to(dtype) for x in box_of(self.layers, owner))
        return substitute(self.network, form, self.specification.stop, choose, (centre, radius), keep)

    def _search(self, form: Callable[[Tensor], Form], goal: Tensor) -> None:
        rows = torch.arange(len(self.owner), device=self.owner.device)
        compiled = self._compile(self.owner, SEARCH), self._splits(self.owner, SEARCH)
        for index, splits in compiled[1].items():
            if splits.unit.any():
                self.weights[index] = _Variables(torch.zeros_like(splits.unit), torch.full_like(splits.unit, MOST))
        best = torch.full_like(goal, -torch.inf)
        for step in range(self.iterations + 1):
            owner = self.owner[rows]
            if step and step % PERIOD == 0:
                stay = (best[rows] <= goal[rows] - 1 + TRUST).nonzero()[:, 0]
                if len(stay) == 0:
                    return
                if len(stay) < len(rows):
                    rows, owner = rows[stay], owner[stay]
                    for variable in (*self.positions.values(), *self.weights.values()):
                        variable.pick(stay)
                    compiled = self._compile(owner, SEARCH), self._splits(owner, SEARCH)
            wanted = [*self.positions.values(), *self.weights.values()]
            with torch.enable_grad():
                for variable in wanted:
                    variable.value.requires_grad_(True)
                found = self._bound(
                    compiled, {i: v.value for i, v in self.positions.items()},
                    {i: v.value for i, v in self.weights.items()}, _narrow(form(rows)), owner,
                )  # fmt: skip
                gradients = torch.autograd.grad(found.lower.sum(), [v.value for v in wanted], allow_unused=True)
            value = found.lower.detach().double()
            better = (value > best[rows]).nonzero()[:, 0]
            best[rows[better]] = value[better]
            for variable in wanted:
                variable.remember(rows, better)
            rate = self.rate * FINAL_RATE ** (step / max(1, self.iterations))
            for variable, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    variable.step(gradient, rate, step + 1)


def _last(lines: Lines) -> Tensor:
    """The last position that changes anything: 2, or less where the lines' slopes coincide."""
    low, middle, high = lines.slopes.unbind(1)
    return (middle > low).double() + ((high > middle) & (middle > low)).double()


def _narrow(form: Form) -> Form:
    """For the search: narrow numbers and no claim."""
    return Form({t: x.to(SEARCH) for t, x in form.coefficients.items()}, form.constant.to(SEARCH), None)
