"""QDQ ONNX: a float graph with QuantizeLinear/DequantizeLinear pairs that carry the network's own numbers.

This is the form for other tools. Weights are int8 codes (int4 up to 4 bits) with a scale for each output
channel; activations are uint8 after a ReLU and int8 otherwise, clipped to the code range of their bits
between the pair; biases are int32 on the accumulators' scale. The arithmetic between the pairs is the
runtime's floating point, and QuantizeLinear rounds ties to even, so values on a tie can differ from the
integer program by one code: same numbers, not the same bits. The strict-integer ONNX is the exact one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from arqsearch.errors import ArqError, nearest
from arqsearch.export.onnx_graph import GraphBuilder, onnx_pads, save_model
from arqsearch.export.runtime import FORM_KEYS, HASH_KEY, INPUT, OUTPUT, VERSION_KEY, load_model, require
from arqsearch.integer.ops import INT32_MAX
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram
from arqsearch.quantize.graph import LAYERS, Node
from arqsearch.quantize.layer import QuantizedLayer
from arqsearch.quantize.network import CLIP_CENTRE, QuantizedNet
from arqsearch.quantize.quantizers import ROUNDING_OFFSET, ActivationQuantizer, code_range

PixelType: TypeAlias = Literal["float32", "int16", "uint8"]

FORM = "qdq"
NOTE_KEY, BITS_KEY = FORM_KEYS[FORM], "arqsearch_bitwidths"
NOTE = (
    "Not bit-exact: same numbers as the integer program, but sums are floating point and the rounding at ties is the "
    "runtime's. Input: grey levels, NHWC, normalisation inside. The strict-integer ONNX is the exact form."
)
#: Largest weight bits stored as 4-bit integers.
INT4_BITS = 4


def export_qdq(
    net: QuantizedNet, path: str | Path, pixels_dtype: PixelType = "float32", *, program: IntegerProgram | None = None
) -> None:
    """Write the network at its current bits as a QDQ model.

    The input ``pixels`` is ``(N, H, W, C)`` in grey levels (whole numbers, noise included), the output
    ``logits`` float32 ``(N, K)``; normalisation lies in the graph. The metadata holds the bits of each layer
    (weight, activation) and a note that the model is not bit-exact.

    :param path: where to write; folders are made.
    :param pixels_dtype: type of the input: ``float32``, ``int16``, or ``uint8`` where there is no noise.
    :param program: the lowered network; its hash goes into the metadata.
    :raises ArqError: for another `pixels_dtype`, a bias that does not fit int32, or when onnx is missing.
    """
    if pixels_dtype not in get_args(PixelType):
        raise ArqError(f"No pixel type {pixels_dtype!r}. {nearest(pixels_dtype, get_args(PixelType))}")
    graph = _Export(require("onnx"), net)
    channels, height, width = net.input_shape
    element = {"float32": "FLOAT", "int16": "INT16", "uint8": "UINT8"}[pixels_dtype]
    graph.build(cast=pixels_dtype != "float32")
    facts = {VERSION_KEY: str(ARITHMETIC_VERSION), NOTE_KEY: NOTE, BITS_KEY: net.bitwidths.to_json()}
    model = graph.model(
        "arqsearch_qdq",
        (element, (height, width, channels)),
        ("FLOAT", net.graph[net.graph.output].shape),
        facts if program is None else {**facts, HASH_KEY: program.hash},
    )
    save_model(graph.onnx, model, path)


def run_qdq(path: str | Path, pixels: Any, *, batch: int = 64, threads: int = 1) -> np.ndarray:
    """Run an exported model with onnxruntime on the CPU, in floating point.

    Graph optimisation is off: onnxruntime would replace the pairs by integer kernels, and those saturate
    sums of uint8 by int8 products on processors without VNNI.

    :param pixels: grey levels ``(N, H, W, C)``, noise included, of any number type.
    :param batch: images per call, which bounds memory.
    :returns: logits, float32 ``(N, K)``.
    :raises ArqError: when the file is missing or not such a model, or the pixels do not fit it.
    """
    # Rewriting the graph would bring in kernels for which these sums were not made.
    model = load_model(path, FORM, threads=threads, optimize=False)
    kind, images = model.input_type, np.asarray(pixels)
    if images.shape[1:] != model.shape:
        raise ArqError(
            f"{path} takes pixels of shape (N, {', '.join(map(str, model.shape))}); got {images.shape}. "
            "Pass grey levels as NHWC."
        )
    if kind.kind in "iu" and images.size and not np.array_equal(images, images.astype(kind)):
        raise ArqError(
            f"{path} takes {kind} pixels; these ({images.min()}..{images.max()}) are no whole numbers of that type. "
            "Export with pixels_dtype 'int16' or 'float32'."
        )
    return model.run(images, batch, np.float32)


class _Export(GraphBuilder):
    """Walks the graph of a network as fake quantization does; values are NCHW float32."""

    def __init__(self, onnx: Any, net: QuantizedNet) -> None:
        super().__init__(onnx)
        self.net = net
        self.values: dict[str, str] = {}

    def build(self, cast: bool) -> None:
        """Emit every node.

        :param cast: whether the pixels are integers.
        """
        for node in self.net.graph.nodes:
            self.values[node.name] = self._input(cast) if node.kind == "input" else self._node(node)
        self.node("Identity", self.values[self.net.graph.output], output=OUTPUT)

    # ---- building blocks ---------------------------------------------------------------------

    def real(self, values: Any, name: str | None = None) -> str:
        """Name of a float32 initializer."""
        return self.constant(values, "FLOAT", name)

    def per_channel(self, values: Any) -> str:
        """A float for each channel, shaped to broadcast over NCHW."""
        return self.real(np.reshape(values, (1, -1, 1, 1)))

    def quantized(self, value: str, table: ActivationQuantizer, bits: int) -> str:
        """The pair, with a clip to the code range where the stored type is wider."""
        step = self.real(_numpy(table.step(bits)).reshape(()))
        return self.pair(self.floored(value, step, table), step, step, code_range(bits, table.signed))

    def floored(self, value: str, step: str, table: ActivationQuantizer) -> str:
        """Rounding down is no rounding of QuantizeLinear, so it stands before it."""
        if table.rounding != "floor":
            return value
        nudged = self.node("Add", self.node("Div", value, step), self.real(np.float32(ROUNDING_OFFSET["floor"])))
        return self.node("Mul", self.node("Floor", nudged), step)

    def pair(self, value: str, step: str, real_step: str, limits: tuple[int, int]) -> str:
        """Codes within `limits` of steps in `value`'s own unit, and back to reals."""
        kind = "INT8" if limits[0] < 0 else "UINT8"
        zero = self.constant(0, kind)
        codes = self.node("QuantizeLinear", value, step, zero)
        if limits not in ((-128, 127), (0, 255)):
            codes = self.node("Clip", codes, self.constant(limits[0], kind), self.constant(limits[1], kind))
        return self.node("DequantizeLinear", codes, real_step, zero)

    def activate(self, node: Node, value: str) -> str:
        """The activation function attached to a node."""
        if not node.relu:
            return value
        if node.cap is None:
            return self.node("Relu", value)
        return self.node("Clip", value, self.real(0.0), self.real(node.cap))

    # ---- nodes -------------------------------------------------------------------------------

    def _input(self, cast: bool) -> str:
        net, settings = self.net, self.net.settings
        pixels = self.node("Cast", INPUT, to=self.onnx.TensorProto.FLOAT) if cast else INPUT
        pixels = self.node("Transpose", pixels, perm=[0, 3, 1, 2])
        if settings.input_mode == "clip":
            bits = net.layer(net.placements["input"][1]).bits[1]
            clipped = self.node("Clip", pixels, self.real(0.0), self.real(255.0))
            # A quarter above the centre: whole grey levels on a tie round up, as in the program.
            centred = self.node("Sub", clipped, self.real(CLIP_CENTRE - 0.25))
            limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            steps = self.real(2.0 ** (8 - bits)), self.real(net.clip_step(bits))
            value = self.pair(centred, *steps, limits)
            return self.node("Sub", value, self.per_channel(_numpy(net.clip_zero(bits)) * net.clip_step(bits)))
        centred = self.node("Sub", pixels, self.per_channel(_numpy(net.mean)))
        value = self.node("Div", centred, self.per_channel(_numpy(net.std)))
        return self._streamed("input", value)

    def _streamed(self, name: str, value: str) -> str:
        if name not in self.net.graph.streams:
            return value
        return self.quantized(value, self.net.stream(name), self.net.settings.residual_bits)

    def _node(self, node: Node) -> str:
        sources = [self.values[name] for name in node.inputs]
        if node.kind == "add":
            return self._add(node, sources)
        value = self._layer(node, sources[0]) if node.kind in LAYERS else self._move(node, sources[0])
        return self._streamed(node.name, self.activate(node, value))

    def _layer(self, node: Node, value: str) -> str:
        net, layer = self.net, self.net.layer(node.name)
        if net.settings.input_mode == "wide" or net.placements["input"] != ("layer", node.name):
            value = self.quantized(value, layer.activation, layer.bits[1])
            input_step = float(_numpy(layer.activation.step(layer.bits[1]))[0])
        else:
            input_step = net.clip_step(layer.bits[1])
        operands = [value, self._weight(node, layer), self._bias(node, layer, input_step)]
        if node.kind == "linear":
            return self.node("Gemm", *operands, transB=1)
        attrs = node.attrs
        return self.node(
            "Conv",
            *operands,
            kernel_shape=list(attrs["kernel"]),
            strides=list(attrs["stride"]),
            pads=onnx_pads(attrs["padding"]),
            group=attrs["groups"],
        )

    def _weight(self, node: Node, layer: QuantizedLayer) -> str:
        """Codes as fake quantization rounds them, dequantized by their scales."""
        bits, weight, steps = layer.bits[0], layer.folded_weight().detach().cpu(), layer.weight_scale().detach().cpu()
        codes = (weight / steps.reshape(-1, *(1,) * (weight.ndim - 1))).round().clamp(*code_range(bits, True)).numpy()
        stored = self.constant(codes, "INT4" if bits <= INT4_BITS else "INT8", f"{node.name}.weight")
        return self._dequantized(stored, steps.numpy(), f"{node.name}.weight_scale")

    def _bias(self, node: Node, layer: QuantizedLayer, input_step: float) -> str:
        """Int32 codes on the accumulators' scale."""
        scale = input_step * _numpy(layer.weight_scale())
        codes = np.rint(_numpy(layer.folded_bias()) / scale)
        if np.abs(codes).max(initial=0) > INT32_MAX:
            raise ArqError(f"The bias of {node.name!r} does not fit int32 at its accumulator scale; calibrate again.")
        stored = self.constant(codes, "INT32", f"{node.name}.bias")
        return self._dequantized(stored, scale, f"{node.name}.bias_scale")

    def _dequantized(self, codes: str, scales: np.ndarray, name: str) -> str:
        scalar = scales.size == 1
        scale = self.real(scales.reshape(()) if scalar else scales, name=name)
        if scalar:
            return self.node("DequantizeLinear", codes, scale)
        return self.node("DequantizeLinear", codes, scale, axis=0)

    def _add(self, node: Node, sources: list[str]) -> str:
        """Both operands on the stream's scale in int16, then the sum: no tie is left for its own pair."""
        table, bits = self.net.stream(node.name), self.net.settings.residual_bits
        step, zero = self.real(_numpy(table.step(bits)).reshape(())), self.constant(0, "INT16")
        operands = []
        for source in sources:
            codes = self.node("QuantizeLinear", self.floored(source, step, table), step, zero)
            operands.append(self.node("DequantizeLinear", codes, step, zero))
        total = self.activate(node, self.node("Add", *operands))
        return self.pair(total, step, step, code_range(bits, table.signed))

    def _move(self, node: Node, value: str) -> str:
        """Nodes without parameters."""
        attrs = node.attrs
        if node.kind in ("avgpool", "maxpool"):
            window: dict[str, Any] = {"kernel_shape": list(attrs["kernel"]), "strides": list(attrs["stride"])}
            if node.kind == "maxpool":
                return self.node("MaxPool", value, **window, pads=onnx_pads(attrs["padding"]))
            return self.node("AveragePool", value, **window, pads=onnx_pads(attrs["padding"]), count_include_pad=1)
        if node.kind == "pad":
            top, left, bottom, right = onnx_pads(attrs["padding"])
            return self.node("Pad", value, self.constant([0, 0, top, left, 0, 0, bottom, right]))
        if node.kind == "padchannels":
            pads = [0, attrs["before"], 0, 0, 0, attrs["after"], 0, 0]
            return self.node("Pad", value, self.constant(pads))
        if node.kind == "slice":
            starts, ends, steps = zip(attrs["channels"], attrs["rows"], attrs["columns"], strict=True)
            bounds = (self.constant(numbers) for numbers in (starts, ends, (1, 2, 3), steps))
            return self.node("Slice", value, *bounds)
        return self.node("Flatten", value, axis=1) if node.kind == "flatten" else value


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())
