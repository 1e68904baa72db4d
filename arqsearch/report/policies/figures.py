"""The comparison's plots as Plotly figures (traces and layout as plain data); colours come from the page's script."""

from __future__ import annotations

from typing import Any

import pandas as pd

from arqsearch.report.policies.content import ComparisonContent

Figure = dict[str, Any]
#: Legible on white and on the dark page, and told apart by the most common colour blindnesses; dashes help further.
COLOURS = ("#0d8a74", "#b4479a", "#3a75c4", "#c5831c", "#c44d3c", "#6d5fc7", "#5f8f2f", "#2f9fb8", "#9a6b3d", "#7d8794",
           "#d4679a", "#557a46", "#8a5fd0", "#b08900")  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
EXACT = "exact front of the table"


def looks(policies: list[str]) -> dict[str, dict[str, str]]:
    """Colour and dashes of each policy, the same in every plot."""
    names = sorted(policies)
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[(index // 3) % len(DASHES)]}
        for index, name in enumerate(names)
    }


def _figure(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    axes: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for key, value in layout.items():
        axes[key] = {**axes.get(key, {}), **value} if isinstance(value, dict) else value
    return {"data": traces, "layout": axes}


def _rounded(values: pd.Series) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def ranking(content: ComparisonContent) -> Figure:
    """Interquartile means with their intervals, one line a policy, the best on top."""
    style = looks(content.policies)
    traces = []
    for row in content.ranking.to_dict("records"):
        name = str(row["policy"])
        traces.append({
            "type": "scatter", "mode": "markers", "x": [row["iqm"]], "y": [name], "name": name, "showlegend": False,
            "marker": {"color": style[name]["color"], "size": 10},
            "error_x": {"type": "data", "symmetric": False, "array": [row["high"] - row["iqm"]],
                        "arrayminus": [row["iqm"] - row["low"]], "color": style[name]["color"], "thickness": 2},
            "hovertemplate": f"<b>{name}</b><br>{row['iqm']:.4f} ({row['low']:.4f}–{row['high']:.4f})<extra></extra>",
        })  # fmt: skip
    order = content.policies[::-1]
    height = 90 + 30 * len(order)
    yaxis = {"categoryorder": "array", "categoryarray": order, "automargin": True, "ticksuffix": "  "}
    return _figure(traces, "interquartile mean of the score", "", height=height, yaxis=yaxis)


def _lines(frame: pd.DataFrame, policies: list[str], x: str, y: str, step: bool) -> list[dict[str, Any]]:
    """A line and its band for each policy; one entry of the legend switches both."""
    style = looks(policies)
    traces: list[dict[str, Any]] = []
    shape = "hv" if step else "linear"
    for name in policies:
        part = frame[frame["policy"] == name]
        if part.empty:
            continue
        at, colour = _rounded(part[x]), style[name]["color"]
        edges = [(part["low"], "none"), (part["high"], "tonexty")]
        for values, fill in edges:
            traces.append({
                "type": "scatter", "mode": "lines", "x": at, "y": _rounded(values), "legendgroup": name,
                "showlegend": False, "hoverinfo": "skip", "line": {"width": 0, "shape": shape, "color": colour},
                "fill": fill, "fillcolor": f"{colour}1f",
            })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "lines", "x": at, "y": _rounded(part[y]), "name": name, "legendgroup": name,
            "line": {"width": 2.2, "shape": shape, **style[name]},
            "customdata": [[float(f"{lo:.4g}"), float(f"{hi:.4g}")]
                           for lo, hi in zip(part["low"], part["high"], strict=True)],
            "hovertemplate": "%{y:.4f} (%{customdata[0]}–%{customdata[1]})",
        })  # fmt: skip
    return traces


def _range(frame: pd.DataFrame, x: str) -> list[float]:
    """Scores worth showing: the first tenth of a search is far below the rest."""
    late = frame[frame[x] >= frame[x].max() / 10]
    low, high = float(late["low"].min()), float(frame["high"].max())
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)] if high > low else [low - 1, high + 1]


def curves(content: ComparisonContent) -> Figure:
    """Best score so far over evaluations."""
    traces = _lines(content.curves, content.policies, "evaluation", "value", step=True)
    return _figure(traces, "evaluations", "best score so far", hovermode="x unified",
                   yaxis={"range": _range(content.curves, "evaluation")})  # fmt: skip


def time_curves(content: ComparisonContent) -> Figure:
    """Best score so far over seconds, on a logarithmic axis, with the budget of the second view."""
    traces = _lines(content.time_curves, content.policies, "seconds", "value", step=True)
    shapes = [{"type": "line", "x0": content.seconds, "x1": content.seconds, "yref": "paper", "y0": 0, "y1": 1,
               "line": {"width": 1, "dash": "dot", "color": "#8a93a0"}}]  # fmt: skip
    return _figure(traces, "seconds (logarithmic)", "best score so far", shapes=shapes,
                   hovermode="x unified", xaxis={"type": "log"})  # fmt: skip


def profiles(content: ComparisonContent) -> Figure:
    """Share of runs above each score."""
    traces = _lines(content.profiles, content.policies, "threshold", "share", step=False)
    return _figure(traces, "score τ", "share of runs with a score above τ", hovermode="x unified",
                   yaxis={"range": [0, 1.02], "tickformat": ".0%"})  # fmt: skip


def fronts(content: ComparisonContent, task: str) -> Figure:
    """Non-dominated points of one task: few bit operations and a large reward, to the upper left."""
    style = looks(content.policies)
    traces: list[dict[str, Any]] = []
    part = content.fronts[content.fronts["task"] == task]
    for name in [*content.policies, EXACT]:
        points = part[part["policy"] == name].sort_values("bops")
        if points.empty:
            continue
        look: dict[str, str] = style.get(name, {"color": "#8a93a0", "dash": "dot"})
        traces.append({
            "type": "scatter", "mode": "lines" if name == EXACT else "lines+markers", "x": _rounded(points["bops"]),
            "y": _rounded(points["reward"]), "name": name, "line": {"shape": "hv", "width": 1.6, **look},
            "marker": {"size": 6, "color": look["color"]}, "hovertemplate": "%{x:.4s} BOPs, reward %{y:.4f}",
        })  # fmt: skip
    return _figure(traces, "bit operations of an image", "reward", hovermode="closest")


def radius(content: ComparisonContent) -> Figure:
    """Certified accuracy over the radius."""
    names = list(dict.fromkeys(str(name) for name in content.radius["network"]))
    style = looks(names)
    traces: list[dict[str, Any]] = []
    for name in names:
        part = content.radius[content.radius["network"] == name].sort_values("radius")
        traces.append({
            "type": "scatter", "mode": "lines", "x": _rounded(part["radius"]), "y": _rounded(part["accuracy"]),
            "name": name, "line": {"shape": "vh", "width": 2.2, **style[name]}, "hovertemplate": "%{y:.1%}",
        })  # fmt: skip
    return _figure(traces, "L2 radius r, in units of [0,1] pixels", "images correct and certified",
                   hovermode="x unified", yaxis={"tickformat": ".0%", "rangemode": "tozero"})  # fmt: skip
