"""`arqsearch bench scaling`: the command on a few small evaluations, and the summary of made-up rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arqsearch.benchmarks import environment, scaling
from arqsearch.benchmarks.cli import app
from arqsearch.errors import ArqError


def test_the_command_measures_and_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 4, "QUICK_CANDIDATES": 3, "QUICK_ROUNDS": 1, "QUICK_TRIVIAL": 5}.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setenv(environment.MARK, "auto")
    done = CliRunner().invoke(app, ["scaling", "--quick", "--workers", "1,2", "--output", str(tmp_path / "s.csv")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.strip().splitlines()[-1])
    with (tmp_path / "s.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["workers"], row["evaluations"], row["rounds"]) for row in rows] == [("1", "3", "1"), ("2", "3", "1")]
    for row in rows:
        rate = found[f"evaluations_per_minute_{row['workers']}"]
        assert rate == float(row["evaluations_per_minute"]) == pytest.approx(180 / float(row["seconds"]), rel=0.02)
    assert found["overhead_ms"] == float(rows[1]["overhead_ms"]) > 0
    assert float(rows[0]["speedup"]) == 1.0


def test_numbers_of_workers_that_are_none() -> None:
    for text in ("two", "0,1", ""):
        done = CliRunner().invoke(app, ["scaling", "--workers", text])
        assert isinstance(done.exception, ArqError) and "--workers 1,2,4" in str(done.exception)


def test_the_file_is_named_after_executor_and_machine(tmp_path: Path) -> None:
    row = {"executor": "ray://here:10001", "hardware": "2x-xeon", "workers": 1, "evaluations_per_minute": 7.0,
           "overhead_ms": 0.5, "speedup": 1.0}  # fmt: skip
    assert scaling.write_rows([row], tmp_path / "new").name == "scaling-ray-2x-xeon.csv"
    assert scaling.summary([row])["evaluations_per_minute_1"] == 7.0
