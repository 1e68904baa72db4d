"""The trade-off of a run: the candidates of all its searches that no other one dominates, and which are certified.

Every point has the estimate that the search saw, with its interval over the held-out images. Points that are fine-tuned
and certified besides become compared networks, ``front-1`` from the cheap end on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from arqsearch.envs.evaluator import Evaluation
from arqsearch.policies.front import front
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import known_costs, total_cost
from arqsearch.recipe import Recipe
from arqsearch.search.require import ESTIMATED
from arqsearch.search.require_problem import constrained, front_path, objectives
from arqsearch.search.stages import FRONT, open_evaluator, write_json
from arqsearch.search.workspace import Workspace


def write_front(recipe: Recipe, chosen: Mapping[str, BitWidths]) -> list[dict[str, Any]]:
    """Write ``search/front.json`` and ``front.csv``, and the bit-widths of the points that are to be certified.

    :param chosen: networks that are certified anyway.
    :returns: the points, from the smallest first objective on.
    """
    space = Workspace(recipe)
    evaluator = constrained(space, open_evaluator(space, racing=False))
    costs = known_costs(evaluator.layers)
    named = objectives(recipe, costs)
    points = front(histories(space), named, evaluator.layers)
    selected = spread([p for p in points if p.bitwidths not in chosen.values()], recipe.search.front_points)
    rows: list[dict[str, Any]] = []
    for point in points:
        known = [name for name, bitwidths in chosen.items() if bitwidths == point.bitwidths]
        row: dict[str, Any] = {"network": known[-1] if known else ""}
        if point in selected:
            row["network"] = f"{FRONT}{selected.index(point) + 1}"
            write_json(space.network_dir(row["network"]) / "bitwidths.json", json.loads(point.bitwidths.to_json()))
        row |= {cost: total_cost(cost, evaluator.layers, point.bitwidths) for cost in costs}
        row |= {"reward": point.reward, **{k: v for k, v in point.terms.items() if not k.startswith(ESTIMATED)}}
        for name, estimate in evaluator.estimates(point.bitwidths).items():
            column = ESTIMATED + name
            row |= {column: estimate.value, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
        rows.append(row | {"bitwidths": json.loads(point.bitwidths.to_json())})
    write_json(front_path(space.dir), {"objectives": list(named), "points": rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"bitwidths": json.dumps(row["bitwidths"])} for row in rows)
    front_path(space.dir).with_suffix(".csv").write_text(text.getvalue())
    return rows


def histories(space: Workspace) -> list[Evaluation]:
    """Evaluations of every policy of the run, in the order of policies and evaluations."""
    section = space.recipe.search
    found = []
    for policy in dict.fromkeys([section.policy, *section.compare]):
        for entry in json.loads(space.search_path(policy).read_text())["history"]:
            bitwidths = BitWidths.from_json(json.dumps(entry["bitwidths"]))
            found.append(Evaluation(bitwidths, entry["reward"], entry["terms"]))
    return found


def spread(points: Sequence[Evaluation], count: int) -> list[Evaluation]:
    """Both ends of a front and points evenly between.

    :param points: the front in order.
    :param count: how many at most.
    """
    last, count = len(points) - 1, min(count, len(points))
    if count <= 1:
        return [points[last // 2]] if count == 1 else []
    return [points[place] for place in dict.fromkeys(round(i * last / (count - 1)) for i in range(count))]
