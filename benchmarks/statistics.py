"""Comparing stochastic searchers over tasks and seeds: the figures of `arqsearch bench policies`, not their look.

Scores of a policy are an array (seeds, tasks). Aggregates and their stratified bootstrap follow Agarwal et al., "Deep
Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021): seeds are resampled within each task,
so that no task weighs more than another. Point estimates are those of the authors' package rliable on the same scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from arqsearch.errors import ArqError

Scores = NDArray[np.float64]
#: Bootstrap samples and the level of every interval.
REPETITIONS, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval.

    :param value: on the scores themselves.
    :param low: lower end of the percentile interval.
    :param high: upper end.
    """

    value: float
    low: float
    high: float


def interquartile_mean(scores: Scores) -> NDArray[np.float64]:
    """Mean of the middle half of all scores, over the last two axes.

    The n/4 smallest and largest of n scores are left out, rounded down, as in `scipy.stats.trim_mean`.

    :param scores: (..., seeds, tasks).
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    trimmed: NDArray[np.float64] = flat[..., cut : flat.shape[-1] - cut].mean(axis=-1)
    return trimmed


def mean(scores: Scores) -> NDArray[np.float64]:
    """Mean of all scores, over the last two axes."""
    found: NDArray[np.float64] = scores.mean(axis=(-2, -1))
    return found


def median(scores: Scores) -> NDArray[np.float64]:
    """Median over tasks of the mean over seeds, over the last two axes."""
    found: NDArray[np.float64] = np.median(scores.mean(axis=-2), axis=-1)
    return found


def optimality_gap(scores: Scores, goal: float = 1.0) -> NDArray[np.float64]:
    """How far scores fall short of `goal` in the mean, better ones counted as reaching it; over the last two axes."""
    found: NDArray[np.float64] = goal - np.minimum(scores, goal).mean(axis=(-2, -1))
    return found


def resamples(seeds: int, tasks: int, repetitions: int = REPETITIONS, seed: int = 0) -> NDArray[np.int64]:
    """Seeds drawn with replacement within each task, int64 (repetitions, seeds, tasks)."""
    return np.random.default_rng(seed).integers(0, seeds, (repetitions, seeds, tasks))


def _rows(scores: NDArray[np.float64], repetitions: int, seed: int) -> NDArray[np.int64]:
    return resamples(scores.shape[0], scores.shape[1], repetitions, seed)


def resampled(scores: Scores, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores (seeds, tasks) at resampled rows (..., seeds, tasks)."""
    found: NDArray[np.float64] = scores[rows, np.arange(scores.shape[1])]
    return found


def interval(samples: NDArray[np.float64], level: float = LEVEL) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval over the first axis."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    return low, high


def aggregate(
    scores: Scores, measure: Callable[[Scores], NDArray[np.float64]] = interquartile_mean,
    repetitions: int = REPETITIONS, seed: int = 0,
) -> Estimate:  # fmt: skip
    """A measure of a policy's scores with its stratified bootstrap interval.

    :param scores: (seeds, tasks).
    :param measure: over the last two axes.
    """
    samples = measure(resampled(scores, _rows(scores, repetitions, seed)))
    low, high = interval(samples)
    return Estimate(float(measure(scores)), float(low), float(high))


def improvement(x: Scores, y: Scores) -> float:
    """Probability that a run of X scores higher than one of Y on the same task, ties half; mean over tasks.

    The Mann–Whitney statistic of each task over the number of pairs.

    :param x: (seeds of X, tasks).
    :param y: (seeds of Y, tasks).
    """
    return float(_improvement(x, y).mean())


def _improvement(x: Scores, y: Scores) -> NDArray[np.float64]:
    """:func:`improvement` for each leading index and task: (..., tasks)."""
    above = (x[..., :, None, :] > y[..., None, :, :]).mean(axis=(-3, -2))
    ties = (x[..., :, None, :] == y[..., None, :, :]).mean(axis=(-3, -2))
    found: NDArray[np.float64] = above + 0.5 * ties
    return found


def probability_of_improvement(x: Scores, y: Scores, repetitions: int = REPETITIONS, seed: int = 0) -> Estimate:
    """:func:`improvement` with its stratified bootstrap interval; both policies are resampled on their own.

    The pairwise comparisons are made once: a resample only says how often each run counts.
    """
    tasks = x.shape[1]
    rows_x, rows_y = _rows(x, repetitions, seed), _rows(y, repetitions, seed + 1)
    samples = np.zeros(repetitions)
    for task in range(tasks):
        outcome = (x[:, None, task] > y[None, :, task]) + 0.5 * (x[:, None, task] == y[None, :, task])
        weights_x, weights_y = (
            np.array([np.bincount(row, minlength=size) for row in rows[:, :, task]], dtype=np.float64) / size
            for rows, size in ((rows_x, len(x)), (rows_y, len(y)))
        )
        samples += np.einsum("ri,ij,rj->r", weights_x, outcome, weights_y, optimize=True)
    low, high = interval(samples / tasks)
    return Estimate(improvement(x, y), float(low), float(high))


def performance_profile(
    scores: Scores, thresholds: NDArray[np.float64], repetitions: int = REPETITIONS, seed: int = 0
) -> pd.DataFrame:
    """Share of runs that score above each threshold, the mean over tasks, with a pointwise bootstrap band.

    :param scores: (seeds, tasks).
    :param thresholds: rising scores.
    :returns: columns ``threshold``, ``share``, ``low``, ``high``.
    """
    above = (scores[:, :, None] > thresholds).astype(np.float64)
    low, high = interval(_band(above, repetitions, seed))
    return pd.DataFrame({"threshold": thresholds, "share": above.mean(axis=(0, 1)), "low": low, "high": high})


def _band(values: NDArray[np.float64], repetitions: int, seed: int) -> NDArray[np.float64]:
    """Bootstrap means of (seeds, tasks, points): (repetitions, points); counts of runs instead of copies of them."""
    seeds, tasks, _ = values.shape
    rows = resamples(seeds, tasks, repetitions, seed)
    total = np.zeros((repetitions, values.shape[2]))
    for task in range(tasks):
        counts = np.array([np.bincount(row, minlength=seeds) for row in rows[:, :, task]], dtype=np.float64)
        total += counts @ values[:, task]
    found: NDArray[np.float64] = total / (seeds * tasks)
    return found


def curve(values: NDArray[np.float64], repetitions: int = 500, seed: int = 0) -> pd.DataFrame:
    """Interquartile mean of best-so-far scores at each point, with a pointwise bootstrap band.

    :param values: (seeds, tasks, points).
    :returns: columns ``value``, ``low``, ``high``; one row a point.
    """
    rows = _rows(values, repetitions, seed)
    lows, highs = [], []
    for point in range(values.shape[2]):
        low, high = interval(interquartile_mean(resampled(values[:, :, point], rows)))
        lows.append(float(low))
        highs.append(float(high))
    centre = interquartile_mean(np.moveaxis(values, 2, 0))
    return pd.DataFrame({"value": centre, "low": lows, "high": highs})


def paired_tests(scores: Mapping[str, Scores], alpha: float = 1 - LEVEL) -> pd.DataFrame:
    """Wilcoxon's signed-rank test for every pair of policies, corrected by Holm's method over all of them.

    Pairs are the runs of one task and seed. Differences of zero are ranked and then left out (Pratt 1959); where all
    are zero, p is 1.

    :param scores: (seeds, tasks) of each policy, all of one shape.
    :returns: columns ``a``, ``b``, ``difference`` (median of a − b), ``p``, ``p_holm``, ``significant``.
    :raises ArqError: when the shapes differ.
    """
    from scipy.stats import wilcoxon
    from statsmodels.stats.multitest import multipletests

    if len({values.shape for values in scores.values()}) > 1:
        raise ArqError("Paired tests need the same seeds and tasks for every policy; run the missing ones first.")
    rows = []
    for a, b in combinations(scores, 2):
        difference = (scores[a] - scores[b]).ravel()
        p = 1.0
        if difference.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Few pairs or ties: the normal approximation is said to be rough.
                p = float(wilcoxon(difference, zero_method="pratt").pvalue)
        rows.append({"a": a, "b": b, "difference": float(np.median(difference)), "p": 1.0 if np.isnan(p) else p})
    frame = pd.DataFrame(rows, columns=["a", "b", "difference", "p"])
    if rows:
        rejected, adjusted, _, _ = multipletests(frame["p"], alpha=alpha, method="holm")
        frame["p_holm"], frame["significant"] = adjusted, rejected
    return frame


@dataclass(frozen=True)
class MixedModel:
    """What the mixed-effects model says.

    :param effects: one row a policy but the reference: ``policy``, ``effect``, ``low``, ``high``, ``p``.
    :param reference: the policy that effects are differences from.
    :param deviations: standard deviation of each random part.
    :param note: why there is no model, or what to keep in mind; else empty.
    """

    effects: pd.DataFrame
    reference: str
    deviations: Mapping[str, float]
    note: str = ""


def mixed_model(scores: Mapping[str, Scores], reference: str) -> MixedModel:
    """score = policy + task + (task, seed) + noise, with random intercepts of task and of seed within task.

    Fitted by restricted maximum likelihood. With one task the task's intercept is left out; with one seed there is
    nothing to fit.

    :param scores: (seeds, tasks) of each policy.
    :param reference: a policy among them.
    """
    import statsmodels.formula.api as smf

    seeds, tasks = next(iter(scores.values())).shape
    names = [reference, *(name for name in scores if name != reference)]
    empty = pd.DataFrame(columns=["policy", "effect", "low", "high", "p"])
    if seeds < 2 or len(names) < 2:
        return MixedModel(empty, reference, {}, "A mixed-effects model needs two policies and two seeds.")
    parts = [
        pd.DataFrame({
            "score": scores[name].ravel(),
            "policy": f"p{index:03d}",
            "task": np.tile(np.arange(tasks), seeds),
            "block": [f"{task}:{seed}" for seed in range(seeds) for task in range(tasks)],
        })
        for index, name in enumerate(names)
    ]  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    if float(frame["score"].std()) == 0:
        return MixedModel(empty, reference, {}, "Every run has the same score, so there is nothing to model.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if tasks > 1:
                model = smf.mixedlm(
                    "score ~ C(policy)", frame, groups="task", re_formula="1", vc_formula={"seed": "0 + C(block)"}
                )
            else:
                model = smf.mixedlm("score ~ C(policy)", frame, groups="block")
            fit = model.fit(reml=True, method=["lbfgs", "powell"])
            note = "" if fit.converged else "The fit did not fully converge; read its intervals with care."
        except (np.linalg.LinAlgError, ValueError):
            # At the boundary where no random part is left, the model is the linear one.
            fit = smf.ols("score ~ C(policy)" + (" + C(task)" if tasks > 1 else ""), frame).fit()
            note = "No variance between seeds is left after the policies': this is the linear model without it."
        bounds = fit.conf_int()
    rows = []
    for index, name in enumerate(names[1:], 1):
        key = f"C(policy)[T.p{index:03d}]"
        low, high = (float(value) for value in bounds.loc[key])
        rows.append({"policy": name, "effect": float(fit.params[key]), "low": low, "high": high,
                     "p": float(fit.pvalues[key])})  # fmt: skip
    deviations = {}
    if hasattr(fit, "cov_re"):
        deviations["task" if tasks > 1 else "seed"] = float(np.sqrt(max(float(np.asarray(fit.cov_re).ravel()[0]), 0.0)))
        if tasks > 1:
            deviations["seed"] = float(np.sqrt(max(float(fit.vcomp[0]), 0.0)))
    deviations["residual"] = float(np.sqrt(fit.scale))
    return MixedModel(pd.DataFrame(rows), reference, deviations, note)


def leaders(scores: Mapping[str, Scores]) -> Sequence[str]:
    """Policies by falling interquartile mean, in the given order on a tie."""
    return sorted(scores, key=lambda name: -float(interquartile_mean(scores[name])))
