"""What `arqsearch profile` does: open the recipe's network, measure it, write the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arqsearch.errors import ArqError
from arqsearch.recipe import Recipe
from arqsearch.search.executor import OnProgress, use_threads
from arqsearch.search.profile import measure, summary
from arqsearch.search.workspace import Workspace


def profile(recipe: Recipe, output: Path | None, threads: int, on_progress: OnProgress) -> dict[str, Any]:
    """Measure the latency table of a recipe's network.

    The base weights are used where they are there. Before the base is trained fresh ones stand in for them: the time
    depends on shapes and bits, and hardly on the weights.

    :param output: where the table is written; default: where the recipe looks for it.
    :param threads: see :func:`arqsearch.search.profile.measure`.
    :returns: the file and what it says.
    :raises ArqError: when the native engine is not built.
    """
    use_threads(threads)
    space = Workspace(recipe)
    try:
        base = space.base_weights()
    except ArqError:
        if recipe.model.weights is not None:
            raise
        base = None
    net = space.net(base)
    net.calibrate(space.calibration_pixels())
    net.quantized = True
    ends = {bits for pair in space.fixed(net).values() for bits in pair}
    table = measure(net.eval(), recipe.search.bits, sorted(ends), threads, on_progress, seed=recipe.seed)
    path = output if output is not None else space.latency_path
    table.save(path)
    return {"table": str(path), "weights": "fresh" if base is None else str(base), **summary(table)}
