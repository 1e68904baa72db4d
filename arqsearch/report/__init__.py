"""Reports: pandas frames in; one self-contained HTML page, Markdown with pictures, and CSV files out."""

from __future__ import annotations

from arqsearch.report.content import ReportContent
from arqsearch.report.write import write_report

__all__ = ["ReportContent", "write_report"]
