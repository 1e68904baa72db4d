"""The verification benchmark: its network, read as an integer program, is the published one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from arqsearch.benchmarks import qnn_benchmark as bench
from arqsearch.benchmarks import verify_mnist
from arqsearch.data import data_root, load
from arqsearch.errors import ArqError

FOLDER = data_root() / "data" / "verification"
needs_data = pytest.mark.skipif(not (FOLDER / bench.NETWORK).is_file(), reason="the benchmark's files are not here")


@needs_data
def test_the_network_computes_the_stated_integers_and_has_the_published_accuracy() -> None:
    program, _ = bench.load_benchmark()
    data = load("mnist", "test")
    with np.load(FOLDER / bench.NETWORK) as arrays:
        w1, b1, w2, b2 = (arrays[name].astype(np.int64) for name in ("W1", "b1", "W2", "b2"))
    x = data.images.reshape(len(data.images), -1).astype(np.int64)
    hidden = np.clip((x @ w1 + (b1 << 9) + 256) >> 9, 0, 63)
    logits = np.clip((hidden @ w2 + (b2 << 5) + 16) >> 5, -32, 31)
    np.testing.assert_array_equal(program.run(data.images).numpy(), logits)
    assert (logits.argmax(1) == np.asarray(data.labels)).mean() == pytest.approx(0.9708)


@needs_data
def test_the_instances_are_the_published_ones() -> None:
    _, instances = bench.load_benchmark()
    counts = {
        eps: tuple(sum(i.known == k and i.epsilon == eps for i in instances) for k in ("Robust", "Non-robust"))
        for eps in (1, 2, 3, 4)
    }
    assert counts == {1: (99, 0), 2: (95, 4), 3: (91, 5), 4: (89, 8)}
    assert len(instances) == 400


@needs_data
def test_a_run_that_was_cut_off_goes_on_and_agrees_with_the_known_verdicts(tmp_path: Path) -> None:
    path, told = tmp_path / "verify.csv", []

    def run(seconds: float = 60.0) -> list[dict[str, object]]:
        return verify_mnist.run(seconds, 1, True, path, lambda *news: told.append(news[:3]))

    rows = run()
    outcome = verify_mnist.summary(rows)
    assert (outcome["instances"], outcome["conflicts"], outcome["decided"]) == (40, 0, outcome["of"])
    assert told[-1][1:] == (40, 40)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:31]) + lines[31][:40])
    told.clear()
    again = run()
    assert len(told) == 10
    assert [(row["verdict"], str(row["image"])) for row in again] == [
        (row["verdict"], str(row["image"])) for row in rows
    ]
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    with pytest.raises(ArqError, match="limit_seconds"):
        run(5.0)


def test_what_counts_as_a_conflict() -> None:
    assert verify_mnist.conflict("robust", "Non-robust")
    assert verify_mnist.conflict("misclassified", "Robust")
    assert not verify_mnist.conflict("unknown", "Robust")
    assert not verify_mnist.conflict("non-robust", "Non-robust")


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", W1=np.zeros((3, 2)), b1=np.zeros(2), W2=np.zeros((2, 2)), b2=np.zeros(2))
    with pytest.raises(ArqError, match="784"):
        bench.load_network(tmp_path / "other.npz")
    with pytest.raises(ArqError, match="missing"):
        bench.load_benchmark(tmp_path)
