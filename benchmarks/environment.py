"""The process that is timed: variables that must be set before it starts, and facts about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from arqsearch.errors import ArqError, nearest

#: Instruction sets of the integer engine; ``auto`` is the best that the processor has.
ISAS = ("auto", "portable", "avx2", "avx512", "neon")
#: One thread each; memory of freed tensors is kept, as page faults would else cost torch a third of its speed.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
#: What limits the libraries of the peers: PyTorch's own kernels, oneDNN in torch, oneDNN in OpenVINO, MKL.
LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
MARK = "ARQSEARCH_BENCH_PROCESS"
PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


def wanted(isa: str) -> dict[str, str]:
    """Environment variables of a benchmark at this instruction set.

    :raises ArqError: for an unknown name.
    """
    if isa not in ISAS:
        raise ArqError(f"No instruction set {isa!r}. {nearest(isa, ISAS)}")
    return FIXED | LIMITS.get(isa, {})


def relaunch(isa: str) -> None:
    """Replace this process by itself with the variables set; returns where they are set already.

    Libraries read them when they are loaded and the C library reads its own before `main`, so setting them here
    would be too late.

    :param isa: one of :data:`ISAS`.
    """
    variables = wanted(isa)
    if os.environ.get(MARK) == isa or all(os.environ.get(key) == value for key, value in variables.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables, MARK: isa})


def peers_isa(isa: str) -> str:
    """What the peers that can be limited may use."""
    return isa if isa in LIMITS else "not limited"


def processor(cpuinfo: str | None = None) -> str:
    """Name of the processor.

    :param cpuinfo: text of ``/proc/cpuinfo``; default: this machine's.
    """
    path = Path("/proc/cpuinfo")
    text = cpuinfo if cpuinfo is not None else path.read_text() if path.is_file() else ""
    fields: Mapping[str, str] = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def versions() -> dict[str, str]:
    """Versions of arqsearch and of the libraries that are timed; absent ones are left out."""
    from arqsearch import __version__

    found = {"arqsearch": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
