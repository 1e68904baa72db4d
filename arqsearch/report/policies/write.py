"""Write a comparison: report.html (self-contained, interactive), report.md, and report/ with CSV, JSON and pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from arqsearch import __version__
from arqsearch.report.plots import BIT_SHADES
from arqsearch.report.policies import figures, pictures, tables
from arqsearch.report.policies.content import REQUIRED, ComparisonContent
from arqsearch.report.policies.tables import SortTable

#: Longer lists of runs are left to the CSV file.
SHOWN_RUNS = 400
HTML, MARKDOWN, FOLDER = "report.html", "report.md", "report"


@dataclass
class Part:
    """One section as the templates see it.

    :param anchor: id in the page.
    :param title: heading.
    :param intro: paragraphs.
    :param plots: (id, what it shows, figure).
    :param blocks: (caption, table).
    :param folded: (summary, table) that a reader unfolds.
    :param picture: name of the picture in the Markdown.
    """

    anchor: str
    title: str
    intro: list[str] = field(default_factory=list)
    plots: list[tuple[str, str, figures.Figure]] = field(default_factory=list)
    blocks: list[tuple[str, SortTable]] = field(default_factory=list)
    folded: list[tuple[str, SortTable]] = field(default_factory=list)
    picture: str = ""


def write_comparison(folder: Path, content: ComparisonContent) -> Path:
    """Write everything; the same content gives the same files.

    :param folder: created when absent.
    :returns: the path of the HTML page.
    """
    data = folder / FOLDER
    data.mkdir(parents=True, exist_ok=True)
    for name in REQUIRED:
        frame, path = content.frame(name), data / f"{name}.csv"
        if frame.empty:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, frame.to_csv(index=False, lineterminator="\n").encode())
    replace_file(data / "comparison.json", _json(content).encode())
    parts = sections(content)
    for part in parts:
        if part.picture:
            replace_file(data / f"{part.picture}.png", pictures.DRAW[part.picture](content))
    context = {
        "content": content, "parts": parts, "version": __version__, "folder": FOLDER,
        "frames": [name for name in REQUIRED if not content.frame(name).empty],
        "plots": {name: figure for part in parts for name, _, figure in part.plots},
    }  # fmt: skip
    replace_file(folder / MARKDOWN, _render("comparison.md.j2", context, escape=False).encode())
    replace_file(folder / HTML, _render("comparison.html.j2", context, escape=True).encode())
    return folder / HTML


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _json(content: ComparisonContent) -> str:
    """Verdict, facts and every frame as records."""
    frames = {name: json.loads(content.frame(name).to_json(orient="records")) for name in REQUIRED}
    return json.dumps(
        {"title": content.title, "verdict": content.verdict, "score": content.score, "facts": dict(content.facts),
         "provenance": dict(content.provenance), "notes": content.notes, **frames},
        indent=1, ensure_ascii=False, default=str,
    )  # fmt: skip


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")


def _inline(data: Any) -> Markup:
    """JSON for a script element: a closing tag cannot occur in it."""
    return Markup(json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/"))


def _render(name: str, context: dict[str, Any], escape: bool) -> str:
    package = "arqsearch.report.policies"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda wanted: _text(package, wanted)), autoescape=escape, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals["style"] = Markup(_text("arqsearch.report", "report.css") + _text(package, "comparison.css"))
    environment.globals["library"] = Markup(_text(package, "plotly-basic.min.js"))
    environment.globals["script"] = Markup(_text(package, "comparison.js"))
    environment.globals["bit_shades"] = BIT_SHADES
    environment.filters["inline"] = _inline
    return environment.get_template(name).render(context)


def sections(content: ComparisonContent) -> list[Part]:
    """Every section that there is something to say in."""
    makers = (_ranking, _improvement, _tests, _curves, _profiles, _fronts, _bits, _radius, _tasks, _runs)
    return [part for part in (maker(content) for maker in makers) if part is not None]


def _ranking(content: ComparisonContent) -> Part:
    part = Part("ranking", "Who finds the best bit-widths", picture="ranking")
    part.intro.append(f"Scores are {content.score}.")
    part.plots.append(("plot-ranking", "Interquartile mean of each policy with its interval", figures.ranking(content)))
    caption = (
        "Interquartile mean: the mean of the middle half of all runs. Small figures: 95 % stratified bootstrap "
        "intervals (seeds resampled within each task)."
    )
    part.blocks.append((caption, tables.ranking(content)))
    return part


def _improvement(content: ComparisonContent) -> Part | None:
    if content.improvement.empty:
        return None
    part = Part("improvement", "Probability of improvement")
    part.intro.append(
        "How likely a run of the policy in the row scores higher than a run of the policy in the column, on the same "
        "task; ties count half. A star marks intervals that exclude one half."
    )
    part.blocks.append(("Small figures: 95 % stratified bootstrap intervals.", tables.improvement(content)))
    return part


def _tests(content: ComparisonContent) -> Part | None:
    if content.tests.empty and content.effects.empty:
        return None
    part = Part("tests", "Is the difference more than chance?")
    if not content.effects.empty:
        part.intro.append(
            f"Mixed-effects model: score by policy, with random intercepts for task and seed; differences from "
            f"{content.reference}."
        )
    part.intro += content.model
    if not content.effects.empty:
        part.blocks.append(("Fixed effects with 95 % intervals.", tables.effects(content)))
    if not content.tests.empty:
        caption = (
            "Wilcoxon's signed-rank test on runs of the same task and seed; p-values of all pairs are corrected by "
            "Holm's method, significant means corrected p ≤ 0.05."
        )
        part.blocks.append((caption, tables.tests(content, content.policies[0])))
        part.folded.append((f"All {len(content.tests)} pairs", tables.tests(content)))
    return part


def _curves(content: ComparisonContent) -> Part | None:
    if content.curves.empty:
        return None
    part = Part("curves", "How fast", picture="curves")
    part.intro.append("Best score so far: interquartile mean over all runs, with 95 % bootstrap bands.")
    what = "Best score so far over the evaluations"
    part.plots.append(("plot-curves", what, figures.curves(content)))
    if not content.time_curves.empty:
        part.intro.append(
            "Over time: processor seconds of the searcher itself plus what its evaluations cost when they were "
            f"computed. The dotted line is the budget of the view in seconds, {content.seconds:.3g} s; a policy "
            "whose evaluations are used up before then stays where it is."
        )
        what = "Best score so far over seconds"
        part.plots.append(("plot-time", what, figures.time_curves(content)))
    if not content.speed.empty:
        part.blocks.append(("Interquartile mean within the seconds; medians over all runs.", tables.speed(content)))
    return part


def _profiles(content: ComparisonContent) -> Part | None:
    if content.profiles.empty:
        return None
    part = Part("profiles", "Performance profiles", picture="profiles")
    part.intro.append(
        "Share of runs that end above a score. A curve that lies above another one everywhere is better at every level."
    )
    part.plots.append(("plot-profiles", "Share of runs above each score", figures.profiles(content)))
    return part


def _fronts(content: ComparisonContent) -> Part | None:
    if content.fronts.empty:
        return None
    part = Part("fronts", "Cost against reward")
    part.intro.append(
        "Assignments that no other one of the same run beats in both bit operations and reward; shown is each policy's "
        "run of median hypervolume. The first table has the hypervolume of all runs: the area that a front "
        "dominates, of the area between no bit operations and the budget, and between score 0 and 1."
    )
    for index, task in enumerate(dict.fromkeys(content.fronts["task"])):
        part.plots.append((f"plot-front-{index}", f"Reward over bit operations, {task}", figures.fronts(content, task)))
    return part


def _bits(content: ComparisonContent) -> Part | None:
    if content.bitwidths.empty:
        return None
    part = Part("bitwidths", "The bit-widths found")
    part.intro.append("Each policy's best run of the first task.")
    part.blocks.append(("Weight bits / activation bits; darker cells hold more bits.", tables.bitwidths(content)))
    return part


def _radius(content: ComparisonContent) -> Part | None:
    if content.radius.empty:
        return None
    part = Part("radius", "Certified accuracy over the radius")
    part.intro.append("Networks of the run folder that have certificates; the float network's curve is an estimate.")
    part.plots.append(("plot-radius", "Certified accuracy over the L2 radius", figures.radius(content)))
    return part


def _tasks(content: ComparisonContent) -> Part | None:
    if content.tasks.empty:
        return None
    part = Part("tasks", "Tasks")
    part.blocks.append(("What was searched.", tables.frame_table(content.tasks)))
    return part


def _runs(content: ComparisonContent) -> Part | None:
    columns = [c for c in ("task", "policy", "seed", "score", "found_at", "seconds") if c in content.runs.columns]
    shown: pd.DataFrame = content.runs[columns]
    if len(shown) > SHOWN_RUNS:
        return None
    part = Part("runs", "Every run")
    part.folded.append((f"All {len(shown)} runs", tables.frame_table(shown)))
    return part
