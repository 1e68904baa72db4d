"""`bench verify-speed`: the network, the check before timing, the fixed instances, the file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from arqsearch.benchmarks import verify_speed as speed
from arqsearch.benchmarks.qnn_benchmark import Instance
from arqsearch.certify.linf.boxes import IntervalBounds


def test_the_network_is_the_stated_one_and_wrong_boxes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program, images = speed.network()
    shapes = [spec.shape for spec in program.tensors]
    assert images.shape == (speed.IMAGES, 28, 28, 1)
    assert {(12, 12, 48), (5, 5, 64), (128,), (10,)} <= set(shapes)
    labels = program.run(images[:8]).argmax(1)
    bounds = IntervalBounds(program)
    speed.compare(bounds, images[:8], labels)
    honest = bounds.margins
    monkeypatch.setattr(bounds, "margins", lambda lo, hi, y: honest(lo, hi, y) + 1)
    with pytest.raises(RuntimeError, match="different margins"):
        speed.compare(bounds, images[:8], labels)


def test_boxes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "IMAGES", 100)
    before = torch.get_num_threads()
    found = speed.boxes(3, lambda *update: None)
    torch.set_num_threads(before)
    least, middle, most = (found[f"images_per_second_boxes{end}"] for end in ("_least", "", "_greatest"))
    assert 0 < least <= middle <= most


def test_the_instances_are_fixed_and_decided() -> None:
    listed = [Instance(i, e, "NA" if i % 7 == 0 else "Robust", 0.1) for e in (1, 2, 3, 4) for i in range(100)]
    chosen = speed.chosen(listed)
    assert len(chosen) == 40 and chosen == speed.chosen(listed)
    assert [sum(i.epsilon == e for i in chosen) for e in (1, 2, 3, 4)] == [10] * 4
    assert all(instance.known != "NA" for instance in chosen)


def test_one_row_with_the_hardware_in_the_name(tmp_path: Path) -> None:
    outcome = {"images_per_second_boxes": 1, "hardware": "2x-test", "versions": {"torch": "2"}}
    path = speed.write(outcome, tmp_path)
    assert path.name == "verify-speed-2x-test.csv"
    (row,) = csv.DictReader(path.open())
    assert row["recipe"] == "verify-speed" and row["versions"] == "torch=2"
