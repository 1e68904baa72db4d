"""The tables of certificate cost say what the CSV files hold; the picture is drawn from the same rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from arqsearch.benchmarks import results
from arqsearch.benchmarks.certify_speed import write_rows
from arqsearch.benchmarks.certify_table import GROWTH, RECIPE

SECONDS = {"cohen (rate)": 3000.0, "fixed (rate)": 500.0, "sequential": 10.0, "sequential10k": 2.5, "fixed": 510.0}


def cost_row() -> dict[str, str]:
    return {
        "recipe": RECIPE, "hardware": "2x-made-up", "sigma": "0.5", "images": "100", "alpha": "0.001", "base": "zoo:x",
        "seconds": json.dumps(SECONDS), "sequential_samples_per_image": "640.5", "undecided100k": "0.0",
        "sequential10k_samples_per_image": "320.0", "undecided10k": "0.01", "fixed_contradictions": "0",
        "fixed_expected_errors": "0.2",
        "certified_at_sigma": json.dumps({"fixed": 31, "sequential": 30, "sequential10k": 29}),
    }  # fmt: skip


def growth_rows() -> list[dict[str, str]]:
    rows = []
    for sigma in ("0.25", "0.5"):
        common = {"recipe": GROWTH, "hardware": "2x-made-up", "sigma": sigma, "images": "3"}
        for n, seconds in (("1000", "0.01"), ("100000", "1.0")):
            cost = {"samples_mean": n, "samples_median": n, "undecided": "0", "seconds_per_image": seconds}
            rows.append({**common, "rule": "fixed", "radius_in_sigma": "", "n_or_cap": n, **cost})
        for share in ("0.0", "1.0"):
            for cap in ("100000", "10000"):
                cost = {
                    "samples_mean": "300",
                    "samples_median": "64",
                    "undecided": "0.02",
                    "seconds_per_image": "0.003",
                }
                rows.append({**common, "rule": "sequential", "radius_in_sigma": share, "n_or_cap": cap, **cost})
    return rows


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    for page in results.PAGES:
        (tmp_path / page).write_text("# Page\n")
    blocks = ("certify-speed:cost", "certify-speed-growth:growth")
    page = "".join(f"<!-- results:{block} -->\n<!-- /results -->\n" for block in blocks)
    (tmp_path / "docs" / "benchmarks.md").write_text(page)
    write_rows([cost_row()], tmp_path / "results" / "certify-speed-2x-made-up-s050.csv")
    for sigma, stem in (("0.25", "s025"), ("0.5", "s050")):
        rows = [row for row in growth_rows() if row["sigma"] == sigma]
        write_rows(rows, tmp_path / "results" / f"certify-speed-2x-made-up-{stem}-growth.csv")
    return tmp_path


def test_cost_and_growth_are_rendered_from_the_files(repository: Path) -> None:
    changed = results.render(repository)
    page = (repository / "docs" / "benchmarks.md").read_text()
    assert "| `sequential`, cap 100,000 | 10.0 | 300.0× | 640 | 30 | 0.0% |" in page
    assert "| `sequential`, cap 10,000 | 2.5 | 1,200.0× | 320 | 29 | 1.0% |" in page
    assert "the reverse: 0 (at most 0.2 expected" in page
    assert "| 0.25 | `fixed` | any | 100,000 | 100,000 | 100,000 | 1,000.0 | – |" in page
    assert "| 0.5 | `sequential` | 1 | 10,000 | 300 | 64 | 3.0 | 2.0% |" in page
    picture = repository / "docs" / "pictures" / "certify-speed-2x-made-up.svg"
    assert picture in changed and f"(pictures/{picture.name})" in page
    assert picture.stat().st_size > 5_000 and page.count(picture.name) == 1
    assert results.render(repository) == [], "rendering twice changes nothing"


def test_the_committed_pages_show_the_committed_files() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in sorted((root / results.FOLDER).glob(f"{RECIPE}-*-growth.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            hardware = next(iter(csv.DictReader(file)))["hardware"]
        assert (root / "docs" / "pictures" / f"{RECIPE}-{hardware}.svg").is_file()
