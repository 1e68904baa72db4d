"""The options of `arqsearch search` and `run` that stand for keys of the recipe's section `search`."""

from __future__ import annotations

import json
from typing import Any

from arqsearch.errors import ArqError


def with_options(
    overrides: list[str] | None, bits: str | None, freeze: list[str] | None, group: list[str] | None,
    require: str | None, objectives: str | None,
) -> list[str]:  # fmt: skip
    """Overrides of a recipe, and the options of a search as such; None leaves the recipe's value.

    :param overrides: ``section.key=value``.
    :param bits: ``2,4,8``.
    :param freeze: ``LAYER=W,A`` each.
    :param group: ``A,B`` each.
    :param require: a floor, see docs/budgets.md.
    :param objectives: ``bops,certified``.
    :raises ArqError: when one is not of its form.
    """
    found: dict[str, Any] = {}
    if bits is not None:
        found["bits"] = _numbers(bits, f"--bits {bits!r}", "--bits 2,4,8")
    if freeze:
        found["freeze"] = {}
        for entry in freeze:
            name, separator, pair = entry.partition("=")
            if not separator:
                raise ArqError(f"--freeze {entry!r} is not understood; write --freeze layer=8,8.")
            found["freeze"][name] = _numbers(pair, f"--freeze {entry!r}", "--freeze layer=8,8")
    if group:
        found["group"] = [_names(entry) for entry in group]
    if require is not None:
        found["require"] = require
    if objectives is not None:
        found["objectives"] = _names(objectives)
    return [*(overrides or []), *(f"search.{key}={json.dumps(value)}" for key, value in found.items())]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, what: str, form: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ArqError(f"{what} is not understood; write {form}.") from error
