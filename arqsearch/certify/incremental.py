"""The ``incremental`` rule: certify a near network from another's cached votes by counting discordant pairs.

Both networks are run on the same noise. With A the certified class of the cached network f,

    P(f'=A) = P(f=A) − P(f=A, f'≠A) + P(f≠A, f'=A),

so a lower bound on the first term, an upper bound on the second and, if wanted, a lower bound on the third give one on
P(f'=A); α is split over them by a union bound. Ugare et al. (ICLR 2024, "Incremental randomized smoothing
certification") subtract an upper bound ζ on P(f≠f'), which counts more pairs: at the same split theirs is never larger.

The bounds hold for a network f' that was fixed before this noise was drawn. Shared noise that chose or trained f' makes
them void, which `check_independent` refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeAlias

from arqsearch.certify.binomial import RADIUS_STEP, target_probability, upper_tail
from arqsearch.errors import ArqError

#: Bounds on probabilities are multiples of 2**-40, rounded to the safe side.
_BITS = 40
#: Radii in units of σ are looked for up to here: 50 digits no longer tell Φ of it from 1.
_LARGEST = 14
_Real: TypeAlias = Any  # An mpmath number; the package has no types.


@dataclass(frozen=True)
class Pairs:
    """What the two networks did on shared samples, A being the class of the cached network.

    :param samples: shared samples.
    :param lost: samples with f = A and f' ≠ A.
    :param gained: samples with f ≠ A and f' = A.
    """

    samples: int
    lost: int
    gained: int

    def __post_init__(self) -> None:
        if self.samples < 1 or min(self.lost, self.gained) < 0 or self.lost + self.gained > self.samples:
            raise ArqError(f"{self.lost} lost and {self.gained} gained of {self.samples} shared samples cannot be.")


@dataclass(frozen=True)
class Split:
    """How α is divided: on P(f=A), on the lost pairs and, if positive, on the gained pairs."""

    base: float
    lost: float
    gained: float = 0.0

    @staticmethod
    def of(alpha: float, gained: bool = False) -> Split:
        """Equal parts: two, or three with the gained pairs."""
        part = alpha / (3 if gained else 2)
        return Split(part, part, part if gained else 0.0)


@lru_cache(maxsize=65536)
def lower_bound(k: int, n: int, alpha: float) -> int:
    """One-sided lower Clopper-Pearson bound on a probability, in units of 2⁻⁴⁰, rounded down.

    :param k: successes of n.
    """
    import mpmath

    limit = mpmath.mpf(str(alpha))
    low, high = 0, 1 << _BITS  # The tail is at most α at low, more at high.
    if k == 0:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if upper_tail(k, n, mpmath.ldexp(middle, -_BITS)) <= limit:
            low = middle
        else:
            high = middle
    return low


def upper_bound(k: int, n: int, alpha: float) -> int:
    """One-sided upper Clopper-Pearson bound on a probability, in units of 2⁻⁴⁰, rounded up."""
    return (1 << _BITS) - lower_bound(n - k, n, alpha)


def near_probability(votes: int, n: int, pairs: Pairs, split: Split) -> int:
    """Lower bound on P(f'=A) in units of 2⁻⁴⁰, at confidence 1 − (sum of the split).

    :param votes: votes of f for A among its n estimate samples.
    """
    bound = lower_bound(votes, n, split.base) - upper_bound(pairs.lost, pairs.samples, split.lost)
    return bound + (lower_bound(pairs.gained, pairs.samples, split.gained) if split.gained > 0 else 0)


def published_probability(votes: int, n: int, disagreements: int, samples: int, split: Split) -> int:
    """The published bound: P(f=A) less an upper bound ζ on P(f≠f'), for comparison; in units of 2⁻⁴⁰.

    :param disagreements: samples with f ≠ f'.
    """
    return lower_bound(votes, n, split.base) - upper_bound(disagreements, samples, split.lost)


def incremental_radius(bound: int, sigma: float, d_tau: float) -> Decimal | None:
    """Largest multiple of 10⁻⁶ with Φ(r/σ) + d·τ ≤ bound, or None when not even radius 0 is certified.

    :param bound: from :func:`near_probability`.
    :param sigma: noise level in [0,1] pixels.
    :param d_tau: distance of the noise table from the ideal, summed over the coordinates.
    :returns: radius in [0,1] pixels.
    """
    import mpmath

    def certified(steps: int) -> bool:
        return bool(
            target_probability(steps * RADIUS_STEP, Decimal(str(float(sigma))), d_tau) <= mpmath.ldexp(bound, -_BITS)
        )

    if not certified(0):
        return None
    low, high, most = 0, 1, int(_LARGEST * sigma / float(RADIUS_STEP))
    while high < most and certified(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if certified(middle) else (low, middle)
    return low * RADIUS_STEP


def check_independent(provenance: Iterable[tuple[int, int]] | None, seed: int, stage: int) -> None:
    """Refuse noise that had a part in making the near network.

    :param provenance: (seed, stage) of every noise stream that entered its selection or training; None if unknown.
    :param seed: key of the shared noise.
    :param stage: its stage.
    :raises ArqError: when the stream is listed, or nothing is known.
    """
    if provenance is None:
        raise ArqError(
            "The near network does not say which noise entered its selection and training, so shared noise proves "
            "nothing about it; lower it with this version (its metadata will say), or use the rule 'fixed' or "
            "'sequential'."
        )
    if (seed, stage) in set(provenance):
        raise ArqError(
            f"The noise of seed {seed}, stage {stage} entered the selection or training of the near network, so its "
            "votes on that noise are biased; certify the cached network with another seed, or use the rule 'fixed' or "
            "'sequential'."
        )
