"""Boxes forward: integer bounds of every tensor, with split limits and earlier bounds taken in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arqsearch.certify.linf.boxes import RULES as BOXES
from arqsearch.certify.linf.domain import Bound, Domain
from arqsearch.certify.linf.linear.rules import RULES, Bounds, StaircaseRule
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import prove


def inward(x: Tensor, device: torch.device) -> Tensor:
    """NHWC integers of the interface to float64 NCHW."""
    x = x.to(device=device, dtype=torch.float64)
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def outward(x: Tensor) -> Tensor:
    """Back to int64 NHWC on the CPU."""
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    return x.to(device="cpu", dtype=torch.int64)


def intersect(a: Bounds, b: Bounds | None) -> Bounds:
    """Both at once."""
    return a if b is None else (torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1]))


def alike(x: Tensor) -> bool:
    """Whether all domains share one row, as an expanded view says."""
    return x.shape[0] > 1 and x.stride(0) == 0


def shared(bounds: Bounds) -> Bounds:
    """One row for all domains, where all rows are equal: what is computed from it is computed once."""
    low, high = bounds
    if len(low) > 1 and bool((low == low[:1]).all()) and bool((high == high[:1]).all()):
        return low[:1].expand_as(low), high[:1].expand_as(high)
    return bounds


def once(function: Callable[[Bounds], Bounds], bounds: Bounds) -> Bounds:
    """Apply a rule to bounds, to a single row where they are shared."""
    low, high = bounds
    if not (alike(low) and alike(high)):
        return function(bounds)
    first, second = function((low[:1], high[:1]))
    return first.expand(len(low), *first.shape[1:]), second.expand(len(low), *second.shape[1:])


def _doubled(bounds: Bounds) -> Bounds:
    return bounds[0].double(), bounds[1].double()


@dataclass
class Layers:
    """The bounds of N domains as they grow from the pixels up.

    :param tensors: by tensor index, float64 integers ``(N, *NCHW shape)``.
    :param inner: by operation index, bounds of what a non-linearity acts on: its input, or the sum of an Add.
    :param free: as `inner`, before the limits of that operation are taken in.
    :param raw: as `tensors`, before the limits of that tensor are taken in.
    :param empty: domains proven to hold no image; their bounds mean nothing but are well-formed.
    """

    tensors: dict[int, Bounds]
    empty: Tensor
    inner: dict[int, Bounds] = field(default_factory=dict)
    free: dict[int, Bounds] = field(default_factory=dict)
    raw: dict[int, Bounds] = field(default_factory=dict)

    def clash(self, bounds: Bounds) -> Bounds:
        """Mark domains whose bounds cross as empty, and uncross them."""
        low, high = bounds
        crossed = low > high
        if crossed.any():
            self.empty = self.empty | crossed.flatten(1).any(1)
            high = torch.maximum(low, high)
        return low, high


@dataclass(frozen=True)
class Limits:
    """Restrictions of N domains, sorted by where they act.

    :param tensors: what the values of a tensor are known to lie in (splits and earlier bounds).
    :param inner: by operation index, split limits carried back through the staircase: the integers whose image lies
        within them.
    """

    tensors: dict[int, Bounds]
    inner: dict[int, Bounds]


class Network:
    """A program's rules, compiled once: boxes forward, linear forms backward.

    :param program: ranges are proven first.
    :param device: torch device.
    """

    def __init__(self, program: IntegerProgram, device: torch.device) -> None:
        prove(program)
        self.program, self.device = program, device
        self.rules = [RULES[type(op)](op, program, device) for op in program.ops]
        self._steps = [
            None if isinstance(rule, StaircaseRule) else BOXES[type(op)](op, program, device)
            for op, rule in zip(program.ops, self.rules, strict=True)
        ]
        self.staircases = [i for i, rule in enumerate(self.rules) if isinstance(rule, StaircaseRule)]
        #: By tensor: the staircase that reads it alone, through which a limit on its values acts.
        self._reader = {program.ops[i].inputs[0]: i for i in reversed(self.staircases) if not self.is_sum(i)}
        self._writer = {program.ops[i].output: i for i in self.staircases}

    def is_sum(self, index: int) -> bool:
        """Whether an operation is a residual sum."""
        return isinstance(self.program.ops[index], O.Add)

    def limits(self, domain: Domain, known: Bound | None) -> Limits:
        """Sort the restrictions of a batch of domains by where they act."""
        splits = {t: (inward(lo, self.device), inward(hi, self.device)) for t, (lo, hi) in domain.limits.items()}
        inner: dict[int, Bounds] = {}
        for tensor, bounds in splits.items():
            if tensor in self._reader:
                index = self._reader[tensor]
                inner[index] = intersect(bounds, inner.get(index))
            if tensor in self._writer:
                index = self._writer[tensor]
                before = self.rules[index].function.preimage(*bounds)
                inner[index] = intersect(before, inner.get(index))
        tensors = dict(splits)
        for tensor, (lo, hi) in known.tensors.items() if known is not None else ():
            earlier = inward(lo, self.device), inward(hi, self.device)
            tensors[tensor] = intersect(earlier, tensors.get(tensor))
        return Limits(tensors, inner)

    def start(self, domain: Domain, limits: Limits) -> Layers:
        """Layers that know the pixels only."""
        empty = torch.zeros(len(domain), dtype=torch.bool, device=self.device)
        layers = Layers({}, empty)
        pixels = inward(domain.lo, self.device), inward(domain.hi, self.device)
        layers.raw[0] = pixels
        layers.tensors[0] = shared(layers.clash(intersect(pixels, limits.tensors.get(0))))
        return layers

    def enter(self, layers: Layers, index: int, limits: Limits) -> Bounds | None:
        """Bounds of what the non-linearity of operation `index` acts on, restricted; None for an affine operation."""
        op = self.program.ops[index]
        if not self.rules[index].nonlinear:
            return None
        if self.is_sum(index):
            first, second = (layers.tensors[i] for i in op.inputs)
            free = bounds = first[0] + second[0], first[1] + second[1]
        else:
            bounds, free = layers.tensors[op.inputs[0]], layers.raw[op.inputs[0]]
        layers.free[index] = free
        return layers.clash(intersect(bounds, limits.inner.get(index)))

    def settle(self, layers: Layers, index: int, bounds: Bounds | None, limits: Limits) -> None:
        """Keep the bounds of what operation `index` acts on, and step over it."""
        op, rule, step = self.program.ops[index], self.rules[index], self._steps[index]
        if bounds is not None:
            layers.inner[index] = bounds
            if not self.is_sum(index):
                layers.tensors[op.inputs[0]] = bounds
        if isinstance(rule, StaircaseRule):
            assert bounds is not None
            out = once(lambda x: (rule.at(x[0]), rule.at(x[1])), bounds)
        else:
            assert step is not None
            out = once(lambda x: _doubled(step(x)), layers.tensors[op.inputs[0]])
        layers.raw[op.output] = out
        layers.tensors[op.output] = layers.clash(intersect(out, limits.tensors.get(op.output)))


def depth(program: IntegerProgram) -> list[int]:
    """For each tensor, the largest number of sums on a way from the pixels; boxes are exact up to one."""
    found = [0] * len(program.tensors)
    for op in program.ops:
        computes = isinstance(op, O.Conv2d | O.Linear | O.SumPool2d | O.Add | O.MaxPool2d)
        found[op.output] = max(found[i] for i in op.inputs) + int(computes)
    return found
