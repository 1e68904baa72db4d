"""The comparison's tables: frames to cells that the page can sort and Markdown can show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from arqsearch.report.policies.content import ComparisonContent
from arqsearch.report.tables import DASH


@dataclass(frozen=True)
class SortCell:
    """One cell.

    :param text: what is shown.
    :param key: what it is sorted by; None sorts by the text.
    :param small: a second, smaller line.
    :param shade: 0..1 colours the cell from the one end to the other, None leaves it plain.
    :param bits: 2..8 colours it as so many bits.
    """

    text: str
    key: float | None = None
    small: str = ""
    shade: float | None = None
    bits: int | None = None


@dataclass(frozen=True)
class SortTable:
    """A table.

    :param header: column headings.
    :param rows: cells, as many in each row as headings.
    :param sortable: whether the page lets readers sort it.
    """

    header: list[str]
    rows: list[list[SortCell]]
    sortable: bool = True

    @property
    def words(self) -> list[bool]:
        """For each column, whether it holds words instead of numbers."""
        return [cell.key is None and cell.bits is None for cell in self.rows[0]] if self.rows else []

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)]]
        lines += [[f"{cell.text} {cell.small}".strip().replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: Any, digits: int = 4) -> SortCell:
    """A number, or a dash where there is none."""
    if value is None or pd.isna(value):
        return SortCell(DASH, -math.inf)
    if abs(value) >= 10 or float(2 * value).is_integer():
        digits = min(digits, 1)
    if isinstance(value, int) or float(value).is_integer():
        return SortCell(f"{int(value):,}", float(value))
    return SortCell(f"{float(value):.{digits}f}", float(value))


def p_value(p: float) -> SortCell:
    """A p-value; below one in ten thousand it is only said to be that small."""
    return SortCell("< 0.0001" if p < 1e-4 else f"{p:.4f}", float(p))


def interval(value: float, low: float, high: float, digits: int = 3, shade: float | None = None) -> SortCell:
    """A value over its interval."""
    between = " to " if low < 0 else "–"
    return SortCell(f"{value:.{digits}f}", float(value), f"{low:.{digits}f}{between}{high:.{digits}f}", shade)


def ranking(content: ComparisonContent) -> SortTable:
    """One row a policy: the interquartile mean with its interval, and what else the frame holds."""
    others = [str(c) for c in content.ranking.columns if c not in {"policy", "iqm", "low", "high"}]
    others = [c for c in others if not c.endswith((" low", " high"))]
    rows = []
    for row in content.ranking.to_dict("records"):
        cells = [SortCell(str(row["policy"])), interval(row["iqm"], row["low"], row["high"])]
        for column in others:
            if f"{column} low" in row:
                cells.append(interval(row[column], row[f"{column} low"], row[f"{column} high"]))
            else:
                cells.append(number(row[column], 3))
        rows.append(cells)
    return SortTable(["policy", "interquartile mean", *others], rows)


def frame_table(frame: pd.DataFrame, digits: int = 4) -> SortTable:
    """Any frame: numbers by value, the rest as text."""
    rows = [
        [number(v, digits) if isinstance(v, (int, float)) and not isinstance(v, bool) else SortCell(str(v))
         for v in record]
        for record in frame.itertuples(index=False)
    ]  # fmt: skip
    return SortTable([str(column).replace("_", " ") for column in frame.columns], rows)


def improvement(content: ComparisonContent) -> SortTable:
    """P(row beats column), shaded; a star where the interval excludes one half."""
    found = {(str(r["x"]), str(r["y"])): r for r in content.improvement.to_dict("records")}
    rows = []
    for x in content.policies:
        cells = [SortCell(x)]
        for y in content.policies:
            row = found.get((x, y))
            if row is None:
                cells.append(SortCell(DASH, 0.5))
                continue
            star = "*" if row["low"] > 0.5 or row["high"] < 0.5 else ""
            small = f"{row['low']:.2f}–{row['high']:.2f}"
            cells.append(SortCell(f"{row['probability']:.2f}{star}", row["probability"], small, row["probability"]))
        rows.append(cells)
    return SortTable(["row beats column", *content.policies], rows)


def tests(content: ComparisonContent, only: str | None = None) -> SortTable:
    """Pairs with their p-values.

    :param only: a policy; its pairs alone, as differences from it.
    """
    rows = []
    for row in content.tests.to_dict("records"):
        a, b, difference = str(row["a"]), str(row["b"]), float(row["difference"])
        if only is not None and only not in {a, b}:
            continue
        if only == b:
            a, b, difference = b, a, -difference
        rows.append([
            SortCell(f"{a} − {b}"), number(difference), p_value(row["p"]), p_value(row["p_holm"]),
            SortCell("yes" if row["significant"] else "no"),
        ])  # fmt: skip
    return SortTable(["pair", "median difference", "p", "p (Holm)", "significant"], rows)


def speed(content: ComparisonContent) -> SortTable:
    """What each policy had found in time, and how long it took."""
    return frame_table(content.speed, 3)


def effects(content: ComparisonContent) -> SortTable:
    """Fixed effects of the mixed model."""
    rows = [
        [SortCell(str(row["policy"])), interval(row["effect"], row["low"], row["high"], 4), p_value(row["p"])]
        for row in content.effects.to_dict("records")
    ]
    return SortTable(["policy", f"effect against {content.reference}", "p"], rows)


def bitwidths(content: ComparisonContent) -> SortTable:
    """Bits of each policy's best run, layer by layer."""
    frame = content.bitwidths
    names = [str(c).removesuffix(".weight") for c in frame.columns if str(c).endswith(".weight")]
    rows = []
    for record in frame.to_dict("records"):
        cells = [SortCell(str(record["layer"]))]
        for name in names:
            weight, activation = (int(record[f"{name}.{kind}"]) for kind in ("weight", "activation"))
            cells.append(SortCell(f"{weight}/{activation}", bits=round((weight + activation) / 2)))
        rows.append(cells)
    return SortTable(["layer", *names], rows, sortable=False)
