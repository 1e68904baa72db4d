"""Floating-point smoothing leaks the image that was smoothed; integer smoothing has nothing to leak.

After Voracek and Hein, "Sound randomized smoothing in floating-point arithmetics" (ICLR 2023). Cohen's theorem needs
that the noisy inputs of x and x' are shifted copies of one density. fl(x + e) is not: where |x + e| is smaller than
|e|, the sum is exact to more bits than e has, and its low bits are those of x. So a network can ask of every pixel
"is there a float32 e with fl(x_i + e) = y_i?" for one image x that it has memorised. On noisy copies of x the answer
is always yes; one grey level further off it is no for some of the pixels. The network below answers A when at most a
few pixels say no: A is certified at x with all votes, and yet an image well inside the radius is never called A.

Drawn as integers and added as integers, x + Z is a point of the pixel grid, the same for many pairs (x, Z). The same
network, given these sums, then obeys the theorem, which is checked with its exact probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from arqsearch.certify.binomial import certified_radius, grey_levels_squared
from arqsearch.certify.noise import NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.smoothing import SmoothingSettings, total_distance

Floats = NDArray[np.float32]
Levels = NDArray[np.int64]

SIGMA, ALPHA, SAMPLES, SHAPE = 0.25, 0.001, 1000, (32, 32, 3)
D = 32 * 32 * 3
#: Pixels that may say no before the network answers B (class 1) instead of A (class 0).
ALLOWED = 3
MEMORISED: Levels = np.random.default_rng(0).integers(1, 255, D)
#: Every pixel one grey level darker: √3072 / 255 = 0.217 away.
NEIGHBOUR: Levels = MEMORISED - 1
DISTANCE = np.sqrt(D) / 255


def unit(levels: Levels) -> Floats:
    """Grey levels to [0,1] as everyone does it: float32 division by 255."""
    return levels.astype(np.float32) / np.float32(255)


def reachable(y: Floats, x: Floats) -> NDArray[np.bool_]:
    """Whether some float32 e gives fl(x + e) = y: the nearest candidate for e or one beside it."""
    e = y - x
    beside = (e, np.nextafter(e, np.float32(np.inf)), np.nextafter(e, np.float32(-np.inf)))
    return np.asarray(np.logical_or.reduce([x + candidate == y for candidate in beside]))


def reachable_by_integers(y: Floats, x: Floats) -> NDArray[np.bool_]:
    """Whether some integer k gives fl(fl(k/255) + x) = y."""
    k = np.rint((y.astype(np.float64) - x) * 255).astype(np.int64)
    return np.asarray(unit(k) + x == y)


def float_noise(levels: Levels) -> Floats:
    """Float32 noise on float32 pixels, as in the published code of Cohen et al. and its successors."""
    e = torch.randn((SAMPLES, D), generator=torch.Generator().manual_seed(7)) * SIGMA
    noisy: Floats = (torch.from_numpy(unit(levels)) + e).numpy()
    return noisy


def integer_noise_added_as_floats(levels: Levels) -> Floats:
    """The half measure: Z is an integer, but Z/255 and x/255 are rounded before they are added."""
    z = np.rint(np.random.default_rng(7).normal(0.0, 255 * SIGMA, (SAMPLES, D))).astype(np.int64)
    return unit(z) + unit(levels)


LEAKS = [(float_noise, reachable), (integer_noise_added_as_floats, reachable_by_integers)]


@pytest.mark.parametrize(("add_noise", "possible"), LEAKS, ids=["float noise", "integer noise added as floats"])
def test_float_sums_give_a_false_certificate(
    add_noise: Callable[[Levels], Floats], possible: Callable[[Floats, Floats], NDArray[np.bool_]]
) -> None:
    memory = unit(MEMORISED)
    votes = [int(((~possible(add_noise(x), memory)).sum(1) <= ALLOWED).sum()) for x in (MEMORISED, NEIGHBOUR)]
    assert votes[0] == SAMPLES
    radius = certified_radius(votes[0], SAMPLES, SIGMA, ALPHA, 0.0)
    assert radius is not None and float(radius) > 2.5 * DISTANCE
    # The smoothed class at the neighbour is B, at the same confidence and with the same "radius".
    opposite = certified_radius(SAMPLES - votes[1], SAMPLES, SIGMA, ALPHA, 0.0)
    assert opposite is not None and float(opposite) > 2.5 * DISTANCE


def refusals(possible: Callable[[Floats, Floats], NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """For each memorised level and each integer sum lo .. 255+hi: does the pixel say no? ``(256, sums)``."""
    table = NoiseTable.for_sigma(SIGMA)
    sums = np.arange(table.lo, 256 + table.hi)
    return ~possible(unit(sums)[None], unit(np.arange(256))[:, None])


def exact_counts(levels: Levels, refused: NDArray[np.bool_]) -> NDArray[np.float64]:
    """P(number of pixels of x + Z that say no ≤ K) for K = 0 .. D, x = `levels`, from the exact table."""
    table = NoiseTable.for_sigma(SIGMA)
    masses = np.array(table.probabilities(), dtype=np.float64) / 2.0**64
    counts = np.zeros(D + 1)
    counts[0] = 1.0
    for memory, level in zip(MEMORISED.tolist(), levels.tolist(), strict=True):
        no = float(masses @ refused[memory, level : level + len(masses)])
        counts[1:] = counts[1:] * (1 - no) + counts[:-1] * no
        counts[0] *= 1 - no
    return np.minimum(np.cumsum(counts), 1.0)


@pytest.mark.parametrize("possible", [reachable, reachable_by_integers])
def test_integer_sums_leak_nothing(possible: Callable[[Floats, Floats], NDArray[np.bool_]]) -> None:
    """Whatever number of refusals the network allows, its exact probabilities obey the theorem on the grid."""
    refused, d_tau = refusals(possible), total_distance(SIGMA, D)
    assert 0.001 < refused.mean() < 0.9  # It does see something: pixels say yes and no.
    here, s = exact_counts(MEMORISED, refused), 255 * SIGMA
    contradictions = covered = 0
    for step in (1, -1, 2, -2, 4, 8):
        moved = np.clip(MEMORISED + step, 0, 255)
        distance = int(((moved - MEMORISED) ** 2).sum())
        there = exact_counts(moved, refused)
        # Of all functions of x + Z the best tells the two images apart with probability 2Φ(‖δ‖/2s) − 1 only.
        advantage = 2 * norm.cdf(np.sqrt(distance) / (2 * s)) - 1
        assert np.abs(here - there).max() <= advantage + 2 * d_tau + 1e-9
        for at_x, at_moved in ((here, there), (1 - here, 1 - there)):  # Class A, class B, for each K.
            sure = at_x > 0.5 + d_tau
            radii = SIGMA * norm.ppf(np.clip(at_x[sure] - d_tau - 1e-12, 0, 1 - 1e-12))
            inside = np.array([distance <= grey_levels_squared(float(radius)) for radius in radii])
            contradictions += int((at_moved[sure][inside] < 0.5).sum())
            covered += int(inside.sum())
    assert contradictions == 0 and covered > 1000


def test_the_same_network_on_integer_sums_is_certified_soundly() -> None:
    """`certify_image` on the network with the bound on refusals that suits it best; and the neighbour's exact class."""
    refused = refusals(reachable)
    here, there = exact_counts(MEMORISED, refused), exact_counts(NEIGHBOUR, refused)
    sums = torch.from_numpy(refused)
    low, memory = NoiseTable.for_sigma(SIGMA).lo, torch.from_numpy(MEMORISED)

    def network(allowed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda pixels: (
            sums[memory, pixels.flatten(1).to(torch.int64) - low].sum(1) > allowed
        ).to(torch.int64)  # fmt: skip

    image = MEMORISED.astype(np.uint8).reshape(SHAPE)
    settings = SmoothingSettings(sigma=SIGMA, n0=20, n=200, alpha=ALPHA, seed=1, batch_size=50)
    spread = np.searchsorted(here, [0.02, 0.5, 0.98, 1 - 1e-9]).tolist()
    covered = 0
    for allowed in (ALLOWED, *spread):
        line = certify_image(network(allowed), image, 0, None, settings, program="leak", data="d")
        share = line.estimate.get(0, 0) / settings.n
        assert abs(share - here[allowed]) < 5 * np.sqrt(0.25 / settings.n)
        if line.certified and grey_levels_squared(line.radius) >= D:
            covered += 1
            assert (there[allowed] > 0.5) == (line.predicted == 0)
    assert covered >= 2
