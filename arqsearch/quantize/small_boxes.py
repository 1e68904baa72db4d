"""Small boxes around attack points (SABR: Müller et al., ICLR 2023): tighter bounds to train on than whole ε balls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.quantize.graph import Node
from arqsearch.quantize.intervals import input_values, run_graph
from arqsearch.quantize.network import QuantizedNet

#: The attack's steps together could cross the ball this many times its radius.
REACH = 2.5


@contextmanager
def statistics_kept(net: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Batch norm in inference mode meanwhile: an attack's forward passes leave its statistics alone."""
    modules = [m for m in net.modules() if m.training] if isinstance(net, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def small_boxes(
    net: QuantizedNet, low: Tensor, high: Tensor, labels: Tensor, radius: float, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes of that radius around attack points, each inside the given box.

    :param low: lower pixel bounds ``(N, C, H, W)`` in grey levels.
    :param high: upper pixel bounds.
    :param labels: ``(N,)``.
    :param radius: of the small boxes, in grey levels.
    :param steps: gradient steps of the attack.
    :param generator: of the attack's random start.
    :returns: lower and upper bounds of the small boxes.
    """
    middle = (low + high) / 2
    # Centres keep the radius from the faces; where the box is no wider than that, its middle.
    first, final = torch.minimum(low + radius, middle), torch.maximum(high - radius, middle)
    with statistics_kept(net):
        points = attack(net, first, final, labels, steps, generator)
    return torch.maximum(points - radius, low), torch.minimum(points + radius, high)


def attack(
    net: QuantizedNet, low: Tensor, high: Tensor, labels: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018) on the cross-entropy inside boxes of pixels.

    The gradient is taken at the network's input value, a monotone function of the pixel, because the
    quantization of pixels has none.

    :param low: lower pixel bounds ``(N, C, H, W)`` in grey levels.
    :param high: upper pixel bounds.
    :param labels: ``(N,)``.
    :returns: points of the boxes, real numbers.
    """
    reach = (high - low) / 2
    uniform = torch.rand(low.shape, generator=generator, device=low.device)
    points = low + (high - low) * uniform
    for _ in range(steps):
        start = input_values(net, points).detach().requires_grad_()
        loss = F.cross_entropy(run_graph(net, start, _plain_rule(net)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, start)
        points = points + (REACH / steps) * reach * gradient.sign()
        points = torch.minimum(torch.maximum(points, low), high)
    return points.detach()


def _plain_rule(net: QuantizedNet) -> Callable[[Node, Tensor], Tensor]:
    def rule(node: Node, x: Tensor) -> Tensor:
        result: Tensor = net.layer(node.name)(net.layer_input(node, x), net.input_scale(node))
        return result

    return rule
