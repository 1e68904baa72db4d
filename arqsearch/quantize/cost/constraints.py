"""Which layers are frozen and which share their bits: names and globs of a recipe, resolved on a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.cost.layers import LayerInfo

if TYPE_CHECKING:
    from arqsearch.quantize.graph import LayerGraph


@dataclass(frozen=True)
class Constraints:
    """What a search must leave as it is.

    :param fixed: layers whose (weight bits, activation bits) are not searched.
    :param ties: groups of at least two layers that share one pair of bits; disjoint, none of them fixed.
    """

    fixed: Mapping[str, tuple[int, int]]
    ties: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def resolve(
        cls,
        names: Sequence[str],
        freeze: Mapping[str, Sequence[int]],
        group: Sequence[Sequence[str]],
        *,
        ends: Sequence[int] | None = None,
        automatic: Sequence[Sequence[str]] = (),
    ) -> Constraints:
        """Resolve a recipe's names and globs.

        A glob means ``*``, ``?`` and ``[...]`` over module paths. Groups that share a layer become one group.

        :param names: every layer in execution order.
        :param freeze: layer or glob to (weight bits, activation bits).
        :param group: lists of layers or globs that share their bits.
        :param ends: bits of the first and the last layer, where `freeze` does not name them; None searches them. A glob
            of a group leaves out a layer that is fixed by this alone.
        :param automatic: further groups, of exact names, from which frozen layers are left out.
        :raises ArqError: for a name or glob that matches no layer, or where entries contradict each other.
        """
        frozen: dict[str, tuple[int, int]] = {}
        origin: dict[str, str] = {}
        for pattern, bits in freeze.items():
            pair = (int(bits[0]), int(bits[1]))
            for name in _matching(pattern, names, "search.freeze"):
                if frozen.get(name, pair) != pair:
                    raise ArqError(
                        f"search.freeze contradicts itself: layer {name!r} is frozen at {list(frozen[name])} by "
                        f"{origin[name]!r} and at {list(pair)} by {pattern!r}. Let one entry name it."
                    )
                frozen[name], origin[name] = pair, pattern
        fixed = dict(frozen)
        if ends is not None:
            for name in (names[0], names[-1]):
                fixed.setdefault(name, (int(ends[0]), int(ends[1])))
        tied = [[name for name in members if name not in fixed] for members in automatic]
        for entry in group:
            members: list[str] = []
            for pattern in entry:
                matched = _matching(pattern, names, "search.group")
                if pattern not in names:
                    matched = [name for name in matched if name in frozen or name not in fixed]
                members += [name for name in matched if name not in members]
            held = [name for name in members if name in fixed]
            if held:
                source = f"search.freeze ({origin[held[0]]!r})" if held[0] in frozen else "search.first_last"
                raise ArqError(
                    f"search.group {list(entry)} holds layer {held[0]!r}, which {source} fixes at "
                    f"{list(fixed[held[0]])}. Leave it out of the group, or freeze the whole group."
                )
            if len(members) < 2:
                raise ArqError(
                    f"search.group {list(entry)} names {len(members)} searched layer(s); a group needs at least two."
                )
            tied.append(members)
        return cls(fixed, _joined(tied, names))

    def applied(self, layers: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
        """The layers with their ties, which environments and policies follow."""
        tie = {name: members[0] for members in self.ties for name in members}
        return tuple(replace(layer, tie=tie.get(layer.name)) for layer in layers)


def _matching(pattern: str, names: Sequence[str], where: str) -> list[str]:
    found = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ArqError(f"{where}: no layer matches {pattern!r}. {nearest(pattern, names)}")
    return found


def _joined(groups: Sequence[Sequence[str]], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups that share a layer made one; each in execution order, those of one layer left out."""
    joined: list[set[str]] = []
    for members in groups:
        touching = [other for other in joined if other & set(members)]
        joined = [other for other in joined if other not in touching] + [set(members).union(*touching)]
    ordered = [tuple(name for name in names if name in members) for members in joined]
    return tuple(sorted((members for members in ordered if len(members) > 1), key=lambda m: names.index(m[0])))


def residual_ties(graph: LayerGraph) -> tuple[tuple[str, ...], ...]:
    """The layers that feed each residual sum, for targets that want one format on both sides of a sum.

    A layer feeds a sum when its result reaches it through no other conv or linear layer. A sum that feeds another one
    has the format of its operands, so the layers of both are one group: in a ResNet those of one stage, and those of
    all stages where shortcuts have no layer of their own.

    :returns: groups of layer names in execution order, disjoint.
    """
    feeding: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.kind in {"conv", "linear"}:
            feeding[node.name] = [node.name]
        else:
            feeding[node.name] = list(dict.fromkeys(name for source in node.inputs for name in feeding[source]))
    groups = [feeding[node.name] for node in graph.nodes if node.kind == "add"]
    return _joined(groups, [node.name for node in graph.layers])
