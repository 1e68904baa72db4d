"""The network as a short list of typed nodes: what fake quantization, lowering, intervals and costs walk.

Batch norm is attached to its conv or linear layer and ReLU to the node that it follows; everything that
only moves values (max pool, zero pad, slice, flatten) is *transparent*: it commutes with quantization.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from arqsearch.quantize.cost import LayerInfo

Kind: TypeAlias = Literal[
    "input", "conv", "linear", "add", "act", "avgpool", "maxpool", "pad", "padchannels", "slice", "flatten"
]

TRANSPARENT: frozenset[str] = frozenset({"maxpool", "pad", "padchannels", "slice", "flatten"})
LAYERS: frozenset[str] = frozenset({"conv", "linear"})


@dataclass(frozen=True)
class Node:
    """One step of the network.

    :param name: unique; for conv and linear the module path.
    :param kind: what it does.
    :param inputs: names of the nodes it reads.
    :param shape: output shape without batch, ``(C, H, W)`` or ``(C,)``.
    :param relu: whether negative results become 0.
    :param cap: upper clip of a ReLU6-like activation, in real units; None for none.
    :param batch_norm: module path of the batch norm that follows a layer.
    :param attrs: kernel, stride, padding and bounds, by kind.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    relu: bool = False
    cap: float | None = None
    batch_norm: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


#: Where a computed value becomes codes: in a stream, at its one consumer layer, in a sum, or never.
Placement: TypeAlias = tuple[Literal["stream", "layer", "add", "output"], str]


@dataclass(frozen=True)
class LayerGraph:
    """Nodes in execution order; the first is the input, `output` names the logits."""

    nodes: tuple[Node, ...]
    output: str

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def layers(self) -> tuple[Node, ...]:
        """Conv and linear nodes in execution order."""
        return tuple(node for node in self.nodes if node.kind in LAYERS)

    def consumers(self, name: str) -> list[Node]:
        """Nodes that read `name`, transparent ones replaced by their own consumers."""
        found: list[Node] = []
        for node in self.nodes:
            if name in node.inputs:
                times = node.inputs.count(name)
                found += self.consumers(node.name) if node.kind in TRANSPARENT else [node] * times
        return found

    def _reaches_output_transparently(self, name: str) -> bool:
        if name == self.output:
            return True
        return any(
            name in node.inputs and node.kind in TRANSPARENT and self._reaches_output_transparently(node.name)
            for node in self.nodes
        )

    def placement(self, name: str) -> Placement:
        """Where the value of a computed node is quantized (DESIGN: streams).

        Sums and values with several consumers are streams; a value with one consumer layer is
        quantized at that layer's bits; a value with one consuming sum is requantized by the sum.
        """
        node = self[name]
        readers = self.consumers(name)
        if name == self.output:
            return ("output", name)
        if node.kind == "add" or len(readers) != 1 or self._reaches_output_transparently(name):
            return ("stream", name)
        if readers[0].kind in LAYERS:
            return ("layer", readers[0].name)
        if readers[0].kind == "add" and name in readers[0].inputs and node.kind != "input":
            return ("add", readers[0].name)
        return ("stream", name)

    @cached_property
    def streams(self) -> tuple[str, ...]:
        """Names of the nodes whose value is kept as a stream."""
        computed = (node.name for node in self.nodes if node.kind not in TRANSPARENT)
        return tuple(name for name in computed if self.placement(name)[0] == "stream")

    def signed(self, name: str) -> bool:
        """Whether the value of a node can be negative."""
        node = self[name]
        if node.relu:
            return False
        if node.kind in TRANSPARENT or node.kind == "avgpool":
            return self.signed(node.inputs[0])
        return True

    def layer_infos(self) -> tuple[LayerInfo, ...]:
        """Cost facts of each conv and linear layer."""
        infos = []
        for node in self.layers:
            source, out = self[node.inputs[0]].shape, node.shape
            if node.kind == "linear":
                infos.append(LayerInfo(node.name, "linear", source[0], node.shape[0]))
                continue
            kernel, stride = node.attrs["kernel"], node.attrs["stride"]
            infos.append(
                LayerInfo(
                    node.name, "conv", source[0], node.shape[0], kernel[0], kernel[1], stride[0],
                    node.attrs["groups"], (source[1], source[2]), (out[1], out[2]),
                )
            )  # fmt: skip
        return tuple(infos)
