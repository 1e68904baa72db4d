"""What the networks of one run prove at each ε, from the CSV file that `results collect` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arqsearch.benchmarks.cells import decimal, share_cell, whole
from arqsearch.benchmarks.speed_table import Row


def bounds_table(rows: Sequence[Row]) -> str:
    """Clean accuracy, box-certified accuracy at each ε and cost of the integer networks of one run."""
    from arqsearch.report.tables import Cell, Table

    first = rows[0]
    epsilons = list(dict.fromkeys(c for row in rows for c in row if re.fullmatch(r"ibp@\d+", c)))
    header = ["network", "accuracy", *(f"ε = {c.split('@')[1]}" for c in epsilons), "BOPs, % of FP32", "weight bytes"]
    lines = [
        [row["name"], share_cell(row, "clean_accuracy"), *(share_cell(row, c) for c in epsilons),
         decimal(row, "bops_percent", 3), whole(row, "weight_bytes")]
        for row in rows
        if row["kind"] == "certified"
    ]  # fmt: skip
    table = Table([Cell(name) for name in header], [[Cell(cell) for cell in line] for line in lines])
    caption = (
        f"`{first['recipe']}` on {first['data']}. Box verdicts of the lowered integer program on the first "
        f"{int(first['interval_images']):,} test images, in %, rounded down, with 95 % intervals over the choice of "
        f"images. Measured on `{first['hardware']}` with arqsearch {first['version']}."
    )
    return f"{caption}\n\n{table.markdown()}"
