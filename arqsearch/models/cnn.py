"""Small plain CNNs whose interval bounds stay tight: few layers, strides instead of pools, no shortcuts.

The family follows the small and medium networks of Gowal et al. 2018 (interval bound propagation).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from arqsearch.errors import ArqError


@dataclass(frozen=True)
class _Plan:
    """Convolutions as (width factor, kernel, stride), then hidden dense layers as width factors."""

    convs: tuple[tuple[int, int, int], ...]
    dense: tuple[int, ...]
    width: int


PLANS = {
    "tiny": _Plan(((1, 3, 2), (2, 3, 2)), (), 8),
    "small": _Plan(((1, 3, 1), (2, 3, 2), (2, 3, 2)), (4,), 16),
    "medium": _Plan(((1, 3, 1), (1, 4, 2), (2, 3, 1), (2, 4, 2)), (16,), 32),
}


def cnn(
    num_classes: int,
    *,
    size: str,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int | None = None,
    batch_norm: bool = True,
) -> nn.Module:
    """One network of the family: modules conv1, bn1, relu1, ..., flatten, fc1, ..., the last one the logits.

    :param size: tiny, small or medium.
    :param in_channels: of the images.
    :param image_size: of the images, in pixels; ``(height, width)`` when not square.
    :param width: channels of the first layer; None = the plan's own (8, 16, 32).
    :param batch_norm: whether each convolution is followed by batch norm.
    :raises ArqError: when the image is too small for the strides.
    """
    plan = PLANS[size]
    base = plan.width if width is None else width
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, (factor, kernel, stride) in enumerate(plan.convs, start=1):
        sides = [(side + 2 - kernel) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ArqError(
                f"Images of {image_size} pixels are too small for cnn_{size}; use cnn_tiny or larger images."
            )
        modules[f"conv{number}"] = nn.Conv2d(channels, factor * base, kernel, stride, 1, bias=not batch_norm)
        if batch_norm:
            modules[f"bn{number}"] = nn.BatchNorm2d(factor * base)
        modules[f"relu{number}"] = nn.ReLU()
        channels = factor * base
    modules["flatten"] = nn.Flatten()
    features = channels * sides[0] * sides[1]
    for number, factor in enumerate(plan.dense, start=1):
        modules[f"fc{number}"] = nn.Linear(features, factor * base)
        modules[f"relu{len(plan.convs) + number}"] = nn.ReLU()
        features = factor * base
    modules[f"fc{len(plan.dense) + 1}"] = nn.Linear(features, num_classes)
    network = nn.Sequential(modules)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network
