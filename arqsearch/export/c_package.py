"""The C99 package: an integer program as a folder that a firmware or server engineer builds with any C compiler.

It holds the network as constants, the kernel sources of the native engine unchanged, the tables of smoothed
prediction and certification, an example that is also the self-test, and the program itself, so that
`arqsearch verify FOLDER` can compare what was built with the reference.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arqsearch import __version__
from arqsearch.certify.noise import ESTIMATE, NoiseTable, noise
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.errors import ArqError
from arqsearch.export import c_source as C
from arqsearch.export.c_matrix import code_bytes
from arqsearch.export.c_smoothing import SmoothedVector, SmoothingTables, smoothed_vector, smoothing_tables
from arqsearch.export.c_tables import smoothing_files, vector_files
from arqsearch.integer import native
from arqsearch.integer import ops as O
from arqsearch.integer.native import NativeProgram, compile_program
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram

TEMPLATES = Path(__file__).parent / "c_templates"
KERNELS = Path(native.__file__).parent / "csrc"
PROGRAM_FILE, MODEL_FILE = "program.safetensors", "model.c"
#: Folder of the package within the exports of a network.
PACKAGE_DIR = "c"

#: Copied unchanged, next to arq*.c and arq*.h.
COPIED = (
    "LICENSE", "main.c", "check.c", "port.h", "port_host.c", "cortex_m3/startup.c", "cortex_m3/semihosting.h",
    "cortex_m3/semihosting.c", "cortex_m3/mps2_an385.ld",
)  # fmt: skip
#: Test images, and the pixel values that they may add up to.
VECTOR_IMAGES, VECTOR_VALUES = 4, 40_000
#: Samples of the smoothed test vector: (select, estimate), and fewer for networks beyond so many MACs.
FEW_SAMPLES, FEWEST_SAMPLES, MANY_MACS = (12, 40), (4, 12), 100_000_000


@dataclass(frozen=True)
class CPackage:
    """What was written.

    :param folder: the package.
    :param files: every file in it, in alphabetical order.
    :param arena_bytes: memory of one run.
    :param weight_bytes: weights alone, packed at their own bit-widths.
    :param model_bytes: constants of the network in all.
    """

    folder: Path
    files: tuple[Path, ...]
    program_hash: str
    arena_bytes: int
    weight_bytes: int
    model_bytes: int


def export_c(
    program: IntegerProgram,
    folder: str | Path,
    *,
    smoothing: SmoothingSettings | None = None,
    images: NDArray[np.uint8] | None = None,
    image_ids: Sequence[int] | None = None,
) -> CPackage:
    """Write the package; the same arguments give the same bytes.

    :param folder: made if missing; files of an earlier export are replaced.
    :param smoothing: sigma, n0, n, alpha and seed of the certificates, whatever their rule: a device certifies by
        rule ``fixed``. None leaves smoothed prediction and certification out.
    :param images: uint8 ``(N, H, W, C)``, what the test vectors are made of; default: random ones.
    :param image_ids: their ids in the data set, the image word of the noise counter.
    :raises ArqError: when the range proof fails, or noise at sigma could leave the program's input range.
    """
    compiled = compile_program(program)
    tables = smoothing_tables(program, smoothing) if smoothing else None
    given = _random_images(program) if images is None else images
    if given.dtype != np.uint8 or given.shape[1:] != program.input.shape or not len(given):
        raise ArqError(f"Test images are {given.dtype} {given.shape}; expected uint8 (N, {program.input.shape}).")
    ids = list(range(len(given))) if image_ids is None else [int(i) for i in image_ids]
    vector = _smoothed_vector(program, smoothing, given[0], ids[0]) if smoothing else None
    pixels = _vector_pixels(program, smoothing, given, ids)
    logits = program.run(pixels, backend="torch").numpy()

    texts = {
        "model.h": _model_header(program, compiled, tables),
        "model.c": _model_source(program, compiled),
        **(smoothing_files(tables) if tables else {}),
        **vector_files(pixels, logits, vector, smoothing.seed if smoothing else 0),
    }
    kernels = sorted([*KERNELS.glob("arq*.c"), *KERNELS.glob("arq*.h")])
    sources = [path.name for path in kernels if path.suffix == ".c"]
    sources += [name for name in ("model.c", "smoothing.c") if name in texts]
    for name in ("Makefile", "CMakeLists.txt"):
        separator = " " if name == "Makefile" else "\n    "
        texts[name] = (TEMPLATES / name).read_text().replace("@LIBRARY_SOURCES@", separator.join(sources))
    texts["README.md"] = _readme(program, compiled, tables)

    target = Path(folder)
    _clear(target)
    (target / "cortex_m3").mkdir(parents=True, exist_ok=True)
    copies = {name: TEMPLATES / name for name in COPIED} | {path.name: path for path in kernels}
    for name, origin in copies.items():
        (target / name).write_bytes(origin.read_bytes())
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    program.save(target / PROGRAM_FILE)
    files = tuple(sorted(target / name for name in (*copies, *texts, PROGRAM_FILE)))
    size = 4 * len(compiled.words)
    return CPackage(target, files, program.hash, compiled.arena_bytes, compiled.weight_bytes, size)


def macs(program: IntegerProgram) -> int:
    """Multiply-accumulates of one image, padded positions counted."""
    total = 0
    for op in program.ops:
        if isinstance(op, O.Conv2d):
            height, width, _ = program.tensors[op.output].shape
            total += op.weight.size * height * width
        elif isinstance(op, O.Linear):
            total += op.weight.size
    return total


def prepared_bound(program: IntegerProgram) -> int:
    """Bytes that `arq_prepare` needs at most, on any instruction set.

    Channels are padded to blocks (depthwise: what is left over to one more), taps and channels to steps, weights are
    held in one or two bytes, and every channel has eight numbers for bias and rescaling (arq_pack.h).
    """
    total = 0
    for op in program.ops:
        if isinstance(op, O.Conv2d | O.Linear):
            weight = op.weight if isinstance(op, O.Conv2d) else op.weight[:, None, None, :]
            out, height, width, depth = weight.shape
            lanes = _up(out, 32) + (32 if isinstance(op, O.Conv2d) and op.groups > 1 else 0)
            total += _up(2 * lanes * height * _up(width * _up(depth, 4), 4), 64) + 8 * 4 * lanes + 64
    return total


def package_defines(folder: Path) -> dict[str, int]:
    """The sizes that model.h states, by name without the prefix ``ARQ_NETWORK_``."""
    text = (folder / "model.h").read_text(encoding="utf-8")
    found = re.findall(r"^#define ARQ_NETWORK_(\w+) \(?(-?\d+)\)?", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


def package_sizes(folder: Path) -> dict[str, str | int]:
    """What a device needs for a package: memory, constants and, where a compiler is installed, machine code."""
    sizes, compiled = package_defines(folder), compile_program(IntegerProgram.load(folder / PROGRAM_FILE))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            code = ", ".join(f"{size} ({name})" for name, size in code_bytes(folder, Path(scratch)).items())
    except ArqError as error:
        code = str(error)  # The package is complete; its reader learns here what its compiler lacks.
    return {
        "folder": str(folder),
        "arena bytes": sizes["ARENA_BYTES"],
        "prepared bytes, at most": sizes["PREPARED_BYTES"],
        "constants of the network, bytes": 4 * sizes["WORDS"],
        "weights alone, packed, bytes": compiled.weight_bytes,
        "code bytes": code or "no C compiler found",
    }


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _clear(folder: Path) -> None:
    """Remove sources of an earlier export that this one may not have."""
    if (folder / MODEL_FILE).is_file() and (folder / PROGRAM_FILE).is_file():
        for path in (*folder.glob("arq*.[ch]"), *folder.glob("smoothing.[ch]")):
            path.unlink()


# ---- the network -----------------------------------------------------------------------------


def _about(program: IntegerProgram, what: str) -> str:
    return f"{what}\nProgram {program.hash}.\nWritten by arqsearch {__version__}; see README.md."


def _model_header(program: IntegerProgram, compiled: NativeProgram, tables: SmoothingTables | None) -> str:
    height, width, channels = program.input.shape
    sizes = C.defines(
        "ARQ_NETWORK_",
        {
            "WORDS": len(compiled.words), "HEIGHT": height, "WIDTH": width, "CHANNELS": channels,
            "PIXELS": height * width * channels, "PIXEL_LO": program.input.lo, "PIXEL_HI": program.input.hi,
            "CLASSES": program.num_classes, "ARENA_BYTES": compiled.arena_bytes,
            "PREPARED_BYTES": prepared_bound(program), "SMOOTHING": int(tables is not None),
        },
        {
            "WORDS": "32-bit words of arq_network_words",
            "PIXELS": "int16 values of an image: height, width, channels",
            "ARENA_BYTES": "memory of arq_run",
            "PREPARED_BYTES": "an upper bound of arq_prepared_bytes for every instruction set",
            "SMOOTHING": "1: smoothing.h is there",
        },
    )  # fmt: skip
    body = f"{sizes}\nextern const uint32_t arq_network_words[ARQ_NETWORK_WORDS];\n"
    return C.header("ARQ_NETWORK_H", _about(program, "The network: sizes, and its words for arq_open."),
                    ["<stdint.h>"], body)  # fmt: skip


def _model_source(program: IntegerProgram, compiled: NativeProgram) -> str:
    words = C.array("const uint32_t arq_network_words[ARQ_NETWORK_WORDS]", compiled.words, unsigned=True)
    return C.source(_about(program, "The network; arq_blob.h states the format."), ['"model.h"'], words)


# ---- test vectors ----------------------------------------------------------------------------


def _random_images(program: IntegerProgram) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, size=(VECTOR_IMAGES, *program.input.shape), dtype=np.uint8)


def _vector_pixels(
    program: IntegerProgram, smoothing: SmoothingSettings | None, images: NDArray[np.uint8], ids: Sequence[int]
) -> NDArray[np.int16]:
    """Noisy images (clean ones without smoothing) and, for small inputs, both ends of the pixel range."""
    size = images[0].size
    count = max(1, min(VECTOR_IMAGES, VECTOR_VALUES // size, len(images)))
    pixels = images[:count].astype(np.int16)
    if smoothing:
        drawn = noise(
            NoiseTable.for_sigma(smoothing.sigma), seed=smoothing.seed, stage=ESTIMATE, image_ids=ids[:count],
            sample_start=0, sample_count=1, coordinates=size,
        )  # fmt: skip
        pixels = pixels + drawn.numpy().reshape(pixels.shape)
    lo, hi = program.input.lo, program.input.hi
    ends = [np.full((1, *program.input.shape), value, np.int16) for value in (lo, hi)] if size <= VECTOR_VALUES else []
    return np.concatenate([np.clip(pixels, lo, hi), *ends]).astype(np.int16)


def _smoothed_vector(
    program: IntegerProgram, smoothing: SmoothingSettings, image: NDArray[np.uint8], image_id: int
) -> SmoothedVector:
    n0, n = FEW_SAMPLES if macs(program) <= MANY_MACS else FEWEST_SAMPLES
    return smoothed_vector(program, dataclasses.replace(smoothing, n0=n0, n=n), image, image_id)


# ---- README ----------------------------------------------------------------------------------


def _readme(program: IntegerProgram, compiled: NativeProgram, tables: SmoothingTables | None) -> str:
    height, width, channels = program.input.shape
    values: dict[str, object] = {
        "HASH": program.hash, "VERSION": __version__, "ARITHMETIC": ARITHMETIC_VERSION,
        "HEIGHT": height, "WIDTH": width, "CHANNELS": channels,
        "PIXEL_LO": program.input.lo, "PIXEL_HI": program.input.hi, "CLASSES": program.num_classes,
        "MODEL_BYTES": 4 * len(compiled.words), "WEIGHT_BYTES": compiled.weight_bytes,
        "ARENA_BYTES": compiled.arena_bytes, "PREPARED_BYTES": prepared_bound(program),
        "SMOOTHING": (TEMPLATES / "smoothing.md").read_text() if tables else "",
        "SMOOTHING_FILE": " and `smoothing.c`" if tables else "",
    }  # fmt: skip
    if tables:
        values |= {
            "SIGMA": tables.noise.sigma, "SEED": tables.seed, "N0": tables.certifier.n0, "N": tables.certifier.n,
            "ALPHA": tables.certifier.alpha, "RADII": len(tables.certifier.counts), "PREDICT_N": tables.predictor.n,
            "MAX_RADIUS": tables.certifier.radius_micro[-1] / 1_000_000,
        }  # fmt: skip
    text = (TEMPLATES / "README.md").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text
