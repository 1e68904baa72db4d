"""Small plain CNNs whose interval bounds stay tight: few layers, strides instead of pools, no shortcuts.

tiny, small and medium follow the networks of Gowal et al. 2018 (interval bound propagation), padded; qaibp and
qaibp_small are the unpadded networks of Lechner et al., AAAI 2023 (quantization-aware interval bound propagation)
and a smaller one of the same kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from arqsearch.errors import ArqError


@dataclass(frozen=True)
class _Plan:
    """Convolutions as (channels, kernel, stride) and hidden dense layers, widths in units of `width`."""

    convs: tuple[tuple[int, int, int], ...]
    dense: tuple[int, ...]
    width: int
    padding: int = 1


PLANS = {
    "tiny": _Plan(((1, 3, 2), (2, 3, 2)), (), 8),
    "small": _Plan(((1, 3, 1), (2, 3, 2), (2, 3, 2)), (4,), 16),
    "medium": _Plan(((1, 3, 1), (1, 4, 2), (2, 3, 1), (2, 4, 2)), (16,), 32),
    "qaibp_small": _Plan(((3, 5, 2), (4, 3, 2)), (8,), 16, padding=0),
    "qaibp": _Plan(((2, 5, 2), (3, 3, 1), (4, 3, 2)), (4,), 32, padding=0),
}


def cnn(
    num_classes: int,
    *,
    size: str,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int | None = None,
    batch_norm: bool = True,
    convs: Sequence[Sequence[int]] | None = None,
    dense: Sequence[int] | None = None,
    padding: int | None = None,
) -> nn.Module:
    """One network of the family: modules conv1, bn1, relu1, ..., flatten, fc1, ..., the last one the logits.

    :param size: a key of :data:`PLANS`.
    :param in_channels: of the images.
    :param image_size: of the images, in pixels; ``(height, width)`` when not square.
    :param width: unit of the plan's channels; None = the plan's own (8 to 32).
    :param batch_norm: whether each convolution is followed by batch norm.
    :param convs: ``[channels, kernel, stride]`` of every convolution, instead of the plan's.
    :param dense: features of every hidden dense layer, instead of the plan's.
    :param padding: of every convolution, instead of the plan's.
    :raises ArqError: when the image is too small for the strides, or `convs` is malformed.
    """
    plan = PLANS[size]
    unit = plan.width if width is None else width
    layers = [(factor * unit, kernel, stride) for factor, kernel, stride in plan.convs]
    if convs is not None:
        layers = [_conv(entry) for entry in convs]
    hidden = [factor * unit for factor in plan.dense] if dense is None else list(dense)
    pad = plan.padding if padding is None else padding
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, (out, kernel, stride) in enumerate(layers, start=1):
        sides = [(side + 2 * pad - kernel) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ArqError(
                f"Images of {image_size} pixels are too small for cnn_{size}; use cnn_tiny or larger images."
            )
        modules[f"conv{number}"] = nn.Conv2d(channels, out, kernel, stride, pad, bias=not batch_norm)
        if batch_norm:
            modules[f"bn{number}"] = nn.BatchNorm2d(out)
        modules[f"relu{number}"] = nn.ReLU()
        channels = out
    modules["flatten"] = nn.Flatten()
    features = channels * sides[0] * sides[1]
    for number, out in enumerate(hidden, start=1):
        modules[f"fc{number}"] = nn.Linear(features, out)
        modules[f"relu{len(layers) + number}"] = nn.ReLU()
        features = out
    modules[f"fc{len(hidden) + 1}"] = nn.Linear(features, num_classes)
    network = nn.Sequential(modules)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def _conv(entry: Sequence[int]) -> tuple[int, int, int]:
    if len(entry) != 3 or min(entry) < 1:
        raise ArqError(
            f"model.options.convs holds {list(entry)}; give [channels, kernel, stride] for each convolution, "
            "for example [[48, 5, 2], [64, 3, 2]]."
        )
    channels, kernel, stride = entry
    return channels, kernel, stride
