"""Noise, votes, prediction and certificate in C against the definition in Python; the network is a stand-in."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from arqsearch.certify.binomial import minimal_count
from arqsearch.certify.noise import SEARCH, SELECT, NoiseTable, noise
from arqsearch.certify.rules import certify_image
from arqsearch.certify.smoothing import SmoothingSettings
from tests.certify.noise_reference import philox_words, uniform
from tests.integer.native.build import SOURCES, compile_c, compiler

SMOOTHING = (SOURCES / "arq_smoothing.c", SOURCES / "arq_noise_x86.c")
OK, NULL, SIZE, RANGE, ARGUMENT = 0, 1, 2, 5, 7
ABSTAIN = 0xFFFFFFFF
GUIDE = 65536

# Instead of a network: class 1 where the first pixel is at least `word_count`, else class 2; class 0 never wins.
STAND_IN = """
#include "arq.h"

static int best = ARQ_ISA_PORTABLE;
void choose_isa(int isa);
void choose_isa(int isa) { best = isa; }
int arq_isa_supported(arq_isa isa)
{
#if defined(__x86_64__)
    if (isa == ARQ_ISA_AVX2) return best >= ARQ_ISA_AVX2 && __builtin_cpu_supports("avx2");
    if (isa == ARQ_ISA_AVX512) return best >= ARQ_ISA_AVX512 && __builtin_cpu_supports("avx512f");
#endif
    return isa == ARQ_ISA_PORTABLE;
}

arq_status arq_run(const arq_model *model, const int16_t *pixels, size_t pixel_count, int32_t *logits,
                   size_t logit_count, void *arena, size_t arena_bytes)
{
    if (pixel_count == 0 || logit_count != 3 || arena_bytes < model->arena_bytes || !arena) return ARQ_ERROR_SIZE;
    const int bright = pixels[0] >= (int32_t)model->word_count;
    logits[0] = 0;
    logits[1] = bright;
    logits[2] = 1;
    return ARQ_OK;
}

uint32_t arq_first_maximum(const int32_t *logits, size_t count)
{
    uint32_t best_class = 0;
    for (size_t i = 1; i < count; i++)
        if (logits[i] > logits[best_class]) best_class = (uint32_t)i;
    return best_class;
}
"""


class Noise(ctypes.Structure):
    _fields_ = (
        ("high", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
        ("lo", ctypes.c_int32),
        ("guide", ctypes.c_void_p),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        ("word_count", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("channels", ctypes.c_uint32),
        ("pixel_lo", ctypes.c_int32),
        ("pixel_hi", ctypes.c_int32),
        ("classes", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint32),
        ("prepared", ctypes.c_void_p),
        ("isa", ctypes.c_int),
    )


class Workspace(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("pixel_count", ctypes.c_size_t),
        ("logits", ctypes.c_void_p),
        ("logit_count", ctypes.c_size_t),
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_size_t),
    )


class Predictor(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint64), ("n", ctypes.c_uint32), ("minimum", ctypes.c_void_p))


class Certifier(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("n0", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("radii", ctypes.c_uint32),
        ("counts", ctypes.c_void_p),
        ("radius_micro", ctypes.c_void_p),
    )


class Certificate(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("predicted", "selected", "votes", "radius_micro"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The smoothing sources and the stand-in, as a shared library that traps on undefined behaviour."""
    folder = tmp_path_factory.mktemp("smoothing")
    (folder / "stand_in.c").write_text(STAND_IN)
    flags = ("-O2", "-fPIC", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    sources = [folder / "stand_in.c", *SMOOTHING]
    return ctypes.CDLL(str(compile_c(pytestconfig, compiler("gcc"), "smoothing.so", sources, flags, ["-shared"])))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def c(request: pytest.FixtureRequest, library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, restricted to an instruction set."""
    isa = {"portable": 1, "avx2": 2, "avx512": 3}[request.param]
    library.choose_isa(isa)
    if not library.arq_isa_supported(isa):
        pytest.skip(f"this processor does not run {request.param}")
    return library


def address(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


class Table:
    """A noise table in C; keeps its arrays alive."""

    def __init__(self, c: ctypes.CDLL, thresholds: Any, lo: int, guided: bool) -> None:
        inner = list(thresholds)[:-1]
        self.high = np.array([t >> 32 for t in inner], np.uint32)
        self.low = np.array([t & 0xFFFFFFFF for t in inner], np.uint32)
        self.guide = np.zeros(GUIDE, np.int16)
        self.c = Noise(self.high.ctypes.data, self.low.ctypes.data, len(inner), lo, None)
        if guided:
            assert c.arq_noise_guide(ctypes.byref(self.c), address(self.guide), ctypes.c_size_t(GUIDE)) == OK

    @classmethod
    def of(cls, c: ctypes.CDLL, sigma: float, guided: bool = True) -> Table:
        table = NoiseTable.for_sigma(sigma)
        return cls(c, table.thresholds, table.lo, guided)


def draw(
    c: ctypes.CDLL, table: Table, seed: int, stage: int, image_id: int, sample: int, count: int,
    image: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    out = np.full(count + 8, 12345, np.int16)
    fields = (ctypes.c_uint64(seed), stage, ctypes.c_uint32(image_id), ctypes.c_uint32(sample))
    status = c.arq_noisy(ctypes.byref(table.c), *fields, address(image), address(out), ctypes.c_size_t(count))
    assert status == OK
    assert (out[count:] == 12345).all(), "nothing is written behind the last coordinate"
    return out[:count]


def test_philox_equals_plain_integers(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    words = np.zeros(4, np.uint32)
    for _ in range(200):
        counter, key = generator.integers(2**32, size=4, dtype=np.uint32), int(generator.integers(2**64, dtype="u8"))
        library.arq_philox(address(counter), ctypes.c_uint64(key), address(words))
        expected = philox_words(tuple(counter.tolist()), (key & 0xFFFFFFFF, key >> 32))
        assert tuple(words.tolist()) == expected


@pytest.mark.parametrize("guided", [False, True])
def test_committed_vectors(c: ctypes.CDLL, guided: bool) -> None:
    vectors = json.loads((Path(__file__).parents[2] / "certify" / "noise_vectors.json").read_text())
    assert len(vectors) >= 7
    for case in vectors:
        table = Table.of(c, float(case["sigma"]), guided)
        fields = (case["seed"], case["stage"], case["image"], case["sample"])
        assert draw(c, table, *fields, len(case["values"])).tolist() == case["values"]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sigma", [0.002, 0.12, 0.25, 0.5, 1.0, 13.0])
def test_noise_equals_torch(c: ctypes.CDLL, sigma: float, guided: bool) -> None:
    generator = np.random.default_rng(int(sigma * 1000))
    table, reference = Table.of(c, sigma, guided), NoiseTable.for_sigma(sigma)
    for count in (1, 3, 4, 6, 63, 64, 65, 127, 1027, 3072, 12289):
        seed, stage = int(generator.integers(2**64, dtype=np.uint64)), int(generator.integers(3))
        image_id, sample = (int(value) for value in generator.integers(2**32, size=2))
        image = generator.integers(0, 256, count, dtype=np.uint8)
        expected = noise(
            reference, seed=seed, stage=stage, image_ids=[image_id], sample_start=sample, sample_count=1,
            coordinates=count,
        ).numpy().ravel()  # fmt: skip
        assert np.array_equal(draw(c, table, seed, stage, image_id, sample, count), expected)
        assert np.array_equal(draw(c, table, seed, stage, image_id, sample, count, image), expected + image)


def test_guide_is_that_of_torch(library: ctypes.CDLL) -> None:
    for sigma in (0.002, 0.25, 1.0):
        guide = NoiseTable.for_sigma(sigma).lookup(torch.device("cpu"))[0].numpy()
        assert np.array_equal(Table.of(library, sigma).guide, guide)


@pytest.mark.parametrize("guided", [False, True])
def test_ties_are_decided_by_the_low_half(c: ctypes.CDLL, guided: bool) -> None:
    """Thresholds at, next to, and 2^32 around the drawn words; some high halves hold several thresholds."""
    seed, stage, image_id, sample, count = 77, SELECT, 5, 9, 200
    drawn = [uniform(seed, stage, image_id, sample, coordinate) for coordinate in range(count)]
    thresholds = set()
    for position, word in enumerate(drawn[: count // 2]):
        around = {
            0: (word,),
            1: (word + 1,),
            2: (word, word + 1),
            3: (word - 1, word, word + 2),
            4: (word | 0xFFFFFFFF,),
        }
        thresholds |= set(around.get(position % 6, (word + 2**32, word - 2**32)))
        thresholds |= {word >> 32 << 32} if position % 7 == 0 else set()
    inner = sorted(value for value in thresholds if 0 < value < 2**64)
    table = Table(c, [*inner, 2**64], -50, guided)
    expected = [-50 + sum(threshold <= word for threshold in inner) for word in drawn]
    ties = {value >> 32 for value in inner} & {word >> 32 for word in drawn}
    assert len(ties) > 60
    assert draw(c, table, seed, stage, image_id, sample, count).tolist() == expected


def test_wrong_noise_arguments_are_refused(library: ctypes.CDLL) -> None:
    library.choose_isa(1)
    table, out = Table.of(library, 0.25), np.zeros(8, np.int16)

    def status(noise: Any = None, stage: int = 0, target: np.ndarray | None = out) -> int:
        pointer = ctypes.byref(table.c if noise is None else noise)
        return int(
            library.arq_noisy(pointer, ctypes.c_uint64(1), stage, 0, 0, None, address(target), ctypes.c_size_t(8))
        )

    high, low, count, lo = table.c.high, table.c.low, table.c.count, table.c.lo
    assert status() == OK
    assert status(Noise(None, low, count, lo, None)) == NULL and status(Noise(high, None, count, lo, None)) == NULL
    assert status(target=None) == NULL
    assert status(Noise(high, low, 0, lo, None)) == ARGUMENT
    assert status(Noise(high, low, count, -32769, None)) == ARGUMENT
    assert status(Noise(high, low, count, 32768 - 255 - count, None)) == ARGUMENT
    assert status(Noise(high, low, count, 32767 - 255 - count, None)) == OK
    assert status(stage=3) == ARGUMENT
    for pointer, entries, expected in ((None, GUIDE, NULL), (table.guide, GUIDE - 1, SIZE), (table.guide, GUIDE, OK)):
        fresh = Noise(high, low, count, lo, None)
        assert library.arq_noise_guide(ctypes.byref(fresh), address(pointer), ctypes.c_size_t(entries)) == expected
        assert (fresh.guide is not None) == (expected == OK)


class Setup:
    """The stand-in with a workspace, its Python twin, and the noise of σ = 0.25."""

    def __init__(self, c: ctypes.CDLL, threshold: int, shape: tuple[int, int, int] = (5, 3, 2)) -> None:
        self.c, self.shape, self.threshold = c, shape, threshold
        self.reference = NoiseTable.for_sigma(0.25)
        self.table = Table.of(c, 0.25)
        size = int(np.prod(shape))
        self.pixels, self.logits = np.zeros(size, np.int16), np.zeros(3, np.int32)
        self.arena, self.votes = np.zeros(2, np.int64), np.zeros(3, np.uint32)
        self.model = Model(None, threshold, *shape, self.reference.lo, 255 + self.reference.hi, 3, 16, None, 1)
        self.work = Workspace(
            self.pixels.ctypes.data, size, self.logits.ctypes.data, 3, self.arena.ctypes.data, self.arena.nbytes
        )

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.where(pixels[:, 0, 0, 0] >= self.threshold, 1, 2)

    def call(self, function: str, *middle: Any, image: np.ndarray | None, tail: tuple[Any, ...]) -> int:
        start = (ctypes.byref(self.model), ctypes.byref(self.table.c), *middle, address(image))
        return int(getattr(self.c, function)(*start, *tail, ctypes.byref(self.work)))

    def count(self, image: np.ndarray | None, image_id: int, stage: int, first: int, samples: int) -> int:
        middle = (ctypes.c_uint64(99), stage, ctypes.c_uint32(image_id))
        tail = (ctypes.c_uint32(first), ctypes.c_uint32(samples), address(self.votes), ctypes.c_size_t(3))
        return self.call("arq_count_votes", *middle, image=image, tail=tail)


def test_votes_add_up_over_ranges_of_samples(c: ctypes.CDLL) -> None:
    setup = Setup(c, 120)
    image = np.full(setup.shape, 130, np.uint8)
    drawn = noise(
        setup.reference, seed=99, stage=SEARCH, image_ids=[2**32 - 1], sample_start=3, sample_count=500, coordinates=30
    )
    expected = torch.bincount(setup.classify(torch.from_numpy(image) + drawn.view(500, *setup.shape)), minlength=3)
    for first, samples in ((3, 1), (4, 0), (4, 99), (103, 400)):
        assert setup.count(image, 2**32 - 1, SEARCH, first, samples) == OK
    assert setup.votes.tolist() == expected.tolist()
    assert min(expected.tolist()[1:]) > 100


def test_wrong_vote_arguments_are_refused(library: ctypes.CDLL) -> None:
    library.choose_isa(1)
    image = np.zeros((5, 3, 2), np.uint8)

    def status(change: Callable[[Setup], None], first: int = 0, samples: int = 1, stage: int = 0) -> int:
        setup = Setup(library, 0)
        change(setup)
        return setup.count(image, 0, stage, first, samples)

    def set_field(name: str, field: str, value: Any) -> Callable[[Setup], None]:
        return lambda setup: setattr(getattr(setup, name), field, value)

    assert status(lambda setup: None) == OK
    assert Setup(library, 0).count(None, 0, 0, 0, 1) == NULL
    for field in ("pixels", "logits"):
        assert status(set_field("work", field, None)) == NULL
    for field in ("pixel_count", "logit_count", "arena_bytes"):
        assert status(set_field("work", field, 1)) == SIZE
    assert status(set_field("model", "pixel_lo", NoiseTable.for_sigma(0.25).lo + 1)) == RANGE
    assert status(set_field("model", "pixel_hi", NoiseTable.for_sigma(0.25).hi + 254)) == RANGE
    assert status(lambda setup: None, first=2**32 - 1, samples=1) == OK
    assert status(lambda setup: None, first=2**32 - 1, samples=2) == ARGUMENT
    assert status(lambda setup: None, stage=3) == ARGUMENT


def test_prediction_is_that_of_cohen(c: ctypes.CDLL) -> None:
    n, alpha = 60, 0.05
    minimum = np.zeros(n + 1, np.uint32)
    for both in range(n + 1):
        sure = [k for k in range((both + 1) // 2, both + 1) if both and binomtest(k, both, 0.5).pvalue <= alpha]
        minimum[both] = sure[0] if sure else both + 1
    answers = []
    for threshold in (0, 90, 115, 120, 126, 130, 133, 140, 160, 255):
        setup = Setup(c, threshold)
        image = np.full(setup.shape, 128, np.uint8)
        predicted = ctypes.c_uint32(7)
        predictor = Predictor(99, n, minimum.ctypes.data)
        tail = (address(setup.votes), ctypes.c_size_t(3), ctypes.byref(predicted))
        setup.votes[:] = 1000  # Is cleared.
        middle = (ctypes.byref(predictor), ctypes.c_uint32(12))
        assert setup.call("arq_predict_smoothed", *middle, image=image, tail=tail) == OK
        drawn = noise(
            setup.reference, seed=99, stage=SELECT, image_ids=[12], sample_start=0, sample_count=n, coordinates=30
        )
        classes = setup.classify(torch.from_numpy(image) + drawn.view(n, *setup.shape))
        votes = torch.bincount(classes, minlength=3).tolist()
        assert setup.votes.tolist() == votes
        first, second = sorted(votes, reverse=True)[:2]
        sure = binomtest(first, first + second, 0.5).pvalue <= alpha
        assert predicted.value == (votes.index(first) if sure else ABSTAIN)
        answers.append(predicted.value)
    assert {1, 2, ABSTAIN} == set(answers)


def test_certificate_is_that_of_python(c: ctypes.CDLL) -> None:
    settings = SmoothingSettings(0.25, n0=20, n=400, alpha=0.01, seed=99, skip_misclassified=False)
    micro = np.arange(0, 700_000, 50_000, dtype=np.uint32)
    counts, found = None, []
    for threshold in (0, 40, 60, 80, 100, 115, 128, 150, 200):
        setup = Setup(c, threshold)
        image = np.full(setup.shape, 128, np.uint8)
        line = certify_image(setup.classify, image, 4, None, settings, program="p", data="d")
        if counts is None:
            table = [minimal_count(400, radius / 1e6, 0.25, 0.01, line.d_tau) for radius in micro.tolist()]
            counts = np.array(table, np.uint32)
        certificate = Certificate(7, 7, 7, 7)
        certifier = Certifier(99, 20, 400, len(micro), counts.ctypes.data, micro.ctypes.data)
        tail = (address(setup.votes), ctypes.c_size_t(3), ctypes.byref(certificate))
        middle = (ctypes.byref(certifier), ctypes.c_uint32(4))
        assert setup.call("arq_certify", *middle, image=image, tail=tail) == OK
        assert certificate.selected == line.predicted and certificate.votes == line.votes
        assert {k: v for k, v in enumerate(setup.votes.tolist()) if v} == line.estimate
        assert certificate.predicted == (line.predicted if line.certified else ABSTAIN)
        reached = [int(radius) for radius in micro if line.certified and radius / 1e6 <= line.radius]
        assert certificate.radius_micro == (reached[-1] if reached else 0)
        found.append(certificate.radius_micro)
    assert len(set(found)) >= 4, "abstentions, small and large radii"


def test_wrong_tables_are_refused(library: ctypes.CDLL) -> None:
    library.choose_isa(1)
    image = np.full((5, 3, 2), 128, np.uint8)

    def certify(counts: list[int], micro: list[int], n0: int = 1, n: int = 10) -> int:
        setup, certificate = Setup(library, 0), Certificate()
        tables = np.array(counts, np.uint32), np.array(micro, np.uint32)
        certifier = Certifier(9, n0, n, len(counts), *(table.ctypes.data for table in tables))
        tail = (address(setup.votes), ctypes.c_size_t(3), ctypes.byref(certificate))
        return setup.call("arq_certify", ctypes.byref(certifier), ctypes.c_uint32(0), image=image, tail=tail)

    assert certify([6, 8, 8], [0, 10, 20]) == OK
    assert certify([6, 5], [0, 10]) == ARGUMENT, "counts fall"
    assert certify([6, 8], [0, 0]) == ARGUMENT and certify([6], [10]) == ARGUMENT, "radii ascend from 0"
    assert certify([6], [0], n0=0) == ARGUMENT and certify([6], [0], n=0) == ARGUMENT
    assert certify([], []) == ARGUMENT
    setup, predicted = Setup(library, 0), ctypes.c_uint32()
    for predictor, expected in ((Predictor(1, 0, image.ctypes.data), ARGUMENT), (Predictor(1, 5, None), NULL)):
        tail = (address(setup.votes), ctypes.c_size_t(3), ctypes.byref(predicted))
        middle = (ctypes.byref(predictor), ctypes.c_uint32(0))
        assert setup.call("arq_predict_smoothed", *middle, image=image, tail=tail) == expected


def test_sources_compile_without_floating_point_registers(tmp_path: Path) -> None:
    flags = ["-std=c99", "-O2", "-mgeneral-regs-only", f"-I{SOURCES}", "-c", "-o", str(tmp_path / "smoothing.o")]
    probe = tmp_path / "probe.c"
    probe.write_text("double half(double x);\ndouble half(double x) { return x / 2; }\n")
    if subprocess.run([compiler("gcc"), *flags, str(probe)], capture_output=True).returncode == 0:
        pytest.skip("this compiler does not refuse floating point with -mgeneral-regs-only")
    done = subprocess.run([compiler("gcc"), *flags, str(SMOOTHING[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
