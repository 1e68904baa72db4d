"""What is peculiar to the sequential and the incremental rule, to two-class radii, and to a base network's answers."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import betaln
from scipy.stats import norm

from arqsearch.certify.base import PROVENANCE, BaseNetwork
from arqsearch.certify.binomial import certified_radius
from arqsearch.certify.certificate import certify_dataset, read_lines
from arqsearch.certify.incremental import Pairs, Split, incremental_radius, near_probability
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.noise import ESTIMATE, SELECT, NoiseTable, noise
from arqsearch.certify.rules import certify_image
from arqsearch.certify.sequential import look_times
from arqsearch.certify.smoothing import SmoothingSettings, total_distance
from arqsearch.certify.summary import holds_at, summarize
from arqsearch.certify.two_class import two_class_radius
from arqsearch.errors import ArqError
from tests.certify.rule_cases import CASES, NEAR, SEED, Images, Threshold

SEQUENTIAL = SmoothingSettings(
    sigma=0.1, n0=20, seed=3, rule="sequential", radii=(0.02, 0.05, 0.1), cap=3000, skip_misclassified=False
)


def one(
    level: int, settings: SmoothingSettings = SEQUENTIAL, label: int | None = None, grey: int = 128
) -> CertificateLine:
    image = np.full((1, 1, 1), grey, np.uint8)
    return certify_image(Threshold(level), image, 7, label, settings, program="p", data="d")


def answers(level: int, samples: int, stage: int = ESTIMATE, seed: int = 3) -> np.ndarray:
    """Whether the network of this threshold answers 1 on the samples of image 7, grey level 128."""
    drawn = noise(
        NoiseTable.for_sigma(0.1),
        seed=seed,
        stage=stage,
        image_ids=[7],
        sample_start=0,
        sample_count=samples,
        coordinates=1,
    )
    found: np.ndarray = 128 + drawn.flatten().numpy() >= level
    return found


# ---- sequential ------------------------------------------------------------------------------


def wealth(hits: int, samples: int, p: float) -> float:
    """ln W(p) in floating point."""
    misses = samples - hits
    return float(betaln(hits + 0.5, misses + 0.5) - betaln(0.5, 0.5) - hits * math.log(p) - misses * math.log1p(-p))


@pytest.mark.parametrize("level", [60, 90, 108, 112, 116, 120, 124, 128])
def test_decisions_and_stop_are_those_of_the_wealth(level: int) -> None:
    line = one(level)
    part = line.sequential
    assert part is not None and line.n == 3000
    hits = answers(level, 3000) if line.predicted == 1 else ~answers(level, 3000)
    times = look_times(3000)
    decided: dict[float, str] = {}
    for taken, time in enumerate(times, 1):
        votes = int(hits[:time].sum())
        assert part.looks[taken - 1] == (time, votes)
        for radius in part.radii:
            p = float(norm.cdf(radius / 0.1))
            if radius not in decided and wealth(votes, time, p) >= math.log(1000):
                decided[radius] = "certified" if votes > p * time else "refuted"
        if len(decided) == 3:
            break
    assert len(part.looks) == taken, "it stops at the first look at which all is decided"
    assert part.decisions == tuple(decided.get(radius, "undecided") for radius in part.radii)
    assert part.undecided == tuple(radius for radius in part.radii if radius not in decided)
    assert line.samples == times[taken - 1]
    for radius, decision in zip(part.radii, part.decisions, strict=True):
        assert (line.certified and line.radius >= radius) == (decision == "certified")


def test_easy_images_stop_early_and_hard_ones_reach_the_cap() -> None:
    easy, hard = one(60), one(124)
    assert easy.samples <= look_times(3000)[2] and easy.sequential is not None
    assert set(easy.sequential.decisions) == {"certified"}
    assert hard.samples == 3000 and hard.sequential is not None and hard.sequential.undecided


def test_the_label_is_tested_without_selection() -> None:
    settings = replace(SEQUENTIAL, target="label")
    classify = Threshold(60)
    image = np.full((1, 1, 1), 128, np.uint8)
    right = certify_image(classify, image, 7, 1, settings, program="p", data="d")
    assert (right.n0, right.selection, right.predicted, right.certified) == (0, {}, 1, True)
    assert classify.seen == right.samples
    wrong = one(60, settings, label=0)
    assert wrong.predicted == 0 and not wrong.certified and wrong.radius == 0.0
    assert wrong.sequential is not None and set(wrong.sequential.decisions) == {"refuted"}
    assert right.problems() == wrong.problems() == []
    with pytest.raises(ArqError, match="has no label to test"):
        one(60, settings)


def test_a_wrong_class_is_not_sampled() -> None:
    line = one(60, replace(SEQUENTIAL, skip_misclassified=True), label=0)
    assert not line.estimated and line.samples == 0 and line.problems() == []
    assert line.sequential is not None and line.sequential.looks == line.sequential.decisions == ()
    assert not any(line.undecided(radius) for radius in SEQUENTIAL.radii)


@pytest.mark.parametrize("radii", [(), (0.1, 0.1), (0.2, 0.1), (-0.1,), (0.1234567,)])
def test_radii_that_cannot_be_decided_are_refused(radii: tuple[float, ...]) -> None:
    with pytest.raises(ArqError, match="cannot be decided"):
        one(60, replace(SEQUENTIAL, radii=radii))


def test_undecided_images_are_counted_apart() -> None:
    lines = [replace(one(level, label=1, grey=128), image=level) for level in (60, 112, 116, 120, 124)]
    found = summarize(lines, SEQUENTIAL.radii)
    for radius in SEQUENTIAL.radii:
        expected = sum(line.undecided(radius) for line in lines)
        assert found.undecided[radius] == expected
        assert found.accuracy[radius].count + expected <= len(lines)
        assert not any(line.undecided(radius) and holds_at(line, radius) for line in lines)
    assert sum(found.undecided.values()) > 0
    assert found.mean_samples == sum(line.samples for line in lines) / len(lines)


# ---- two classes -----------------------------------------------------------------------------


def test_the_two_class_radius_stands_beside_the_certified_one() -> None:
    settings = SmoothingSettings(sigma=0.1, n0=20, n=500, seed=3, two_class=3)
    plain, both = one(112, replace(settings, two_class=0)), one(112, settings)
    assert plain.two_class is None and both.two_class is not None
    assert (both.radius, both.estimate) == (plain.radius, plain.estimate)
    wide = two_class_radius(both.estimate, both.predicted, 500, 0.1, 0.001, both.d_tau)
    assert wide is not None and both.two_class.radius == float(wide)
    assert (both.two_class.alpha, both.two_class.classes) == (0.001, 3)
    assert both.radius == float(certified_radius(both.votes, 500, 0.1, 0.001, both.d_tau) or 0)


# ---- incremental -----------------------------------------------------------------------------


@pytest.fixture
def dataset() -> Images:
    return Images(np.full((1, 1, 1, 1), 128, np.uint8), np.array([1]), np.array([7]))


def certified_base(folder: Path, dataset: Images, level: int = 110) -> Path:
    path = folder / "base.jsonl"
    settings = SmoothingSettings(sigma=0.1, n0=20, n=2000, seed=SEED)
    certify_dataset(Threshold(level), dataset, "base", settings, path)
    return path


def incremental(dataset: Images, base: BaseNetwork, path: Path, level: int, **changes: object) -> CertificateLine:
    settings = replace(CASES["incremental"].settings, shared=1000, **changes)  # type: ignore[arg-type]
    (line,) = certify_dataset(Threshold(level), dataset, "near", settings, path, base=base)
    return line


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("level", [105, 109, 111, 115])
def test_pairs_and_radius_are_those_of_the_samples(dataset: Images, tmp_path: Path, level: int, gained: bool) -> None:
    path = certified_base(tmp_path, dataset)
    base = BaseNetwork(path, NEAR, Threshold(110), "base")
    line = incremental(dataset, base, tmp_path / "near.jsonl", level, gained=gained)
    f, near = answers(110, 2000, seed=SEED), answers(level, 1000, seed=SEED)
    part = line.incremental
    assert part is not None and line.problems() == []
    assert (part.base_votes, part.base_n, part.shared_votes) == (int(f.sum()), 2000, int(f[:1000].sum()))
    assert (part.lost, part.gained) == (int((f[:1000] & ~near).sum()), int((~f[:1000] & near).sum()))
    assert line.estimate.get(1, 0) == int(near.sum()) and line.samples == 1000
    split = Split.of(0.001, gained)
    assert math.isclose(split.base + split.lost + split.gained, 0.001)
    bound = near_probability(part.base_votes, 2000, Pairs(1000, part.lost, part.gained), split)
    expected = incremental_radius(bound, 0.1, total_distance(0.1, 1))
    assert line.radius == float(expected or 0) and line.certified == (expected is not None)


def test_kept_answers_spare_the_base_network(dataset: Images, tmp_path: Path) -> None:
    path = certified_base(tmp_path, dataset)
    with pytest.raises(ArqError, match=r"does not hold 1000 answers for image 7; give .*--base-program"):
        incremental(dataset, BaseNetwork(path, NEAR), tmp_path / "near.jsonl", 111)
    runs = Threshold(110)
    expected = incremental(dataset, BaseNetwork(path, NEAR, runs, "base"), tmp_path / "a.jsonl", 111)
    assert runs.seen == 1000
    kept = path.with_name("base.jsonl.answers")
    whole = kept.read_bytes()
    assert incremental(dataset, BaseNetwork(path, NEAR), tmp_path / "b.jsonl", 111) == expected
    # A cut line is passed over, computed again, and what is written then is read.
    kept.write_bytes(whole[:-40])
    incremental(dataset, BaseNetwork(path, NEAR, runs, "base"), tmp_path / "c.jsonl", 111)
    assert runs.seen == 2000
    assert incremental(dataset, BaseNetwork(path, NEAR), tmp_path / "d.jsonl", 111) == expected
    # An altered line is not believed, be its digest right or wrong.
    kept.write_bytes(whole.replace(b'"samples": 1000', b'"samples": 1001'))
    with pytest.raises(ArqError, match="does not hold"):
        incremental(dataset, BaseNetwork(path, NEAR), tmp_path / "e.jsonl", 111)


def test_answers_that_contradict_the_votes_are_refused(dataset: Images, tmp_path: Path) -> None:
    path = certified_base(tmp_path, dataset)
    with pytest.raises(ArqError, match="contradict its"):
        incremental(dataset, BaseNetwork(path, NEAR, Threshold(250), "base"), tmp_path / "near.jsonl", 111)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not say which noise entered"),
        ({PROVENANCE: [[SEED, SELECT], [SEED, ESTIMATE]]}, f"noise of seed {SEED}, stage 2 entered"),
        ({PROVENANCE: "all"}, r"no list of \[seed, stage\]"),
    ],
)
def test_noise_that_made_the_network_is_refused(
    dataset: Images, tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(ArqError, match=message):
        BaseNetwork(certified_base(tmp_path, dataset), metadata)


def test_bases_that_do_not_fit_are_refused(dataset: Images, tmp_path: Path) -> None:
    path = certified_base(tmp_path, dataset)
    base = BaseNetwork(path, NEAR, Threshold(110), "base")
    for change, message in (
        ({"seed": 1}, "seed 11, now 1"),
        ({"sigma": 0.2}, r"sigma 0\.1, now 0\.2"),
        ({"shared": 2001}, "2001 cannot be shared"),
    ):
        settings = replace(CASES["incremental"].settings, **change)  # type: ignore[arg-type]
        with pytest.raises(ArqError, match=message):
            certify_dataset(Threshold(111), dataset, "near", settings, tmp_path / "x.jsonl", base=base)
    with pytest.raises(ArqError, match="data '0"):
        incremental(replace(dataset, identity="1" * 64), base, tmp_path / "x.jsonl", 111)
    with pytest.raises(ArqError, match="no line of image 8"):
        incremental(replace(dataset, ids=np.array([8])), base, tmp_path / "x.jsonl", 111)
    with pytest.raises(ArqError, match="is about program base, the base program given is other"):
        BaseNetwork(path, NEAR, Threshold(110), "other")
    sequential = tmp_path / "sequential.jsonl"
    certify_dataset(Threshold(110), dataset, "base", replace(SEQUENTIAL, seed=SEED), sequential)
    with pytest.raises(ArqError, match="not by the rule 'fixed'"):
        BaseNetwork(sequential, NEAR)
    line = read_lines(path)[0]
    path.write_text(replace(line, radius=line.radius + 0.01).to_json() + "\n")
    with pytest.raises(ArqError, match="its counts give radius"):
        BaseNetwork(path, NEAR)


def test_an_identical_network_loses_little(dataset: Images, tmp_path: Path) -> None:
    path = certified_base(tmp_path, dataset)
    line = incremental(dataset, BaseNetwork(path, NEAR, Threshold(110), "base"), tmp_path / "x.jsonl", 110)
    part = line.incremental
    assert part is not None and (part.lost, part.gained) == (0, 0)
    assert 0 < Decimal(str(line.radius)) < Decimal(str(read_lines(path)[0].radius))


def test_noisy_pixels_are_what_the_oracle_draws() -> None:
    """The oracle of this file and the counting agree, so that the tests above compare two ways."""
    assert one(108, replace(SEQUENTIAL, rule="fixed", n=500)).estimate == {
        int(name): int(count)
        for name, count in enumerate(torch.bincount(torch.from_numpy(answers(108, 500)).long())) if count
    }  # fmt: skip
