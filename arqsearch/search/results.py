"""The final table: one row for each compared network, from the files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.summary import Share, share, summarize
from arqsearch.errors import ArqError
from arqsearch.quantize.cost import LayerInfo, known_costs, reference_cost, total_cost
from arqsearch.quantize.cost.layers import RELATIVE
from arqsearch.search.stages import FLOAT, FOUND, compared
from arqsearch.search.workspace import Workspace


def display_name(space: Workspace, name: str) -> str:
    """What a network is called in tables."""
    return {FLOAT: "FP32", FOUND: f"found ({space.recipe.search.policy})"}.get(name, name)


def read_json(path: Path, command: str) -> dict[str, Any]:
    """A JSON object of the run folder.

    :param command: the command that makes the file, named when it is damaged.
    :raises ArqError: when it is no JSON object.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ArqError(f"{path} is damaged ({error}); delete it and run `arqsearch {command}` again.") from error


def comparison_rows(space: Workspace) -> list[dict[str, Any]]:
    """Rows of clean accuracy, certified accuracy at radii, ACR, interval accuracy and cost, as far as they are made.

    ``acr`` is there for the rule ``fixed`` only; other rules give ``acr_bound``, which is below it. ``undecided@r``
    counts images that the cap left open at r, ``expected_wrong`` is α times the estimated images. Accuracies are
    fractions with 95 % Clopper-Pearson ends over the images; the float network's row is an
    estimate by the same protocol, not a certificate.
    """
    layers = space.layer_infos(space.net())
    rows = [_row(space, name, layers) for name in compared(space.recipe)]
    return [row for row in rows if len(row) > 2]  # More than its name and kind.


def _row(space: Workspace, name: str, layers: tuple[LayerInfo, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": display_name(space, name), "kind": "estimate" if name == FLOAT else "certified"}
    row |= _bounds(space.bounds_path(name)) | _certificates(space.certificate_path(name), space.recipe.certify.radii)
    known = name == FLOAT or (space.network_dir(name) / "bitwidths.json").is_file()
    for cost in known_costs(layers) if known else ():
        if cost in RELATIVE:
            reference = reference_cost(cost, layers)
            row[cost] = reference if name == FLOAT else total_cost(cost, layers, space.bitwidths(name))
            row[f"{cost}_percent"] = 100.0 * row[cost] / reference
        elif name != FLOAT:  # Facts of the integer engine.
            row[cost] = total_cost(cost, layers, space.bitwidths(name))
    return row


def _interval(column: str, found: Share) -> dict[str, float]:
    return {column: found.value, f"{column}_low": found.low, f"{column}_high": found.high}


def _certificates(path: Path, radii: Sequence[float]) -> dict[str, Any]:
    lines = read_lines(path) if path.is_file() else []
    if not lines:
        return {}
    summary = summarize(lines, radii)
    row: dict[str, Any] = {}
    for radius, found in summary.accuracy.items():
        row |= _interval(f"certified@{radius:g}", found)
    row |= {f"undecided@{radius:g}": count for radius, count in summary.undecided.items()}
    acr = "acr_bound" if summary.acr_is_lower_bound else "acr"
    row |= {acr: summary.acr, f"{acr}_low": summary.acr_low, f"{acr}_high": summary.acr_high}
    return row | {
        "n": summary.n, "images": summary.images, "abstained": summary.abstained, "rule": summary.rule,
        "mean_samples": summary.mean_samples, "expected_wrong": summary.expected_wrong,
    }  # fmt: skip


def _bounds(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    bounds = read_json(path, "certify")
    row = _interval("clean_accuracy", share(bounds["clean"]["correct"], bounds["clean"]["images"]))
    row["clean_images"] = bounds["clean"]["images"]
    for epsilon, verdicts in bounds.get("interval", {"robust": {}})["robust"].items():
        row |= _interval(f"ibp@{epsilon}", share(sum(verdicts), len(verdicts)))
    return row
