"""Integer noise: generator, table and their agreement with the definition in plain Python."""

from __future__ import annotations

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from arqsearch.certify.noise import ESTIMATE, SEARCH, SELECT, NoiseTable, noise, philox
from arqsearch.errors import ArqError
from tests.certify.noise_reference import cdf, philox_words, uniform, value

PUBLISHED = [  # Random123 distribution, kat_vectors, philox4x32 10.
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD32 = st.integers(0, 2**32 - 1)


def torch_words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    words = philox([torch.tensor([[c]]) for c in counter], key[1] << 32 | key[0])
    return tuple(int(word) & 0xFFFFFFFF for word in words)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert torch_words(counter, key) == expected
    assert philox_words(counter, key) == expected


@given(st.tuples(WORD32, WORD32, WORD32, WORD32), st.tuples(WORD32, WORD32))
def test_philox_equals_plain_integers(counter, key):
    assert torch_words(counter, key) == philox_words(counter, key)


def test_philox_broadcasts_like_full_counters():
    parts = [
        torch.arange(5)[None],
        torch.arange(7)[:, None] + 2**32 - 9,
        torch.tensor([[3]]),
        torch.tensor([[1 << 24]]),
    ]
    full = [part.expand(7, 5).clone() for part in parts]
    for a, b in zip(philox(parts, 12345678901234567890), philox(full, 12345678901234567890), strict=True):
        assert torch.equal(a & 0xFFFFFFFF, b & 0xFFFFFFFF)


@pytest.mark.parametrize("case", json.loads(Path(__file__).with_name("noise_vectors.json").read_text()))
def test_committed_vectors(case):
    drawn = noise(
        NoiseTable.for_sigma(float(case["sigma"])),
        seed=case["seed"],
        stage=case["stage"],
        image_ids=[case["image"]],
        sample_start=case["sample"],
        sample_count=1,
        coordinates=len(case["values"]),
    )
    assert drawn.dtype == torch.int16
    assert drawn.flatten().tolist() == case["values"]


def test_ties_read_the_low_half():
    table, seed, rows, blocks = NoiseTable.for_sigma(1.0), 7, 4000, 768
    high = torch.tensor([t >> 32 for t in table.thresholds[:-1]])
    drawn = noise(
        table, seed=seed, stage=SELECT, image_ids=[5], sample_start=0, sample_count=rows, coordinates=4 * blocks
    )[0]
    ties = []
    for start in range(0, rows, 100):
        parts = [torch.arange(blocks)[None], torch.arange(start, start + 100)[:, None], torch.tensor([[5]])]
        words = torch.stack(philox([*parts, torch.tensor([[SELECT << 24]])], seed), dim=-1) & 0xFFFFFFFF
        found = torch.isin(words.view(100, -1), high).nonzero().tolist()
        ties += [(start + row, column) for row, column in found]
    assert len(ties) >= 5
    sides = set()
    for row, column in ties:
        word = uniform(seed, SELECT, 5, row, column)
        expected = value(word, "1.0")
        assert int(drawn[row, column]) == expected
        index = int(torch.searchsorted(high, torch.tensor(word >> 32)))
        sides.add(expected == table.lo + index)
    assert sides == {True, False}  # Some ties fall below their threshold and some above: the low half decided.


@pytest.mark.parametrize("sigma", ["0.25", "1.0", "0.002"])
def test_table_against_direct_probabilities(sigma):
    table = NoiseTable.for_sigma(float(sigma))
    mass = table.probabilities()
    assert sum(mass) == 2**64 and min(mass) >= 0
    assert mass == mass[::-1] and table.lo == -table.hi
    assert mass[-1] > 0  # The support ends where the probability rounds to nothing.
    with mpmath.workdps(80):
        ideal = [cdf(k, sigma) - cdf(k - 1, sigma) for k in range(table.lo, table.hi + 1)]
        distance = (
            sum(abs(q * mpmath.mpf(2) ** -64 - p) for q, p in zip(mass, ideal, strict=True)) + 1 - sum(ideal)
        ) / 2
    assert all(abs(q - float(p * 2**64)) <= 1 + abs(q) * 1e-15 for q, p in zip(mass, ideal, strict=True))
    assert distance <= table.tv <= float(distance) * (1 + 1e-12)
    assert 3072 * table.tv < 2e-13


def test_support_matches_the_stated_input_range():
    assert (NoiseTable.for_sigma(1.0).lo, NoiseTable.for_sigma(1.0).hi + 255) == (-2335, 2590)


def test_goodness_of_fit():
    table = NoiseTable.for_sigma(0.25)
    drawn = noise(
        table, seed=11, stage=ESTIMATE, image_ids=[0, 1], sample_start=0, sample_count=200, coordinates=3072
    ).numpy()
    counts = np.bincount(drawn.ravel().astype(np.int64) - table.lo, minlength=len(table.thresholds))
    expected = np.array(table.probabilities(), dtype=float) / 2**64 * drawn.size
    full = expected >= 20
    observed = np.append(counts[full], counts[~full].sum())
    _, p = stats.chisquare(observed, np.append(expected[full], expected[~full].sum()))
    assert 1e-3 < p < 1 - 1e-3
    centred = drawn.reshape(-1, 3072).astype(float) / table.hi
    for shift in (1, 2, 3, 4):  # Neighbouring coordinates and samples are uncorrelated: standard error 1/√n.
        for other in (np.roll(centred, shift, axis=1), np.roll(centred, shift, axis=0)):
            assert abs(np.corrcoef(centred.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(drawn.size)


def test_same_noise_for_any_split():
    table = NoiseTable.for_sigma(0.5)
    settings = {"seed": 3, "stage": SEARCH, "coordinates": 1027}
    whole = noise(table, image_ids=[4, 9, 2], sample_start=0, sample_count=150, **settings)
    assert whole.shape == (3, 150, 1027)
    for position, image in enumerate([4, 9, 2]):
        pieces = [
            noise(table, image_ids=[image], sample_start=start, sample_count=count, **settings)[0]
            for start, count in ((0, 1), (1, 64), (65, 85))
        ]
        assert torch.equal(torch.cat(pieces), whole[position])
    few = noise(table, image_ids=[4, 9, 2], sample_start=140, sample_count=10, **{**settings, "coordinates": 6})
    assert torch.equal(few, whole[:, 140:, :6])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_noise_on_cuda():
    arguments = {"seed": 5, "stage": SELECT, "image_ids": [1, 2], "sample_start": 3, "sample_count": 500}
    table = NoiseTable.for_sigma(1.0)
    on_cpu = noise(table, coordinates=3072, **arguments)
    assert torch.equal(on_cpu, noise(table, coordinates=3072, device="cuda", **arguments).cpu())


def test_stages_images_seeds_and_samples_differ():
    table = NoiseTable.for_sigma(0.5)
    base = {"seed": 3, "stage": SEARCH, "image_ids": [0], "sample_start": 0, "sample_count": 1, "coordinates": 64}
    changes = [{}, {"stage": SELECT}, {"stage": ESTIMATE}, {"image_ids": [1]}, {"seed": 4}, {"seed": 3 + 2**32}]
    drawn = [tuple(noise(table, **{**base, **change}).flatten().tolist()) for change in [*changes, {"sample_start": 1}]]
    assert len(set(drawn)) == len(drawn)


def test_table_is_cached_and_sigma_is_checked():
    assert NoiseTable.for_sigma(0.25) is NoiseTable.for_sigma(0.25)
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ArqError, match="sigma"):
            NoiseTable.for_sigma(sigma)
    with pytest.raises(ArqError, match=r"give 0\.251"):
        NoiseTable.for_sigma(64)


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 2**64}, {"stage": 3}, {"image_ids": [2**32]}, {"sample_start": 2**32}, {"coordinates": 0}],
)
def test_numbers_that_leave_the_counter_are_refused(change):
    base = {"seed": 3, "stage": SEARCH, "image_ids": [0], "sample_start": 0, "sample_count": 1, "coordinates": 64}
    with pytest.raises(ArqError):
        noise(NoiseTable.for_sigma(0.5), **{**base, **change})
