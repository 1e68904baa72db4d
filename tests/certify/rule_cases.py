"""Small images, a classifier of known probability, and one case for each rule of certification."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arqsearch.certify.base import PROVENANCE, BaseNetwork
from arqsearch.certify.certificate import certify_dataset
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.noise import SEARCH
from arqsearch.certify.smoothing import SmoothingSettings

SEED = 11
NEAR = {PROVENANCE: [[SEED, SEARCH]]}


@dataclass(frozen=True)
class Images:
    """A data set of one-pixel images around the threshold of `Threshold`."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    identity: str = "0" * 64

    @staticmethod
    def make(count: int = 6) -> Images:
        pixels = np.linspace(80, 200, count).astype(np.uint8).reshape(count, 1, 1, 1)
        labels = (pixels[:, 0, 0, 0] >= 128).astype(np.int64)
        labels[1] = 1 - labels[1]
        return Images(pixels, labels, np.arange(count) * 3 + 2)


class Threshold:
    """Class 1 from a grey level on; remembers how many images it has seen."""

    def __init__(self, level: int = 128) -> None:
        self.level, self.seen = level, 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return (pixels[:, 0, 0, 0] >= self.level).to(torch.int64)


@dataclass(frozen=True)
class Case:
    """How one rule is put to use.

    :param settings: of the certificates.
    :param level: threshold of the network that is certified.
    :param base: whether it starts from a base network, the same with threshold 128.
    """

    settings: SmoothingSettings
    level: int = 128
    base: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def classifier(self) -> Threshold:
        return Threshold(self.level)

    def open_base(self, dataset: Images, folder: Path, *, keep: bool = True) -> BaseNetwork | None:
        """The base network, certified in `folder` when it is not yet."""
        if not self.base:
            return None
        path = folder / "base.jsonl"
        settings = replace(self.settings, rule="fixed", n=600)
        certify_dataset(Threshold(), dataset, "base", settings, path)
        return BaseNetwork(path, NEAR, Threshold(), "base", keep=keep)

    def certify(self, dataset: Images, path: Path, **changes: Any) -> list[CertificateLine]:
        """Certify into a file; `changes` are of the settings."""
        positions = changes.pop("positions", None)
        settings = replace(self.settings, **changes)
        base = self.open_base(dataset, path.parent)
        return certify_dataset(
            self.classifier(), dataset, "hash", settings, path, positions=positions, base=base
        )  # fmt: skip


_COMMON = SmoothingSettings(sigma=0.1, n0=20, n=300, seed=SEED, batch_size=64, alpha=0.001)
CASES = {
    "fixed": Case(_COMMON),
    "fixed with two classes": Case(replace(_COMMON, two_class=3)),
    "sequential": Case(replace(_COMMON, rule="sequential", radii=(0.0, 0.03, 0.1), cap=400)),
    "sequential on labels": Case(replace(_COMMON, rule="sequential", radii=(0.05,), cap=300, target="label")),
    "incremental": Case(replace(_COMMON, rule="incremental", shared=250), level=129, base=True),
    "incremental with gains": Case(replace(_COMMON, rule="incremental", shared=250, gained=True), level=127, base=True),
}
