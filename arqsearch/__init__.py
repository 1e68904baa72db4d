"""arqsearch: mixed-precision quantization search that certifies exactly the integer network it ships.

Importing the package is instant: PyTorch, pandas and ONNX are loaded by the modules that need them. The
names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arqsearch.errors import ArqError
    from arqsearch.integer.program import IntegerProgram
    from arqsearch.quantize.bitwidths import BitWidths

__version__ = "0.1.0"

__all__ = ["ArqError", "BitWidths", "IntegerProgram", "__version__"]

_HOME_OF = {
    "ArqError": "arqsearch.errors",
    "BitWidths": "arqsearch.quantize.bitwidths",
    "IntegerProgram": "arqsearch.integer.program",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'arqsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
