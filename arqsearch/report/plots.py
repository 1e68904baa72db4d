"""The report's pictures, drawn by matplotlib without global state, wide for screens and narrow for phones."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from arqsearch.report.content import ESTIMATE_LABEL, ReportContent, role

# Lines and text are drawn in this ink; in the page's SVG it becomes the page's own text colour.
INK = "#1d2126"
GRID = "#8a93a0"
#: Shades of 2..8 bits, light to dark; the digits inside stay legible on each.
BIT_SHADES = {2: "#e3f1ec", 3: "#c3e3d9", 4: "#98cfc0", 5: "#68b5a5", 6: "#3f9689", 7: "#22766d", 8: "#0f5450"}
_STYLE = {
    "float": ("#7d8794", (0, (6, 2, 1, 2))),
    "uniform": ("#3a75c4", (0, (5, 2))),
    "random": ("#c5831c", (0, (1.5, 1.5))),
}
_FOUND_COLOURS = ("#0d8a74", "#b4479a", "#c44d3c", "#6d5fc7", "#5f8f2f", "#9a6b3d")
#: Above this many points a cloud is embedded as pixels, not as thousands of SVG elements.
_VECTOR_POINTS = 3000

_RC: Any = {
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "grid.alpha": 0.25,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "arqsearch",
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
}

Draw = Callable[[ReportContent, bool], Figure]


@dataclass(frozen=True)
class Picture:
    """One picture in its three forms.

    :param name: file name stem, also the prefix of ids in the SVG.
    :param alt: what the picture shows, in words.
    :param wide: inline SVG for screens and print.
    :param narrow: inline SVG for phones.
    :param png: the wide form for Markdown.
    """

    name: str
    alt: str
    wide: str
    narrow: str
    png: bytes


def make(name: str, alt: str, draw: Draw, content: ReportContent) -> Picture:
    """Draw one picture in all its forms."""
    with matplotlib.rc_context(_RC):
        wide, narrow = draw(content, False), draw(content, True)
        png = io.BytesIO()
        wide.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        return Picture(name, alt, _svg(wide, f"{name}-w", alt), _svg(narrow, f"{name}-n", alt), png.getvalue())


def _svg(figure: Figure, prefix: str, alt: str) -> str:
    """The figure as an SVG element to put into HTML: own ids, no metadata, the page's text colour and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    text = text.replace(INK, "currentColor")
    # Units and fixed size go, so that the picture takes the width of its column.
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{label}">{rest}'.strip()


def _line_style(names: list[str]) -> dict[str, tuple[str, Any, float]]:
    """Colour, dashes and width of each named network or policy; searched ones are solid."""
    styles: dict[str, tuple[str, Any, float]] = {}
    searched = 0
    for name in names:
        part = role(name)
        if part in _STYLE:
            styles[name] = (*_STYLE[part], 1.6)
        else:
            styles[name] = (_FOUND_COLOURS[searched % len(_FOUND_COLOURS)], "solid", 2.2)
            searched += 1
    return styles


def _unique(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))


def draw_bitwidths(content: ReportContent, narrow: bool) -> Figure:
    """A strip per configuration, one cell per layer and kind, shaded by its bits, beside each layer's share of MACs."""
    frame, names = content.bitwidths, content.configurations
    layers = [str(layer) for layer in frame["layer"]]
    share = 100 * frame["macs"].to_numpy(float) / max(1.0, float(frame["macs"].sum()))
    grid = np.array([frame[f"{name}.{kind}"].to_numpy(int) for name in names for kind in ("weight", "activation")])
    labels = [f"{name} {kind}" for name in names for kind in ("W", "A")]
    figure = Figure(layout="constrained")
    if narrow:
        figure.set_size_inches(3.9, 1.3 + 0.2 * len(layers))
        cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=[2.4, 1])
        _cells(cells, grid.T)
        cells.set_yticks(range(len(layers)), [_short(layer) for layer in layers], fontsize=8)
        cells.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        cells.xaxis.tick_top()
        bars.barh(range(len(layers)), share, color=GRID, height=0.7)
        bars.set_xlabel("% of MACs")
    else:
        figure.set_size_inches(9.6, 2.3 + 0.28 * len(labels))
        bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.34 * len(labels)])
        _cells(cells, grid)
        cells.set_yticks(range(len(labels)), labels)
        step = max(1, -(-len(layers) // 48))
        cells.set_xticks(range(0, len(layers), step), layers[::step], rotation=90, fontsize=8)
        bars.bar(range(len(layers)), share, color=GRID, width=0.7)
        bars.set_ylabel("% of MACs")
        bars.tick_params(bottom=False)
    for axes in (bars, cells):
        axes.tick_params(length=0)
    for edge in ("left", "bottom"):
        cells.spines[edge].set_visible(False)
    bars.yaxis.set_major_locator(MaxNLocator(3)) if not narrow else bars.xaxis.set_major_locator(MaxNLocator(3))
    return figure


def _short(layer: str, limit: int = 20) -> str:
    return layer if len(layer) <= limit else "…" + layer[-limit + 1 :]


def _cells(axes: Axes, grid: NDArray[Any]) -> None:
    """Shaded cells with their bits inside; digits are left out when cells are too small for them."""
    rows, columns = grid.shape
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    for row in range(rows):
        for column in range(columns):
            bits = int(grid[row, column])
            shade = BIT_SHADES.get(bits, GRID)
            axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, color=shade, lw=0))
            if columns <= 60:
                ink = "#10302c" if bits <= 5 else "#ffffff"
                axes.text(column, row, str(bits), ha="center", va="center", color=ink, fontsize=8)


def draw_curves(content: ReportContent, narrow: bool) -> Figure:
    """Certified accuracy over the radius, one line per network; estimates are dashed and named so."""
    figure = Figure(figsize=(3.9, 3.9) if narrow else (9.6, 4.0), layout="constrained")
    axes = figure.subplots()
    networks = _unique(content.curves["network"])
    styles = _line_style(networks)
    for name in networks:
        part = content.curves[content.curves["network"].astype(str) == name].sort_values("radius")
        colour, dashes, width = styles[name]
        label = f"{name} ({ESTIMATE_LABEL})" if name in content.estimates else name
        axes.plot(
            part["radius"],
            part["accuracy"],
            color=colour,
            linestyle=dashes,
            linewidth=width,
            label=label,
            drawstyle="steps-pre",
        )
    axes.set_xlabel("L2 radius r, in units of [0,1] pixels")
    axes.set_ylabel("images correct and certified")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, None)
    axes.set_xlim(0, float(content.curves["radius"].max()) * 1.02 or 1.0)
    axes.grid(True)
    if narrow:
        figure.legend(loc="outside lower left", fontsize=8.5)
    else:
        axes.legend(loc="upper right")
    return figure


def draw_history(content: ReportContent, narrow: bool) -> Figure:
    """Reward and each term over the evaluations: dots are candidates, lines the best candidate by reward so far."""
    terms = content.term_columns
    panels = ["reward", *terms]
    if narrow:
        figure = Figure(figsize=(3.9, 0.7 + 2.3 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False).ravel()
    else:
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(9.6, 0.5 + 2.9 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
    history = content.history
    policies = _unique(history["policy"])
    styles = _line_style(policies)
    for axes, column in zip(grid, panels, strict=False):
        for name in policies:
            part = history[history["policy"].astype(str) == name].sort_values("evaluation")
            colour, dashes, width = styles[name]
            at = part["evaluation"].to_numpy()
            values, reward = part[column].to_numpy(float), part["reward"].to_numpy(float)
            axes.plot(at, values, ".", color=colour, alpha=0.4, markersize=4, rasterized=len(history) > _VECTOR_POINTS)
            line = part["best_so_far"].to_numpy(float) if column == "reward" else values[_best_index(reward)]
            label = name if column == "reward" else None
            style = dashes if len(part) > 1 else "none"
            mark = None if len(part) > 1 else "D"
            look = {"color": colour, "linestyle": style, "marker": mark, "linewidth": width}
            axes.plot(at, line, drawstyle="steps-post", label=label, **look)
        axes.set_title(content.reward_label if column == "reward" else f"term: {column}")
        axes.set_xlabel("evaluation")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(True)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.legend(loc="outside lower left", ncols=2 if narrow else 6, fontsize=9)
    return figure


def _best_index(reward: NDArray[Any]) -> NDArray[Any]:
    """For each position, the index of the largest reward up to it (the first of equals)."""
    best = np.maximum.accumulate(reward)
    fresh = np.r_[True, best[1:] > best[:-1]]
    return np.maximum.accumulate(np.where(fresh, np.arange(len(reward)), 0))
