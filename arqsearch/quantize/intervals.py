"""Interval bounds of the network in training, with straight-through gradients (QA-IBP).

The same abstract step as the integer boxes of a certificate, in the trained network's domain: monotone
steps map both end points, conv and linear use centre and radius, the last layer is fused with the
specification (Lechner et al., AAAI 2023). Images and both ends of their boxes travel through the graph as one
batch, so every quantizer runs once. These bounds train and estimate; they certify nothing.

Two choices matter for training. A live batch norm normalises the bounds by the statistics of the clean
images of the same batch, with their gradient (Shi et al., NeurIPS 2021); without clean images in the pass the running
statistics are used, which are those that will be folded. And an end point above a quantizer's clip keeps
:data:`SATURATED_SLOPE` of its gradient, so that a bound which saturated can still come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from arqsearch.quantize.graph import LAYERS, Node
from arqsearch.quantize.layer import QuantizedLayer
from arqsearch.quantize.network import QuantizedNet, activate, move
from arqsearch.quantize.quantizers import code_range

#: Part of the gradient that passes where a quantizer clips.
SATURATED_SLOPE = 0.1

#: Computes one conv or linear layer's output from the value that reaches it.
LayerRule: TypeAlias = Callable[[Node, Tensor], Tensor]


@dataclass(frozen=True)
class BoundedPass:
    """What one pass of images and their boxes gives.

    :param logits: of the clean images ``(N, K)``; None when they were not part of the pass.
    :param margins: lower bounds of ``z_label - z_j``, ``(N, K)``, 0 at the label.
    :param widths: for each layer and sum, the mean width of its output's intervals, after the activation.
    """

    logits: Tensor | None
    margins: Tensor
    widths: list[Tensor]


def bounded_forward(
    net: QuantizedNet, lo: Tensor, hi: Tensor, labels: Tensor, pixels: Tensor | None = None
) -> BoundedPass:
    """Bound the margins over boxes of pixels, and run the clean images in the same pass.

    :param lo: lower pixel bounds ``(N, C, H, W)`` in grey levels.
    :param hi: upper pixel bounds, same shape.
    :param labels: ``(N,)``.
    :param pixels: clean images, same shape; they update live batch norm as a forward pass does.
    """
    last = net.graph[net.graph.output]  # A linear layer: conversion refuses anything else.
    ends = [lo, hi] if pixels is None else [pixels, lo, hi]
    widths: list[Tensor] = []
    found: list[Tensor] = []

    def layer_rule(node: Node, stack: Tensor) -> Tensor:
        x = _quantized_input(net, node, stack)
        if node is not last:
            return _bounded_layer(net, node, x, len(ends))
        logits, margins = _specification(net, node, x.chunk(len(ends)), labels)
        found.append(margins)
        return margins if logits is None else logits

    def watch(node: Node, stack: Tensor) -> None:
        if (node.kind in LAYERS and node is not last) or node.kind == "add":
            low, high = stack.chunk(len(ends))[-2:]
            widths.append((high - low).mean())

    start = input_values(net, torch.cat(ends))
    logits = run_graph(net, start, layer_rule, watch)
    return BoundedPass(None if pixels is None else logits, found[0], widths)


def interval_margins(net: QuantizedNet, lo: Tensor, hi: Tensor, labels: Tensor) -> Tensor:
    """Lower bounds of ``z_label - z_j`` over a box of pixels, batch norm by its running statistics.

    :param lo: lower pixel bounds ``(N, C, H, W)`` in grey levels.
    :param hi: upper pixel bounds, same shape.
    :param labels: ``(N,)``.
    :returns: ``(N, K)``; 0 at the label itself.
    """
    return bounded_forward(net, lo, hi, labels).margins


def worst_case_logits(margins: Tensor) -> Tensor:
    """Logits whose cross-entropy is the worst-case cross-entropy: ``-margins``, 0 at the label."""
    return -margins


def input_values(net: QuantizedNet, pixels: Tensor) -> Tensor:
    """The value of the input node for pixels in grey levels, before a stream."""
    kind, reader = net.placements["input"]
    return net.input_value(pixels, net.layer(reader).bits[1] if kind == "layer" else net.settings.residual_bits)


def run_graph(
    net: QuantizedNet, start: Tensor, rule: LayerRule, watch: Callable[[Node, Tensor], None] | None = None
) -> Tensor:
    """Walk the graph from the input node's value; every node but the layers maps each entry on its own.

    :param start: as :func:`input_values` gives it.
    :param rule: for conv and linear layers.
    :param watch: called with every node and its value.
    :returns: the output node's value.
    """
    graph = net.graph
    last_use = {source: node.name for node in graph.nodes for source in node.inputs}
    values: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.kind == "add":
            left, right = (values[source] for source in node.inputs)
            x = net.add_values(node, left, right)
        else:
            if node.kind == "input":
                x = start
            elif node.kind in LAYERS:
                x = rule(node, values[node.inputs[0]])
            else:
                x = move(node, values[node.inputs[0]])
            x = activate(node, x)
            if node.name in graph.streams:
                x = _with_slope(net.stream_value(node.name, x), x, *_stream_clip(net, node.name))
        if watch is not None:
            watch(node, x)
        values[node.name] = x
        for source in set(node.inputs):
            if last_use[source] == node.name:
                values.pop(source, None)
    return values[graph.output]


# ---- layers ----------------------------------------------------------------------------------


def _quantized_input(net: QuantizedNet, node: Node, x: Tensor) -> Tensor:
    """A layer's input at its own bits, with a gradient also where it is clipped."""
    value = net.layer_input(node, x)
    if value is x:
        return x
    quantizer, bits = net.layer(node.name).activation, net.layer(node.name).bits[1]
    low, high = code_range(bits, quantizer.signed)
    step = float(quantizer.step(bits).detach())
    return _with_slope(value, x, low * step, high * step)


def _bounded_layer(net: QuantizedNet, node: Node, x: Tensor, parts: int) -> Tensor:
    """``[clean,] low, high`` of a layer's output, stacked as its input is."""
    layer = net.layer(node.name)
    *clean, low, high = x.chunk(parts)
    weight = layer.quantized_weight(net.quantized)
    centres = torch.cat([*clean, torch.lerp(low, high, 0.5)])
    if clean and layer.batch_norm is not None and layer.batch_norm.training:
        centres, radius = _live_batch_norm(layer, layer.batch_norm, centres, high - low, weight, len(clean[0]))
    else:
        scale = net.input_scale(node)
        bias = layer.folded_bias() if scale is None else layer.quantized_bias(scale)
        centres, radius = layer.operate(centres, weight, bias), layer.operate(high - low, weight.abs() / 2, None)
    *clean, centre = centres.chunk(parts - 1)
    return torch.cat([*clean, centre - radius, centre + radius])


def _live_batch_norm(
    layer: QuantizedLayer, norm: nn.Module, centres: Tensor, widths: Tensor, weight: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Clean outputs and centres, and radii, normalised by the statistics of the `count` clean images.

    As ``norm(...)`` in training mode, running statistics included; written out because the bounds need the mean and
    variance with their gradients. Whole tensors are passed over as seldom as possible.
    """
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    factor = layer.fold_factor()
    assert factor is not None
    # The weights carry the folded factor of the running statistics (they are quantized so); take it out again.
    safe = torch.where(factor.abs() < 1e-6, torch.full_like(factor, 1e-6), factor)
    weight = weight / safe.reshape(-1, *(1,) * (weight.ndim - 1))
    raw = layer.operate(centres, weight, layer.layer.bias)
    radius = layer.operate(widths, weight.abs() / 2, None)
    rows = raw[:count].movedim(1, -1).reshape(-1, raw.shape[1])
    mean = rows.mean(0)
    variance = (rows - mean).square_().mean(0)
    _update_statistics(norm, mean.detach(), variance.detach(), len(rows))
    gain = norm.weight / torch.sqrt(variance + norm.eps)
    shape = (1, -1, *(1,) * (raw.ndim - 2))
    shift = (norm.bias - mean * gain).reshape(shape)
    return torch.addcmul(shift, raw, gain.reshape(shape)), radius * gain.abs().reshape(shape)


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics as torch's batch norm updates them; the variance unbiased."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    part = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, part)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), part)


def _specification(
    net: QuantizedNet, node: Node, ends: tuple[Tensor, ...], labels: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Clean logits, and bounds of ``(w_y - w_j) x + b_y - b_j`` from the bounds of x."""
    layer = net.layer(node.name)
    *clean, low, high = ends
    scale = net.input_scale(node)
    weight = layer.quantized_weight(net.quantized)
    bias = layer.folded_bias() if scale is None else layer.quantized_bias(scale)
    rows = weight[labels][:, None, :] - weight[None]
    centre = torch.einsum("nki,ni->nk", rows, torch.lerp(low, high, 0.5))
    radius = torch.einsum("nki,ni->nk", rows.abs(), (high - low) / 2)
    logits = layer.operate(clean[0], weight, bias) if clean else None
    return logits, centre - radius + bias[labels][:, None] - bias[None]


# ---- gradients -------------------------------------------------------------------------------


class _Slope(torch.autograd.Function):
    """The quantized value; where its argument was clipped, part of the gradient goes to the argument."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        return grad, SATURATED_SLOPE * grad * ((x < ctx.low) | (x > ctx.high)), None, None


def _with_slope(value: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    if value is x or not torch.is_grad_enabled():
        return value
    result: Tensor = _Slope.apply(value, x, low, high)  # type: ignore[no-untyped-call]
    return result


def _stream_clip(net: QuantizedNet, name: str) -> tuple[float, float]:
    """The smallest and largest value of a stream."""
    quantizer, bits = net.stream(name), net.settings.residual_bits
    low, high = code_range(bits, quantizer.signed)
    step = float(quantizer.step(bits).detach())
    return low * step, high * step
