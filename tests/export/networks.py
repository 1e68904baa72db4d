"""Programs of the bit-exactness matrix: random ones, small lowered nets, a trained ResNet-20, two MobileNetV2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from arqsearch import models
from arqsearch.certify.noise import ESTIMATE, NoiseTable, noise
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from tests.quantize.nets import build

SIGMA = 0.25
#: (weight, activation) bits of the layers, in turn.
MIXED = ((8, 8), (4, 4), (2, 4), (5, 3), (3, 6), (8, 8))


def smooth_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Blurred random images, uint8 ``(N, H, W, C)``."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, shape[2], 4, 4), generator=source) * 255
    images = nn.functional.interpolate(coarse, size=shape[:2], mode="bilinear").round()
    return images.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()


def noisy_images(images: np.ndarray, sigma: float = SIGMA) -> np.ndarray:
    """Images with certificate noise, int16."""
    drawn = noise(
        NoiseTable.for_sigma(sigma), seed=3, stage=ESTIMATE, image_ids=range(len(images)), sample_start=0,
        sample_count=1, coordinates=images[0].size,
    )  # fmt: skip
    return images.astype(np.int16) + drawn.numpy().reshape(images.shape)


def lowered(
    model: nn.Module, shape: tuple[int, int, int], bits: tuple[tuple[int, int], ...] = MIXED, **settings: Any
) -> IntegerProgram:
    """The integer program of a model with step sizes fitted to noisy images.

    :param shape: (height, width, channels).
    """
    height, width, channels = shape
    normal = [0.5] * channels, [0.25] * channels
    net = QuantizedNet(model, (channels, height, width), *normal, QuantizeSettings(**settings))
    pixels = torch.from_numpy(noisy_images(smooth_images(16, shape)))
    net.calibrate([pixels.permute(0, 3, 1, 2).float()])
    names = net.bitwidths.names
    net.set_bitwidths(BitWidths.from_mapping([(name, bits[i % len(bits)]) for i, name in enumerate(names)]))
    return lower(net.eval(), noise_limit=NoiseTable.for_sigma(SIGMA).hi)


def small_net(kind: type[nn.Module], **settings: Any) -> IntegerProgram:
    """One of the networks of tests/quantize/nets.py at mixed bits."""
    return lowered(build(kind), (8, 8, 2), **settings)


def trained_resnet20(find: Callable[[str], Path], **settings: Any) -> IntegerProgram:
    """ResNet-20 trained on CIFAR-10 under noise; skips where its weights are not there.

    :param find: the fixture ``shared_data``.
    """
    model = models.build("resnet20", 10)
    models.load_weights(model, find("weights/resnet20_cifar10_noise_s025.safetensors"))
    return lowered(model.eval(), (32, 32, 3), **settings)


def mobilenet_v2(**settings: Any) -> IntegerProgram:
    """MobileNetV2 for 32×32 images: random weights, batch norm with the statistics of noisy images."""
    torch.manual_seed(0)
    model = models.build("mobilenet_v2", 10, **models.image_options("mobilenet_v2", (32, 32, 3)))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # The plain average: one batch sets the statistics.
    pixels = torch.from_numpy(noisy_images(smooth_images(32, (32, 32, 3)))).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        model.train()((pixels / 255 - 0.5) / 0.25)
    return lowered(model.eval(), (32, 32, 3), **settings)


def trained_mobilenet_v2(find: Callable[[str], Path], **settings: Any) -> IntegerProgram:
    """MobileNetV2 trained on ImageNet, for 224×224 images; skips where its weights are not there.

    :param find: the fixture ``shared_data``.
    """
    model = models.build("mobilenet_v2", 1000, **models.image_options("mobilenet_v2", (224, 224, 3)))
    models.load_weights(model, find("weights/mobilenetv2_imagenet_int8.safetensors"))
    return lowered(model.eval(), (224, 224, 3), **settings)
