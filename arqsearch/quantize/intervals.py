"""Interval bounds of the fake-quantized network with straight-through gradients (QA-IBP training).

The same abstract step as :mod:`arqsearch.certify.linf.boxes` takes on the integer program, in the
trained network's domain: monotone steps map both end points, conv and linear use centre and radius,
the last layer is fused with the specification (Lechner et al., AAAI 2023). These bounds train; they
certify nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.quantize.graph import LAYERS, Node
from arqsearch.quantize.network import QuantizedNet, activate, move

Bounds = tuple[Tensor, Tensor]


def interval_margins(net: QuantizedNet, lo: Tensor, hi: Tensor, labels: Tensor) -> Tensor:
    """Lower bounds of ``z_label - z_j`` over a box of pixels.

    :param lo: lower pixel bounds ``(N, C, H, W)`` in grey levels.
    :param hi: upper pixel bounds, same shape.
    :param labels: ``(N,)``.
    :returns: ``(N, K)``; 0 at the label itself.
    :raises ArqError: when the last layer is not linear.
    """
    graph = net.graph
    values: dict[str, Bounds] = {}
    for node in graph.nodes:
        if node.name == graph.output:
            return _specification(net, node, values[node.inputs[0]], labels)
        values[node.name] = _step(net, node, values, lo, hi)
    raise ArqError("The network has no output node.")


def worst_case_logits(margins: Tensor) -> Tensor:
    """Logits whose cross-entropy is the worst-case cross-entropy: ``-margins``, 0 at the label."""
    return -margins


def _step(net: QuantizedNet, node: Node, values: dict[str, Bounds], lo: Tensor, hi: Tensor) -> Bounds:
    if node.kind == "input":
        kind, reader = net.placements["input"]
        bits = net.layer(reader).bits[1] if kind == "layer" else net.settings.residual_bits
        low, high = net.input_value(lo, bits), net.input_value(hi, bits)
    elif node.kind in LAYERS:
        layer = net.layer(node.name)
        low, high = _layer_input(net, node, values[node.inputs[0]])
        weight = layer.quantized_weight(net.quantized)
        scale = net.input_scale(node)
        bias = layer.folded_bias() if scale is None else layer.quantized_bias(scale)
        centre = layer.operate((low + high) / 2, weight, bias)
        radius = layer.operate((high - low) / 2, weight.abs(), None)
        low, high = centre - radius, centre + radius
    elif node.kind == "add":
        (a, b), (c, d) = (values[i] for i in node.inputs)
        return net.add_values(node, a, c), net.add_values(node, b, d)
    else:
        low, high = (move(node, x) for x in values[node.inputs[0]])
    low, high = activate(node, low), activate(node, high)
    if node.name in net.graph.streams:
        low, high = net.stream_value(node.name, low), net.stream_value(node.name, high)
    return low, high


def _layer_input(net: QuantizedNet, node: Node, bounds: Bounds) -> Bounds:
    low, high = (net.layer_input(node, x) for x in bounds)
    return low, high


def _specification(net: QuantizedNet, node: Node, bounds: Bounds, labels: Tensor) -> Tensor:
    """Bounds of ``(w_y - w_j) x`` from the bounds of x."""
    if node.kind != "linear":
        raise ArqError(f"Interval training needs a linear last layer; {node.name!r} is a {node.kind}.")
    layer = net.layer(node.name)
    low, high = _layer_input(net, node, bounds)
    weight, bias = layer.quantized_weight(net.quantized), layer.folded_bias()
    rows = weight[labels][:, None, :] - weight[None]
    centre = torch.einsum("nki,ni->nk", rows, (low + high) / 2)
    radius = torch.einsum("nki,ni->nk", rows.abs(), (high - low) / 2)
    return centre - radius + bias[labels][:, None] - bias[None]
