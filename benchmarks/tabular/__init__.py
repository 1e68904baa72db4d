"""The tabular benchmark: every assignment of a small network scored once, so that policies are compared in seconds."""

from __future__ import annotations

from arqsearch.benchmarks.tabular.table import Table, TabularEvaluator
from arqsearch.benchmarks.tabular.tasks import TASKS, TabularTask, task

__all__ = ["TASKS", "Table", "TabularEvaluator", "TabularTask", "task"]
