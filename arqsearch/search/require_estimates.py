"""What a search can say about a candidate's certified figures: estimates on held-out images, with confidence bounds.

The bounds cover the choice of images: for shares the exact one of Clopper and Pearson, for the average radius the
normal one. They do not cover that votes are counted on few noise samples, nor what fine-tuning changes afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from scipy.stats import beta, norm

from arqsearch.certify.binomial import minimal_count
from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe
from arqsearch.search.terms import estimated_radii

Kind = Literal["certified", "ibp", "acr"]
#: Of the two-sided intervals that tables show.
SHOWN_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """A figure that certification gives: certified accuracy at an L2 radius or an L∞ ε, or the average radius.

    :param kind: ``certified``, ``ibp`` or ``acr``.
    :param at: radius in [0,1] pixels, or ε in whole grey levels; 0 for ``acr``.
    """

    kind: Kind
    at: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Measure:
        """Read ``certified@0.5``, ``ibp@1`` or ``acr``.

        :raises ArqError: when it is none of them.
        """
        match = re.fullmatch(r"(certified|ibp)@([0-9]+(?:\.[0-9]+)?)|(acr)", text)
        if not match:
            raise ArqError(f"There is no measure {text!r}; choose certified@R, ibp@EPS or acr.")
        if match[3]:
            return cls("acr")
        at = float(match[2])
        if match[1] == "ibp" and (at < 1 or at != int(at)):
            raise ArqError(f"Measure {text!r}: ε is a whole number of grey levels from 1.")
        return cls(cast(Kind, match[1]), at)

    @property
    def name(self) -> str:
        """As recipes and tables write it."""
        return self.kind if self.kind == "acr" else f"{self.kind}@{self.at:g}"

    def shown(self, value: float) -> str:
        """A value for people: shares in per cent."""
        return f"{value:.4g}" if self.kind == "acr" else f"{100 * value:.4g}%"


@dataclass(frozen=True)
class Estimate:
    """An estimated figure.

    :param value: on the held-out images.
    :param bound: lower end of the one-sided interval that a requirement is compared with.
    :param low: lower end of the two-sided 95 % interval.
    :param high: its upper end.
    """

    value: float
    bound: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimator:
    """From the integer counts of an evaluation to estimates.

    :param measures: what is estimated.
    :param sigma: noise level in [0,1] pixels.
    :param samples: noise samples behind the votes.
    :param n: samples of the certificate to come.
    :param alpha: its failure probability for each image.
    :param confidence: of the one-sided bounds.
    """

    measures: tuple[Measure, ...]
    sigma: float
    samples: int
    n: int
    alpha: float
    confidence: float = 0.95

    @classmethod
    def of(cls, recipe: Recipe, measures: Sequence[Measure]) -> Estimator:
        """The estimator of a recipe.

        :raises ArqError: when the evaluation does not count what a measure needs, or the certificate cannot reach it.
        """
        section, certify = recipe.evaluate, recipe.certify
        n = certify.n if certify.rule == "fixed" else certify.cap
        found = cls(
            tuple(dict.fromkeys(measures)), recipe.sigma, section.smoothed.samples, n, certify.alpha,
            recipe.search.confidence,
        )  # fmt: skip
        for measure in found.measures:
            if measure.kind == "ibp":
                epsilon = int(measure.at)
                if section.interval.weight == 0 or epsilon not in section.interval.epsilons:
                    raise ArqError(
                        f"{measure.name} is not counted during the search: set evaluate.interval.weight above 0 and "
                        f"evaluate.interval.epsilons to include {epsilon}."
                    )
                if epsilon not in certify.epsilons:
                    raise ArqError(f"{measure.name} is not bounded on test images; add {epsilon} to certify.epsilons.")
            elif section.smoothed.weight == 0:
                raise ArqError(f"{measure.name} needs votes: set evaluate.smoothed.weight above 0.")
            elif measure.kind == "certified":
                found.check_reachable(measure)
        return found

    def check_reachable(self, measure: Measure) -> None:
        """Refuse a radius that no number of votes certifies, or that the search's samples cannot tell.

        :raises ArqError: with the least n, or the least evaluate.smoothed.samples, that can.
        """
        asked = self.votes_asked(measure)
        if asked > self.n:
            least = math.log(self.alpha) / float(norm.logcdf(measure.at / self.sigma))
            raise ArqError(
                f"No image can be certified at r = {measure.at:g} with {self.n} samples: that takes "
                f"{math.ceil(least) if least < 1e9 else f'{least:.1g}'}. Ask for a smaller radius, or raise certify.n "
                "(certify.cap)."
            )
        share = asked / self.n
        if (self.samples + 0.5) / (self.samples + 1) < share:
            least = math.ceil((share - 0.5) / (1 - share))
            raise ArqError(
                f"{self.samples} noise samples cannot tell whether r = {measure.at:g} is certified: set "
                f"evaluate.smoothed.samples to at least {least}."
            )

    def votes_asked(self, measure: Measure) -> int:
        """Votes of the certificate's n samples that certify the radius (the exact rule; d·τ is below one vote)."""
        return minimal_count(self.n, measure.at, self.sigma, self.alpha)

    def estimates(self, counts: Mapping[str, Any]) -> dict[str, Estimate]:
        """Every measure, by name.

        :param counts: of a full evaluation.
        """
        return {measure.name: self.estimate(measure, counts) for measure in self.measures}

    def estimate(self, measure: Measure, counts: Mapping[str, Any]) -> Estimate:
        """One measure.

        An image counts as certified at r where the share of its votes, (k + ½) / (m + 1), is what the certificate will
        ask of its own samples.
        """
        if measure.kind == "ibp":
            return self._share(np.asarray(counts["robust"][str(int(measure.at))], dtype=bool))
        votes = counts["votes"]
        if measure.kind == "certified":
            shares = (np.asarray(votes, dtype=float) + 0.5) / (self.samples + 1)
            return self._share(shares >= self.votes_asked(measure) / self.n)
        largest = self.sigma * float(norm.ppf(self.alpha ** (1 / self.n)))
        return self._mean(np.minimum(estimated_radii(votes, self.samples, self.sigma), max(largest, 0.0)))

    def _share(self, holds: np.ndarray) -> Estimate:
        count, images, side = int(holds.sum()), len(holds), (1 - SHOWN_CONFIDENCE) / 2
        return Estimate(
            count / images, lower_bound(count, images, self.confidence), lower_bound(count, images, 1 - side),
            1 - lower_bound(images - count, images, 1 - side),
        )  # fmt: skip

    def _mean(self, radii: np.ndarray) -> Estimate:
        value = float(radii.mean())
        error = float(radii.std(ddof=1)) / math.sqrt(len(radii)) if len(radii) > 1 else math.inf
        wide = float(norm.ppf((1 + SHOWN_CONFIDENCE) / 2)) * error
        bound = max(0.0, value - float(norm.ppf(self.confidence)) * error)
        return Estimate(value, bound, max(0.0, value - wide), value + wide)


def lower_bound(count: int, images: int, confidence: float) -> float:
    """One-sided lower Clopper-Pearson bound of a share.

    :param count: images that have the property.
    :param confidence: of the bound, in [0.5, 1).
    """
    return float(beta.ppf(1 - confidence, count, images - count + 1)) if count > 0 else 0.0
