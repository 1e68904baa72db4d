"""`LatencyTable`: measured nanoseconds of every layer at every pair of bits, for one network on one machine."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import LayerBits
from arqsearch.quantize.cost import LayerInfo
from arqsearch.quantize.network import QuantizedNet

FORMAT = "arqsearch-latency-1"


class OtherMachineWarning(UserWarning):
    """A latency table was measured on other hardware."""


def hardware_name() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return str(fields.get("model name") or platform.processor() or platform.machine()) + family


def network_identity(net: QuantizedNet) -> str:
    """SHA-256 of what the time of a network depends on beside its bits: layers, graph and quantization settings.

    Weights are left out: a table holds for every training of the same network.
    """
    graph = [[n.name, n.kind, n.inputs, n.shape, n.relu, n.cap is not None, n.attrs] for n in net.graph.nodes]
    layers = [[layer.name, layer.c_in, layer.c_out, layer.kernel, layer.stride] for layer in net.layer_infos]
    facts = {"input": net.input_shape, "graph": graph, "layers": layers, "quantize": asdict(net.settings)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a network, whose sum over layers predicts one image.

    :param network: :func:`network_identity`.
    :param hardware: :func:`hardware_name` of the machine.
    :param layers: for each layer the nanoseconds by bits, as measured.
    :param rest: nanoseconds of what is no layer (input quantizer, sums, pooling), the same for all bits.
    :param facts: how it was measured: engine, threads, rounds, versions, predictions that were checked.
    """

    network: str
    hardware: str
    layers: Mapping[str, Mapping[LayerBits, int]]
    rest: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def monotone(self, name: str) -> dict[LayerBits, int]:
        """Latencies of a layer made monotone: that of bits b is the least measured at any b' ≥ b in both bits.

        More bits can be measured faster than fewer, by noise or by another kernel. A network is not slower for taking
        the wider codes, so the least is what the bits allow, and a budget over it stays exact.

        :param name: layer.
        """
        measured = self.layers[name]
        return {
            bits: min(ns for b, ns in measured.items() if b.weight >= bits.weight and b.activation >= bits.activation)
            for bits in measured
        }

    def applied(self, layers: Sequence[LayerInfo], network: str) -> tuple[LayerInfo, ...]:
        """The layers with their latencies; what is no layer is counted to the first one.

        :param layers: of the network, in execution order.
        :param network: its identity.
        :raises ArqError: when the table is about another network.
        """
        if network != self.network or {layer.name for layer in layers} != set(self.layers):
            raise ArqError(
                f"The latency table is about another network ({self.network[:12]}, this is {network[:12]}): other "
                "layers, image size or quantization settings. Measure this one with `arqsearch profile RECIPE`."
            )
        here = hardware_name()
        if here != self.hardware:
            warnings.warn(
                f"The latency table was measured on {self.hardware}; this machine is {here}. The budget holds there.",
                OtherMachineWarning, stacklevel=2,
            )  # fmt: skip
        found = []
        for index, layer in enumerate(layers):
            extra = self.rest if index == 0 else 0
            found.append(replace(layer, latency={b: ns + extra for b, ns in self.monotone(layer.name).items()}))
        return tuple(found)

    def save(self, path: Path) -> None:
        """Write the table as JSON, in one move."""
        layers = {
            name: {f"{b.weight},{b.activation}": ns for b, ns in row.items()} for name, row in self.layers.items()
        }
        data = {"format": FORMAT, "network": self.network, "hardware": self.hardware, "unit": "ns for one image",
                "rest": self.rest, "layers": layers, "facts": dict(self.facts)}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        :raises ArqError: when it is missing or no such table.
        """
        if not path.is_file():
            raise ArqError(f"No latency table at {path}; `arqsearch profile RECIPE --output {path}` measures one.")
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            layers = {
                str(name): {LayerBits(*map(int, key.split(","))): int(ns) for key, ns in row.items()}
                for name, row in data["layers"].items()
            }
            return cls(str(data["network"]), str(data["hardware"]), layers, int(data["rest"]), dict(data["facts"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArqError(
                f"{path} is no latency table ({type(error).__name__}: {error}); measure it again with "
                "`arqsearch profile RECIPE`."
            ) from error
