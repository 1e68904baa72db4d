"""Facts of a layer, and what an assignment of bits costs: BOPs, weight bytes, activation bytes, latency.

BOPs = sum of MACs * weight bits * activation bits over conv and linear layers, with padded positions counted; FP32
counts 32 * 32 = 1024 per MAC. Weight bytes are those of the packed artefact: codes at their own bit-width (each output
channel padded to whole bytes), one int32 bias and one (int32 multiplier, uint8 shift) pair per output channel.
Activation bytes and latency are facts of the compiled network, measured or planned outside of this room and carried
by the layers: :attr:`LayerInfo.activation_bytes`, :attr:`LayerInfo.latency`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.bitwidths import BitWidths, LayerBits

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
    :param tie: layers with the same tie share one pair of bits; None for a layer on its own.
    :param activation_bytes: most bytes of activations alive while this layer runs (and what follows it before the
        next layer), in the native engine's plan; the same for all bits. None = not planned.
    :param latency: nanoseconds for one image by bits; monotone in both bits. None = not measured.
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
    tie: str | None = None
    activation_bytes: int | None = None
    latency: Mapping[LayerBits, int] | None = field(default=None, compare=False, repr=False)

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


def layer_activation_bytes(layer: LayerInfo, bits: LayerBits) -> int:
    """Bytes of activations alive while a layer runs; bits change nothing, as memory holds one code a byte.

    :raises ArqError: when the layer was not planned.
    """
    if layer.activation_bytes is None:
        raise ArqError(f"The memory of layer {layer.name!r} was not planned; a run plans it from the network.")
    return layer.activation_bytes


def layer_latency(layer: LayerInfo, bits: LayerBits) -> int:
    """Nanoseconds that a layer takes for one image.

    :raises ArqError: when the layer was not measured at these bits.
    """
    if layer.latency is None or bits not in layer.latency:
        raise ArqError(
            f"The latency of layer {layer.name!r} at {tuple(bits)} bits was not measured; "
            "`arqsearch profile RECIPE` measures it."
        )
    return layer.latency[bits]


@dataclass(frozen=True)
class Cost:
    """One cost model: a value of each layer, monotone in both bits, and how the layers' values become one.

    :param layer: the value of one layer.
    :param total: ``sum``; or ``max``, then the value must not depend on the bits.
    :param unit: of the value.
    """

    layer: Callable[[LayerInfo, LayerBits], int]
    total: Callable[[Iterable[int]], int]
    unit: str

    @property
    def additive(self) -> bool:
        """Whether bits change it: it is a sum over layers."""
        return self.total is sum


#: Cost models by name.
COSTS: dict[str, Cost] = {
    "bops": Cost(layer_bops, sum, "bit operations"),
    "weight_bytes": Cost(layer_weight_bytes, sum, "bytes"),
    "peak_activation_bytes": Cost(layer_activation_bytes, max, "bytes"),
    "latency": Cost(layer_latency, sum, "ns"),
}
#: Costs that a percentage of the FP32 network makes sense for.
RELATIVE = ("bops", "weight_bytes")


def known_costs(layers: Sequence[LayerInfo]) -> tuple[str, ...]:
    """The costs that these layers carry what is needed for."""
    planned = all(layer.activation_bytes is not None for layer in layers)
    measured = all(layer.latency is not None for layer in layers)
    there = {"peak_activation_bytes": planned, "latency": measured}
    return tuple(name for name in COSTS if there.get(name, True))


def require_cost(name: str) -> Cost:
    """The cost model of that name.

    :raises ArqError: naming the nearest one.
    """
    if name not in COSTS:
        raise ArqError(f"No cost model named {name!r}. {nearest(name, COSTS)}")
    return COSTS[name]


def reference_cost(name: str, layers: Sequence[LayerInfo]) -> int:
    """The FP32 network's cost, the 100 % of a relative budget.

    :raises ArqError: for a cost that the FP32 network does not have.
    """
    require_cost(name)
    if name == "bops":
        return sum(layer.macs for layer in layers) * FP32_BOPS_PER_MAC
    if name == "weight_bytes":
        return sum(4 * (layer.weights + layer.c_out) for layer in layers)
    raise ArqError(f"There is no FP32 reference for {name}; state its limit in its own unit, not in per cent.")


def total_cost(name: str, layers: Sequence[LayerInfo], bitwidths: BitWidths) -> int:
    """Cost of a whole assignment under one model of :data:`COSTS`, in its unit.

    :raises ArqError: for an unknown model, or when the layers do not carry what it needs.
    """
    cost = require_cost(name)
    return cost.total(cost.layer(layer, bitwidths[layer.name]) for layer in layers)
