"""README and docs say what is there: links resolve, commands exist, the tables of rooms and ops match the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from arqsearch.cli import app
from arqsearch.recipe import RECIPES, load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
#: Arguments that stand for the reader's own, in capitals, and files that earlier commands make.
PLACEHOLDER = re.compile(r"[A-Z_]+|runs/[\w-]+|(recipe|other)\.yaml|config\.json")


def code_of(text: str) -> list[str]:
    """Every piece of code of a page: spans in backticks, and the lines of indented and fenced blocks."""
    pieces, fenced, prose = [], False, []
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            pieces.append(line.strip())
        else:
            prose.append(line)
    spans = re.findall(r"`([^`]+)`", "\n".join(prose))
    return [*pieces, *(" ".join(span.split()) for span in spans)]


def commands_of(text: str, program: str) -> list[list[str]]:
    """Calls of a program on a page, as words behind its name; variables set before it are left out."""
    found = []
    for piece in code_of(text):
        words = piece.split("  #")[0].split(" # ")[0]
        match = re.match(rf"(?:[A-Z_]+=\S+ )*{program} (.+)", words)
        if match:
            found.append(shlex.split(match[1]))
    return found


def slug(heading: str) -> str:
    """Anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in {slug(line.lstrip("# ")) for line in path.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_exist_with_their_options_and_recipe_keys(page: Path) -> None:
    group = typer.main.get_command(app)
    commands = getattr(group, "commands")  # noqa: B009
    for name, *arguments in commands_of(page.read_text(), "arqsearch"):
        shown = f"arqsearch {name} {' '.join(arguments)}"
        if name.startswith("-"):
            assert name == "--help", shown
            continue
        assert name in commands, shown
        command = commands[name]
        while hasattr(command, "commands") and arguments:
            assert arguments[0] in command.commands, shown
            command, *arguments = command.commands[arguments[0]], *arguments[1:]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        assert {word for word in arguments if word.startswith("-")} <= options, shown
        if name in {"run", "train", "search", "certify"}:
            positional = [word for word in arguments if not word.startswith("-")]
            recipe = positional[0] if positional else "digits"
            assert PLACEHOLDER.fullmatch(recipe) or (RECIPES / f"{recipe}.yaml").is_file() or (ROOT / recipe).is_file()
            load_recipe("digits" if PLACEHOLDER.fullmatch(recipe) else recipe, positional[1:])


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_make_targets_and_modules_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for target, *_ in commands_of(text, "make"):
        assert target in targets or "=" in target, f"{page.name}: make {target}"
    for module, *_ in commands_of(text, "python -m"):
        assert importlib.util.find_spec(module) is not None, f"{page.name}: python -m {module}"


def test_readme_names_every_command_and_packaged_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    shown = {name for name, *_ in commands_of(text, "arqsearch")}
    assert set(getattr(typer.main.get_command(app), "commands")) <= shown  # noqa: B009
    assert all(f"`{path.stem}`" in text for path in RECIPES.glob("*.yaml"))


def test_the_model_of_the_readme_becomes_an_integer_program() -> None:
    import numpy as np
    import torch

    from arqsearch.integer.lowering import lower
    from arqsearch.quantize.network import QuantizedNet, QuantizeSettings

    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert source is not None
    scope: dict[str, object] = {}
    exec(source[1], scope)
    build = scope["small"]
    assert callable(build)
    net = QuantizedNet(build(num_classes=10), (1, 8, 8), [0.5], [0.25], QuantizeSettings("clip"))
    net.calibrate([torch.randint(0, 256, (8, 1, 8, 8)).float()])
    assert lower(net.eval()).run(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 10)


def imports_of(module: Path, room: str) -> set[str]:
    """Rooms of ours that a module imports, its own and `errors` left out."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"arqsearch.{a.name}" for a in node.names] if node.module == "arqsearch" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("arqsearch.")}
    return found - {room, "errors", "__version__"}


def test_rooms_import_what_the_architecture_says() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    stated = {}
    for room, imports in re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", section, re.MULTILINE):
        stated[room] = set(re.findall(r"`(\w+)`", imports))
    package = ROOT / "arqsearch"
    rooms = {path.stem: [path] for path in package.glob("*.py") if path.stem not in {"__init__", "errors"}}
    rooms |= {path.name: sorted(path.glob("*.py")) for path in package.iterdir() if (path / "__init__.py").is_file()}
    found = {room: {name for path in paths for name in imports_of(path, room)} for room, paths in rooms.items()}
    assert stated == found


def test_integer_arithmetic_names_every_op_and_this_version() -> None:
    from arqsearch.integer import ops
    from arqsearch.integer.program import ARITHMETIC_VERSION

    text = (ROOT / "docs" / "integer-arithmetic.md").read_text()
    assert text.startswith(f"# The integer arithmetic, version {ARITHMETIC_VERSION}\n")
    assert re.findall(r"^\| (\w+2?d?) \|", text.split("## Ops")[1].split("**Rounding**")[0], re.MULTILINE)[1:] == [
        op.__name__ for op in ops.OPS
    ]


def test_search_page_names_every_policy() -> None:
    from arqsearch.policies.registry import available

    section = (ROOT / "docs" / "search.md").read_text().split("## Policies")[1].split("\n\nHyper")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(available())
