"""One finished tiny run for every test of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.search.tiny import tiny_recipe


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with every artefact; not to be changed."""
    from arqsearch.search import pipeline

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pipeline.run(tiny_recipe(folder), silent)
    return folder


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))
