"""Certificates and bounds of every compared network, on test images that nothing else has seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.certificate import certify_dataset
from arqsearch.certify.intervals import IntervalBounds
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, first_argmax, program_classifier
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.training import to_pixels
from arqsearch.recipe import Recipe
from arqsearch.search.executor import LocalExecutor, OnProgress, Task
from arqsearch.search.stages import FLOAT, compared, write_json
from arqsearch.search.weights import load_state, state_hash
from arqsearch.search.workspace import Workspace


def smoothing_settings(recipe: Recipe) -> SmoothingSettings:
    """The certificate settings of a recipe."""
    section = recipe.certify
    return SmoothingSettings(
        sigma=recipe.sigma, n0=section.n0, n=section.n, alpha=section.alpha, seed=section.seed,
        batch_size=section.batch_size, skip_misclassified=section.skip_misclassified,
    )  # fmt: skip


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


def certify_network(recipe: Recipe, name: str, on_progress: OnProgress) -> dict[str, Any]:
    """Certificates (or, for the float network, estimates) and bounds of one network; resumes by image."""
    space = Workspace(recipe)
    test = space.test_set
    if name == FLOAT:
        net = float_network(space)
        classify, identity = float_classifier(net), "float:" + state_hash(net.state_dict())
        bounds = {"clean": clean_accuracy(classify, space)}
    else:
        program = load_program(space, name)
        classify, identity = program_classifier(program, recipe.sigma), program.hash
        bounds = {"clean": clean_accuracy(classify, space), "interval": interval_verdicts(program, space)}
    write_json(space.bounds_path(name), {"network": name, "program": identity, **bounds})

    def on_image(done: int, total: int, line: CertificateLine) -> None:
        on_progress(f"certify {name}", done, total, f"r={line.radius:.3f}" if line.correct else "")

    count = min(recipe.certify.images, len(test))
    lines = certify_dataset(
        classify, test, identity, smoothing_settings(recipe), space.certificate_path(name), positions=range(count),
        on_image=on_image,
    )  # fmt: skip
    return {"network": name, "program": identity, "images": len(lines)}


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
    tasks = [Task(name, certify_network, (recipe, name)) for name in compared(recipe)]
    LocalExecutor(recipe.workers).map(tasks, on_progress)
    from arqsearch.search.results import comparison_rows

    rows = comparison_rows(Workspace(recipe))
    write_json(Workspace(recipe).dir / "comparison.json", rows)
    return rows
