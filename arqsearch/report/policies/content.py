"""`ComparisonContent`: everything a comparison of searchers says, as plain frames, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from arqsearch.errors import ArqError, nearest

#: Columns that each frame needs; an empty frame leaves its section out.
REQUIRED: dict[str, tuple[str, ...]] = {
    "ranking": ("policy", "iqm", "low", "high"),
    "tasks": ("task", "what"),
    "profiles": ("policy", "threshold", "share", "low", "high"),
    "improvement": ("x", "y", "probability", "low", "high"),
    "curves": ("policy", "evaluation", "value", "low", "high"),
    "time_curves": ("policy", "seconds", "value", "low", "high"),
    "speed": ("policy",),
    "tests": ("a", "b", "difference", "p", "p_holm", "significant"),
    "effects": ("policy", "effect", "low", "high", "p"),
    "bitwidths": ("layer",),
    "fronts": ("task", "policy", "bops", "reward"),
    "radius": ("network", "radius", "accuracy"),
    "runs": ("task", "policy", "seed", "score"),
}


def _frame() -> pd.DataFrame:
    return pd.DataFrame()


@dataclass(frozen=True)
class ComparisonContent:
    """The frames and facts of one comparison.

    :param title: heading.
    :param verdict: sentences: who is ahead, and which differences are not significant.
    :param tiles: (figure, what it is) above the first section.
    :param facts: label to value.
    :param score: what a score is.
    :param ranking: one row a policy, best first: ``policy``, interquartile mean ``iqm`` with ``low`` and ``high``, and
        further columns for the table.
    :param tasks: one row a task.
    :param profiles: share of runs above each threshold.
    :param improvement: probability that a run of ``x`` beats one of ``y``, both directions.
    :param curves: best score so far over evaluations.
    :param time_curves: the same over seconds.
    :param seconds: budget of the view over seconds.
    :param speed: one row a policy: what it had found within `seconds`, and how long its runs took.
    :param tests: paired tests.
    :param effects: fixed effects of the mixed model, differences from `reference`.
    :param reference: policy of the mixed model's intercept.
    :param model: remarks on the mixed model.
    :param bitwidths: one row a layer: ``layer``, ``<policy>.weight`` and ``<policy>.activation`` of each best run.
    :param fronts: non-dominated points of each policy's typical run; a row's ``policy`` may name the exact front.
    :param radius: certified accuracy over the radius, where certificates exist.
    :param runs: every run.
    :param notes: how the figures were made.
    :param provenance: hashes and versions.
    :raises ArqError: when a frame lacks a column.
    """

    title: str
    verdict: list[str]
    score: str
    ranking: pd.DataFrame
    runs: pd.DataFrame
    tiles: list[tuple[str, str]] = field(default_factory=list)
    facts: Mapping[str, object] = field(default_factory=dict)
    tasks: pd.DataFrame = field(default_factory=_frame)
    profiles: pd.DataFrame = field(default_factory=_frame)
    improvement: pd.DataFrame = field(default_factory=_frame)
    curves: pd.DataFrame = field(default_factory=_frame)
    time_curves: pd.DataFrame = field(default_factory=_frame)
    seconds: float = 0.0
    speed: pd.DataFrame = field(default_factory=_frame)
    tests: pd.DataFrame = field(default_factory=_frame)
    effects: pd.DataFrame = field(default_factory=_frame)
    reference: str = ""
    model: list[str] = field(default_factory=list)
    bitwidths: pd.DataFrame = field(default_factory=_frame)
    fronts: pd.DataFrame = field(default_factory=_frame)
    radius: pd.DataFrame = field(default_factory=_frame)
    notes: list[str] = field(default_factory=list)
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in REQUIRED:
            frame = self.frame(name)
            for column in () if frame.empty else REQUIRED[name]:
                if column not in frame.columns:
                    given = [str(known) for known in frame.columns]
                    raise ArqError(
                        f"The comparison's {name!r} frame has no column {column!r}. {nearest(column, given)}"
                    )

    def frame(self, name: str) -> pd.DataFrame:
        """A frame by name."""
        found: pd.DataFrame = getattr(self, name)
        return found

    @property
    def policies(self) -> list[str]:
        """Names of the policies, best first."""
        return [str(policy) for policy in self.ranking["policy"]]
