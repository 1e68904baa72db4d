"""The final table: one row for each compared network, from the files of the run folder."""

from __future__ import annotations

import json
from typing import Any

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.summary import share, summarize
from arqsearch.quantize.cost import reference_cost, total_cost
from arqsearch.search.stages import FLOAT, FOUND, compared
from arqsearch.search.workspace import Workspace


def display_name(space: Workspace, name: str) -> str:
    """What a network is called in tables."""
    return {FLOAT: "FP32", FOUND: f"found ({space.recipe.search.policy})"}.get(name, name)


def comparison_rows(space: Workspace) -> list[dict[str, Any]]:
    """Rows of clean accuracy, certified accuracy at radii, ACR, interval accuracy and cost.

    Accuracies are fractions with 95 % Clopper-Pearson ends over the images; the float network's row is an
    estimate by the same protocol, not a certificate.
    """
    layers = space.net().layer_infos
    return [_row(space, name, layers) for name in compared(space.recipe)]


def _row(space: Workspace, name: str, layers: Any) -> dict[str, Any]:
    bounds = json.loads(space.bounds_path(name).read_text())
    summary = summarize(read_lines(space.certificate_path(name)), space.recipe.certify.radii)
    row: dict[str, Any] = {
        "name": display_name(space, name),
        "kind": "estimate" if name == FLOAT else "certified",
        "clean_accuracy": bounds["clean"]["correct"] / bounds["clean"]["images"],
    }
    for radius, found in summary.accuracy.items():
        row |= {f"certified@{radius:g}": found.value, f"certified@{radius:g}_low": found.low,
                f"certified@{radius:g}_high": found.high}  # fmt: skip
    row |= {"acr": summary.acr, "acr_low": summary.acr_low, "acr_high": summary.acr_high, "n": summary.n,
            "images": summary.images, "abstained": summary.abstained}  # fmt: skip
    if "interval" in bounds:
        for epsilon, verdicts in bounds["interval"]["robust"].items():
            found = share(sum(verdicts), len(verdicts))
            row |= {f"ibp@{epsilon}": found.value, f"ibp@{epsilon}_low": found.low, f"ibp@{epsilon}_high": found.high}
    for cost in ("bops", "weight_bytes"):
        reference = reference_cost(cost, layers)
        row[cost] = reference if name == FLOAT else total_cost(cost, layers, space.bitwidths(name))
        row[f"{cost}_percent"] = 100.0 * row[cost] / reference
    return row
