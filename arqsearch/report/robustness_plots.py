"""Pictures of robustness to bounded changes: certified accuracy over ε, and counter-examples."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from arqsearch.report.content import ReportContent
from arqsearch.report.plots import INK, _line_style
from arqsearch.report.plots import make as make


def draw_accuracy(content: ReportContent, narrow: bool) -> Figure:
    """Certified accuracy with its interval at every ε, one line for each network."""
    figure = Figure(figsize=(3.6, 2.8) if narrow else (7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    frame = content.robustness
    names = list(dict.fromkeys(map(str, frame["network"])))
    for name, (colour, dashes, width) in _line_style(names).items():
        rows = frame[frame["network"] == name].sort_values("epsilon")
        value = rows["certified_accuracy"].to_numpy(float)
        ends = np.maximum(np.stack([value - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - value]), 0)
        axes.errorbar(
            rows["epsilon"], value, ends, color=colour, linestyle=dashes, linewidth=width, marker="o", markersize=3.5,
            capsize=3, label=name,
        )  # fmt: skip
    axes.set_xlabel("ε in grey levels (L∞)")
    axes.set_ylabel("certified accuracy")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True)
    axes.legend()
    return figure


def draw_broken(content: ReportContent, narrow: bool) -> Figure:
    """One column for each counter-example: original, changed, difference."""
    shown = list(content.broken)[: 3 if narrow else 6]
    columns = max(len(shown), 3 if narrow else 5)  # A single one need not fill the page.
    size = (3.6 if narrow else 7.2) / columns
    figure = Figure(figsize=(size * columns, 3 * size + 0.5), layout="constrained")
    grid = figure.subplots(3, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for column, found in zip(grid.T, shown, strict=False):
        by = found.changed.astype(np.int16) - found.image
        reach = max(1, int(np.abs(by).max()))
        pictures = (found.image, found.changed, np.round(127.5 + 127.5 * by / reach).astype(np.uint8))
        for axes, pixels in zip(column, pictures, strict=True):
            axes.imshow(_rgb(pixels), interpolation="nearest")
        column[0].set_title(found.caption, fontsize=6.5 if narrow else 8, color=INK)
    return figure


def _rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
