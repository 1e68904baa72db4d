"""The networks that the speed benchmarks run: random weights, sound statistics, noisy pixels.

Speed does not depend on what a network has learned, so nothing is downloaded or trained. Batch norm gets the
statistics of the images it will see: values stay of the size that they have in a trained network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch import models
from arqsearch.certify.noise import NoiseTable
from arqsearch.errors import ArqError, nearest
from arqsearch.models.normalization import IMAGENET, Normalization
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import Multiplier, QuantizedNet, QuantizeSettings

#: Noise level of the pixels, in [0,1] pixels.
SIGMA = 0.25
#: First and last layer of every configuration, as a search fixes them by default.
FIRST_LAST = (8, 8)
#: Layers of the mixed configuration take these (weight, activation) bits in turn.
MIXED = ((4, 4), (2, 4), (3, 3), (5, 5), (4, 6), (8, 8))
UNIFORM = {"w8a8": (8, 8), "w4a4": (4, 4), "w2a4": (2, 4)}
CONFIGURATIONS = (*UNIFORM, "mixed")
#: Images that set batch norm statistics and step sizes, and the values kept for each step size.
CALIBRATION_IMAGES, CALIBRATION_VALUES = 16, 1 << 13


@dataclass(frozen=True)
class NetworkSpec:
    """One benchmarked network.

    :param name: as given to ``--network``.
    :param title: for tables.
    :param model: name in :mod:`arqsearch.models`.
    :param resolution: height and width of the images.
    :param batch: images in one timed call.
    :param quick_batch: the same for ``--quick``; 0 leaves the network out.
    :param classes: width of the logits.
    :param options: of the model.
    """

    name: str
    title: str
    model: str
    resolution: int
    batch: int
    quick_batch: int = 0
    classes: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)


NETWORKS: dict[str, NetworkSpec] = {
    spec.name: spec
    for spec in (
        NetworkSpec("resnet20", "ResNet-20", "resnet20", 32, 256, 128),
        NetworkSpec("mobilenetv2", "MobileNetV2", "mobilenet_v2", 32, 128, 32, options={"strides": "cifar"}),
        NetworkSpec("resnet50_224", "ResNet-50", "resnet50", 224, 4, classes=1000),
        NetworkSpec("mobilenetv2_224", "MobileNetV2", "mobilenet_v2", 224, 8, classes=1000),
    )
}


def select(names: Iterable[str], quick: bool) -> list[NetworkSpec]:
    """The networks to run; without names all of them, or those that ``--quick`` runs.

    :raises ArqError: for an unknown name.
    """
    chosen = list(names) or [spec.name for spec in NETWORKS.values() if spec.quick_batch or not quick]
    for name in chosen:
        if name not in NETWORKS:
            raise ArqError(f"No network {name!r} to benchmark. {nearest(name, NETWORKS)}")
    return [NETWORKS[name] for name in dict.fromkeys(chosen)]


class Network:
    """A network and one batch, made once and shared by everyone who is timed.

    :param spec: which network.
    :param batch: images in the batch.
    :param multiplier: requantization multipliers of the integer programs.
    :param seed: of weights and pixels.
    """

    def __init__(self, spec: NetworkSpec, batch: int, multiplier: Multiplier = "15", seed: int = 0) -> None:
        self.spec = spec
        self.batch = batch
        self.multiplier: Multiplier = multiplier
        self.normalization: Normalization = IMAGENET
        self.table = NoiseTable.for_sigma(SIGMA)
        #: Noisy images as the integer program takes them: int16 ``(N, H, W, C)``.
        self.pixels = noisy_pixels(batch, spec.resolution, self.table.hi, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = models.build(spec.model, spec.classes, **spec.options)
        settle_batch_norm(self.model, self.normalized()[:CALIBRATION_IMAGES])

    def scaled(self) -> Tensor:
        """The batch as published smoothing code holds it: float32 ``(N, C, H, W)`` in [0,1] plus noise."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2).contiguous().float() / 255

    def normalized(self) -> Tensor:
        """The batch normalised as the model wants it: float32 ``(N, C, H, W)``."""
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in self._statistics)
        return (self.scaled() - mean) / std

    @property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.normalization.mean, self.normalization.std

    @cached_property
    def quantized(self) -> QuantizedNet:
        """The network with step sizes fitted to the batch; a configuration only switches its bits."""
        shape = (self.pixels.shape[3], *self.pixels.shape[1:3])
        net = QuantizedNet(self.model, shape, *self._statistics, QuantizeSettings(multiplier=self.multiplier))
        grey = torch.from_numpy(self.pixels[:CALIBRATION_IMAGES]).permute(0, 3, 1, 2).float()
        net.calibrate([grey], samples=CALIBRATION_VALUES)
        return net.eval()

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.quantized.layer_infos)

    def bitwidths(self, configuration: str) -> BitWidths:
        """Bits of one of :data:`CONFIGURATIONS`; first and last layer stay at :data:`FIRST_LAST`."""
        names = self.quantized.bitwidths.names
        ends = {names[0]: FIRST_LAST, names[-1]: FIRST_LAST}
        if configuration in UNIFORM:
            return BitWidths.uniform(names, *UNIFORM[configuration], ends)
        return BitWidths.from_mapping([(n, ends.get(n, MIXED[i % len(MIXED)])) for i, n in enumerate(names)])


def noisy_pixels(count: int, resolution: int, limit: int, seed: int) -> np.ndarray:
    """Smooth random images plus rounded Gaussian noise at :data:`SIGMA`: int16 ``(N, H, W, 3)``.

    :param limit: largest absolute noise in grey levels.
    """
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 8, 8), generator=source) * 255
    images = F.interpolate(coarse, size=(resolution, resolution), mode="bilinear").round()
    noise = (torch.randn(images.shape, generator=source) * (255 * SIGMA)).round().clamp(-limit, limit)
    return np.ascontiguousarray((images + noise).permute(0, 2, 3, 1).to(torch.int16).numpy())


@torch.no_grad()
def settle_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Set every batch norm to the statistics of these images, and leave the model in evaluation mode.

    :param images: normalised, ``(N, C, H, W)``.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # The plain average, so one batch sets the statistics.
    model.train()
    model(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
