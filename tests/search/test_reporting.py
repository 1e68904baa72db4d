"""The report of a run folder: right frames from the files, and a truthful page for an unfinished run."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.summary import holds_at
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.recipe import load_recipe
from arqsearch.search import reporting, statements
from arqsearch.search.reporting import RunFiles
from arqsearch.search.workspace import Workspace
from tests.search.tiny import EVALUATIONS, IMAGES, tiny_recipe

SHOWN = {"uniform": "uniform", "random": "random", "found": "found (ddpg)"}


def space_of(folder: Path) -> Workspace:
    return Workspace(load_recipe(folder).model_copy(update={"run": str(folder)}))


def frame(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "report" / f"{name}.csv")


def remove(folder: Path, *parts: str) -> None:
    for part in parts:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- the frames of a finished run ------------------------------------------------------------


def test_bitwidths_are_those_of_every_network(tiny_run: Path) -> None:
    found = frame(tiny_run, "bitwidths")
    assert found["layer"].tolist() == ["conv1", "conv2", "fc1"]
    assert found["weights"].tolist() == [8 * 1 * 9, 16 * 8 * 9, 64 * 10]
    for name, shown in SHOWN.items():
        bits = BitWidths.from_json((tiny_run / f"networks/{name}/bitwidths.json").read_text())
        assert found[f"{shown}.weight"].tolist() == [pair.weight for _, pair in bits]
        assert found[f"{shown}.activation"].tolist() == [pair.activation for _, pair in bits]


def test_comparison_holds_the_rows_of_the_final_table(tiny_run: Path) -> None:
    found = frame(tiny_run, "comparison").set_index("name")
    assert found.index.tolist() == ["FP32", *SHOWN.values()]
    assert found["kind"].tolist() == ["estimate", "certified", "certified", "certified"]
    for row in json.loads((tiny_run / "comparison.json").read_text()):
        for column in ("clean_accuracy", "certified@0.25", "acr_low", "bops", "weight_bytes_percent"):
            assert found.loc[row["name"], column] == pytest.approx(row[column], abs=1e-12)
    assert found.loc["FP32", "bops_percent"] == 100.0
    assert (found.loc[list(SHOWN.values()), "bops_percent"] <= 3.0).all()


def test_curves_follow_the_certificate_lines_to_the_largest_radius(tiny_run: Path) -> None:
    found = frame(tiny_run, "curves")
    paths = {shown: tiny_run / f"certificates/{name}.jsonl" for name, shown in SHOWN.items()}
    paths["FP32"] = tiny_run / "estimates/float.jsonl"
    lines = {shown: read_lines(path) for shown, path in paths.items()}
    top = max(line.radius for network in lines.values() for line in network if line.correct)
    assert set(found["network"]) == set(lines)
    for shown, part in found.groupby("network"):
        assert len(part) == reporting.CURVE_POINTS
        assert part["radius"].iloc[0] == 0.0 and part["radius"].iloc[-1] == pytest.approx(top, abs=1e-9)
        assert (np.diff(part["accuracy"]) <= 0).all()
        for radius, accuracy in zip(part["radius"], part["accuracy"], strict=True):
            assert accuracy == sum(holds_at(line, radius) for line in lines[str(shown)]) / IMAGES
    assert found[found["radius"] == found["radius"].max()]["accuracy"].max() > 0


def test_history_lists_every_evaluation_with_the_best_so_far(tiny_run: Path) -> None:
    found = frame(tiny_run, "history")
    assert list(dict.fromkeys(found["policy"])) == ["ddpg", "uniform", "random"]
    for policy, part in found.groupby("policy"):
        result = json.loads((tiny_run / f"search/{policy}.json").read_text())
        assert part["evaluation"].tolist() == list(range(1, EVALUATIONS + 1))
        assert part["reward"].tolist() == pytest.approx([entry["reward"] for entry in result["history"]])
        assert part["best_so_far"].tolist() == part["reward"].cummax().tolist()
        assert part["best_so_far"].iloc[-1] == pytest.approx(result["best_reward"])
        assert part["bops"].tolist() == [entry["bops"] for entry in result["history"]]
        margins = [entry["terms"]["interval_margin"] for entry in result["history"]]
        assert part["interval_margin"].tolist() == pytest.approx(margins)


def test_terms_state_reference_and_spread(tiny_run: Path) -> None:
    found = frame(tiny_run, "terms").set_index("term")
    spread = json.loads((tiny_run / "search/spread.json").read_text())
    assert found["weight"].to_dict() == {"smoothed_radius": 1.0, "interval_margin": 0.5}
    for term, row in found.iterrows():
        values = [value[term] for value in spread["values"]]
        assert row["configurations"] == len(values) == 20
        assert row["W8A8 value"] == pytest.approx(spread["reference"][term])
        assert row["std"] == pytest.approx(spread["spread"][term])
        assert [row["min"], row["max"]] == pytest.approx([min(values), max(values)])


# ---- the words -------------------------------------------------------------------------------


def test_page_states_settings_identities_and_the_guarantee(tiny_run: Path) -> None:
    text = (tiny_run / "report.md").read_text()
    line = read_lines(tiny_run / "certificates/found.jsonl")[0]
    program = IntegerProgram.load(tiny_run / "networks/found/program.safetensors")
    for expected in (
        "# cnn_tiny on scikit-learn digits, σ = 0.25, BOPs ≤ 3\N{NO-BREAK SPACE}% of FP32",
        "σ = 0.25 in units of [0,1] pixels: s = 63.75 grey levels",
        "n0 = 20 and n = 200 samples, α = 0.001 per image",
        "first 4 certified, first 20 bounded, first 100 for clean accuracy",
        ", ".join(f"{policy}\N{NO-BREAK SPACE}{EVALUATIONS}" for policy in ("ddpg", "uniform", "random")),
        f"one input code of the found network spans {program.metadata['grey_levels_per_code']:.3g} grey levels",
        f"Program of found (ddpg): `{program.hash}`",
        f"Test data: `{line.data}`",
        "run 0, search 0, certificates 20260101",
        "integer arithmetic 1",
        "with probability at least 99.9 % over the noise samples",
        "independent, uniform random bits",
        "Interval bounds at ε hold without any chance",
        "floating-point row is an estimate",
        f"arqsearch verify {tiny_run}",
    ):
        assert expected in text, expected
    assert "Make it with" not in text and "not been" not in text
    page = (tiny_run / "report.html").read_text()
    assert program.hash in page and "estimate, not certified" in page


def test_writing_again_gives_the_same_bytes(copied_run: Path) -> None:
    path = reporting.write(space_of(copied_run))
    assert path == copied_run / "report.html"
    first = [hashlib.sha256(p.read_bytes()).digest() for p in sorted(copied_run.glob("report*/**/*")) if p.is_file()]
    page = path.read_bytes()
    reporting.write(space_of(copied_run))
    again = [hashlib.sha256(p.read_bytes()).digest() for p in sorted(copied_run.glob("report*/**/*")) if p.is_file()]
    assert (page, first) == (path.read_bytes(), again)


@pytest.mark.parametrize(
    ("bops", "weight_bytes", "words"),
    [
        ("1.62%", None, "BOPs ≤ 1.62\N{NO-BREAK SPACE}% of FP32"),
        ("0.67G", "80k", "BOPs ≤ 0.67G and weight bytes ≤ 80k"),
        (None, 80_000, "weight bytes ≤ 80000"),
        (None, None, "no budget"),
    ],
)
def test_budget_in_words(tmp_path: Path, bops: Any, weight_bytes: Any, words: str) -> None:
    recipe = tiny_recipe(tmp_path, search={"budget": {"bops": bops, "weight_bytes": weight_bytes}})
    assert statements.budget(RunFiles(Workspace(recipe))) == words


def parquet(folder: Path, kind: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, kind)
    folder.mkdir(parents=True)
    images = [{"bytes": content.getvalue(), "path": None}] * 2
    pq.write_table(pa.table({"img": images, "label": [0, 1]}), folder / "test.parquet")
    return folder


def test_cifar_10_read_from_jpegs_gets_its_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(**section: Any) -> str:
        return statements.data_title(RunFiles(Workspace(tiny_recipe(tmp_path, data=section))))

    jpeg, png = parquet(tmp_path / "root/data/cifar10", "JPEG"), parquet(tmp_path / "png", "PNG")
    assert named(name="cifar10", path=str(jpeg)) == "CIFAR-10 (JPEG copy)"
    assert named(name="cifar10", path=str(jpeg / "test.parquet")) == "CIFAR-10 (JPEG copy)"
    assert named(name="cifar10", path=str(png)) == "CIFAR-10"
    assert named(name="cifar10", path=str(tmp_path / "missing")) == "CIFAR-10"
    monkeypatch.setenv("ARQSEARCH_DATA", str(tmp_path / "root"))
    assert named(name="cifar10") == "CIFAR-10 (JPEG copy)"
    (jpeg / "test.parquet").write_bytes(b"damaged")
    assert named(name="cifar10") == "CIFAR-10"
    assert named(name="imagenet", path=str(tmp_path / "root/data/cifar10")) == "ImageNet"
    assert named(name="folder", path=str(tmp_path / "flowers")) == "flowers"
    assert named(name="hf:owner/flowers") == "hf:owner/flowers"


# ---- unfinished runs -------------------------------------------------------------------------

LATER = ("bounds", "certificates", "estimates", "exports", "comparison.json", "report", "report.html", "report.md")


def test_a_run_with_nothing_but_its_recipe(copied_run: Path) -> None:
    remove(copied_run, *LATER, "networks", "search", "data.json", "base.safetensors", "shared.safetensors")
    reporting.write(space_of(copied_run))
    text = (copied_run / "report.md").read_text()
    assert "No network has been compared yet." in text
    assert "No bit-widths have been chosen yet." in text
    assert "Nothing is guaranteed yet." in text
    assert "**Evaluations:** none yet" in text
    assert f"arqsearch search {copied_run}" in text
    assert not list((copied_run / "report").iterdir())
    assert not (copied_run / "data.json").exists()


def test_a_searched_run_shows_costs_and_history_but_no_guarantee(copied_run: Path) -> None:
    remove(copied_run, *LATER)
    for network in (copied_run / "networks").iterdir():
        for name in ("weights.safetensors", "program.safetensors"):
            (network / name).unlink(missing_ok=True)
    reporting.write(space_of(copied_run))
    text = (copied_run / "report.md").read_text()
    assert "There are no certificates yet" in text and "Nothing is guaranteed yet." in text
    comparison = frame(copied_run, "comparison")
    assert comparison["bops"].notna().all() and "acr" not in comparison.columns
    assert len(frame(copied_run, "history")) == 3 * EVALUATIONS
    assert not (copied_run / "report/curves.csv").exists()


def test_a_partly_certified_run_names_what_is_missing(copied_run: Path) -> None:
    remove(copied_run, "bounds/random.json", "certificates/random.jsonl", "estimates")
    path = copied_run / "certificates/found.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:3]))
    reporting.write(space_of(copied_run))
    assert set(frame(copied_run, "curves")["network"]) == {"uniform", "found (ddpg)"}
    comparison = frame(copied_run, "comparison").set_index("name")
    assert comparison["images"].dropna().to_dict() == {"uniform": 4, "found (ddpg)": 3}
    assert comparison.loc["random", "bops"] > 0
    text = (copied_run / "report.md").read_text()
    assert "found (ddpg): 3 of 4 images are done" in text
    assert "Certified are the integer programs of uniform, found (ddpg)," in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match=r"There is no run in .*; `arqsearch run RECIPE` makes one"):
        reporting.write(Workspace(tiny_recipe(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_damaged_files_are_named(copied_run: Path) -> None:
    path = copied_run / "search/uniform.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArqError, match=r"search/uniform\.json is damaged"):
        reporting.write(space_of(copied_run))
    remove(copied_run, "search/uniform.json")
    (copied_run / "bounds/random.json").write_text("[1]")
    with pytest.raises(ArqError, match=r"bounds/random\.json is damaged"):
        reporting.write(space_of(copied_run))
    remove(copied_run, "bounds/random.json")
    path = copied_run / "certificates/found.jsonl"
    path.write_text(path.read_text().replace('"radius":0', '"radius":1', 1))
    with pytest.raises(ArqError, match=r"found\.jsonl, line 1 was altered"):
        reporting.write(space_of(copied_run))
