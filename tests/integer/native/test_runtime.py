"""The C99 runtime gives the integers of the independent interpreter, on every instruction set of this processor."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arqsearch.integer import ops as O
from arqsearch.integer.lowering import lower
from arqsearch.integer.native import compile_program
from arqsearch.integer.program import IntegerProgram
from tests.integer.interpreter import RULES, interpret, leaves
from tests.integer.native import assembler as A
from tests.integer.native import build
from tests.integer.native.fused_convolutions import FusedConvolution, Image
from tests.integer.random_programs import random_pixels, random_program
from tests.quantize.nets import NETS
from tests.quantize.test_lowering import MODES, quantized

OK, NULL, SIZE, ALIGNMENT, MODEL, RANGE, UNSUPPORTED, ARGUMENT = range(8)
AUTO, PORTABLE, AVX2, AVX512, NEON = range(5)
SEEDS = range(80)

#: Compiler and flags; the slow ones add nothing but another pair of eyes.
BUILDS = {
    "gcc": ("gcc", ("-O3",)),
    "gcc sanitized": ("gcc", build.SANITIZE),
    "clang portable sanitized": ("clang", (build.PORTABLE, *build.SANITIZE)),
}
SLOW_BUILDS = {
    "clang": ("clang", ("-O3",)),
    "clang portable": ("clang", ("-O3", build.PORTABLE)),
    "clang sanitized": ("clang", build.SANITIZE),
    "gcc portable, unsigned char": ("gcc", ("-O3", build.PORTABLE, "-fno-tree-vectorize", "-funsigned-char")),
}

#: Label, blob, images and the logits of each.
Case = tuple[str, np.ndarray[Any, Any], Image, list[list[int]]]
Check = Callable[[Iterable[Case]], None]


@pytest.fixture(
    scope="session", params=[*BUILDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_BUILDS)]
)
def harness(request: pytest.FixtureRequest) -> Path:
    """The harness, built in one of the ways above."""
    compiler, flags = (BUILDS | SLOW_BUILDS)[request.param]
    return build.harness(request.config, build.compiler(compiler), flags)


@pytest.fixture
def check(harness: Path, tmp_path: Path) -> Check:
    """Run images through blobs on every instruction set and compare the logits."""

    def run(cases: Iterable[Case]) -> None:
        expected, lines = {}, []
        for label, blob, images, logits in cases:
            name = label.replace(" ", "_")
            blob.astype("=u4").tofile(tmp_path / f"{name}.blob")
            images.astype("=i2").tofile(tmp_path / f"{name}.pixels")
            for isa in instruction_sets(harness):
                found = tmp_path / f"{name}.{isa}"
                expected[found] = logits
                lines.append(f"{isa} {tmp_path / name}.blob {tmp_path / name}.pixels {found}")
        (tmp_path / "list").write_text("\n".join(lines))
        done = subprocess.run([harness, "batch", tmp_path / "list"], capture_output=True, text=True, check=False)
        # What was written before a failure is compared all the same: wrong logits say more than a crash.
        for found, logits in expected.items():
            if found.exists() or done.returncode == 0:
                got = np.fromfile(found, dtype="=i4").reshape(len(logits), -1).tolist()
                assert got == logits, f"{found.name} (the number is the instruction set)"
        assert done.returncode == 0, done.stderr
        assert expected

    return run


@lru_cache
def instruction_sets(harness: Path) -> tuple[int, ...]:
    """Numbers of what the harness and this processor run."""
    listed = subprocess.run([harness, "isas"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, listed.split()))


@lru_cache
def example(seed: int) -> tuple[IntegerProgram, Image, list[list[int]]]:
    """A random program, images and the interpreter's logits."""
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    return program, pixels, interpret(program, pixels)


def test_programs_translated_op_by_op(check: Check) -> None:
    programs = ((seed, *example(seed)) for seed in SEEDS)
    check((f"program {seed}", A.plain_blob(program), images, logits) for seed, program, images, logits in programs)


def test_compiled_programs(check: Check) -> None:
    programs = ((seed, *example(seed)) for seed in SEEDS)
    check((f"program {seed}", compile_program(program).words, *rest) for seed, program, *rest in programs)


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_lowered_networks(mode: int, check: Check) -> None:
    check(lowered(kind, mode, bits) for kind in range(len(NETS)) for bits in ((8, 8), (4, 4), (2, 3)))


@lru_cache
def lowered(kind: int, mode: int, bits: tuple[int, int]) -> Case:
    """A small network of the converter, with noisy images."""
    net, _ = quantized(NETS[kind], MODES[mode], bits)
    program = lower(net, noise_limit=300)
    images = random_pixels(program, mode, 1)
    label = f"{NETS[kind].__name__} {bits[0]} {bits[1]}"
    return label, compile_program(program).words, images, interpret(program, images)


@pytest.mark.parametrize("part", range(4))
def test_fused_convolutions(part: int, check: Check) -> None:
    check((f"seed {seed}", *fused_example(seed)) for seed in range(100 * part, 100 * part + 100))


@lru_cache
def fused_example(seed: int) -> tuple[np.ndarray[Any, Any], Image, list[list[int]]]:
    return FusedConvolution(seed).build()


@pytest.mark.parametrize("rounding", A.ROUNDINGS)
@pytest.mark.parametrize("shift", [0, 1, 30, 62])
def test_the_input_step_at_the_ends_of_64_bits(rounding: str, shift: int, check: Check) -> None:
    """Multipliers and offsets of 64 bits, whole and per channel, into every storage."""
    largest = (2**62 - 1) // 2**15
    multiplier = np.array([largest, -largest, min(2**shift, largest), min(3 * 2**shift // 2, largest - 1)])
    offset = np.array([-(2**61), 2**61 - 1, 2**shift // 2, 0])
    images = np.random.default_rng(shift).integers(-(2**15), 2**15, size=(3, 2, 3, 4)).astype(np.int16)
    cases = []
    for storage, lo, hi in ((A.U8, -7, 200), (A.I16, -(2**15), 2**15 - 1), (A.I32, -(2**31), 2**31 - 1)):
        for n in (1, 4):
            blob = A.Assembler(images.shape[1:], (-(2**15), 2**15 - 1))
            target = blob.tensor(storage, lo if storage == A.U8 else 0, *images.shape[1:])
            constants = blob.constant64([*multiplier[:n].tolist(), *offset[:n].tolist()])
            blob.step(A.INPUT, 0, target, n, shift, A.ROUNDINGS[rounding], -30000, 30000, lo, hi, constants)
            op = O.InputQuantize((0,), 1, multiplier[:n], offset[:n], shift, rounding, -30000, 30000, lo, hi)  # type: ignore[arg-type]
            expected = [leaves(RULES[O.InputQuantize](op, image.tolist())) for image in images]
            cases.append((f"storage {storage} channels {n}", blob.words(target), images, expected))
    check(cases)


@pytest.mark.parametrize("rounding", A.ROUNDINGS)
def test_rescale_steps_between_storages(rounding: str, check: Check) -> None:
    """Exact, 32-bit and through tables; more channels than are handled at once; also in place."""
    rng = np.random.default_rng(3)
    images = rng.integers(-128, 128, size=(2, 3, 1, 131)).astype(np.int16)
    shape = images.shape[1:]
    cases = []
    for n in (1, 131):
        multiplier, shift = rng.integers(0, 2**15, size=n), rng.integers(1, 16, size=n)
        half = np.where(rounding == "floor", 0, 1 << (shift - 1))
        fast = [[-128], [127], multiplier.tolist(), half.tolist(), shift.tolist()]
        op = O.Requantize((0,), 1, multiplier, shift, rounding, -100, 120)  # type: ignore[arg-type]
        expected = [leaves(RULES[O.Requantize](op, image.tolist())) for image in images]
        for source_type, target_type in ((A.U8, A.U8), (A.U8, A.I32), (A.I16, A.U8), (A.I32, A.I16)):
            for lists in (None, fast) if rounding != "half_even" else (None,):
                blob = A.Assembler(shape, (-128, 127))
                source = blob.tensor(source_type, -128 if source_type == A.U8 else 0, *shape)
                place = blob.tensors[source][5] if source_type == target_type else None
                target = blob.tensor(target_type, -100 if target_type == A.U8 else 0, *shape, place)
                blob.step(A.COPY, 0, source)
                at = blob.rescale(multiplier.tolist(), shift.tolist(), rounding, -100, 120, lists)
                blob.step(A.RESCALE, source, target, at)
                label = f"{source_type} to {target_type} channels {n} fast {lists is not None}"
                cases.append((label, blob.words(target), images, expected))
    check(cases)


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The runtime for calls from Python."""
    loaded = ctypes.CDLL(str(build.shared_library(pytestconfig, build.compiler("gcc"))))
    loaded.arq_status_text.restype = loaded.arq_isa_name.restype = ctypes.c_char_p
    loaded.arq_prepared_bytes.restype = ctypes.c_size_t
    return loaded


class Model(ctypes.Structure):
    """arq_model."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("word_count", "height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("pixel_lo", "pixel_hi")),
        *((name, ctypes.c_uint32) for name in ("classes", "arena_bytes")),
        ("prepared", ctypes.c_void_p),
        ("isa", ctypes.c_int),
    )


class Opened:
    """An opened blob with buffers that fit it."""

    def __init__(self, library: ctypes.CDLL, blob: np.ndarray[Any, Any]) -> None:
        self.library, self.blob, self.model = library, blob, Model()
        assert library.arq_open(ctypes.byref(self.model), pointer(blob), ctypes.c_size_t(len(blob))) == OK
        model = self.model
        self.pixels = np.full(model.height * model.width * model.channels, model.pixel_lo, dtype=np.int16)
        self.logits = np.zeros(model.classes, dtype=np.int32)
        self.arena = np.zeros(model.arena_bytes // 8 + 1, dtype=np.uint64)

    def run(self, **changed: Any) -> int:
        """Status of arq_run with some arguments replaced."""
        values: dict[str, Any] = {
            "model": ctypes.byref(self.model), "pixels": pointer(self.pixels), "pixel_count": self.pixels.size,
            "logits": pointer(self.logits), "logit_count": self.logits.size, "arena": pointer(self.arena),
            "arena_bytes": self.model.arena_bytes,
        }  # fmt: skip
        values |= changed
        for count in ("pixel_count", "logit_count", "arena_bytes"):
            values[count] = ctypes.c_size_t(values[count])
        return int(self.library.arq_run(*values.values()))


def pointer(array: np.ndarray[Any, Any], offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


@pytest.fixture
def opened(library: ctypes.CDLL) -> Opened:
    return Opened(library, A.plain_blob(example(1)[0]))


def test_the_model_describes_its_blob(library: ctypes.CDLL, opened: Opened) -> None:
    program = example(1)[0]
    model = opened.model
    assert (model.height, model.width, model.channels) == program.input.shape
    assert (model.pixel_lo, model.pixel_hi) == (program.input.lo, program.input.hi)
    assert (model.classes, model.isa, model.prepared) == (program.num_classes, PORTABLE, None)
    hashed = (ctypes.c_ubyte * 32)()
    assert library.arq_program_hash(ctypes.byref(model), hashed) == OK
    assert bytes(hashed).hex() == "".join(f"{0x01020304 + word:08x}" for word in range(8))


def test_null_pointers(library: ctypes.CDLL, opened: Opened) -> None:
    assert library.arq_open(None, pointer(opened.blob), ctypes.c_size_t(len(opened.blob))) == NULL
    closed = Model()
    assert library.arq_open(ctypes.byref(closed), None, ctypes.c_size_t(100)) == NULL
    for name in ("model", "pixels", "logits", "arena"):
        assert opened.run(**{name: None}) == NULL
    assert opened.run(model=ctypes.byref(closed)) == NULL
    assert library.arq_program_hash(ctypes.byref(opened.model), None) == NULL
    assert library.arq_program_hash(ctypes.byref(closed), (ctypes.c_ubyte * 32)()) == NULL
    assert library.arq_prepare(None, AUTO, None, ctypes.c_size_t(0)) == NULL
    assert library.arq_prepared_bytes(None, AUTO) == library.arq_prepared_bytes(ctypes.byref(closed), AUTO) == 0


def test_sizes_and_alignment(library: ctypes.CDLL, opened: Opened) -> None:
    assert opened.run() == OK
    for name in ("pixel_count", "logit_count"):
        right = getattr(opened, {"pixel_count": "pixels", "logit_count": "logits"}[name]).size
        for wrong in (0, right - 1, right + 1):
            assert opened.run(**{name: wrong}) == SIZE
    assert opened.run(arena_bytes=opened.model.arena_bytes - 1) == SIZE
    assert opened.run(arena_bytes=opened.model.arena_bytes + 8) == OK
    assert opened.run(arena=pointer(opened.arena, 4)) == ALIGNMENT
    assert opened.run(pixels=pointer(opened.pixels, 1)) == ALIGNMENT
    assert opened.run(logits=pointer(opened.logits, 2)) == ALIGNMENT
    model = Model()
    shifted = ctypes.c_size_t(len(opened.blob) - 1)
    assert library.arq_open(ctypes.byref(model), pointer(opened.blob, 2), shifted) == ALIGNMENT


def test_pixels_outside_the_proven_range(library: ctypes.CDLL) -> None:
    opened = next(
        Opened(library, A.plain_blob(program)) for program, _, _ in map(example, SEEDS) if program.input.hi < 2**15 - 1
    )
    for place in (0, opened.pixels.size // 2, opened.pixels.size - 1):
        for value, status in (
            (opened.model.pixel_lo - 1, RANGE), (opened.model.pixel_hi + 1, RANGE), (opened.model.pixel_hi, OK)
        ):  # fmt: skip
            opened.pixels[:] = opened.model.pixel_lo
            opened.pixels[place] = value
            assert opened.run() == status


def test_prepare(library: ctypes.CDLL, opened: Opened) -> None:
    model = ctypes.byref(opened.model)
    supported = [isa for isa in range(5) if library.arq_isa_supported(isa)]
    assert {AUTO, PORTABLE} <= set(supported)
    assert not library.arq_isa_supported(99)
    assert library.arq_prepare(model, PORTABLE, None, ctypes.c_size_t(0)) == OK
    assert library.arq_prepared_bytes(model, PORTABLE) == 0
    for isa in {AVX2, AVX512, NEON} - set(supported):
        assert library.arq_prepared_bytes(model, isa) == 0
        assert library.arq_prepare(model, isa, None, ctypes.c_size_t(0)) == UNSUPPORTED
    assert library.arq_prepare(model, 99, None, ctypes.c_size_t(0)) == ARGUMENT
    logits = []
    for isa in supported:
        size = library.arq_prepared_bytes(model, isa)
        memory = np.zeros(size // 8 + 8, dtype=np.uint64)
        if size:
            assert library.arq_prepare(model, isa, None, ctypes.c_size_t(size)) == NULL
            assert library.arq_prepare(model, isa, pointer(memory, 4), ctypes.c_size_t(size)) == ALIGNMENT
            assert library.arq_prepare(model, isa, pointer(memory), ctypes.c_size_t(size - 1)) == SIZE
            assert opened.model.isa != isa or isa == AUTO
        assert library.arq_prepare(model, isa, pointer(memory, 8), ctypes.c_size_t(size)) == OK
        assert opened.model.isa == isa or isa == AUTO
        assert opened.run() == OK
        logits.append(opened.logits.tolist())
    assert all(found == logits[0] for found in logits)


def test_names_and_messages(library: ctypes.CDLL) -> None:
    names = [library.arq_isa_name(isa).decode() for isa in range(5)]
    assert names == ["auto", "portable", "avx2", "avx512", "neon"]
    assert library.arq_isa_name(99) == b"unknown"
    messages = [library.arq_status_text(status).decode() for status in range(9)]
    assert len(set(messages)) == 9
    assert messages[8] == "unknown status"


def test_the_first_maximum_wins(library: ctypes.CDLL) -> None:
    for logits, expected in (([5], 0), ([1, 3, 3], 1), ([-(2**31), 2**31 - 1, 0], 1), ([-4, -4], 0)):
        array = np.array(logits, dtype=np.int32)
        assert library.arq_first_maximum(pointer(array), ctypes.c_size_t(len(array))) == expected
