"""A whole run under constraints, a floor that no certificate meets, and two objectives: what is kept, what is said."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arqsearch.certify.certificate import read_lines
from arqsearch.errors import ArqError
from arqsearch.integer.native import compile_program
from arqsearch.integer.native.engine import native_available
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.recipe import Recipe
from arqsearch.search import delivery, pipeline, profile_command, require_settle, stages
from arqsearch.search.certification import load_program
from arqsearch.search.workspace import Workspace
from tests.search.conftest import silent
from tests.search.tiny import tiny_recipe

pytestmark = pytest.mark.skipif(not native_available(), reason="the native engine is not built")
BUDGET = {"bops": "4%", "peak_activation_bytes": "64k", "latency": "1s"}


def recipe_in(folder: Path, **changes: Any) -> Recipe:
    search = {
        "policy": "random", "compare": ["uniform"], "evaluations": 16, "budget": BUDGET, "bits": [2, 4, 8],
        "first_last": None, "freeze": {"conv1": [8, 4]}, "require": "certified@0.25 >= 30% and ibp@1 >= 5%",
        "attempts": 2, "objectives": ["bops", "certified"], "front_points": 1,
    }  # fmt: skip
    smoothed = {"images": 40, "samples": 16}
    evaluate = {"training": {"epochs": 1, "batch_size": 64}, "smoothed": smoothed, "interval": {"weight": 0.5}}
    # So much decay that fine-tuning ruins what the search found: the estimates meet the floor, no certificate does.
    ruinous = {"epochs": 1, "batch_size": 64, "lr": 0.01, "weight_decay": 20.0, "objective": {"smoothing": "gaussian"}}
    return tiny_recipe(folder, search=search | changes, evaluate=evaluate, finetune=ruinous)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run and what the command printed."""
    folder = tmp_path_factory.mktemp("constrained") / "run"
    recipe = recipe_in(folder)
    assert profile_command.profile(recipe, None, 1, silent)["weights"] == "fresh"
    return folder, pipeline.run(recipe, silent)


Finished = tuple[Path, dict[str, Any]]


def candidates(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads((folder / "search" / f"{policy}.json").read_text()) for policy in ("random", "uniform")]
    return [entry for result in found for entry in result["history"]]


def test_every_candidate_keeps_constraints_and_budgets(finished: Finished) -> None:
    folder, _ = finished
    space = Workspace(recipe_in(folder))
    limits = dict(space.budget(space.net()).limits)
    assert set(limits) == set(BUDGET)
    for entry in candidates(folder):
        assert entry["bitwidths"]["conv1"] == [8, 4]
        assert {bits for pair in entry["bitwidths"].values() for bits in pair} <= {2, 4, 8}
        assert all(entry[name] <= limit for name, limit in limits.items())


def test_the_planned_memory_is_that_of_the_shipped_program(finished: Finished) -> None:
    folder, _ = finished
    space = Workspace(recipe_in(folder))
    stated = {entry["peak_activation_bytes"] for entry in candidates(folder)}
    assert stated == {compile_program(load_program(space, "found")).peak_activation_bytes}


def test_the_front_is_what_no_candidate_dominates(finished: Finished) -> None:
    folder, _ = finished
    points = json.loads((folder / "search" / "front.json").read_text())["points"]
    name = "estimated certified@0.25"
    tried = {(entry["bops"], entry["terms"][name]) for entry in candidates(folder)}
    best = {p for p in tried if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in tried)}
    assert {(point["bops"], point[name]) for point in points} == best
    assert all(point[f"{name}_low"] <= point[name] <= point[f"{name}_high"] for point in points)
    with (folder / "search" / "front.csv").open() as file:
        assert [row["network"] for row in csv.DictReader(file)] == [point["network"] for point in points]


def test_chosen_points_are_certified_like_every_network(finished: Finished) -> None:
    folder, outcome = finished
    recipe = recipe_in(folder)
    names = stages.compared(recipe)
    assert names == ["float", "uniform", *(n for n in ("front-1",) if n in names), "tried-1", "found"]
    shown = {row["network"]: row for row in outcome["networks"]}
    for name in set(names) - {"float", "uniform", "found"}:
        assert shown[name]["kind"] == "certified"
        assert len(read_lines(Workspace(recipe).certificate_path(name))) == recipe.certify.images


def test_a_missed_floor_is_said_with_every_candidate_that_was_tried(finished: Finished) -> None:
    folder, outcome = finished
    state = json.loads((folder / "search" / "requirement.json").read_text())
    assert state["met"] is False and state["certified"] == 2 and len(state["attempts"]) == 1
    assert "NOT met" in outcome["requirement"] and "The floor was not met" in outcome["requirement"]
    assert "2 candidates were certified one after the other" in outcome["requirement"]
    assert state["judged"]["floors"][0]["confidence"] == pytest.approx(0.975)
    space = Workspace(recipe_in(folder))
    tried, found = (read_lines(space.certificate_path(name)) for name in ("tried-1", "found"))
    assert {line.seed for line in tried}.isdisjoint({line.seed for line in found})
    assert state["attempts"][0]["cost"] < state["judged"]["cost"]
    for path, text in ((folder / "report.md", "The floor was not met"), (folder / "report.md", "## Trade-off")):
        assert text in path.read_text()
    assert (folder / "report" / "front.png").is_file() and (folder / "report" / "front.csv").is_file()


def test_the_run_verifies_and_goes_on_without_doing_anything(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    outcome = pipeline.certify(recipe_in(folder), silent)
    assert outcome["requirement"] == finished[1]["requirement"]
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    checked = delivery.verify(str(folder), images=1)
    assert {"tried-1", "found"} <= {check["network"] for check in checked["checks"]}


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_while_a_candidate_is_set_aside_loses_nothing(finished: Finished, tmp_path: Path, moved: int) -> None:
    """The state before the last write, after some of the files were moved; then the same command again."""
    folder = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    recipe = recipe_in(folder)
    state = json.loads((folder / "search" / "requirement.json").read_text())
    first = state["attempts"][0]
    # The second candidate was never begun: only the first one's files are there, not yet or partly moved.
    (folder / "search" / "requirement.json").write_text(
        json.dumps({key: state[key] for key in ("require", "minimise", "confidence", "attempts")})
    )
    paths = ("certificates/{}.jsonl", "bounds/{}.json", "networks/{}/weights.safetensors",
             "networks/{}/program.safetensors")  # fmt: skip
    for number, path in enumerate(paths):
        (folder / path.format("found")).unlink()
        if number >= moved:
            (folder / path.format("tried-1")).rename(folder / path.format("found"))
    (folder / "networks" / "found" / "bitwidths.json").write_text(json.dumps(first["bitwidths"]))
    require_settle.resume(recipe)
    for path in paths:
        name = path.format("tried-1")
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes()
        assert not (folder / path.format("found")).is_file()
    found = json.loads((folder / "networks" / "found" / "bitwidths.json").read_text())
    assert found == first["next"]


def test_the_next_candidate_is_dearer_and_more_robust_by_the_estimate(finished: Finished) -> None:
    folder, _ = finished
    state = json.loads((folder / "search" / "requirement.json").read_text())
    first = state["attempts"][0]
    terms = {json.dumps(entry["bitwidths"]): entry for entry in candidates(folder)}
    chosen, before = terms[json.dumps(first["next"])], terms[json.dumps(first["bitwidths"])]
    names = ("estimated certified@0.25", "estimated ibp@1")

    def worst(entry: dict[str, Any]) -> float:
        return min(float(entry["terms"][name]) for name in names)

    assert chosen["bops"] > before["bops"] and worst(chosen) > worst(before)
    between = [e for e in terms.values() if before["bops"] < e["bops"] < chosen["bops"]]
    assert all(worst(entry) <= worst(before) for entry in between)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": {"peak_activation_bytes": 10}}, "whatever its bits are"),
        ({"budget": {"latency": "1ns"}}, "latency <= 0.0 us cannot be met: the smallest assignment needs"),
        ({"latency_table": "absent.json"}, "No latency table at absent.json"),
        ({"freeze": {"conv9": [8, 8]}}, "no layer matches 'conv9'"),
        ({"group": [["conv1", "conv2"]]}, "'conv1', which search.freeze"),
        ({"objectives": ["bops"]}, "has no trade-off"),
        ({"objectives": ["bops", "speed"]}, "no objective 'speed'"),
        ({"require": "certified@3 >= 10%"}, "No image can be certified at r = 3"),
    ],
)
def test_what_a_search_would_refuse_is_refused_before_training(
    finished: Finished, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    shutil.copy(finished[0] / "latency.json", tmp_path / "latency.json")
    with pytest.raises(ArqError, match=says):
        stages.check_search(recipe_in(tmp_path, **changes))
    assert not (tmp_path / "base.safetensors").exists()


def test_a_group_is_kept_by_the_shared_training_and_the_search(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, search={"policy": "random", "compare": [], "evaluations": 4, "first_last": None,
                          "group": [["conv*"]], "budget": {"bops": None}}
    )  # fmt: skip
    chosen = pipeline.search(recipe, silent)["bitwidths"]["found"]
    history = json.loads((tmp_path / "search" / "random.json").read_text())["history"]
    for entry in [{"bitwidths": json.loads(chosen)}, *history]:
        bits = BitWidths.from_json(json.dumps(entry["bitwidths"]))
        convolutions = [bits[name] for name in bits.names if name.startswith("conv")]
        assert len(convolutions) > 1 and all(a == b for a, b in pairwise(convolutions))
