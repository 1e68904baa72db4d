"""From integer counts to reward terms. Every figure here is an estimate for the search, not a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from arqsearch.errors import ArqError
from arqsearch.recipe import Evaluate

#: Margins are recorded in thousandths of a logit unit.
MARGIN_UNIT = 1000


def estimated_radii(votes: Sequence[int], samples: int, sigma: float) -> np.ndarray:
    """Plug-in radii σ·Φ⁻¹(p̂) of the true label, 0 where p̂ ≤ ½; p̂ = (k + ½) / (n + 1).

    :param votes: samples that voted for the label, one entry for each image.
    :param sigma: noise level; radii are in the same unit ([0,1] pixels).
    """
    probability = (np.asarray(votes, dtype=float) + 0.5) / (samples + 1)
    return np.where(probability > 0.5, sigma * norm.ppf(probability), 0.0)


def terms(counts: Mapping[str, Any], settings: Evaluate, sigma: float) -> dict[str, float]:
    """Value of every weighted term, by name.

    :param counts: as :class:`arqsearch.search.evaluator.ProgramEvaluator` records them.
    """
    found: dict[str, float] = {}
    smoothed, interval = settings.smoothed, settings.interval
    if smoothed.weight > 0:
        radii = estimated_radii(counts["votes"], smoothed.samples, sigma)
        if smoothed.measure == "mean_radius":
            found["smoothed_radius"] = float(radii.mean())
        else:
            share = [(radii >= r).mean() if r > 0 else (radii > 0).mean() for r in smoothed.radii]
            found["smoothed_accuracy"] = float(np.mean(share))
    if interval.weight > 0:
        if interval.measure == "certified_accuracy":
            found["interval_accuracy"] = float(np.mean([np.mean(counts["robust"][str(e)]) for e in interval.epsilons]))
        else:
            found["interval_margin"] = float(
                np.mean([np.mean(counts["margins"][str(e)]) for e in interval.epsilons]) / MARGIN_UNIT
            )
    return found


def weights(settings: Evaluate) -> dict[str, float]:
    """Weight of each term, by the names that :func:`terms` uses."""
    found: dict[str, float] = {}
    if settings.smoothed.weight > 0:
        name = "smoothed_radius" if settings.smoothed.measure == "mean_radius" else "smoothed_accuracy"
        found[name] = settings.smoothed.weight
    if settings.interval.weight > 0:
        name = "interval_accuracy" if settings.interval.measure == "certified_accuracy" else "interval_margin"
        found[name] = settings.interval.weight
    if not found:
        raise ArqError("No reward term has a weight above 0; set evaluate.smoothed.weight or evaluate.interval.weight.")
    return found


def reward(candidate: Mapping[str, float], reference: Mapping[str, float], settings: Evaluate) -> float:
    """Sum over terms of weight * (candidate - reference); the reference is the W8A8 program."""
    return sum(weight * (candidate[name] - reference[name]) for name, weight in weights(settings).items())


def spread(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Standard deviation of each term over configurations."""
    return {name: float(np.std([v[name] for v in values])) for name in values[0]} if values else {}


def require_varying(spreads: Mapping[str, float], settings: Evaluate) -> None:
    """Refuse to weigh a term that does not vary.

    :raises ArqError: naming the term and both fixes.
    """
    for name, value in spreads.items():
        if value <= 1e-9 and not settings.allow_constant_term:
            section = "smoothed" if name.startswith("smoothed") else "interval"
            raise ArqError(
                f"Reward term {name!r} does not vary over random configurations (deviation {value:.2g}), so it "
                f"cannot steer the search. Set evaluate.{section}.weight=0, or train the base for it "
                f"(train.objective), or set evaluate.allow_constant_term=true to weigh it anyway."
            )
