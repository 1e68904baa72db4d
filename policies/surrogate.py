"""`Surrogate`: a Gaussian process over bit-widths that is a sum over parts and pairs of parts.

A *part* is the weights or the activations of one layer. The model of the reward is

    f(b) = mean + slopes · total noise + Σ_p f_p(b_p) + Σ_{p<q} f_pq(b_p, b_q)

with Gaussian process priors on every function (additive Gaussian processes: Duvenaud et al., NeurIPS 2011). The kernel
of a part knows two things of quantization: bits act through their noise power, which falls by a constant factor a
bit, and at the most bits of a part there is no effect, so that two parts interact only where both lost bits. Bits are
finite, so every function is a table, and the posterior mean and posterior samples (pathwise conditioning: Wilson et
al., ICML 2020) are both a quadratic function of the one-hot bits, :class:`Quadratic`.

Kernel settings are those of the largest marginal likelihood on a fixed grid: no optimizer, no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Factor of the noise power per bit; length scale of a part's kernel in units of the largest noise power.
DECAYS, LENGTHS = (1.6, 2.5, 4.0), (1.0,)
#: Share of the pairs in the prior variance, and of independent noise.
PAIR_SHARES, NOISES = (0.0, 0.1, 0.3, 0.6), (1e-4, 1e-3, 1e-2, 1e-1, 3e-1)
#: Standardized rewards are cut off below: how bad a bad candidate is does not matter.
FLOOR = -3.0
#: Prior variance of mean and slopes, in units of the standardized reward.
BROAD = 10.0


@dataclass(frozen=True)
class Quadratic:
    """f(z) = constant + linear · z + ½ zᵀ · pairs · z over one-hot choices z of every part.

    :param constant: a number.
    :param linear: (parts, choices).
    :param pairs: (parts, choices, parts, choices), symmetric, zero where the parts are the same.
    """

    constant: float
    linear: Floats
    pairs: Floats

    def values(self, points: NDArray[np.int64]) -> Floats:
        """f at choice numbers.

        :param points: (n, layers, 2), or (n, parts).
        """
        rows = points.reshape(len(points), -1)
        hot = _one_hot(rows, self.linear.shape[1])
        size = hot.shape[1]
        values: Floats = (
            self.constant
            + hot @ self.linear.reshape(-1)
            + 0.5 * np.einsum("ni,ni->n", hot @ self.pairs.reshape(size, size), hot)
        )
        return values

    def times(self, factor: float) -> Quadratic:
        """The function multiplied by a number.

        :param factor: the number.
        """
        return Quadratic(self.constant * factor, self.linear * factor, self.pairs * factor)


@dataclass(frozen=True)
class Settings:
    """Kernel settings: factor of the noise power per bit, length scale, share of pairs, share of noise."""

    decay: float
    length: float
    pair_share: float
    noise: float


class Surrogate:
    """The Gaussian process, fitted to evaluations.

    :param bits: the choices of every part, ascending, (choices,).
    :param points: evaluated choice numbers, (n, layers, 2).
    :param rewards: their rewards, (n,).
    :param pairs: whether pairs of parts may interact; False gives the additive model.
    """

    def __init__(
        self, bits: NDArray[np.int64], points: NDArray[np.int64], rewards: NDArray[np.float64], pairs: bool = True
    ) -> None:
        self._bits = bits
        self._rows = points.reshape(len(points), -1)
        self._scale = Scale.of(rewards)
        self._y = np.maximum(self._scale.standardized(rewards), FLOOR)
        self._hot = _one_hot(self._rows, len(bits))
        shares = PAIR_SHARES if pairs else (0.0,)
        best = -np.inf
        for decay, length in product(DECAYS, LENGTHS):
            prior = _Prior(bits, decay, length, self._rows.shape[1])
            grams = prior.grams(self._hot)
            for share in shares:
                base = grams[0] + (1 - share) * grams[1] + share * grams[2]
                for noise in NOISES:
                    factor, weights, variance, likelihood = _condition(base, noise, self._y)
                    if likelihood > best:
                        best = likelihood
                        self.settings = Settings(decay, length, share, noise)
                        self._prior, self._factor, self._weights = prior, factor, weights
                        self._deviation = float(np.sqrt(variance))

    def mean(self) -> Quadratic:
        """The posterior mean, in the units of the reward."""
        return self._quadratic(self._weights, None)

    def sample(self, generator: np.random.Generator) -> Quadratic:
        """One draw from the posterior (Thompson sampling), in the units of the reward.

        :param generator: source of randomness.
        """
        drawn = self._prior.draw(generator, self.settings.pair_share).times(self._deviation)
        noise = generator.normal(size=len(self._y)) * np.sqrt(self.settings.noise) * self._deviation
        residual = self._y - drawn.values(self._rows) - noise
        weights = scipy.linalg.cho_solve(self._factor, residual)
        return self._quadratic(weights, drawn)

    def _quadratic(self, weights: Floats, drawn: Quadratic | None) -> Quadratic:
        update = self._prior.update(self._hot, weights, self.settings.pair_share)
        if drawn is not None:
            update = Quadratic(
                update.constant + drawn.constant, update.linear + drawn.linear, update.pairs + drawn.pairs
            )
        scaled = update.times(self._scale.spread)
        return Quadratic(scaled.constant + self._scale.centre, scaled.linear, scaled.pairs)


@dataclass(frozen=True)
class Scale:
    """Robust location and spread of rewards."""

    centre: float
    spread: float

    @classmethod
    def of(cls, rewards: Floats) -> Scale:
        """Median, and the mean absolute deviation from it (1 where rewards do not vary)."""
        centre = float(np.median(rewards))
        spread = float(np.abs(rewards - centre).mean())
        return cls(centre, spread if spread > 0 else 1.0)

    def standardized(self, rewards: Floats) -> Floats:
        """(reward − centre) / spread."""
        return (rewards - self.centre) / self.spread


class _Prior:
    """Prior covariances of the tables for one decay and length scale.

    :param bits: the choices.
    :param decay: factor of the noise power per bit.
    :param length: length scale over noise power.
    :param parts: number of parts.
    """

    def __init__(self, bits: NDArray[np.int64], decay: float, length: float, parts: int) -> None:
        noise = decay ** -(bits - bits[0]).astype(np.float64)
        noise = (noise - noise[-1]) / (noise[0] - noise[-1]) if len(bits) > 1 else np.zeros(1)
        self.noise = noise
        smooth = np.exp(-0.5 * ((noise[:, None] - noise[None, :]) / length) ** 2)
        # Differences to the most bits, where the noise is 0.
        table = smooth - smooth[:, -1:] - smooth[-1:, :] + smooth[-1, -1]
        largest = float(table.max())
        self.table: Floats = table / largest if largest > 0 else table
        self.parts = parts
        self.choices = len(bits)
        # Mean, and one slope each for the total noise of all weights and of all activations.
        kind = np.zeros((parts, 2))
        kind[0::2, 0] = kind[1::2, 1] = 1 / np.sqrt(parts)
        self._slopes = np.einsum("pk,c->pck", kind, noise).reshape(parts * self.choices, 2)

    def _features(self, hot: Floats) -> Floats:
        """Mean and slope features of one-hot rows, (n, 3)."""
        return np.concatenate([np.ones((len(hot), 1)), hot @ self._slopes], axis=1)

    def grams(self, hot: Floats) -> tuple[Floats, Floats, Floats]:
        """Covariance of rows by mean and slopes, by single parts, by pairs; the last two of mean variance about 1."""
        features = self._features(hot)
        blocks = hot.reshape(len(hot), self.parts, self.choices)
        reached = blocks @ self.table
        single = np.einsum("npc,mpc->nm", reached, blocks)
        # Sum over parts of the squared kernel: K_p(b, b')² as a kernel of its own.
        squares = np.einsum("npc,mpc->nm", blocks @ self.table**2, blocks)
        pair = 0.5 * (single**2 - squares)
        return BROAD * features @ features.T, single / self.parts, pair / self._pair_count()

    def _pair_count(self) -> float:
        return max(self.parts * (self.parts - 1) / 2, 1.0)

    def update(self, hot: Floats, weights: Floats, pair_share: float) -> Quadratic:
        """Σ_i weights_i · k(·, row i) as a quadratic."""
        slopes = BROAD * (self._features(hot).T @ weights)
        blocks = hot.reshape(len(hot), self.parts, self.choices)
        reached = blocks @ self.table
        linear = (self._slopes @ slopes[1:]).reshape(self.parts, self.choices)
        linear = linear + (1 - pair_share) / self.parts * np.einsum("n,npc->pc", weights, reached)
        pairs = np.zeros((self.parts, self.choices, self.parts, self.choices))
        if pair_share > 0:
            flat = reached.reshape(len(hot), -1)
            pairs = ((flat * weights[:, None]).T @ flat).reshape(pairs.shape) * (pair_share / self._pair_count())
            pairs[np.arange(self.parts), :, np.arange(self.parts), :] = 0
        return Quadratic(float(slopes[0]), linear, pairs)

    def draw(self, generator: np.random.Generator, pair_share: float) -> Quadratic:
        """A draw from the prior as a quadratic."""
        root = _root(self.table)
        slopes = generator.normal(size=3) * np.sqrt(BROAD)
        linear = (self._slopes @ slopes[1:]).reshape(self.parts, self.choices)
        single = generator.normal(size=(self.parts, self.choices)) @ root.T
        linear = linear + np.sqrt((1 - pair_share) / self.parts) * single
        shape = (self.parts, self.choices, self.parts, self.choices)
        pairs = np.zeros(shape)
        if pair_share > 0:
            raw = np.einsum("ab,pbqc,dc->paqd", root, generator.normal(size=shape), root, optimize=True)
            above = np.triu(np.ones((self.parts, self.parts)), 1)[:, None, :, None]
            raw = raw * above * np.sqrt(pair_share / self._pair_count())
            pairs = raw + raw.transpose(2, 3, 0, 1)
        return Quadratic(float(slopes[0]), linear, pairs)


def _root(table: Floats) -> Floats:
    """A square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(table)
    root: Floats = vectors * np.sqrt(np.maximum(values, 0))
    return root


def _condition(base: Floats, noise: float, y: Floats) -> tuple[tuple[Floats, bool], Floats, float, float]:
    """Cholesky factor, weights, overall variance and log marginal likelihood of a kernel, that variance at its best."""
    factor = scipy.linalg.cho_factor(base + (noise + 1e-9) * np.eye(len(y)), lower=True)
    weights: Floats = scipy.linalg.cho_solve(factor, y)
    variance = max(float(y @ weights) / len(y), 1e-12)
    likelihood = -0.5 * len(y) * float(np.log(variance)) - float(np.log(np.diag(factor[0])).sum())
    return factor, weights, variance, likelihood


def _one_hot(rows: NDArray[np.int64], choices: int) -> Floats:
    """(n, parts) choice numbers as (n, parts · choices) zeros and ones."""
    hot = np.zeros((*rows.shape, choices))
    np.put_along_axis(hot, rows[..., None], 1.0, axis=2)
    return hot.reshape(len(rows), -1)
