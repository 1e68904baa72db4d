"""The trade-off between cost and robustness: a picture and a table of the points that no other one dominates."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from arqsearch.report.content import ESTIMATE_LABEL, ReportContent
from arqsearch.report.plots import GRID
from arqsearch.report.tables import DASH, Cell, Table, floor_to

#: Certified points; estimates are hollow and grey.
CERTIFIED_COLOUR = "#0d8a74"


def draw_front(content: ReportContent, narrow: bool) -> Figure:
    """Cost against robustness: hollow dots are estimates of the search, filled ones certified; bars are intervals."""
    figure = Figure(figsize=(3.9, 3.9) if narrow else (9.6, 4.0), layout="constrained")
    axes = figure.subplots()
    frame = content.front
    on_front = frame[frame["estimate"].notna()].sort_values("cost")
    if len(on_front):
        _points(axes, on_front, "estimate", GRID, f"front of the search ({ESTIMATE_LABEL})", hollow=True)
    certified = frame[frame["certified"].notna()].sort_values("cost") if "certified" in frame else frame[:0]
    if len(certified):
        _points(axes, certified, "certified", CERTIFIED_COLOUR, "certified on test images", hollow=False)
        for _, row in certified.iterrows():
            at = (row["cost"], row["certified"])
            axes.annotate(str(row["network"]), at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(content.front_labels[0])
    axes.set_ylabel(content.front_labels[1])
    if _is_share(content):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True)
    figure.legend(loc="outside lower left", fontsize=8.5)
    return figure


def front_table(content: ReportContent) -> Table:
    """One row for each point, the cheapest first; certified figures are rounded down."""
    rows = []
    for _, row in content.front.sort_values("cost").iterrows():
        rows.append(
            [
                Cell(str(row["network"]) or DASH),
                Cell(f"{row['cost']:,.4g}" if row["cost"] != int(row["cost"]) else f"{int(row['cost']):,}"),
                _figure(row, "estimate", _is_share(content)),
                _figure(row, "certified", _is_share(content)),
            ]
        )
    cost, measure = content.front_labels
    header = [Cell("network"), Cell(cost), Cell(measure, ESTIMATE_LABEL), Cell(measure, "certified")]
    return Table(header, rows)


def _is_share(content: ReportContent) -> bool:
    return "@" in content.front_labels[1]


def _points(axes: Axes, part: pd.DataFrame, column: str, colour: str, label: str, *, hollow: bool) -> None:
    errors = None
    if part[f"{column}_low"].notna().all():
        errors = [part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]]
    axes.errorbar(
        part["cost"], part[column], yerr=errors, fmt="o", color=colour, label=label, capsize=2, linewidth=1.2,
        markersize=5, markerfacecolor="none" if hollow else colour,
    )  # fmt: skip


def _figure(row: Any, column: str, share: bool) -> Cell:
    if pd.isna(row.get(column)):
        return Cell(DASH)
    scale, digits, unit = (100.0, 1, "%") if share else (1.0, 3, "")
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    between = "" if pd.isna(low) else f"{floor_to(scale * low, digits)} to {scale * high:.{digits}f}"
    return Cell(floor_to(scale * row[column], digits) + unit, between)
