"""Every set of fast kernels gives the sums and results of a naive reference, at the limits of each sum class."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integer.native import build

HERE = Path(__file__).parent
KERNELS = ("avx2", "avx512", "neon")
SKIPPED = 77  # the exit status of kernel_harness.c where the processor or the build lacks the instructions
BUILDS = {"gcc": ("gcc", ("-O3",), 2000), "gcc sanitized": ("gcc", build.SANITIZE, 400)}
#: clang takes minutes for the kernels; the C package's tests run what it makes of them as well.
SLOW_BUILDS = {"clang": ("clang", ("-O3",), 2000), "clang sanitized": ("clang", build.SANITIZE, 400)}


def run(executable: Path, kernels: str, count: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [str(executable), kernels, str(count), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=[*BUILDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_BUILDS)])
def harness(request: pytest.FixtureRequest) -> tuple[Path, int]:
    """The harness built in one of the ways above, and how many tasks it should do."""
    name, flags, count = (BUILDS | SLOW_BUILDS)[request.param]
    sources = [HERE / "kernel_harness.c", *build.runtime_sources()]
    return build.compile_c(request.config, build.compiler(name), "kernel_harness", sources, flags), count


@pytest.mark.parametrize("kernels", KERNELS)
def test_random_tasks_equal_the_reference(harness: tuple[Path, int], kernels: str) -> None:
    executable, count = harness
    done = run(executable, kernels, count, seed=1)
    if done.returncode == SKIPPED:
        pytest.skip(f"no {kernels} kernels on this processor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{count} tasks equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_many_random_tasks_equal_the_reference(harness: tuple[Path, int], kernels: str) -> None:
    executable, count = harness
    done = run(executable, kernels, 20 * count, seed=2)
    if done.returncode == SKIPPED:
        pytest.skip(f"no {kernels} kernels on this processor")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_harness_refuses_an_unknown_name(harness: tuple[Path, int]) -> None:
    assert run(harness[0], "mmx", 1, 1).returncode == SKIPPED
