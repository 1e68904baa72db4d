"""The ``incremental`` rule: certify a near network from the certificates of another and their discordant pairs.

The class A of each image, and the votes for it, are those of the base network; this network is run on the first
samples of the base network's estimate noise (`incremental` has the bound). Refused where that noise entered the
selection or the training of this network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arqsearch.certify.incremental import Pairs, Split, incremental_radius, near_probability
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import INCREMENTAL, CertificateLine
from arqsearch.certify.line_schema import AlphaSplit, Incremental
from arqsearch.certify.noise import ESTIMATE
from arqsearch.certify.rule_fixed import radius_problems, selection_problems, skip_problems
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.errors import ArqError

if TYPE_CHECKING:
    from arqsearch.certify.base import BaseNetwork


class IncrementalRule:
    """Discordant pairs on the base network's noise.

    :param base: the network that was certified by the ``fixed`` rule.
    """

    name = INCREMENTAL

    def __init__(self, base: BaseNetwork) -> None:
        self.base = base

    def certify(self, job: ImageJob) -> CertificateLine:
        """Compare the two networks on the shared samples."""
        settings = job.settings
        self.base.check(settings, job.data)
        known = self.base.line(job.image_id)
        if not known.estimated and job.label is None:
            raise ArqError(
                f"Image {job.image_id} was not estimated for the base network, its class being wrong; certify with "
                "labels, or certify the base network without skipping."
            )
        split, shared = Split.of(settings.alpha, settings.gained), settings.shared
        estimated, radius, estimate = known.estimated and not job.skips(known.predicted), None, {}
        base_shared = lost = gained = 0
        if estimated:
            answers = job.classes(ESTIMATE, shared)
            mine, theirs = answers == known.predicted, self.base.answers(known, job, shared)
            base_shared, lost, gained = (int(x.sum()) for x in (theirs, theirs & ~mine, mine & ~theirs))
            names, votes = np.unique(answers, return_counts=True)
            estimate = dict(zip(names.tolist(), votes.tolist(), strict=True))
            bound = near_probability(known.votes, known.n, Pairs(shared, lost, gained), split)
            radius = incremental_radius(bound, settings.sigma, job.d_tau)
        part = Incremental(
            base=known.program, base_votes=known.votes if estimated else 0, base_n=known.n, shared_votes=base_shared,
            lost=lost, gained=gained, split=AlphaSplit(base=split.base, lost=split.lost, gained=split.gained),
        )  # fmt: skip
        return job.line(
            n0=known.n0, n=shared, predicted=known.predicted, selection=dict(known.selection), estimate=estimate,
            estimated=estimated, certified=radius is not None, radius=float(radius or 0), incremental=part,
        )  # fmt: skip

    def stated(self, settings: SmoothingSettings) -> dict[str, Any]:
        """Samples, the base network and the split of α."""
        split = Split.of(settings.alpha, settings.gained)
        return {
            "n0": self.base.n0,
            "n": settings.shared,
            "base": self.base.program,
            "base_n": self.base.n,
            "split": AlphaSplit(base=split.base, lost=split.lost, gained=split.gained),
        }

    @staticmethod
    def problems(line: CertificateLine) -> list[str]:
        """Class, pairs and radius from the counts."""
        part = line.incremental
        assert part is not None
        found = selection_problems(line) + skip_problems(line)
        split = Split.of(line.alpha, part.split.gained > 0)
        if (part.split.base, part.split.lost, part.split.gained) != (split.base, split.lost, split.gained):
            found.append(f"its alphas are no equal split of {line.alpha}")
        if not line.estimated:
            if line.estimate or part.base_votes or part.shared_votes or part.lost or part.gained:
                found.append("an image that was not estimated has counts")
            return found + radius_problems(line, None)
        if line.samples != line.n:
            found.append(f"the estimate counts do not add up to {line.n} shared samples")
        elif line.votes != part.shared_votes - part.lost + part.gained:
            found.append("votes and discordant pairs contradict each other")
        elsewhere = part.base_n - line.n
        if not 0 <= part.base_votes - part.shared_votes <= elsewhere or part.lost > part.shared_votes:
            found.append("votes of the base network and on the shared samples contradict each other")
        try:
            pairs = Pairs(line.n, part.lost, part.gained)
        except ArqError as error:
            return [*found, str(error)]
        if found:
            return found
        bound = near_probability(part.base_votes, part.base_n, pairs, split)
        return radius_problems(line, incremental_radius(bound, line.sigma, line.d_tau))
