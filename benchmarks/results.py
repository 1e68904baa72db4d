"""Results as files: a run folder becomes committed CSVs, and the CSVs become the tables of README and docs.

``python -m arqsearch.benchmarks.results collect runs/digits`` writes ``results/<recipe>-<hardware>.csv`` (the compared
networks) and ``results/<recipe>-<hardware>-search.csv`` (the policies). ``... render`` rewrites what stands between
``<!-- results:<recipe> -->`` and ``<!-- /results -->`` in README.md and docs/ from the files in ``results/``: no figure
there is typed by hand. ``results:<recipe>:search`` and ``results:<recipe>:time`` ask for the other tables of a run,
``results:integer-speed:rates`` and ``results:integer-speed:milliseconds`` for those of ``arqsearch bench
integer-speed``, ``results:certify-speed:cost`` and ``results:certify-speed-growth:growth`` (with a picture in
docs/pictures) for ``arqsearch bench certify-speed``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arqsearch.benchmarks.bounds_table import bounds_table
from arqsearch.benchmarks.cells import bracketed, decimal, share_cell, whole
from arqsearch.benchmarks.certify_table import GROWTH, cost_table, draw_growth, growth_table, picture_name
from arqsearch.benchmarks.policies_table import policies_table
from arqsearch.benchmarks.speed_table import Row, milliseconds_table, rates_table
from arqsearch.benchmarks.verify_table import boxes_table, verdicts_table
from arqsearch.errors import ArqError

FOLDER = "results"
SEARCH_SUFFIX = "-search.csv"
#: Files whose marked blocks are rewritten, relative to the repository.
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/benchmarks.md",
    "docs/policies.md",
    "docs/qaibp.md",
    "docs/robustness.md",
)
ABSENT = "*No measurement is committed yet.*"
_SECONDS = "seconds:"
_BLOCK = re.compile(r"(<!-- results:([\w.-]+)(?::(\w+))? -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- results:")
#: Words of a processor's name that tell nothing.
_NOISE = {"intel", "amd", "r", "tm", "cpu", "processor", "genuine", "with", "at", "gen"}


# ---- hardware --------------------------------------------------------------------------------


def hardware(cpuinfo: str, cores: int, machine: str) -> str:
    """Name of a machine for file names, such as ``2x-xeon-2.80ghz-avx512``.

    :param cpuinfo: text of ``/proc/cpuinfo``; empty where there is none.
    :param cores: processor cores that the run could use.
    :param machine: architecture, used where the processor has no name.
    """
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    name = re.sub(r"\d+-core", "", fields.get("model name", machine).lower())
    kept = [word for word in re.findall(r"[a-z0-9.]+", name) if word not in _NOISE]
    flags = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    sets = (("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))
    vector = next((name for flag, name in sets if flag in flags), "")
    return "-".join([f"{cores}x", *(kept or [machine.lower()]), *([vector] if vector else [])])


def this_machine() -> str:
    """:func:`hardware` of the machine that runs this."""
    info = Path("/proc/cpuinfo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return hardware(info.read_text() if info.is_file() else "", cores, platform.machine())


# ---- collect ---------------------------------------------------------------------------------


def collect(run: str | Path, root: Path, machine: str | None = None) -> list[Path]:
    """Write the CSV files of a finished run.

    :param run: run folder.
    :param root: repository.
    :param machine: hardware name; default: this machine's.
    :returns: the files written: networks, then policies.
    :raises ArqError: when the run is not finished.
    """
    from arqsearch import __version__
    from arqsearch.search import statements
    from arqsearch.search.delivery import open_run
    from arqsearch.search.reporting import RunFiles
    from arqsearch.search.workspace import Workspace

    folder, machine = Path(run).expanduser().absolute(), machine or this_machine()
    recipe = open_run(folder)
    files = RunFiles(Workspace(recipe))
    rows = _read_json(folder / "comparison.json", recipe.name)
    timings = _read_json(folder / "timings.json", recipe.name)
    facts: dict[str, Any] = {
        "recipe": recipe.name, "version": __version__, "hardware": machine, "title": statements.title(files),
        "data": statements.data_title(files), "sigma": recipe.sigma, "alpha": recipe.certify.alpha,
        "clean_images": recipe.certify.clean_images, "interval_images": recipe.certify.interval_images,
    }  # fmt: skip
    seconds = {f"{_SECONDS}{stage}": round(value, 1) for stage, value in timings.items()}
    stem = root / FOLDER / f"{recipe.name}-{machine}"
    networks = _write(stem.with_name(f"{stem.name}.csv"), [facts | row | seconds for row in rows])
    policies = [facts | row for row in search_rows(files.searches, files.spread)]
    return [networks, _write(stem.with_name(f"{stem.name}{SEARCH_SUFFIX}"), policies)]


def search_rows(searches: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each policy: its evaluations, its best candidate, and what random configurations and W8A8 score.

    :param searches: ``search/<policy>.json`` by policy.
    :param spread: ``search/spread.json``.
    """
    import numpy as np

    rows: list[dict[str, Any]] = []
    for policy, result in searches.items():
        history = result["history"]
        best = max(range(len(history)), key=lambda index: history[index]["reward"])
        row = {
            "policy": policy, "seed": result["seed"], "evaluations": len(history), "best_reward": result["best_reward"],
            "found_at": best + 1, "random_configurations": len(spread["values"]),
        }  # fmt: skip
        for term, value in history[best]["terms"].items():
            sample = [values[term] for values in spread["values"]]
            row |= {
                term: value, f"{term}:random_mean": float(np.mean(sample)), f"{term}:random_std": float(np.std(sample)),
                f"{term}:w8a8": spread["reference"][term],
            }  # fmt: skip
        rows.append(row)
    return rows


def _read_json(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ArqError(f"No {path.name} in {path.parent}: run {name!r} is not finished; `arqsearch run {path.parent}`.")
    return json.loads(path.read_text())


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- render ----------------------------------------------------------------------------------


def read_results(root: Path, recipe: str, search: bool) -> list[list[Row]]:
    """Rows of every committed CSV of a recipe, one list for each machine, sorted by file name.

    :param root: repository.
    :param search: the policies' files instead of the networks'.
    """
    found = []
    for path in sorted((root / FOLDER).glob("*.csv")):
        if path.name.endswith(SEARCH_SUFFIX) != search:
            continue
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        if rows and rows[0]["recipe"] == recipe:
            found.append(rows)
    return found


def by_machine(results: Sequence[list[Row]]) -> list[list[Row]]:
    """Files of one machine joined: their rows belong into one table and one picture."""
    joined: dict[str, list[Row]] = {}
    for rows in results:
        joined.setdefault(rows[0]["hardware"], []).extend(rows)
    return list(joined.values())


def render(root: Path) -> list[Path]:
    """Rewrite the marked blocks of README and docs from the committed CSVs.

    :param root: repository.
    :returns: the files that changed.
    :raises ArqError: when a page is missing or a block is not closed.
    """
    changed = []
    for name in PAGES:
        path = root / name
        if not path.is_file():
            raise ArqError(f"No {name} in {root.absolute()}; run this in the repository, or give it with --root.")
        before = path.read_text(encoding="utf-8")
        after = rendered(before, root, name)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    for rows in by_machine(read_results(root, GROWTH, search=False)):
        picture = root / "docs" / "pictures" / picture_name(rows)
        if draw_growth(rows, picture):
            changed.append(picture)
    return changed


def rendered(text: str, root: Path, name: str) -> str:
    """A page with its blocks filled from the CSVs.

    :param text: the page.
    :param root: repository.
    :param name: of the page, for errors.
    """
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise ArqError(f"{name} has a results block that is not closed; end it with <!-- /results -->.")

    def fill(match: re.Match[str]) -> str:
        opening, recipe, part, _, closing = match.groups()
        if part not in (None, *_PARTS):
            raise ArqError(f"{name}: results:{recipe}:{part} asks for an unknown table; use {', '.join(_PARTS)}.")
        results = read_results(root, recipe, search=part == "search")
        if recipe == GROWTH:
            results = by_machine(results)
        make = _PARTS.get(part or "", networks_table)
        body = "\n\n".join(make(rows) for rows in results) or ABSENT
        return f"{opening}\n{body}\n\n{closing}"

    return _BLOCK.sub(fill, text)


def networks_table(rows: Sequence[Row]) -> str:
    """What each network of one run does and costs, networks side by side, with its caption and reading aid."""
    from arqsearch.report.tables import Cell, Table

    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [["", *(row["kind"] for row in rows)]]
    lines.append(["Clean accuracy", *(share_cell(row, "clean_accuracy") for row in rows)])
    for column in (c for c in columns if re.fullmatch(r"certified@[\d.]+", c)):
        lines.append([f"Certified at r = {column.split('@')[1]}", *(share_cell(row, column) for row in rows)])
    for column in (c for c in columns if c.startswith("undecided@")):
        lines.append([f"Undecided at r = {column.split('@')[1]}", *(whole(row, column) for row in rows)])
    for column, name in (("acr", "ACR"), ("acr_bound", "ACR, lower bound")):
        if column in columns:
            lines.append([name, *(bracketed(row, column, 1, 3) for row in rows)])
    for column in (c for c in columns if re.fullmatch(r"ibp@\d+", c)):
        lines.append([f"Certified at ε = {column.split('@')[1]}", *(share_cell(row, column) for row in rows)])
    lines.append(["Noise samples n", *(whole(row, "n") for row in rows)])
    if "mean_samples" in columns:
        lines.append(["Samples of an image, mean", *(whole(row, "mean_samples") for row in rows)])
    lines.append(["Test images (r, ACR)", *(whole(row, "images") for row in rows)])
    if "expected_wrong" in columns:
        lines.append(["Wrong certificates expected, at most", *(decimal(row, "expected_wrong", 2) for row in rows)])
    lines.append(["BOPs, % of FP32", *(decimal(row, "bops_percent", 3) for row in rows)])
    lines.append(["Weight bytes", *(whole(row, "weight_bytes") for row in rows)])
    header = [Cell(""), *(Cell(row["name"]) for row in rows)]
    table = Table(header, [[Cell(cell) for cell in line] for line in lines])
    return f"{_caption(rows[0])}\n\n{table.markdown()}\n\n{_reading_aid(rows)}"


def search_table(rows: Sequence[Row]) -> str:
    """What each policy found in one run, beside random configurations and the W8A8 reference."""
    from arqsearch.report.tables import Cell, Table

    terms = [column.removesuffix(":w8a8") for column in rows[0] if column.endswith(":w8a8")]
    first = rows[0]
    lines = [
        [
            row["policy"],
            whole(row, "evaluations"),
            decimal(row, "best_reward", 4),
            whole(row, "found_at"),
            *(decimal(row, term, 4) for term in terms),
        ]
        for row in rows
    ]
    spread = (f"{decimal(first, f'{t}:random_mean', 4)} ± {decimal(first, f'{t}:random_std', 4)}" for t in terms)
    lines.append([f"{first['random_configurations']} random configurations, mean ± deviation", "", "", "", *spread])
    lines.append(["W8A8 (reward 0)", "", "", "", *(decimal(first, f"{term}:w8a8", 4) for term in terms)])
    header = ["policy", "evaluations", "best reward", "found at", *(term.replace("_", " ") for term in terms)]
    table = Table([Cell(name) for name in header], [[Cell(cell) for cell in line] for line in lines])
    note = "Scores on held-out training images: estimates that steer the search, never certificates."
    return f"{_caption(first)}\n\n{table.markdown()}\n\n{note}"


def time_table(rows: Sequence[Row]) -> str:
    """Wall time of each stage of one run."""
    from arqsearch.report.tables import Cell, Table

    stages = {column.removeprefix(_SECONDS): float(v) for column, v in rows[0].items() if column.startswith(_SECONDS)}
    lines = [[name, f"{value / 60:.1f}"] for name, value in {**stages, "together": sum(stages.values())}.items()]
    table = Table([Cell("stage"), Cell("minutes")], [[Cell(cell) for cell in line] for line in lines])
    return f"{_caption(rows[0])}\n\n{table.markdown()}"


_PARTS = {
    "search": search_table, "time": time_table, "rates": rates_table, "milliseconds": milliseconds_table,
    "cost": cost_table, "growth": growth_table, "policies": policies_table,
    "bounds": bounds_table, "verdicts": verdicts_table, "boxes": boxes_table,
}  # fmt: skip


def _caption(row: Row) -> str:
    return f"{row['title']}. Measured on `{row['hardware']}` with arqsearch {row['version']}."


def _reading_aid(rows: Sequence[Row]) -> str:
    first = rows[0]
    text = (
        "Accuracies in %, rounded down; brackets: 95 % interval over the choice of images. r: L2 radius in units of "
        f"[0,1] pixels, σ = {float(first['sigma']):g}, α = {float(first['alpha']):g} for each image; ACR in the same "
        f"unit, and it depends on n. Clean accuracy: on at most {first['clean_images']} test images. "
    )
    if any(column.startswith("ibp@") for row in rows for column in row):
        text += (
            "ε: L∞ radius in grey levels, by interval bounds, without noise, on at most "
            f"{first['interval_images']} test images. "
        )
    text += "The FP32 row is an estimate by the same protocol, no certificate."
    if first["data"].endswith("(JPEG copy)"):
        text += (
            f" The images are those of {first['data']}, compressed with loss: not comparable with figures on the "
            "original data."
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m arqsearch.benchmarks.results``."""
    parser = argparse.ArgumentParser(prog="python -m arqsearch.benchmarks.results", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="the repository; default: the current folder")
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write the CSVs of a finished run")
    collecting.add_argument("run", help="run folder")
    commands.add_parser("render", help="fill the tables of README.md and docs")
    given = parser.parse_args(arguments)
    try:
        paths = collect(given.run, given.root) if given.command == "collect" else render(given.root)
    except ArqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)) or "Nothing changed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
