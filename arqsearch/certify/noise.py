"""The integer noise of randomized smoothing: the rounded Gaussian from an exact table and Philox4x32-10.

Every coordinate is drawn from one 64-bit word of a counter-based generator, so a noise value depends on (seed,
stage, image, sample, coordinate) alone: not on batches, threads, workers or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from arqsearch.errors import ArqError

#: Stages of the generator: disjoint noise for search, for choosing the class and for estimating its probability.
SEARCH, SELECT, ESTIMATE = 0, 1, 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_AMBIGUOUS = 32767  # Guide entry of a bucket that holds a threshold.
_BLOCKS = {"cpu": 1 << 15, "cuda": 1 << 22}  # Philox blocks at a time: on a CPU the work arrays stay in cache.


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """Thresholds of the rounded Gaussian P(Z=k) = Φ((k+½)/s) − Φ((k−½)/s), s = 255·σ grey levels.

    A uniform 64-bit word u becomes the smallest k with u < t_k, t_k = 2^64·Φ((k+½)/s) to the nearest integer.

    :param sigma: noise level in [0,1] pixels.
    :param lo: smallest noise value in grey levels.
    :param hi: largest noise value in grey levels, −lo.
    :param thresholds: t_lo .. t_hi, the last one 2^64.
    :param tv: upper bound on the total variation distance of one coordinate from the ideal rounded Gaussian.
    """

    sigma: float
    lo: int
    hi: int
    thresholds: tuple[int, ...]
    tv: float
    _lookup: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def for_sigma(sigma: float) -> NoiseTable:
        """Build the table of a noise level, or take it from the cache of the process.

        :param sigma: noise level in [0,1] pixels; its shortest decimal form counts (0.1 means exactly 1/10).
        :raises ArqError: when σ is not positive or the noise would leave 16 bits.
        """
        return _build(Decimal(str(float(sigma))))

    def probabilities(self) -> tuple[int, ...]:
        """Return 2^64·P(Z=k) for k = lo .. hi, exactly."""
        return tuple(t - s for s, t in zip((0, *self.thresholds[:-1]), self.thresholds, strict=True))

    def lookup(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table in the three forms that drawing uses.

        :returns: the value by the top 16 bits of a word where these suffice (int16, 65536); the high 32 bits of
            t_lo .. t_(hi−1) (int64); t_lo .. t_(hi−1) less 2^63 (int64).
        """
        key = str(device)
        if key not in self._lookup:
            inner = self.thresholds[:-1]
            high = np.array([t >> 32 for t in inner], dtype=np.int64)
            full = np.array([t - (1 << 63) for t in inner], dtype=np.int64)
            edges = np.arange(65537, dtype=np.int64) << 16
            first = np.searchsorted(high, edges[:-1], side="left")
            behind = np.searchsorted(high, edges[1:], side="left")
            guide = np.where(first == behind, self.lo + first, _AMBIGUOUS).astype(np.int16)
            self._lookup[key] = (
                torch.from_numpy(guide).to(device),
                torch.from_numpy(high).to(device),
                torch.from_numpy(full).to(device),
            )
        return self._lookup[key]


@lru_cache(maxsize=16)
def _build(sigma: Decimal) -> NoiseTable:
    import mpmath

    scale = 255 * sigma
    if not sigma.is_finite() or not Decimal("0.001") <= sigma <= 13:
        raise ArqError(
            f"sigma = {sigma} is not a usable noise level: it is stated in [0,1] pixels and must lie in 0.001..13 "
            f"({scale:.4g} grey levels). If {sigma} was meant in grey levels, give {sigma / 255:.4g}."
        )
    one = 1 << 64
    with mpmath.workdps(60):
        s = mpmath.mpf(scale.as_integer_ratio()[0]) / scale.as_integer_ratio()[1]
        root = s * mpmath.sqrt(2)
        tails: list[
            mpmath.mpf
        ] = []  # 1 − Φ((k+½)/s) for k = 0, 1, ..; the lower half of the table follows by symmetry.
        while not tails or int(mpmath.nint(tails[-1] * one)) > 0:
            tails.append(mpmath.erfc((len(tails) + mpmath.mpf(1) / 2) / root) / 2)
        upper = [one - int(mpmath.nint(tail * one)) for tail in tails]
        hi = len(upper) - 1
        # The ideal mass beyond hi, then every |p_k − q_k| from 0 to hi; both halves are mirror images.
        errors = [(one - t) / mpmath.mpf(one) - tail for t, tail in zip(upper, tails, strict=True)]
        distance = tails[-1] + sum(abs(b - a) for a, b in pairwise(errors)) + abs(errors[0])
        tv = float(np.nextafter(float(distance * (1 + mpmath.mpf(10) ** -30)), np.inf))
    lower = [one - t for t in reversed(upper[:-1])]
    return NoiseTable(float(sigma), -hi, hi, (*lower, *upper), tv)


def philox(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on counters that broadcast against each other.

    :param counter: four int64 tensors of 32-bit words.
    :param key: 64-bit key; its low word is the first key word.
    :returns: four int64 tensors whose low 32 bits are the output words; the high bits are arbitrary.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(_ROUNDS):
        # Products of 32-bit words wrap in int64; both halves of the 64-bit pattern are right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = _mix(p1, c1, k0)
        c2 = _mix(p0, c3, k1)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _mix(product: Tensor, word: Tensor, key: int) -> Tensor:
    """Return the high half of ``product`` xor ``word`` xor ``key``, as a clean 32-bit word."""
    mixed = product >> 32
    mixed = mixed.bitwise_xor_(word) if word.shape in (mixed.shape, (1, 1)) else mixed ^ word
    return mixed.bitwise_xor_(key).bitwise_and_(_MASK)


def noise(
    table: NoiseTable,
    *,
    seed: int,
    stage: int,
    image_ids: Sequence[int],
    sample_start: int,
    sample_count: int,
    coordinates: int,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw the noise of samples ``sample_start .. sample_start + sample_count − 1`` of some images.

    :param table: from :meth:`NoiseTable.for_sigma`.
    :param seed: 64-bit key of the generator.
    :param stage: `SEARCH`, `SELECT` or `ESTIMATE`.
    :param image_ids: id of each image in its data set, 32 bits.
    :param sample_start: index of the first sample.
    :param sample_count: samples of each image.
    :param coordinates: values of a sample, in the order of the flattened (H, W, C).
    :param device: torch device; the values are the same on each.
    :returns: int16 ``(len(image_ids), sample_count, coordinates)`` in grey levels.
    :raises ArqError: when a number does not fit its field of the generator's counter.
    """
    check_fields(seed, stage, image_ids, sample_start, sample_count, coordinates)
    target = torch.device(device)
    blocks = -(-coordinates // 4)
    rows = len(image_ids) * sample_count
    out = torch.empty((rows, blocks, 4), dtype=torch.int16, device=target)
    block = torch.arange(blocks, device=target)[None]
    sample = torch.arange(sample_start, sample_start + sample_count, device=target).repeat(len(image_ids))[:, None]
    image = torch.tensor(list(image_ids), dtype=torch.int64, device=target).repeat_interleave(sample_count)[:, None]
    if len(image_ids) == 1:
        image = image[:1]  # One row broadcasts and saves work in the first rounds.
    stream = torch.tensor([[stage << 24]], device=target)
    step = max(1, _BLOCKS.get(target.type, 1 << 18) // blocks)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        images_here = image if image.shape[0] == 1 else image[here]
        counter = [block, sample[here], images_here, stream]
        _fill(out[here], philox(counter, seed), counter, table, seed)
    return out.view(len(image_ids), sample_count, blocks * 4)[:, :, :coordinates]


def _fill(out: Tensor, words: list[Tensor], counter: list[Tensor], table: NoiseTable, seed: int) -> None:
    """Turn the four output words of stream 0 into noise values ``out`` (rows, blocks, 4)."""
    guide, high, full = table.lookup(out.device)
    for position, word in enumerate(words):
        bucket = (word >> 16).bitwise_and_(0xFFFF)
        value = torch.index_select(guide, 0, bucket.view(-1))
        open_ = (value == _AMBIGUOUS).nonzero().view(-1)
        exact = word.reshape(-1)[open_] & _MASK
        index = torch.searchsorted(high, exact, right=False)
        # A word below its next threshold's high half is decided; an equal one needs the low 32 bits as well.
        ties = (high[index.clamp(max=high.numel() - 1)] == exact).nonzero().view(-1)
        if ties.numel():
            at = open_[ties]
            full_counter = [part.expand(out.shape[:2]).reshape(-1)[at] for part in counter[:3]] + [
                counter[3].view(-1) | 1
            ]
            low = philox(full_counter, seed)[position] & _MASK
            index[ties] = torch.searchsorted(full, ((exact[ties] - (1 << 31)) << 32) | low, right=True)
        value[open_] = (index + table.lo).to(torch.int16)
        out[:, :, position] = value.view(out.shape[:2])


def check_fields(
    seed: int, stage: int, image_ids: Sequence[int], sample_start: int, sample_count: int, coordinates: int
) -> None:
    """Refuse numbers that do not fit their fields of the generator's counter; parameters as for :func:`noise`."""
    if not 0 <= seed < 1 << 64:
        raise ArqError(f"seed = {seed} is not a 64-bit key; give a number in 0..2^64−1.")
    if stage not in (SEARCH, SELECT, ESTIMATE):
        raise ArqError(f"stage = {stage} is unknown; choose SEARCH (0), SELECT (1) or ESTIMATE (2).")
    bad = [image for image in image_ids if not 0 <= image < 1 << 32]
    if bad:
        raise ArqError(f"image id {bad[0]} does not fit the generator's counter; ids lie in 0..2^32−1.")
    if sample_start < 0 or sample_count < 0 or sample_start + sample_count > 1 << 32:
        raise ArqError(f"samples {sample_start}..{sample_start + sample_count} leave the counter; stay below 2^32.")
    if not 1 <= coordinates <= 1 << 34:
        raise ArqError(f"coordinates = {coordinates}: an image has at least one and at most 2^34.")
