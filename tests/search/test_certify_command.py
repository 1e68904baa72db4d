"""`arqsearch certify`, `merge` and `verify` on a run, on one of its networks, and on a program alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arqsearch.certify.base import PROVENANCE
from arqsearch.certify.binomial import certified_radius
from arqsearch.certify.certificate import read_lines
from arqsearch.certify.noise import SEARCH
from arqsearch.cli import app
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import load_recipe
from arqsearch.search import delivery
from tests.search.tiny import IMAGES, NETWORKS


def command(*arguments: object) -> dict[str, Any]:
    """What a command prints with --json."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def refused(*arguments: object) -> str:
    """Why a command refuses."""
    with pytest.raises(ArqError) as caught:
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return str(caught.value)


@pytest.fixture
def program(tiny_run: Path, tmp_path: Path) -> Path:
    """An integer program, far from the run that made it."""
    return Path(shutil.copy(tiny_run / "networks/found/program.safetensors", tmp_path / "mine.safetensors"))


# ---- a program alone -------------------------------------------------------------------------


def test_a_program_alone_is_certified_and_verified(program: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--rule", "sequential", "--radii", "0.1,0.25", "--cap", 400, "--images", 5)
    found = command("certify", program, *options)
    path = tmp_path / "mine.jsonl"
    lines = read_lines(path)
    assert found["certificates"] == str(path) and found["rule"] == "sequential" and found["images"] == 5 == len(lines)
    assert found["program"] == IntegerProgram.load(program).hash == lines[0].program
    assert {"certified at r = 0.25", "undecided at r = 0.25", "ACR, a lower bound"} <= set(found)
    assert found["expected wrong certificates, at most"] == pytest.approx(0.001 * sum(x.estimated for x in lines))
    assert lines[0].sequential is not None and lines[0].sequential.radii == (0.1, 0.25) and lines[0].n == 400
    checked = command("verify", path, "--program", program, "--data", "digits", "--images", 0)
    assert checked["checks"][0]["result"] == "lines hold, 5 recomputed with equal counts and radius"
    assert "Name it: --program FILE" in refused("verify", path, "--data", "digits")
    assert "Name it: --data NAME" in refused("verify", path, "--program", program)
    assert "--program and --data" in refused("verify", path)
    other = program.parent / "other.safetensors"
    loaded = IntegerProgram.load(program)
    IntegerProgram(loaded.ops, loaded.tensors, loaded.output - 1, loaded.metadata).save(other)
    assert f"the line is about program {found['program']}, this is" in refused(
        "verify", path, "--program", other, "--data", "digits"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Which data set? Name it: --data"),
        (("--data", "digts"), "Did you mean 'digits'?"),
        (("--data", "digits", "--rule", "sequentail"), "certify.rule: Input should be 'fixed'"),
        (("--data", "digits", "--radii", "0.1;0.2"), "write them as --radii 0.25,0.5"),
        (("--data", "digits", "--shard", "3/2"), "write i/n"),
        (("--data", "digits", "--rule", "incremental"), "--base CERT"),
        (("--data", "digits", "--alpha", "0.7"), "certify.alpha"),
        (("--data", "digits", "certify.imges=3"), "Did you mean 'images'?"),
    ],
)
def test_wrong_options_are_explained(program: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("certify", program, *options)


def test_shards_of_a_program_merge_to_the_unsharded_file(program: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--n", 150, "--images", 7, "--every", 3)
    whole = Path(command("certify", program, *options, "--output", tmp_path / "whole.jsonl")["certificates"])
    assert [line.image for line in read_lines(whole)] == list(range(0, 21, 3))
    parts = [
        command("certify", program, *options, "--output", tmp_path / "part.jsonl", "--shard", f"{number}/3")
        for number in (2, 3, 1)
    ]
    files = [part["certificates"] for part in parts]
    assert files[0] == str(tmp_path / "part.shard-2-of-3.jsonl")
    done = command("merge", *files, "--output", tmp_path / "merged.jsonl")
    assert done == {"merged": str(tmp_path / "merged.jsonl"), "images": 7, "missing images": [], "missing shards": []}
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.read_bytes()
    partly = command("merge", files[0], files[2], "-o", tmp_path / "partly.jsonl", "--images", 7, "--every", 3)
    assert (partly["missing images"], partly["missing shards"]) == ([6, 15], [3])


# ---- a run -----------------------------------------------------------------------------------


def test_programs_of_a_run_state_the_noise_that_made_them(tiny_run: Path) -> None:
    seed = load_recipe(tiny_run).seed
    for name in NETWORKS:
        metadata = IntegerProgram.load(tiny_run / f"networks/{name}/program.safetensors").metadata
        assert metadata[PROVENANCE] == [[seed, SEARCH]]


def test_a_run_is_certified_by_another_rule(copied_run: Path) -> None:
    assert "was begun with rule 'fixed', now 'sequential'" in refused("certify", copied_run, "--rule", "sequential")
    shutil.rmtree(copied_run / "certificates")
    shutil.rmtree(copied_run / "estimates")
    found = command(
        "certify", copied_run, "--rule", "sequential", "--radii", "0.05,0.2", "--cap", 300, "--target", "label"
    )
    rows = {row["network"]: row for row in found["networks"]}
    assert {"r≥0.05", "r≥0.2", "open r=0.05", "ACR ≥"} <= set(rows["found (ddpg)"]) and "ACR" not in rows["FP32"]
    for name in NETWORKS:
        lines = read_lines(copied_run / f"certificates/{name}.jsonl")
        assert len(lines) == IMAGES and all(line.n0 == 0 and line.predicted == line.label for line in lines)
    assert rows["FP32"]["kind"] == "estimate"
    assert read_lines(copied_run / "estimates/float.jsonl")[0].rule == "sequential"
    assert delivery.verify(str(copied_run), 0)["verified"] is True
    CliRunner().invoke(app, ["report", str(copied_run)], catch_exceptions=False)
    text = (copied_run / "report.md").read_text()
    for expected in (
        "rule sequential, the label is tested, up to 300 samples to decide r = 0.05, 0.2, α = 0.001 per image",
        "Undecided at r = 0.2", "ACR, lower bound", "Wrong certificates", "Undecided images are not certified.",
        "at most 0.012 of all certificates of this table",
    ):  # fmt: skip
        assert expected in text, expected


def test_one_network_is_certified_from_another_one(copied_run: Path, tmp_path: Path) -> None:
    base, output = copied_run / "certificates/uniform.jsonl", tmp_path / "near.jsonl"
    options = ("--rule", "incremental", "--base", base, "--shared", 100)
    before = (copied_run / "recipe.yaml").read_bytes()
    found = command("certify", copied_run, "--network", "found", *options, "--output", output)
    assert found["certificates"] == str(output) and found["rule"] == "incremental" and found["images"] == IMAGES
    assert (copied_run / "recipe.yaml").read_bytes() == before
    lines, bases = read_lines(output), {line.image: line for line in read_lines(base)}
    for line in lines:
        assert line.incremental is not None and line.incremental.base == bases[line.image].program
        assert line.incremental.base_votes == (bases[line.image].votes if line.estimated else 0)
        assert line.radius <= bases[line.image].radius
    programs = [copied_run / f"networks/{name}/program.safetensors" for name in ("found", "uniform")]
    known = ("--data", "digits", "--program", programs[0], "--base", base, "--images", 0)
    assert command("verify", output, *known)["verified"]
    assert command("verify", output, *known, "--base-program", programs[1])["verified"]
    assert "--base CERT" in refused("verify", output, *known[:4])
    message = refused("certify", copied_run, "--network", "uniform", *options)
    assert "write the new ones elsewhere (--output FILE)" in message
    # Votes of the base network that contradict nothing in themselves, but are not what it answers.
    index = next(i for i, line in enumerate(lines) if line.estimated)
    texts, honest = base.read_text().splitlines(), bases[lines[index].image]
    votes = {**honest.estimate, honest.predicted: honest.votes - 1}
    other = next(name for name in range(10) if name != honest.predicted)
    votes[other] = votes.get(other, 0) + 1
    radius = certified_radius(honest.votes - 1, honest.n, honest.sigma, honest.alpha, honest.d_tau)
    lie = replace(honest, estimate=votes, certified=radius is not None, radius=float(radius or 0))
    assert lie.problems() == []
    base.write_text("\n".join(lie.to_json() if text == honest.to_json() else text for text in texts) + "\n")
    assert "estimate is" in refused("verify", output, *known)


def test_a_program_that_does_not_say_what_made_it_is_not_certified_incrementally(
    copied_run: Path, tmp_path: Path
) -> None:
    loaded = IntegerProgram.load(copied_run / "networks/found/program.safetensors")
    silent = {key: value for key, value in loaded.metadata.items() if key != PROVENANCE}
    IntegerProgram(loaded.ops, loaded.tensors, loaded.output, silent).save(tmp_path / "silent.safetensors")
    options = ("--data", "digits", "--rule", "incremental", "--base", copied_run / "certificates/uniform.jsonl")
    assert "does not say which noise" in refused("certify", tmp_path / "silent.safetensors", *options)


def test_the_float_network_is_not_certified(copied_run: Path) -> None:
    assert "no integer program of 'float'" in refused("certify", copied_run, "--network", "float")
