"""`BitWidths`: the immutable assignment of weight and activation bits to layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from arqsearch.errors import ArqError, nearest

MIN_BITS = 2
MAX_BITS = 8
#: Every bit-width a layer can take, in ascending order.
ALL_BITS: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))


class LayerBits(NamedTuple):
    """Bits of one layer: its weights, and the activations at its input."""

    weight: int
    activation: int


@dataclass(frozen=True)
class BitWidths:
    """Weight and activation bits of every conv and linear layer, in execution order.

    Hashable and immutable; equal when names, order and bits are equal.

    :param layers: pairs (layer name as in the user's module paths, its bits).
    :raises ArqError: when a bit-width lies outside 2..8 or a layer is named twice.
    """

    layers: tuple[tuple[str, LayerBits], ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name, bits in self.layers:
            if name in seen:
                raise ArqError(f"Layer {name!r} appears twice in the bit-widths; name it once.")
            seen.add(name)
            for what, value in zip(("weight", "activation"), bits, strict=True):
                if not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
                    raise ArqError(
                        f"Layer {name!r} has {what} bits {value!r}; use a whole number from {MIN_BITS} to {MAX_BITS}."
                    )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, tuple[int, int]] | Iterable[tuple[str, tuple[int, int]]]) -> BitWidths:
        """Build from ``{layer: (weight bits, activation bits)}`` in that order."""
        items = mapping.items() if isinstance(mapping, Mapping) else mapping
        return cls(tuple((name, LayerBits(*bits)) for name, bits in items))

    @classmethod
    def uniform(
        cls,
        names: Iterable[str],
        weight: int,
        activation: int,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> BitWidths:
        """The same bits for every layer, except those in `fixed`."""
        fixed = fixed or {}
        return cls.from_mapping([(name, fixed.get(name, (weight, activation))) for name in names])

    @cached_property
    def _by_name(self) -> dict[str, LayerBits]:
        return dict(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names in execution order."""
        return tuple(name for name, _ in self.layers)

    def __getitem__(self, name: str) -> LayerBits:
        try:
            return self._by_name[name]
        except KeyError:
            raise ArqError(f"No layer {name!r} in these bit-widths. {nearest(name, self.names)}") from None

    def __iter__(self) -> Iterator[tuple[str, LayerBits]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def replace(self, changes: Mapping[str, tuple[int, int]]) -> BitWidths:
        """Return a copy with the bits of some layers changed."""
        for name in changes:
            self[name]
        return BitWidths.from_mapping([(name, changes.get(name, bits)) for name, bits in self.layers])

    def to_json(self) -> str:
        """Canonical JSON: ``{"layer": [weight bits, activation bits], ...}`` in execution order."""
        return json.dumps({name: list(bits) for name, bits in self.layers}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> BitWidths:
        """Inverse of :meth:`to_json`.

        :raises ArqError: when the text is not such a JSON object.
        """
        try:
            data = json.loads(text)
            return cls.from_mapping({str(k): (v[0], v[1]) for k, v in data.items()})
        except (ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
            raise ArqError(
                f'These bit-widths cannot be read ({error}); expected {{"layer": [weight bits, activation bits]}}.'
            ) from error
