"""Committed results: run folder → CSV → the tables of README and docs, with nothing lost or typed by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from arqsearch.benchmarks import results
from arqsearch.errors import ArqError
from arqsearch.recipe import dump_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
XEON = "model name\t: Intel(R) Xeon(R) Processor @ 2.80GHz\nflags\t\t: fpu avx avx2 avx512f\n"
PAGE = "# Page\n\n<!-- results:made-up -->\nold\n<!-- /results -->\n\nend\n"
PARTS = (
    "<!-- results:made-up:search -->\n<!-- /results -->\n<!-- results:made-up:time -->\n<!-- /results -->\n"
    "<!-- results:other -->\n<!-- /results -->\n"
)


def network(name: str, shift: float, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": "estimate" if name == "FP32" else "certified"}
    for column, value in (("clean_accuracy", 0.875), ("certified@0", 0.75), ("certified@0.25", 0.58), ("acr", 0.3)):
        row |= {column: value + shift, f"{column}_low": value - 0.0931, f"{column}_high": value + 0.0931}
    return row | {"n": 10_000, "images": 100, "bops_percent": 1.6143, "weight_bytes": 141_003} | more


def candidate(reward: float) -> dict[str, Any]:
    return {"reward": reward, "terms": {"smoothed_radius": 0.25 + reward, "interval_accuracy": 0.5}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "made-up"
    dump_recipe(parse_recipe({"name": "made-up"}), folder / "recipe.yaml")
    rows = [network("FP32", 0.02), network("uniform", 0.0, **{"ibp@4": 0.31}), network("found (ddpg)", 0.01)]
    (folder / "comparison.json").write_text(json.dumps(rows))
    (folder / "timings.json").write_text(json.dumps({"train": 61.24, "search": 120.0}))
    (folder / "search").mkdir()
    for policy, rewards in (("ddpg", [-0.1, 0.02, -0.3]), ("uniform", [-0.2])):
        made = {"seed": 7, "best_reward": max(rewards), "history": [candidate(reward) for reward in rewards]}
        (folder / "search" / f"{policy}.json").write_text(json.dumps(made))
    values = [{"smoothed_radius": 0.1, "interval_accuracy": 0.2}, {"smoothed_radius": 0.3, "interval_accuracy": 0.2}]
    spread = {"reference": {"smoothed_radius": 0.25, "interval_accuracy": 0.6}, "values": values}
    (folder / "search" / "spread.json").write_text(json.dumps(spread))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "results.md").write_text(PARTS)
    for page in results.PAGES[2:]:
        (tmp_path / page).write_text("# Page\n")
    return tmp_path


@pytest.mark.parametrize(
    ("cpuinfo", "cores", "machine", "expected"),
    [
        (XEON, 2, "x86_64", "2x-xeon-2.80ghz-avx512"),
        ("model name : AMD EPYC 7B13 64-Core Processor\nflags : avx2\n", 16, "x86_64", "16x-epyc-7b13-avx2"),
        ("Features\t: fp asimd\n", 4, "aarch64", "4x-aarch64-neon"),
        ("", 8, "arm64", "8x-arm64"),
    ],
)
def test_hardware_names_are_short_and_safe(cpuinfo: str, cores: int, machine: str, expected: str) -> None:
    assert results.hardware(cpuinfo, cores, machine) == expected
    assert re.fullmatch(r"[a-z0-9.-]+", results.this_machine())


def test_collect_carries_every_row_interval_stage_and_policy(run: Path, repository: Path) -> None:
    networks, policies = results.collect(run, repository, "2x-test")
    assert [path.name for path in (networks, policies)] == ["made-up-2x-test.csv", "made-up-2x-test-search.csv"]
    with networks.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for given, row in zip(json.loads((run / "comparison.json").read_text()), rows, strict=True):
        assert {key: str(value) for key, value in given.items()}.items() <= row.items()
        assert (row["seconds:train"], row["seconds:search"]) == ("61.2", "120.0")
        assert (row["recipe"], row["data"]) == ("made-up", "scikit-learn digits")
    with policies.open(newline="") as file:
        ddpg, uniform = list(csv.DictReader(file))
    assert (ddpg["policy"], ddpg["evaluations"], ddpg["found_at"], uniform["evaluations"]) == ("ddpg", "3", "2", "1")
    assert float(ddpg["smoothed_radius"]) == pytest.approx(0.27)
    assert float(ddpg["smoothed_radius:random_mean"]) == pytest.approx(0.2)
    assert float(ddpg["smoothed_radius:random_std"]) == pytest.approx(0.1)
    assert (ddpg["smoothed_radius:w8a8"], ddpg["interval_accuracy:w8a8"]) == ("0.25", "0.6")


def test_render_is_idempotent_and_prints_rows_intervals_and_remarks(run: Path, repository: Path) -> None:
    results.collect(run, repository, "2x-test")
    assert [path.name for path in results.render(repository)] == ["README.md", "results.md"]
    assert results.render(repository) == []
    page = (repository / "README.md").read_text()
    assert page.startswith("# Page\n\n<!-- results:made-up -->\n\ncnn_small on scikit-learn digits")
    assert "old" not in page
    assert page.endswith("<!-- /results -->\n\nend\n")
    assert "|  | FP32 | uniform | found (ddpg) |" in page
    assert "|  | estimate | certified | certified |" in page
    # 0.58 ± 0.0931: the value and the lower end are rounded down, the upper end up.
    assert "| Certified at r = 0.25 | 60.0 (48.6–67.4) | 58.0 (48.6–67.4) | 59.0 (48.6–67.4) |" in page
    assert "| Certified at ε = 4 | – | 31.0 | – |" in page
    assert "| ACR | 0.320 (0.206–0.394) | 0.300 (0.206–0.394) | 0.310 (0.206–0.394) |" in page
    assert "| BOPs, % of FP32 | 1.614 | 1.614 | 1.614 |" in page and "| Weight bytes | 141,003 |" in page
    assert "JPEG" not in page
    details = (repository / "docs" / "results.md").read_text()
    assert "| ddpg | 3 | 0.0200 | 2 | 0.2700 | 0.5000 |" in details
    assert "| 2 random configurations, mean ± deviation |  |  |  | 0.2000 ± 0.1000 | 0.2000 ± 0.0000 |" in details
    assert "| together | 3.0 |" in details
    assert f"<!-- results:other -->\n\n{results.ABSENT}\n\n<!-- /results -->" in details


def test_a_jpeg_copy_is_named_beside_its_numbers(run: Path, repository: Path) -> None:
    path = results.collect(run, repository, "2x-test")[0]
    path.write_text(path.read_text().replace("scikit-learn digits", "CIFAR-10 (JPEG copy)"))
    results.render(repository)
    page = (repository / "README.md").read_text()
    assert "cnn_small on CIFAR-10 (JPEG copy), σ" in page and "compressed with loss" in page


def test_unfinished_runs_and_broken_pages_are_refused(run: Path, repository: Path, capsys: Any) -> None:
    (run / "comparison.json").unlink()
    with pytest.raises(ArqError, match="not finished"):
        results.collect(run, repository, "2x-test")
    assert results.main(["--root", str(repository), "collect", str(run)]) == 2
    assert "error: No comparison.json" in capsys.readouterr().err
    (repository / "README.md").write_text("<!-- results:made-up -->\n")
    with pytest.raises(ArqError, match=r"README\.md has a results block that is not closed"):
        results.render(repository)
    (repository / "README.md").write_text("<!-- results:made-up:speed -->\n<!-- /results -->\n")
    with pytest.raises(ArqError, match="unknown table"):
        results.render(repository)


@pytest.mark.parametrize("name", results.PAGES)
def test_committed_tables_are_those_of_the_committed_files(name: str) -> None:
    page = (ROOT / name).read_text()
    assert "<!-- results:" in page
    assert results.rendered(page, ROOT, name) == page, "run `python -m arqsearch.benchmarks.results render`"


def test_every_committed_result_has_its_table() -> None:
    shown = set(re.findall(r"<!-- results:([\w.-]+)", "".join((ROOT / name).read_text() for name in results.PAGES)))
    committed = sorted((ROOT / results.FOLDER).glob("*.csv"))
    if not committed:
        pytest.skip("no result is committed yet")
    for path in committed:
        with path.open(newline="") as file:
            assert {row["recipe"] for row in csv.DictReader(file)} <= shown, path.name
