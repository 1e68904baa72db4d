"""Time to decide the radius r = σ: the protocol of Cohen et al. in PyTorch, and the integer program by each rule.

Behind ``arqsearch bench certify-speed``. One trained ResNet-20, the same test images for all, one thread. The fixed
protocols take 100,100 samples an image, whatever the image: their time is a measured rate times that number, and said
to be. The sequential rule is run and timed in full.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from arqsearch.benchmarks.results import this_machine
from arqsearch.benchmarks.timing import Table, interleave
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.noise import ESTIMATE, NoiseTable
from arqsearch.certify.rules import make_rule
from arqsearch.certify.smoothing import SmoothingSettings, VoteCounter, program_classifier
from arqsearch.data import Dataset
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import load_recipe
from arqsearch.search.stages import calibrated
from arqsearch.search.workspace import Workspace

#: Told ``(task, done, total, note)``.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]

#: Base networks by σ: trained weights from the zoo, or beside the data.
BASES = {0.25: "weights/resnet20_cifar10_noise_s025.safetensors", 0.5: "zoo:resnet20-cifar10-s050"}
ALPHA, N0, N, SEED = 0.001, 100, 100_000, 20260101
#: Caps of the sequential rule that the summary names.
CAPS = {"sequential": 100_000, "sequential10k": 10_000}
#: Sizes n at which the cost of the fixed rule is measured, on this many images: it is the same for each.
FIXED_SIZES, FIXED_IMAGES = (1_000, 10_000, 100_000), 3
#: Images in one forward pass of PyTorch, as the published code has it, and of one timed call of ours.
TORCH_BATCH, VOTES = 500, 2_000
#: ``adversarial-robustness-toolbox``, timed where it is installed.
ART = "art"


@dataclass(frozen=True)
class Subject:
    """What is certified.

    :param sigma: noise level in [0,1] pixels.
    :param base: where the weights come from.
    :param images: test images, uint8 ``(N, H, W, C)``.
    :param network: the float network: [0,1] images ``(N, C, H, W)`` to logits, batch norm not folded.
    :param program: the integer program of the same weights, W8A8, not fine-tuned.
    """

    sigma: float
    base: str
    images: Dataset
    network: nn.Module
    program: IntegerProgram


class _Normalized(nn.Module):
    """The published code's first layer and the network behind it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model((x - self.mean) / self.std)
        return logits


def subject(sigma: float, count: int, folder: Path) -> Subject:
    """The noise-trained ResNet-20 on the first test images of CIFAR-10.

    :param sigma: 0.25 or 0.5, for which weights are at hand.
    :param count: number of images.
    :param folder: scratch folder of the recipe.
    :raises ArqError: where data or weights are missing.
    """
    if sigma not in BASES:
        raise ArqError(f"No trained ResNet-20 for σ = {sigma:g}; use --sigma {' or '.join(f'{s:g}' for s in BASES)}.")
    recipe = load_recipe("resnet20_cifar10", [f"run={folder}", f"sigma={sigma}", f"model.weights={BASES[sigma]}"])
    space = Workspace(recipe)
    net = calibrated(space)
    program = lower(net, noise_limit=space.table.hi, metadata={"benchmark": "certify-speed"})
    float_net = space.net(space.base_weights()).eval()
    model = _Normalized(float_net.source.eval(), float_net.mean / 255, float_net.std / 255)
    test = space.test_set
    if count > len(test):
        raise ArqError(f"There are {len(test)} test images; ask for at most that many, not {count}.")
    # As published: NCHW in memory.
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Subject(sigma, BASES[sigma], test.subset(np.arange(count)), model, program)


# ---- rates -----------------------------------------------------------------------------------


def rate_calls(item: Subject) -> tuple[dict[str, Callable[[], object]], dict[str, int], dict[str, str]]:
    """What is timed for its rate: the calls, the samples in one call, and why a peer is absent."""
    image = torch.from_numpy(item.images.images[0]).permute(2, 0, 1).float() / 255
    classify = program_classifier(item.program, item.sigma)
    table = NoiseTable.for_sigma(item.sigma)

    @torch.no_grad()
    def cohen() -> object:
        batch = image.repeat((TORCH_BATCH, 1, 1, 1))
        return item.network(batch + torch.randn_like(batch) * item.sigma).argmax(1).bincount(minlength=10)

    def fixed() -> object:
        if not isinstance(classify, VoteCounter):
            raise ArqError("The native engine is not built; install a C compiler and install arqsearch again.")
        return classify.count_votes(
            item.images.images[:1], [int(item.images.ids[0])], table=table, seed=SEED, stage=ESTIMATE, samples=VOTES
        )

    calls: dict[str, Callable[[], object]] = {"cohen": cohen, "fixed": fixed}
    samples, absent = {"cohen": TORCH_BATCH, "fixed": VOTES}, {}
    try:
        calls[ART] = _art_call(item, image)
        samples[ART] = TORCH_BATCH
    except ImportError as error:
        absent[ART] = f"pip install adversarial-robustness-toolbox ({error})"
    return calls, samples, absent


def _art_call(item: Subject, image: torch.Tensor) -> Callable[[], object]:
    """One batch of votes by the Adversarial Robustness Toolbox."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=item.network, loss=nn.CrossEntropyLoss(), input_shape=tuple(image.shape), nb_classes=10,
        scale=item.sigma, alpha=ALPHA, sample_size=N0, device_type="cpu",
    )  # fmt: skip
    pixels = image[None].numpy()
    # `certify` takes 100 samples to select the class and n to estimate it.
    return lambda: smoothed.certify(pixels, n=TORCH_BATCH - N0, batch_size=TORCH_BATCH)


# ---- the sequential rule ---------------------------------------------------------------------


def certify_all(
    item: Subject, rule: str, radii: tuple[float, ...], cap: int, on_progress: OnProgress, task: str, n: int = N
) -> tuple[list[CertificateLine], float]:
    """Certify every image of a subject; none is skipped.

    The sequential rule tests the label itself (labelled evaluation needs no selection); `fixed` selects the class by
    n0 samples, to the letter of the protocol.

    :param rule: ``sequential`` or ``fixed``.
    :param radii: in [0,1] pixels.
    :param cap: most samples of the sequential rule.
    :param n: samples of the fixed rule.
    :returns: the lines, and the seconds they took.
    """
    settings = SmoothingSettings(
        item.sigma, n0=N0, n=n, alpha=ALPHA, seed=SEED, rule=rule, radii=radii, cap=cap, target="label",
        skip_misclassified=False,
    )  # fmt: skip
    classify, found, data = program_classifier(item.program, item.sigma), [], item.images
    make_rule(settings).certify(_job(classify, data, 0, settings, item.program.hash))  # Tables are made once.
    begin = time.perf_counter()
    for index in range(len(data)):
        found.append(make_rule(settings).certify(_job(classify, data, index, settings, item.program.hash)))
        on_progress(task, index + 1, len(data), "")
    return found, time.perf_counter() - begin


def _job(classify: Any, data: Dataset, index: int, settings: SmoothingSettings, program: str) -> ImageJob:
    return ImageJob(
        classify, data.images[index], int(data.ids[index]), int(data.labels[index]), settings, program, data.identity
    )


def undecided(lines: list[CertificateLine]) -> float:
    """Share of images with a radius neither certified nor refuted at the cap."""
    open_ = [line for line in lines if line.sequential is not None and "undecided" in line.sequential.decisions]
    return len(open_) / len(lines)


def disagreements(sequential: list[CertificateLine], fixed: list[CertificateLine], radius: float) -> int:
    """Images that one rule certifies at the radius and the other refutes (fixed: does not certify).

    A fixed certificate may miss what the sequential rule finds and the other way round, near the edge; a refutation
    beside a certificate is an error of one of the two, of probability α each.
    """
    count = 0
    for one, other in zip(sequential, fixed, strict=True):
        assert one.sequential is not None
        decision = one.sequential.decisions[one.sequential.radii.index(radius)]
        certified = other.certified and other.correct and other.radius >= radius
        count += decision == "refuted" and certified
    return count


# ---- what is told ----------------------------------------------------------------------------


def measure(item: Subject, rounds: int, on_progress: OnProgress, *, full: bool) -> dict[str, Any]:
    """All figures of one subject at r = σ.

    :param rounds: rounds in which rates are timed.
    :param full: also certify every image by ``fixed`` with n = 100,000 and compare.
    """
    torch.set_num_threads(1)
    calls, samples, absent = rate_calls(item)
    for call in calls.values():
        call()
    table: Table = interleave(calls, rounds, on_round=lambda done: on_progress("rates", done, rounds, ""))
    rates = {name: samples[name] / median(table[name]) for name in table}
    count, radius = len(item.images), item.sigma
    seconds = {f"{name} (rate)": count * (N0 + N) / rate for name, rate in rates.items()}
    figures: dict[str, Any] = {"samples_per_second": {name: round(rate, 1) for name, rate in rates.items()}}
    lines: dict[str, list[CertificateLine]] = {}
    for name, cap in CAPS.items():
        lines[name], seconds[name] = certify_all(item, "sequential", (radius,), cap, on_progress, name)
        figures[f"{name}_vs_cohen"] = round(seconds["cohen (rate)"] / seconds[name], 1)
        figures[f"{name}_samples_per_image"] = round(float(np.mean([line.samples for line in lines[name]])), 1)
    figures["undecided10k"] = undecided(lines["sequential10k"])
    figures["undecided100k"] = undecided(lines["sequential"])
    figures["fixed_vs_cohen"] = round(rates["fixed"] / rates["cohen"], 2)
    figures["sequential_vs_art"] = round(seconds[f"{ART} (rate)"] / seconds["sequential"], 1) if ART in rates else None
    if full:
        lines["fixed"], seconds["fixed"] = certify_all(item, "fixed", (), N, on_progress, "fixed")
        figures["fixed_contradictions"] = disagreements(lines["sequential"], lines["fixed"], radius)
        figures["fixed_expected_errors"] = 2 * ALPHA * count
        figures["certified_at_sigma"] = {
            name: sum(line.certified and line.correct and line.radius >= radius for line in lines[name])
            for name in ("fixed", "sequential", "sequential10k")
        }
    return {
        **figures, "sigma": item.sigma, "base": item.base, "radius": radius, "images": count, "alpha": ALPHA,
        "hardware": this_machine(), "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "absent": absent,
    }  # fmt: skip


def growth(item: Subject, shares: tuple[float, ...], on_progress: OnProgress) -> list[dict[str, Any]]:
    """What one image costs: the sequential rule over the asked radius and the cap, the fixed one over n.

    :param shares: radii in units of σ.
    :returns: one row for each radius and cap, and for each n.
    """
    found = []
    for n in FIXED_SIZES:
        few = replace(item, images=item.images.subset(np.arange(min(FIXED_IMAGES, len(item.images)))))
        lines, seconds = certify_all(few, "fixed", (), N, on_progress, f"σ={item.sigma}, fixed, n={n}", n=n)
        found.append(_growth_row(item.sigma, "fixed", "", n, lines, seconds))
    for share in shares:
        for cap in CAPS.values():
            radius, task = round(share * item.sigma, 6), f"σ={item.sigma}, r={share}σ, cap {cap}"
            lines, seconds = certify_all(item, "sequential", (radius,), cap, on_progress, task)
            found.append(_growth_row(item.sigma, "sequential", share, cap, lines, seconds))
    return found


def _growth_row(
    sigma: float, rule: str, share: float | str, limit: int, lines: list[CertificateLine], seconds: float
) -> dict[str, Any]:
    taken = [line.samples for line in lines]
    return {
        "hardware": this_machine(), "sigma": sigma, "rule": rule, "radius_in_sigma": share, "n_or_cap": limit,
        "images": len(lines), "samples_mean": round(float(np.mean(taken)), 1),
        "samples_median": float(np.median(taken)), "undecided": round(undecided(lines), 4),
        "seconds_per_image": round(seconds / len(lines), 5),
    }  # fmt: skip


def write_rows(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
