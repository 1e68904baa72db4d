"""`bench certify-speed`: the figures follow from what was run, on a network that takes no time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from arqsearch import data, models
from arqsearch.benchmarks import certify_speed as speed
from arqsearch.benchmarks.cli import app
from arqsearch.certify.noise import NoiseTable
from arqsearch.integer.lowering import lower
from arqsearch.integer.native.engine import native_available
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.training import to_pixels

needs_engine = pytest.mark.skipif(not native_available(), reason="the native engine is not built")


@pytest.fixture(scope="module")
def item() -> speed.Subject:
    torch.manual_seed(0)
    digits = data.load("digits", "test").subset(np.arange(6))
    model = models.build("cnn_small", 10, **models.image_options("cnn_small", (8, 8, 1)))
    net = QuantizedNet(model, (1, 8, 8), (0.3,), (0.4,), QuantizeSettings())
    net.calibrate([to_pixels(digits.images)])
    program = lower(net.eval(), noise_limit=NoiseTable.for_sigma(0.1).hi)
    network = speed._Normalized(model.eval(), net.mean / 255, net.std / 255)
    return speed.Subject(0.1, "digits", digits, network, program)


def silent(task: str, done: int, total: int, note: str) -> None:
    assert 0 <= done <= total


@needs_engine
def test_figures_follow_from_lines_and_rates(item: speed.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "N", 2000)
    monkeypatch.setattr(speed, "CAPS", {"sequential": 2000, "sequential10k": 200})
    found = speed.measure(item, 3, silent, full=False)
    seconds, rates = found["seconds"], found["samples_per_second"]
    assert seconds["cohen (rate)"] == pytest.approx(6 * 2100 / rates["cohen"], rel=0.01)
    assert found["sequential_vs_cohen"] == pytest.approx(seconds["cohen (rate)"] / seconds["sequential"], rel=0.2)
    assert 0 <= found["undecided100k"] <= found["undecided10k"] <= 1
    assert 64 <= found["sequential10k_samples_per_image"] <= found["sequential_samples_per_image"] <= 2000
    assert (found["sequential_vs_art"] is None) == ("art" in found["absent"])
    json.dumps(found)


@needs_engine
def test_rules_do_not_contradict_each_other(item: speed.Subject) -> None:
    sequential, _ = speed.certify_all(item, "sequential", (0.05,), 3000, silent, "s")
    fixed, _ = speed.certify_all(item, "fixed", (), 3000, silent, "f", n=3000)
    assert speed.disagreements(sequential, fixed, 0.05) == 0
    assert {line.rule for line in sequential} == {"sequential"} and {line.n for line in fixed} == {3000}


@needs_engine
def test_growth_has_a_row_for_each_radius_and_cap(
    item: speed.Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "CAPS", {"sequential": 500, "sequential10k": 100})
    monkeypatch.setattr(speed, "FIXED_SIZES", (300, 600))
    rows: list[dict[str, Any]] = speed.growth(item, (0.0, 1.0), silent)
    fixed, asked = rows[:2], rows[2:]
    assert [(row["rule"], row["n_or_cap"], row["samples_mean"]) for row in fixed] == [
        ("fixed", 300, 300.0), ("fixed", 600, 600.0),
    ]  # fmt: skip
    assert [(r["radius_in_sigma"], r["n_or_cap"]) for r in asked] == [(0.0, 500), (0.0, 100), (1.0, 500), (1.0, 100)]
    assert all(64 <= row["samples_mean"] <= row["n_or_cap"] for row in asked)
    speed.write_rows(rows, tmp_path / "deep" / "growth.csv")
    with (tmp_path / "deep" / "growth.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_the_command_explains_itself() -> None:
    shown = CliRunner().invoke(app, ["certify-speed", "--help"])
    assert shown.exit_code == 0 and "--quick" in shown.output


def test_the_subject_is_the_shared_network(shared_data: Any, tmp_path: Path) -> None:
    shared_data("weights/resnet20_cifar10_noise_s025.safetensors")
    shared_data("data/cifar10/test.parquet")
    item = speed.subject(0.25, 2, tmp_path)
    x = torch.from_numpy(item.images.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        floats = item.network(x)
    logits = item.program.run(item.images.images.astype(np.int16), backend="torch").float()
    correlation = np.corrcoef(floats.flatten().numpy(), logits.flatten().numpy())[0, 1]
    assert floats.shape == logits.shape == (2, 10)
    assert correlation > 0.98, "the program is not that of the float network"
