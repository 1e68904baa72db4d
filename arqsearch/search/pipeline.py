"""What each command runs, in order; every stage skips what is done and continues what was interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from arqsearch.errors import ArqError
from arqsearch.quantize.ranks import Ranks
from arqsearch.recipe import Recipe
from arqsearch.search import certification, delivery, reporting, require_settle, stages
from arqsearch.search.executor import OnProgress
from arqsearch.search.workspace import Workspace

Outcome = dict[str, Any]
#: Columns of the final table that the command prints, with short headings; radii and ε follow.
SHOWN = {"name": "network", "kind": "kind", "clean_accuracy": "clean", "acr": "ACR", "acr_bound": "ACR ≥",
         "bops_percent": "BOPs %", "weight_bytes": "bytes"}  # fmt: skip


@contextmanager
def timed(recipe: Recipe, stage: str) -> Iterator[None]:
    """Add the stage's wall time to timings.json; a resumed stage adds up."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if Ranks.current().first:
            path = recipe.run_dir / "timings.json"
            seconds = json.loads(path.read_text()) if path.is_file() else {}
            stages.write_json(path, {**seconds, stage: seconds.get(stage, 0.0) + time.perf_counter() - start})


def train(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Base network."""
    _begin(recipe)
    with timed(recipe, "train"):
        stages.train_base(recipe, on_progress)
    return {"run": str(recipe.run_dir), "base": str(Workspace(recipe).base_weights())}


def train_shared(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Base network, if missing, and the weights that score candidates."""
    outcome = train(recipe, on_progress)
    with timed(recipe, "weights for scoring"):
        stages.prepare_weights(recipe, on_progress)
    return {**outcome, "shared": str(Workspace(recipe).shared_path)}


def finetune(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Fine-tuned networks and their integer programs, after a search."""
    _begin(recipe)
    with timed(recipe, "fine-tune"):
        found = stages.finetune(recipe, on_progress)
    return {"run": str(recipe.run_dir), "networks": found}


#: What ``arqsearch train`` can train; each also under ``torchrun``.
TRAININGS: dict[str, Callable[[Recipe, OnProgress], Outcome]] = {
    "base": train, "shared": train_shared, "finetune": finetune,
}  # fmt: skip


def _alone(command: str) -> None:
    """Refuse ``torchrun``, whose processes would all write the same files.

    :raises ArqError: naming what to run instead.
    """
    if Ranks.described().size > 1:
        raise ArqError(
            f"`arqsearch {command}` runs as one process. Use torchrun for `arqsearch train --what "
            f"{'|'.join(TRAININGS)}`, then run `arqsearch {command}` without it; it continues from those results."
        )


def _begin(recipe: Recipe) -> None:
    """Store the recipe in the run folder; of several ``torchrun`` processes the first one does."""
    ranks = Ranks.current()
    if ranks.first:
        Workspace(recipe).save_recipe()
    ranks.wait()


def search(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Base network, if missing, and bit-widths."""
    _alone("search")
    stages.check_search(recipe)
    train_shared(recipe, on_progress)
    with timed(recipe, "search"):
        chosen = stages.search(recipe, on_progress)
    return {"run": str(recipe.run_dir), "bitwidths": {name: bits.to_json() for name, bits in chosen.items()}}


def certify(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Fine-tuned networks, integer programs and certificates."""
    _alone("certify")
    require_settle.resume(recipe)
    while True:
        finetune(recipe, on_progress)
        with timed(recipe, "certify"):
            rows = certification.certify(recipe, on_progress)
        if not require_settle.settle(recipe):  # Else the next candidate under a floor.
            break
    shown = [{_heading(key): value for key, value in row.items() if _heading(key)} for row in rows]
    outcome: Outcome = {"run": str(recipe.run_dir), "networks": shown}
    if recipe.search.require is not None:
        outcome["requirement"] = require_settle.read_state(Workspace(recipe))["statement"]
    return outcome


def _heading(key: str) -> str:
    """Short heading of a column of the final table; empty for one that is not shown."""
    if key.endswith(("_low", "_high")):
        return ""
    for prefix, short in (("certified@", "r≥"), ("undecided@", "open r="), ("ibp@", "ε≤")):
        if key.startswith(prefix):
            return short + key.removeprefix(prefix)
    return SHOWN.get(key, "")


def report(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """The report of whatever the run folder holds."""
    _alone("report")
    return {"report": str(reporting.write(Workspace(recipe)))}


def run(recipe: Recipe, on_progress: OnProgress) -> Outcome:
    """Everything."""
    _alone("run")
    search(recipe, on_progress)
    outcome = certify(recipe, on_progress)
    delivery.export(recipe, stages.FOUND, list(recipe.export.formats))
    checked = delivery.verify(str(recipe.run_dir), images=1)
    return {**outcome, "verified": checked["verified"], **report(recipe, on_progress)}


STAGES: dict[str, Callable[[Recipe, OnProgress], Outcome]] = {
    **TRAININGS, "search": search, "certify": certify, "report": report, "run": run,
}  # fmt: skip
