"""Export of one integer program that lies outside a run: a file, or a network of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.errors import ArqError, nearest
from arqsearch.export.c_package import PACKAGE_DIR, PROGRAM_FILE, export_c, package_sizes
from arqsearch.export.matrix import FAST_FILE, STRICT_FILE
from arqsearch.export.onnx_fast import export_fast
from arqsearch.export.onnx_strict import export_strict
from arqsearch.integer.program import IntegerProgram
from arqsearch.zoo import PREFIX, resolve

#: Formats that need nothing but the program.
FORMATS = ("onnx", "onnx-fast", "c")


def is_program(target: str) -> bool:
    """Whether a command's target is an integer program: a safetensors file, or ``zoo:NAME``."""
    return target.startswith(PREFIX) or Path(target).suffix == ".safetensors"


def program_name(target: str) -> str:
    """What the files made from a program are called."""
    return target.removeprefix(PREFIX) if target.startswith(PREFIX) else Path(target).stem


def export_program(target: str, format_: str, output: Path | None = None) -> dict[str, Any]:
    """Write one artefact of a program and, beside it, the program that `arqsearch verify` compares it with.

    :param target: program file, or ``zoo:NAME``.
    :param format_: of :data:`FORMATS`.
    :param output: folder; default: ``exports/NAME`` in the current folder.
    :returns: ``program_hash`` and ``files``: format, path and size in bytes.
    :raises ArqError: for a format that needs the network behind the program, or an unknown one.
    """
    if format_ in ("qdq", "config"):
        raise ArqError(
            f"Format {format_!r} is made from the trained network, and a program alone holds integers only. "
            f"Give its run folder, or use one of {', '.join(FORMATS)}."
        )
    if format_ not in FORMATS:
        raise ArqError(f"No export format {format_!r}. {nearest(format_, FORMATS)}")
    program = IntegerProgram.load(resolve(target, "program"))
    folder = output or Path("exports") / program_name(target)
    folder.mkdir(parents=True, exist_ok=True)
    if format_ == "c":
        sigma = program.metadata.get("sigma")
        package = export_c(
            program, folder / PACKAGE_DIR, smoothing=None if sigma is None else SmoothingSettings(sigma=float(sigma))
        )
        paths = [path for path in package.files if path.name in {"README.md", "model.c", "smoothing.c"}]
    elif format_ == "onnx":
        paths = [folder / STRICT_FILE]
        export_strict(program, paths[0])
    else:
        paths = [folder / FAST_FILE]
        export_fast(program, paths[0])
    program.save(folder / PROGRAM_FILE)
    files = [{"format": format_, "path": str(path), "bytes": path.stat().st_size} for path in paths]
    outcome = {"program_hash": program.hash, "files": files}
    return outcome | ({"c": package_sizes(folder / PACKAGE_DIR)} if format_ == "c" else {})
