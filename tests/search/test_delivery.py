"""Export of a finished network, and `verify`: it accepts a true run and refuses every altered one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.line import CertificateLine
from arqsearch.errors import ArqError
from arqsearch.export.onnx_qdq import run_qdq
from arqsearch.export.onnx_strict import export_strict, run_strict
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import Recipe, load_recipe
from arqsearch.search import delivery
from arqsearch.search.certification import load_program
from arqsearch.search.checks import onnx_pixels
from arqsearch.search.workspace import Workspace
from tests.search.tiny import IMAGES, NETWORKS, changed_program, tiny_recipe


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(folder).model_copy(update={"run": str(folder)})


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- export ----------------------------------------------------------------------------------


def test_export_writes_every_format_of_any_network(copied_run: Path) -> None:
    recipe = recipe_of(copied_run)
    program = IntegerProgram.load(copied_run / "networks/uniform/program.safetensors")
    found = delivery.export(recipe, "uniform", ["onnx", "qdq", "config"])
    assert (found["network"], found["program_hash"]) == ("uniform", program.hash)
    folder = copied_run / "exports/uniform"
    listed = [(entry["format"], Path(entry["path"])) for entry in found["files"]]
    assert listed == [
        ("onnx", folder / "strict.onnx"),
        ("qdq", folder / "qdq.onnx"),
        ("config", folder / "config.json"),
        ("config", folder / "base.safetensors"),
    ]
    assert all(entry["bytes"] == Path(entry["path"]).stat().st_size > 0 for entry in found["files"])
    pixels = onnx_pixels(program, Workspace(recipe))
    logits = program.run(pixels).numpy()
    assert np.array_equal(run_strict(folder / "strict.onnx", pixels), logits)
    assert (run_qdq(folder / "qdq.onnx", pixels).argmax(1) == logits.argmax(1)).mean() > 0.9
    checked = {(c["check"], c["network"]) for c in delivery.verify(str(copied_run), 1)["checks"]}
    assert {("strict ONNX", "uniform"), ("config", "uniform")} <= checked


@pytest.mark.parametrize(
    ("network", "formats", "message"),
    [
        ("found", ["onx"], "No export format 'onx'. Did you mean 'onnx'?"),
        ("fund", ["onnx"], "No compared network 'fund'. Did you mean 'found'?"),
        ("float", ["onnx"], "The float network has no integer program. Valid choices: found, random, uniform."),
    ],
)
def test_export_refuses_unknown_names(tiny_run: Path, network: str, formats: list[str], message: str) -> None:
    with pytest.raises(ArqError) as caught:
        delivery.export(recipe_of(tiny_run), network, formats)
    assert str(caught.value) == message


def test_export_of_an_unfinished_run_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="run `arqsearch certify"):
        delivery.export(tiny_recipe(tmp_path), "found", ["onnx"])


@pytest.mark.parametrize("format", ["qdq", "config"])
def test_export_refuses_weights_that_are_not_those_of_the_program(copied_run: Path, format: str) -> None:
    path = copied_run / "networks/found/weights.safetensors"
    state = load_file(path)
    save_file({**state, "layers.conv1.layer.weight": -state["layers.conv1.layer.weight"]}, path)
    with pytest.raises(ArqError, match="lower to program"):
        delivery.export(recipe_of(copied_run), "found", [format])


# ---- verify: what holds ----------------------------------------------------------------------


def test_verify_checks_every_claim_of_a_run(tiny_run: Path) -> None:
    found = delivery.verify(str(tiny_run), 0)
    assert found["verified"] is True
    checked = {(c["check"], c["network"]): (c["items"], c["result"]) for c in found["checks"]}
    expected = {("certificates", "float"), ("strict ONNX", "found"), ("config", "found")}
    kinds = ("certificates", "bounds", "budget")
    assert set(checked) == expected | {(check, name) for check in kinds for name in NETWORKS}
    for name in NETWORKS:
        assert checked["certificates", name] == (
            IMAGES,
            f"lines hold, {IMAGES} recomputed with equal counts and radius",
        )
        assert checked["bounds", name][0] == 20
    assert checked["certificates", "float"] == (IMAGES, "lines consistent; an estimate, so not recomputed")
    assert checked["strict ONNX", "found"] == (
        66,
        "images run by onnxruntime, all 660 logits equal; same graph as a fresh export",
    )


def test_verify_of_one_certificate_checks_that_file_alone(tiny_run: Path) -> None:
    found = delivery.verify(str(tiny_run / "certificates/uniform.jsonl"), 2)
    result = "lines hold, 2 recomputed with equal counts and radius"
    assert found["checks"] == [{"check": "certificates", "network": "uniform", "items": IMAGES, "result": result}]


def test_verify_finds_a_certificate_by_a_relative_path(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_run / "certificates")
    assert delivery.verify("found.jsonl", 1)["verified"] is True


def test_pixels_for_the_onnx_reach_both_ends_of_the_proven_range(tiny_run: Path) -> None:
    program = IntegerProgram.load(tiny_run / "networks/found/program.safetensors")
    pixels = onnx_pixels(program, Workspace(recipe_of(tiny_run)))
    assert pixels.shape == (66, *program.input.shape) and pixels.dtype == np.int16
    assert (pixels.min(), pixels.max()) == (program.input.lo, program.input.hi)
    assert len(np.unique(pixels[:-2])) > 200


# ---- verify: what does not hold --------------------------------------------------------------


def forge(path: Path, change: Callable[[CertificateLine], CertificateLine]) -> None:
    """Alter the last line of a certificate file and give it a valid digest."""
    lines = read_lines(path)
    lines[-1] = change(lines[-1])
    path.write_text("".join(line.to_json() + "\n" for line in lines))


def other_counts(line: CertificateLine) -> CertificateLine:
    """A line that contradicts nothing within itself: one vote moved, class and radius as its counts give."""
    wrong = next(name for name in range(10) if name != line.predicted)
    estimate = {line.predicted: line.votes - 1, wrong: line.estimate.get(wrong, 0) + 1}
    estimate |= {name: count for name, count in line.estimate.items() if name not in estimate}
    radius = next(r for r in np.arange(int(line.radius * 1e6), -1, -1) / 1e6 if not fits(line, estimate, r).problems())
    return fits(line, estimate, float(radius))


def fits(line: CertificateLine, estimate: dict[int, int], radius: float) -> CertificateLine:
    return dataclasses.replace(line, estimate=estimate, radius=float(radius))


def raise_radius(line: CertificateLine) -> CertificateLine:
    return dataclasses.replace(line, radius=line.radius + 0.1)


def other_program(line: CertificateLine) -> CertificateLine:
    return dataclasses.replace(line, program="0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raise_radius, "its counts give radius"),
        (other_counts, "recomputed"),
        (other_program, "the line is about program 0000"),
    ],
)
def test_forged_certificates_are_refused(
    copied_run: Path, change: Callable[[CertificateLine], CertificateLine], message: str
) -> None:
    path = copied_run / "certificates/found.jsonl"
    forge(path, change)
    for target in (copied_run, path):
        with pytest.raises(ArqError, match=message) as caught:
            delivery.verify(str(target), 0)
        assert str(path) in str(caught.value)


def test_a_flipped_byte_of_a_certificate_is_refused(copied_run: Path) -> None:
    path = copied_run / "certificates/found.jsonl"
    flip(path, path.read_bytes().index(b'"radius":0.') + len('"radius":0.'))
    with pytest.raises(ArqError, match=r"found\.jsonl, line 1 was altered"):
        delivery.verify(str(copied_run), 1)


def test_a_flipped_byte_of_the_estimates_is_refused(copied_run: Path) -> None:
    path = copied_run / "estimates/float.jsonl"
    flip(path, path.read_bytes().index(b'"select":{') + len('"select":{"'))
    with pytest.raises(ArqError, match=r"float\.jsonl, line 1"):
        delivery.verify(str(copied_run), 1)


def test_flipped_weights_in_the_strict_onnx_are_refused(copied_run: Path) -> None:
    import onnx

    path = copied_run / "exports/found/strict.onnx"
    original = path.read_bytes()
    arrays = {tuple(t.dims): t.raw_data for t in onnx.load(str(path)).graph.initializer}
    for shape in ((8, 1, 3, 3), (16, 8, 3, 3), (64, 10)):
        path.write_bytes(original)
        flip(path, original.index(arrays[shape]) + len(arrays[shape]) // 2, bit=6)
        with pytest.raises(ArqError, match="of 660 logits differ from those of"):
            delivery.verify(str(copied_run), 1)


def test_a_change_that_no_image_shows_is_refused(copied_run: Path) -> None:
    """The last bit of a requantization multiplier."""
    import onnx

    path = copied_run / "exports/found/strict.onnx"
    wide = [t for t in onnx.load(str(path)).graph.initializer if t.data_type == onnx.TensorProto.INT64]
    multipliers = next(t.raw_data for t in wide if tuple(t.dims) == (1, 8, 1, 1))
    flip(path, path.read_bytes().index(multipliers))
    with pytest.raises(ArqError, match="its graph is not that of an export"):
        delivery.verify(str(copied_run), 1)


def test_a_strict_onnx_of_another_program_is_refused(copied_run: Path) -> None:
    program = load_program(Workspace(recipe_of(copied_run)), "found")
    export_strict(changed_program(program), copied_run / "exports/found/strict.onnx")
    with pytest.raises(ArqError, match=r"states program .* export it again with `arqsearch export"):
        delivery.verify(str(copied_run), 1)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_no_damage_to_the_strict_onnx_ends_in_another_error(copied_run: Path, part: float) -> None:
    path = copied_run / "exports/found/strict.onnx"
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ArqError, match=r"strict\.onnx"):
        delivery.verify(str(copied_run), 1)


@pytest.mark.parametrize("place", ["first weight", "last byte", "hash", "header"])
def test_a_flipped_byte_of_the_program_is_refused(copied_run: Path, place: str) -> None:
    path = copied_run / "networks/found/program.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    flip(path, {"first weight": start, "last byte": -1, "hash": data.index(b'hash\\": \\"') + 10, "header": 9}[place])
    with pytest.raises(ArqError, match=r"program\.safetensors (was altered|is not an integer program)"):
        delivery.verify(str(copied_run), 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"weight_bits": 8', '"weight_bits": 7', "must agree"),
        ('"noise_limit": ', '"noise_limit": 1', "was altered: its bits, scales and settings give program"),
        ('"bops": ', '"bops": 1', "was altered: costs.bops"),
        ('"weight_bits"', '"weight_bit"', "weight_bit"),
        ("{", "[", "config.json"),
    ],
)
def test_an_altered_config_is_refused(copied_run: Path, old: str, new: str, message: str) -> None:
    rewrite(copied_run / "exports/found/config.json", old, new)
    with pytest.raises(ArqError, match=message):
        delivery.verify(str(copied_run), 1)


def test_an_altered_base_of_the_config_is_refused(copied_run: Path) -> None:
    flip(copied_run / "exports/found/base.safetensors", -5)
    with pytest.raises(ArqError, match="is not the base of this config"):
        delivery.verify(str(copied_run), 1)


def test_altered_bounds_are_refused(copied_run: Path) -> None:
    path = copied_run / "bounds/found.json"
    stated = json.loads(path.read_text())
    stated["interval"]["robust"]["4"] = [1 - verdict for verdict in stated["interval"]["robust"]["4"]]
    stated["clean"]["correct"] += 1
    path.write_text(json.dumps(stated))
    with pytest.raises(ArqError) as caught:
        delivery.verify(str(copied_run), 1)
    assert "at ε = 4: its verdict is not the one recomputed" in str(caught.value)
    assert "clean accuracy: " in str(caught.value)
    path.write_text("{")
    with pytest.raises(ArqError, match=r"bounds/found\.json is damaged"):
        delivery.verify(str(copied_run), 1)


def test_every_difference_is_listed_at_once(copied_run: Path) -> None:
    for name in NETWORKS:
        forge(copied_run / f"certificates/{name}.jsonl", raise_radius)
    rewrite(copied_run / "exports/found/config.json", '"weight_bits": 8', '"weight_bits": 7')
    with pytest.raises(ArqError) as caught:
        delivery.verify(str(copied_run), 1)
    assert all(f"{name}.jsonl" in str(caught.value) for name in NETWORKS) and "config.json" in str(caught.value)


# ---- verify: what is not there ---------------------------------------------------------------


def test_nothing_to_verify_names_the_command(copied_run: Path) -> None:
    for part in ("certificates", "estimates", "bounds", "exports", "networks"):
        shutil.rmtree(copied_run / part)
    with pytest.raises(ArqError, match=f"nothing to verify in .*; run `arqsearch certify {copied_run}` first"):
        delivery.verify(str(copied_run), 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("certificates/fond.jsonl", r"is no certificate file of this run. Did you mean '.*certificates/found.jsonl'"),
        ("found.jsonl", "is no run folder"),
        ("networks", "is no run folder"),
        ("missing", "No recipe at"),
    ],
)
def test_paths_that_are_no_run_are_refused(tiny_run: Path, path: str, message: str) -> None:
    with pytest.raises(ArqError, match=message):
        delivery.verify(str(tiny_run / path), 1)


def test_a_negative_number_of_images_is_refused(tiny_run: Path) -> None:
    with pytest.raises(ArqError, match="give a number from 1, or 0 for all"):
        delivery.verify(str(tiny_run), -1)
