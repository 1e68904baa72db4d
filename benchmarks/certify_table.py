"""The tables and the picture of docs/benchmarks.md that show what certificates cost, from the CSV files of
``arqsearch bench certify-speed``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arqsearch.benchmarks.speed_table import Row

#: Names under which the rows of one run, and of its growth, are kept.
RECIPE, GROWTH = "certify-speed", "certify-speed-growth"
_RULES = {
    "cohen (rate)": "Cohen's protocol, PyTorch fp32 (rate × samples)",
    "art (rate)": "Adversarial Robustness Toolbox (rate × samples)",
    "fixed (rate)": "`fixed`, integer program (rate × samples)",
    "sequential": "`sequential`, cap 100,000",
    "sequential10k": "`sequential`, cap 10,000",
}


def cost_table(rows: Sequence[Row]) -> str:
    """Seconds for all images by each way, how many times as fast as the published protocol, and what stays open."""
    from arqsearch.report.tables import Cell, Table

    (row,) = rows
    images, seconds = int(row["images"]), json.loads(row["seconds"])
    certified = json.loads(row.get("certified_at_sigma", "{}"))
    samples = {
        "sequential": row["sequential_samples_per_image"],
        "sequential10k": row["sequential10k_samples_per_image"],
    }
    open_ = {"sequential": row["undecided100k"], "sequential10k": row["undecided10k"]}
    lines = []
    for name, title in _RULES.items():
        if name not in seconds:
            continue
        ratio, rule = seconds["cohen (rate)"] / seconds[name], name.removesuffix(" (rate)")
        cells = [
            title, f"{seconds[name]:,.1f}", f"{ratio:,.1f}×", f"{float(samples.get(name, '100100')):,.0f}",
            str(certified.get(rule, "–")), f"{float(open_[name]):.1%}" if name in open_ else "–",
        ]  # fmt: skip
        lines.append([Cell(cell) for cell in cells])
    header = ["", "seconds", "times as fast", "samples an image", "certified at σ", "undecided"]
    caption = (
        f"Time to decide r = σ = {float(row['sigma']):g} for {images} test images of CIFAR-10 (JPEG copy) at α = "
        f"{float(row['alpha']):g}, one thread, on `{row['hardware']}`; base `{row['base']}`, integer program W8A8."
    )
    note = (
        f"Images that `sequential` refutes and `fixed` certifies, or the reverse: {row['fixed_contradictions']} "
        f"(at most {float(row['fixed_expected_errors']):g} expected from the two rules' errors)."
        if "fixed_contradictions" in row
        else ""
    )
    return "\n\n".join(
        part for part in (caption, Table([Cell(name) for name in header], lines).markdown(), note) if part
    )


def growth_table(rows: Sequence[Row]) -> str:
    """Mean samples and time of an image over the asked radius, and the picture of the same."""
    from arqsearch.report.tables import Cell, Table

    header = ["σ", "rule", "r / σ", "n or cap", "mean samples", "median", "ms an image", "undecided"]
    lines = []
    for row in rows:
        share, milliseconds = row.get("radius_in_sigma"), 1000 * float(row["seconds_per_image"])
        cells = [
            f"{float(row['sigma']):g}", f"`{row['rule']}`", f"{float(share):g}" if share else "any",
            f"{int(row['n_or_cap']):,}", f"{float(row['samples_mean']):,.0f}", f"{float(row['samples_median']):,.0f}",
            f"{milliseconds:,.1f}", f"{float(row['undecided']):.1%}" if row["rule"] == "sequential" else "–",
        ]  # fmt: skip
        lines.append([Cell(cell) for cell in cells])
    table = Table([Cell(name) for name in header], lines).markdown()
    picture = f"![Milliseconds an image over the radius and over the number of samples](pictures/{picture_name(rows)})"
    return f"What one image costs, on `{rows[0]['hardware']}`.\n\n{picture}\n\n{table}"


def picture_name(rows: Sequence[Row]) -> str:
    """File name of the picture of one machine's growth rows."""
    return f"{RECIPE}-{rows[0]['hardware']}.svg"


def draw_growth(rows: Sequence[Row], path: Path) -> bool:
    """Draw cost over radius (left) and over n or cap (right), for every σ.

    :param rows: of one machine.
    :param path: SVG file; its folder is made.
    :returns: whether the file changed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.hashsalt": "arqsearch", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = ("#0d8a74", "#3a75c4", "#c5831c")
        for colour, sigma in zip(colours, sorted({float(row["sigma"]) for row in rows}), strict=False):
            own = [row for row in rows if float(row["sigma"]) == sigma]
            for cap, style in ((100_000, "-"), (10_000, "--")):
                line = [r for r in own if r["rule"] == "sequential" and int(r["n_or_cap"]) == cap]
                left.plot(
                    [float(r["radius_in_sigma"]) for r in line], [1000 * float(r["seconds_per_image"]) for r in line],
                    style, color=colour, marker="o", markersize=3, label=f"sequential, cap {cap:,}, σ = {sigma:g}",
                )  # fmt: skip
            fixed = [r for r in own if r["rule"] == "fixed"]
            left.axhline(
                1000 * float(fixed[-1]["seconds_per_image"]), color=colour, linestyle=":", linewidth=1.2,
                label=f"fixed, n = {int(fixed[-1]['n_or_cap']):,}, σ = {sigma:g}",
            )  # fmt: skip
            sizes = [int(r["n_or_cap"]) for r in fixed]
            right.plot(
                sizes, [1000 * float(r["seconds_per_image"]) for r in fixed], ":", color=colour, marker="s",
                markersize=3, label=f"fixed, σ = {sigma:g}",
            )  # fmt: skip
            at_sigma = [r for r in own if r["rule"] == "sequential" and float(r["radius_in_sigma"]) == 1.0]
            at_sigma.sort(key=lambda r: int(r["n_or_cap"]))
            right.plot(
                [int(r["n_or_cap"]) for r in at_sigma], [1000 * float(r["seconds_per_image"]) for r in at_sigma], "-",
                color=colour, marker="o", markersize=3, label=f"sequential at r = σ = {sigma:g}",
            )  # fmt: skip
        left.set(xlabel="asked radius r / σ", ylabel="milliseconds an image", yscale="log")
        right.set(xlabel="n (fixed) or cap (sequential)", xscale="log", yscale="log")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.is_file() else b""
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path.read_bytes() != before
