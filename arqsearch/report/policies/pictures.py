"""The Markdown's pictures of the main plots, drawn by matplotlib in the look of the run report."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arqsearch.report.plots import _RC as RC
from arqsearch.report.policies.content import ComparisonContent
from arqsearch.report.policies.figures import looks

_DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _lines(axes: Axes, content: ComparisonContent, frame: pd.DataFrame, x: str, y: str, step: bool) -> None:
    style = looks(content.policies)
    for name in content.policies:
        part = frame[frame["policy"] == name]
        if part.empty:
            continue
        colour, dash = style[name]["color"], _DASHES[style[name]["dash"]]
        how = "steps-post" if step else "default"
        axes.plot(part[x], part[y], color=colour, linestyle=dash, label=name, linewidth=1.8, drawstyle=how)
        axes.fill_between(
            part[x], part["low"], part["high"], color=colour, alpha=0.14, linewidth=0, step="post" if step else None
        )
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def ranking(content: ComparisonContent) -> bytes:
    """Interquartile means with intervals."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, 0.9 + 0.3 * len(content.policies)), layout="constrained")
        axes, style = figure.subplots(), looks(content.policies)
        for place, row in enumerate(content.ranking.to_dict("records")):
            colour = style[str(row["policy"])]["color"]
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            axes.plot(row["iqm"], place, "o", color=colour)
        axes.set_yticks(range(len(content.policies)), content.policies)
        axes.invert_yaxis()
        axes.set_xlabel("interquartile mean of the score, 95 % interval")
        axes.grid(True, axis="x")
        return _png(figure)


def curves(content: ComparisonContent) -> bytes:
    """Best score so far over evaluations."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        axes = figure.subplots()
        _lines(axes, content, content.curves, "evaluation", "value", step=True)
        axes.set_xlabel("evaluations")
        axes.set_ylabel("best score so far")
        return _png(figure)


def profiles(content: ComparisonContent) -> bytes:
    """Share of runs above each score."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        axes = figure.subplots()
        _lines(axes, content, content.profiles, "threshold", "share", step=False)
        axes.set_xlabel("score τ")
        axes.set_ylabel("share of runs above τ")
        return _png(figure)


DRAW: dict[str, Callable[[ComparisonContent], bytes]] = {"ranking": ranking, "curves": curves, "profiles": profiles}
