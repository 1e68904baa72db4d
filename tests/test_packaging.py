"""What is installed: three linked folders as packages of arqsearch, the data files, and a light import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "arqsearch" / "integer" / "native" / "csrc"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)
HEAVY = ("torch", "pandas", "onnx", "onnxruntime", "matplotlib", "stable_baselines3", "gymnasium")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is built from."""
    source = tmp_path_factory.mktemp("package") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("arqsearch", "envs", "policies", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    return source


def build(source: Path, target: Path, *options: str, **environment: str) -> str:
    """Build distributions into a folder; returns what the build said."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(source: Path) -> Path:
    """A folder with the wheel and the sdist."""
    folder = source.parent / "distributions"
    build(source, folder)
    return folder


@pytest.fixture(scope="module")
def archives(distributions: Path) -> tuple[set[str], set[str]]:
    """File names in the wheel and in the sdist, built from a copy of the tree."""
    paths = next(distributions.glob("*.whl")), next(distributions.glob("*.tar.gz"))
    with zipfile.ZipFile(paths[0]) as wheel, tarfile.open(paths[1]) as sdist:
        return set(wheel.namelist()), {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}


def test_every_module_is_in_wheel_and_sdist_under_its_installed_name(archives: tuple[set[str], set[str]]) -> None:
    modules = {
        f"arqsearch/{path.relative_to(ROOT)}"
        for d in ("envs", "policies", "benchmarks")
        for path in ROOT.glob(f"{d}/**/*.py")
    }
    modules |= {str(path.relative_to(ROOT)) for path in ROOT.glob("arqsearch/**/*.py")}
    assert "arqsearch/envs/evaluator.py" in modules
    for names in archives:
        assert modules <= names
        assert not [name for name in names if re.match(r"(envs|policies|benchmarks)(/|$)", name)]


def test_data_files_are_in_the_wheel(archives: tuple[set[str], set[str]]) -> None:
    wanted = {
        "arqsearch/py.typed",
        "arqsearch/report/templates/report.css",
        "arqsearch/report/templates/report.html.j2",
    }
    patterns = ("arqsearch/recipes/*.yaml", "policies/zoo/*.yml", "arqsearch/export/c_templates/**/*")
    for pattern in patterns:
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()]
        assert found, pattern
        wanted |= {name if name.startswith("arqsearch/") else f"arqsearch/{name}" for name in found}
    assert wanted <= archives[0]


def test_the_c_sources_are_in_both_and_all_are_compiled(archives: tuple[set[str], set[str]]) -> None:
    c_files = {path.relative_to(ROOT).as_posix() for path in CSRC.glob("*.[ch]")}
    assert {CSRC.relative_to(ROOT).as_posix() + name for name in ("/arq.h", "/arq_smoothing.c")} <= c_files
    assert c_files <= archives[1]
    assert {name for name in c_files if Path(name).name.startswith("arq")} <= archives[0]
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert sorted(extension["sources"]) == sorted(name for name in c_files if name.endswith(".c"))


@needs_compiler
def test_the_wheel_holds_the_extension_for_every_python_from_3_11_on(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "arqsearch/integer/native/_native.abi3.so" in archive.namelist()


FALLBACK = """
import warnings
from arqsearch.integer.native.engine import native_available
import arqsearch
from tests.integer.random_programs import random_pixels, random_program
program = random_program(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logits = program.run(random_pixels(program, 1))
print(arqsearch.__file__, native_available(), len(logits), *[entry.message for entry in caught], sep="\\n")
"""


def test_without_a_compiler_it_installs_and_runs_on_torch(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    build(copy, tmp_path, "--wheel", CC="false")
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # The installed package first; the tests from the repository, whose own arqsearch is hidden behind it.
    environment = dict(os.environ) | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    environment.pop("ARQSEARCH_BACKEND", None)
    command = [sys.executable, "-c", FALLBACK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    where, available, images, *messages = done.stdout.splitlines()
    assert where.startswith(str(site)) and (available, images) == ("False", "5")
    assert len(messages) == 1 and "C compiler" in messages[0] and "ARQSEARCH_BACKEND=torch" in messages[0]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, arqsearch; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_lazy_names_resolve_and_unknown_ones_do_not() -> None:
    import arqsearch
    from arqsearch.quantize.bitwidths import BitWidths

    assert arqsearch.BitWidths is BitWidths
    assert set(arqsearch.__all__) <= set(dir(arqsearch))
    with pytest.raises(AttributeError, match="Bitwidth"):
        arqsearch.Bitwidth  # noqa: B018


def test_pins_cover_the_dependencies_and_the_citation_names_the_version() -> None:
    import arqsearch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if "==" in line}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.split(r"[<>=!~\[]", requirement)[0].lower() in pinned
    assert "torch==2.13.0" in lines
    assert f"version: {arqsearch.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()
