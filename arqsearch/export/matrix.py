"""The bit-exactness matrix: one program, every backend and exported artefact that runs here, equal on every logit.

The reference is the torch backend of the program. Rows that cannot run say what they lack.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError
from arqsearch.export import c_matrix
from arqsearch.export.c_matrix import Toolchain, Unavailable
from arqsearch.export.c_package import MODEL_FILE, PACKAGE_DIR, PROGRAM_FILE, macs, package_defines
from arqsearch.export.onnx_fast import run_fast
from arqsearch.export.onnx_strict import run_strict
from arqsearch.export.runtime import FORM_KEYS, HASH_KEY, read_metadata
from arqsearch.integer.program import IntegerProgram

STRICT_FILE, FAST_FILE = "strict.onnx", "fast.onnx"
#: Formats whose logits are exact.
STRICT, FAST = "onnx", "onnx-fast"
NATIVE_ISAS = ("portable", "avx2", "avx512", "neon")
#: Images of a comparison, and the pixel values that they may add up to.
IMAGES, VALUES = 16, 16 * 32 * 32 * 3
#: Multiply-accumulates in the self-test beyond which an emulator would take many minutes.
EMULATED_MACS = {"qemu-aarch64": 20_000_000_000, "qemu-system-arm": 20_000_000_000}

#: Runs of the network in a self-test, about.
SELF_TEST_RUNS = 60

#: Computes the logits of the given images; may raise `Unavailable`.
Compute = Callable[[NDArray[np.int16]], NDArray[np.int32]]


@dataclass(frozen=True)
class Row:
    """One backend compared with the reference.

    :param backend: what ran.
    :param images: how many images were compared.
    :param logits: how many numbers these are.
    :param result: ``equal``, what differs, or why it did not run.
    :param ran: whether it ran; a build that fails counts as run.
    """

    backend: str
    images: int
    logits: int
    result: str
    ran: bool

    @property
    def equal(self) -> bool:
        """Whether it ran and every logit is that of the reference."""
        return self.ran and self.result == "equal"


@dataclass(frozen=True)
class Artefacts:
    """What lies in an export folder: the program, and the parts made from it that are there."""

    program: Path
    package: Path | None
    strict: Path | None
    fast: Path | None


def is_export(path: Path) -> bool:
    """Whether a path is an export folder, a C package or an ONNX file, and no run folder."""
    if path.suffix == ".onnx":
        return True
    if not path.is_dir() or (path / "recipe.yaml").is_file():
        return False
    return (path / PROGRAM_FILE).is_file() or _package(path) is not None or any(path.glob("*.onnx"))


def find_artefacts(path: Path) -> Artefacts:
    """The parts of an export folder, of a C package alone, or of one ONNX file beside its program.

    :raises ArqError: when the integer program is not there to compare with, or the ONNX file is no exact export.
    """
    folder = path.parent if path.suffix == ".onnx" else path
    if path.suffix == ".onnx" and not path.is_file():
        raise ArqError(f"No ONNX model at {path}; `arqsearch export --format onnx` writes one.")
    places = [folder / PROGRAM_FILE, folder / PACKAGE_DIR / PROGRAM_FILE]
    program = next((place for place in places if place.is_file()), None)
    if program is None:
        raise ArqError(
            f"{path} has no {PROGRAM_FILE} beside it, the program to compare with. `arqsearch export` writes it: "
            f"copy it from the folder of the export to {folder}."
        )
    if path.suffix != ".onnx":
        models = {_form(model): model for model in sorted(folder.glob("*.onnx"))}
        return Artefacts(program, _package(folder), models.get(STRICT), models.get(FAST))
    form = _form(path)
    if form not in (STRICT, FAST):
        raise ArqError(f"{path} is no exact export of an integer program; give one of --format {STRICT} or {FAST}.")
    return Artefacts(program, None, path if form == STRICT else None, path if form == FAST else None)


def _package(folder: Path) -> Path | None:
    return next((place for place in (folder, folder / PACKAGE_DIR) if (place / MODEL_FILE).is_file()), None)


def _form(path: Path) -> str | None:
    """The format that wrote an ONNX file, None for a foreign one."""
    try:
        facts = read_metadata(path, STRICT)
    except ArqError:
        raise
    except Exception as error:  # A damaged model can fail anywhere in onnx.
        raise ArqError(f"{path} is no ONNX model ({type(error).__name__}); export it again.") from error
    return next((form for form, key in FORM_KEYS.items() if key in facts), None)


def comparison_pixels(program: IntegerProgram, images: int = IMAGES) -> NDArray[np.int16]:
    """Images from a fixed seed: both ends of the pixel range, uniform noise, and smooth images.

    :returns: int16 ``(N, H, W, C)``.
    """
    spec, rng = program.input, np.random.default_rng(1)
    count = max(4, min(images, VALUES // int(np.prod(spec.shape)))) - 2
    drawn = rng.integers(spec.lo, spec.hi, size=(count, *spec.shape), endpoint=True)
    # Small deviations from one grey level a channel, as a photograph with noise has.
    level = rng.integers(0, 256, size=(count, 1, 1, spec.shape[-1]))
    around = np.clip(level + np.round(rng.normal(0, 40, size=drawn.shape)), spec.lo, spec.hi)
    ends = [np.full((1, *spec.shape), value) for value in (spec.lo, spec.hi)]
    mixed = np.where(np.arange(count).reshape(-1, 1, 1, 1) % 2 == 0, drawn, around)
    return np.concatenate([*ends, mixed]).astype(np.int16)


def compare(program: IntegerProgram, artefacts: Artefacts, pixels: NDArray[np.int16] | None = None) -> Iterator[Row]:
    """Run every backend and artefact on the same images and compare with the torch backend.

    :param pixels: int16 ``(N, H, W, C)``; default: :func:`comparison_pixels`.
    """
    images = comparison_pixels(program) if pixels is None else pixels
    expected = program.run(images, backend="torch").numpy()
    yield Row("torch (reference)", len(images), expected.size, "equal", True)
    for isa in NATIVE_ISAS:
        yield _row(f"native engine {isa}", partial(_native, program, isa), images, expected)
    if artefacts.strict:
        yield _row("strict ONNX", partial(_strict, program, artefacts.strict), images, expected)
    if artefacts.fast:
        yield _row("fast ONNX", partial(_fast, program, artefacts.fast), images, expected)
    if artefacts.package:
        with tempfile.TemporaryDirectory() as folder:
            for chain in c_matrix.TOOLCHAINS.values():
                yield package_row(program, artefacts.package, chain, Path(folder), images, expected)


def package_row(
    program: IntegerProgram,
    package: Path,
    chain: Toolchain,
    folder: Path,
    images: NDArray[np.int16],
    expected: NDArray[np.int32],
    cflags: str = "-O3",
) -> Row:
    """Build the package in `folder`, unless a toolchain with the same binaries did, run self-test and images."""
    name, place = f"C package, {chain.name}", folder / chain.binaries

    def compute(pixels: NDArray[np.int16]) -> NDArray[np.int32]:
        _check_emulation(program, package, chain)
        c_matrix.build(package, chain, place, cflags)
        own = c_matrix.self_test(package, chain, place)
        return own if chain.on_board else c_matrix.run(package, chain, place, pixels)

    # The board's example compares its own images; how many logits these were is what is reported.
    return _row(name, compute, images, None if chain.on_board else expected)


def _check_emulation(program: IntegerProgram, package: Path, chain: Toolchain) -> None:
    """Refuse what would take many minutes in an emulator or not fit the board."""
    work = macs(program) * SELF_TEST_RUNS
    for emulator, limit in EMULATED_MACS.items():
        if emulator in chain.needs and work > limit:
            raise Unavailable(f"{work / 1e9:.1f}·10⁹ multiply-accumulates would take too long in {emulator}")
    sizes = package_defines(package)
    # What is left is for code, test images and stack.
    room = c_matrix.BOARD_BYTES * 3 // 4
    if chain.on_board and (4 * sizes["WORDS"] > room or sizes["ARENA_BYTES"] + 2 * sizes["PIXELS"] > room):
        raise Unavailable(f"the network does not fit the {c_matrix.BOARD_BYTES >> 20} MiB of the emulated board")


def _row(name: str, compute: Compute, images: NDArray[np.int16], expected: NDArray[np.int32] | None) -> Row:
    """Run and compare; without `expected` the answers were compared where they were computed."""
    try:
        logits = compute(images)
    except Unavailable as reason:
        return Row(name, 0, 0, f"not run: {reason}", False)
    except ArqError as error:
        return Row(name, 0, 0, str(error), True)
    except Exception as error:  # A damaged ONNX model can fail anywhere in onnxruntime.
        return Row(name, 0, 0, f"cannot be run ({type(error).__name__}: {error})", True)
    if expected is None:
        return Row(name, len(logits), logits.size, "equal", True)
    if logits.shape != expected.shape:
        return Row(name, len(images), expected.size, f"{logits.shape} logits for {expected.shape}", True)
    wrong = int((logits != expected).sum())
    result = f"{wrong} of {expected.size} logits differ" if wrong else "equal"
    return Row(name, len(images), expected.size, result, True)


def _native(program: IntegerProgram, isa: str, pixels: NDArray[np.int16]) -> NDArray[np.int32]:
    from arqsearch.integer.native.engine import NativeBackend, native_isas, native_problem

    problem = native_problem()
    if problem:
        raise Unavailable(problem)
    if isa not in native_isas():
        raise Unavailable(f"this processor does not run {isa}")
    return np.asarray(NativeBackend(program, isa=isa).run(pixels).numpy())


def _strict(program: IntegerProgram, path: Path, pixels: NDArray[np.int16]) -> NDArray[np.int32]:
    _check_hash(program, path, STRICT)
    return run_strict(path, pixels)


def _fast(program: IntegerProgram, path: Path, pixels: NDArray[np.int16]) -> NDArray[np.int32]:
    _check_hash(program, path, FAST)
    return np.asarray(run_fast(path, pixels))


def _check_hash(program: IntegerProgram, path: Path, form: str) -> None:
    stated = read_metadata(path, form).get(HASH_KEY)
    if stated != program.hash:
        raise ArqError(f"{path} states program {stated}, {PROGRAM_FILE} is {program.hash}; export both again.")


def verify_export(path: Path) -> dict[str, Any]:
    """What `arqsearch verify EXPORT` prints.

    :param path: export folder, C package or exported ONNX file.
    :returns: ``verified`` (True), ``program`` and ``matrix``: one entry for each backend.
    :raises ArqError: when anything that ran differs, or the package states another program.
    """
    artefacts = find_artefacts(path)
    program = IntegerProgram.load(artefacts.program)
    if artefacts.package and program.hash not in (artefacts.package / MODEL_FILE).read_text()[:2000]:
        raise ArqError(f"{artefacts.package / MODEL_FILE} does not state program {program.hash}; export it again.")
    rows = list(compare(program, artefacts))
    problems = [f"{row.backend}: {row.result}" for row in rows if row.ran and not row.equal]
    if problems:
        raise ArqError(f"{path} was checked and does not hold:\n  " + "\n  ".join(problems))
    matrix = [{"backend": r.backend, "images": r.images, "logits": r.logits, "result": r.result} for r in rows]
    return {"verified": True, "program": program.hash, "matrix": matrix}
