"""The C package in a run: exported with the run's own settings, checked by `verify`, and verified without the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arqsearch.certify.certificate import read_lines
from arqsearch.cli import app
from arqsearch.errors import ArqError
from arqsearch.export import c_matrix
from arqsearch.export.c_package import PACKAGE_DIR, PROGRAM_FILE, package_defines
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import load_recipe
from arqsearch.search import delivery
from tests.export.toolchains import need
from tests.search.tiny import changed_program


@pytest.fixture(scope="module")
def exported_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the C package of the network that was found; not to be changed."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("exported") / "run"))
    recipe = load_recipe(folder).model_copy(update={"run": str(folder)})
    delivery.export(recipe, "found", ["c"])
    return folder


@pytest.fixture
def exported(exported_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(exported_run, tmp_path / "copy"))


def test_export_states_files_and_sizes(copied_run: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(copied_run), "--format", "c", "--json"])
    assert done.exit_code == 0, done.output
    found, folder = json.loads(done.output), copied_run / "exports/found/c"
    program = IntegerProgram.load(copied_run / "networks/found/program.safetensors")
    assert found["program_hash"] == program.hash == IntegerProgram.load(folder / PROGRAM_FILE).hash
    assert {Path(entry["path"]).name for entry in found["files"]} == {
        "README.md", "model.c", "smoothing.c", "test_vectors.c"
    }  # fmt: skip
    assert all(entry["bytes"] == Path(entry["path"]).stat().st_size > 0 for entry in found["files"])
    assert found["c"]["arena bytes"] == package_defines(folder)["ARENA_BYTES"] > 0
    assert Path(found["c"]["folder"]) == folder


def test_package_certifies_with_the_settings_of_the_run(exported: Path) -> None:
    line = read_lines(exported / "certificates/found.jsonl")[0]
    text = (exported / "exports/found/c/smoothing.c").read_text()
    assert f"UINT64_C({line.seed}), {line.n0}u, {line.n}u, " in text


def test_verify_of_the_run_builds_the_package(exported: Path) -> None:
    need("gcc portable")
    checked = {(c["check"], c["network"]): c["result"] for c in delivery.verify(str(exported), 1)["checks"]}
    assert checked["C package", "found"] == (
        "files are those of a fresh export; gcc portable: 66 images run, all 660 logits equal"
    )


@pytest.mark.parametrize("name", ["arq_model.c", "model.c", "cortex_m3/startup.c"])
def test_verify_of_the_run_finds_an_altered_file(exported: Path, name: str) -> None:
    path = exported / "exports/found" / PACKAGE_DIR / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ArqError, match=f"{name} is missing, altered or made by another version; export it again"):
        delivery.verify(str(exported), 1)


def test_verify_without_a_compiler_still_compares_the_files(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_matrix, "missing", lambda chain: "install gcc (Debian packages)")
    checked = {c["check"]: c["result"] for c in delivery.verify(str(exported), 1)["checks"]}
    assert checked["C package"].endswith("gcc portable: not run: install gcc (Debian packages)")


def test_export_folder_is_verified_without_its_run(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("gcc portable")
    chain = c_matrix.TOOLCHAINS["gcc portable"]
    monkeypatch.setattr(c_matrix, "TOOLCHAINS", {chain.name: chain})
    alone = Path(shutil.copytree(exported / "exports/found", tmp_path / "alone"))
    done = CliRunner().invoke(app, ["verify", str(alone), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    results = {row["backend"]: row["result"] for row in found["matrix"]}
    assert results["C package, gcc portable"] == results["strict ONNX"] == results["torch (reference)"] == "equal"
    changed_program(IntegerProgram.load(alone / PROGRAM_FILE)).save(alone / PROGRAM_FILE)
    with pytest.raises(ArqError, match=r"model\.c does not state program"):
        delivery.verify(str(alone), 1)
