"""The smallest run that has every part: digits, three layers, six evaluations, four certified images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from arqsearch.recipe import Recipe, parse_recipe

EVALUATIONS, IMAGES = 6, 4
NETWORKS = ("uniform", "random", "found")


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """The recipe of a tiny run in `folder`, with some sections replaced."""
    objective = {"smoothing": "gaussian"}
    short = {"epochs": 1, "batch_size": 64, "lr": 0.01, "freeze_batch_norm": 0.0, "objective": objective}
    data: dict[str, Any] = {
        "name": "tiny",
        "run": str(folder),
        "workers": 1,
        "model": {"name": "cnn_tiny"},
        "train": {"epochs": 2, "batch_size": 64, "objective": objective},
        "evaluate": {
            "training": short,
            "smoothed": {"images": 40, "samples": 8},
            "interval": {"weight": 0.5, "measure": "margin", "images": 40},
        },
        "search": {"evaluations": EVALUATIONS, "budget": {"bops": "3%"}},
        "finetune": short,
        "certify": {"images": IMAGES, "n0": 20, "n": 200, "interval_images": 20, "clean_images": 100},
    }
    return parse_recipe(data | changes)


def changed_program(program: IntegerProgram) -> IntegerProgram:
    """The program with one bias of its last layer changed: another program, with another hash."""
    last = program.ops[-1]
    assert isinstance(last, O.Linear)
    bias = last.bias.copy()
    bias[0] += 1
    return replace(program, ops=(*program.ops[:-1], replace(last, bias=bias)))
