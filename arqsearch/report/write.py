"""Put the report together and write it: report.html, report.md, and report/ with CSV files and pictures."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from arqsearch import __version__
from arqsearch.report import plots, robustness_plots, tables
from arqsearch.report.content import ESTIMATE_LABEL, ReportContent
from arqsearch.report.front import draw_front, front_table
from arqsearch.report.plots import Picture
from arqsearch.report.tables import Table

_FRAMES = ("comparison", "bitwidths", "curves", "history", "terms", "front", "robustness")
_IDENTITY = re.compile(r"\b(hash|sha-?256|identity|digest|seed)\b", re.IGNORECASE)


@dataclass
class Section:
    """One section as the templates see it.

    :param anchor: id in the page.
    :param title: heading.
    :param intro: paragraphs before the pictures and tables.
    :param pictures: pictures in order.
    :param blocks: (caption, table) in order.
    :param facts: label and value pairs, values in fixed-width type.
    :param commands: shell commands.
    :param missing: what is not there yet, or "".
    :param remedy: the command that makes it.
    :param fold: fold the tables away under their captions.
    """

    anchor: str
    title: str
    intro: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    blocks: list[tuple[str, Table]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    missing: str = ""
    remedy: str = ""
    fold: bool = False


def write_report(run_dir: Path, content: ReportContent) -> Path:
    """Write the report of one run; the same content gives the same bytes.

    :param run_dir: folder of the run; created when absent. Gets ``report.html`` (self-contained), ``report.md``, and
        ``report/`` with the pictures of the Markdown and one CSV file per frame that is not empty.
    :param content: what to report.
    :returns: the path of ``report.html``.
    """
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FRAMES:
        path, frame = folder / f"{name}.csv", getattr(content, name)
        if frame.empty:
            path.unlink(missing_ok=True)
        else:
            _replace(path, frame.to_csv(index=False, lineterminator="\n").encode())
    sections = _sections(content, shlex.quote(str(run_dir)))
    drawn = {picture.name: picture for section in sections for picture in section.pictures}
    for stale in folder.glob("*.png"):
        if stale.stem not in drawn:
            stale.unlink()
    for name, picture in drawn.items():
        _replace(folder / f"{name}.png", picture.png)
    facts = [(label, str(value)) for label, value in content.summary.items() if not _IDENTITY.search(label)]
    context = {
        "content": content,
        "facts": facts,
        "verdict": tables.verdict(content),
        "sections": sections,
        "version": __version__,
        "csv": [name for name in _FRAMES if not getattr(content, name).empty],
    }
    _replace(run_dir / "report.md", _render("report.md.j2", context, escape=False).encode())
    _replace(run_dir / "report.html", _render("report.html.j2", context, escape=True).encode())
    return run_dir / "report.html"


def _replace(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, so that a killed run leaves no half report."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _template(name: str) -> str:
    return resources.files("arqsearch.report").joinpath("templates", name).read_text(encoding="utf-8")


def _render(name: str, context: dict[str, object], escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["style"] = Markup(_template("report.css"))
    environment.filters["trusted"] = Markup
    return environment.get_template(name).render(context)


def _sections(content: ReportContent, run: str) -> list[Section]:
    makers: list[Callable[[ReportContent, str], Section]] = [
        _result,
        _bitwidths,
        _cost,
        _curves,
        _search,
        _guarantee,
        _provenance,
    ]
    if not content.front.empty:
        makers.insert(makers.index(_search), _front)
    if not content.robustness.empty:
        makers.insert(makers.index(_curves) + 1, _robustness)
    return [maker(content, run) for maker in makers]


def _result(content: ReportContent, run: str) -> Section:
    section = Section("result", "Result")
    if content.requirement:
        section.intro.append(f"Required: {content.requirement}")
    if content.comparison.empty:
        section.missing, section.remedy = "No network has been compared yet.", content.command("certify", run)
        return section
    if not content.keyed("certified"):
        section.missing = "There are no certificates yet; the table holds what is known so far."
        section.remedy = content.command("certify", run)
    caption = f"Shares of test images. Small figures: {content.interval_label}. Certified figures are rounded down."
    if content.estimates:
        caption += f" Columns marked “{ESTIMATE_LABEL}” carry no guarantee."
    section.blocks.append((caption, tables.comparison_table(content)))
    return section


def _bitwidths(content: ReportContent, run: str) -> Section:
    section = Section("bitwidths", "Bit-widths per layer", fold=True)
    if content.bitwidths.empty or not content.configurations:
        section.missing, section.remedy = "No bit-widths have been chosen yet.", content.command("search", run)
        return section
    section.intro.append(
        "W: bits of the weights. A: bits of the activations at the layer's input. "
        "Darker cells hold more bits; the grey bars show where the multiply-accumulates are spent."
    )
    alt = f"Bits of weights and activations of {len(content.bitwidths)} layers for {', '.join(content.configurations)}"
    section.pictures.append(plots.make("bitwidths", alt, plots.draw_bitwidths, content))
    section.blocks.append(("All layers as a table", tables.bitwidths_table(content)))
    return section


def _cost(content: ReportContent, run: str) -> Section:
    section = Section("cost", "Cost against FP32")
    if not {"bops", "bops_percent", "weight_bytes"} & set(content.comparison.columns):
        section.missing, section.remedy = "No cost has been computed yet.", content.command("search", run)
        return section
    caption = (
        "BOPs: bit operations, the sum over conv and linear layers of MACs × weight bits × activation bits, padded "
        "positions counted; FP32 counts 1024 per MAC."
    )
    section.blocks.append((caption, tables.cost_table(content)))
    return section


def _curves(content: ReportContent, run: str) -> Section:
    section = Section("radius", "Certified accuracy over the radius")
    if content.curves.empty:
        section.missing, section.remedy = "There are no certificates yet.", content.command("certify", run)
        return section
    section.intro.append(
        "Share of test images that the smoothed network classifies correctly with a certified L2 radius of at least r."
    )
    if content.estimates:
        names = ", ".join(sorted(content.estimates))
        section.intro.append(f"{names}: {ESTIMATE_LABEL}; floating-point arithmetic is outside the guarantee.")
    networks = ", ".join(dict.fromkeys(str(name) for name in content.curves["network"]))
    alt = f"Certified accuracy over the L2 radius for {networks}"
    section.pictures.append(plots.make("curves", alt, plots.draw_curves, content))
    return section


def _front(content: ReportContent, run: str) -> Section:
    section = Section("front", "Trade-off")
    section.intro.append(
        "Candidates of all searches that no other one beats in every objective. Bars are 95 % intervals over images."
    )
    alt = f"{content.front_labels[1]} over {content.front_labels[0]} of {len(content.front)} points"
    section.pictures.append(plots.make("front", alt, draw_front, content))
    section.blocks.append(
        ("The points. Networks that are not on the front have no estimate here.", front_table(content))
    )
    return section


def _robustness(content: ReportContent, run: str) -> Section:
    section = Section("robustness", "Robustness to bounded changes of every pixel")
    section.intro.append(
        "Share of test images that one run of the integer program, without noise, classifies correctly and for which "
        "it is proven that no change of up to ε grey levels of every pixel (L∞) changes the class. Open images, "
        "where a limit was hit first, count as not certified."
    )
    networks = ", ".join(dict.fromkeys(str(name) for name in content.robustness["network"]))
    alt = f"Certified accuracy over epsilon for {networks}"
    section.pictures.append(robustness_plots.make("robustness", alt, robustness_plots.draw_accuracy, content))
    caption = "Verdicts by network and ε. low and high: 95 % interval over the test images."
    section.blocks.append((caption, tables.generic_table(content.robustness)))
    if content.broken:
        section.intro.append(
            "Examples below, one in each column: an image, the same image changed within ε so that the program answers "
            "another class, and the change (grey: none; stretched so that the largest is black or white)."
        )
        alt = "Counter-examples: " + "; ".join(found.caption.replace("\n", ", ") for found in content.broken)
        section.pictures.append(robustness_plots.make("broken", alt, robustness_plots.draw_broken, content))
    section.commands = [content.command("robustness", run)]
    return section


def _search(content: ReportContent, run: str) -> Section:
    section = Section("search", "Search history")
    if content.history.empty:
        section.missing, section.remedy = "No candidate has been evaluated yet.", content.command("search", run)
    else:
        counts = content.history.groupby("policy", sort=False).size()
        section.intro.append(
            "Dots are evaluated candidates. Lines follow each policy's best candidate by reward so far. "
            "Search scores are estimates on held-out training images, never certificates."
        )
        if counts.nunique() > 1:
            listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            section.intro.append(f"The policies had different numbers of evaluations: {listed}.")
        alt = f"Reward and its terms over the evaluations for {', '.join(str(name) for name in counts.index)}"
        section.pictures.append(plots.make("history", alt, plots.draw_history, content))
        section.blocks.append(("The best candidate of each policy, by reward.", tables.search_table(content)))
    if not content.terms.empty:
        caption = "Spread of each reward term over random configurations; a term that does not vary carries no signal."
        section.blocks.append((caption, tables.generic_table(content.terms)))
    return section


def _guarantee(content: ReportContent, run: str) -> Section:
    section = Section("guarantee", "What is guaranteed")
    section.intro = [part.strip() for part in content.guarantee.split("\n\n") if part.strip()]
    if not section.intro:
        section.missing, section.remedy = "Nothing is guaranteed yet.", content.command("certify", run)
    return section


def _provenance(content: ReportContent, run: str) -> Section:
    section = Section("provenance", "Provenance")
    hashes = {label: value for label, value in content.summary.items() if _IDENTITY.search(label)}
    section.facts = [(label, str(value)) for label, value in {**hashes, **content.provenance}.items()]
    if not section.facts:
        section.missing, section.remedy = "No hashes have been recorded yet.", content.command("certify", run)
    section.intro.append("Check every certificate and the exported network again, and write this report again:")
    section.commands = [content.command("verify", run), content.command("report", run)]
    return section
