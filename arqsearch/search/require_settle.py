"""After certification: does the certified figure meet the floor, and if not, which candidate is next?

A candidate whose certificates fall short is set aside as ``tried-N``, with its certificates, and the next one takes the
place of ``found``: the cheapest one of the searches' front that costs more and is more robust by the estimate. It is
certified on fresh noise. How many candidates were certified is stated, and intervals are widened for it (Bonferroni).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import norm

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.summary import summarize
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import format_cost, total_cost
from arqsearch.recipe import Recipe
from arqsearch.search.require import Floor, Requirement
from arqsearch.search.require_estimates import lower_bound
from arqsearch.search.require_problem import constrained, requirement_path
from arqsearch.search.stages import FOUND, TRIED, open_evaluator, write_json
from arqsearch.search.workspace import Workspace

CONFIDENCE = 0.95


def settle(recipe: Recipe) -> bool:
    """Judge the certified candidate and write ``search/requirement.json``; prepare the next one where it falls short.

    :returns: whether another candidate is to be fine-tuned and certified now.
    """
    if recipe.search.require is None:
        return False
    space = Workspace(recipe)
    state = read_state(space)
    found = space.bitwidths(FOUND)
    attempt = verdict(space, found, len(state["attempts"]) + 1)
    following = None if attempt["met"] else _next(space, [*state["attempts"], attempt])
    if following is None or len(state["attempts"]) + 1 >= recipe.search.attempts:
        done = [*state["attempts"], attempt]
        write_json(
            requirement_path(space.dir),
            {**state, "judged": attempt, "met": attempt["met"], "certified": len(done), "statement": statement(done)},
        )
        return False
    state["attempts"].append({**attempt, "next": json.loads(following.to_json())})
    write_json(requirement_path(space.dir), state)
    _set_aside(space, state)
    return True


def read_state(space: Workspace) -> dict[str, Any]:
    """What is known of a run's requirement; `attempts` are the candidates that were set aside."""
    path = requirement_path(space.dir)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    section = space.recipe.search
    return {"require": section.require, "minimise": section.minimise, "confidence": section.confidence, "attempts": []}


def resume(recipe: Recipe) -> None:
    """Finish setting a candidate aside where a kill left it half done."""
    space = Workspace(recipe)
    if recipe.search.require is None or not requirement_path(space.dir).is_file():
        return
    state = read_state(space)
    if state["attempts"] and json.loads(space.bitwidths(FOUND).to_json()) == state["attempts"][-1]["bitwidths"]:
        _set_aside(space, state)


def _set_aside(space: Workspace, state: dict[str, Any]) -> None:
    number, last = len(state["attempts"]), state["attempts"][-1]
    name = f"{TRIED}{number}"
    folder = space.network_dir(FOUND)
    if (folder / "program.safetensors").is_file():
        kept = space.network_dir(name)
        kept.mkdir(parents=True, exist_ok=True)
        write_json(kept / "bitwidths.json", last["bitwidths"])
        for source, target in (
            (space.certificate_path(FOUND), space.certificate_path(name)),
            (space.bounds_path(FOUND), space.bounds_path(name)),
            (folder / "weights.safetensors", kept / "weights.safetensors"),
            (folder / "program.safetensors", kept / "program.safetensors"),
        ):
            if source.is_file():
                source.replace(target)
    # Last of all: until now the same call starts over.
    write_json(folder / "bitwidths.json", last["next"])


def verdict(space: Workspace, bitwidths: BitWidths, candidates: int) -> dict[str, Any]:
    """The certified figures of ``found`` against the floors.

    :param candidates: how many were certified so far, this one included.
    """
    section = space.recipe.search
    layers = space.layer_infos(space.net())
    requirement = Requirement.parse(section.require or "")
    figures = [_figure(space, floor, candidates) for floor in requirement.floors]
    cost = total_cost(section.minimise, layers, bitwidths)
    return {
        "bitwidths": json.loads(bitwidths.to_json()),
        "cost": cost,
        "cost_text": f"{section.minimise} {format_cost(section.minimise, cost, layers)}",
        "floors": figures,
        "met": all(figure["met"] for figure in figures),
    }


def _figure(space: Workspace, floor: Floor, candidates: int) -> dict[str, Any]:
    """A certified figure with its two-sided interval, widened for the number of candidates."""
    confidence = 1 - (1 - CONFIDENCE) / candidates
    measure, side = floor.measure, (1 - confidence) / 2
    if measure.kind == "acr":
        summary = summarize(read_lines(space.certificate_path(FOUND)), [])
        value, images = summary.acr, summary.images
        wide = (summary.acr_high - summary.acr) / 1.96 * float(norm.ppf(1 - side))
        low, high = max(0.0, value - wide), value + wide
    else:
        if measure.kind == "certified":
            summary = summarize(read_lines(space.certificate_path(FOUND)), [measure.at])
            count, images = summary.accuracy[measure.at].count, summary.images
        else:
            verdicts = json.loads(space.bounds_path(FOUND).read_text())["interval"]["robust"][str(int(measure.at))]
            count, images = sum(verdicts), len(verdicts)
        value = count / images
        low, high = lower_bound(count, images, 1 - side), 1 - lower_bound(images - count, images, 1 - side)
    return {
        "floor": floor.text, "measure": measure.name, "value": value, "low": low, "high": high, "images": images,
        "confidence": confidence, "met": value >= floor.value, "clear": low >= floor.value,
    }  # fmt: skip


def _next(space: Workspace, tried: list[dict[str, Any]]) -> BitWidths | None:
    """The cheapest evaluated candidate that costs more than the last one and is more robust by the estimate."""
    evaluator = constrained(space, open_evaluator(space, racing=False))
    requirement, section = evaluator.requirement, space.recipe.search
    assert requirement is not None

    def margin(bitwidths: BitWidths) -> float:
        return requirement.margin(evaluator.estimates(bitwidths))

    last = BitWidths.from_json(json.dumps(tried[-1]["bitwidths"]))
    before = margin(last)
    dearer = {
        bitwidths: cost
        for bitwidths in evaluated(space)
        if (cost := total_cost(section.minimise, evaluator.layers, bitwidths)) > tried[-1]["cost"]
    }
    for bitwidths in sorted(dearer, key=lambda b: (dearer[b], b.to_json())):
        if margin(bitwidths) > before:
            return bitwidths
    return None


def evaluated(space: Workspace) -> Iterable[BitWidths]:
    """Every candidate that a policy of the run evaluated, each once."""
    section = space.recipe.search
    seen: dict[BitWidths, None] = {}
    for policy in dict.fromkeys([section.policy, *section.compare]):
        path: Path = space.search_path(policy)
        if path.is_file():
            for entry in json.loads(path.read_text())["history"]:
                seen[BitWidths.from_json(json.dumps(entry["bitwidths"]))] = None
    return seen


def statement(attempts: list[dict[str, Any]]) -> str:
    """The verdict in words: every floor with its certified figure, and how many candidates were certified for it."""
    last, parts = attempts[-1], []
    for figure in last["floors"]:
        shown = "{:.4g}" if figure["measure"] == "acr" else "{:.1%}"
        value, low, high = (shown.format(figure[key]) for key in ("value", "low", "high"))
        word = "met" if figure["met"] else "NOT met"
        if figure["met"] and not figure["clear"]:
            word = "met on these images, though the interval reaches below it"
        parts.append(
            f"{figure['floor']}: {word}, {value} certified on {figure['images']} test images "
            f"({100 * figure['confidence']:.3g}% interval {low} to {high})"
        )
    count = len(attempts)
    how = (
        "The first candidate was certified."
        if count == 1
        else f"{count} candidates were certified one after the other, each on fresh noise and the same images; the "
        f"interval allows for {count} looks."
    )
    tail = "" if last["met"] else " The floor was not met; the network shown is the last one tried."
    return f"{'; '.join(parts)}. Cost: {last['cost_text']}. {how}{tail}"


def certificate_recipes(recipe: Recipe, names: Sequence[str]) -> list[tuple[Recipe, list[str]]]:
    """Networks with the recipe that each is certified by: fresh noise for every candidate after the first.

    :param names: compared networks.
    """
    path = requirement_path(recipe.run_dir)
    tried = 0
    if recipe.search.require is not None and path.is_file():
        tried = len(json.loads(path.read_text())["attempts"])
    groups: dict[int, list[str]] = {}
    for name in names:
        number = tried if name == FOUND else int(name.removeprefix(TRIED)) - 1 if name.startswith(TRIED) else 0
        groups.setdefault(number, []).append(name)
    seeds = {number: recipe.certify.model_copy(update={"seed": recipe.certify.seed + number}) for number in groups}
    return [(recipe.model_copy(update={"certify": seeds[number]}), names) for number, names in groups.items()]
