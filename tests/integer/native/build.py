"""Compiles the C sources for tests; what has not changed is compiled once for all sessions."""

from __future__ import annotations

import hashlib
import os
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
    config: pytest.Config, compiler_path: str, name: str, sources: Sequence[Path], flags: Sequence[str] = ()
) -> Path:
    """Compile and link; the compiler's messages are the failure's text.

    :param config: whose cache keeps the result until a source, the compiler or the flags change.
    :param name: of the file.
    """
    command = [compiler_path, *STRICT, *flags, "-I", str(SOURCES), *map(str, sources)]
    version = subprocess.run([compiler_path, "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(version)
    for path in sorted({*sources, *SOURCES.glob("*.h")}):
        content.update(path.name.encode() + path.read_bytes())
    assert config.cache is not None
    folder = config.cache.mkdir("arqsearch-native")
    way = hashlib.sha256("\n".join([name, compiler_path, *flags]).encode()).hexdigest()[:16]
    target = folder / f"{way}-{content.hexdigest()[:16]}-{name}"
    if not target.exists():
        # Another worker may do the same at this moment; the last one wins.
        unfinished = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        for outdated in set(folder.glob(f"{way}-*-{name}")) - {target}:
            outdated.unlink(missing_ok=True)
        unfinished.replace(target)
    return target


def shared_library(config: pytest.Config, compiler_path: str, flags: Sequence[str] = ("-O1",)) -> Path:
    """The runtime for ctypes."""
    return compile_c(config, compiler_path, "libarq.so", runtime_sources(), ("-shared", "-fPIC", *flags))


def harness(config: pytest.Config, compiler_path: str, flags: Sequence[str]) -> Path:
    """The executable of harness.c."""
    return compile_c(config, compiler_path, "harness", [*runtime_sources(), HARNESS], flags)
