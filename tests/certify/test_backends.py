"""Votes on the native engine and on torch are the same votes: certificates byte for byte, search counts, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch import models
from arqsearch.certify.base import PROVENANCE, BaseNetwork
from arqsearch.certify.certificate import certify_dataset
from arqsearch.certify.noise import ESTIMATE, SEARCH, NoiseTable
from arqsearch.certify.smoothing import (
    Classifier,
    NativeClassifier,
    SmoothingSettings,
    VoteCounter,
    count_classes,
    count_votes,
    first_argmax,
    program_classifier,
    sample_classes,
)
from arqsearch.certify.verify import verify_file
from arqsearch.data import load
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.integer.native.engine import NativeBackend, NativeNoise, native_available
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.search import scorer
from tests.quantize.nets import NETS, build

SETTINGS = SmoothingSettings(sigma=0.25, n0=30, n=150, seed=2**64 - 3, batch_size=64, skip_misclassified=False)
TABLE = NoiseTable.for_sigma(0.25)

pytestmark = pytest.mark.skipif(not native_available(), reason="the native engine is not built")


@pytest.fixture(scope="module")
def program() -> IntegerProgram:
    """The first network, among untrained ones, that does not give all noisy images one class."""
    pixels = torch.randint(-100, 356, (64, 8, 8, 2), generator=torch.Generator().manual_seed(0))
    for kind, seed in itertools.product(NETS, range(20)):
        net = QuantizedNet(build(kind, seed), (2, 8, 8), (0.5,) * 2, (0.25,) * 2, QuantizeSettings())
        net.calibrate([pixels.permute(0, 3, 1, 2).float()])
        found = lower(net.eval(), noise_limit=TABLE.hi)
        if first_argmax(found.run(pixels, backend="torch")).bincount().sort().values[-2:].min() > 5:
            return found
    raise AssertionError("every network gives one class")


class Colours:
    """A few images of noise."""

    identity = "0" * 64

    def __init__(self, count: int = 6) -> None:
        generator = np.random.default_rng(1)
        self.images = generator.integers(0, 256, (count, 8, 8, 2), dtype=np.uint8)
        self.labels = generator.integers(0, 3, count)
        self.ids = generator.integers(0, 2**32, count)


def classifier(program: IntegerProgram, backend: str, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    monkeypatch.setenv("ARQSEARCH_BACKEND", backend)
    found = program_classifier(program, 0.25)
    assert isinstance(found, VoteCounter) == isinstance(found, NativeClassifier) == (backend == "native")
    return found


def test_certificate_files_are_the_same_bytes(
    program: IntegerProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, classifiers = {}, {}
    for backend in ("torch", "native"):
        classifiers[backend] = classifier(program, backend, monkeypatch)
        path = tmp_path / f"{backend}.jsonl"
        lines = certify_dataset(classifiers[backend], Colours(), program.hash, SETTINGS, path)
        assert any(len(line.estimate) > 1 for line in lines)
        written[backend] = path.read_bytes()
    assert written["torch"] == written["native"]
    assert written["native"].count(b"\n") == 6
    for backend, other in (("torch", "native"), ("native", "torch")):
        found = verify_file(tmp_path / f"{backend}.jsonl", classifiers[other], Colours(), program.hash)
        assert len(found.recomputed) == 6


@pytest.mark.parametrize(("samples", "batch"), [(1, 7), (5, 7), (40, 16), (40, 1000)])
def test_votes_of_many_images_are_the_same(
    program: IntegerProgram, samples: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = Colours(11), []
    for backend in ("torch", "native"):
        votes = count_votes(
            classifier(program, backend, monkeypatch), data.images, data.ids.tolist(), table=TABLE, seed=4,
            stage=SEARCH, samples=samples, batch_size=batch,
        )  # fmt: skip
        assert votes.dtype == np.int64 and votes.sum(1).tolist() == [samples] * 11
        found.append(np.pad(votes, ((0, 0), (0, program.num_classes - votes.shape[1]))))
    assert np.array_equal(*found)


def test_search_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits", "train").subset(slice(0, 25))
    net = QuantizedNet(
        models.build("cnn_tiny", 10, in_channels=1, image_size=8), (1, 8, 8), (0.5,), (0.25,), QuantizeSettings()
    )
    net.calibrate([torch.from_numpy(data.images).permute(0, 3, 1, 2).float()])
    program = lower(net.eval(), noise_limit=TABLE.hi)
    found = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("ARQSEARCH_BACKEND", backend)
        found.append(scorer.count_votes(program, data, TABLE, 12, seed=3))
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_numbers_that_leave_the_counter_are_refused_on_both(
    program: IntegerProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Colours(1)
    for backend in ("torch", "native"):
        classify = classifier(program, backend, monkeypatch)
        for ids, seed, stage in (([2**32], 0, 0), ([0], 2**64, 0), ([0], -1, 0), ([0], 0, 3)):
            with pytest.raises(ArqError):
                count_votes(classify, data.images, ids, table=TABLE, seed=seed, stage=stage, samples=2, batch_size=4)


def test_classes_of_samples_are_the_same_and_add_up_to_the_votes(
    program: IntegerProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = Colours(2), replace(SETTINGS, seed=9)
    found = {}
    for backend in ("torch", "native"):
        classify = classifier(program, backend, monkeypatch)
        found[backend] = sample_classes(classify, data.images[1], int(data.ids[1]), ESTIMATE, 333, settings)
        assert found[backend].dtype == np.int64 and found[backend].shape == (333,)
        counted = [
            count_classes(classify, data.images[1], int(data.ids[1]), ESTIMATE, count, settings, start)
            for start, count in ((0, 100), (100, 1), (101, 232))
        ]
        for name in range(program.num_classes):
            assert sum(part.get(name, 0) for part in counted) == int((found[backend] == name).sum())
    assert np.array_equal(found["torch"], found["native"]) and len(np.unique(found["native"])) > 1


def test_threads_do_not_change_the_classes(program: IntegerProgram) -> None:
    data, drawn = Colours(2), NativeNoise(TABLE.thresholds, TABLE.lo)
    answers = [
        NativeBackend(program, threads=threads).classes(
            drawn, data.images, data.ids.tolist(), seed=1, stage=ESTIMATE, samples=150, sample_start=2**32 - 150
        )
        for threads in (1, 3)
    ]
    assert answers[0].dtype == np.uint16 and answers[0].shape == (2, 150) and np.array_equal(*answers)
    with pytest.raises(ArqError, match="N ids"):
        NativeBackend(program).classes(drawn, data.images, [1], seed=1, stage=ESTIMATE, samples=2)
    with pytest.raises(ValueError, match="argument"):
        NativeBackend(program).classes(
            drawn, data.images[:1], [1], seed=1, stage=ESTIMATE, samples=2, sample_start=2**32 - 1
        )


def test_every_rule_writes_the_same_bytes(
    program: IntegerProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequential = replace(SETTINGS, rule="sequential", radii=(0.05, 0.1), cap=200)
    near = replace(SETTINGS, rule="incremental", shared=120)
    for backend in ("torch", "native"):
        classify = classifier(program, backend, monkeypatch)
        certify_dataset(classify, Colours(), program.hash, sequential, tmp_path / f"{backend}-sequential.jsonl")
        path = tmp_path / backend / "base.jsonl"
        certify_dataset(classify, Colours(), program.hash, SETTINGS, path)
        base = BaseNetwork(path, {PROVENANCE: []}, classify, program.hash)
        certify_dataset(classify, Colours(), program.hash, near, tmp_path / f"{backend}-near.jsonl", base=base)
    for name in ("sequential.jsonl", "near.jsonl"):
        assert (tmp_path / f"torch-{name}").read_bytes() == (tmp_path / f"native-{name}").read_bytes()
