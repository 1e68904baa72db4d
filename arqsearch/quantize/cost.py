"""Cost models: BOPs and packed weight bytes of a bit-width assignment, and budgets over them.

BOPs = sum of MACs * weight bits * activation bits over conv and linear layers, with padded
positions counted; FP32 counts 32 * 32 = 1024 per MAC. Weight bytes are those of the packed
artefact: codes at their own bit-width (each output channel padded to whole bytes), one int32 bias
and one (int32 multiplier, uint8 shift) pair per output channel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.bitwidths import ALL_BITS, BitWidths, LayerBits

#: Bit operations of one FP32 multiply-accumulate, the reference of every percentage.
FP32_BOPS_PER_MAC = 1024
#: int32 bias + int32 multiplier + uint8 shift.
BYTES_PER_CHANNEL = 9


@dataclass(frozen=True)
class LayerInfo:
    """What cost models and agents need to know of one conv or linear layer.

    :param name: module path in the user's model.
    :param kind: ``"conv"`` or ``"linear"``.
    :param c_in: input channels (features).
    :param c_out: output channels (features).
    :param kernel: kernel height (1 for linear).
    :param kernel_w: kernel width (1 for linear).
    :param stride: stride (1 for linear).
    :param groups: convolution groups.
    :param in_hw: input height and width (1, 1 for linear).
    :param out_hw: output height and width (1, 1 for linear).
    """

    name: str
    kind: str
    c_in: int
    c_out: int
    kernel: int = 1
    kernel_w: int = 1
    stride: int = 1
    groups: int = 1
    in_hw: tuple[int, int] = (1, 1)
    out_hw: tuple[int, int] = (1, 1)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved on its own."""
        return self.groups > 1 and self.groups == self.c_in

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.c_out * (self.c_in // self.groups) * self.kernel * self.kernel_w

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, padded positions counted."""
        return self.weights * self.out_hw[0] * self.out_hw[1]


def layer_bops(layer: LayerInfo, bits: LayerBits) -> int:
    """Bit operations of one layer for one image."""
    return layer.macs * bits.weight * bits.activation


def layer_weight_bytes(layer: LayerInfo, bits: LayerBits) -> int:
    """Packed bytes of one layer: weight codes, biases, multipliers and shifts."""
    per_channel = layer.weights // layer.c_out
    return layer.c_out * (-(-per_channel * bits.weight // 8) + BYTES_PER_CHANNEL)


LayerCost = Callable[[LayerInfo, LayerBits], int]

#: Additive cost models by name: each is a sum over layers of a function monotone in both bits.
COSTS: dict[str, LayerCost] = {"bops": layer_bops, "weight_bytes": layer_weight_bytes}


def reference_cost(name: str, layers: Sequence[LayerInfo]) -> int:
    """The FP32 network's cost, the 100 % of a relative budget."""
    if name == "bops":
        return sum(layer.macs for layer in layers) * FP32_BOPS_PER_MAC
    if name == "weight_bytes":
        return sum(4 * (layer.weights + layer.c_out) for layer in layers)
    raise ArqError(f"No cost model named {name!r}. {nearest(name, COSTS)}")


def total_cost(name: str, layers: Sequence[LayerInfo], bitwidths: BitWidths) -> int:
    """Cost of a whole assignment under one model (``"bops"`` or ``"weight_bytes"``)."""
    if name not in COSTS:
        raise ArqError(f"No cost model named {name!r}. {nearest(name, COSTS)}")
    return sum(COSTS[name](layer, bitwidths[layer.name]) for layer in layers)


def parse_limit(name: str, value: str | int | float, layers: Sequence[LayerInfo]) -> int:
    """Turn ``"1.62%"`` (of FP32), ``"670M"``, ``"0.67G"`` or a plain number into an integer limit.

    :raises ArqError: when the value has none of these forms.
    """
    if isinstance(value, int | float):
        return int(value)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kKMG])?B?\s*", value)
    if not match:
        raise ArqError(f"Budget {name}={value!r} is not understood; write '1.62%', '670M', '0.67G' or a whole number.")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return int(number / 100 * reference_cost(name, layers))
    return int(number * {None: 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[unit])


@dataclass(frozen=True)
class Budget:
    """One or several upper limits over additive costs, all to be met at once.

    :param limits: cost name to its largest allowed value, in the cost's own unit.
    :raises ArqError: for an unknown cost name.
    """

    limits: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for name, _ in self.limits:
            if name not in COSTS:
                raise ArqError(f"No cost model named {name!r}. {nearest(name, COSTS)}")

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
            if minimum > limit:
                share = 100 * minimum / reference_cost(name, layers)
                raise ArqError(
                    f"Budget {name} <= {limit:,} cannot be met: the smallest assignment needs {minimum:,} "
                    f"({share:.3f}% of FP32). Raise the budget to at least that, or free the fixed layers "
                    f"({', '.join(fixed) if fixed else 'none'})."
                )

    def met(self, layers: Sequence[LayerInfo], bitwidths: BitWidths) -> bool:
        """Whether an assignment meets every limit."""
        return all(total_cost(name, layers, bitwidths) <= limit for name, limit in self.limits)
