"""Certification in a process of its own, slow enough to be killed in the middle of an image."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from arqsearch.certify.certificate import certify_dataset
from arqsearch.certify.smoothing import SmoothingSettings
from tests.certify.rule_cases import Images

SETTINGS = SmoothingSettings(
    sigma=0.1, n0=20, n=300, seed=4, batch_size=50, rule="sequential", radii=(0.02, 0.1), cap=200,
    skip_misclassified=False,
)  # fmt: skip


class Slow:
    """Class 1 from grey level 128 on, after a while; writes down every batch that it is asked about."""

    def __init__(self, record: Path, seconds: float) -> None:
        self.record, self.seconds = record, seconds

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        with self.record.open("a") as file:
            file.write(f"{len(pixels)}\n")
        return (pixels[:, 0, 0, 0] >= 128).to(torch.int64)


def certify(path: Path, record: Path, rule: str, seconds: float) -> None:
    """Certify twelve images."""
    torch.set_num_threads(1)
    settings = replace(SETTINGS, rule=rule)
    certify_dataset(Slow(record, seconds), Images.make(12), "hash", settings, path)
