"""Put a trained network into the zoo, for maintainers: ``python -m arqsearch.zoo.add FILE NAME --recipe ...``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram
from arqsearch.zoo import FOLDER, INDEX, Entry, entries, file_sha256


def add(
    source: Path, name: str, model: str, data: str, recipe: str, sigma: float | None, measured: dict[str, str]
) -> Entry:
    """Copy a file into the package and list it; an entry of the same name is replaced.

    :param source: integer program, or float weights of a base (safetensors).
    :param measured: figure → value and how it was measured.
    :raises ArqError: when the file is neither.
    """
    kind: Literal["base", "program"]
    try:
        kind, program_hash = "program", IntegerProgram.load(source).hash
    except ArqError:
        kind, program_hash = "base", None
        if source.suffix != ".safetensors" or not source.is_file():
            raise
    file = f"{name}.safetensors"
    if source.resolve() != (FOLDER / file).resolve():
        shutil.copyfile(source, FOLDER / file)
    entry = Entry(
        name=name, kind=kind, file=file, sha256=file_sha256(FOLDER / file), model=model, data=data, sigma=sigma,
        recipe=recipe, program_hash=program_hash, measured=measured,
    )  # fmt: skip
    kept = [old for old in entries() if old.name != name]
    listed = [item.model_dump(exclude_none=True) for item in sorted([*kept, entry], key=lambda item: item.name)]
    INDEX.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    entries.cache_clear()
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m arqsearch.zoo.add", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("--model", required=True, help="registered name of the network")
    parser.add_argument("--data", required=True, help="what it was trained on")
    parser.add_argument("--recipe", required=True, help="packaged recipe that makes it")
    parser.add_argument("--sigma", type=float, help="noise level of its training, in [0,1] pixels")
    parser.add_argument("--measured", action="append", default=[], metavar="FIGURE=VALUE", help="repeat for several")
    given = parser.parse_args(arguments)
    measured = dict(item.split("=", 1) for item in given.measured)
    print(add(given.file, given.name, given.model, given.data, given.recipe, given.sigma, measured).model_dump_json())


if __name__ == "__main__":
    main()
