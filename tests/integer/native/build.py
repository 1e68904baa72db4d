"""Compiles the C sources for tests; what has not changed is compiled once for all sessions."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import arqsearch

SOURCES = Path(arqsearch.__file__).parent / "integer" / "native" / "csrc"
HARNESS = Path(__file__).with_name("harness.c")
#: Every warning that the package promises to be free of, as an error.
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
#: Without optimization the inlined vector kernels would need more stack than there is.
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PORTABLE = "-DARQ_PORTABLE_ONLY"


def compiler(name: str) -> str:
    """Path of a compiler; skips the test where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def runtime_sources() -> list[Path]:
    """The runtime with its kernels: what arq.h needs, without the smoothing."""
    return sorted(path for path in SOURCES.glob("arq_*.c") if "smooth" not in path.name and "noise" not in path.name)


def compile_c(
    config: pytest.Config,
    compiler_path: str,
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """Compile each source once for all tests that share the flags, and link; the compiler's messages are the failure.

    :param config: whose cache keeps objects and result until a source, a header, the compiler or the flags change.
    :param name: of the file.
    :param flags: for compiling and linking.
    :param link: for linking alone.
    """
    assert config.cache is not None
    folder = config.cache.mkdir("arqsearch-native")
    version = subprocess.run([compiler_path, "--version"], capture_output=True, check=True).stdout
    way = hashlib.sha256("\n".join([compiler_path, *flags]).encode() + version).hexdigest()[:12]
    headers = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *HARNESS.parent.glob("*.h")]):
        headers.update(path.name.encode() + path.read_bytes())
    objects = []
    for source in sources:
        content = hashlib.sha256(headers.digest() + source.read_bytes()).hexdigest()[:16]
        command = [compiler_path, *STRICT, *flags, "-I", str(SOURCES), "-c", str(source)]
        objects.append(_made(folder, f"{way}-object-{source.stem}", f"{content}.o", command))
    content = hashlib.sha256("\n".join([*map(str, objects), *link]).encode()).hexdigest()[:16]
    return _made(folder, f"{way}-linked-{name}", content, [compiler_path, *flags, *link, *map(str, objects)])


def _made(folder: Path, stem: str, version: str, command: Sequence[str]) -> Path:
    """The output of a command, made unless it is there; of several workers one makes it and the others wait."""
    target = folder / f"{stem}-{version}"
    with (folder / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for outdated in folder.glob(f"{stem}-*"):
                outdated.unlink()
            unfinished = folder / f"unfinished-{target.name}"
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            unfinished.replace(target)
    return target


def shared_library(config: pytest.Config, compiler_path: str, flags: Sequence[str] = ("-O1",)) -> Path:
    """The runtime for ctypes."""
    return compile_c(config, compiler_path, "libarq.so", runtime_sources(), ("-fPIC", *flags), ["-shared"])


def harness(config: pytest.Config, compiler_path: str, flags: Sequence[str]) -> Path:
    """The executable of harness.c."""
    return compile_c(config, compiler_path, "harness", [*runtime_sources(), HARNESS], flags)
