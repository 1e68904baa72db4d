"""What the report says of a run's trade-off and of its floor: estimates beside the certified figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from arqsearch.quantize.cost import COSTS
from arqsearch.search.require import ESTIMATED
from arqsearch.search.require_problem import front_path, requirement_path
from arqsearch.search.results import comparison_rows, display_name
from arqsearch.search.stages import FLOAT, compared
from arqsearch.search.workspace import Workspace

if TYPE_CHECKING:
    from arqsearch.search.reporting import RunFiles


def front_parts(files: RunFiles, space: Workspace) -> dict[str, Any]:
    """The fields of the report's content that are about the trade-off and the floor, as far as they are made."""
    section, parts = space.recipe.search, {}
    if section.require is not None:
        parts["reward_label"] = f"reward: minus the share of {section.minimise}, below -1 where the floor is missed"
        path = requirement_path(space.dir)
        parts["requirement"] = json.loads(path.read_text()).get("statement", "") if path.is_file() else ""
    if section.objectives and files.layers and front_path(space.dir).is_file():
        front = json.loads(front_path(space.dir).read_text())
        parts |= front_frame(space, front["objectives"], front["points"])
    return parts


def front_frame(space: Workspace, objectives: list[str], points: list[dict[str, Any]]) -> dict[str, Any]:
    """The frame of the trade-off: the front's points, then the other certified networks.

    The first cost among the objectives is drawn against the first other one.

    :param objectives: as the search knew them.
    :param points: of ``search/front.json``.
    """
    cost = next((name for name in objectives if name in COSTS), "bops")
    value = next((name for name in objectives if name not in COSTS), "reward")
    measure = value.removeprefix(ESTIMATED)
    certified = {}
    if value.startswith(ESTIMATED):
        by_name = {row["name"]: row for row in comparison_rows(space)}
        names = {name: display_name(space, name) for name in compared(space.recipe) if name != FLOAT}
        column = "acr_bound" if measure == "acr" and all("acr" not in row for row in by_name.values()) else measure
        found = {name: by_name.get(shown, {}) for name, shown in names.items()}
        certified = {name: (row, column) for name, row in found.items() if column in row and cost in row}
    scale = 1e-3 if cost == "latency" else 1
    rows = []
    for point in points:
        row: dict[str, Any] = {"network": "", "cost": point[cost] * scale, "estimate": point[value]}
        row |= {f"estimate_{end}": point.get(f"{value}_{end}") for end in ("low", "high")}
        if point["network"] in certified:
            row |= _certified(space, point["network"], *certified.pop(point["network"]))
        rows.append(row)
    for name, (row, column) in certified.items():
        rows.append({"cost": row[cost] * scale, **_certified(space, name, row, column)})
    columns = ["network", "cost", "estimate", "estimate_low", "estimate_high", "certified", "certified_low",
               "certified_high"]  # fmt: skip
    frame = pd.DataFrame(rows).reindex(columns=columns)
    frame[columns[1:]] = frame[columns[1:]].astype(float)
    return {"front": frame, "front_labels": ("latency, us" if cost == "latency" else cost.replace("_", " "), measure)}


def _certified(space: Workspace, name: str, row: dict[str, Any], column: str) -> dict[str, Any]:
    ends = {f"certified_{end}": row.get(f"{column}_{end}") for end in ("low", "high")}
    return {"network": display_name(space, name), "certified": row[column], **ends}
