"""Recompute certificate files: the radius of every line from its counts, the counts by running the network."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arqsearch.certify.base import BaseNetwork
from arqsearch.certify.certificate import LabelledImages, OnImage, read_lines
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.rules import make_rule
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, total_distance
from arqsearch.errors import ArqError

_SHOWN = 10


@dataclass(frozen=True)
class Verification:
    """What was checked without finding a difference.

    :param lines: lines whose digest, identities and radius were checked.
    :param recomputed: ids of the images whose counts were recomputed by running the network.
    """

    lines: int
    recomputed: tuple[int, ...]


def verify_file(
    path: str | Path,
    classify: Classifier,
    dataset: LabelledImages,
    program_hash: str,
    *,
    sample: int | None = None,
    sample_seed: int = 0,
    batch_size: int = 250,
    device: str = "cpu",
    classes: int | None = None,
    base: BaseNetwork | None = None,
    on_image: OnImage | None = None,
) -> Verification:
    """Check a certificate file against the program and the data.

    Every line: digest, program, data identity, label, d·τ, and class and radius from the counts. Besides,
    the counts of all or some lines are recomputed with the line's own seed and settings.

    :param classify: must be what ``program_hash`` names.
    :param sample: number of lines whose counts are recomputed, chosen at random; None = all, 0 = none.
    :param sample_seed: of that choice.
    :param batch_size: noisy images in one forward pass.
    :param device: torch device of the noise.
    :param classes: number of classes of the program, for two-class radii; None = not checked.
    :param base: the network that ``incremental`` lines start from; needed to recompute them.
    :param on_image: called after each recomputed line.
    :raises ArqError: listing every difference.
    """
    lines = read_lines(path)
    if not lines:
        raise ArqError(f"{path} holds no certificate; run `arqsearch certify`.")
    rank = {int(image): position for position, image in enumerate(dataset.ids)}
    coordinates = int(np.prod(dataset.images.shape[1:]))
    problems: list[str] = []
    seen: set[int] = set()
    for line in lines:
        found = line.problems()
        if line.image in seen:
            found.append("the image has a line already")
        seen.add(line.image)
        found += _foreign(line, dataset, program_hash, rank, coordinates)
        if classes is not None and line.two_class is not None and line.two_class.classes != classes:
            found.append(f"its two-class radius is for {line.two_class.classes} classes, the program has {classes}")
        if line.settings != lines[0].settings:
            found.append("its settings are not those of the first line")
        problems += [f"image {line.image}: {problem}" for problem in found]
    _require(problems, path)
    chosen = lines if sample is None else random.Random(sample_seed).sample(lines, min(sample, len(lines)))
    chosen = sorted(chosen, key=lambda line: rank[line.image])
    for index, line in enumerate(chosen):
        again = _recompute(line, classify, dataset, rank, batch_size, device, base)
        problems += [
            f"image {line.image}: {item.name} is {getattr(line, item.name)} in the file, {getattr(again, item.name)} "
            "recomputed"
            for item in dataclasses.fields(line)
            if item.name != "version" and getattr(line, item.name) != getattr(again, item.name)
        ]
        if on_image is not None:
            on_image(index + 1, len(chosen), again)
    _require(problems, path)
    return Verification(len(lines), tuple(line.image for line in chosen))


def _foreign(
    line: CertificateLine, dataset: LabelledImages, program_hash: str, rank: dict[int, int], coordinates: int
) -> list[str]:
    """Differences from the program and the data at hand."""
    found = []
    if line.program != program_hash:
        found.append(f"the line is about program {line.program}, this is {program_hash}")
    if line.data != dataset.identity:
        found.append(f"the line is about data {line.data}, these are {dataset.identity}")
    if line.image not in rank:
        found.append("the data set has no such image")
    elif line.label is not None and line.label != dataset.labels[rank[line.image]]:
        found.append(f"label {line.label} is {int(dataset.labels[rank[line.image]])} in the data set")
    if line.d_tau != total_distance(line.sigma, coordinates):
        found.append(f"d_tau {line.d_tau} is {total_distance(line.sigma, coordinates)} for {coordinates} coordinates")
    return found


def settings_of(line: CertificateLine, *, batch_size: int = 250, device: str = "cpu") -> SmoothingSettings:
    """The settings that made a line."""
    settings = SmoothingSettings(
        sigma=line.sigma,
        n0=max(1, line.n0),
        alpha=line.alpha,
        seed=line.seed,
        batch_size=batch_size,
        skip_misclassified=not line.estimated,
        device=device,
        rule=line.rule,
    )
    if line.sequential is not None:
        part = line.sequential
        return dataclasses.replace(settings, radii=part.radii, cap=line.n, target=part.target)
    if line.incremental is not None:
        return dataclasses.replace(settings, shared=line.n, gained=line.incremental.split.gained > 0)
    return dataclasses.replace(settings, n=line.n, two_class=line.two_class.classes if line.two_class else 0)


def _recompute(
    line: CertificateLine,
    classify: Classifier,
    dataset: LabelledImages,
    rank: dict[int, int],
    batch_size: int,
    device: str,
    base: BaseNetwork | None,
) -> CertificateLine:
    settings = settings_of(line, batch_size=batch_size, device=device)
    image = dataset.images[rank[line.image]]
    job = ImageJob(classify, image, line.image, line.label, settings, line.program, line.data)
    return make_rule(settings, base).certify(job)


def _require(problems: list[str], path: str | Path) -> None:
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise ArqError(f"{path} does not hold; certify again with this program:\n  " + "\n  ".join(shown))
