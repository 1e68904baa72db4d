"""A damaged blob is refused; a wrong one with a right checksum is refused or runs, and never leaves its memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integer.native import assembler as A
from tests.integer.native import build
from tests.integer.native.fused_convolutions import FusedConvolution
from tests.integer.random_programs import random_program

Blob = np.ndarray[tuple[int], np.dtype[np.uint32]]
MODEL_REFUSED = 14
#: The harness leaves without freeing when a blob is refused.
QUIET = {"ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="module", params=["gcc", pytest.param("clang", marks=pytest.mark.slow)])
def harness(request: pytest.FixtureRequest) -> Path:
    """The harness under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build.harness(request.config, build.compiler(request.param), build.SANITIZE)


def call(harness: Path, tmp_path: Path, command: str, blob: Blob, *more: object) -> str:
    """Output of the harness, which must succeed."""
    blob.astype("=u4").tofile(tmp_path / "blob")
    done = subprocess.run(
        [harness, command, tmp_path / "blob", *map(str, more)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_damaged_word_and_every_truncation_is_refused(harness: Path, tmp_path: Path) -> None:
    blob = every_step()[0]
    refused = int(call(harness, tmp_path, "damage", blob).split()[0])
    assert refused > 36 * len(blob)


def fuzz(harness: Path, tmp_path: Path, blob: Blob, seed: int, rounds: int) -> int:
    """Number of mutated blobs that were accepted and run; the rest was refused, and nothing crashed."""
    refused, _, ran, _ = call(harness, tmp_path, "fuzz", blob, seed, rounds).split()
    assert int(refused) > 0
    return int(ran)


def test_mutated_blobs_never_crash(harness: Path, tmp_path: Path) -> None:
    ran = sum(fuzz(harness, tmp_path, every_step()[0], seed, 2000) for seed in range(3))
    for seed in range(8):
        ran += fuzz(harness, tmp_path, FusedConvolution(seed).build()[0], seed, 1000)
        ran += fuzz(harness, tmp_path, A.plain_blob(random_program(seed)), seed, 1000)
    assert ran > 1000


@pytest.mark.slow
def test_many_more_mutated_blobs_never_crash(harness: Path, tmp_path: Path) -> None:
    for seed in range(100, 180):
        fuzz(harness, tmp_path, every_step()[0], seed, 20_000)
        fuzz(harness, tmp_path, FusedConvolution(seed).build()[0], seed, 20_000)
        fuzz(harness, tmp_path, A.plain_blob(random_program(seed)), seed, 20_000)


def every_step() -> tuple[Blob, dict[int, int]]:
    """A blob with every kind of step and optional part, and the word at which each kind's first step begins."""
    blob = A.Assembler((4, 6, 3), (-50, 300))
    pixels = blob.tensor(A.U8, -64, 4, 6, 3)
    constants = blob.constant64([3 * 2**28, 2**28, 2**29, -(2**31), 5, 77])
    blob.step(A.INPUT, 0, pixels, 3, 30, 0, 0, 255, -64, 63, constants)
    wide = blob.tensor(A.U8, -64, 5, 8, 3)
    blob.step(A.PAD, pixels, wide, 1, 0, 1, 1, blob.constant([-64, 0, 63]))
    weight = np.arange(8 * 3 * 3 * 3).reshape(8, 3, 3, 3) % 16 - 8
    first = blob.tensor(A.U8, 0, 5, 8, 8)
    fast = [[-20000], [20000], [5], [2**7], [8]]
    after = blob.rescale([5], [8], "half_up", 0, 255, fast)
    blob.conv(
        wide, first, weight, [100 * o for o in range(8)], bits=4, padding=(1, 1, 1, 1), rescale=after,
        sum_class=A.SUM_PAIRS, depth=8,
    )  # fmt: skip
    second = blob.tensor(A.U8, 0, 5, 8, 8)
    narrow = blob.rescale([1], [4], "floor", -8, 7)
    exact = blob.rescale(list(range(100, 108)), [10], "half_even", 0, 255)
    residual = blob.rescale([3], [2], "half_up", 0, 100)
    blob.conv(
        first, second, weight[:, :, :, :1], [0] * 8, bits=4, padding=(1, 1, 1, 1), groups=8, in_rescale=narrow,
        in_zero=-8, in_max=15, rescale=exact, residual=first, residual_rescale=residual, clip=(0, 255),
        sum_class=A.SUM_U8,
    )  # fmt: skip
    halves = blob.tensor(A.I32, 0, 2, 3, 8)
    blob.step(A.SUMPOOL, second, halves, 3, 3, 2, 2, 1, 0, 0, 0)
    small = blob.tensor(A.I16, 0, 2, 3, 8)
    blob.step(A.RESCALE, halves, small, blob.rescale([5] * 8, [4] * 8, "half_even", -300, 300))
    most = blob.tensor(A.I16, 0, 2, 3, 8)
    blob.step(A.MAXPOOL, small, most, 3, 3, 1, 1, 1, 1, 1, 1)
    total = blob.tensor(A.I16, 0, 2, 3, 8)
    blob.step(A.ADD, small, most, total, blob.rescale([1], [1], "floor", -99, 99), 0, -500, 500)
    more = blob.tensor(A.I16, 0, 2, 3, 11)
    blob.step(A.CHANNELS, total, more, 1, 2)
    part = blob.tensor(A.I16, 0, 2, 2, 5)
    blob.step(A.SLICE, more, part, 0, 2, 1, 0, 3, 2, 1, 11, 2)
    flat = blob.tensor(A.I32, 0, 1, 1, 20)
    blob.step(A.COPY, part, flat)
    logits = blob.tensor(A.I32, 0, 1, 1, 4)
    linear = (np.arange(80).reshape(4, 1, 1, 20) * 37) % 100 - 50
    blob.conv(flat, logits, linear, [1, 2, 3, 4], bits=16, flat=1)
    words = blob.words(logits)
    places: dict[int, int] = {}
    at = int(words[22])
    for _ in range(int(words[21])):
        places.setdefault(int(words[at]), at)
        at += int(words[at + 1])
    return words, places


BIG = 2**31
#: Header words (by number) and wrong values for them.
HEADER = [
    (0, (0, 0x32515241)), (1, (0, 2)), (2, (0, 24, BIG)), (4, (0, 2)), (13, (0, 5, BIG)), (15, (0, 4)),
    (16, (-(2**15) - 1, 301)), (17, (2**15, -51)), (18, (0, 3, 5)), (19, (0, 1, BIG)), (20, (0, BIG, 2**32 - 1)),
    (21, (100, BIG)), (22, (0, BIG, 2**32 - 1)), (23, (0, 64)), (24, (99, BIG)),
]  # fmt: skip
#: Kind of step, field (counted from the step's kind) and wrong values for it, for the first step of each kind.
FIELDS = [
    *((kind, 1, (0, 1, 2, 40, BIG)) for kind in range(1, 11)),
    *((kind, 2, (99, A.NO_TENSOR)) for kind in range(1, 11)),
    *((kind, 3, (0, 99, A.NO_TENSOR)) for kind in range(1, 11) if kind != A.ADD),
    (A.INPUT, 0, (0, 11, BIG)), (A.INPUT, 4, (0, 2, 4)), (A.INPUT, 5, (63, -1)), (A.INPUT, 6, (3, -1)),
    (A.INPUT, 7, (256,)), (A.INPUT, 9, (64,)), (A.INPUT, 11, (0, 24, BIG, -1)),
    (A.CONV, 4, (1, 2)), (A.CONV, 5, (0, 2, 65536, BIG)), (A.CONV, 6, (0, 2, 65536, BIG)), (A.CONV, 7, (0, 2, BIG)),
    (A.CONV, 9, (0, 2, 65536, -1)), (A.CONV, 12, (0, 65536, -1)), (A.CONV, 13, (0, 2, 3, 8, BIG)),
    (A.CONV, 14, (0, 1, 9, 15, 16, 17, BIG)), (A.CONV, 15, (0, 24, BIG, -1)), (A.CONV, 16, (0, 24, BIG, -1)),
    (A.CONV, 17, (1, BIG)), (A.CONV, 18, (0, 1, -65, -256)), (A.CONV, 19, (256, -1)), (A.CONV, 20, (1, 24, BIG, -1)),
    (A.CONV, 21, (0, 1, 2, 99)), (A.CONV, 22, (30,)), (A.CONV, 25, (4, -1)), (A.CONV, 26, (0,)),
    (A.CONV, 27, (0, 1, 32, BIG)), (A.CONV, 28, (0, 64, 447, BIG, -1)),
    (A.RESCALE, 4, (0, 1, BIG, -1)),
    (A.ADD, 4, (0, 99)), (A.ADD, 5, (1, BIG)), (A.ADD, 6, (1, BIG)), (A.ADD, 7, (501,)), (A.ADD, 8, (-501,)),
    (A.SUMPOOL, 4, (0, 1, 65536)), (A.SUMPOOL, 6, (0, 1)), (A.SUMPOOL, 8, (3, -1)),
    (A.MAXPOOL, 4, (0, 1, 65536)), (A.MAXPOOL, 7, (0, 2)), (A.MAXPOOL, 8, (0, 3, -1)),
    (A.PAD, 4, (0, 2, -1)), (A.PAD, 8, (0, 24, BIG, -1)),
    (A.CHANNELS, 4, (0, 2, -1)), (A.CHANNELS, 5, (1, BIG)),
    (A.SLICE, 4, (1, 2, -1)), (A.SLICE, 5, (0, 1, 3, -1)), (A.SLICE, 6, (0, 2, -1)), (A.SLICE, 11, (12, 8, -1)),
    (A.SLICE, 12, (0,)),
]  # fmt: skip
#: Tensor, field and wrong values for it.
TENSORS = [
    (0, 0, (0, 2, 3)), (0, 1, (1,)), (0, 2, (0, 5)), (1, 0, (3, BIG)), (1, 1, (BIG - 1,)), (1, 2, (0, 3, BIG)),
    (1, 4, (0, 4, BIG)), (1, 5, (1, 32, -64, 2**20)), (5, 1, (1,)), (6, 1, (-1,)), (2, 5, (0,)),
]  # fmt: skip
#: Word of the rescale behind the first convolution and wrong values for it.
RESCALE_WORDS = [
    (0, (0, 2, 9, BIG)), (1, (3, -1)), (2, (256,)), (3, (-1,)), (4, (2, -1)), (5, (-1,)), (6, (0, 63, -1)),
    (7, (20001, -BIG)), (8, (-20001, BIG - 1)), (9, (2**20, -1, -(2**20))), (10, (BIG - 1, -BIG)), (11, (32, -1)),
]  # fmt: skip


@pytest.fixture
def refused(harness: Path, tmp_path: Path) -> Callable[[Blob], bool]:
    """Whether the harness's arq_open refuses a blob."""

    def opens(blob: Blob) -> bool:
        blob.astype("=u4").tofile(tmp_path / "blob")
        np.zeros(0, dtype=np.int16).tofile(tmp_path / "pixels")
        command = [harness, "run", "1", tmp_path / "blob", tmp_path / "pixels", tmp_path / "logits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=QUIET)
        assert done.returncode in (0, MODEL_REFUSED), done.stderr
        return done.returncode == MODEL_REFUSED

    return opens


def changed(blob: Blob, at: int, value: int) -> Blob:
    """One word changed, with the right checksum; the word counts as wrong only if it differs."""
    altered = blob.copy()
    altered[at] = value & 0xFFFFFFFF
    assert altered[at] != blob[at], f"word {at} is {value} already"
    return A.seal(altered)


def test_wrong_fields_are_refused(refused: Callable[[Blob], bool]) -> None:
    blob, places = every_step()
    assert not refused(blob)
    assert set(places) == set(range(1, 11))
    behind = int(blob[places[A.CONV] + 20])
    wrong = [(f"header {word}", word, values) for word, values in HEADER]
    wrong += [(f"step {kind} field {field}", places[kind] + field, values) for kind, field, values in FIELDS]
    wrong += [(f"tensor {t} field {field}", int(blob[20]) + 6 * t + field, values) for t, field, values in TENSORS]
    wrong += [(f"rescale word {word}", behind + word, values) for word, values in RESCALE_WORDS]
    for what, at, values in wrong:
        for value in values:
            assert refused(changed(blob, at, value)), f"{what} = {value} is accepted"
