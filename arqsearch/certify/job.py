"""`ImageJob`: one image to certify, with what every rule counts and fills in alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.certify.line import CertificateLine
from arqsearch.certify.smoothing import (
    PIECE,
    Classifier,
    OnSamples,
    SmoothingSettings,
    count_classes,
    sample_classes,
    total_distance,
)


@dataclass(frozen=True)
class ImageJob:
    """One image to certify: what a rule reads, and what it counts with.

    :param classify: runs the network.
    :param image: uint8 ``(H, W, C)``, grey levels.
    :param image_id: its id in the data set, the image word of the noise counter.
    :param label: its true class, None when unknown.
    :param settings: how it is certified.
    :param program: hash of what ``classify`` runs.
    :param data: identity of the data set.
    :param on_samples: called as samples are taken.
    """

    classify: Classifier
    image: NDArray[np.uint8]
    image_id: int
    label: int | None
    settings: SmoothingSettings
    program: str
    data: str
    on_samples: OnSamples | None = None

    @property
    def d_tau(self) -> float:
        """d·τ of this image's noise."""
        return total_distance(self.settings.sigma, self.image.size)

    def skips(self, predicted: int) -> bool:
        """Whether an image of this selected class is not to be estimated."""
        return self.settings.skip_misclassified and self.label is not None and predicted != self.label

    def count(self, stage: int, samples: int, sample_start: int = 0) -> dict[int, int]:
        """Votes by class of samples ``sample_start``, ``sample_start + 1``, ..."""
        votes: dict[int, int] = {}
        for start in range(sample_start, sample_start + samples, PIECE):
            count = min(PIECE, sample_start + samples - start)
            part = count_classes(self.classify, self.image, self.image_id, stage, count, self.settings, start)
            for name, number in part.items():
                votes[name] = votes.get(name, 0) + number
            self._took(count)
        return dict(sorted(votes.items()))

    def classes(self, stage: int, samples: int) -> NDArray[np.int64]:
        """Class of each of the first samples."""
        found = sample_classes(self.classify, self.image, self.image_id, stage, samples, self.settings)
        self._took(samples)
        return found

    def _took(self, samples: int) -> None:
        if self.on_samples is not None:
            self.on_samples(samples)

    def line(self, **fields: Any) -> CertificateLine:
        """The line with the fields that every rule fills alike, and the given ones."""
        return CertificateLine(
            program=self.program,
            data=self.data,
            image=int(self.image_id),
            label=None if self.label is None else int(self.label),
            sigma=float(self.settings.sigma),
            d_tau=self.d_tau,
            alpha=float(self.settings.alpha),
            seed=self.settings.seed,
            rule=self.settings.rule,
            **fields,
        )
