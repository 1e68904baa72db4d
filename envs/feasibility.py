"""Which bits can still be given to a layer so that every budget is met in the end.

What is searched are *units*: single layers, or groups of layers that share one pair of bits (`LayerInfo.tie`). A unit
stands at the place of its first layer, has its name, and costs what its layers cost together, so whoever searches needs
to know nothing of groups.

All costs that depend on bits are additive over layers and monotone in both bits (`arqsearch.quantize.cost`), so the
smallest completion of a partial assignment gives the smallest bits to every open unit. A budget's *slack* is what its
limit leaves above that smallest completion; bits are feasible when their cost above the unit's minimum fits the
slack of every budget. This holds for any order in which units are assigned. Integers throughout: no rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.bitwidths import ALL_BITS, BitWidths, LayerBits
from arqsearch.quantize.cost import COSTS, Budget, LayerInfo, total_cost


class Feasibility:
    """The feasible set of a search: units, choices and what each choice costs above the minimum.

    :param layers: every conv and linear layer in execution order; those with the same `tie` are one unit.
    :param budget: limits to meet at once; none means that everything is feasible.
    :param choices: bits that a searched layer may take.
    :param fixed: layers whose (weight bits, activation bits) are given; they count to the cost.
    :raises ArqError: when a choice lies outside 2..8, a fixed layer is unknown or tied to one that is not fixed, no
        layer is left to search, or the budget is below the smallest assignment.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        budget: Budget,
        choices: Sequence[int] = ALL_BITS,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.budget = budget
        self.choices = _checked_choices(choices)
        self.fixed = _checked_fixed(fixed or {}, [layer.name for layer in self.layers])
        #: The layers of each unit, in execution order.
        self.members = _units(self.layers, self.fixed)
        #: The first layer of each unit, which stands for the unit.
        self.searched = tuple(members[0] for members in self.members)
        if not self.searched:
            raise ArqError("Every layer is fixed, so there is nothing to search; free at least one layer.")
        budget.check_attainable(self.layers, self.choices, self.fixed)
        #: Every (weight, activation) pair, weights slowest: pair ``i * len(choices) + j``.
        self.pairs = tuple(LayerBits(w, a) for w, a in product(self.choices, repeat=2))
        self.minimum = self.pairs[0]
        smallest = BitWidths.uniform([layer.name for layer in self.layers], *self.minimum, fixed=self.fixed)
        #: Per limit: what it leaves above the smallest assignment.
        self.initial_slack = tuple(limit - total_cost(name, self.layers, smallest) for name, limit in budget.limits)
        self._excess = tuple(
            {pair: tuple(self._above(name, members, pair) for name, _ in budget.limits) for pair in self.pairs}
            for members in self.members
        )

    def _above(self, name: str, members: Sequence[LayerInfo], pair: LayerBits) -> int:
        cost = COSTS[name]
        if not cost.additive:  # The same for all bits; checked as attainable.
            return 0
        return sum(cost.layer(layer, pair) - cost.layer(layer, self.minimum) for layer in members)

    def excess(self, index: int, bits: LayerBits) -> tuple[int, ...]:
        """Cost of `bits` above the minimum, per limit.

        :param index: position of the unit in :attr:`searched`.
        :param bits: a pair of :attr:`pairs`.
        """
        return self._excess[index][bits]

    def complete(self, bits: Mapping[str, LayerBits]) -> BitWidths:
        """The assignment of every layer, fixed ones included.

        :param bits: of every unit, by the name of its first layer.
        """
        every = {layer.name: bits[members[0].name] for members in self.members for layer in members} | self.fixed
        return BitWidths.from_mapping([(layer.name, every[layer.name]) for layer in self.layers])


class Allocation:
    """A partial assignment that can always be completed within budget; starts with every layer open.

    :param feasibility: the feasible set.
    """

    def __init__(self, feasibility: Feasibility) -> None:
        self.feasibility = feasibility
        self.slack = list(feasibility.initial_slack)
        self._bits: list[LayerBits | None] = [None] * len(feasibility.searched)

    def fits(self, index: int, bits: LayerBits) -> bool:
        """Whether a layer can take `bits`, in place of those it may have already.

        :param index: position among the searched layers.
        :param bits: a pair of the feasibility's pairs.
        """
        wanted, held = self.feasibility.excess(index, bits), self._held(index)
        return all(w - h <= s for w, h, s in zip(wanted, held, self.slack, strict=True))

    def feasible(self, index: int) -> list[bool]:
        """:meth:`fits` for every pair; the smallest pair always fits.

        :param index: position among the searched layers.
        """
        return [self.fits(index, pair) for pair in self.feasibility.pairs]

    def assign(self, index: int, bits: LayerBits) -> None:
        """Give `bits` to a layer, in place of those it may have already.

        :param index: position among the searched layers.
        :param bits: a pair that fits.
        :raises ArqError: when the bits do not fit.
        """
        if not self.fits(index, bits):
            name = self.feasibility.searched[index].name
            raise ArqError(
                f"Bits {tuple(bits)} for layer {name!r} leave no assignment within budget; take a feasible pair."
            )
        wanted, held = self.feasibility.excess(index, bits), self._held(index)
        self.slack = [s - w + h for s, w, h in zip(self.slack, wanted, held, strict=True)]
        self._bits[index] = bits

    def _held(self, index: int) -> tuple[int, ...]:
        """What a layer holds of each slack: 0 while it is open."""
        return self.feasibility.excess(index, self._bits[index] or self.feasibility.minimum)

    def slack_fractions(self) -> list[float]:
        """Slack left of each budget as a share in [0, 1] of the slack at the start (0 where there was none)."""
        return [s / s0 if s0 else 0.0 for s, s0 in zip(self.slack, self.feasibility.initial_slack, strict=True)]

    def bitwidths(self) -> BitWidths:
        """The assignment of every layer, fixed ones included; open units have the smallest bits."""
        searched = {
            layer.name: bits or self.feasibility.minimum
            for layer, bits in zip(self.feasibility.searched, self._bits, strict=True)
        }
        return self.feasibility.complete(searched)


def nearest_bits(wanted: int, options: Iterable[int]) -> int:
    """The option with the smallest distance, the fewer bits on a tie.

    :param wanted: requested bits.
    :param options: feasible bits, at least one.
    """
    return min(options, key=lambda bits: (abs(bits - wanted), bits))


def nearest_pair(wanted: LayerBits, options: Iterable[LayerBits]) -> LayerBits:
    """The option with the smallest L1 distance in bits; on ties the fewest bits in sum, then the fewest weight bits.

    :param wanted: requested pair.
    :param options: feasible pairs, at least one.
    """
    return min(
        options,
        key=lambda p: (
            abs(p.weight - wanted.weight) + abs(p.activation - wanted.activation),
            p.weight + p.activation,
            p.weight,
        ),
    )


def _checked_choices(choices: Sequence[int]) -> tuple[int, ...]:
    wrong = [c for c in choices if c not in ALL_BITS]
    if wrong or not choices:
        raise ArqError(
            f"Bit-width choices {list(choices)} are not valid; give at least one whole number from "
            f"{ALL_BITS[0]} to {ALL_BITS[-1]}."
        )
    return tuple(sorted({int(c) for c in choices}))


def _units(layers: Sequence[LayerInfo], fixed: Mapping[str, LayerBits]) -> tuple[tuple[LayerInfo, ...], ...]:
    """Searched layers, those that share their bits together, in the order of their first layers."""
    units: dict[tuple[bool, str], list[LayerInfo]] = {}
    held = {layer.tie: layer.name for layer in layers if layer.tie is not None and layer.name in fixed}
    for layer in layers:
        if layer.name in fixed:
            continue
        if layer.tie is not None and layer.tie in held:
            name = held[layer.tie]
            raise ArqError(
                f"Layer {layer.name!r} shares its bits with {name!r}, which is fixed at {list(fixed[name])}; fix both, "
                "or take one of them out of the group."
            )
        units.setdefault((layer.tie is not None, layer.tie or layer.name), []).append(layer)
    return tuple(tuple(members) for members in units.values())


def _checked_fixed(fixed: Mapping[str, tuple[int, int]], names: Sequence[str]) -> dict[str, LayerBits]:
    for name in fixed:
        if name not in names:
            raise ArqError(f"Fixed layer {name!r} is not a layer of this network. {nearest(name, names)}")
    return {name: LayerBits(*bits) for name, bits in fixed.items()}
