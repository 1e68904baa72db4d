"""Fresh weights for interval training (Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021).

Common initialisations keep the variance of values; interval widths then grow with the fan-in at every layer,
and bounds of a fresh network explode. Weights with E|w| = 2 / fan-in keep the expected width instead:
an interval of width d at each of n inputs gives width d · Σ|w_i|, and a ReLU keeps half of it.

Batch norm undoes the scale of the weights before it. In a plain network of few layers that is harmless; in a deep
residual one the widths of all branches would multiply. There the last batch norm of a branch starts at a small gain,
as in the zero-initialised branches of Goyal et al. (2017), and the network starts as its shortcuts.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from arqsearch.quantize.graph import Node
from arqsearch.quantize.network import QuantizedNet

#: First gain of a batch norm that ends in a sum. Not 0: a closed branch would get no gradient through folded weights.
BRANCH_GAIN = 0.01


def initialize_for_intervals(net: QuantizedNet, seed: int) -> None:
    """Draw every conv and linear weight from N(0, 2π / fan-in²), the last layer's from N(0, 1 / fan-in).

    Biases become 0 and batch norms the identity, but for :data:`BRANCH_GAIN` where one ends in a sum. The last layer is
    followed by no ReLU; its deviation is the ordinary one, so that the logits of a fresh network, whose values shrink
    on the way, differ at all.

    :param net: changed in place, as is the module that it wraps.
    :param seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for node in net.graph.layers:
        layer = net.layer(node.name)
        weight = layer.layer.weight
        fan_in = weight[0].numel()
        last = node.name == net.graph.output
        deviation = 1.0 / math.sqrt(fan_in) if last else math.sqrt(2.0 * math.pi) / fan_in
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
            if layer.layer.bias is not None:
                layer.layer.bias.zero_()
        if isinstance(layer.batch_norm, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.batch_norm.reset_parameters()
            if _ends_in_sum(net, node):
                nn.init.constant_(layer.batch_norm.weight, BRANCH_GAIN)


def _ends_in_sum(net: QuantizedNet, node: Node) -> bool:
    """Whether a layer is the end of a residual branch: all that reads it are sums."""
    readers = net.graph.consumers(node.name)
    return not node.relu and bool(readers) and all(reader.kind == "add" for reader in readers)
