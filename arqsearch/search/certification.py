"""Certificates and bounds of every compared network, on test images that nothing else has seen."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.base import BaseNetwork
from arqsearch.certify.certificate import certify_dataset, read_lines
from arqsearch.certify.line import FIXED, INCREMENTAL, CertificateLine
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.meter import Meter
from arqsearch.certify.shards import Shard
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, first_argmax, program_classifier
from arqsearch.data import Dataset
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.training import to_pixels
from arqsearch.recipe import Certify, Recipe
from arqsearch.search.executor import OnProgress, open_executor
from arqsearch.search.stages import FLOAT, compared, write_json
from arqsearch.search.weights import load_state
from arqsearch.search.workspace import Workspace
from arqsearch.zoo import resolve

#: Seconds between two signs of progress within an image.
SIGN_SECONDS = 0.5


def smoothing_settings(recipe: Recipe, classes: int = 0) -> SmoothingSettings:
    """The certificate settings of a recipe.

    :param classes: of the network, for two-class radii; 0 leaves them out.
    """
    section = recipe.certify
    return SmoothingSettings(
        sigma=recipe.sigma, n0=section.n0, n=section.n, alpha=section.alpha, seed=section.seed,
        batch_size=section.batch_size, skip_misclassified=section.skip_misclassified, rule=section.rule,
        radii=tuple(sorted(set(section.radii))), cap=section.cap, target=section.target, shared=section.shared,
        gained=section.gained, two_class=classes if section.two_class and section.rule == FIXED else 0,
    )  # fmt: skip


def chosen_positions(section: Certify, images: int) -> range:
    """Positions of the test images that the recipe asks for.

    :param images: size of the test set.
    """
    return range(0, images, section.every)[: section.images]


def load_program(space: Workspace, name: str) -> IntegerProgram:
    """The lowered program of a compared network.

    :raises ArqError: when it was not fine-tuned yet.
    """
    path = space.network_dir(name) / "program.safetensors"
    if not path.is_file():
        raise ArqError(f"No integer program at {path}; run `arqsearch certify {space.dir}` first.")
    return IntegerProgram.load(path)


def float_network(space: Workspace) -> QuantizedNet:
    """The fine-tuned float network, in float mode."""
    net = space.net()
    load_state(net, space.network_dir(FLOAT) / "weights.safetensors")
    return net.eval()


def float_classifier(net: QuantizedNet) -> Classifier:
    """The float network on noisy integer pixels: what an estimate, never a certificate, is made of."""

    @torch.no_grad()
    def classify(pixels: Tensor) -> Tensor:
        inputs = pixels.permute(0, 3, 1, 2).float()
        return first_argmax(net(inputs))

    return classify


def certify_program(
    program: IntegerProgram, recipe: Recipe, dataset: Dataset, path: Path, on_progress: OnProgress, name: str,
    *, folder: Path | None = None, shard: Shard | None = None, device: str = "cpu",
) -> list[CertificateLine]:  # fmt: skip
    """Certify an integer program by the rule of a recipe; resumes by image.

    :param path: certificate file.
    :param name: shown in progress.
    :param folder: run folder in which the base network's program is looked for by its hash (``incremental``).
    :param shard: certify this part of the images only.
    :param device: torch device.
    """
    settings, base = smoothing_settings(recipe, program.num_classes), None
    if settings.rule == INCREMENTAL:
        base = open_base(recipe.certify, program, recipe.sigma, path, folder, device)
    classify = program_classifier(program, recipe.sigma, device)
    return certify_images(
        classify, program.hash, dataset, settings, path, recipe.certify, on_progress, name, base=base, shard=shard,
        device=device,
    )  # fmt: skip


def certify_images(
    classify: Classifier, identity: str, dataset: Dataset, settings: SmoothingSettings, path: Path, section: Certify,
    on_progress: OnProgress, name: str, *, base: BaseNetwork | None = None, shard: Shard | None = None,
    device: str = "cpu",
) -> list[CertificateLine]:  # fmt: skip
    """Certify the images that a recipe asks for, with the rate and the time left as progress."""
    positions: list[int] | range = chosen_positions(section, len(dataset))
    if shard is not None:
        positions, path = shard.of(positions), shard.path(path)
    meter, task = Meter(), f"certify {name}"
    finished, total, counted, shown = 0, len(positions), 0, 0.0

    def on_samples(samples: int) -> None:
        nonlocal shown
        meter.took(samples)
        if time.monotonic() - shown > SIGN_SECONDS:
            shown = time.monotonic()
            on_progress(task, finished, total, meter.note(total - finished))

    def on_image(done: int, total: int, line: CertificateLine) -> None:
        nonlocal finished, counted
        finished = done
        if meter.samples > counted:  # Lines of an earlier start took no samples now.
            counted = meter.samples
            meter.finished()
        on_progress(task, done, total, meter.note(total - done))

    settings = replace(settings, device=device)
    return certify_dataset(
        classify, dataset, identity, settings, path, positions=positions, base=base, on_image=on_image,
        on_samples=on_samples,
    )  # fmt: skip


def open_base(
    section: Certify, near: IntegerProgram, sigma: float, path: Path, folder: Path | None, device: str = "cpu"
) -> BaseNetwork:
    """The base network of the ``incremental`` rule, with its program where that is given or found.

    :param near: the program to certify.
    :param path: the file that is to be written.
    :param folder: run folder whose programs are looked through.
    :raises ArqError: when none is named, or it is the file to be written.
    """
    if section.base is None:
        raise ArqError("The rule 'incremental' needs the certificates of a base network: --base CERT (certify.base).")
    source = Path(section.base).expanduser()
    if source.resolve() == path.resolve():
        raise ArqError(f"{path} holds the base network's certificates; write the new ones elsewhere (--output FILE).")
    program = find_program(source, section.base_program, folder)
    if program is None:
        return BaseNetwork(source, near.metadata)
    return BaseNetwork(source, near.metadata, program_classifier(program, sigma, device), program.hash)


def find_program(certificates: Path, given: str | None, folder: Path | None = None) -> IntegerProgram | None:
    """The program that a certificate file is about: the given one, else that of its hash in a run folder.

    :param given: program file.
    :param folder: a run folder to look in besides the one that the certificate file lies in.
    :returns: None where it was not found.
    """
    if given is not None:
        return IntegerProgram.load(resolve(given, "program").expanduser())
    lines = read_lines(certificates)
    wanted = lines[0].program if lines else ""
    for place in [certificates.absolute().parent.parent, *([] if folder is None else [folder])]:
        for file in sorted(place.glob("networks/*/program.safetensors")):
            program = IntegerProgram.load(file)
            if program.hash == wanted:
                return program
    return None


def interval_verdicts(program: IntegerProgram, space: Workspace) -> dict[str, Any]:
    """QA-IBP verdicts by ε: which of the first test images are proven robust."""
    section, test = space.recipe.certify, space.test_set
    part = test.subset(np.arange(min(section.interval_images, len(test))))
    bounds = IntervalBounds(program)
    robust = {str(e): bounds.verify(part.images, part.labels, e).robust.int().tolist() for e in section.epsilons}
    return {"images": part.ids.tolist(), "robust": robust}


def clean_accuracy(classify: Classifier, space: Workspace) -> dict[str, int]:
    """Correct answers on the first test images without noise, and how many images those are."""
    test = space.test_set
    part = test.subset(np.arange(min(space.recipe.certify.clean_images, len(test))))
    correct = 0
    for start in range(0, len(part), 250):
        pixels = to_pixels(part.images[start : start + 250]).permute(0, 2, 3, 1).to(torch.int16)
        labels = torch.from_numpy(part.labels[start : start + 250])
        correct += int((classify(pixels) == labels).sum())
    return {"correct": correct, "images": len(part)}


def certify(recipe: Recipe, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Certify every compared network, in parallel; returns the rows of the final table."""
    from arqsearch.search.certify_workers import certify_networks
    from arqsearch.search.require_settle import certificate_recipes
    from arqsearch.search.results import comparison_rows

    with open_executor(recipe.executor, recipe.workers) as executor:
        for settings, names in certificate_recipes(recipe, compared(recipe)):
            certify_networks(settings, names, executor, on_progress)
    rows = comparison_rows(Workspace(recipe))
    write_json(Workspace(recipe).dir / "comparison.json", rows)
    return rows
