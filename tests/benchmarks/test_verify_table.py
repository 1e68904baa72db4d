"""The table of verdicts counts what the CSV file holds."""

from __future__ import annotations

from typing import Any

from arqsearch.benchmarks.verify_table import boxes_table, conflicts, verdicts_table


def row(epsilon: int, known: str, verdict: str, method: str, seconds: float) -> dict[str, Any]:
    facts = {"title": "A benchmark", "limit_seconds": "60.0", "workers": "2", "hardware": "2x-made-up", "version": "1"}
    found = {"epsilon": str(epsilon), "known": known, "verdict": verdict, "method": method, "seconds": str(seconds)}
    return {**facts, **found}


def test_verdicts_are_counted_by_epsilon_and_together() -> None:
    rows = [
        row(2, "Non-robust", "non-robust", "attack", 0.5), row(1, "Robust", "robust", "boxes", 0.1),
        row(1, "Robust", "robust", "linear", 0.3), row(2, "NA", "misclassified", "run", 0.0),
        row(2, "Robust", "unknown", "milp", 60.0),
    ]  # fmt: skip
    table = verdicts_table(rows)
    assert "| 1 | 2 | 0 | 0 | 0 | 0 | 0.200 | 0.30 | boxes 1, linear 1 |" in table
    assert "| 2 | 0 | 1 | 1 | 1 | 0 | 20.167 | 60.00 | attack 1 |" in table
    assert "| all | 2 | 1 | 1 | 1 | 0 | 12.180 | 60.00 |" in table
    assert "5 instances, 60 s each at most" in table


def test_only_decided_verdicts_conflict() -> None:
    assert conflicts(row(1, "Robust", "non-robust", "attack", 1.0))
    assert not conflicts(row(1, "Robust", "unknown", "milp", 1.0))
    assert not conflicts(row(1, "NA", "robust", "boxes", 1.0))


def test_boxes_are_told_with_their_spread() -> None:
    facts = {
        "images_per_second_boxes": "45803", "images_per_second_boxes_least": "31556", "rounds": "15", "threads": "2",
        "images_per_second_boxes_greatest": "51926", "hardware": "2x-made-up", "cpu": "Made Up", "seconds_each": "2.0",
        "open_of_40": "0", "conflicts": "0",
    }  # fmt: skip
    text = boxes_table([facts])
    assert "45,803 images per second (31,556 to 51,926 over 15 rounds) on 2 threads" in text
    assert "at 2 s each, 0 stay open and 0 differ" in text
