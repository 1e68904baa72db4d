"""A comparison as a committed CSV file, and the tables and the picture of docs/policies.md that are made from it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arqsearch.benchmarks.speed_table import Row

if TYPE_CHECKING:
    from arqsearch.benchmarks.policies import Settings

#: Name under which the rows are kept.
RECIPE = "policies-tabular"


def write_table(settings: Settings, place: Path) -> Path:
    """Write one row a policy from the report that :func:`arqsearch.benchmarks.policies.compare` left.

    :param place: a CSV file, or a folder, where the file gets its own name.
    :returns: the file.
    """
    from arqsearch import __version__
    from arqsearch.benchmarks.results import this_machine

    report: dict[str, Any] = json.loads((settings.output / "report" / "comparison.json").read_text(encoding="utf-8"))
    name = f"policies-{settings.target if '/' not in settings.target else Path(settings.target).stem}"
    machine = this_machine()
    path = place if place.suffix == ".csv" else place / f"{name}-{machine}.csv"
    against = {(row["x"], row["y"]): row for row in report["improvement"]}
    tests = {frozenset((row["a"], row["b"])): row for row in report["tests"]}
    best = report["ranking"][0]["policy"]
    speed = {row["policy"]: row for row in report["speed"]}
    rows = []
    for row in report["ranking"]:
        policy = row["policy"]
        facts = {
            "recipe": name, "version": __version__, "hardware": machine, "tasks": len(report["tasks"]),
            "seeds": settings.seeds, "evaluations": settings.evaluations, "verdict": json.dumps(report["verdict"]),
        }  # fmt: skip
        floor = against.get((policy, "random"))
        if floor is not None:
            facts |= {f"over_random{end}": floor[key]
                      for end, key in (("", "probability"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
        test = tests.get(frozenset((policy, best)))
        if test is not None:
            facts["p_holm_against_best"] = test["p_holm"]
        facts |= {key.replace(" ", "_"): value for key, value in row.items()}
        rows.append(facts | {"seconds": speed[policy]["seconds of a run"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def policies_table(rows: Sequence[Row]) -> str:
    """One row a policy: interquartile mean, probability to beat random sampling, corrected p against the best."""
    from arqsearch.report.tables import DASH, Cell, Table

    first, lines = rows[0], []
    for row in rows:
        over = DASH
        if "over_random" in row:
            over = f"{float(row['over_random']):.2f} ({_range(row, 'over_random_low', 'over_random_high', 2)})"
        p = float(row["p_holm_against_best"]) if "p_holm_against_best" in row else None
        shown = DASH if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"
        share = f"{float(row['optimum_found']):.0%}" if "optimum_found" in row else DASH
        lines.append([
            row["policy"], f"{float(row['iqm']):.3f} ({_range(row, 'low', 'high', 3)})", f"{float(row['worst']):.3f}",
            share, over, shown, f"{float(row['seconds']):.2f}",
        ])  # fmt: skip
    header = ["policy", "score, interquartile mean", "worst run", "optimum found", "beats random", "p against the best",
              "seconds of a run"]  # fmt: skip
    caption = (
        f"{int(first['tasks']) * int(first['seeds'])} runs of each policy ({first['tasks']} tasks × {first['seeds']} "
        f"seeds), {first['evaluations']} evaluations each, on the tabular benchmark. Measured on "
        f"`{first['hardware']}` with arqsearch {first['version']}."
    )
    table = Table([Cell(name) for name in header], [[Cell(cell) for cell in line] for line in lines])
    note = (
        "Score: 1 is the best assignment within the budget, 0 the median one. Brackets: 95 % stratified bootstrap "
        "intervals. p: Wilcoxon's signed-rank test, corrected by Holm's method over all pairs. Seconds: the searcher's "
        "own processor time, median; evaluations are look-ups."
    )
    verdict = "\n".join(f"- {sentence}" for sentence in json.loads(first["verdict"]))
    return f"{caption}\n\n{verdict}\n\n{table.markdown()}\n\n{note}"


def _range(row: Row, low: str, high: str, digits: int) -> str:
    return f"{float(row[low]):.{digits}f}–{float(row[high]):.{digits}f}"
