"""The verdict of a comparison in plain English: who is ahead, and which differences are not significant."""

from __future__ import annotations

import pandas as pd


def verdict(ranking: pd.DataFrame, tests: pd.DataFrame, improvement: pd.DataFrame, seeds: int, tasks: int) -> list[str]:
    """A few sentences.

    :param ranking: best policy first, with ``policy``, ``iqm``, ``low``, ``high``.
    :param tests: paired tests with Holm's correction.
    :param improvement: probabilities of improvement.
    :param seeds: of each policy on each task.
    :param tasks: number of tasks.
    """
    names = [str(name) for name in ranking["policy"]]
    runs = seeds * tasks
    over = f"{_counted(runs, 'run')} of each policy" + (f" on {_counted(tasks, 'task')}" if tasks > 1 else "")
    if len(names) == 1:
        return [f"{names[0]} alone was run ({over}), so there is nothing to compare it with."]
    first = ranking.iloc[0]
    if seeds == 1:
        return [
            f"{first['policy']} has the largest interquartile mean, {first['iqm']:.3f}, over {over}.",
            "With one seed there is no interval and no test: this is an observation, not a ranking. Run more seeds.",
        ]
    sentences = [
        f"Over {over}, {first['policy']} has the largest interquartile mean, {first['iqm']:.3f} "
        f"(95 % interval {first['low']:.3f}–{first['high']:.3f})."
    ]
    ties = [name for name in names[1:] if _tied(first["iqm"], ranking, name)]
    if ties:
        sentences[0] = sentences[0][:-1] + f"; the same as {_listed(ties)} to three decimals."
    best = names[0]
    beaten = [name for name in names[1:] if _significant(tests, best, name)]
    open_ = [name for name in names[1:] if name not in beaten]
    if beaten:
        sentences.append(f"Its lead is significant over {_listed(beaten)} (Holm-corrected p ≤ 0.05).")
    if open_:
        extra = "" if runs >= 10 else f" {_counted(runs, 'run')} cannot show much: more seeds may."
        sentences.append(
            f"Its difference from {_listed(open_)} is not significant: these runs do not say which is better.{extra}"
        )
    sentences += _against(names, tests, improvement)
    return sentences


def _against(names: list[str], tests: pd.DataFrame, improvement: pd.DataFrame) -> list[str]:
    """How the others stand to random sampling, the floor of every comparison."""
    if "random" not in names or names[0] == "random":
        return ["No policy is ahead of random sampling here."] if names[0] == "random" else []
    found = {(str(r["x"]), str(r["y"])): r for r in improvement.to_dict("records")}
    sure: list[str] = []
    unsure: list[str] = []
    worse: list[str] = []
    for name in (name for name in names if name != "random"):
        row = found[name, "random"]
        text = f"{name} ({row['probability']:.2f})"
        (sure if row["low"] > 0.5 else worse if row["high"] < 0.5 else unsure).append(text)
    sentences: list[str] = []
    alone = "By the bootstrap interval alone, without correction,"
    if sure:
        sentences.append(f"{alone} more likely than not to beat random sampling: {_listed(sure)}.")
    if unsure:
        sentences.append(f"Not told apart from random sampling: {_listed(unsure)}.")
    if worse:
        sentences.append(f"{alone} more likely than not to lose against random sampling: {_listed(worse)}.")
    return sentences


def _significant(tests: pd.DataFrame, best: str, name: str) -> bool:
    """Whether the test of the two is significant, in favour of `best`."""
    for row in tests.to_dict("records"):
        if {row["a"], row["b"]} == {best, name}:
            return bool(row["significant"])
    return False


def _tied(value: float, ranking: pd.DataFrame, name: str) -> bool:
    other = float(ranking.loc[ranking["policy"] == name, "iqm"].iloc[0])
    return f"{other:.3f}" == f"{value:.3f}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
