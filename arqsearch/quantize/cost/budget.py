"""Budgets: upper limits over costs, parsed from recipes, refused with the attainable minimum."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import ALL_BITS, BitWidths
from arqsearch.quantize.cost.layers import RELATIVE, LayerInfo, reference_cost, require_cost, total_cost

_SIZES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
#: Nanoseconds of each unit of time; a bare number is in microseconds.
_TIMES = {"ns": 1.0, "us": 1e3, "µs": 1e3, "": 1e3, "ms": 1e6, "s": 1e9}


def parse_limit(name: str, value: str | int | float, layers: Sequence[LayerInfo]) -> int:
    """Turn a recipe's limit into an integer in the cost's unit.

    ``"1.62%"`` (of FP32, for BOPs and weight bytes), ``"670M"``, ``"0.67G"``, ``"80kB"`` or a plain number; for the
    latency ``"850us"``, ``"1.2ms"`` or a plain number of microseconds.

    :raises ArqError: when the value has none of these forms.
    """
    if name == "latency":
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ns|us|µs|ms|s|)\s*", str(value))
        if not match:
            raise ArqError(f"Budget {name}={value!r} is not understood; write '850us', '1.2ms' or microseconds.")
        return int(float(match[1]) * _TIMES[match[2]])
    if isinstance(value, int | float):
        return int(value)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kKMG])?B?\s*", value)
    if not match:
        raise ArqError(f"Budget {name}={value!r} is not understood; write '1.62%', '670M', '0.67G' or a whole number.")
    number, unit = float(match[1]), match[2] or ""
    if unit == "%":
        return int(number / 100 * reference_cost(name, layers))
    return int(number * _SIZES[unit])


def format_cost(name: str, value: int, layers: Sequence[LayerInfo]) -> str:
    """A cost for people: with its unit, and where there is one its share of FP32."""
    if name == "latency":
        return f"{value / 1000:,.1f} us"
    shown = f"{value:,}"
    return f"{shown} ({100 * value / reference_cost(name, layers):.3f}% of FP32)" if name in RELATIVE else shown


@dataclass(frozen=True)
class Budget:
    """One or several upper limits over costs, all to be met at once.

    :param limits: cost name to its largest allowed value, in the cost's own unit.
    :raises ArqError: for an unknown cost name.
    """

    limits: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for name, _ in self.limits:
            require_cost(name)

    @classmethod
    def parse(cls, limits: Mapping[str, str | int | float | None], layers: Sequence[LayerInfo]) -> Budget:
        """Build from recipe values such as ``{"bops": "1.62%"}``; absent limits (None) are skipped."""
        return cls(tuple((k, parse_limit(k, v, layers)) for k, v in limits.items() if v is not None))

    def check_attainable(
        self,
        layers: Sequence[LayerInfo],
        choices: Sequence[int] = ALL_BITS,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Refuse a budget that even the smallest assignment exceeds.

        :param layers: all conv and linear layers.
        :param choices: bits a searched layer may take.
        :param fixed: layers whose bits are not searched.
        :raises ArqError: naming the attainable minimum.
        """
        lowest = BitWidths.uniform([layer.name for layer in layers], min(choices), min(choices), fixed)
        for name, limit in self.limits:
            minimum = total_cost(name, layers, lowest)
            if minimum <= limit:
                continue
            stated = f"Budget {name} <= {format_cost(name, limit, layers).split(' (')[0]} cannot be met: "
            if not require_cost(name).additive:
                raise ArqError(
                    f"{stated}the network needs {format_cost(name, minimum, layers)} whatever its bits are, as "
                    "memory holds one code a byte. Raise the budget to at least that, or take smaller images or "
                    "a narrower network."
                )
            raise ArqError(
                f"{stated}the smallest assignment needs {format_cost(name, minimum, layers)}. Raise the budget to at "
                f"least that, or free the fixed layers ({', '.join(fixed) if fixed else 'none'})."
            )

    def met(self, layers: Sequence[LayerInfo], bitwidths: BitWidths) -> bool:
        """Whether an assignment meets every limit."""
        return all(total_cost(name, layers, bitwidths) <= limit for name, limit in self.limits)
