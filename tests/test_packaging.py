"""What is installed: three linked folders as packages of arqsearch, the data files, and a light import."""

from __future__ import annotations

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
HEAVY = ("torch", "pandas", "onnx", "onnxruntime", "matplotlib", "stable_baselines3", "gymnasium")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """File names in the wheel and in the sdist, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("arqsearch", "envs", "policies", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
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
    patterns = ("arqsearch/recipes/*.yaml", "policies/zoo/*.yml", "arqsearch/export/schemas/*.json")
    for pattern in patterns:
        found = (path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
        wanted |= {name if name.startswith("arqsearch/") else f"arqsearch/{name}" for name in found}
    assert wanted <= archives[0]


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
