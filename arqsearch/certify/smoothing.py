"""Randomized smoothing: settings, classifiers, and the counting of their answers on noisy images.

The noise is integer, so x + Z stays on the pixel grid and the certified function is exactly the integer program
(docs/certificate-format.md states the theorem). How counts become a radius is a rule's matter (`rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.certify.line import FIXED, INCREMENTAL, SEQUENTIAL
from arqsearch.certify.line_schema import Target
from arqsearch.certify.noise import NoiseTable, check_fields, noise
from arqsearch.errors import ArqError, nearest
from arqsearch.integer.native.engine import NativeBackend, NativeNoise

if TYPE_CHECKING:
    from arqsearch.integer.program import IntegerProgram

#: Noisy images, int16 ``(N, H, W, C)`` in grey levels, to classes, int64 ``(N,)``; deterministic.
Classifier: TypeAlias = Callable[[Tensor], Tensor]
#: Called with the number of samples that were just taken.
OnSamples: TypeAlias = Callable[[int], None]
#: Samples of one image that are counted in one call, between two signs of progress.
PIECE = 4096


@runtime_checkable
class VoteCounter(Protocol):
    """A `Classifier` that draws the noise and counts its classes itself: the same votes, without noisy images."""

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """Classes of noisy images, as of any `Classifier`."""
        ...

    def count_votes(
        self,
        images: NDArray[np.uint8],
        image_ids: Sequence[int],
        *,
        table: NoiseTable,
        seed: int,
        stage: int,
        samples: int,
        sample_start: int = 0,
    ) -> NDArray[np.int64]:
        """Votes, ``(N, classes)``, on the noise that :func:`arqsearch.certify.noise.noise` draws for these numbers."""
        ...

    def classes(
        self, image: NDArray[np.uint8], image_id: int, *, table: NoiseTable, seed: int, stage: int, samples: int
    ) -> NDArray[np.int64]:
        """Class of each of the first noisy copies of one image, ``(samples,)``."""
        ...


@dataclass(frozen=True)
class SmoothingSettings:
    """How images are certified.

    :param sigma: noise level in [0,1] pixels.
    :param n0: samples that select the class.
    :param n: fresh samples that estimate its probability (``fixed``).
    :param alpha: failure probability for each image.
    :param seed: 64-bit key of the noise generator.
    :param batch_size: noisy images in one forward pass; does not change the result.
    :param skip_misclassified: do not estimate an image whose selected class is not its label: certified
        accuracy and ACR count it 0 either way.
    :param device: torch device of the noise; does not change the result.
    :param rule: ``fixed``, ``sequential`` or ``incremental``.
    :param radii: radii that ``sequential`` decides, in [0,1] pixels.
    :param cap: samples after which ``sequential`` gives up.
    :param target: whose probability ``sequential`` tests: the selected class, or the label (no selection then).
    :param shared: samples on which ``incremental`` compares two networks.
    :param gained: count the gained pairs as well (``incremental``), at a third of alpha for each bound.
    :param two_class: classes of the network, for the two-class radius beside that of ``fixed``; 0 = without.
    :raises ArqError: when a value is out of range.
    """

    sigma: float
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    seed: int = 0
    batch_size: int = 250
    skip_misclassified: bool = True
    device: str = "cpu"
    rule: str = FIXED
    radii: tuple[float, ...] = ()
    cap: int = 10_000
    target: Target = "selected"
    shared: int = 1000
    gained: bool = False
    two_class: int = 0

    def __post_init__(self) -> None:
        for name in ("n0", "n", "batch_size", "cap", "shared"):
            if getattr(self, name) < 1:
                raise ArqError(f"{name} = {getattr(self, name)}; choose a whole number of at least 1.")
        if not 0 < self.alpha < 0.5:
            raise ArqError(f"alpha = {self.alpha} is no failure probability; choose one in (0, 0.5) such as 0.001.")
        rules = (FIXED, SEQUENTIAL, INCREMENTAL)
        if self.rule not in rules:
            raise ArqError(f"There is no certification rule {self.rule!r}. {nearest(self.rule, rules)}")


def first_argmax(logits: Tensor) -> Tensor:
    """Index of the first maximum of each row; `torch.argmax` does not promise the first.

    :param logits: ``(N, classes)``, no NaN.
    :returns: int64 ``(N,)``.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    at_maximum = logits == logits.amax(1, keepdim=True)
    return torch.where(at_maximum, classes, logits.shape[1]).amin(1)


def program_classifier(program: IntegerProgram, sigma: float, device: str = "cpu") -> Classifier:
    """The classifier of an integer program, checked to accept every noisy image at this σ.

    :param sigma: noise level in [0,1] pixels.
    :param device: torch device that runs the program.
    :raises ArqError: when noisy pixels could leave the program's input range.
    """
    check_input_range(program.input.lo, program.input.hi, sigma)
    backend = program.backend(device=device)
    if isinstance(backend, NativeBackend):
        return NativeClassifier(backend)
    return lambda pixels: first_argmax(backend.run(pixels))


class NativeClassifier:
    """A `VoteCounter` on the native engine.

    :param backend: the compiled program.
    """

    def __init__(self, backend: NativeBackend) -> None:
        self.backend = backend

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """Classes of noisy images."""
        return first_argmax(self.backend.run(pixels))

    def count_votes(
        self,
        images: NDArray[np.uint8],
        image_ids: Sequence[int],
        *,
        table: NoiseTable,
        seed: int,
        stage: int,
        samples: int,
        sample_start: int = 0,
    ) -> NDArray[np.int64]:
        """Votes on noise that the engine draws."""
        return self.backend.count_votes(
            _native_noise(table), images, image_ids, seed=seed, stage=stage, samples=samples, sample_start=sample_start
        )

    def classes(
        self, image: NDArray[np.uint8], image_id: int, *, table: NoiseTable, seed: int, stage: int, samples: int
    ) -> NDArray[np.int64]:
        """Classes on noise that the engine draws."""
        drawn = _native_noise(table)
        found = self.backend.classes(drawn, image[None], [image_id], seed=seed, stage=stage, samples=samples)
        wide: NDArray[np.int64] = found[0].astype(np.int64)
        return wide


@lru_cache(maxsize=16)
def _native_noise(table: NoiseTable) -> NativeNoise:
    return NativeNoise(table.thresholds, table.lo)


def check_input_range(lo: int, hi: int, sigma: float) -> None:
    """Refuse a range that x + Z, with x in 0..255, can leave.

    :param lo: smallest pixel value that the program accepts.
    :param hi: largest pixel value that the program accepts.
    :param sigma: noise level in [0,1] pixels.
    """
    table = NoiseTable.for_sigma(sigma)
    if lo > table.lo or hi < 255 + table.hi:
        raise ArqError(
            f"The program accepts pixels in {lo}..{hi}, but noisy pixels at sigma = {sigma} lie in "
            f"{table.lo}..{255 + table.hi}; lower the network again with noise_limit={table.hi}, or certify at a "
            "smaller sigma."
        )


def count_votes(
    classify: Classifier,
    images: NDArray[np.uint8],
    image_ids: Sequence[int],
    *,
    table: NoiseTable,
    seed: int,
    stage: int,
    samples: int,
    batch_size: int,
    device: str = "cpu",
    sample_start: int = 0,
) -> NDArray[np.int64]:
    """Votes of each class on noisy copies of images.

    :param classify: counts itself where it is a `VoteCounter`, else it gets batches of noisy images.
    :param images: uint8 ``(N, H, W, C)``.
    :param image_ids: image word of the noise counter for each image.
    :param stage: `SEARCH`, `SELECT` or `ESTIMATE`.
    :param samples: number of noisy copies of each image.
    :param batch_size: noisy images in one forward pass; does not change the result.
    :param device: torch device of the noise; does not change the result.
    :param sample_start: index of the first copy.
    :returns: int64 ``(N, classes)``, as many classes as the classifier knows or answered.
    :raises ArqError: when the answer has another type or shape than stated, or a number leaves the noise counter.
    """
    coordinates = images[0].size if len(images) else 1
    check_fields(seed, stage, image_ids, sample_start, samples, coordinates)
    if isinstance(classify, VoteCounter):
        return classify.count_votes(
            images, image_ids, table=table, seed=seed, stage=stage, samples=samples, sample_start=sample_start
        )
    votes = np.zeros((len(images), 0), dtype=np.int64)
    group, run = max(1, batch_size // max(samples, 1)), min(batch_size, samples)
    for first in range(0, len(images), group):
        ids = [int(identity) for identity in image_ids[first : first + group]]
        pixels = torch.from_numpy(images[first : first + group].astype(np.int16)).to(device)
        for start in range(0, samples, run):
            count = min(run, samples - start)
            answers = _answers(classify, pixels, ids, table, seed, stage, sample_start + start, count)
            votes = np.pad(votes, ((0, 0), (0, max(0, int(answers.max()) + 1 - votes.shape[1]))))
            for row, answer in enumerate(answers):
                votes[first + row] += np.bincount(answer, minlength=votes.shape[1])
    return votes


def _answers(
    classify: Classifier, pixels: Tensor, ids: Sequence[int], table: NoiseTable, seed: int, stage: int, start: int,
    count: int,
) -> NDArray[np.int64]:  # fmt: skip
    """Classes of noisy copies, ``(images, count)``."""
    drawn = noise(
        table, seed=seed, stage=stage, image_ids=ids, sample_start=start, sample_count=count,
        coordinates=pixels[0].numel(), device=str(pixels.device),
    )  # fmt: skip
    noisy = (pixels[:, None] + drawn.view(len(ids), count, *pixels.shape[1:])).flatten(0, 1)
    classes = classify(noisy)
    if classes.shape != (len(noisy),) or classes.dtype != torch.int64:
        raise ArqError(
            f"The classifier gave {classes.dtype} {tuple(classes.shape)} for {len(noisy)} images; expected int64 (N,)."
        )
    found: NDArray[np.int64] = classes.cpu().numpy().reshape(len(ids), count)
    return found


def sample_classes(
    classify: Classifier, image: NDArray[np.uint8], image_id: int, stage: int, samples: int, settings: SmoothingSettings
) -> NDArray[np.int64]:
    """Class of each of the first noisy copies of one image, in their order.

    :param image: uint8 ``(H, W, C)``.
    :param image_id: image word of the noise counter.
    :param stage: `SEARCH`, `SELECT` or `ESTIMATE`.
    :param samples: number of noisy copies.
    :returns: int64 ``(samples,)``.
    """
    table, seed = NoiseTable.for_sigma(settings.sigma), settings.seed
    check_fields(seed, stage, [image_id], 0, samples, image.size)
    if isinstance(classify, VoteCounter):
        return classify.classes(image, image_id, table=table, seed=seed, stage=stage, samples=samples)
    pixels = torch.from_numpy(image[None].astype(np.int16)).to(settings.device)
    parts = [
        _answers(classify, pixels, [image_id], table, seed, stage, start, min(settings.batch_size, samples - start))[0]
        for start in range(0, samples, settings.batch_size)
    ]
    return np.concatenate(parts)


def count_classes(
    classify: Classifier, image: NDArray[np.uint8], image_id: int, stage: int, samples: int,
    settings: SmoothingSettings, sample_start: int = 0,
) -> dict[int, int]:  # fmt: skip
    """Votes of each class on noisy copies of one image, classes without votes left out.

    :param image: uint8 ``(H, W, C)``.
    :param image_id: image word of the noise counter.
    :param stage: `SEARCH`, `SELECT` or `ESTIMATE`.
    :param samples: number of noisy copies.
    :param sample_start: index of the first copy.
    :raises ArqError: when image or answer have another type or shape than stated.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ArqError(f"Image {image_id} is {image.dtype} of shape {image.shape}; expected uint8 (H, W, C).")
    votes = count_votes(
        classify, image[None], [image_id], table=NoiseTable.for_sigma(settings.sigma), seed=settings.seed, stage=stage,
        samples=samples, batch_size=settings.batch_size, device=settings.device, sample_start=sample_start,
    )[0]  # fmt: skip
    return {name: int(count) for name, count in enumerate(votes.tolist()) if count}


def total_distance(sigma: float, coordinates: int) -> float:
    """d·τ rounded up: how far the drawn noise of a whole image can be from the ideal, in total variation.

    :param coordinates: d = H·W·C.
    """
    return float(np.nextafter(coordinates * NoiseTable.for_sigma(sigma).tv, np.inf))
