"""What the tests of the C package share: skips that CI forbids, and kernels that are compiled once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arqsearch.export import c_matrix
from arqsearch.export.c_matrix import TOOLCHAINS, Toolchain

#: Every build of the tests refuses warnings.
STRICT = "-O3 -Werror"


def required() -> bool:
    """Whether this run must have every compiler and emulator, as CI does."""
    return os.environ.get("ARQSEARCH_REQUIRE_TOOLCHAINS") == "1"


def need(name: str) -> Toolchain:
    """A toolchain; skips with the reason where it is missing, and fails where that is forbidden."""
    chain = TOOLCHAINS[name]
    reason = c_matrix.missing(chain)
    if reason is not None:
        if required() and "install" in reason:
            pytest.fail(f"{name}: {reason}, and ARQSEARCH_REQUIRE_TOOLCHAINS=1 forbids to skip")
        pytest.skip(f"{name}: {reason}")
    return chain


def need_program(program: str, package: str) -> str:
    """Path of a program such as cmake; skips or fails as :func:`need` does.

    :param package: the Debian package that holds it.
    """
    path = shutil.which(program)
    if path is None:
        if required():
            pytest.fail(f"install {package}; ARQSEARCH_REQUIRE_TOOLCHAINS=1 forbids to skip")
        pytest.skip(f"install {package} (Debian package)")
    return path


class Builds:
    """Builds packages; the kernels, which are the same in all, only once for each compiler.

    :param folder: of all binaries.
    :param cflags: of every build.
    :param ldflags: of every link.
    """

    def __init__(self, folder: Path, cflags: str = STRICT, ldflags: str = "") -> None:
        self.folder, self.cflags, self.ldflags = folder, cflags, ldflags
        self.made: dict[str, Path] = {}
        self.done: set[Path] = set()

    def build(self, package: Path, chain: Toolchain, label: str) -> Path:
        """Folder with the binaries of a package.

        :param label: a name for the package, one for each.
        """
        target = self.folder / chain.binaries / label
        if target not in self.done:
            self.prime(chain, target)
            c_matrix.build(package, chain, target, cflags=self.cflags, ldflags=self.ldflags)
            self.done.add(target)
            self.made.setdefault(chain.binaries, target)
        return target

    def prime(self, chain: Toolchain, target: Path) -> None:
        """Put the kernels that were compiled before into a build folder; newer than their sources, make leaves them."""
        first = self.made.get(chain.binaries)
        for path in first.glob("**/arq*.o") if first else ():
            copy = target / path.relative_to(first)  # type: ignore[arg-type]
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

    def primed(self) -> Callable[..., None]:
        """`c_matrix.build` that starts from the kernels compiled before."""
        original = c_matrix.build

        def build(package: Path, chain: Toolchain, folder: Path, cflags: str = "-O3", ldflags: str = "") -> None:
            if not folder.is_dir() and c_matrix.missing(chain) is None:
                self.prime(chain, folder)
            original(package, chain, folder, cflags, ldflags)

        return build
