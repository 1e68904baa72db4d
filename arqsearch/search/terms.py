"""From integer counts to reward terms. Every figure here is an estimate for the search, not a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from arqsearch.errors import ArqError
from arqsearch.recipe import Evaluate, Smoothed

#: Margins are recorded in thousandths of a logit unit.
MARGIN_UNIT = 1000


def estimated_radii(votes: Sequence[int], samples: int, sigma: float) -> np.ndarray:
    """Plug-in radii σ·Φ⁻¹(p̂) of the true label, 0 where p̂ ≤ ½; p̂ = (k + ½) / (n + 1).

    :param votes: samples that voted for the label, one entry for each image.
    :param sigma: noise level; radii are in the same unit ([0,1] pixels).
    """
    probability = (np.asarray(votes, dtype=float) + 0.5) / (samples + 1)
    return np.where(probability > 0.5, sigma * norm.ppf(probability), 0.0)


def smoothed_values(votes: Sequence[int], settings: Smoothed, sigma: float) -> np.ndarray:
    """What each image adds to the smoothing term: its radius, or the share of the stated radii that it reaches.

    :param votes: true-label votes, one entry for each image.
    :param sigma: noise level in [0,1] pixels.
    """
    radii = estimated_radii(votes, settings.samples, sigma)
    if settings.measure == "mean_radius":
        return radii
    return np.asarray(np.mean([radii >= r if r > 0 else radii > 0 for r in settings.radii], axis=0))


def largest_value(settings: Smoothed, sigma: float) -> float:
    """The largest of :func:`smoothed_values`: that of an image with every vote."""
    return float(smoothed_values([settings.samples], settings, sigma)[0])


def smoothed_name(settings: Smoothed) -> str:
    """Name of the smoothing term."""
    return "smoothed_radius" if settings.measure == "mean_radius" else "smoothed_accuracy"


def terms(counts: Mapping[str, Any], settings: Evaluate, sigma: float, skip_smoothed: bool = False) -> dict[str, float]:
    """Value of every weighted term, by name.

    :param counts: of a full evaluation, as :class:`arqsearch.search.scorer.Scorer` makes them.
    :param skip_smoothed: leave the smoothing term out.
    """
    found: dict[str, float] = {}
    smoothed, interval = settings.smoothed, settings.interval
    if smoothed.weight > 0 and not skip_smoothed:
        found[smoothed_name(smoothed)] = float(smoothed_values(counts["votes"], smoothed, sigma).mean())
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
        found[smoothed_name(settings.smoothed)] = settings.smoothed.weight
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
