"""Figures of CSV rows as cells of a table, rounded so that nothing looks better than it is."""

from __future__ import annotations

import math

from arqsearch.benchmarks.speed_table import Row


def share_cell(row: Row, column: str) -> str:
    """A share and its interval in per cent."""
    return bracketed(row, column, 100, 1)


def bracketed(row: Row, column: str, scale: float, digits: int) -> str:
    """A value and its interval, both rounded outwards: value and lower end down, upper end up."""
    from arqsearch.report.tables import DASH, floor_to

    if column not in row:
        return DASH
    value = floor_to(scale * float(row[column]), digits)
    if f"{column}_low" not in row or f"{column}_high" not in row:
        return value
    low, high = scale * float(row[f"{column}_low"]), scale * float(row[f"{column}_high"])
    top = math.ceil(high * 10**digits - 1e-9) / 10**digits
    return f"{value} ({floor_to(low, digits)}–{top:.{digits}f})"


def whole(row: Row, column: str) -> str:
    """A whole number with thousands separated; a dash where there is none."""
    return f"{int(float(row[column])):,}" if column in row else "–"


def decimal(row: Row, column: str, digits: int) -> str:
    """A number with so many digits; a dash where there is none."""
    return f"{float(row[column]):.{digits}f}" if column in row else "–"
