"""Networks by name, their weights, and how they want their pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from arqsearch.errors import ArqError, nearest
from arqsearch.models import cnn, efficientnet_lite, mobilenet, resnet, resnet_cifar
from arqsearch.models.custom import build_custom
from arqsearch.models.normalization import IMAGENET, SYMMETRIC, Normalization, centred
from arqsearch.models.weights import load_weights, save_weights

__all__ = [
    "Normalization",
    "available",
    "build",
    "default_normalization",
    "image_options",
    "load_weights",
    "save_weights",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet_cifar.resnet, depth=depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": partial(resnet.resnet, depth=depth) for depth in (18, 34, 50)},
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite.efficientnet_lite0,
    **{f"cnn_{size}": partial(cnn.cnn, size=size) for size in cnn.PLANS},
    "cnn_residual": resnet_cifar.cnn_residual,
}


def available() -> list[str]:
    """Names that :func:`build` knows; besides them ``package.module:function``."""
    return sorted(_BUILDERS)


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Make a network with fresh weights, called with normalised float images ``(N, C, H, W)``.

    :param name: one of :func:`available`, or ``package.module:function`` for your own.
    :param num_classes: width of the logits.
    :param options: keyword arguments of the network, such as ``in_channels`` or ``width``.
    :raises ArqError: for an unknown name or option.
    """
    if ":" in name:
        return build_custom(name, num_classes, options)
    builder = _builder(name)
    accepted = _options(builder)
    for key in options:
        if key not in accepted:
            raise ArqError(f"Model {name} has no option {key!r}. {nearest(key, accepted)}")
    return builder(num_classes, **options)


def image_options(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The options of :func:`build` that follow from the images; none for your own network.

    :param shape: of an image, ``(H, W, C)``.
    :raises ArqError: for an unknown name, or when the network needs square images and these are not.
    """
    if ":" in name:
        return {}
    height, width, channels = shape
    options: dict[str, Any] = {"in_channels": channels}
    if "image_size" in _options(_builder(name)):
        options["image_size"] = height if height == width else (height, width)
        if height != width and name == "efficientnet_lite0":
            raise ArqError(f"{name} needs square images; these are {width}x{height}. Set data.image_size.")
    return options


def default_normalization(name: str, channels: int = 3) -> Normalization:
    """How a network of this name is usually trained; your own networks and grey images get mean 0.5, deviation 0.25.

    :param name: as for :func:`build`.
    :param channels: of the images.
    :raises ArqError: for an unknown name.
    """
    if ":" not in name:
        _builder(name)
    if ":" in name or name.startswith("cnn") or channels != 3:
        return centred(channels)
    return SYMMETRIC if name == "efficientnet_lite0" else IMAGENET


def _builder(name: str) -> Callable[..., nn.Module]:
    if name not in _BUILDERS:
        raise ArqError(f"No model {name!r}. {nearest(name, _BUILDERS)} Your own network: package.module:function.")
    return _BUILDERS[name]


def _options(builder: Callable[..., nn.Module]) -> list[str]:
    """Keyword arguments that a user may set: those that the registry has not fixed."""
    fixed = builder.keywords if isinstance(builder, partial) else {}
    parameters = inspect.signature(builder).parameters
    return [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in fixed]
