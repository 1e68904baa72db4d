"""What `arqsearch certify` and `arqsearch merge` do: a run, one of its networks, or one program with a data set."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arqsearch import data as datasets
from arqsearch import zoo
from arqsearch.certify import shards
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.linf import robustness_file
from arqsearch.certify.shards import Shard
from arqsearch.certify.summary import summarize
from arqsearch.data import Dataset
from arqsearch.errors import ArqError, nearest
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import Recipe, apply_override, load_recipe, parse_recipe
from arqsearch.search.certification import certify_program, load_program
from arqsearch.search.executor import OnProgress
from arqsearch.search.program_export import is_program, program_name
from arqsearch.search.stages import FLOAT, FOUND, compared
from arqsearch.search.workspace import Workspace


@dataclass(frozen=True)
class CertifyOptions:
    """Options of the command; None leaves a setting as the recipe has it.

    :param changes: settings of the recipe's certify section.
    :param data: name or path of the data set that a bare program is certified on.
    :param data_path: folder or file of that data set.
    :param image_size: size that its images are scaled to.
    :param sigma: noise level in [0,1] pixels; default: what the program was made for.
    :param network: compared network of a run; None = all of them, or the found one where `output` or `shard` is given.
    :param output: certificate file.
    :param shard: ``i/n``.
    :param device: torch device.
    """

    changes: dict[str, Any]
    data: str | None = None
    data_path: str | None = None
    image_size: int | None = None
    sigma: float | None = None
    network: str | None = None
    output: Path | None = None
    shard: str | None = None
    device: str = "cpu"

    def overrides(self) -> list[str]:
        """The changes as recipe overrides."""
        changes = {name: value for name, value in self.changes.items() if value is not None}
        if "every" in changes and "images" not in changes:
            changes["images"] = None  # Every k-th of the whole set.
        found = [f"certify.{name}={json.dumps(value)}" for name, value in changes.items()]
        sections = {"data.name": self.data, "data.path": self.data_path, "data.image_size": self.image_size,
                    "sigma": self.sigma}  # fmt: skip
        return found + [f"{key}={json.dumps(value)}" for key, value in sections.items() if value is not None]


def parse_radii(text: str | None) -> list[float] | None:
    """Radii in [0,1] pixels from ``0.25,0.5`` (or with spaces); None stays None.

    :raises ArqError: when it is no list of numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ArqError(f"Radii {text!r} are no numbers; write them as --radii 0.25,0.5.") from error


def certify(target: str, overrides: Sequence[str], options: CertifyOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Certify the networks of a run, one of them, or one program file.

    :param target: recipe, run folder, integer program, or ``zoo:NAME``.
    :param overrides: ``section.key=value``.
    :returns: for a whole run its table; else the file, and what it says.
    :raises ArqError: when something is missing or does not fit together.
    """
    given = [*overrides, *options.overrides()]
    if is_program(target):
        program, name = IntegerProgram.load(zoo.resolve(target, "program")), program_name(target)
        recipe = bare_recipe(program, given, options)
        beside = Path() if target.startswith(zoo.PREFIX) else Path(target).parent
        whole = options.output or beside / f"{name}.jsonl"
        return _certify_one(program, recipe, _test_set(recipe), whole, name, options, on_progress)
    recipe = load_recipe(target, given)
    if options.network is None and options.output is None and options.shard is None:
        from arqsearch.search import pipeline  # A program alone needs no part of it, and starts sooner without.

        return pipeline.certify(recipe, on_progress)
    name = options.network or FOUND
    if name not in (names := [name for name in compared(recipe) if name != FLOAT]):
        raise ArqError(f"There is no integer program of {name!r} to certify. {nearest(name, names)}")
    space = Workspace(recipe)
    program, whole = load_program(space, name), options.output or space.certificate_path(name)
    return _certify_one(program, recipe, space.test_set, whole, name, options, on_progress, folder=space.dir)


def _certify_one(
    program: IntegerProgram, recipe: Recipe, test: Dataset, whole: Path, name: str, options: CertifyOptions,
    on_progress: OnProgress, folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    shard = None if options.shard is None else Shard.parse(options.shard)
    start = time.perf_counter()
    lines = certify_program(
        program, recipe, test, whole, on_progress, name, folder=folder, shard=shard, device=options.device
    )
    path = whole if shard is None else shard.path(whole)
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    return {"certificates": str(path), "program": program.hash, **described(lines, recipe.certify.radii), **seconds}


def described(lines: Sequence[CertificateLine], radii: Sequence[float]) -> dict[str, Any]:
    """Figures of certificate lines, as a command prints them."""
    if not lines:
        return {"images": 0}
    summary = summarize(lines, radii)
    figures: dict[str, Any] = {"rule": summary.rule, "images": summary.images}
    figures |= {f"certified at r = {radius:g}": share.value for radius, share in summary.accuracy.items()}
    figures |= {f"undecided at r = {radius:g}": count for radius, count in summary.undecided.items()}
    label = "ACR, a lower bound" if summary.acr_is_lower_bound else "ACR"
    return figures | {
        label: summary.acr, "abstained": summary.abstained, "samples per image": round(summary.mean_samples, 1),
        "alpha per image": summary.alpha, "expected wrong certificates, at most": round(summary.expected_wrong, 9),
    }  # fmt: skip


def bare_recipe(program: IntegerProgram, overrides: Sequence[str], options: CertifyOptions) -> Recipe:
    """The settings for one program: defaults, its own σ, and what was given.

    :raises ArqError: when the data set or σ is missing, or a key is wrong.
    """
    settings: dict[str, Any] = {"name": "program", "certify": {}}
    if "sigma" in program.metadata:
        settings["sigma"] = program.metadata["sigma"]
    for override in overrides:
        apply_override(settings, override)
    if "name" not in settings.get("data", {}):
        raise ArqError(
            f"Which data set? Name it: --data {' or --data '.join(datasets.available()[:2])}, or a folder with --data "
            "folder --data-path PATH."
        )
    if "sigma" not in settings:
        raise ArqError("The program does not say which noise it was made for; give --sigma, in [0,1] pixels.")
    return parse_recipe(settings, "the options")


def _test_set(recipe: Recipe) -> Dataset:
    section = recipe.data
    return datasets.load(section.name, "test", path=section.path, image_size=section.image_size)


def merge(paths: Sequence[Path], output: Path, images: int | None = None, every: int | None = None) -> dict[str, Any]:
    """Join the files of shards, and say what is missing.

    :param images: how many images were to be certified; None: as far as the files tell.
    :param every: every how many-th.
    """
    if any(map(robustness_file.is_robustness_file, paths)):
        lines = robustness_file.merge(paths, output)
        return {"merged": str(output), "images": len({line.image for line in lines}), "verdicts": len(lines),
                "missing shards": list(shards.absent_shards(paths))}  # fmt: skip
    step = every or 1
    expected = None if images is None else range(0, images * step, step)
    done = shards.merge(paths, output, expected=expected)
    return {
        "merged": str(done.path), "images": len(done.lines), "missing images": list(done.missing),
        "missing shards": list(done.missing_shards),
    }  # fmt: skip
