"""`ReportContent`: everything a report says, as plain frames, checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from arqsearch.errors import ArqError, nearest

#: What a row of the comparison is: a certificate with its confidence, or a plain estimate.
KINDS = ("certified", "estimate")
#: How an estimate is called wherever it is printed.
ESTIMATE_LABEL = "estimate, not certified"

_REQUIRED: dict[str, tuple[str, ...]] = {
    "bitwidths": ("layer", "macs", "weights"),
    "comparison": ("name", "kind"),
    "curves": ("network", "radius", "accuracy"),
    "history": ("policy", "evaluation", "reward", "best_so_far"),
    "terms": ("term",),
    "front": ("network", "cost", "estimate", "estimate_low", "estimate_high"),
    "robustness": ("network", "epsilon", "images", "certified_accuracy", "low", "high"),
}
#: Columns of the history that are not reward terms.
_NOT_TERMS = {
    *_REQUIRED["history"],
    "bops",
    "bops_percent",
    "weight_bytes",
    "weight_bytes_percent",
    "bitwidths",
    "seed",
    "seconds",
    "hash",
    "program_hash",
}
_DEFAULT_COMMANDS = {
    "search": "arqsearch search {run}",
    "certify": "arqsearch certify {run}",
    "verify": "arqsearch verify {run}",
    "report": "arqsearch report {run}",
    "robustness": "arqsearch verify-robustness {run} --eps 1,2,4",
}


def _frame() -> pd.DataFrame:
    return pd.DataFrame()


@dataclass(frozen=True)
class Broken:
    """One counter-example.

    :param caption: image, ε, classes.
    :param image: uint8 ``(H, W, C)``.
    :param changed: the same shape; has another class.
    """

    caption: str
    image: NDArray[np.uint8]
    changed: NDArray[np.uint8]


@dataclass(frozen=True)
class ReportContent:
    """The frames and facts of one run; an empty frame means "not made yet" and is reported as such.

    Accuracies are fractions in 0..1. Radii are L2 in the unit of [0,1] pixels, ``eps`` is L∞ in grey levels.

    :param title: heading of the report.
    :param summary: headline facts, label to value: data set (with remarks such as "JPEG copy"), model, σ, budget,
        evaluations; entries whose label names a hash or an identity are shown under provenance.
    :param bitwidths: one row per layer: ``layer``, ``macs``, ``weights``, and for each configuration
        ``<configuration>.weight`` and ``<configuration>.activation``.
    :param comparison: one row per network: ``name``, ``kind`` (``"certified"`` or ``"estimate"``), and any of
        ``clean_accuracy``, ``certified@<r>``, ``ibp@<eps>``, ``acr`` (each with optional ``_low`` and ``_high``), ``n``
        (samples per image), ``images``, ``bops``, ``bops_percent`` (of FP32), ``weight_bytes``.
    :param curves: certified accuracy over the radius: ``network``, ``radius``, ``accuracy``.
    :param history: one row per evaluation: ``policy``, ``evaluation`` (from 1), ``reward``, ``best_so_far``, one column
        per reward term, and costs such as ``bops``.
    :param terms: one row per reward term (``term``) and its spread over random configurations.
    :param front: the trade-off, one row per point: ``network`` ("" where it was not certified), ``cost``, ``estimate``
        and, where it was certified, ``certified``, each with ``_low`` and ``_high`` (empty where unknown).
    :param front_labels: what ``cost`` and the robustness of `front` are.
    :param requirement: the verdict on a floor that the run was to meet, in words.
    :param reward_label: what the reward is.
    :param robustness: verdicts by network and ε (L∞): ``network``, ``epsilon``, ``images``, ``certified_accuracy``,
        ``low``, ``high``, and counts.
    :param broken: a few counter-examples.
    :param guarantee: what is guaranteed, and what is not, in plain English.
    :param notes: remarks on how the numbers were made.
    :param provenance: further hashes and identities, label to value.
    :param commands: how to make or check a part (``search``, ``certify``, ``verify``, ``report``, ``robustness``);
        ``{run}`` stands for the run folder.
    :param interval_label: what the ``_low`` and ``_high`` columns are.
    :raises ArqError: when a frame lacks a required column, or a kind is unknown.
    """

    title: str
    summary: Mapping[str, object] = field(default_factory=dict)
    bitwidths: pd.DataFrame = field(default_factory=_frame)
    comparison: pd.DataFrame = field(default_factory=_frame)
    curves: pd.DataFrame = field(default_factory=_frame)
    history: pd.DataFrame = field(default_factory=_frame)
    terms: pd.DataFrame = field(default_factory=_frame)
    front: pd.DataFrame = field(default_factory=_frame)
    front_labels: tuple[str, str] = ("cost", "robustness")
    robustness: pd.DataFrame = field(default_factory=_frame)
    broken: Sequence[Broken] = ()
    requirement: str = ""
    reward_label: str = "reward (difference from W8A8)"
    guarantee: str = ""
    notes: list[str] = field(default_factory=list)
    provenance: Mapping[str, object] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    interval_label: str = "95 % interval over the test images"

    def __post_init__(self) -> None:
        for name, required in _REQUIRED.items():
            frame: pd.DataFrame = getattr(self, name)
            for column in () if frame.empty else required:
                if column not in frame.columns:
                    given = [str(given) for given in frame.columns]
                    raise ArqError(f"The report's {name!r} frame has no column {column!r}. {nearest(column, given)}")
        for kind in [] if self.comparison.empty else self.comparison["kind"]:
            if kind not in KINDS:
                raise ArqError(f"The report's comparison has a row of kind {kind!r}. {nearest(str(kind), KINDS)}")
        for name in self.commands:
            if name not in _DEFAULT_COMMANDS:
                raise ArqError(f"The report has no command {name!r}. {nearest(name, _DEFAULT_COMMANDS)}")

    def command(self, name: str, run: str) -> str:
        """The shell command that makes or checks a part, for the run folder `run`."""
        return {**_DEFAULT_COMMANDS, **self.commands}[name].replace("{run}", run)

    @property
    def configurations(self) -> list[str]:
        """Names of the configurations in the bit-width frame, in column order."""
        ends = ".weight"
        names = [str(column)[: -len(ends)] for column in self.bitwidths.columns if str(column).endswith(ends)]
        return [name for name in names if f"{name}.activation" in self.bitwidths.columns]

    @property
    def term_columns(self) -> list[str]:
        """Reward terms that the history records, in column order."""
        numeric = self.history.select_dtypes("number").columns
        return [str(column) for column in numeric if str(column) not in _NOT_TERMS]

    @property
    def estimates(self) -> set[str]:
        """Names of the networks whose numbers are estimates."""
        if self.comparison.empty:
            return set()
        return {str(row["name"]) for row in self.rows if row["kind"] == "estimate"}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the comparison as dictionaries, absent values left out."""
        records = self.comparison.to_dict("records")
        return [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in records]

    def keyed(self, prefix: str) -> list[str]:
        """The comparison's columns ``<prefix>@<number>``, by rising number."""
        found = [str(c) for c in self.comparison.columns if re.fullmatch(rf"{re.escape(prefix)}@[0-9.]+", str(c))]
        return sorted(found, key=lambda column: float(column.split("@")[1]))


def role(name: str) -> str:
    """The part a network or policy plays, from its name: float, uniform, random, or found (any searched one)."""
    lowered = name.lower()
    if re.match(r"(fp|float|full)[-_ ]?(32|precision)?\b", lowered) or lowered.startswith("fp32"):
        return "float"
    for known in ("uniform", "random"):
        if lowered.startswith(known):
            return known
    return "found"
