"""The report that compares searchers: pandas frames in; one interactive, self-contained page, Markdown and CSV out."""

from __future__ import annotations

from arqsearch.report.policies.content import ComparisonContent
from arqsearch.report.policies.write import write_comparison

__all__ = ["ComparisonContent", "write_comparison"]
