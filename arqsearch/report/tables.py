"""The report's tables: frames to rows of text, with certified numbers rounded down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from arqsearch.report.content import ESTIMATE_LABEL, ReportContent, role

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One table cell: its text, and a smaller second line (an interval, a remark)."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table ready to print.

    :param header: column headings.
    :param rows: one list of cells per row, as long as the header.
    :param emphasis: index of the column to stress, or None.
    :param numeric: whether all columns but the first hold numbers.
    """

    header: list[Cell]
    rows: list[list[Cell]]
    emphasis: int | None = None
    numeric: bool = True

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [[_flat(cell) for cell in row] for row in [self.header, *self.rows]]
        rule = ["---", *(["---:" if self.numeric else "---"] * (len(self.header) - 1))]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


@dataclass(frozen=True)
class Verdict:
    """The answer in a few sentences, and the figures that stand above the table."""

    sentences: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str, str]] = field(default_factory=list)


def _flat(cell: Cell) -> str:
    text = f"{cell.text} {cell.small}".strip()
    return text.replace("|", "\\|").replace("\n", " ")


def floor_to(value: float, digits: int) -> str:
    """Print a number rounded down, so that no certified figure is overstated.

    The allowance of 1e-9 keeps exact decimals (0.29 * 100) from losing their last digit to binary fractions.
    """
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def percent(fraction: float) -> str:
    """A fraction in 0..1 as per cent with one decimal, rounded down."""
    return f"{floor_to(100 * fraction, 1)} %"


def quantity(value: float, unit: str = "") -> str:
    """A count with a metric prefix: ``0.670 G``, ``24.1 k``; below 1000 as it is."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def _interval(row: Mapping[str, Any], column: str, scale: float, digits: int) -> str:
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    if low is None or high is None:
        return ""
    top = math.ceil(high * scale * 10**digits - 1e-9) / 10**digits
    return f"{floor_to(low * scale, digits)}–{top:.{digits}f}"


def _share(row: Mapping[str, Any], column: str) -> Cell:
    if column not in row:
        return Cell(DASH)
    return Cell(percent(row[column]), _interval(row, column, 100, 1))


def _radius(row: Mapping[str, Any], column: str) -> Cell:
    return Cell(floor_to(row[column], 3), _interval(row, column, 1, 3)) if column in row else Cell(DASH)


def _plain(row: Mapping[str, Any], column: str) -> Cell:
    return Cell(f"{int(row[column]):,}") if column in row else Cell(DASH)


def _bound(row: Mapping[str, Any], column: str) -> Cell:
    """An upper bound, rounded up to three decimals; certificates only, as estimates promise nothing."""
    if column not in row or row["kind"] == "estimate":
        return Cell(DASH)
    return Cell(f"{math.ceil(row[column] * 1000 - 1e-9) / 1000:g}")


def found_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The searched network's row: the one called "found", else the first that is no baseline."""
    named = [row for row in rows if str(row["name"]).lower().startswith("found")]
    return next(iter(named or [row for row in rows if role(str(row["name"])) == "found"]), None)


def comparison_table(content: ReportContent) -> Table:
    """What each network does and costs: one row per figure, one column per network."""
    rows, columns = content.rows, set(content.comparison.columns)
    lines: list[list[Cell]] = []
    if "clean_accuracy" in columns:
        lines.append([Cell("Clean accuracy"), *(_share(row, "clean_accuracy") for row in rows)])
    for column in content.keyed("certified"):
        label = Cell(f"Certified at r = {column.split('@')[1]}", "smoothed, L2")
        lines.append([label, *(_share(row, column) for row in rows)])
    for column in content.keyed("undecided"):
        label = Cell(f"Undecided at r = {column.split('@')[1]}", "images of right class, not certified")
        lines.append([label, *(_plain(row, column) for row in rows)])
    for column, name in (("acr", "ACR"), ("acr_bound", "ACR, lower bound")):
        if column in columns:
            lines.append([Cell(name, "average certified radius"), *(_radius(row, column) for row in rows)])
    for column in content.keyed("ibp"):
        label = Cell(f"Certified at ε = {column.split('@')[1]}", "interval bounds, L∞, grey levels")
        lines.append([label, *(_share(row, column) for row in rows)])
    if "rule" in columns and {row.get("rule") for row in rows} - {None, "fixed"}:
        lines.append([Cell("Rule"), *(Cell(str(row.get("rule", DASH))) for row in rows)])
        lines.append([Cell("Samples taken", "mean per image"), *(_plain(row, "mean_samples") for row in rows)])
    for column, label in (("n", Cell("n", "noise samples per image")), ("images", Cell("Test images"))):
        if column in columns:
            lines.append([label, *(_plain(row, column) for row in rows)])
    if "expected_wrong" in columns:
        label = Cell("Wrong certificates", "at most, expected over the noise")
        lines.append([label, *(_bound(row, "expected_wrong") for row in rows)])
    header = [Cell(""), *(Cell(str(r["name"]), ESTIMATE_LABEL if r["kind"] == "estimate" else "") for r in rows)]
    return Table(header, lines, _found_column(rows))


def _found_column(rows: list[dict[str, Any]]) -> int | None:
    found = found_row(rows)
    return None if found is None else 1 + [row["name"] for row in rows].index(found["name"])


def cost_table(content: ReportContent) -> Table:
    """BOPs and weight bytes of each network, with the factor to FP32."""
    rows, columns = content.rows, set(content.comparison.columns)
    lines: list[list[Cell]] = []
    if "bops" in columns:
        lines.append([Cell("BOPs", "per image"), *(Cell(quantity(r["bops"]) if "bops" in r else DASH) for r in rows)])
    if "bops_percent" in columns:
        shares = [r.get("bops_percent") for r in rows]
        lines.append([Cell("Share of FP32"), *(Cell(DASH if s is None else f"{s:.4g} %") for s in shares)])
        lines.append([Cell("Fewer by"), *(Cell(f"{100 / s:.1f} ×" if s else DASH) for s in shares)])
    if "weight_bytes" in columns:
        reference = next((r.get("weight_bytes") for r in rows if role(str(r["name"])) == "float"), None)
        cells = []
        for row in rows:
            size = row.get("weight_bytes")
            small = f"{100 * size / reference:.3g} % of FP32" if size is not None and reference else ""
            cells.append(Cell(DASH if size is None else quantity(size, "B"), small))
        lines.append([Cell("Weights", "as packed, with biases"), *cells])
    return Table([Cell(""), *(Cell(str(r["name"])) for r in rows)], lines, _found_column(rows))


def bitwidths_table(content: ReportContent) -> Table:
    """Weight and activation bits of every layer, ``W/A``, with its MACs and weights."""
    names = content.configurations
    header = [Cell("Layer"), Cell("MACs"), Cell("Weights"), *(Cell(name, "W/A bits") for name in names)]
    rows = []
    for record in content.bitwidths.to_dict("records"):
        bits = [Cell(f"{int(record[f'{name}.weight'])}/{int(record[f'{name}.activation'])}") for name in names]
        rows.append([Cell(str(record["layer"])), *(Cell(quantity(record[c])) for c in ("macs", "weights")), *bits])
    found = [index for index, name in enumerate(names) if role(name) == "found"]
    return Table(header, rows, 3 + found[0] if found else None)


def search_table(content: ReportContent) -> Table:
    """One row per policy: evaluations, and the reward and terms of its best candidate."""
    terms = content.term_columns
    header = [Cell("Policy"), Cell("Evaluations"), Cell("Best reward"), Cell("Found at"), *(Cell(t) for t in terms)]
    rows = []
    for policy, part in content.history.groupby("policy", sort=False):
        best = part.iloc[int(part["reward"].to_numpy().argmax())]
        cells = [Cell(str(policy)), Cell(f"{len(part):,}"), Cell(f"{best['reward']:.4f}")]
        rows.append([*cells, Cell(f"{int(best['evaluation']):,}"), *(Cell(f"{best[t]:.4f}") for t in terms)])
    return Table(header, rows)


def generic_table(frame: pd.DataFrame) -> Table:
    """Any frame, numbers to four significant digits and headings without underscores."""
    rows = [[Cell(_value(value)) for value in record] for record in frame.itertuples(index=False)]
    return Table([Cell(str(column).replace("_", " ")) for column in frame.columns], rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if pd.isna(value):
        return DASH
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def verdict(content: ReportContent) -> Verdict:
    """The result in words: cost, the certified figures of the found network, and whether it beats its baselines."""
    rows = content.rows
    found = found_row(rows)
    if found is None:
        return Verdict()
    tiles: list[tuple[str, str, str]] = []
    if "bops_percent" in found:
        tiles.append((f"{found['bops_percent']:.4g} %", "of FP32's bit operations", ""))
    kind = "" if found["kind"] == "certified" else ESTIMATE_LABEL
    for column in [c for c in content.keyed("certified") if c in found][:3]:
        radius = column.split("@")[1]
        tiles.append((percent(found[column]), f"correct and certified at r = {radius}", kind))
    if "acr" in found:
        tiles.append((floor_to(found["acr"], 3), "average certified radius", kind))
    for column in [c for c in content.keyed("ibp") if c in found][:1]:
        tiles.append((percent(found[column]), f"proved by interval bounds at ε = {column.split('@')[1]}", ""))
    return Verdict(_comparisons(content, rows, found), tiles[:6])


def _comparisons(content: ReportContent, rows: list[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """One sentence per quantized baseline: where the found network is ahead, and where the intervals overlap."""
    sentences = []
    metrics = [*content.keyed("certified"), "acr", *content.keyed("ibp")]
    for row in rows:
        if row["name"] == found["name"] or role(str(row["name"])) == "float" or row["kind"] != found["kind"]:
            continue
        groups: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
        separated = []
        for metric in (m for m in metrics if m in found and m in row):
            difference = found[metric] - row[metric]
            place = "level with" if difference == 0 else "ahead of" if difference > 0 else "behind"
            groups[place].append(_metric_name(metric))
            lows, highs = f"{metric}_low", f"{metric}_high"
            if all(c in r for c in (lows, highs) for r in (found, row)):
                separated.append(found[lows] > row[highs] or found[highs] < row[lows])
        filled = {place: _listed(names) for place, names in groups.items() if names}
        if not filled:
            continue
        if len(filled) == 1 and sum(map(len, groups.values())) > 1:
            filled = dict.fromkeys(filled, "every certified figure" if found["kind"] == "certified" else "every figure")
        parts = [f"{place} {row['name']} on {names}" for place, names in filled.items()]
        sentence = f"{found['name']} is {'; '.join(parts)}."
        if separated and not any(separated):
            sentence += " The intervals overlap throughout, so these images alone do not settle the difference."
        elif separated and not all(separated):
            sentence += " Some of the intervals overlap; the table shows which."
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def _metric_name(metric: str) -> str:
    prefix, _, at = metric.partition("@")
    if prefix == "acr":
        return "ACR"
    return f"accuracy at r = {at}" if prefix == "certified" else f"interval bounds at ε = {at}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
