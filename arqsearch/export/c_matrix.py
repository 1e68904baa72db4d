"""Builds a C package with the compilers found on this machine and runs it, natively or in an emulator.

Every build goes through the package's own Makefile, in a folder outside the package. What cannot run says which
Debian package or which instruction set is missing.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError

#: Debian packages that hold the programs used here.
DEBIAN = {
    "make": "make", "gcc": "gcc", "clang": "clang", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user", "arm-none-eabi-gcc": "gcc-arm-none-eabi", "qemu-system-arm": "qemu-system-arm",
}  # fmt: skip
_AARCH64_LIBC = ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross")
_NEWLIB = "libnewlib-arm-none-eabi"
#: Memory of the emulated Cortex-M3 board, each of constants and of variables, and seconds that it may run.
BOARD_BYTES, BOARD_SECONDS = 4 << 20, 900
#: Exit status of `check` when build or processor lack the instruction set.
_UNSUPPORTED = 3
_LOGITS = re.compile(r"^image \d+: class \d+, \w+, logits((?: -?\d+)+)$", re.MULTILINE)
_HOSTS = {"amd64": "x86-64", "x86_64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


class Unavailable(Exception):
    """A build or run that this machine cannot do; the message says what is missing."""


@dataclass(frozen=True)
class Toolchain:
    """One way to build and run the package.

    :param name: shown in tables.
    :param compiler: program that compiles.
    :param isa: kernels that `check` and `example` are asked for.
    :param needs: other programs.
    :param host: processor that native binaries need; None: any.
    :param ldflags: options of the link.
    :param emulator: command before the binary.
    """

    name: str
    compiler: str
    isa: str
    needs: tuple[str, ...] = ()
    host: str | None = None
    ldflags: str = ""
    emulator: tuple[str, ...] = ()

    @property
    def binaries(self) -> str:
        """Name shared by toolchains that build the same binaries."""
        return self.compiler

    @property
    def on_board(self) -> bool:
        """Whether it builds the image of the Cortex-M3 board, which runs the compiled-in vectors only."""
        return self.compiler == "arm-none-eabi-gcc"


#: Every toolchain, by name.
TOOLCHAINS: dict[str, Toolchain] = {
    chain.name: chain
    for chain in (
        Toolchain("gcc portable", "gcc", "portable"),
        Toolchain("gcc AVX2", "gcc", "avx2", host="x86-64"),
        Toolchain("gcc AVX-512", "gcc", "avx512", host="x86-64"),
        Toolchain("clang", "clang", "auto"),
        Toolchain("aarch64 portable", "aarch64-linux-gnu-gcc", "portable", ("qemu-aarch64",), None, "-static",
                  ("qemu-aarch64",)),
        Toolchain("aarch64 NEON", "aarch64-linux-gnu-gcc", "neon", ("qemu-aarch64",), None, "-static",
                  ("qemu-aarch64",)),
        Toolchain("Cortex-M3", "arm-none-eabi-gcc", "portable", ("qemu-system-arm",)),
    )
}  # fmt: skip


def missing(chain: Toolchain) -> str | None:
    """What this machine lacks, as a sentence with the Debian packages; None when nothing is known to be missing."""
    host = _HOSTS.get(platform.machine().lower(), platform.machine())
    if chain.host is not None and chain.host != host:
        return f"needs an {chain.host} processor, this is {host}"
    absent = [DEBIAN[name] for name in ("make", chain.compiler, *chain.needs) if shutil.which(name) is None]
    if not absent and chain.emulator and not Path(_AARCH64_LIBC[0]).is_file():
        absent.append(_AARCH64_LIBC[1])
    if not absent and chain.on_board and not _newlib():
        absent.append(_NEWLIB)
    return f"install {' '.join(absent)} (Debian packages)" if absent else None


def _newlib() -> bool:
    found = subprocess.run(
        ["arm-none-eabi-gcc", "-mcpu=cortex-m3", "-mthumb", "-print-file-name=libc.a"], capture_output=True, text=True
    )
    return Path(found.stdout.strip()).is_absolute()


def build(package: Path, chain: Toolchain, folder: Path, cflags: str = "-O3", ldflags: str = "") -> None:
    """Build everything with the package's Makefile into `folder`.

    :param cflags: replaces the Makefile's CFLAGS (-Os on the board).
    :raises Unavailable: when a program is missing.
    :raises ArqError: with the compiler's words when the build fails.
    """
    reason = missing(chain)
    if reason:
        raise Unavailable(reason)
    folder.mkdir(parents=True, exist_ok=True)
    command = ["make", "-C", str(package), f"BUILD={folder.resolve()}"]
    if chain.on_board:
        command += ["cortex-m3", f"M3_CFLAGS={cflags.replace('-O3', '-Os')}"]
    else:
        command += ["all", f"CC={chain.compiler}", f"CFLAGS={cflags}", f"LDFLAGS={chain.ldflags} {ldflags}".strip()]
    _run(command, f"{chain.name}: building {package}")


def run(package: Path, chain: Toolchain, folder: Path, pixels: NDArray[np.int16]) -> NDArray[np.int32]:
    """Logits of images by a binary made with :func:`build`.

    :param pixels: int16 ``(N, H, W, C)``.
    :returns: int32 ``(N, classes)``.
    :raises Unavailable: when the processor lacks the instruction set.
    :raises ArqError: when the binary fails.
    """
    assert not chain.on_board, "the board runs its own vectors"
    source, target = folder / "pixels.bin", folder / "logits.bin"
    source.write_bytes(np.ascontiguousarray(pixels, dtype=np.int16).tobytes())
    command = [*chain.emulator, str(folder.resolve() / "check"), chain.isa, str(source.resolve())]
    done = _start([*command, str(target.resolve())])
    if done.returncode == _UNSUPPORTED:
        raise Unavailable(f"this processor does not run {chain.name.split()[-1]} instructions")
    if done.returncode:
        raise ArqError(f"{chain.name}: {package} failed on {len(pixels)} images: {_tail(done)}")
    logits = np.frombuffer(target.read_bytes(), dtype=np.int32)
    return logits.reshape(len(pixels), -1)


def self_test(package: Path, chain: Toolchain, folder: Path) -> NDArray[np.int32]:
    """Run the example, which compares itself with its test vectors.

    :returns: the logits that it printed, int32 ``(images, classes)``.
    :raises Unavailable: when the processor lacks the instruction set, or the network does not fit the board.
    :raises ArqError: when a number differs or the binary fails.
    """
    if chain.on_board:
        done = _start([*_board_command(), str(folder / "cortex_m3.elf")], BOARD_SECONDS)
    else:
        nothing = [*chain.emulator, str(folder.resolve() / "check"), chain.isa, os.devnull, os.devnull]
        if _start(nothing).returncode == _UNSUPPORTED:
            raise Unavailable(f"this processor does not run {chain.name.split()[-1]} instructions")
        done = _start([*chain.emulator, str(folder.resolve() / "example"), chain.isa])
    # Semihosting writes to the standard error.
    text = done.stdout + done.stderr
    if done.returncode or "ALL EQUAL" not in text:
        raise ArqError(f"{chain.name}: the self-test of {package} failed: {_tail(done)}")
    if chain.isa != "auto" and f"kernels: {chain.isa}\n" not in text:
        raise ArqError(f"{chain.name}: {package} ran {text.splitlines()[0]}, not {chain.isa}.")
    return np.array([line.split() for line in _LOGITS.findall(text)], dtype=np.int64).astype(np.int32)


def _board_command() -> list[str]:
    return ["qemu-system-arm", "-M", "mps2-an385", "-nographic", "-monitor", "none", "-serial", "none",
            "-semihosting-config", "enable=on,target=native", "-kernel"]  # fmt: skip


def code_bytes(package: Path, folder: Path) -> dict[str, int]:
    """Machine code of the library without vector kernels, optimised for size, without the network's constants.

    :param folder: for the binaries.
    :returns: bytes by "Cortex-M3" and "this machine"; empty where no compiler is installed.
    """
    sizes = {}
    kinds = (("Cortex-M3", "Cortex-M3", "arm-none-eabi-size"), ("this machine", "gcc portable", "size"))
    for label, name, tool in kinds:
        chain, place = TOOLCHAINS[name], folder / TOOLCHAINS[name].binaries
        # The emulator is not needed to build.
        if missing(dataclasses.replace(chain, needs=())) or shutil.which(tool) is None:
            continue
        build(package, dataclasses.replace(chain, needs=()), place, cflags="-Os -DARQ_PORTABLE_ONLY")
        listed = _run([tool, *map(str, sorted(place.glob("**/arq*.o")))], f"{tool} of {package}")
        sizes[label] = sum(int(line.split()[0]) for line in listed.splitlines()[1:])
    return sizes


def _run(command: Sequence[str], doing: str) -> str:
    done = _start(command)
    if done.returncode:
        raise ArqError(f"{doing} failed: {_tail(done)}")
    return done.stdout


def _start(command: Sequence[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    # A make above this one would pass its job server and flags on.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    }
    try:
        return subprocess.run(list(command), capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ArqError(f"{command[0]} was stopped after {seconds} s; the network is too large for it.") from error


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "\n  ".join([f"exit status {done.returncode}", *lines[-12:]])
