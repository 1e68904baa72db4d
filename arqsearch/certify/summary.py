"""Certificate lines to the figures that papers report: certified accuracy at radii, ACR, abstentions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arqsearch.certify.line import CertificateLine
from arqsearch.errors import ArqError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share of images with its two-sided 95 % Clopper-Pearson interval over the choice of images."""

    count: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Figures of one classifier on one set of images.

    :param images: number of images.
    :param n: estimate samples of each image (ACR depends on it).
    :param accuracy: certified accuracy by L2 radius in [0,1] pixels.
    :param acr: mean certified radius, wrong and abstained images counted 0.
    :param acr_low: lower end of its 95 % interval (normal approximation over the images).
    :param acr_high: upper end.
    :param abstained: images whose selected class could not be certified.
    """

    images: int
    n: int
    accuracy: dict[float, Share]
    acr: float
    acr_low: float
    acr_high: float
    abstained: int


def share(count: int, images: int) -> Share:
    """A share with its interval.

    :param count: images that have the property.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, images, 1 - CONFIDENCE, method="beta")
    return Share(count, count / images, float(low), float(high))


def holds_at(line: CertificateLine, radius: float) -> bool:
    """Whether a line certifies the true class at a radius.

    Stored radii are the largest multiples of 10⁻⁶ that the votes certify, so for radii of at most six
    decimals this is votes ≥ K(n, r, d·τ).

    :param radius: in [0,1] pixels; 0 asks for the certified class alone.
    """
    return line.correct and line.certified and line.radius >= radius


def summarize(lines: Iterable[CertificateLine], radii: Sequence[float]) -> Summary:
    """Certified accuracy at each radius and ACR.

    :param lines: one for each image, all with labels and of the same settings.
    :param radii: in [0,1] pixels.
    :raises ArqError: when there are no lines, a label is missing, an image occurs twice or settings differ.
    """
    listed = list(lines)
    if not listed:
        raise ArqError("There is no certificate line to summarize; certify at least one image.")
    for line in listed:
        if line.label is None:
            raise ArqError(f"Image {line.image} has no label; certified accuracy needs labels.")
        if line.settings != listed[0].settings:
            raise ArqError(f"Image {line.image} was certified with other settings; summarize each file by itself.")
    if len({line.image for line in listed}) < len(listed):
        raise ArqError("An image occurs twice among the certificate lines; summarize one line for each image.")
    values = [line.radius if line.correct else 0.0 for line in listed]
    mean = math.fsum(values) / len(values)
    spread = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Summary(
        images=len(listed),
        n=listed[0].n,
        accuracy={r: share(sum(holds_at(line, r) for line in listed), len(listed)) for r in radii},
        acr=mean,
        acr_low=max(0.0, mean - spread),
        acr_high=mean + spread,
        abstained=sum(line.abstained for line in listed),
    )
