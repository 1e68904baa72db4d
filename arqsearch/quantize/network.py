"""`QuantizedNet`: the user's module seen as a graph of layers with learned quantizers.

It shares the parameters of the original module, so training it trains that module. Input is pixels
(grey levels, NCHW, float tensors holding integers): normalisation lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.integer.ops import Rounding
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo
from arqsearch.quantize.graph import LAYERS, TRANSPARENT, LayerGraph, Node
from arqsearch.quantize.layer import QuantizedLayer
from arqsearch.quantize.quantizers import ActivationQuantizer, StepTable
from arqsearch.quantize.trace import trace

InputMode: TypeAlias = Literal["wide", "clip"]
Multiplier: TypeAlias = Literal["31", "15", "pow2"]

#: Grey level of code 0 in clip mode.
CLIP_CENTRE = 128


@dataclass(frozen=True)
class QuantizeSettings:
    """What is fixed for a whole search.

    :param input_mode: ``clip`` clips pixels to 0..255 with one code a grey level at 8 bits; ``wide``
        covers the noise.
    :param residual_bits: bits of streams.
    :param multiplier: requantization multipliers: 31 or 15 bits, or powers of two.
    :param rounding: requantization rounding.
    """

    input_mode: InputMode = "wide"
    residual_bits: int = 8
    multiplier: Multiplier = "31"
    rounding: Rounding = "half_up"


def _key(name: str) -> str:
    return name.replace(".", "/")


class QuantizedNet(nn.Module):
    """The network as a graph of quantized layers; see the module docstring.

    :param model: traced by torch.fx; its parameters are shared.
    :param input_shape: ``(C, H, W)``.
    :param mean: per-channel mean of [0,1] pixels.
    :param std: per-channel standard deviation of [0,1] pixels.
    :param settings: quantization settings.
    :raises ArqError: when the module cannot be converted.
    """

    mean: Tensor
    std: Tensor
    clip_scale: float

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        mean: Iterable[float],
        std: Iterable[float],
        settings: QuantizeSettings,
    ) -> None:
        super().__init__()
        self.settings = settings
        # Kept outside the module tree: its parameters are registered through the layers.
        self.__dict__["source"] = model
        self.graph: LayerGraph = trace(model, input_shape)
        self.input_shape = input_shape
        self.quantized = True
        self.register_buffer("mean", 255.0 * torch.tensor(list(mean)).reshape(1, -1, 1, 1))
        self.register_buffer("std", 255.0 * torch.tensor(list(std)).reshape(1, -1, 1, 1))
        if self.mean.numel() != input_shape[0]:
            raise ArqError(f"The normalisation has {self.mean.numel()} channels, the images {input_shape[0]}.")
        power = settings.multiplier == "pow2"
        modules = dict(model.named_modules())
        self.layers = nn.ModuleDict()
        for node in self.graph.layers:
            norm = modules[node.batch_norm] if node.batch_norm else None
            activation = ActivationQuantizer(self.graph.signed(node.inputs[0]), power, settings.rounding)
            last = node.name == self.graph.output
            self.layers[_key(node.name)] = QuantizedLayer(node, modules[node.name], norm, activation, last)
        self.streams = nn.ModuleDict(
            {
                _key(name): ActivationQuantizer(self.graph.signed(name), power, settings.rounding)
                for name in self.graph.streams
            }
        )
        self.placements = {n.name: self.graph.placement(n.name) for n in self.graph.nodes if n.kind not in TRANSPARENT}
        if settings.input_mode == "clip":
            self._prepare_clip_input()
        if power:
            self._set_units()
        self.set_bitwidths(BitWidths.uniform([n.name for n in self.graph.layers], 8, 8))

    @property
    def source(self) -> nn.Module:
        """The original module, whose parameters this network shares."""
        source: nn.Module = self.__dict__["source"]
        return source

    # ---- facts -------------------------------------------------------------------------------

    @property
    def layer_infos(self) -> tuple[LayerInfo, ...]:
        """Cost facts of each layer, in execution order."""
        return self.graph.layer_infos()

    @property
    def bitwidths(self) -> BitWidths:
        """The current assignment."""
        return BitWidths.from_mapping([(n.name, self.layer(n.name).bits) for n in self.graph.layers])

    def layer(self, name: str) -> QuantizedLayer:
        """The quantized layer of that module path."""
        layer = self.layers[_key(name)]
        assert isinstance(layer, QuantizedLayer)
        return layer

    def stream(self, name: str) -> ActivationQuantizer:
        """The stream quantizer of that node."""
        stream = self.streams[_key(name)]
        assert isinstance(stream, ActivationQuantizer)
        return stream

    def set_bitwidths(self, bitwidths: BitWidths) -> None:
        """Switch every layer to its bits; nothing is recomputed."""
        expected = tuple(node.name for node in self.graph.layers)
        if set(bitwidths.names) != set(expected):
            missing = sorted(set(expected) ^ set(bitwidths.names))
            raise ArqError(f"These bit-widths are for another network: {', '.join(missing[:4])} do not match.")
        for name, bits in bitwidths:
            self.layer(name).bits = (bits.weight, bits.activation)

    def _set_units(self) -> None:
        """In power-of-two mode the 1/N of an average pool lives in the scales behind it.

        A layer's weight steps take the unit back out, so its accumulators are plain powers of two.
        """
        units: dict[str, float] = {}
        for node in self.graph.nodes:
            sources = {units[source] for source in node.inputs} or {1.0}
            if len(sources) > 1:
                raise ArqError(f"{node.name!r} adds tensors of different pool sizes; set quantize.multiplier to '31'.")
            unit = sources.pop()
            if node.kind in LAYERS:
                layer = self.layer(node.name)
                layer.activation.unit, layer.weight_steps.unit, unit = unit, 1.0 / unit, 1.0
            elif node.kind == "avgpool":
                unit /= node.attrs["kernel"][0] * node.attrs["kernel"][1]
            if node.name in self.graph.streams:
                self.stream(node.name).unit = unit
            units[node.name] = unit

    # ---- input -------------------------------------------------------------------------------

    def _prepare_clip_input(self) -> None:
        """One grey level becomes one code: per-channel scales move into the first layer's weights."""
        readers = self.graph.consumers("input")
        if len(readers) != 1 or readers[0].kind not in LAYERS:
            raise ArqError(
                "Input mode 'clip' needs one conv or linear layer as the only reader of the image; "
                "set quantize.input_mode to 'wide'."
            )
        node = readers[0]
        levels = 1.0 / self.std.flatten()
        common = float(torch.exp2(torch.log2(levels.mean()).round()))
        ratio, layer = levels / common, self.layer(node.name)
        if isinstance(layer.layer, nn.Linear):
            ratio = ratio.repeat_interleave(layer.layer.in_features // ratio.numel())
        layer.input_ratio = ratio
        self.clip_scale = common

    def clip_step(self, bits: int) -> float:
        """Real value of one code in clip mode."""
        return self.clip_scale * (1 << (8 - bits))

    def clip_zero(self, bits: int) -> Tensor:
        """Code of the mean pixel for each channel in clip mode."""
        levels = self.mean.flatten() - CLIP_CENTRE
        return (levels / (1 << (8 - bits))).round()

    def input_value(self, pixels: Tensor, bits: int) -> Tensor:
        """The first layer's quantized input for pixels in grey levels."""
        if self.settings.input_mode == "wide":
            return (pixels - self.mean) / self.std
        if not self.quantized:
            return (pixels.clamp(0, 255) - self.mean) * self.clip_scale
        shift = 2 ** (8 - bits)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = torch.floor((pixels.clamp(0, 255) - CLIP_CENTRE) / shift + 0.5).clamp(low, high)
        return (codes - self.clip_zero(bits).reshape(1, -1, 1, 1)) * self.clip_step(bits)

    # ---- forward -----------------------------------------------------------------------------

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(N, K)`` for pixels ``(N, C, H, W)`` in grey levels."""
        return self.evaluate(pixels)[self.graph.output]

    def evaluate(self, pixels: Tensor, taps: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every node's value; `taps` collects what reaches each quantizer, before quantization."""
        values: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            values[node.name] = self._node(node, values, pixels, taps)
            self._drop_dead(node, values)
        return values

    def _drop_dead(self, node: Node, values: dict[str, Tensor]) -> None:
        last = self.__dict__.setdefault("_last_use", None)
        if last is None:
            last = {source: n.name for n in self.graph.nodes for source in n.inputs}
            self.__dict__["_last_use"] = last
        for source in set(node.inputs):
            if last[source] == node.name:
                values.pop(source, None)

    def _node(self, node: Node, values: dict[str, Tensor], pixels: Tensor, taps: dict[str, Tensor] | None) -> Tensor:
        taps = {} if taps is None else taps
        if node.kind == "input":
            kind, reader = self.placements["input"]
            x = self.input_value(pixels, self.layer(reader).bits[1] if kind == "layer" else self.settings.residual_bits)
        elif node.kind in LAYERS:
            taps[f"layer:{node.name}"] = values[node.inputs[0]]
            x = self.layer(node.name)(self.layer_input(node, values[node.inputs[0]]), self.input_scale(node))
        elif node.kind == "add":
            left, right = (values[source] for source in node.inputs)
            taps[f"stream:{node.name}"] = x = self.add_values(node, left, right)
            return x
        else:
            x = move(node, values[node.inputs[0]])
        x = activate(node, x)
        if node.name in self.graph.streams:
            taps[f"stream:{node.name}"] = x
            x = self.stream_value(node.name, x)
        return x

    def stream_value(self, name: str, x: Tensor) -> Tensor:
        """A stream's quantized value."""
        return self.stream(name)(x, self.settings.residual_bits) if self.quantized else x

    def _reads_clipped_pixels(self, node: Node) -> bool:
        return self.settings.input_mode == "clip" and self.placements["input"] == ("layer", node.name)

    def input_scale(self, node: Node) -> Tensor | None:
        """Scale of a layer's input codes; None in float mode."""
        if not self.quantized:
            return None
        layer = self.layer(node.name)
        if self._reads_clipped_pixels(node):
            return torch.tensor(self.clip_step(layer.bits[1]), device=self.mean.device)
        return layer.activation.step(layer.bits[1])

    def layer_input(self, node: Node, x: Tensor) -> Tensor:
        """What a layer sees of its input: quantized at its own activation bits."""
        if not self.quantized or self._reads_clipped_pixels(node):
            return x
        layer = self.layer(node.name)
        result: Tensor = layer.activation(x, layer.bits[1])
        return result

    def add_values(self, node: Node, left: Tensor, right: Tensor) -> Tensor:
        """A residual sum in its stream."""
        if not self.quantized:
            return activate(node, left + right)
        high = math.inf if node.cap is None else node.cap
        low = 0.0 if node.relu else -math.inf
        return self.stream(node.name).add(left, right, self.settings.residual_bits, low, high)

    # ---- preparation -------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], samples: int = 1 << 17) -> None:
        """Set every step to its least-squares value: weights as they are, activations on given pixels.

        :param batches: pixels ``(N, C, H, W)`` in grey levels, noisy if the deployed network sees noise.
        :param samples: values kept for each tensor.
        """
        was, self.quantized = self.quantized, False
        training = self.training
        self.eval()
        kept: dict[str, list[Tensor]] = {}
        batches = list(batches)
        for index, pixels in enumerate(batches):
            taps: dict[str, Tensor] = {}
            self.evaluate(pixels, taps)
            for name, x in taps.items():
                flat = x.flatten()
                generator = torch.Generator().manual_seed(index)
                want = max(1, samples // len(batches))
                if flat.numel() > want:
                    flat = flat[torch.randint(flat.numel(), (want,), generator=generator).to(flat.device)]
                kept.setdefault(name, []).append(flat)
        for tap, parts in kept.items():
            kind, name = tap.split(":", 1)
            table = self.stream(name) if kind == "stream" else self.layer(name).activation
            table.fit(torch.cat(parts)[None])
        for node in self.graph.layers:
            layer = self.layer(node.name)
            layer.weight_steps.fit(layer.folded_weight().reshape(layer.weight_steps.steps.shape[1], -1))
        self.quantized = was
        self.train(training)

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """All step sizes."""
        return [p for m in self.modules() if isinstance(m, StepTable) for p in m.parameters()]

    def freeze_batch_norm(self) -> None:
        """Put every batch norm into inference mode: its statistics stay as they are."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()


def activate(node: Node, x: Tensor) -> Tensor:
    """The activation attached to a node."""
    if not node.relu:
        return x
    return F.relu(x) if node.cap is None else x.clamp(0.0, node.cap)


def move(node: Node, x: Tensor) -> Tensor:
    """Nodes without parameters: pools, pads, slices, flatten and free-standing activations."""
    if node.kind == "avgpool":
        top, bottom, left, right = node.attrs["padding"]
        return F.avg_pool2d(F.pad(x, (left, right, top, bottom)), node.attrs["kernel"], node.attrs["stride"])
    if node.kind == "maxpool":
        top, bottom, left, right = node.attrs["padding"]
        padded = F.pad(x, (left, right, top, bottom), value=-math.inf) if any(node.attrs["padding"]) else x
        return F.max_pool2d(padded, node.attrs["kernel"], node.attrs["stride"])
    if node.kind == "pad":
        top, bottom, left, right = node.attrs["padding"]
        return F.pad(x, (left, right, top, bottom))
    if node.kind == "padchannels":
        return F.pad(x, (0, 0, 0, 0, node.attrs["before"], node.attrs["after"]))
    if node.kind == "slice":
        return x[:, slice(*node.attrs["channels"]), slice(*node.attrs["rows"]), slice(*node.attrs["columns"])]
    return x.flatten(1) if node.kind == "flatten" else x
