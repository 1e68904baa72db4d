"""The files of the C99 package: what they state, that they build without warnings, and that the self-test can fail."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from arqsearch.certify.binomial import accepts, certified_radius, minimal_count
from arqsearch.certify.noise import NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.smoothing import SmoothingSettings, first_argmax, total_distance
from arqsearch.errors import ArqError
from arqsearch.export import c_matrix
from arqsearch.export.c_matrix import TOOLCHAINS
from arqsearch.export.c_package import COPIED, KERNELS, PROGRAM_FILE, export_c, macs, package_defines, package_sizes
from arqsearch.export.c_smoothing import ABSTAIN, RADII_A_SIGMA, certifier, predictor, smoothed_vector
from arqsearch.export.c_source import array, number
from arqsearch.integer.native import compile_program
from arqsearch.integer.program import IntegerProgram
from tests.export.networks import SIGMA, small_net, smooth_images
from tests.export.toolchains import Builds, need, need_program
from tests.integer.random_programs import random_program
from tests.quantize.nets import Residual

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = SmoothingSettings(SIGMA, n0=50, n=400, seed=2**63 + 5)
#: A build without vector kernels takes a second.
PORTABLE = "-O1 -Werror -DARQ_PORTABLE_ONLY"


@pytest.fixture(scope="module")
def program() -> IntegerProgram:
    return small_net(Residual)


@pytest.fixture(scope="module")
def package(program: IntegerProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = smooth_images(3, (8, 8, 2))
    folder = tmp_path_factory.mktemp("package")
    return export_c(program, folder, smoothing=SETTINGS, images=images, image_ids=[7, 9, 2**32 - 1]).folder


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("builds"), PORTABLE)


def numbers(text: str, name: str) -> list[int]:
    """The values of a C array."""
    body = re.search(rf"\b{name}(?:\[\w*\])+ = \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None, name
    return [int(value.strip("u"), 0) for value in re.findall(r"-?\w+", body[1])]


# ---- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3, 0.499])
def test_predictor_is_the_exact_two_sided_binomial_test(alpha: float) -> None:
    table = predictor(120, alpha).minimum
    assert len(table) == 121
    for m in range(121):
        tails = {k: Fraction(2 * sum(comb(m, i) for i in range(k, m + 1)), 2**m) for k in range(m // 2 + 1, m + 1)}
        passing = [k for k, tail in tails.items() if tail <= Fraction(str(alpha))]
        assert table[m] == min(passing, default=m + 1)


def test_predictor_agrees_with_scipy() -> None:
    from scipy.stats import binomtest

    table = predictor(1000, 0.001).minimum
    for m in (11, 12, 100, 999, 1000):
        assert binomtest(table[m], m, 0.5).pvalue <= 0.001 < binomtest(table[m] - 1, m, 0.5).pvalue


def test_predictor_refuses_a_table_that_is_too_long() -> None:
    with pytest.raises(ArqError, match=r"choose 1\.\.10000"):
        predictor(10_001, 0.001)


@pytest.mark.parametrize(("n", "sigma"), [(40, 0.25), (1000, 0.5), (100_000, 0.12)])
def test_certifier_reaches_as_far_as_the_votes_can(n: int, sigma: float) -> None:
    table = certifier(10, n, sigma, 0.001, 3072)
    d_tau = total_distance(sigma, 3072)
    steps = np.diff(table.radius_micro)
    assert table.radius_micro[0] == 0 and set(steps) == {round(sigma * 1e6 / RADII_A_SIGMA)}
    assert list(table.counts) == [minimal_count(n, r / 1e6, sigma, 0.001, d_tau) for r in table.radius_micro]
    assert table.counts[-1] <= n and list(table.counts) == sorted(table.counts)
    beyond = (table.radius_micro[-1] + int(steps[0])) / 1e6
    assert minimal_count(n, beyond, sigma, 0.001, d_tau) == n + 1


def test_radius_of_the_table_is_certified_and_the_next_one_is_not() -> None:
    table = certifier(10, 500, SIGMA, 0.001, 128)
    d_tau = total_distance(SIGMA, 128)
    for votes in range(501):
        exact, found = certified_radius(votes, 500, SIGMA, 0.001, d_tau), table.radius(votes)
        assert (exact is None) == (found is None)
        if exact is not None and found is not None:
            step = table.radius_micro[1]
            assert found <= int(exact * 1_000_000) < found + step
            assert accepts(votes, 500, exact, SIGMA, 0.001, d_tau)


def test_smoothed_vector_is_what_certify_image_says(program: IntegerProgram) -> None:
    few = dataclasses.replace(SETTINGS, n0=12, n=40)
    image = smooth_images(1, (8, 8, 2))[0]
    vector = smoothed_vector(program, few, image, 7)
    line = certify_image(
        lambda pixels: first_argmax(program.run(pixels, backend="torch")), image, 7, None, few, program="", data=""
    )
    assert {k: v for k, v in enumerate(vector.predict_votes) if v} == line.selection
    assert {k: v for k, v in enumerate(vector.certify_votes) if v} == line.estimate
    assert vector.selected == line.predicted
    assert vector.certified == (line.predicted if line.certified else ABSTAIN)
    assert 0 <= line.radius * 1e6 - vector.radius_micro < 1e6 * SIGMA / RADII_A_SIGMA


# ---- files -----------------------------------------------------------------------------------


def test_kernels_and_templates_are_copied_unchanged(package: Path) -> None:
    kernels = sorted([*KERNELS.glob("arq*.c"), *KERNELS.glob("arq*.h")])
    assert {"arq.h", "arq_model.c", "arq_smoothing.c"} <= {path.name for path in kernels}
    for path in kernels:
        assert (package / path.name).read_bytes() == path.read_bytes()
    assert not (package / "_native.c").exists()
    assert all((package / name).is_file() for name in COPIED)
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_model_header_and_words_are_those_of_the_compiled_program(package: Path, program: IntegerProgram) -> None:
    compiled, stated = compile_program(program), package_defines(package)
    assert stated == {
        "WORDS": len(compiled.words), "HEIGHT": 8, "WIDTH": 8, "CHANNELS": 2, "PIXELS": 128,
        "PIXEL_LO": program.input.lo, "PIXEL_HI": program.input.hi, "CLASSES": 5,
        "ARENA_BYTES": compiled.arena_bytes, "PREPARED_BYTES": stated["PREPARED_BYTES"], "SMOOTHING": 1,
    }  # fmt: skip
    assert numbers((package / "model.c").read_text(), "arq_network_words") == compiled.words.tolist()
    assert all(program.hash in (package / name).read_text() for name in ("model.h", "model.c", "README.md"))
    assert IntegerProgram.load(package / PROGRAM_FILE).hash == program.hash


def test_noise_thresholds_are_those_of_the_table(package: Path) -> None:
    text, table = (package / "smoothing.c").read_text(), NoiseTable.for_sigma(SIGMA)
    high, low = numbers(text, "threshold_high"), numbers(text, "threshold_low")
    assert tuple(h << 32 | b for h, b in zip(high, low, strict=True)) == table.thresholds[:-1]
    assert f"{{threshold_high, threshold_low, {len(high)}u, {table.lo}, NULL}}" in text
    assert f"UINT64_C({2**63 + 5}), 50u, 400u" in text


def test_vectors_hold_the_reference_logits(package: Path, program: IntegerProgram) -> None:
    text = (package / "test_vectors.c").read_text()
    pixels = np.array(numbers(text, "arq_test_pixels")).reshape(-1, 8, 8, 2)
    assert len(pixels) == 5 and pixels.min() == program.input.lo and pixels.max() == program.input.hi
    expected = program.run(pixels, backend="torch").numpy()
    assert numbers(text, "arq_test_logits") == expected.ravel().tolist()
    assert numbers(text, "arq_test_image") == smooth_images(3, (8, 8, 2))[0].ravel().tolist()


def test_readme_is_filled_in(package: Path, program: IntegerProgram) -> None:
    text = (package / "README.md").read_text()
    assert not re.search(r"@[A-Z_]+@", text)
    assert f"{compile_program(program).arena_bytes} bytes" in text and "arq_certify" in text


def test_same_export_gives_the_same_bytes_and_replaces_an_older_one(program: IntegerProgram, tmp_path: Path) -> None:
    first = export_c(program, tmp_path / "first", smoothing=SETTINGS)
    (tmp_path / "second").mkdir()
    again = export_c(program, tmp_path / "second", smoothing=SETTINGS)
    assert [p.relative_to(first.folder) for p in first.files] == [p.relative_to(again.folder) for p in again.files]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first.files, again.files, strict=True))
    (again.folder / "arq_old_kernel.c").write_text("")
    (again.folder / "mine.c").write_text("")
    plain = export_c(program, again.folder)
    left = {p.relative_to(again.folder) for p in again.folder.rglob("*") if p.is_file()}
    assert left == {p.relative_to(again.folder) for p in plain.files} | {Path("mine.c")}
    assert package_defines(plain.folder)["SMOOTHING"] == 0


def test_export_refuses_noise_beyond_the_proofs_and_wrong_images(program: IntegerProgram, tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="noise_limit"):
        export_c(program, tmp_path, smoothing=SmoothingSettings(1.0))
    with pytest.raises(ArqError, match="expected uint8"):
        export_c(program, tmp_path, images=np.zeros((1, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_sources_hold_no_floating_point_and_no_allocation(package: Path) -> None:
    library = [*package.glob("arq*.[ch]"), *package.glob("model.[ch]"), *package.glob("smoothing.[ch]")]
    for path in [*library, *package.glob("cortex_m3/*.[ch]"), package / "main.c"]:
        code = re.sub(r"/\*.*?\*/|//[^\n]*|\"[^\"\n]*\"", " ", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(float|double|malloc|calloc|realloc|free|alloca|math\.h)\b|\b\d+\.\d*", code), (
            path.name
        )


def test_arrays_of_every_width_read_back() -> None:
    for values in ([0], [-(2**31), 2**31 - 1, -1], list(range(-40, 40))):
        text = array("const int32_t a[]", values)
        assert [eval(value) for value in re.findall(r"\(-2147483647 - 1\)|-?\d+", text.split("=")[1])] == values
        assert max(map(len, text.splitlines())) <= 120
    assert number(-(2**31)) == "(-2147483647 - 1)"


def test_multiply_accumulates_are_those_of_the_layers(program: IntegerProgram) -> None:
    # stem 8·8·4·9·2, conv1 4·4·8·9·4, conv2 4·4·8·9·8, head 8·6, out 6·5
    assert macs(program) == 4608 + 4608 + 9216 + 48 + 30


def test_package_sizes_state_what_a_device_needs(package: Path, program: IntegerProgram) -> None:
    need("gcc portable")
    found = package_sizes(package)
    compiled = compile_program(program)
    assert found["arena bytes"] == compiled.arena_bytes
    assert found["weights alone, packed, bytes"] == compiled.weight_bytes
    assert re.search(r"\d{5} \(this machine\)", str(found["code bytes"]))


# ---- builds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gcc portable", "clang", "aarch64 portable"])
def test_build_without_vector_kernels(package: Path, builds: Builds, name: str) -> None:
    chain = dataclasses.replace(need(name), isa="auto")
    folder = builds.build(package, chain, "package")
    assert len(c_matrix.self_test(package, chain, folder)) == 5
    done = subprocess.run([*chain.emulator, folder / "check", "avx2", "a", "b"], capture_output=True, text=True)
    assert done.returncode == 3 and "instruction" in done.stderr


def test_cmake_builds_and_tests_the_package(package: Path, tmp_path: Path) -> None:
    cmake, ctest = need_program("cmake", "cmake"), need_program("ctest", "cmake")
    need("gcc portable")
    for command in (
        [cmake, "-S", package, "-B", tmp_path, "-DARQ_PORTABLE_ONLY=ON", "-DCMAKE_C_FLAGS=-Werror"],
        [cmake, "--build", tmp_path],
        [ctest, "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed, 0 tests failed out of 2" in done.stdout


def test_headers_are_usable_from_cpp(package: Path, tmp_path: Path) -> None:
    compiler = need_program("g++", "g++")
    names = ("arq.h", "arq_smoothing.h", "model.h", "smoothing.h", "test_vectors.h")
    (tmp_path / "all.cpp").write_text("".join(f'#include "{name}"\n' for name in names))
    command = [
        compiler,
        "-std=c++11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{package}",
        tmp_path / "all.cpp",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["arq_test_logits", "arq_test_certify_votes", "arq_test_predicted"])
def test_self_test_sees_one_wrong_number(package: Path, builds: Builds, name: str, tmp_path: Path) -> None:
    chain = need("gcc portable")
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    vectors = copy / "test_vectors.c"
    text = vectors.read_text()
    place = re.search(rf"\b{name}\b[^=]*= \D*?(-?\d+)", text)
    assert place is not None
    vectors.write_text(text[: place.start(1)] + str(int(place[1]) - 1 if int(place[1]) else 1) + text[place.end(1) :])
    folder = builds.build(copy, chain, name)
    with pytest.raises(ArqError, match=r"self-test of .* failed(.|\n)*DIFFERENT(.|\n)*NOT EQUAL"):
        c_matrix.self_test(copy, chain, folder)


def test_check_refuses_pixels_beyond_the_range_and_part_of_an_image(
    package: Path, builds: Builds, program: IntegerProgram, tmp_path: Path
) -> None:
    chain = need("gcc portable")
    folder = builds.build(package, chain, "package")
    pixels = np.zeros((1, 8, 8, 2), np.int16)
    pixels[0, 7, 7, 1] = program.input.hi + 1
    with pytest.raises(ArqError, match="range"):
        c_matrix.run(package, chain, folder, pixels)
    with pytest.raises(ArqError, match="does not fit"):
        c_matrix.run(package, chain, folder, pixels[:, :7])
    for arguments in ([], ["portable", "a"], ["sse", "a", "b"]):
        assert subprocess.run([folder / "check", *arguments], capture_output=True).returncode == 2


def test_build_that_fails_shows_the_words_of_the_compiler(package: Path, tmp_path: Path) -> None:
    chain = need("gcc portable")
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    (copy / "model.c").write_text("no C\n")
    with pytest.raises(ArqError, match=r"gcc portable: building .* failed(.|\n)*model\.c"):
        c_matrix.build(copy, chain, tmp_path / "build", cflags=PORTABLE)


def test_a_program_without_smoothing_builds(builds: Builds, tmp_path: Path) -> None:
    chain = TOOLCHAINS["gcc portable"]
    need(chain.name)
    package = export_c(random_program(5), tmp_path / "package").folder
    assert not (package / "smoothing.c").exists()
    assert len(c_matrix.self_test(package, chain, builds.build(package, chain, "random"))) > 2
