"""Branch and bound over sets of images: sound bounds first, the worst set next, splits at whole numbers.

Best-first search in batches. A set whose bounds leave its class no rival is closed, as is one whose splits contradict
each other; every other is split, at a code of one neuron or at a grey level of one pixel (`branch_choice`), into two
sets without a number in between. Sets are finite, so the search ends; a set of one image is run through the program
itself. Input boxes are split as in QA-IBP (Lechner et al., AAAI 2023), but at whole numbers; phases are split as by
Bunel et al., "Branch and Bound for Piecewise Linear Neural Network Verification" (JMLR 2020).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from arqsearch.certify.linf.branch_choice import Chooser, Split
from arqsearch.certify.linf.domain import Bound, Bounder, Domain, Interval, needed
from arqsearch.integer.program import IntegerProgram

Answer: TypeAlias = Literal["robust", "non-robust", "unknown"]
Seek: TypeAlias = Callable[[Domain, Tensor, int], Tensor | None]
Leaf: TypeAlias = Callable[[Domain, Bound], tuple[Answer, Tensor | None]]
#: Bytes of proven bounds that waiting sets may hold; later ones keep only their splits.
MEMORY = 1 << 30


@dataclass(order=True)
class _Node:
    """One open set. Ordered by how far its worst margin is from what is needed, then by age."""

    slack: int
    age: int
    lo: Tensor = field(compare=False)
    hi: Tensor = field(compare=False)
    limits: tuple[Split, ...] = field(compare=False)
    margins: Tensor = field(compare=False)
    tensors: dict[int, Interval] = field(compare=False)
    split: Split = field(compare=False)
    finish: bool = field(compare=False)


@dataclass(frozen=True)
class BranchResult:
    """Outcome for one domain.

    :param answer: robust, non-robust, or unknown: a limit was hit.
    :param domains: sets bounded.
    :param image: for non-robust: int16 ``(H, W, C)``.
    :param worst: smallest margin, less what is needed, over the sets still open; None when none is.
    :param limit: what was hit.
    """

    answer: Answer
    domains: int
    image: Tensor | None = None
    worst: int | None = None
    limit: Literal["time", "domains"] | None = None


class BranchAndBound:
    """Complete verification by one bounder.

    :param program: the integer program.
    :param bounder: bounds sets.
    :param batch: sets split at once.
    :param attack: asked about open sets now and then: ``(domain, targets, seed)`` to an image of another class, or
        None.
    """

    def __init__(self, program: IntegerProgram, bounder: Bounder, batch: int = 16, attack: Seek | None = None) -> None:
        self.program, self.bounder, self.batch, self.attack = program, bounder, batch, attack
        self.chooser = Chooser(program)

    def run(
        self, domain: Domain, known: Bound | None = None, deadline: float | None = None, domains: int | None = None,
        leaf: Leaf | None = None,
    ) -> BranchResult:  # fmt: skip
        """Decide one domain.

        :param domain: of length 1, without `limits`.
        :param known: what is proven about it.
        :param deadline: `time.monotonic` at which to stop.
        :param domains: sets to bound at most; a split bounds two.
        :param leaf: may decide a set whose neurons leave nothing to gain: ``(domain, bound)`` to an answer and an
            image. Where it cannot, and without one, pixels are split, down to single images.
        """
        search = _Search(self, domain, deadline, domains, leaf)
        search.bound([(domain.lo[0], domain.hi[0], ())], [known] if known is not None else [None])
        while search.open and search.image is None and not search.over():
            search.step()
        if search.image is not None:
            return BranchResult("non-robust", search.count, search.image)
        if not search.open:
            return BranchResult("robust", search.count)
        worst = min([node.slack for node in search.open], default=None)
        return BranchResult("unknown", search.count, None, worst, search.limit or "time")


class _Search:
    """The state of one search."""

    def __init__(
        self, method: BranchAndBound, domain: Domain, deadline: float | None, domains: int | None, leaf: Leaf | None
    ) -> None:
        self.method, self.label, self.leaf = method, domain.labels, leaf
        self.deadline, self.domains = deadline, domains
        self.goal = needed(domain.labels, method.program.num_classes)[0]
        self.open: list[_Node] = []
        self.ages = itertools.count()
        self.count = self.turns = self.held = 0
        self.image: Tensor | None = None
        self.limit: Literal["time", "domains"] | None = None

    def over(self) -> bool:
        """Whether a limit is hit."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.limit = "time"
        elif self.domains is not None and self.domains - self.count < 2:
            self.limit = "domains"
        return self.limit is not None

    def step(self) -> None:
        """Split a batch of the worst sets and bound the parts."""
        size = self.method.batch
        if self.domains is not None:
            size = max(1, min(size, (self.domains - self.count) // 2))
        nodes = [heapq.heappop(self.open) for _ in range(min(size, len(self.open)))]
        self.held -= sum(_bytes(node.tensors) for node in nodes)
        parts, known = [], []
        for node in nodes:
            if node.finish and self._finished(node):
                continue
            for lo, hi, limits in self._halves(node):
                parts.append((lo, hi, limits))
                known.append(_known(node))
        if parts and self.image is None:
            self.bound(parts, known)
        self.turns += 1

    def bound(
        self, parts: Sequence[tuple[Tensor, Tensor, tuple[Split, ...]]], known: Sequence[Bound | None]
    ) -> None:  # fmt: skip
        """Bound sets, close what can be closed and keep the others."""
        domain = self._domain(parts)
        single = (domain.lo == domain.hi).flatten(1).all(1)
        if bool(single.any()):
            self._run_points(domain[single.nonzero()[:, 0]])
            self.count += int(single.sum())
            rest = (~single).nonzero()[:, 0]
            parts, known = [parts[i] for i in rest.tolist()], [known[i] for i in rest.tolist()]
            domain = domain[rest]
        if not parts or self.image is not None:
            return
        found = self.method.bounder.bound(domain, _stacked(known))
        self.count += len(parts)
        slack = found.margins - self.goal
        slack[:, int(self.label)] = torch.iinfo(torch.int64).max
        lowest = slack.amin(1)
        still = ((lowest < 0) & ~found.empty).nonzero()[:, 0]
        if not len(still):
            return
        splits = self.method.chooser.choose(domain[still], _rows(found, still), lowest[still])
        for row, split in zip(still.tolist(), splits, strict=True):
            lo, hi, limits = parts[row]
            tensors = {
                t: (low[row].to(torch.int32), high[row].to(torch.int32)) for t, (low, high) in found.tensors.items()
            }
            if self.held + _bytes(tensors) > MEMORY:
                tensors = {}
            self.held += _bytes(tensors)
            finish = self.leaf is not None and split.tensor == 0 and bool(found.influence)
            node = _Node(int(lowest[row]), next(self.ages), lo, hi, limits, found.margins[row], tensors, split, finish)
            heapq.heappush(self.open, node)
        self._attack(domain, found, still, lowest)

    def _attack(self, domain: Domain, found: Bound, still: Tensor, lowest: Tensor) -> None:
        """Look for a counter-example in the worst set of this batch; every turn at first, then ever more seldom."""
        attack = self.method.attack
        if attack is None or self.turns & (self.turns - 1):
            return
        row = still[[int(lowest[still].argmin())]]
        self.image = attack(domain[row], found.margins[row] < self.goal, self.turns)

    def _finished(self, node: _Node) -> bool:
        """Whether the leaf method decides a set."""
        assert self.leaf is not None
        domain = self._domain([(node.lo, node.hi, node.limits)])
        known = _known(node) or Bound(node.margins[None], torch.zeros(1, dtype=torch.bool))
        answer, image = self.leaf(domain, known)
        if answer == "non-robust":
            self.image = image
        return answer != "unknown"

    def _run_points(self, domain: Domain) -> None:
        """Sets of one image each: the program itself decides. (A neuron split that excludes it does no harm.)"""
        wrong = self.method.program.run(domain.lo).long().argmax(1) != domain.labels
        if bool(wrong.any()):
            self.image = domain.lo[int(wrong.nonzero()[0, 0])]

    def _halves(self, node: _Node) -> list[tuple[Tensor, Tensor, tuple[Split, ...]]]:
        """Both sides of a node's split."""
        split = node.split
        below, above = (
            Split(split.tensor, split.element, split.low, split.cut),
            Split(split.tensor, split.element, split.cut + 1, split.high),
        )
        if split.tensor:
            return [(node.lo, node.hi, (*node.limits, below)), (node.lo, node.hi, (*node.limits, above))]
        top, bottom = node.hi.clone(), node.lo.clone()
        top.view(-1)[split.element], bottom.view(-1)[split.element] = split.cut, split.cut + 1
        return [(node.lo, top, node.limits), (bottom, node.hi, node.limits)]

    def _domain(self, parts: Sequence[tuple[Tensor, Tensor, tuple[Split, ...]]]) -> Domain:
        lo, hi = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        limits: dict[int, Interval] = {}
        for tensor in sorted({split.tensor for part in parts for split in part[2]}):
            spec = self.method.program.tensors[tensor]
            low = torch.full((len(parts), *spec.shape), spec.lo, dtype=torch.int64)
            high = torch.full_like(low, spec.hi)
            for row, (_, _, splits) in enumerate(parts):
                for split in splits:
                    if split.tensor == tensor:
                        low[row].view(-1)[split.element] = max(int(low[row].view(-1)[split.element]), split.low)
                        high[row].view(-1)[split.element] = min(int(high[row].view(-1)[split.element]), split.high)
            limits[tensor] = low, high
        return Domain(lo, hi, self.label.expand(len(parts)), limits)


def _bytes(tensors: dict[int, Interval]) -> int:
    return sum(2 * low.numel() * low.element_size() for low, _ in tensors.values())


def _known(node: _Node) -> Bound | None:
    if not node.tensors:
        return None
    tensors = {t: (low[None].long(), high[None].long()) for t, (low, high) in node.tensors.items()}
    return Bound(node.margins[None], torch.zeros(1, dtype=torch.bool), tensors)


def _rows(bound: Bound, rows: Tensor) -> Bound:
    tensors = {t: (low[rows], high[rows]) for t, (low, high) in bound.tensors.items()}
    influence = {t: values[rows] for t, values in bound.influence.items()}
    return Bound(bound.margins[rows], bound.empty[rows], tensors, influence)


def _stacked(known: Sequence[Bound | None]) -> Bound | None:
    """What is known of all, position by position; nothing where one of them knows nothing."""
    given = [bound for bound in known if bound is not None]
    if len(given) < len(known) or not given:
        return None
    tensors = {
        t: (torch.cat([b.tensors[t][0] for b in given]), torch.cat([b.tensors[t][1] for b in given]))
        for t in given[0].tensors
        if all(t in b.tensors for b in given)
    }
    return Bound(torch.cat([b.margins for b in given]), torch.cat([b.empty for b in given]), tensors)
