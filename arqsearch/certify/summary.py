"""Certificate lines to the figures that papers report: certified accuracy at radii, ACR, abstentions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arqsearch.certify.line import FIXED, CertificateLine
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

    :param rule: how counts became radii.
    :param images: number of images.
    :param n: estimate samples of each image (ACR depends on it); for ``sequential`` the cap.
    :param mean_samples: estimate samples taken for each estimated image, on average.
    :param accuracy: certified accuracy by L2 radius in [0,1] pixels.
    :param undecided: images whose true class the cap left undecided, by radius; they are not certified. Empty for rules
        that decide every radius.
    :param acr: mean certified radius, wrong and abstained images counted 0.
    :param acr_is_lower_bound: the radii are only what was needed to decide the asked ones (``sequential``) or follow
        from another network's votes (``incremental``), so ACR is below that of the same network at the same n.
    :param acr_low: lower end of its 95 % interval (normal approximation over the images).
    :param acr_high: upper end.
    :param abstained: images whose class could not be certified.
    :param alpha: failure probability of each image's certificate.
    :param expected_wrong: alpha times the images that were estimated: at most so many of the certificates are wrong
        on average over the noise.
    """

    rule: str
    images: int
    n: int
    mean_samples: float
    accuracy: dict[float, Share]
    undecided: dict[float, int]
    acr: float
    acr_is_lower_bound: bool
    acr_low: float
    acr_high: float
    abstained: int
    alpha: float
    expected_wrong: float


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
    decimals and the rule ``fixed`` this is votes ≥ K(n, r, d·τ), and for ``sequential`` and an asked radius it is the
    decision "certified".

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
    first, estimated = listed[0], [line for line in listed if line.estimated]
    asked = () if first.sequential is None else first.sequential.radii
    return Summary(
        rule=first.rule,
        images=len(listed),
        n=first.n,
        mean_samples=sum(line.samples for line in estimated) / max(1, len(estimated)),
        accuracy={r: share(sum(holds_at(line, r) for line in listed), len(listed)) for r in radii},
        undecided={r: sum(line.undecided(r) for line in listed) for r in radii if r in asked},
        acr=mean,
        acr_is_lower_bound=first.rule != FIXED,
        acr_low=max(0.0, mean - spread),
        acr_high=mean + spread,
        abstained=sum(line.abstained for line in listed),
        alpha=first.alpha,
        expected_wrong=first.alpha * len(estimated),
    )
