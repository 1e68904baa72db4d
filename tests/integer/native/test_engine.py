"""The native engine gives the integers of the interpreter and of torch, whatever the threads, pieces and processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arqsearch.certify.noise import ESTIMATE, SEARCH, SELECT, NoiseTable, noise
from arqsearch.certify.smoothing import first_argmax
from arqsearch.errors import ArqError
from arqsearch.integer import execution, native
from arqsearch.integer.backend_torch import TorchBackend
from arqsearch.integer.execution import choose_backend
from arqsearch.integer.native import engine
from arqsearch.integer.native.engine import NativeBackend, NativeNoise, native_available, native_isas
from arqsearch.integer.program import IntegerProgram
from tests.integer.interpreter import interpret
from tests.integer.random_programs import random_pixels, random_program

SEEDS = range(49, 98)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here needs the extension; only a machine without a compiler may lack it."""
    monkeypatch.delenv(execution.VARIABLE, raising=False)
    if not native_available():
        assert not any(map(shutil.which, ("cc", "gcc", "clang"))), "the extension is not built: make install"
        pytest.skip("no C compiler on this machine")


@pytest.fixture(params=native_isas() or ("portable",))
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this build and processor run."""
    return str(request.param)


@lru_cache
def noisy_program(seed: int = 0) -> IntegerProgram:
    """A random program whose input range covers the noise of σ = 1, with more than one answer among noisy images."""
    for candidate in range(1000 * seed, 1000 * (seed + 1)):
        program = random_program(candidate)
        if program.input.lo != -2335 or program.num_classes < 2:
            continue
        pixels = torch.randint(-200, 456, (64, *program.input.shape), generator=torch.Generator().manual_seed(0))
        if len(first_argmax(TorchBackend(program).run(pixels)).unique()) > 1:
            return program
    raise AssertionError("no such program among a thousand")


@pytest.mark.parametrize("seed", SEEDS)
def test_native_equals_the_interpreter(isa: str, seed: int) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    backend = NativeBackend(program, isa=isa)
    got = backend.run(pixels)
    assert backend.isa == isa
    assert got.dtype == torch.int32
    assert got.tolist() == interpret(program, pixels)


def test_auto_takes_the_last_of_the_instruction_sets() -> None:
    assert native_isas()[0] == "portable"
    assert NativeBackend(random_program(0)).isa == native_isas()[-1]


@pytest.mark.parametrize("seed", [3, 11, 29])
def test_logits_do_not_depend_on_batch_threads_or_layout(isa: str, seed: int) -> None:
    program = random_program(seed)
    pixels = random_pixels(program, seed, random_images=200)
    together = NativeBackend(program, isa=isa, threads=1).run(pixels)
    assert torch.equal(together, TorchBackend(program).run(pixels))
    for threads in (2, 3, 16, None):
        assert torch.equal(together, NativeBackend(program, isa=isa, threads=threads).run(pixels))
    backend = NativeBackend(program, isa=isa)
    assert torch.equal(together[:7], torch.cat([backend.run(image[None]) for image in pixels[:7]]))
    assert torch.equal(together.flip(0), backend.run(pixels[::-1]))
    wide = torch.from_numpy(np.repeat(pixels, 2, axis=3))[..., ::2]
    assert torch.equal(together, backend.run(wide))
    shifted = np.frombuffer(bytearray(b"\0" + pixels.tobytes()), dtype=np.int16, offset=1, count=pixels.size)
    assert torch.equal(together, backend.run(shifted.reshape(pixels.shape)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_every_integer_type_is_taken(isa: str, dtype: Any) -> None:
    program = noisy_program()
    pixels = np.random.default_rng(0).integers(0, 256, (70, *program.input.shape)).astype(dtype)
    expected = TorchBackend(program).run(pixels)
    assert torch.equal(NativeBackend(program, isa=isa).run(pixels), expected)
    assert torch.equal(NativeBackend(program, isa=isa).run(torch.from_numpy(pixels)), expected)


def test_no_image_gives_no_logits() -> None:
    program = random_program(0)
    empty = np.zeros((0, *program.input.shape), np.int16)
    for backend in (NativeBackend(program), TorchBackend(program)):
        got = backend.run(empty)
        assert got.shape == (0, program.num_classes) and got.dtype == torch.int32


def test_both_backends_refuse_the_same_pixels_in_the_same_words() -> None:
    program = random_program(0)
    shape, (lo, hi) = program.input.shape, (program.input.lo, program.input.hi)
    wrong = {
        "shape": np.zeros((1, 2, 2, 7), dtype=np.int16),
        "integer pixels": np.zeros((1, *shape), dtype=np.float32),
        f"{hi + 1}, the proofs cover": np.full((1, *shape), hi + 1, dtype=np.int32),
        f"{lo - 1}..": np.full((1, *shape), lo - 1, dtype=np.int32),
    }
    for words, pixels in wrong.items():
        said = []
        for backend in (NativeBackend(program), TorchBackend(program)):
            with pytest.raises(ArqError, match=words) as caught:
                backend.run(pixels)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ArqError, match="portable"):
        NativeBackend(random_program(0), isa="portabel")
    with pytest.raises(ArqError, match="threads = 0"):
        NativeBackend(random_program(0), threads=0)


def test_the_engine_checks_sizes_and_types_itself() -> None:
    """What `NativeBackend` never passes must not reach memory either."""
    extension = engine._native
    program = random_program(0)
    handle = NativeBackend(program)._handle
    pixels = np.zeros((2, *program.input.shape), np.int16)
    logits = np.zeros((2, program.num_classes), np.int32)
    extension.run(handle, pixels, logits)
    for wrong in ((pixels[:1], logits), (pixels, logits[:1]), (pixels, logits.ravel()[:-1])):
        with pytest.raises(ValueError, match="does not fit"):
            extension.run(handle, *wrong)
    for wrong in ((pixels.astype(np.int32), logits), (pixels, logits.astype(np.int64))):
        with pytest.raises(TypeError, match="format"):
            extension.run(handle, *wrong)
    readonly = logits.copy()
    readonly.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        extension.run(handle, pixels, readonly)
    for unsuited in (object(), None, NativeNoise([1 << 63, 1 << 64], 0).handle):
        with pytest.raises(ValueError, match="PyCapsule"):
            extension.run(unsuited, pixels, logits)
    with pytest.raises(ValueError, match="blob"):
        extension.open(np.zeros(40, np.uint32), "auto")
    with pytest.raises(ValueError, match="argument"):
        extension.open(np.zeros(40, np.uint32), "sse9")


@pytest.mark.parametrize("guided", [True, False])
def test_noise_equals_torch(guided: bool) -> None:
    for case in json.loads((ROOT / "tests" / "certify" / "noise_vectors.json").read_text()):
        table = NoiseTable.for_sigma(float(case["sigma"]))
        drawn = NativeNoise(table.thresholds, table.lo, guided=guided).draw(
            seed=case["seed"], stage=case["stage"], image_id=case["image"], sample_start=case["sample"],
            sample_count=1, coordinates=len(case["values"]),
        )  # fmt: skip
        assert drawn.tolist() == [case["values"]]
    table = NoiseTable.for_sigma(0.5)
    mine = NativeNoise(table.thresholds, table.lo, guided=guided)
    assert (mine.lo, mine.hi) == (table.lo, table.hi)
    fields = {"seed": 2**63 + 1, "stage": ESTIMATE, "sample_start": 17, "sample_count": 40, "coordinates": 3071}
    expected = noise(table, image_ids=[2**31], **fields)[0].numpy()
    assert np.array_equal(mine.draw(image_id=2**31, **fields), expected)


def test_noise_that_leaves_16_bits_is_refused() -> None:
    with pytest.raises(ArqError, match="16 bits"):
        NativeNoise([*range(1, 70_000), 1 << 64], -35_000)


def expected_votes(
    program: IntegerProgram, images: np.ndarray, ids: list[int], seed: int, stage: int, first: int, samples: int
) -> np.ndarray:
    """Votes by torch: its noise, its backend."""
    drawn = noise(
        NoiseTable.for_sigma(1.0), seed=seed, stage=stage, image_ids=ids, sample_start=first, sample_count=samples,
        coordinates=images[0].size,
    )  # fmt: skip
    rows = []
    for image, own in zip(images, drawn, strict=True):
        noisy = torch.from_numpy(image.astype(np.int16)) + own.view(samples, *image.shape)
        classes = first_argmax(TorchBackend(program).run(noisy))
        rows.append(torch.bincount(classes, minlength=program.num_classes).tolist())
    return np.array(rows)


@pytest.mark.parametrize(("count", "samples"), [(1, 300), (9, 33), (70, 3), (3, 64)])
def test_votes_equal_torch_for_any_number_of_threads(isa: str, count: int, samples: int) -> None:
    program, table = noisy_program(1), NoiseTable.for_sigma(1.0)
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, *program.input.shape), dtype=np.uint8)
    ids = [int(value) for value in generator.integers(2**32, size=count)]
    expected = expected_votes(program, images, ids, 5, SELECT, 11, samples)
    assert len(expected.sum(0).nonzero()[0]) > 1
    for threads in (1, 2, 5):
        backend = NativeBackend(program, isa=isa, threads=threads)
        got = backend.count_votes(
            NativeNoise(table.thresholds, table.lo), images, ids, seed=5, stage=SELECT, samples=samples, sample_start=11
        )
        assert got.dtype == np.int64 and np.array_equal(got, expected)


def test_votes_refuse_what_does_not_fit() -> None:
    program, table = noisy_program(1), NoiseTable.for_sigma(1.0)
    backend, drawn = NativeBackend(program), NativeNoise(table.thresholds, table.lo)
    image = np.zeros((1, *program.input.shape), np.uint8)
    with pytest.raises(ArqError, match="uint8"):
        backend.count_votes(drawn, image.astype(np.int16), [0], seed=0, stage=SEARCH, samples=1)  # type: ignore[arg-type]
    with pytest.raises(ArqError, match="2 ids"):
        backend.count_votes(drawn, image, [0, 1], seed=0, stage=SEARCH, samples=1)
    louder = NoiseTable.for_sigma(2.0)
    with pytest.raises(ArqError, match="the proofs cover"):
        backend.count_votes(NativeNoise(louder.thresholds, louder.lo), image, [0], seed=0, stage=SEARCH, samples=1)


@pytest.mark.parametrize(("total", "size"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 64)])
def test_pieces_cover_everything_once(total: int, size: int) -> None:
    pieces = engine._pieces(total, size)
    assert sum(piece.stop - piece.start for piece in pieces) == total
    assert all(a.stop == b.start for a, b in pairwise(pieces)) and all(p.stop - p.start <= size for p in pieces)


def test_an_error_in_a_thread_arrives() -> None:
    def work(number: int) -> int:
        if number == 5:
            raise RuntimeError("five")
        return number

    with pytest.raises(RuntimeError, match="five"):
        list(engine._each(work, range(50), 4))


def test_which_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cpu", "auto") == ("native", False) and choose_backend("cuda:0", "auto") == ("torch", False)
    assert choose_backend("cpu", "torch") == ("torch", True) and choose_backend("cpu", "native") == ("native", True)
    with pytest.raises(ArqError, match="not on 'cuda'"):
        choose_backend("cuda", "native")
    with pytest.raises(ArqError, match=r"backend = 'nativ'.*'native'"):
        choose_backend("cpu", "nativ")
    monkeypatch.setenv(execution.VARIABLE, "torch")
    assert choose_backend("cpu", "auto") == ("torch", True) and choose_backend("cpu", "native") == ("native", True)
    monkeypatch.setenv(execution.VARIABLE, "native")
    assert choose_backend("cpu", "auto") == ("native", True) and choose_backend("cuda", "auto") == ("torch", False)
    monkeypatch.setenv(execution.VARIABLE, "tourch")
    with pytest.raises(ArqError, match=r"ARQSEARCH_BACKEND = 'tourch'.*'torch'"):
        choose_backend("cpu", "auto")


def test_programs_run_on_the_chosen_backend_and_keep_it() -> None:
    program = random_program(4)
    assert isinstance(program.backend(), NativeBackend) and program.backend() is program.backend(backend="native")
    on_torch = program.backend(backend="torch")
    assert isinstance(on_torch, TorchBackend) and on_torch is program.backend(backend="torch")
    pixels = random_pixels(program, 4)
    assert torch.equal(program.run(pixels, backend="torch"), program.run(pixels, backend="native"))


def test_a_program_beyond_a_limit_of_the_engine_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: IntegerProgram) -> None:
        raise ArqError("Too large for C.")

    monkeypatch.setattr(native, "compile_program", refuse)
    program = random_program(4)
    pixels = random_pixels(program, 4)
    with pytest.warns(RuntimeWarning, match=r"refuses this program \(Too large for C\.\)") as caught:
        assert program.run(pixels).tolist() == interpret(program, pixels)
        assert isinstance(program.backend(), TorchBackend)
    assert len(caught) == 1 and caught[0].filename == __file__
    for _ in range(2):
        with pytest.raises(ArqError, match="Too large for C"):
            program.run(pixels, backend="native")


FALLBACK = """
import sys, warnings
sys.modules["arqsearch.integer.native._native"] = None
import numpy as np
from arqsearch.errors import ArqError
from arqsearch.integer.native.engine import native_available, native_isas
from tests.integer.random_programs import random_pixels, random_program
assert not native_available() and native_isas() == ()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for seed in (1, 2):
        for _ in range(2):
            random_program(seed).run(random_pixels(random_program(seed), seed))
for entry in caught:
    print(entry.category.__name__, entry.filename, entry.message, sep="|")
try:
    random_program(1).run(random_pixels(random_program(1), 1), backend="native")
except ArqError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("variable", [None, "torch"])
def test_without_the_extension_torch_runs_with_one_warning(variable: str | None) -> None:
    environment = dict(os.environ) | ({execution.VARIABLE: variable} if variable else {})
    command = [sys.executable, "-c", FALLBACK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    *warned, refused = done.stdout.splitlines()
    if variable is None:
        (line,) = warned
        category, filename, message = line.split("|")
        assert (category, filename) == ("RuntimeWarning", "<string>"), "the warning points at the caller"
        assert "C compiler" in message and "ARQSEARCH_BACKEND=torch" in message
    else:
        assert warned == []
    assert refused.startswith("refused backend = 'native', but the native engine was not built")
