"""Trained networks that come with the package: float bases, and integer programs ready to certify or export.

``index.json`` says what each file is, how it was made and what was measured; the files lie beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from arqsearch.errors import ArqError, nearest

#: Written before a name wherever a file is expected: ``model.weights=zoo:NAME``.
PREFIX = "zoo:"
FOLDER = Path(__file__).parent
INDEX = FOLDER / "index.json"


class Entry(BaseModel):
    """One network of the zoo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["base", "program"] = Field(description="float weights of a base, or an integer program")
    file: str = Field(description="file name in the folder of the index")
    sha256: str
    model: str = Field(description="registered name of the network")
    data: str = Field(description="what it was trained on")
    sigma: float | None = Field(None, description="noise level of its training, in [0,1] pixels")
    recipe: str = Field(description="packaged recipe that makes it, or how it was made")
    program_hash: str | None = Field(None, description="of an integer program")
    measured: dict[str, str] = Field(default_factory=dict, description="figure → value and how it was measured")

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return FOLDER / self.file


@cache
def entries() -> tuple[Entry, ...]:
    """Everything in the zoo, by name."""
    if not INDEX.is_file():
        return ()
    listed = [Entry.model_validate(item) for item in json.loads(INDEX.read_text(encoding="utf-8"))]
    return tuple(sorted(listed, key=lambda entry: entry.name))


def find(name: str, kind: Literal["base", "program"] | None = None) -> Entry:
    """The entry of a name, with or without ``zoo:`` before it.

    :param kind: what it has to be.
    :raises ArqError: when there is none of that name and kind, or its file was altered.
    """
    wanted = name.removeprefix(PREFIX)
    known = {entry.name: entry for entry in entries() if kind in (None, entry.kind)}
    if wanted not in known:
        what = {"base": "base weights", "program": "integer program", None: "network"}[kind]
        hint = nearest(wanted, known) if known else "It has none."
        raise ArqError(f"The zoo has no {what} named {wanted!r}. {hint} `arqsearch zoo list` shows all.")
    entry = known[wanted]
    if not entry.path.is_file():
        raise ArqError(f"{entry.path} is missing; install arqsearch again.")
    if file_sha256(entry.path) != entry.sha256:
        raise ArqError(f"{entry.path} was altered: its SHA-256 is not the index's; install arqsearch again.")
    return entry


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resolve(target: str | Path, kind: Literal["base", "program"]) -> Path:
    """A path as it is; ``zoo:NAME`` becomes the path of the zoo's file.

    :param kind: what is expected there.
    """
    text = str(target)
    return find(text, kind).path if text.startswith(PREFIX) else Path(target)


def get(name: str, output: Path | None = None) -> Path:
    """Copy a network's file out of the package.

    :param output: file or folder; default: the current folder.
    :returns: the copy.
    :raises ArqError: when there is no such network, or another file is in the way.
    """
    entry = find(name)
    place = Path() if output is None else output
    path = place / entry.file if place.is_dir() or not place.suffix else place
    if path.is_file() and file_sha256(path) != entry.sha256:
        raise ArqError(f"{path} exists and is another file; give another --output, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(entry.path, path)
    return path
