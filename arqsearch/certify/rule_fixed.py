"""The ``fixed`` rule: n0 samples select the class, n fresh ones bound its probability.

The protocol of Cohen, Rosenfeld and Kolter (ICML 2019), with the one-sided Clopper-Pearson bound decided in exact
arithmetic. The two-class radius, where asked for, stands beside the certified one and has its own α.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from arqsearch.certify.binomial import certified_radius
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import FIXED, CertificateLine, first_maximum
from arqsearch.certify.line_schema import TwoClass
from arqsearch.certify.noise import ESTIMATE, SELECT
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.certify.two_class import two_class_radius


class FixedRule:
    """Cohen's protocol."""

    name = FIXED

    def certify(self, job: ImageJob) -> CertificateLine:
        """Select, then estimate with n fresh samples."""
        settings = job.settings
        selection = job.count(SELECT, settings.n0)
        predicted = first_maximum(selection)
        estimated = not job.skips(predicted)
        estimate = job.count(ESTIMATE, settings.n) if estimated else {}
        votes, d_tau = estimate.get(predicted, 0), job.d_tau
        radius = certified_radius(votes, settings.n, settings.sigma, settings.alpha, d_tau) if estimated else None
        two_class = None
        if settings.two_class:
            wide = _two_class(estimate, predicted, settings.n, settings.sigma, settings.alpha, d_tau, estimated)
            two_class = TwoClass(alpha=float(settings.alpha), classes=settings.two_class, radius=wide)
        return job.line(
            n0=settings.n0, n=settings.n, predicted=predicted, selection=selection, estimate=estimate,
            estimated=estimated, certified=radius is not None, radius=float(radius or 0), two_class=two_class,
        )  # fmt: skip

    def stated(self, settings: SmoothingSettings) -> dict[str, Any]:
        """Samples, and whether there is a two-class radius."""
        wide = {"two_class": settings.two_class} if settings.two_class else {}
        return {"n0": settings.n0, "n": settings.n, **wide}

    @staticmethod
    def problems(line: CertificateLine) -> list[str]:
        """Class and radius from the counts."""
        found = selection_problems(line) + skip_problems(line)
        if line.samples != (line.n if line.estimated else 0):
            found.append(f"the estimate counts do not add up to {line.n if line.estimated else 0}")
        radius = certified_radius(line.votes, line.n, line.sigma, line.alpha, line.d_tau) if line.estimated else None
        found += radius_problems(line, radius)
        stated = line.two_class
        if stated is not None:
            if max(line.estimate, default=0) >= stated.classes or line.predicted >= stated.classes:
                found.append(f"its counts name classes beyond {stated.classes}")
            wide = _two_class(
                line.estimate, line.predicted, line.n, line.sigma, stated.alpha, line.d_tau, line.estimated
            )  # fmt: skip
            if wide != stated.radius or stated.alpha != line.alpha:
                found.append(f"its counts give two-class radius {wide} at α = {line.alpha}, the line says {stated}")
        return found


def _two_class(
    counts: Mapping[int, int], top: int, n: int, sigma: float, alpha: float, d_tau: float, estimated: bool
) -> float | None:
    radius = two_class_radius(counts, top, n, sigma, alpha, d_tau) if estimated else None
    return None if radius is None else float(radius)


def selection_problems(line: CertificateLine) -> list[str]:
    """Whether the selection counts give the class."""
    if sum(line.selection.values()) != line.n0 or min(line.selection.values(), default=0) < 1:
        return [f"the selection counts do not add up to n0 = {line.n0}"]
    if line.predicted != first_maximum(line.selection):
        return [f"class {line.predicted} is not the first maximum of the selection counts"]
    return []


def skip_problems(line: CertificateLine) -> list[str]:
    """Whether the estimate was skipped for no reason."""
    if not line.estimated and (line.label is None or line.correct):
        return ["the estimate stage may be skipped for a misclassified image only"]
    return []


def radius_problems(line: CertificateLine, radius: Decimal | None) -> list[str]:
    """Whether the line states this radius, None for an abstention."""
    if (line.certified, line.radius) != (radius is not None, float(radius or 0)):
        return [f"its counts give radius {radius}, the line says {line.radius}"]
    return []
