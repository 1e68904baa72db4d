"""The bit-exactness matrix: every backend, compiler and emulator gives the torch backend's integers, on every logit."""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.errors import ArqError
from arqsearch.export import c_matrix, matrix
from arqsearch.export.c_matrix import TOOLCHAINS, Unavailable
from arqsearch.export.c_package import PACKAGE_DIR, PROGRAM_FILE, export_c, prepared_bound
from arqsearch.export.c_source import array
from arqsearch.export.matrix import NATIVE_ISAS, STRICT_FILE, comparison_pixels, verify_export
from arqsearch.export.onnx_fast import export_fast, run_fast
from arqsearch.export.onnx_strict import export_strict, run_strict
from arqsearch.integer import ops as O
from arqsearch.integer.native import compile_program
from arqsearch.integer.native.engine import native_available, native_problem
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.export.networks import (
    SIGMA,
    mobilenet_v2,
    noisy_images,
    small_net,
    smooth_images,
    trained_mobilenet_v2,
    trained_resnet20,
)
from tests.export.toolchains import Builds, need, required
from tests.integer.interpreter import interpret
from tests.integer.random_programs import random_pixels, random_program
from tests.quantize.nets import NETS

SEEDS = (0, 3, 8, 21)
#: Instruction sets of this kind of processor.
ISAS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
HOSTED = [name for name, chain in TOOLCHAINS.items() if not chain.on_board]
SETTINGS = SmoothingSettings(SIGMA, n0=100, n=1000, seed=7)


@dataclass
class Case:
    """A program, images and the reference's logits, and its C package."""

    program: IntegerProgram
    pixels: np.ndarray
    expected: np.ndarray
    package: Path


def case(program: IntegerProgram, pixels: np.ndarray, folder: Path, smoothing: SmoothingSettings | None = None) -> Case:
    package = export_c(program, folder, smoothing=smoothing).folder
    return Case(program, pixels, program.run(pixels, backend="torch").numpy(), package)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("builds"))


def sanitized(folder: Path, more: str = "") -> Builds:
    checks = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    return Builds(folder, f"-O1 -g0 -Werror {checks} {more}", checks)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Random programs, and lowered nets with smoothing tables."""
    folder = tmp_path_factory.mktemp("small")
    cases = {}
    for seed in SEEDS:
        program = random_program(seed)
        cases[f"random{seed}"] = case(program, random_pixels(program, seed), folder / f"random{seed}")
    for kind in NETS:
        program = small_net(kind)
        cases[kind.__name__] = case(program, comparison_pixels(program, 8), folder / kind.__name__, SETTINGS)
    return cases


SMALL = [f"random{seed}" for seed in SEEDS] + [kind.__name__ for kind in NETS]


@pytest.fixture(scope="module")
def resnet20(tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]) -> Case:
    program = trained_resnet20(shared_data)
    return case(program, noisy_images(smooth_images(4, (32, 32, 3), 5)), tmp_path_factory.mktemp("resnet20"))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Case:
    pixels = noisy_images(smooth_images(4, (32, 32, 3), 5))
    return case(mobilenet_v2(), pixels, tmp_path_factory.mktemp("mobilenet"))


@pytest.fixture(scope="module")
def mobilenet_trained(tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]) -> Case:
    pixels = noisy_images(smooth_images(1, (224, 224, 3), 5))
    return case(trained_mobilenet_v2(shared_data), pixels, tmp_path_factory.mktemp("mobilenet_trained"))


#: The large one goes through compilers and emulators in the slow tests only.
NETWORKS = ["resnet20", "mobilenet", "mobilenet_trained"]
NETWORKS_COMPILED = ["resnet20", "mobilenet", pytest.param("mobilenet_trained", marks=pytest.mark.slow)]


def run_native(program: IntegerProgram, isa: str, pixels: np.ndarray) -> np.ndarray:
    if required() and not native_available():
        pytest.fail(f"{native_problem()}; ARQSEARCH_REQUIRE_TOOLCHAINS=1 forbids to skip")
    try:
        return matrix._native(program, isa, pixels)
    except Unavailable as reason:
        pytest.skip(str(reason))


def run_package(builds: Builds, found: Case, label: str, name: str) -> np.ndarray:
    chain = need(name)
    folder = builds.build(found.package, chain, label)
    try:
        if not chain.emulator:
            # With static memory: the bound on prepared weights in model.h must hold.
            c_matrix.self_test(found.package, chain, folder)
        return c_matrix.run(found.package, chain, folder, found.pixels)
    except Unavailable as reason:
        pytest.skip(str(reason))


# ---- small programs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_interpreter(small: dict[str, Case], name: str) -> None:
    assert small[name].expected.tolist() == interpret(small[name].program, small[name].pixels)


@pytest.mark.parametrize("isa", ISAS)
def test_native_engine(small: dict[str, Case], isa: str) -> None:
    for found in small.values():
        assert np.array_equal(run_native(found.program, isa, found.pixels), found.expected)


@pytest.mark.parametrize("name", HOSTED)
def test_c_package(small: dict[str, Case], builds: Builds, name: str) -> None:
    """The example compares itself, smoothing included; `check` runs other images."""
    chain = need(name)
    for label, found in small.items():
        folder = builds.build(found.package, chain, label)
        try:
            c_matrix.self_test(found.package, chain, folder)
        except Unavailable as reason:
            pytest.skip(str(reason))
        assert np.array_equal(c_matrix.run(found.package, chain, folder, found.pixels), found.expected), label


def test_cortex_m3(small: dict[str, Case], builds: Builds) -> None:
    """Logits, smoothed prediction and certificate on a processor without a floating-point unit."""
    chain = need("Cortex-M3")
    for label, found in small.items():
        folder = builds.build(found.package, chain, label)
        logits = c_matrix.self_test(found.package, chain, folder)
        assert logits.shape[1] == found.program.num_classes and len(logits) > 2
        names = subprocess.run(
            ["arm-none-eabi-nm", folder / "cortex_m3.elf"], capture_output=True, text=True, check=True
        ).stdout
        symbols = {line.split()[-1] for line in names.splitlines()}
        assert {"arq_run", "main", "reset_handler"} <= symbols
        floating = ("__aeabi_f", "__aeabi_d", "__aeabi_i2", "__aeabi_ui2", "__aeabi_l2", "__aeabi_ul2", "__aeabi_cf",
                    "__aeabi_cd", "__aeabi_h")  # fmt: skip
        assert not {symbol for symbol in symbols if symbol.startswith(floating)}
        assert ("arq_certify" in symbols) == (not label.startswith("random"))


@pytest.mark.parametrize("name", SMALL)
def test_strict_onnx(small: dict[str, Case], name: str, tmp_path: Path) -> None:
    export_strict(small[name].program, tmp_path / STRICT_FILE)
    assert np.array_equal(run_strict(tmp_path / STRICT_FILE, small[name].pixels), small[name].expected)


@pytest.mark.parametrize("name", SMALL)
def test_fast_onnx(small: dict[str, Case], name: str, tmp_path: Path) -> None:
    export_fast(small[name].program, tmp_path / "fast.onnx")
    assert np.array_equal(run_fast(tmp_path / "fast.onnx", small[name].pixels), small[name].expected)


# The vector kernels take a minute to compile so; the tests of the runtime run them under the sanitizers, too.
@pytest.mark.parametrize(
    "isa", [isa if isa == "portable" else pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS]
)
def test_sanitizers_find_nothing(small: dict[str, Case], isa: str, tmp_path: Path) -> None:
    """AddressSanitizer and UBSan on the self-test, smoothing included, and on images at the ends of the range."""
    chain = dataclasses.replace(need("gcc portable"), isa=isa)
    builds = sanitized(tmp_path, "-DARQ_PORTABLE_ONLY" if isa == "portable" else "")
    for label in ("random0", "random8", "Residual", "Bottleneck"):
        found = small[label]
        folder = builds.build(found.package, chain, label)
        try:
            c_matrix.self_test(found.package, chain, folder)
        except Unavailable as reason:
            pytest.skip(str(reason))
        assert np.array_equal(c_matrix.run(found.package, chain, folder, found.pixels), found.expected), label


# ---- networks of the paper's size ------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("isa", ISAS)
def test_native_engine_on_a_network(network: str, isa: str, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(network)
    assert np.array_equal(run_native(found.program, isa, found.pixels), found.expected)


@pytest.mark.parametrize("network", NETWORKS_COMPILED)
@pytest.mark.parametrize("name", HOSTED)
def test_c_package_on_a_network(network: str, name: str, builds: Builds, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(network)
    assert np.array_equal(run_package(builds, found, network, name), found.expected)


def test_cortex_m3_on_a_trained_network(resnet20: Case, builds: Builds) -> None:
    chain = need("Cortex-M3")
    logits = c_matrix.self_test(resnet20.package, chain, builds.build(resnet20.package, chain, "resnet20"))
    assert logits.shape == (6, 10)


@pytest.mark.parametrize("network", NETWORKS)
def test_strict_onnx_on_a_network(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(network)
    export_strict(found.program, tmp_path / STRICT_FILE)
    assert np.array_equal(run_strict(tmp_path / STRICT_FILE, found.pixels), found.expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_fast_onnx_on_a_network(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(network)
    export_fast(found.program, tmp_path / "fast.onnx")
    assert np.array_equal(run_fast(tmp_path / "fast.onnx", found.pixels), found.expected)


@pytest.mark.slow
@pytest.mark.parametrize("network", ("resnet20", "mobilenet"))
def test_interpreter_on_a_network(network: str, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(network)
    assert found.expected[:1].tolist() == interpret(found.program, found.pixels[:1])


def test_reference_logits_of_a_network_vary(mobilenet: Case) -> None:
    """Equal logits would say little if all images gave the same ones."""
    assert len(np.unique(mobilenet.expected, axis=0)) == len(mobilenet.pixels)


def single_layer(out: int, kernel: tuple[int, int], channels: int, groups: int, bits: int) -> IntegerProgram:
    """Bytes from the image, one convolution, its codes as logits."""
    rng = np.random.default_rng(out)
    top = 2 ** (bits - 1) - 1
    weight = rng.integers(-top, top, size=(out, *kernel, channels // groups), endpoint=True).astype(np.int8)
    one, places = np.array([1]), np.array([7])
    ops = (
        O.InputQuantize((0,), 1, one, np.array([0]), 0, "half_up", 0, 255, 0, 255),
        O.Conv2d((1,), 2, weight, np.zeros(out, dtype=np.int32), (1, 1), (0, 0, 0, 0), groups),
        O.Requantize((2,), 3, one, places, "half_up", 0, 255),
        O.Flatten((3,), 4),
    )
    return IntegerProgram(ops, infer(ops, TensorSpec((*kernel, channels), 0, 255)), 4)


@pytest.mark.parametrize("name", ["gcc portable", "aarch64 NEON"])
def test_no_layer_needs_more_prepared_memory_than_the_header_states(
    small: dict[str, Case], builds: Builds, name: str, tmp_path: Path
) -> None:
    chain = need(name)
    layers = [
        (out, (k, k), out, out, bits) for out in (2, 7, 16, 17, 24, 31, 32, 33, 49, 64) for k, bits in ((1, 8), (3, 4))
    ]
    layers += [(out, (k, k), 5, 1, bits) for out in (1, 8, 9, 16, 17, 33) for k, bits in ((1, 8), (3, 4), (2, 8))]
    programs = [single_layer(*layer) for layer in layers]
    arrays = "\n".join(
        array(f"static const uint32_t words{i}[]", compile_program(program).words, unsigned=True)
        for i, program in enumerate(programs)
    )
    models = ", ".join(f"{{words{i}, sizeof words{i} / 4, {prepared_bound(p)}}}" for i, p in enumerate(programs))
    (tmp_path / "bounds.c").write_text(
        f"""#include "arq.h"
#include <stdio.h>
{arrays}
static const struct {{ const uint32_t *words; size_t count, bound; }} models[] = {{{models}}};
int main(void)
{{
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {{
        arq_model model;
        const arq_status status = arq_open(&model, models[i].words, models[i].count);
        size_t most = 0;
        for (int isa = ARQ_ISA_AVX2; isa <= ARQ_ISA_NEON; isa++) {{
            const size_t bytes = arq_prepared_bytes(&model, (arq_isa)isa);
            most = bytes > most ? bytes : most;
        }}
        printf("%d %zu %zu\\n", (int)status, most, models[i].bound);
    }}
    return 0;
}}
"""
    )
    found, binary = small["Residual"], tmp_path / "bounds"
    library = builds.build(found.package, chain, "Residual") / "libarq_network.a"
    flags = [*chain.ldflags.split(), f"-I{found.package}", "-o", binary]
    subprocess.run([chain.compiler, "-std=c99", tmp_path / "bounds.c", library, *flags], check=True)
    printed = subprocess.run([*chain.emulator, binary], capture_output=True, text=True, check=True).stdout
    lines = [tuple(map(int, line.split())) for line in printed.splitlines()]
    assert len(lines) == len(layers) and {status for status, _, _ in lines} == {0}
    for layer, (_, needed, bound) in zip(layers, lines, strict=True):
        assert needed <= bound, (layer, needed, bound)
    assert any(needed > bound // 2 for _, needed, bound in lines)


# ---- arqsearch verify EXPORT -----------------------------------------------------------------


@pytest.fixture
def exported(small: dict[str, Case], tmp_path: Path) -> Path:
    """An export folder outside any run."""
    found, folder = small["Residual"], tmp_path / "export"
    export_strict(found.program, folder / STRICT_FILE)
    export_fast(found.program, folder / "fast.onnx")
    shutil.copytree(found.package, folder / PACKAGE_DIR)
    found.program.save(folder / PROGRAM_FILE)
    return folder


def test_verify_prints_the_matrix_of_an_export_folder(
    exported: Path, small: dict[str, Case], builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_matrix, "build", builds.primed())
    found = verify_export(exported)
    assert found["verified"] is True and found["program"] == small["Residual"].program.hash
    rows = {row["backend"]: row for row in found["matrix"]}
    chains = {f"C package, {name}" for name in TOOLCHAINS}
    assert set(rows) == {
        "torch (reference)",
        "strict ONNX",
        "fast ONNX",
        *chains,
        *(f"native engine {isa}" for isa in NATIVE_ISAS),
    }
    assert all(row["result"] == "equal" or row["result"].startswith("not run: ") for row in rows.values())
    assert (rows["strict ONNX"]["images"], rows["strict ONNX"]["logits"]) == (16, 80)
    if c_matrix.missing(TOOLCHAINS["gcc portable"]) is None:
        assert rows["C package, gcc portable"] == {
            "backend": "C package, gcc portable", "images": 16, "logits": 80, "result": "equal"
        }  # fmt: skip


def test_verify_takes_a_package_or_an_onnx_file_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_matrix, "TOOLCHAINS", {})
    package = {row["backend"] for row in verify_export(exported / PACKAGE_DIR)["matrix"]}
    assert "strict ONNX" not in package
    assert "strict ONNX" in {row["backend"] for row in verify_export(exported / STRICT_FILE)["matrix"]}


def test_verify_finds_an_altered_weight_in_the_package(
    exported: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gcc portable"
    monkeypatch.setattr(c_matrix, "build", builds.primed())
    monkeypatch.setattr(c_matrix, "TOOLCHAINS", {name: need(name)})
    model = exported / PACKAGE_DIR / "model.c"
    words = model.read_text().split(", ")
    words[len(words) // 2] = hex(int(words[len(words) // 2].strip("u\n "), 16) ^ 1) + "u"
    model.write_text(", ".join(words))
    with pytest.raises(ArqError, match=r"does not hold:\n  C package, gcc portable: .*self-test"):
        verify_export(exported)


def test_verify_finds_an_onnx_of_another_program(exported: Path, small: dict[str, Case]) -> None:
    export_strict(small["Plain"].program, exported / STRICT_FILE)
    with pytest.raises(ArqError, match=f"strict ONNX: .*states program {small['Plain'].program.hash}"):
        verify_export(exported / STRICT_FILE)


def test_verify_refuses_a_damaged_or_foreign_onnx_file(exported: Path) -> None:
    (exported / "other.onnx").write_bytes(b"no model")
    with pytest.raises(ArqError, match=r"other\.onnx is no ONNX model"):
        verify_export(exported)
    with pytest.raises(ArqError, match=r"No ONNX model at .*absent\.onnx"):
        verify_export(exported / "absent.onnx")


def test_verify_without_the_program_says_where_it_is(exported: Path) -> None:
    (exported / PROGRAM_FILE).unlink()
    shutil.rmtree(exported / PACKAGE_DIR)
    with pytest.raises(ArqError, match=r"has no program\.safetensors beside it"):
        verify_export(exported)


@pytest.mark.parametrize(("limit", "value"), [("EMULATED_MACS", {"qemu-system-arm": 1}), ("BOARD_BYTES", 1000)])
def test_a_network_too_large_for_the_board_is_not_run(
    small: dict[str, Case], limit: str, value: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix if limit == "EMULATED_MACS" else c_matrix, limit, value)
    found = small["Residual"]
    chain = TOOLCHAINS["Cortex-M3"]
    row = matrix.package_row(found.program, found.package, chain, tmp_path, found.pixels, found.expected)
    assert not row.ran and re.match(r"not run: .*(too long in qemu-system-arm|does not fit)", row.result)


def test_missing_programs_are_named_by_their_debian_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert c_matrix.missing(TOOLCHAINS["aarch64 NEON"]) == (
        "install make gcc-aarch64-linux-gnu qemu-user (Debian packages)"
    )
    assert "gcc-arm-none-eabi qemu-system-arm" in str(c_matrix.missing(TOOLCHAINS["Cortex-M3"]))
    with pytest.raises(Unavailable, match="install"):
        c_matrix.build(Path(), TOOLCHAINS["clang"], Path())
