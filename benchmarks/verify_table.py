"""The tables of docs/robustness.md: verdicts on the public MNIST benchmark by ε, and how fast boxes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from arqsearch.benchmarks.speed_table import Row


def verdicts_table(rows: Sequence[Row]) -> str:
    """Verdicts, methods and seconds by ε, from the file of ``arqsearch bench verify-mnist``."""
    from arqsearch.report.tables import Cell, Table

    header = [
        "ε",
        "robust",
        "non-robust",
        "open",
        "misclassified",
        "in conflict with QVIP",
        "mean s",
        "largest s",
        "by",
    ]
    lines = []
    groups = {epsilon: [row for row in rows if row["epsilon"] == epsilon] for epsilon in {r["epsilon"] for r in rows}}
    for epsilon, own in [*sorted(groups.items(), key=lambda item: int(item[0])), ("all", list(rows))]:
        verdicts = Counter(row["verdict"] for row in own)
        seconds = [float(row["seconds"]) for row in own]
        methods = Counter(row["method"] for row in own if row["verdict"] in ("robust", "non-robust"))
        cells = [
            epsilon, *(str(verdicts[name]) for name in ("robust", "non-robust", "unknown", "misclassified")),
            str(sum(conflicts(row) for row in own)), f"{sum(seconds) / len(seconds):.3f}", f"{max(seconds):.2f}",
            ", ".join(f"{name} {count}" for name, count in methods.most_common()),
        ]  # fmt: skip
        lines.append([Cell(cell) for cell in cells])
    first = rows[0]
    caption = (
        f"{first['title']}: {len(rows)} instances, {float(first['limit_seconds']):g} s each at most, each on one core, "
        f"{first['workers']} side by side, on `{first['hardware']}` with arqsearch {first['version']}."
    )
    return f"{caption}\n\n{Table([Cell(name) for name in header], lines).markdown()}"


def conflicts(row: Row) -> bool:
    """Whether a decided verdict is not the published one."""
    published = {"Robust": "robust", "Non-robust": "non-robust"}.get(row.get("known", ""))
    return row["verdict"] in ("robust", "non-robust") and published is not None and row["verdict"] != published


def boxes_table(rows: Sequence[Row]) -> str:
    """One sentence: boxes per second, from the file of ``arqsearch bench verify-speed``."""
    (row,) = rows
    return (
        f"Interval bounds of the network (48,5,2)(64,3,2) dense 128 at 28×28, 8 bits, from uint8 images to verdicts: "
        f"{int(row['images_per_second_boxes']):,} images per second ({int(row['images_per_second_boxes_least']):,} to "
        f"{int(row['images_per_second_boxes_greatest']):,} over {row['rounds']} rounds) on {row['threads']} threads of "
        f"`{row['hardware']}` ({row['cpu']}). Of 40 benchmark instances at {float(row['seconds_each']):g} s each, "
        f"{row['open_of_40']} stay open and {row['conflicts']} differ from QVIP."
    )
