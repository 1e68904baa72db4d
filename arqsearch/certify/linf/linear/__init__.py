"""Linear bounds of the integer program by backward substitution, sound for its integers and in floating point."""

from __future__ import annotations

from arqsearch.certify.linf.linear.bounder import LinearBounds

__all__ = ["LinearBounds"]
