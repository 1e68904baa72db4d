"""The fixed rule: sound against exact enumeration, honest error rate, independent of batches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from arqsearch.certify.binomial import grey_levels_squared
from arqsearch.certify.noise import NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.smoothing import SmoothingSettings, check_input_range, first_argmax, program_classifier
from arqsearch.certify.summary import holds_at, summarize
from arqsearch.errors import ArqError
from arqsearch.integer.ops import Flatten, InputQuantize, Linear
from arqsearch.integer.program import IntegerProgram, TensorSpec

HASHES = {"program": "p", "data": "d"}


def tiny_network(seed: int):
    """Two integer layers from two pixels to three classes, rough enough to change class within a few grey levels."""
    generator = np.random.default_rng(seed)
    first = torch.from_numpy(generator.integers(-7, 8, (2, 6)))
    bias = torch.from_numpy(generator.integers(-30, 31, 6))
    second = torch.from_numpy(generator.integers(-7, 8, (6, 3)))

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        centred = pixels.reshape(len(pixels), 2).to(torch.int64) - 100
        return first_argmax(((centred @ first + bias) >> 2).clamp(0, 15) @ second)

    return classify


def exact_probabilities(classify, table: NoiseTable, points: np.ndarray) -> np.ndarray:
    """P(F(x + Z) = c) for each point and class, by enumeration of the noise: (points, 3)."""
    mass = np.array(table.probabilities(), dtype=np.float64) / 2**64
    offsets = np.array(list(itertools.product(range(table.lo, table.hi + 1), repeat=2)))
    weights = np.outer(mass, mass).ravel()
    classes = [classify(torch.from_numpy(point + offsets).to(torch.int16)[:, None, None]).numpy() for point in points]
    return np.array([np.bincount(row, weights=weights, minlength=3) for row in classes])


@pytest.mark.parametrize("seed", range(6))
def test_certified_sets_never_contradict_the_exact_smoothed_classes(seed):
    sigma = 0.012  # s = 3.06 grey levels.
    table = NoiseTable.for_sigma(sigma)
    classify = tiny_network(seed)
    reach = range(94, 107)
    points = np.array(list(itertools.product(reach, reach)))
    exact = exact_probabilities(classify, table, points)
    smoothed = exact.argmax(1)
    distance = ((points[:, None] - points[None]) ** 2).sum(2)
    # The theorem with the true probability: no sampling, so it must hold without exception.
    for index, probability in enumerate(exact.max(1)):
        if probability > 0.5:
            within = distance[index] < (255 * sigma * norm.ppf(min(probability, 1 - 1e-15))) ** 2
            assert (smoothed[within] == smoothed[index]).all()
            assert (exact[within].max(1) > 0.5).all()
    # The certificate from samples.
    settings = SmoothingSettings(sigma=sigma, n0=50, n=1000, alpha=1e-6, seed=seed, batch_size=1000)
    certified = changed = 0
    for index in range(0, len(points), 7):
        image = points[index].astype(np.uint8).reshape(1, 1, 2)
        line = certify_image(classify, image, index, None, settings, **HASHES)
        if line.certified:
            certified += 1
            covered = distance[index] <= grey_levels_squared(line.radius)
            assert covered.any() and (smoothed[covered] == line.predicted).all()
            changed += int((smoothed[~covered] != line.predicted).any())
    assert certified >= 5 and changed >= 1  # Certificates were given, also where the class does change further off.


def half_space(threshold: int):
    """Class 1 where the first pixel is at least the threshold: its certified radius is known exactly."""
    return lambda pixels: (pixels[:, 0, 0, 0] >= threshold).to(torch.int64)


def test_false_certificates_are_no_more_frequent_than_alpha():
    sigma, alpha, trials = 0.1, 0.1, 1000
    image = np.full((1, 1, 1), 120, dtype=np.uint8)
    truth = (120 - 108 + 0.5) / 255  # σ·Φ⁻¹(p) with p = Φ((x − t + ½)/s).
    settings = SmoothingSettings(sigma=sigma, n0=10, n=60, alpha=alpha, seed=8)
    lines = [certify_image(half_space(108), image, index, None, settings, **HASHES) for index in range(trials)]
    wrong = sum(line.radius > truth if line.predicted == 1 else line.certified for line in lines)
    assert binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-4
    assert wrong > 0  # α is spent: a bound that never fails would be looser than it need be.
    assert sum(line.certified and line.predicted == 1 for line in lines) > trials / 2


def test_result_does_not_depend_on_the_batch_size():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    classify = half_space(5)
    settings = SmoothingSettings(sigma=0.1, n0=33, n=500, seed=2**63 + 5)
    lines = {
        certify_image(classify, image, 3, None, replace(settings, batch_size=size), **HASHES).to_json()
        for size in (1, 7, 64, 1000)
    }
    assert len(lines) == 1


def test_select_and_estimate_use_different_noise():
    image = np.full((2, 2, 1), 9, dtype=np.uint8)
    batches = []

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        batches.append(pixels.clone())
        return torch.zeros(len(pixels), dtype=torch.int64)

    certify_image(classify, image, 0, None, SmoothingSettings(sigma=0.25, n0=50, n=50), **HASHES)
    assert [len(batch) for batch in batches] == [50, 50]
    assert all(batch.dtype == torch.int16 and batch.shape[1:] == (2, 2, 1) for batch in batches)
    assert not torch.equal(*batches)


def test_misclassified_images_are_skipped_only_when_asked():
    image = np.full((1, 1, 1), 200, dtype=np.uint8)
    settings = SmoothingSettings(sigma=0.1, n0=20, n=200)
    skipped = certify_image(half_space(100), image, 0, 0, settings, **HASHES)
    assert (skipped.estimated, skipped.estimate, skipped.radius, skipped.certified) == (False, {}, 0.0, False)
    assert not skipped.abstained and not skipped.problems()
    estimated = certify_image(half_space(100), image, 0, 0, replace(settings, skip_misclassified=False), **HASHES)
    assert estimated.certified and estimated.radius > 0 and not estimated.correct
    for line in (skipped, estimated):
        assert summarize([line], [0.0]).acr == 0 and not holds_at(line, 0.0)


def test_undecided_images_abstain():
    image = np.full((1, 1, 1), 100, dtype=np.uint8)
    odd = lambda pixels: (pixels[:, 0, 0, 0] % 2).to(torch.int64)  # noqa: E731
    line = certify_image(odd, image, 0, None, SmoothingSettings(sigma=0.25, n0=100, n=1000), **HASHES)
    assert line.abstained and line.radius == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_first_argmax_takes_the_first(dtype):
    logits = torch.tensor([[1, 3, 3, 3], [5, 5, 0, 5], [-4, -7, -2, -2], [0, 0, 0, 0]], dtype=dtype)
    assert first_argmax(logits).tolist() == [1, 0, 2, 0]
    random = torch.randint(-3, 4, (500, 10)).to(dtype)
    assert first_argmax(random).tolist() == np.argmax(random.numpy(), 1).tolist()


def raw_program(lo: int, hi: int) -> IntegerProgram:
    """Two classes: brighter or darker than 128, from one pixel."""
    ones = np.ones(1, dtype=np.int64)
    return IntegerProgram(
        ops=(
            InputQuantize((0,), 1, ones, ones * 0, 0, "half_up", pre_lo=0, pre_hi=255, lo=0, hi=255),
            Flatten((1,), 2),
            Linear((2,), 3, weight=np.array([[1], [0]], dtype=np.int8), bias=np.array([0, 128], dtype=np.int32)),
        ),
        tensors=(
            TensorSpec((1, 1, 1), lo, hi),
            TensorSpec((1, 1, 1), 0, 255),
            TensorSpec((1,), 0, 255),
            TensorSpec((2,), 0, 255),
        ),
        output=3,
    )


def test_program_must_accept_every_noisy_pixel():
    table = NoiseTable.for_sigma(0.25)
    check_input_range(table.lo, 255 + table.hi, 0.25)
    for lo, hi in ((table.lo + 1, 255 + table.hi), (table.lo, 254 + table.hi)):
        with pytest.raises(ArqError, match=f"noise_limit={table.hi}"):
            check_input_range(lo, hi, 0.25)
    with pytest.raises(ArqError, match=r"sigma = 0\.5"):
        program_classifier(raw_program(table.lo, 255 + table.hi), 0.5)


def test_integer_program_is_certified():
    table = NoiseTable.for_sigma(0.1)
    program = raw_program(table.lo, 255 + table.hi)
    settings = SmoothingSettings(sigma=0.1, n0=50, n=2000, alpha=0.001)
    image = np.full((1, 1, 1), 150, dtype=np.uint8)
    line = certify_image(program_classifier(program, 0.1), image, 0, 0, settings, program=program.hash, data="d")
    truth = (150 - 128 + 0.5) / 255
    assert line.correct and line.program == program.hash
    assert 0.8 * truth < line.radius < truth


@pytest.mark.parametrize("change", [{"n0": 0}, {"n": 0}, {"batch_size": 0}, {"alpha": 0.0}, {"alpha": 0.5}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ArqError, match=next(iter(change))):
        SmoothingSettings(sigma=0.25, **change)


def test_wrong_image_or_answer_is_refused():
    settings = SmoothingSettings(sigma=0.25, n0=5, n=5)
    with pytest.raises(ArqError, match="uint8"):
        certify_image(half_space(1), np.zeros((2, 2, 1), dtype=np.float32), 0, None, settings, **HASHES)
    with pytest.raises(ArqError, match="int64"):
        certify_image(lambda x: x[:, 0, 0, 0], np.zeros((2, 2, 1), dtype=np.uint8), 0, None, settings, **HASHES)


def test_summary_counts_by_the_integer_table():
    from arqsearch.certify.binomial import minimal_count

    image = np.full((1, 1, 1), 128, dtype=np.uint8)
    settings = SmoothingSettings(sigma=0.1, n0=20, n=300, skip_misclassified=False)
    lines = [
        certify_image(half_space(60 + 4 * index), image, index, index % 4 != 0, settings, **HASHES)
        for index in range(24)
    ]
    radii = [0.0, 0.02, 0.05, 0.1]
    summary = summarize(lines, radii)
    for radius in radii:
        needed = minimal_count(300, radius, 0.1, 0.001, lines[0].d_tau)
        expected = sum(line.correct and line.votes >= needed for line in lines)
        assert summary.accuracy[radius].count == expected
        share = summary.accuracy[radius]
        assert share.low <= share.value == expected / 24 <= share.high
    assert summary.accuracy[0.0].count > summary.accuracy[0.1].count > 0
    assert summary.acr == pytest.approx(np.mean([line.radius * line.correct for line in lines]))
    assert summary.acr_low < summary.acr < summary.acr_high
    assert summary.abstained == sum(not line.certified for line in lines) > 0
    assert (summary.images, summary.n) == (24, 300)


def test_summary_refuses_what_does_not_belong_together():
    settings = SmoothingSettings(sigma=0.1, n0=5, n=20)
    image = np.full((1, 1, 1), 128, dtype=np.uint8)
    line = certify_image(half_space(10), image, 0, 1, settings, **HASHES)
    for lines in ([], [line, line], [replace(line, label=None)], [line, replace(line, image=1, seed=1)]):
        with pytest.raises(ArqError):
            summarize(lines, [0.0])
