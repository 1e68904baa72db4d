"""The table of box verdicts says what the CSV file holds."""

from __future__ import annotations

from arqsearch.benchmarks.bounds_table import bounds_table


def test_only_integer_networks_are_shown_and_figures_are_rounded_down() -> None:
    facts = {
        "recipe": "made-up", "data": "digits", "interval_images": "10000", "hardware": "2x-made-up", "version": "0.1.0",
    }  # fmt: skip
    found = {
        **facts, "name": "found (ddpg)", "kind": "certified", "clean_accuracy": "0.86549",
        "clean_accuracy_low": "0.858", "clean_accuracy_high": "0.8721", "ibp@1": "0.8479", "ibp@4": "0.78239",
        "bops_percent": "1.5614", "weight_bytes": "61234",
    }  # fmt: skip
    table = bounds_table([{**facts, "name": "FP32", "kind": "estimate", "clean_accuracy": "0.9"}, found])
    assert "| network | accuracy | ε = 1 | ε = 4 | BOPs, % of FP32 | weight bytes |" in table
    assert "| found (ddpg) | 86.5 (85.8–87.3) | 84.7 | 78.2 | 1.561 | 61,234 |" in table
    assert "FP32 |" not in table.split("\n\n")[1].replace("% of FP32 |", "")
    assert "first 10,000 test images" in table
