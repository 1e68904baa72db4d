"""The one exception type for what a user can mend, and the nearest-valid-choice helper."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArqError(Exception):
    """A problem the user can fix: the message says what, where, and the fix."""


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest choice, or the list of choices.

    :param value: what was given.
    :param choices: what is accepted.
    """
    options = sorted(choices)
    match = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    if match:
        return f"Did you mean {match[0]!r}?"
    return f"Valid choices: {', '.join(options)}." if options else ""
