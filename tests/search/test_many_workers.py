"""A run on several workers, with either executor, leaves the files of a run on one: histories, tables, certificates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from arqsearch.certify.certificate import read_lines
from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe
from arqsearch.search import certification, stages
from tests.search.conftest import silent
from tests.search.tiny import NETWORKS, tiny_recipe

KINDS = [
    ("local", 2),
    pytest.param("local", 4, marks=pytest.mark.slow),
    pytest.param("ray", 1, marks=pytest.mark.slow),
    pytest.param("ray", 2, marks=pytest.mark.slow),
    pytest.param("ray", 4, marks=pytest.mark.slow),
]


def recipe_for(folder: Path, executor: str, workers: int) -> Recipe:
    if executor == "ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'arqsearch[ray]'")
    return tiny_recipe(folder, executor=executor, workers=workers)


def part_of(run: Path, folder: Path, *names: str) -> Path:
    """A new run folder with some parts of a finished one."""
    for name in names:
        if (run / name).is_dir():
            shutil.copytree(run / name, folder / name)
        else:
            shutil.copy(run / name, folder / name)
    return folder


def history(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in ("computed", "seconds")}


@pytest.mark.parametrize(("executor", "workers"), KINDS)
def test_a_search_has_the_same_history(executor: str, workers: int, tiny_run: Path, tmp_path: Path) -> None:
    folder = part_of(tiny_run, tmp_path, "base.safetensors", "shared.safetensors", "data.json")
    stages.search(recipe_for(folder, executor, workers), silent)
    files = sorted(path.name for path in (tiny_run / "search").glob("*.json"))
    assert files == sorted(path.name for path in (folder / "search").glob("*.json")) and len(files) == 4
    for name in files:
        assert history(folder / "search" / name) == history(tiny_run / "search" / name), name
    for name in NETWORKS:
        bits = Path("networks") / name / "bitwidths.json"
        assert (folder / bits).read_bytes() == (tiny_run / bits).read_bytes()


@pytest.mark.parametrize(("executor", "workers"), KINDS)
def test_certificates_have_the_same_bytes(executor: str, workers: int, tiny_run: Path, tmp_path: Path) -> None:
    folder = part_of(tiny_run, tmp_path, "networks", "data.json", "search")
    rows = certification.certify(recipe_for(folder, executor, workers), silent)
    assert rows == json.loads((tiny_run / "comparison.json").read_text())
    files = [path.relative_to(tiny_run) for kind in ("certificates", "estimates", "bounds")
             for path in sorted((tiny_run / kind).iterdir())]  # fmt: skip
    assert len(files) == 3 + 1 + 4
    for file in files:
        assert (folder / file).read_bytes() == (tiny_run / file).read_bytes(), file


def test_certification_goes_on_where_it_was_stopped(tiny_run: Path, tmp_path: Path) -> None:
    """Two lines, in another order, and a cut one: the rest is added, by two workers, and the file is the same."""
    folder = part_of(tiny_run, tmp_path, "networks", "data.json", "search", "certificates", "estimates", "bounds")
    file = Path("certificates") / "found.jsonl"
    whole = (tiny_run / file).read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    (folder / file).write_bytes(lines[2] + lines[0] + lines[1][:50])
    updates: list[tuple[str, int, int]] = []
    certification.certify(
        recipe_for(folder, "local", 2), lambda task, done, total, note="": updates.append((task, done, total))
    )
    assert (folder / file).read_bytes() == whole
    assert updates == [("certify found", 3, 4), ("certify found", 4, 4)], "nothing else was computed"


def test_a_certificate_file_of_other_settings_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    folder = part_of(tiny_run, tmp_path, "networks", "data.json", "search", "certificates", "estimates")
    recipe = recipe_for(folder, "local", 1)
    other = recipe.model_copy(update={"certify": recipe.certify.model_copy(update={"alpha": 0.01})})
    before = (folder / "certificates" / "found.jsonl").read_bytes()
    with pytest.raises(ArqError, match=r"alpha"):
        certification.certify(other, silent)
    assert (folder / "certificates" / "found.jsonl").read_bytes() == before
    assert len(read_lines(folder / "certificates" / "found.jsonl")) == 4
