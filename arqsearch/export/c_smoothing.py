"""Integer tables of smoothing for the C99 package: noise thresholds, K(n, r), the votes that a prediction needs."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.certify.binomial import certified_radius, minimal_count
from arqsearch.certify.noise import ESTIMATE, SELECT, NoiseTable
from arqsearch.certify.smoothing import (
    SmoothingSettings,
    check_input_range,
    count_classes,
    first_argmax,
    total_distance,
)
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram

#: What arq_smoothing.h calls ARQ_ABSTAIN.
ABSTAIN = 0xFFFFFFFF
#: Radii of a table are multiples of sigma over this, as far as n votes of n reach, and no more than this many.
RADII_A_SIGMA, MOST_RADII = 8, 64
#: Longest table of a predictor: it holds one number for every count of votes.
MOST_PREDICT_SAMPLES = 10_000


@dataclass(frozen=True)
class Certifier:
    """The fixed rule with radii from a table.

    :param n0: samples that select the class.
    :param n: fresh samples that estimate its probability.
    :param alpha: failure probability of one image.
    :param radius_micro: radii in millionths of the [0,1] pixel unit, ascending from 0.
    :param counts: K(n, r) of each radius.
    """

    n0: int
    n: int
    alpha: float
    radius_micro: tuple[int, ...]
    counts: tuple[int, ...]

    def radius(self, votes: int) -> int | None:
        """Largest radius of the table, in millionths, that so many of n votes certify; None: abstain."""
        passed = [r for r, count in zip(self.radius_micro, self.counts, strict=True) if votes >= count]
        return max(passed) if passed else None


@dataclass(frozen=True)
class Predictor:
    """PREDICT of Cohen et al. as a table.

    :param n: samples.
    :param alpha: failure probability of one answer.
    :param minimum: votes that the first class needs, by the votes of the first two together.
    """

    n: int
    alpha: float
    minimum: tuple[int, ...]


@dataclass(frozen=True)
class SmoothingTables:
    """Everything that prediction and certification on a device need besides the network."""

    noise: NoiseTable
    seed: int
    certifier: Certifier
    predictor: Predictor


def smoothing_tables(program: IntegerProgram, settings: SmoothingSettings) -> SmoothingTables:
    """Tables for the certificate settings of a run; predictions take ``n0`` samples (at most 10 000).

    :param settings: sigma in [0,1] pixels, n0, n, alpha and seed are read.
    :raises ArqError: when noisy pixels at this sigma could leave the program's input range.
    """
    check_input_range(program.input.lo, program.input.hi, settings.sigma)
    coordinates = int(np.prod(program.input.shape))
    return SmoothingTables(
        NoiseTable.for_sigma(settings.sigma),
        settings.seed,
        certifier(settings.n0, settings.n, settings.sigma, settings.alpha, coordinates),
        predictor(min(settings.n0, MOST_PREDICT_SAMPLES), settings.alpha),
    )


def certifier(n0: int, n: int, sigma: float, alpha: float, coordinates: int) -> Certifier:
    """K(n, r) at r = 0, sigma/8, 2·sigma/8, .., to the last radius that n votes of n certify.

    :param sigma: noise level in [0,1] pixels.
    :param coordinates: H·W·C of the image, for the distance of the noise table from the ideal.
    """
    d_tau = total_distance(sigma, coordinates)
    step = max(1, round(Decimal(str(sigma)) * 1_000_000 / RADII_A_SIGMA))
    limit = certified_radius(n, n, sigma, alpha, d_tau)
    last = min(int((limit or Decimal(0)) * 1_000_000) // step, MOST_RADII - 1)
    radii = tuple(step * i for i in range(last + 1))
    counts = tuple(minimal_count(n, radius / 1_000_000, sigma, alpha, d_tau) for radius in radii)
    return Certifier(n0, n, alpha, radii, counts)


def predictor(n: int, alpha: float) -> Predictor:
    """Votes of the first class at which the two-sided exact binomial test against 1/2 gives at most alpha.

    Cohen, Rosenfeld and Kolter (ICML 2019), PREDICT: answer when the p-value of n_A of n_A + n_B votes is at most
    alpha. For m = n_A + n_B and n_A > m/2 that value is 2·P(Bin(m, 1/2) ≥ n_A), computed here in integers.

    :param n: samples, at most 10 000.
    :returns: ``minimum`` has n + 1 entries; m + 1 where not even m of m votes suffice.
    """
    if not 1 <= n <= MOST_PREDICT_SAMPLES:
        raise ArqError(f"A prediction from {n} samples needs a table that long; choose 1..{MOST_PREDICT_SAMPLES}.")
    share = Fraction(str(float(alpha)))
    # tail = sum of C(m, i) for i >= votes, below = C(m, votes - 1); both move on from m to m + 1.
    minimum, votes, tail, below = [1], 1, 0, 1
    for m in range(1, n + 1):
        tail = 2 * tail + below
        below = below * m // (m + 1 - votes)
        if 2 * tail * share.denominator > share.numerator << m:
            below = below * (m + 1 - votes) // votes
            tail -= below
            votes += 1
        minimum.append(votes)
    return Predictor(n, alpha, tuple(minimum))


@dataclass(frozen=True, eq=False)
class SmoothedVector:
    """One image with the expected outcome of a prediction and a certification, both with few samples."""

    image_id: int
    image: NDArray[np.uint8]
    predictor: Predictor
    predict_votes: tuple[int, ...]
    predicted: int
    certifier: Certifier
    certify_votes: tuple[int, ...]
    selected: int
    certified: int
    radius_micro: int


def smoothed_vector(
    program: IntegerProgram, settings: SmoothingSettings, image: NDArray[np.uint8], image_id: int
) -> SmoothedVector:
    """Expected votes, prediction and certificate by the torch backend.

    :param settings: n0 and n are taken as they are; the prediction takes n0 samples.
    :param image: uint8 ``(H, W, C)``.
    """
    check_input_range(program.input.lo, program.input.hi, settings.sigma)

    def classify(pixels: Tensor) -> Tensor:
        return first_argmax(program.run(pixels, backend="torch"))

    few = certifier(settings.n0, settings.n, settings.sigma, settings.alpha, image.size)
    ask = predictor(settings.n0, settings.alpha)

    def votes(stage: int, samples: int) -> tuple[int, ...]:
        counted = count_classes(classify, image, image_id, stage, samples, settings)
        return tuple(counted.get(name, 0) for name in range(program.num_classes))

    selection, estimate = votes(SELECT, settings.n0), votes(ESTIMATE, settings.n)
    first = selection.index(max(selection))
    others = max((count for name, count in enumerate(selection) if name != first), default=0)
    answers = selection[first] >= ask.minimum[selection[first] + others]
    radius = few.radius(estimate[first])
    return SmoothedVector(
        image_id, image, ask, selection, first if answers else ABSTAIN,
        few, estimate, first, ABSTAIN if radius is None else first, radius or 0,
    )  # fmt: skip


def halves(table: NoiseTable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """High and low 32 bits of the thresholds t_lo .. t_(hi-1)."""
    inner = table.thresholds[:-1]
    return tuple(t >> 32 for t in inner), tuple(t & 0xFFFFFFFF for t in inner)
