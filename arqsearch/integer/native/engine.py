"""`NativeBackend`: runs a program and counts votes on noisy images in C, on every core.

The kernels are those of the C package (``csrc``), built with this Python package as ``_native``. Work is cut into
pieces, a thread takes one at a time, and every piece owns its memory: results do not depend on threads or pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.errors import ArqError, nearest
from arqsearch.integer.execution import check_pixels
from arqsearch.integer.program import IntegerProgram

try:
    import arqsearch.integer.native._native as _native

    _PROBLEM = None
except ModuleNotFoundError:
    _PROBLEM = "the native engine was not built with this installation"
except ImportError as error:
    _PROBLEM = f"the native engine cannot be loaded ({error})"

#: Images in one piece at most: long enough to hide the call, short enough to be interrupted.
PIECE = 64
#: Pieces for each thread, so that none waits long for the last.
PIECES_A_THREAD = 4

T = TypeVar("T")
R = TypeVar("R")


def native_problem() -> str | None:
    """Why the native engine cannot run here; None when it can."""
    return _PROBLEM


def native_available() -> bool:
    """Whether the native engine was built with this installation."""
    return _PROBLEM is None


def native_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this build and processor run, "portable" first; none if not built."""
    return () if _PROBLEM else _native.isas()


class NativeNoise:
    """The noise of randomized smoothing as the engine draws it.

    :param thresholds: t_lo .. t_hi of the 64-bit words, ascending, the last one 2^64 (docs/certificate-format.md).
    :param lo: smallest noise value in grey levels.
    :param guided: build the lookup table that makes drawing fast; the noise is the same without.
    :raises ArqError: when the engine is not built or the values leave 16 bits.
    """

    def __init__(self, thresholds: Sequence[int], lo: int, *, guided: bool = True) -> None:
        _require()
        inner = thresholds[:-1]
        self.lo, self.hi = lo, lo + len(inner)
        high = np.array([threshold >> 32 for threshold in inner], dtype=np.uint32)
        low = np.array([threshold & 0xFFFFFFFF for threshold in inner], dtype=np.uint32)
        try:
            self.handle = _native.noise_table(high, low, lo, guided)
        except ValueError as error:
            raise ArqError(f"Noise {self.lo}..{self.hi} does not fit 16 bits; choose a smaller sigma.") from error

    def draw(
        self, *, seed: int, stage: int, image_id: int, sample_start: int, sample_count: int, coordinates: int
    ) -> NDArray[np.int16]:
        """Noise of one image in grey levels: ``(sample_count, coordinates)``, equal to `arqsearch.certify.noise`.

        :param seed: 64-bit key; the other numbers fit their fields of the generator's counter.
        """
        out = np.empty((sample_count, coordinates), dtype=np.int16)
        _native.noise(self.handle, seed, stage, image_id, sample_start, out)
        return out


class NativeBackend:
    """Compiles a program once and runs batches of pixels on the CPU.

    :param program: the program; its ranges are proven first.
    :param isa: one of :func:`native_isas`, or "auto" for the fastest; does not change the result.
    :param threads: None = as many as torch uses at the time of the call; does not change the result.
    :raises ArqError: when the engine is not built, the processor lacks `isa`, or the range proof fails.
    """

    def __init__(self, program: IntegerProgram, *, isa: str = "auto", threads: int | None = None) -> None:
        from arqsearch.integer.native import compile_program

        _require()
        known = ("auto", *native_isas())
        if isa not in known:
            raise ArqError(f"This build and processor do not run isa = {isa!r}. {nearest(isa, known)}")
        if threads is not None and threads < 1:
            raise ArqError(f"threads = {threads}; choose at least 1, or None for as many as torch uses.")
        self.program = program
        self.threads = threads
        self._handle = _native.open(compile_program(program).words, isa)
        self.isa = _native.describe(self._handle)[5]

    def run(self, pixels: Any) -> Tensor:
        """Return logits as int32 ``(N, classes)`` for integer pixels ``(N, H, W, C)``.

        :raises ArqError: when type, shape or range do not fit.
        """
        images = check_pixels(self.program, pixels).cpu().numpy()
        logits = np.empty((len(images), self.program.num_classes), dtype=np.int32)

        def work(piece: slice) -> None:
            part = images[piece]
            if part.dtype not in (np.uint8, np.int16):
                part = part.astype(np.int16)
            _native.run(self._handle, np.require(part, requirements=("C", "A")), logits[piece])

        threads = self._threads()
        for _ in _each(work, _pieces(len(images), _share(len(images), threads)), threads):
            pass
        return torch.from_numpy(logits)

    def count_votes(
        self,
        noise: NativeNoise,
        images: NDArray[np.uint8],
        image_ids: Sequence[int],
        *,
        seed: int,
        stage: int,
        samples: int,
        sample_start: int = 0,
    ) -> NDArray[np.int64]:
        """Votes of each class on noisy copies of images: the first maximum of the logits of each copy.

        :param images: uint8 ``(N, H, W, C)``.
        :param image_ids: image word of the noise counter for each image.
        :param seed: 64-bit key; the other numbers fit their fields of the generator's counter.
        :param samples: noisy copies of each image.
        :param sample_start: index of the first copy.
        :returns: int64 ``(N, classes)``.
        :raises ArqError: when the images do not fit the program, or noisy pixels could leave its input range.
        """
        images, ids = self._noisy_images(noise, images, image_ids)
        votes = np.zeros((len(images), self.program.num_classes), dtype=np.int64)

        def work(piece: tuple[slice, slice]) -> NDArray[np.uint32]:
            rows, copies = piece
            part = np.zeros((rows.stop - rows.start, votes.shape[1]), dtype=np.uint32)
            first, count = sample_start + copies.start, copies.stop - copies.start
            _native.count_votes(self._handle, noise.handle, seed, stage, ids[rows], images[rows], first, count, part)
            return part

        threads = self._threads()
        share = _share(len(images) * samples, threads)
        pieces = list(product(_pieces(len(images), max(1, share // max(samples, 1))), _pieces(samples, share)))
        for (rows, _), part in zip(pieces, _each(work, pieces, threads), strict=True):
            votes[rows] += part
        return votes

    def classes(
        self,
        noise: NativeNoise,
        images: NDArray[np.uint8],
        image_ids: Sequence[int],
        *,
        seed: int,
        stage: int,
        samples: int,
        sample_start: int = 0,
    ) -> NDArray[np.uint16]:
        """Class of each noisy copy: what :meth:`count_votes` counts.

        :param images: uint8 ``(N, H, W, C)``.
        :returns: uint16 ``(N, samples)``.
        :raises ArqError: as :meth:`count_votes`.
        """
        images, ids = self._noisy_images(noise, images, image_ids)
        found = np.zeros((len(images), samples), dtype=np.uint16)

        def work(piece: tuple[int, slice]) -> None:
            row, copies = piece
            first = sample_start + copies.start
            _native.classes(
                self._handle, noise.handle, seed, stage, int(ids[row]), images[row], first, found[row, copies]
            )

        threads = self._threads()
        share = _share(len(images) * samples, threads)
        for _ in _each(work, list(product(range(len(images)), _pieces(samples, share))), threads):
            pass
        return found

    def _noisy_images(
        self, noise: NativeNoise, images: NDArray[np.uint8], image_ids: Sequence[int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Images and ids as the extension takes them, checked."""
        spec = self.program.input
        if images.dtype != np.uint8 or images.shape[1:] != spec.shape or len(image_ids) != len(images):
            raise ArqError(
                f"Votes need uint8 images (N, {', '.join(map(str, spec.shape))}) and N ids; got {images.dtype} "
                f"{images.shape} and {len(image_ids)} ids."
            )
        if noise.lo < spec.lo or 255 + noise.hi > spec.hi:
            raise ArqError(
                f"Noisy pixels lie in {noise.lo}..{255 + noise.hi}, the proofs cover {spec.lo}..{spec.hi}; lower the "
                "network again for this noise level."
            )
        return np.require(images, requirements=("C", "A")), np.array(image_ids, dtype=np.uint32)

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()


def _require() -> None:
    if _PROBLEM:
        raise ArqError(f"The native engine cannot run: {_PROBLEM}. Install a C compiler and install arqsearch again.")


def _share(total: int, threads: int) -> int:
    """Images in one piece."""
    return max(1, min(PIECE, -(-total // (PIECES_A_THREAD * threads)))) if threads > 1 else PIECE


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _each(work: Callable[[T], R], pieces: Sequence[T], threads: int) -> Iterable[R]:
    """Results of the pieces in their order; an interruption waits for running pieces only."""
    if threads == 1 or len(pieces) < 2:
        yield from map(work, pieces)
        return
    pool = ThreadPoolExecutor(min(threads, len(pieces)))
    try:
        yield from pool.map(work, pieces)
    finally:
        pool.shutdown(cancel_futures=True)
