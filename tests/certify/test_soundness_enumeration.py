"""Certified sets against the exact smoothed classifier of tiny integer networks, by enumeration of the noise.

The theorem behind every certificate is equivalent to this: for every class, the probit Φ⁻¹(P(F(x+Z)=c)) changes by
‖x' − x‖/s at most between any two integer images. That is checked between all pairs of images of a box, for random
networks and for half-spaces, where it is an equality; noise that is not the rounded Gaussian breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from arqsearch.certify.binomial import certified_radius, grey_levels_squared
from arqsearch.certify.incremental import Pairs, Split, incremental_radius, near_probability
from arqsearch.certify.noise import ESTIMATE, NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.sequential import sequential_radius
from arqsearch.certify.smoothing import SmoothingSettings, count_votes, program_classifier, total_distance
from arqsearch.certify.two_class import two_class_radius
from arqsearch.integer.program import IntegerProgram
from tests.certify.exact_smoothing import SmoothedGrid, smoothed_grid
from tests.certify.tiny_programs import SHAPES, half_space, tiny_program

CENTRE = 120
#: Images on both sides of the centre by number of pixels.
REACH = {1: 20, 2: 8, 3: 3}
#: σ and the standard deviation in grey levels that it makes.
SIGMAS = (0.002, 0.004, 0.008)  # s = 0.51, 1.02, 2.04


def programs(
    seeds: range, sigmas: tuple[float, ...] = SIGMAS
) -> Iterator[tuple[int, float, IntegerProgram, SmoothedGrid]]:
    """Random programs with their exact smoothed classifiers."""
    for seed in seeds:
        for sigma in sigmas:
            for shape in SHAPES:
                yield seed, sigma, *program_and_grid(seed, sigma, shape)


@lru_cache(maxsize=32)
def program_and_grid(seed: int, sigma: float, shape: tuple[int, int, int]) -> tuple[IntegerProgram, SmoothedGrid]:
    reach = REACH[math.prod(shape)]
    program = tiny_program(seed, shape, CENTRE, NoiseTable.for_sigma(sigma).hi, reach)
    return program, exact(program, sigma, reach)


def exact(program: IntegerProgram, sigma: float, reach: int) -> SmoothedGrid:
    table, shape = NoiseTable.for_sigma(sigma), program.input.shape
    assert len(shape) == 3
    return smoothed_grid(
        program_classifier(program, sigma), shape, CENTRE, reach, table.probabilities(), 255 * sigma,
        total_distance(sigma, math.prod(shape)), program.num_classes,
    )  # fmt: skip


def check_programs(seeds: range) -> None:
    several, inflated = 0, 0
    count = 0
    for seed, sigma, program, grid in programs(seeds):
        where = f"seed {seed}, sigma {sigma}, shape {program.input.shape}"
        assert grid.steepest() <= 1, where
        assert grid.contradictions() == 0, where
        several += len(set(grid.classes.tolist())) > 1
        inflated += grid.contradictions(1.5) > 0
        count += 1
    # Not vacuous: most networks change class within the box, and radii half as large again are refuted.
    assert several > 0.4 * count
    assert inflated > 0.35 * count


def test_random_networks_obey_the_theorem_everywhere() -> None:
    check_programs(range(4))


@pytest.mark.slow
def test_many_random_networks_obey_the_theorem_everywhere() -> None:
    check_programs(range(4, 60))


HALF_SPACES = (
    (0.02, (1,), 24), (0.02, (-1,), 24), (0.02, (1, 1), 14), (0.02, (3, 4), 14), (0.02, (5, -12), 14),
    (0.008, (1, 2, 2), 6), (0.008, (2, -3, 6), 6),
)  # fmt: skip


@pytest.mark.parametrize(("sigma", "normal", "reach"), HALF_SPACES)
def test_half_spaces_are_certified_up_to_the_last_grey_level(sigma: float, normal: tuple[int, ...], reach: int) -> None:
    """The worst case of the bound: the exact class changes less than one grey level behind the certified radius."""
    limit = NoiseTable.for_sigma(sigma).hi
    grid = exact(half_space(normal, CENTRE * sum(normal), limit), sigma, reach)
    assert 0.99 < grid.steepest() <= 1
    assert grid.contradictions() == 0
    distance, classes, radii = np.sqrt(grid.squared_distances), grid.classes, 255 * grid.radii()
    flip = np.where(classes[None] != classes[:, None], distance, np.inf).min(1)
    inner = (np.abs(grid.points - CENTRE).max(1) <= reach // 2) & (radii >= 0)
    assert inner.sum() > 10 and np.isfinite(flip[inner]).all() and radii[inner].max() > 4
    assert (flip[inner] > radii[inner]).all()
    assert (flip[inner] - radii[inner] < 1).all()


def test_one_pixel_half_space_has_its_known_radius() -> None:
    sigma, limit = 0.02, NoiseTable.for_sigma(0.02).hi
    grid = exact(half_space((1,), 110, limit), sigma, 24)
    for point, radius in zip(grid.points[:, 0].tolist(), grid.radii(), strict=True):
        expected = abs(point - 110 + 0.5) / 255
        assert radius <= expected
        assert point - 110 > 25 or radius == pytest.approx(expected, abs=2e-6)  # Further off d·τ counts.


def masses(s: float, h: int, kind: str) -> list[int]:
    """Other noises of about this width, as 64-bit tables."""
    scale = mpmath.mpf(s)
    if kind == "discrete Gaussian":
        weights = [mpmath.exp(-mpmath.mpf(k * k) / (2 * scale**2)) for k in range(-h, h + 1)]
    else:  # Gaussian noise that is truncated towards zero instead of rounded.
        tails = [mpmath.ncdf(-abs(k) / scale) - mpmath.ncdf(-(abs(k) + 1) / scale) for k in range(-h, h + 1)]
        weights = [2 * tail if k == h else tail for k, tail in enumerate(tails)]
    total = mpmath.fsum(weights)
    values = [int(mpmath.nint(weight / total * 2**64)) for weight in weights]
    values[h] += (1 << 64) - sum(values)
    return values


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["discrete Gaussian", "truncated Gaussian"])
def test_other_noise_is_found_out(sigma: float, kind: str) -> None:
    """The plain radius s·Φ⁻¹(p) does not hold for them; the same comparison says so."""
    h, s = NoiseTable.for_sigma(sigma).hi, 255 * sigma
    classify = program_classifier(half_space((1, 1), 2 * CENTRE, h), sigma)
    grid = smoothed_grid(classify, (1, 1, 2), CENTRE, 8, masses(s, h, kind), s, total_distance(sigma, 2), 2)
    assert grid.steepest() > 1.003
    if kind == "truncated Gaussian":
        assert grid.contradictions() > 0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_coarse_table_is_sound_with_its_distance_and_unsound_without(sigma: float) -> None:
    """16 random bits a pixel: the missing tails would certify any distance if d·τ were left out."""
    table, s = NoiseTable.for_sigma(sigma), 255 * sigma
    coarse = [(t + (1 << 47)) >> 48 << 48 for t in table.thresholds]
    drawn = [t - below for below, t in zip([0, *coarse[:-1]], coarse, strict=True)]
    tv = sum(abs(p - q) for p, q in zip(drawn, table.probabilities(), strict=True)) / 2**65 + table.tv
    classify = program_classifier(half_space((1,), CENTRE, table.hi), sigma)
    with_distance, without = (
        smoothed_grid(classify, (1, 1, 1), CENTRE, 20, drawn, s, d_tau, 2) for d_tau in (tv * (1 + 1e-9), 0.0)
    )
    assert with_distance.steepest() <= 1 and with_distance.contradictions() == 0
    assert without.steepest() > 1 and without.contradictions() > 0


N, ALPHA = 2000, 0.3


def radii_from_true_shares(grid: SmoothedGrid, point: int, sigma: float) -> dict[str, float | None]:
    """Every rule's radius from counts that say no more than the exact probabilities."""
    row, total = [int(weight) for weight in grid.weights[point]], grid.total
    top = max(range(len(row)), key=row.__getitem__)
    votes = row[top] * N // total
    counts = {name: votes if name == top else -(-weight * N // total) for name, weight in enumerate(row)}
    exact_bound = (row[top] << 40) // total
    found = {
        "fixed": certified_radius(votes, N, sigma, ALPHA, grid.d_tau),
        "sequential": sequential_radius(votes, N, sigma, ALPHA, grid.d_tau),
        "two classes": two_class_radius(counts, top, N, sigma, ALPHA, grid.d_tau),
        "exact": incremental_radius(exact_bound, sigma, grid.d_tau),
    }
    return {rule: None if radius is None else float(radius) for rule, radius in found.items()}


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (1, 1, 3)])
def test_rules_fed_with_the_truth_certify_nothing_false(shape: tuple[int, int, int]) -> None:
    sigma, given = 0.008, dict.fromkeys(("fixed", "sequential", "two classes", "exact"), 0)
    for seed in range(4):
        _, grid = program_and_grid(seed, sigma, shape)
        distances, classes = grid.squared_distances, grid.classes
        for point in np.random.default_rng(seed).choice(len(grid.points), 12, replace=False):
            for rule, radius in radii_from_true_shares(grid, point, sigma).items():
                if radius is not None:
                    inside = distances[point] <= grey_levels_squared(radius)
                    assert (classes[inside] == classes[point]).all(), (rule, seed, point)
                    given[rule] += 1
    assert min(given.values()) > 20


def test_incremental_rule_fed_with_the_truth_certifies_nothing_false() -> None:
    """A near network by another last bias: its own smoothed class holds within the radius from discordant pairs."""
    sigma, shape, n, given = 0.008, (1, 2, 1), 5000, 0
    for seed in range(6):
        program, grid = program_and_grid(seed, sigma, shape)
        bias = program.ops[-1].bias + np.random.default_rng(seed).integers(-30, 31, program.num_classes)  # type: ignore[attr-defined]
        near = IntegerProgram(
            (*program.ops[:-1], replace(program.ops[-1], bias=bias.astype(np.int32))),  # type: ignore[call-arg]
            (*program.tensors[:-1], replace(program.tensors[-1], lo=-(2**30), hi=2**30)),
            program.output,
        )
        first, second = program_classifier(program, sigma), program_classifier(near, sigma)
        k, table = program.num_classes, NoiseTable.for_sigma(sigma)
        joint = smoothed_grid(
            lambda x, first=first, second=second, k=k: first(x) * k + second(x),  # type: ignore[misc]
            shape, CENTRE, REACH[2], table.probabilities(), 255 * sigma, grid.d_tau, k * k,
        )  # fmt: skip
        cells = joint.weights.reshape(-1, k, k)
        near_weights = cells.sum(1)
        near_class = np.array([max(range(k), key=row.__getitem__) for row in near_weights.tolist()])
        for point in range(0, len(joint.points), 9):
            top = int(grid.classes[point])
            lost = int(cells[point, top].sum() - cells[point, top, top])
            gained = int(cells[point, :, top].sum() - cells[point, top, top])
            pairs = Pairs(n, -(-lost * n // joint.total), gained * n // joint.total)
            votes = int(grid.weights[point, top]) * n // grid.total
            for split in (Split.of(ALPHA), Split.of(ALPHA, gained=True)):
                bound = near_probability(votes, n, pairs, split)
                assert bound * joint.total <= int(near_weights[point, top]) << 40
                radius = incremental_radius(bound, sigma, grid.d_tau)
                if radius is not None:
                    inside = joint.squared_distances[point] <= grey_levels_squared(float(radius))
                    assert (near_class[inside] == top).all(), (seed, point)
                    given += 1
    assert given > 50


def images_of(grid: SmoothedGrid, shape: tuple[int, int, int], picked: NDArray[np.int64]) -> NDArray[np.uint8]:
    return grid.points[picked].astype(np.uint8).reshape(-1, *shape)


def test_votes_on_the_drawn_noise_follow_the_exact_probabilities() -> None:
    """The whole path, generator, table, addition and program, against the enumeration: one χ² over all."""
    statistic, freedom, samples = 0.0, 0, 2000
    for seed, sigma, program, grid in programs(range(2)):
        shape = program.input.shape
        assert len(shape) == 3
        picked = np.random.default_rng(seed).choice(len(grid.points), 8, replace=False)
        votes = count_votes(
            program_classifier(program, sigma), images_of(grid, shape, picked), picked.tolist(),
            table=NoiseTable.for_sigma(sigma), seed=seed, stage=ESTIMATE, samples=samples, batch_size=500,
        )  # fmt: skip
        expected = samples * grid.probabilities()[picked]
        votes = np.pad(votes, ((0, 0), (0, expected.shape[1] - votes.shape[1])))
        assert (votes[expected == 0] == 0).all()
        for observed, mean in zip(votes, expected, strict=True):
            usual = mean >= 10
            if usual.sum() >= 2:
                # Rare classes count as one, so that every cell has its expected size.
                o, m = np.append(observed[usual], observed[~usual].sum()), np.append(mean[usual], mean[~usual].sum())
                o, m = (o[:-1], m[:-1]) if m[-1] < 1e-9 else (o, m)
                statistic += float(((o - m) ** 2 / np.maximum(m, 1.0)).sum())
                freedom += len(m) - 1
    assert freedom > 60
    assert 1e-6 < chi2.sf(statistic, freedom) < 1 - 1e-6


def test_certified_images_keep_their_exact_class_within_the_certified_set() -> None:
    """`certify_image` with its own noise, against every image of the box."""
    certified, reached, changed = 0, 0.0, 0
    for seed, sigma, program, grid in programs(range(3), (0.004, 0.008)):
        settings = SmoothingSettings(sigma=sigma, n0=30, n=1000, alpha=1e-6, seed=seed)
        classify, distances, classes, shape = (
            program_classifier(program, sigma), grid.squared_distances, grid.classes, program.input.shape,
        )  # fmt: skip
        assert len(shape) == 3
        for point in np.random.default_rng(seed).choice(len(grid.points), 10, replace=False):
            image = images_of(grid, shape, np.array([point]))[0]
            line = certify_image(classify, image, int(point), None, settings, program=program.hash, data="d")
            if not line.certified:
                continue
            inside = distances[point] <= grey_levels_squared(line.radius)
            assert (classes[inside] == line.predicted).all(), (seed, sigma, shape, point)
            certified += 1
            changed += bool((classes[~inside] != line.predicted).any())
            p = grid.probabilities()[point, line.predicted]
            reached = max(reached, line.radius / (sigma * norm.ppf(p))) if 0.6 < p < 0.999 else reached
    assert certified > 200 and changed > 50
    assert 0.85 < reached < 1  # Radii come close to the true ones and do not pass them.
