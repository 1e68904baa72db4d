"""The zoo: every listed file is there and is what the index says; commands take ``zoo:NAME`` wherever a file fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from arqsearch import models, zoo
from arqsearch.certify.noise import NoiseTable
from arqsearch.cli import app
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.recipe import parse_recipe
from arqsearch.search.program_export import export_program
from arqsearch.search.workspace import Workspace
from arqsearch.zoo.add import add

#: All files together, so that the package stays small.
MOST_BYTES = 8_000_000


def test_every_entry_is_what_the_index_says() -> None:
    assert sum(entry.path.stat().st_size for entry in zoo.entries()) < MOST_BYTES
    for entry in zoo.entries():
        assert zoo.find(entry.name, entry.kind).sha256 == zoo.file_sha256(entry.path)
        assert entry.measured, f"{entry.name}: nothing measured"
        if entry.kind == "program":
            assert IntegerProgram.load(entry.path).hash == entry.program_hash
        else:
            models.load_weights(models.build(entry.model, 10), entry.path)
    listed = {path.name for path in zoo.FOLDER.glob("*.safetensors")}
    assert listed == {entry.file for entry in zoo.entries()}


@pytest.fixture
def own_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty zoo in a scratch folder, with a tiny base and its program put in."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for module in ("arqsearch.zoo", "arqsearch.zoo.add"):
        monkeypatch.setattr(f"{module}.FOLDER", folder)
        monkeypatch.setattr(f"{module}.INDEX", folder / "index.json")
    zoo.entries.cache_clear()
    torch.manual_seed(0)
    model = models.build("cnn_tiny", 10, **models.image_options("cnn_tiny", (8, 8, 1)))
    net = QuantizedNet(model, (1, 8, 8), (0.3,), (0.4,), QuantizeSettings())
    net.calibrate([torch.randint(0, 256, (16, 1, 8, 8)).float()])
    program = lower(net.eval(), noise_limit=NoiseTable.for_sigma(0.1).hi, metadata={"sigma": 0.1})
    program.save(tmp_path / "program.safetensors")
    models.save_weights(model, tmp_path / "base.safetensors")
    facts = {"model": "cnn_tiny", "data": "digits", "recipe": "test", "sigma": 0.1, "measured": {"accuracy": "none"}}
    add(tmp_path / "program.safetensors", "tiny-program", **facts)  # type: ignore[arg-type]
    add(tmp_path / "base.safetensors", "tiny-base", **facts)  # type: ignore[arg-type]
    yield folder
    zoo.entries.cache_clear()


def test_names_are_found_and_wrong_ones_explained(own_zoo: Path, tmp_path: Path) -> None:
    assert [entry.kind for entry in zoo.entries()] == ["base", "program"]
    assert zoo.resolve("zoo:tiny-base", "base") == own_zoo / "tiny-base.safetensors"
    assert zoo.resolve("some/file.safetensors", "base") == Path("some/file.safetensors")
    with pytest.raises(ArqError, match=r"no integer program named 'tiny-progam'.*tiny-program"):
        zoo.find("zoo:tiny-progam", "program")
    with pytest.raises(ArqError, match="no base weights named 'tiny-program'"):
        zoo.find("tiny-program", "base")
    weights = Workspace(parse_recipe({"run": str(tmp_path / "run")})).find_weights("zoo:tiny-base")
    assert weights == own_zoo / "tiny-base.safetensors"


def test_an_altered_file_is_refused(own_zoo: Path) -> None:
    path = own_zoo / "tiny-base.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArqError, match="altered"):
        zoo.find("tiny-base")


def test_get_copies_and_never_overwrites_another_file(own_zoo: Path, tmp_path: Path) -> None:
    copy = zoo.get("tiny-program", tmp_path)
    assert IntegerProgram.load(copy).hash == zoo.find("tiny-program").program_hash
    assert zoo.get("tiny-program", tmp_path) == copy
    copy.write_text("mine")
    with pytest.raises(ArqError, match="another file"):
        zoo.get("tiny-program", tmp_path)
    assert copy.read_text() == "mine"


def test_commands_take_a_program_of_the_zoo(own_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    listed = json.loads(run(app, ["zoo", "list", "--json"]).output)
    assert set(listed) == {"tiny-base", "tiny-program"} and listed["tiny-base"]["accuracy"] == "none"
    arguments = [
        "certify",
        "zoo:tiny-program",
        "--data",
        "digits",
        "--images",
        "2",
        "--rule",
        "sequential",
        "--radii",
        "0.05",
        "--json",
    ]
    certified = run(app, arguments)
    assert certified.exit_code == 0, certified.output
    assert (tmp_path / "tiny-program.jsonl").is_file()
    bounded = run(
        app,
        [
            "verify-robustness",
            "zoo:tiny-program",
            "--data",
            "digits",
            "--images",
            "2",
            "--eps",
            "1",
            "--boxes-only",
            "--json",
        ],
    )
    assert bounded.exit_code == 0, bounded.output
    assert (tmp_path / "tiny-program.robustness.jsonl").is_file(), "written beside the user, not into the package"
    exported = run(app, ["export", "zoo:tiny-program", "--format", "onnx", "--json"])
    assert exported.exit_code == 0, exported.output
    folder = Path(json.loads(exported.output)["files"][0]["path"]).parent
    verified = run(app, ["verify", str(folder), "--json"])
    assert verified.exit_code == 0, verified.output


def test_a_program_alone_exports_what_it_can(own_zoo: Path, tmp_path: Path) -> None:
    package = export_program("zoo:tiny-program", "c", tmp_path / "out")
    assert {Path(item["path"]).name for item in package["files"]} >= {"model.c", "smoothing.c"}
    assert (tmp_path / "out" / "c" / "model.c").is_file()
    with pytest.raises(ArqError, match="run folder"):
        export_program("zoo:tiny-program", "config")
    with pytest.raises(ArqError, match="onnx"):
        export_program("zoo:tiny-program", "onx")
