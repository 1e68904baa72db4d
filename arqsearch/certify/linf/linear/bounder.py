"""`LinearBounds`: boxes, tightened by linear bounds wherever these are tighter.

CROWN / DeepPoly style backward substitution (Zhang et al., NeurIPS 2018; Singh et al., POPL 2019) on the integer
program, with the slopes optimised for each bound (alpha-CROWN, Xu et al., ICLR 2021) and Lagrangian terms for split
neurons (beta-CROWN, Wang et al., NeurIPS 2021). Lines hold at every integer; float64 rounding is bounded a priori.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arqsearch.certify.linf.domain import Bound, Domain, needed
from arqsearch.certify.linf.linear.maximum import WindowLines
from arqsearch.certify.linf.linear.optimize import Optimizer
from arqsearch.certify.linf.linear.propagate import Layers, Limits, Network, depth, outward
from arqsearch.certify.linf.linear.rounding import UNKNOWN, integer_above
from arqsearch.certify.linf.linear.rules import Form, Slopes
from arqsearch.certify.linf.linear.specification import Specification
from arqsearch.certify.linf.linear.staircase import Lines
from arqsearch.certify.linf.linear.substitute import Minimum, box_of, joined, spread, starting_slopes, substitute
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram

#: Below so many rows at a time it pays to keep the domains apart.
SMALL_GROUP = 64


@dataclass
class _State:
    """What is known of a chunk of domains: layers, and by operation index the lines and the chosen slopes."""

    layers: Layers
    limits: Limits
    lines: dict[int, Lines | WindowLines]
    chosen: dict[int, Slopes | WindowLines]


class LinearBounds:
    """Sound lower bounds of ``z_y - z_j`` and integer bounds of every tensor, batched over domains.

    :param program: the integer program; its ranges are proven first.
    :param device: torch device.
    :param iterations: steps of the slopes' optimisation for the margins that stay open; 0 is one backward pass.
    :param mixed: take the tighter of box and linear bound for each margin and, where `refine` allows, each neuron.
    :param refine: at most so many unstable neurons of one tensor are bounded by their own backward pass; a tensor with
        more keeps its boxes. 0 keeps all boxes.
    :param rate: step size of the optimisation.
    :param memory: bytes that the largest tensor of one inner batch may take; what fits a cache is fastest.
    """

    def __init__(
        self, program: IntegerProgram, device: str = "cpu", iterations: int = 0, mixed: bool = True, refine: int = 0,
        rate: float = 0.25, memory: int = 1 << 21,
    ) -> None:  # fmt: skip
        self.program, self.device = program, torch.device(device)
        self.iterations, self.mixed, self.refine, self.rate = iterations, mixed, refine, rate
        self.name = f"linear-{iterations}"
        self.network = Network(program, self.device)
        self._specifications = [Specification(self.network, True), Specification(self.network, False)]
        if self._specifications[0].over is None:
            del self._specifications[0]
        self._depth = depth(program)
        self._largest = max(spec_size(spec.shape) for spec in program.tensors)
        self._block = max(1, memory // (8 * self._largest))
        self._told = sorted(
            {i for op in program.ops for i in op.inputs if isinstance(op, O.Requantize | O.MaxPool2d)}
            | {op.output for op in program.ops if isinstance(op, O.Requantize | O.Add)}
        )

    @torch.no_grad()
    def bound(self, domain: Domain, known: Bound | None = None) -> Bound:
        """Bound every domain of the batch.

        :param known: bounds proven for these domains or for larger ones that contain them, position by position.
        """
        places = torch.split(torch.arange(len(domain)), self._block)
        parts = [self._bound(domain[at], None if known is None else _part(known, at)) for at in places]
        return Bound(
            torch.cat([p.margins for p in parts]),
            torch.cat([p.empty for p in parts]),
            {t: (_joined(parts, t, 0), _joined(parts, t, 1)) for t in self._told},
            {t: torch.cat([p.influence[t] for p in parts]) for t in parts[0].influence},
        )

    def _bound(self, domain: Domain, known: Bound | None) -> Bound:
        limits = self.network.limits(domain, known)
        state = _State(self.network.start(domain, limits), limits, {}, {})
        for index in range(len(self.program.ops)):
            bounds = self.network.enter(state.layers, index, limits)
            if bounds is not None and self._worth(index):
                bounds = self._refined(state, index, bounds, domain.labels)
            self.network.settle(state.layers, index, bounds, limits)
        labels = domain.labels.to(self.device)
        margins = self._boxes(state, labels) if self.mixed else _unknown(labels, self.program.num_classes)
        if known is not None:
            margins = torch.maximum(margins, known.margins.to(self.device))
            state.layers.empty = state.layers.empty | known.empty.to(self.device)
        goal = needed(domain.labels, self.program.num_classes).to(self.device)
        influence = self._margins(state, labels, margins, goal)
        layers = state.layers
        return Bound(
            margins.cpu(),
            layers.empty.cpu(),
            {t: (outward(layers.tensors[t][0]), outward(layers.tensors[t][1])) for t in self._told},
            influence,
        )

    def _worth(self, index: int) -> bool:
        """Whether the non-linearity of an operation acts on something that boxes do not bound exactly."""
        op = self.program.ops[index]
        reach = max(self._depth[i] for i in op.inputs) + int(isinstance(op, O.Add))
        return self.mixed and self.refine > 0 and reach > 1

    def _boxes(self, state: _State, labels: Tensor) -> Tensor:
        """Margins by boxes, the last linear layer fused with the specification; int64 ``(N, K)``."""
        last, tensors = self.program.ops[-1], state.layers.tensors
        rows = torch.arange(len(labels), device=self.device)
        low, high = tensors[self.program.output]
        margins = low[rows, labels][:, None] - high
        if isinstance(last, O.Linear) and last.output == self.program.output:
            weight = torch.as_tensor(last.weight.astype("float64"), device=self.device)
            bias = torch.as_tensor(last.bias.astype("float64"), device=self.device)
            low, high = tensors[last.inputs[0]]
            across = weight[labels][:, None, :] - weight[None]
            centre = torch.einsum("nki,ni->nk", across, low + high)
            radius = torch.einsum("nki,ni->nk", across.abs(), high - low)
            margins = torch.maximum(margins, (centre - radius) / 2 + bias[labels][:, None] - bias[None])
        margins[rows, labels] = 0
        return margins.to(torch.int64)

    def _prepare(self, state: _State, stop: int) -> None:
        """Lines of all non-linear operations before `stop`."""
        for index, bounds in state.layers.inner.items():
            if index < stop and index not in state.lines:
                lines = self.network.rules[index].relax(bounds)
                state.lines[index] = lines
                state.chosen[index] = lines if isinstance(lines, WindowLines) else starting_slopes(lines)

    def _run(
        self, state: _State, form: Callable[[Tensor], Form], owner: Tensor, stop: int, keep: bool = False
    ) -> Minimum:
        """One backward pass with the starting lines.

        :param form: the rows at given places.
        """
        self._prepare(state, stop)
        parts = []
        for rows in torch.split(torch.arange(len(owner), device=self.device), max(self._block, SMALL_GROUP)):
            mine = owner[rows]
            chosen = {i: x for i, x in state.chosen.items() if i < stop}
            parts.append(
                substitute(
                    self.network, form(rows), stop, lambda i: (spread(chosen[i], mine), None),  # noqa: B023
                    box_of(state.layers, mine), keep,
                )
            )  # fmt: skip
        return joined(parts)

    def _groups(self, where: Tensor) -> list[Tensor]:
        """Pairs (domain, element) in groups of a size that fits; of one domain each where groups are small anyway."""
        size = max(1, self._block // 2)
        if size > SMALL_GROUP:
            return list(torch.split(where, size))
        counts = torch.bincount(where[:, 0]).tolist()
        alone = torch.split(where, [count for count in counts if count])
        return [group for part in alone for group in torch.split(part, max(size, SMALL_GROUP // 2))]

    def _refined(
        self, state: _State, index: int, bounds: tuple[Tensor, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the unstable elements that operation `index` acts on, tightened by backward passes."""
        rule, op = self.network.rules[index], self.program.ops[index]
        low, high = (x.flatten(1).clone() for x in bounds)
        active = low < high
        if hasattr(rule, "at"):
            bottom, top = (rule.at(x).flatten(1) for x in bounds)
            active = bottom < top
            if op.output == self.program.output:  # Classes that cannot win any more do not matter.
                own = labels.to(self.device)[:, None]
                rival = top - bottom.gather(1, own) > -needed(labels, bottom.shape[1]).to(self.device)
                active &= rival.scatter(1, own, True) & rival.any(1, keepdim=True)
        active &= ~state.layers.empty[:, None]
        active &= (active.sum(1) <= self.refine)[:, None]
        where = active.nonzero()
        if len(where) == 0:
            return bounds
        shape = bounds[0].shape[1:]
        for at in self._groups(where):
            count = len(at)
            rows = torch.arange(count, device=self.device)
            start = torch.zeros(2 * count, low.shape[1], dtype=torch.float64, device=self.device)
            start[rows, at[:, 1]], start[rows + count, at[:, 1]] = 1.0, -1.0
            start = start.reshape(2 * count, *shape)
            zero = torch.zeros(2 * count, dtype=torch.float64, device=self.device)
            form = Form({i: start for i in op.inputs}, zero, zero)
            found = self._run(state, lambda _: form, torch.cat([at[:, 0], at[:, 0]]), index)  # noqa: B023
            assert found.error is not None
            whole = integer_above(found.lower, found.error).double()
            place = at[:, 0], at[:, 1]
            low[place] = torch.maximum(low[place], whole[:count])
            high[place] = torch.minimum(high[place], -whole[count:])
        return state.layers.clash((low.reshape(bounds[0].shape), high.reshape(bounds[1].shape)))

    def _margins(self, state: _State, labels: Tensor, margins: Tensor, goal: Tensor) -> dict[int, Tensor]:
        """Tighten the open margins in place by linear bounds; gives the influence of splits."""
        unproven = (margins < goal) & ~state.layers.empty[:, None]
        unproven[torch.arange(len(labels)), labels] = False
        owner, classes = (unproven if self.mixed else torch.ones_like(unproven)).nonzero(as_tuple=True)
        outputs = [self.program.ops[i].output for i in self.network.staircases]
        influence = {t: torch.zeros(len(labels), *self.program.tensors[t].shape, dtype=torch.float64) for t in outputs}
        if len(owner) == 0:
            return influence
        for number, specification in enumerate(self._specifications):
            if number and not (self.refine or self.iterations):
                break
            owner, classes = self._raise(state, specification, labels, margins, goal, owner, classes, influence)
            if len(owner) == 0:
                break
        return influence

    def _raise(
        self, state: _State, specification: Specification, labels: Tensor, margins: Tensor, goal: Tensor,
        owner: Tensor, classes: Tensor, influence: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tighten the margins of the given rows in place; returns those that stay open."""

        def form(which: Tensor) -> Form:
            return specification.form(labels[owner[which]], classes[which])

        def settle(result: Minimum) -> Tensor:
            assert result.error is not None
            lower = integer_above(result.lower, result.error)
            found = specification.margin(lower, logits, owner, labels[owner], classes)
            margins[owner, classes] = torch.maximum(margins[owner, classes], found)
            return (found < goal[owner, classes]).nonzero()[:, 0]

        logits = state.layers.tensors[self.program.output]
        self._prepare(state, specification.stop)
        result = self._run(state, form, owner, specification.stop, keep=True)
        still = settle(result)
        if self.iterations and len(still):
            owner, classes = owner[still], classes[still]
            optimizer = Optimizer(
                self.network, state.layers, state.limits, state.lines, owner, specification, self.iterations, self.rate
            )
            result = optimizer.run(form, specification.goal(goal[owner, classes]))
            still = settle(result)
        self._influence(state, result, owner, margins[owner, classes] - goal[owner, classes], influence)
        return owner[still], classes[still]

    def _influence(
        self, state: _State, result: Minimum, owner: Tensor, slack: Tensor, influence: dict[int, Tensor]
    ) -> None:
        """What the lines of each element can cost the worst open margin of its domain."""
        order = slack.argsort(descending=True)
        worst = torch.full((len(state.layers.empty),), -1, dtype=torch.int64, device=self.device)
        worst[owner[order]] = order  # The last one written is the smallest.
        which = (worst >= 0).nonzero()[:, 0]
        row = worst[which]
        for index, coefficient in result.coefficients.items():
            lines = state.lines[index]
            if isinstance(lines, WindowLines):
                continue
            gap, steps = lines.gap[:, which], lines.steps[which]
            # A phase can be split off once; of many roundings a split removes its share only.
            worth = (gap - 1).clamp(min=0) + gap.clamp(max=1) / steps.clamp(min=1)
            chosen = coefficient[row]
            score = chosen.clamp(min=0) * worth[0] - chosen.clamp(max=0) * worth[1]
            score = score.permute(0, 2, 3, 1) if score.ndim == 4 else score
            influence[self.program.ops[index].output][which.cpu()] = score.cpu()


def spec_size(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor."""
    count = 1
    for length in shape:
        count *= length
    return count


def _unknown(labels: Tensor, classes: int) -> Tensor:
    margins = torch.full((len(labels), classes), -UNKNOWN, dtype=torch.int64, device=labels.device)
    margins[torch.arange(len(labels)), labels] = 0
    return margins


def _part(known: Bound, at: Tensor) -> Bound:
    return Bound(known.margins[at], known.empty[at], {t: (lo[at], hi[at]) for t, (lo, hi) in known.tensors.items()})


def _joined(parts: list[Bound], tensor: int, side: int) -> Tensor:
    return torch.cat([part.tensors[tensor][side] for part in parts])
