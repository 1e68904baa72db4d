"""From the files of a run folder to its report; what was not made yet is left out and named as missing."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.summary import holds_at
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.cost import LayerInfo
from arqsearch.report import ReportContent, write_report
from arqsearch.search import robustness_report, statements
from arqsearch.search import terms as reward_terms
from arqsearch.search.certification import load_program
from arqsearch.search.front_report import front_parts
from arqsearch.search.results import comparison_rows, display_name, read_json
from arqsearch.search.stages import compared
from arqsearch.search.workspace import Workspace

#: Radii at which the curves are drawn, from 0 to the largest certified one.
CURVE_POINTS = 61


def write(space: Workspace) -> Path:
    """Write ``report.html``, ``report.md`` and ``report/`` of a run folder.

    :returns: path of the HTML page.
    :raises ArqError: when the folder holds no run, or a file in it is damaged.
    """
    if not (space.dir / "recipe.yaml").is_file():
        raise ArqError(f"There is no run in {space.dir}; `arqsearch run RECIPE` makes one.")
    files = RunFiles(space)
    content = ReportContent(
        title=statements.title(files),
        summary=statements.summary(files),
        bitwidths=bitwidths(files),
        comparison=pd.DataFrame(comparison_rows(space)) if files.layers else pd.DataFrame(),
        curves=curves(files),
        history=history(files),
        terms=terms(files),
        **front_parts(files, space),
        robustness=robustness_report.accuracy(space, files.names),
        broken=robustness_report.examples(space, files.names),
        guarantee=statements.guarantee(files),
        notes=statements.notes(files),
        provenance=statements.provenance(files),
    )
    return write_report(space.dir, content)


class RunFiles:
    """What a run folder holds so far, read once.

    :param space: the run.
    """

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.recipe = space.recipe
        self.names = compared(space.recipe)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Class count, image shape and data identity; empty before the first stage saw the data."""
        return self.space.facts if (self.space.dir / "data.json").is_file() else {}

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer; empty before the first stage saw the data."""
        return self.space.net().layer_infos if self.facts else ()

    @cached_property
    def lines(self) -> dict[str, list[CertificateLine]]:
        """Certificate lines (for the float network, estimates) of each network that has some."""
        paths = {name: self.space.certificate_path(name) for name in self.names}
        found = {name: read_lines(path) for name, path in paths.items() if path.is_file()}
        return {name: lines for name, lines in found.items() if lines}

    @cached_property
    def bounds(self) -> dict[str, dict[str, Any]]:
        """Clean accuracy and interval verdicts of each network that has some."""
        paths = {name: self.space.bounds_path(name) for name in self.names}
        return {name: read_json(path, "certify") for name, path in paths.items() if path.is_file()}

    @cached_property
    def searches(self) -> dict[str, dict[str, Any]]:
        """The finished search of each policy."""
        section = self.recipe.search
        paths = {policy: self.space.search_path(policy) for policy in dict.fromkeys([section.policy, *section.compare])}
        return {policy: read_json(path, "search") for policy, path in paths.items() if path.is_file()}

    @cached_property
    def spread(self) -> dict[str, Any]:
        """Reward terms of random configurations; empty before the search."""
        path = self.space.dir / "search" / "spread.json"
        return read_json(path, "search") if path.is_file() else {}

    @cached_property
    def programs(self) -> dict[str, IntegerProgram]:
        """The lowered program of each quantized network that has one."""
        made = [name for name in self.names if (self.space.network_dir(name) / "program.safetensors").is_file()]
        return {name: load_program(self.space, name) for name in made}


def bitwidths(files: RunFiles) -> pd.DataFrame:
    """One row for each layer: size and the bits of every quantized network."""
    space = files.space
    chosen = {
        display_name(space, name): space.bitwidths(name)
        for name in files.names
        if (space.network_dir(name) / "bitwidths.json").is_file()
    }
    rows = []
    for layer in files.layers:
        row: dict[str, Any] = {"layer": layer.name, "macs": layer.macs, "weights": layer.weights}
        for name, bits in chosen.items():
            row |= {f"{name}.weight": bits[layer.name].weight, f"{name}.activation": bits[layer.name].activation}
        rows.append(row)
    return pd.DataFrame(rows)


def curves(files: RunFiles) -> pd.DataFrame:
    """Certified accuracy of each network on a grid of radii, in [0,1] pixels."""
    top = max((line.radius for lines in files.lines.values() for line in lines if line.correct), default=0.0)
    # Six decimals, rounded down: the grid on which radii are stored, so that the last point is `top` itself.
    radii = np.floor(np.linspace(0.0, top, CURVE_POINTS) * 1e6 + 1e-3) / 1e6
    rows = [
        {
            "network": display_name(files.space, name),
            "radius": float(radius),
            "accuracy": sum(holds_at(line, float(radius)) for line in lines) / len(lines),
        }
        for name, lines in files.lines.items()
        for radius in radii
    ]
    return pd.DataFrame(rows)


def history(files: RunFiles) -> pd.DataFrame:
    """One row for each evaluation of each policy."""
    rows = []
    for policy, result in files.searches.items():
        best = -np.inf
        for number, entry in enumerate(result["history"], 1):
            best = max(best, entry["reward"])
            row = {"policy": policy, "evaluation": number, "reward": entry["reward"], "best_so_far": best}
            rows.append(row | entry["terms"] | {"bops": entry["bops"], "weight_bytes": entry["weight_bytes"]})
    return pd.DataFrame(rows)


def terms(files: RunFiles) -> pd.DataFrame:
    """One row for each reward term: its value for the W8A8 network and its spread over random configurations."""
    if not files.spread:
        return pd.DataFrame()
    weights, rows = reward_terms.weights(files.recipe.evaluate), []
    for name, reference in files.spread["reference"].items():
        values = np.array([found[name] for found in files.spread["values"]])
        row = {"term": name, "weight": weights.get(name), "W8A8 value": reference, "configurations": len(values)}
        spread = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        rows.append(row | {key: float(value) for key, value in spread.items()})
    return pd.DataFrame(rows)
