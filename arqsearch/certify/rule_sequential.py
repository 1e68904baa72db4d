"""The ``sequential`` rule: samples are taken until every asked radius is certified or refuted, or the cap is reached.

The samples of the estimate stage are taken from index 0 upward and counted at fixed look times, so that a line depends
on no batch size. The bounds hold at all looks and for all radii at once (`sequential`), hence also for the class that
n0 other samples selected, or for the label, which needs no selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

from arqsearch.certify.binomial import RADIUS_STEP
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import SEQUENTIAL, CertificateLine, first_maximum
from arqsearch.certify.line_schema import Sequential
from arqsearch.certify.noise import ESTIMATE, SELECT
from arqsearch.certify.rule_fixed import radius_problems, selection_problems, skip_problems
from arqsearch.certify.sequential import Decision, look_times, sequential_radius, sequential_table
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.errors import ArqError

OPEN = "undecided"


class SequentialRule:
    """The betting confidence sequence."""

    name = SEQUENTIAL

    def certify(self, job: ImageJob) -> CertificateLine:
        """Take samples until all asked radii are decided."""
        settings = job.settings
        radii = asked_radii(settings.radii)
        if settings.target == "label":
            if job.label is None:
                raise ArqError(f"Image {job.image_id} has no label to test; choose target 'selected'.")
            selection, predicted, estimated = {}, job.label, True
        else:
            selection = job.count(SELECT, settings.n0)
            predicted = first_maximum(selection)
            estimated = not job.skips(predicted)
        counts: dict[int, int] = {}
        looks: list[tuple[int, int]] = []
        decisions: tuple[Decision, ...] = ()
        if estimated:
            table = sequential_table(radii, settings.cap, settings.sigma, settings.alpha, job.d_tau)
            for before, time in pairwise((0, *table.times)):
                for name, votes in job.count(ESTIMATE, time - before, before).items():
                    counts[name] = counts.get(name, 0) + votes
                looks.append((time, counts.get(predicted, 0)))
                decisions = table.decide([votes for _, votes in looks])
                if OPEN not in decisions:
                    break
        radius = best_radius(looks, radii, decisions, settings.sigma, settings.alpha, job.d_tau)
        part = Sequential(target=settings.target, radii=radii, looks=tuple(looks), decisions=decisions)
        return job.line(
            n0=0 if settings.target == "label" else settings.n0, n=settings.cap, predicted=predicted,
            selection=selection, estimate=dict(sorted(counts.items())), estimated=estimated,
            certified=radius is not None, radius=float(radius or 0), sequential=part,
        )  # fmt: skip

    def stated(self, settings: SmoothingSettings) -> dict[str, Any]:
        """Samples, radii and target."""
        return {
            "n0": 0 if settings.target == "label" else settings.n0,
            "n": settings.cap,
            "target": settings.target,
            "radii": asked_radii(settings.radii),
        }

    @staticmethod
    def problems(line: CertificateLine) -> list[str]:
        """Class, looks, stopping, decisions and radius from the counts."""
        part = line.sequential
        assert part is not None
        try:
            radii = asked_radii(part.radii)
        except ArqError as error:
            return [str(error)]
        if part.target == "label":
            found = [] if line.correct and line.estimated else ["the tested class is not the label"]
            if line.n0 or line.selection:
                found.append("a tested label is not selected by samples")
        else:
            found = selection_problems(line) + skip_problems(line)
        found += _look_problems(line, part)
        if found or not line.estimated:
            return found or radius_problems(line, None)
        table = sequential_table(radii, line.n, line.sigma, line.alpha, line.d_tau)
        hits = [votes for _, votes in part.looks]
        decisions = table.decide(hits)
        if decisions != part.decisions:
            found.append(f"its looks decide {', '.join(decisions)}; the line says {', '.join(part.decisions)}")
        if OPEN in decisions and len(hits) < len(table.times):
            found.append("sampling stopped before the cap with a radius undecided")
        if len(hits) > 1 and OPEN not in table.decide(hits[:-1]):
            found.append("sampling went on after every radius was decided")
        radius = best_radius(part.looks, radii, decisions, line.sigma, line.alpha, line.d_tau)
        return found + radius_problems(line, radius)


def asked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    """The radii to decide: ascending, distinct, at most six decimals, as radii are stored.

    :raises ArqError: otherwise, or when there is none.
    """
    found = tuple(float(radius) for radius in radii)
    whole = all(Decimal(str(radius)) % RADIUS_STEP == 0 for radius in found)
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or not whole:
        raise ArqError(
            f"Radii {list(found)} cannot be decided; give distinct radii of at least 0 and at most six decimals in "
            "ascending order, such as 0.25 0.5."
        )
    return found


def best_radius(
    looks: Sequence[tuple[int, int]], radii: Sequence[float], decisions: Sequence[Decision], sigma: float, alpha: float,
    d_tau: float,
) -> Decimal | None:  # fmt: skip
    """Largest certified radius: that of the last look or an asked one, and below every refuted one.

    All looks hold at once with confidence 1 − α, so the largest may be taken.
    """
    if not looks:
        return None
    samples, votes = looks[-1]
    found = [] if (last := sequential_radius(votes, samples, sigma, alpha, d_tau)) is None else [last]
    asked = list(zip((Decimal(str(radius)) for radius in radii), decisions, strict=True))
    found += [radius for radius, decision in asked if decision == "certified"]
    refuted = [radius - RADIUS_STEP for radius, decision in asked if decision == "refuted"]
    best = min([max(found), *refuted]) if found else None
    return best if best is not None and best >= 0 else None


def _look_problems(line: CertificateLine, part: Sequential) -> list[str]:
    if not line.estimated:
        return ["an image that was not estimated has looks or decisions"] if part.looks or part.decisions else []
    times, votes = [time for time, _ in part.looks], [count for _, count in part.looks]
    if not times or times != list(look_times(line.n))[: len(times)] or len(part.decisions) != len(part.radii):
        return [f"its looks are not those of the rule for a cap of {line.n}"]
    steps = zip(pairwise((0, *times)), pairwise((0, *votes)), strict=True)
    if any(not 0 <= now - before <= end - start for (start, end), (before, now) in steps):
        return ["the votes at its looks cannot be"]
    if line.samples != times[-1] or line.votes != votes[-1]:
        return ["the estimate counts are not those of the last look"]
    return []
