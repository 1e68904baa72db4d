"""C source text: integer arrays, structure constants and header files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_COLUMNS = 116
_INT32_MIN = -(2**31)


def array(declaration: str, values: Any, *, unsigned: bool = False) -> str:
    """``declaration = {values};`` with lines of at most 120 columns.

    :param declaration: type, name and dimension, such as ``const int32_t a[3]``.
    :param values: integers; two dimensions become nested braces.
    :param unsigned: 32-bit values as hexadecimal.
    """
    nested = np.asarray(values)
    if nested.ndim == 2:
        rows = ",\n".join(f"    {{\n{_lines(row, unsigned)}\n    }}" for row in nested)
        return f"{declaration} = {{\n{rows}\n}};\n"
    return f"{declaration} = {{\n{_lines(nested, unsigned)}\n}};\n"


def _lines(values: np.ndarray, unsigned: bool) -> str:
    texts = [f"0x{value:x}u" if unsigned else number(value) for value in values.tolist()]
    width = max(map(len, texts)) + 2
    columns = max(1, (_COLUMNS - 4) // width)
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    return ",\n".join("    " + ", ".join(row) for row in rows)


def number(value: int) -> str:
    """An int32 constant; the smallest one has no literal in C."""
    return f"(-{2**31 - 1} - 1)" if value == _INT32_MIN else str(value)


def unsigned(value: int) -> str:
    """A uint32 constant."""
    return f"{value}u"


def structure(declaration: str, members: Sequence[str]) -> str:
    """``declaration = {members};`` on one line."""
    return f"{declaration} = {{{', '.join(members)}}};\n"


def defines(prefix: str, values: dict[str, int], notes: dict[str, str] | None = None) -> str:
    """``#define`` lines; negative values in parentheses."""
    lines = []
    for name, value in values.items():
        note = f" /* {notes[name]} */" if notes and name in notes else ""
        lines.append(f"#define {prefix}{name} {value if value >= 0 else f'({value})'}{note}")
    return "\n".join(lines) + "\n"


def header(guard: str, comment: str, includes: Iterable[str], body: str) -> str:
    """A header file with guards, usable from C++."""
    included = "".join(f"#include {name}\n" for name in includes)
    return (
        f"{comment_block(comment)}#ifndef {guard}\n#define {guard}\n\n{included}\n"
        f'#ifdef __cplusplus\nextern "C" {{\n#endif\n\n{body}\n#ifdef __cplusplus\n}}\n#endif\n\n#endif\n'
    )


def source(comment: str, includes: Iterable[str], body: str) -> str:
    """A source file."""
    return comment_block(comment) + "".join(f"#include {name}\n" for name in includes) + "\n" + body


def comment_block(text: str) -> str:
    """A comment above everything else."""
    return "/* " + "\n * ".join(text.splitlines()) + " */\n"
