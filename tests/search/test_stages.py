"""A search that is killed and started again ends as if nothing had happened, and computes nothing twice."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe, dump_recipe
from arqsearch.search import pipeline, stages
from arqsearch.search.weights import load_state, state_hash
from arqsearch.search.workspace import Workspace
from tests.search.conftest import silent
from tests.search.tiny import tiny_recipe

EVALUATIONS = 10
POLICIES = ("ddpg", "uniform", "random")

#: `arqsearch search` that kills itself, as by kill -9, at one moment of its progress.
KILLED = """
import os, signal, sys
from arqsearch.recipe import load_recipe
from arqsearch.search import pipeline

recipe, task, moment = sys.argv[1:]

def on_progress(name, done, total, note=""):
    if name == task and done == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)

pipeline.search(load_recipe(recipe), on_progress)
"""
#: Where it is killed, one after the other.
MOMENTS = (("train shared weights", 3), ("spread of reward terms", 7), ("search ddpg", 6), ("search random", 2))


def recipe_in(folder: Path) -> Recipe:
    return tiny_recipe(folder, search={"evaluations": EVALUATIONS, "budget": {"bops": "3%"}, "first_last": None})


def rows(folder: Path) -> list[dict[str, Any]]:
    """The record, in the order of writing."""
    if not (folder / "record.sqlite").is_file():
        return []
    with sqlite3.connect(folder / "record.sqlite") as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM evaluations ORDER BY id")]


def outcome(folder: Path, policy: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "search" / f"{policy}.json").read_text())
    return {key: value for key, value in found.items() if key not in ("computed", "seconds")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[dict[str, Any]]]]:
    """Folder of a run in one go, folder of one that was killed four times, and its record after each kill."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    pipeline.search(recipe_in(whole), silent)
    dump_recipe(recipe_in(killed), killed.parent / "killed.yaml")
    records = []
    for task, moment in MOMENTS:
        command = [sys.executable, "-c", KILLED, str(killed.parent / "killed.yaml"), task, str(moment)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        records.append(rows(killed))
    pipeline.search(recipe_in(killed), silent)
    return whole, killed, [*records, rows(killed)]


Folders = tuple[Path, Path, list[list[dict[str, Any]]]]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_search_ends_with_the_same_history(folders: Folders, policy: str) -> None:
    whole, killed, _ = folders
    expected = outcome(whole, policy)
    assert outcome(killed, policy) == expected
    assert len(expected["history"]) == EVALUATIONS
    rewards = [entry["reward"] for entry in expected["history"]]
    assert expected["best_reward"] == max(rewards)
    assert expected["best"] == expected["history"][rewards.index(max(rewards))]["bitwidths"]
    assert len({json.dumps(entry["bitwidths"]) for entry in expected["history"]}) > 3


def test_weights_and_chosen_bits_are_the_same(folders: Folders) -> None:
    whole, killed, _ = folders
    assert (killed / "search" / "spread.json").read_text() == (whole / "search" / "spread.json").read_text()
    hashes = []
    for folder in (whole, killed):
        net = Workspace(recipe_in(folder)).net()
        load_state(net, folder / "shared.safetensors")
        hashes.append(state_hash(net.state_dict()))
    assert hashes[0] == hashes[1]
    for name in ("found", "uniform", "random"):
        path = Path("networks") / name / "bitwidths.json"
        assert (killed / path).read_text() == (whole / path).read_text()


def test_nothing_is_recorded_or_computed_twice(folders: Folders) -> None:
    whole, killed, records = folders
    for before, after in pairwise(records):
        assert after[: len(before)] == before, "what was written stays, with its time of writing"
    assert [len(record) > 0 for record in records] == [False, True, True, True, True]
    assert len(records[1]) == 8, "the reference and seven configurations, all different"
    final = records[-1]
    keys = ("weights_hash", "bitwidths_hash", "settings_hash", "arithmetic_version", "stage")
    assert len({tuple(row[key] for key in keys) for row in final}) == len(final)
    content = (*keys, "bitwidths", "program_hash", "counts")
    assert [[row[key] for key in content] for row in final] == [[row[key] for key in content] for row in rows(whole)]
    # What the last start computed itself is what the record lacked.
    computed = {
        policy: json.loads((killed / "search" / f"{policy}.json").read_text())["computed"] for policy in POLICIES
    }
    assert computed["random"] == len(final) - len(records[3])


def test_a_finished_search_is_read_not_repeated(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = folders

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a search was started")

    monkeypatch.setattr(stages, "create", refuse)
    recipe = recipe_in(whole)
    before = rows(whole)
    for policy in POLICIES:
        assert stages.run_policy(recipe, policy, silent)["history"] == outcome(whole, policy)["history"]
    assert rows(whole) == before


def test_every_candidate_is_within_budget(folders: Folders) -> None:
    whole, _, _ = folders
    space = Workspace(recipe_in(whole))
    limit = dict(space.budget(space.net()).limits)["bops"]
    for policy in POLICIES:
        costs = [entry["bops"] for entry in outcome(whole, policy)["history"]]
        assert max(costs) <= limit


def test_a_term_that_does_not_vary_ends_the_search(folders: Folders, tmp_path: Path) -> None:
    """A certified accuracy at an enormous ε is 0 for every candidate of this base."""
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    evaluate = recipe_in(copy).evaluate
    interval = evaluate.interval.model_copy(update={"measure": "certified_accuracy", "epsilons": [120]})
    constant = recipe_in(copy).model_copy(update={"evaluate": evaluate.model_copy(update={"interval": interval})})
    with pytest.raises(ArqError, match=r"'interval_accuracy' does not vary.*evaluate\.interval\.weight=0"):
        stages.measure_spread(constant, silent)
    allowed = constant.evaluate.model_copy(update={"allow_constant_term": True})
    found = stages.measure_spread(constant.model_copy(update={"evaluate": allowed}), silent)
    assert found["spread"]["interval_accuracy"] == 0.0 and found["spread"]["smoothed_radius"] > 0.0
    assert len(found["values"]) == stages.SPREAD_CONFIGURATIONS


def test_fine_tuning_before_a_search_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="run `arqsearch search` first"):
        stages.finetune(recipe_in(tmp_path), silent)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": "ddgp"}, "'ddpg'"),
        ({"options": {"nois": 0.1}}, "nois"),
        ({"budget": {"bops": "0.001%"}}, "cannot be met"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_training(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    recipe = tiny_recipe(tmp_path / "run", search=section)
    with pytest.raises(ArqError, match=message):
        pipeline.search(recipe, silent)
    assert not (tmp_path / "run" / "base.safetensors").exists()


def test_facts_of_other_data_are_not_reused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    first = Workspace(recipe).facts
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"holdout": 123})})
    assert Workspace(other).facts["holdout_identity"] != first["holdout_identity"]
    assert Workspace(recipe).facts == first


def test_torchrun_is_refused_where_processes_would_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = tiny_recipe(tmp_path / "run")
    for command in (pipeline.search, pipeline.certify, pipeline.run, pipeline.report):
        with pytest.raises(ArqError, match=r"torchrun for `arqsearch train --what base\|shared\|finetune`"):
            command(settings, silent)
    assert not (tmp_path / "run").exists()


def test_candidates_distil_from_the_base(tmp_path: Path) -> None:
    training = {"epochs": 0.2, "batch_size": 64, "lr": 0.01, "objective": {"smoothing": "distillation"}}
    evaluate = {"mode": "finetune", "training": training, "smoothed": {"images": 20, "samples": 4}}
    settings = tiny_recipe(tmp_path / "run", evaluate=evaluate)
    pipeline.train(settings, silent)
    stages.prepare_weights(settings, silent)
    evaluator = stages.open_evaluator(Workspace(settings))  # Scores W8A8, after its fine-tune.
    assert evaluator.scorer.teacher is not None and not evaluator.scorer.teacher.quantized
    assert evaluator.computed == 1
