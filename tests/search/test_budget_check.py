"""`arqsearch verify` recomputes costs and constraints of every network, and names what does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arqsearch.errors import ArqError
from arqsearch.quantize.cost import total_cost
from arqsearch.recipe import dump_recipe, load_recipe
from arqsearch.search.checks import check_budget
from arqsearch.search.workspace import Workspace
from tests.search.tiny import NETWORKS


def changed(folder: Path, **search: object) -> Workspace:
    """The run with another section `search`, as if it had been searched so."""
    recipe = load_recipe(folder)
    section = type(recipe.search).model_validate(recipe.search.model_dump() | search)
    dump_recipe(recipe.model_copy(update={"search": section}), folder / "recipe.yaml")
    return Workspace(load_recipe(folder))


def test_what_was_searched_holds(tiny_run: Path) -> None:
    space = Workspace(load_recipe(tiny_run))
    layers, says = check_budget(space, "found", 0)
    assert layers == len(space.bitwidths("found"))
    assert says.startswith("layers within bops <= ") and "(3.000% of FP32)" in says


def test_a_budget_that_is_exceeded_is_named(copied_run: Path) -> None:
    space = Workspace(load_recipe(copied_run))
    layers = space.layer_infos(space.net())
    costs = {name: total_cost("bops", layers, space.bitwidths(name)) for name in NETWORKS}
    dearest = max(NETWORKS, key=lambda name: costs[name])
    with pytest.raises(ArqError, match=r"bops .* exceeds "):
        check_budget(changed(copied_run, budget={"bops": costs[dearest] - 1}), dearest, 0)


def test_constraints_that_are_broken_are_named(copied_run: Path) -> None:
    bits = Workspace(load_recipe(copied_run)).bitwidths("found")
    name = bits.names[1]
    other = [2 if bits[name].weight != 2 else 3, 2]
    with pytest.raises(ArqError, match=f"layer '{name}' has .* frozen at"):
        check_budget(changed(copied_run, freeze={name: other}, budget={"bops": None}), "found", 0)


def test_altered_bit_widths_are_named(copied_run: Path) -> None:
    path = copied_run / "networks" / "found" / "bitwidths.json"
    bits = json.loads(path.read_text())
    name = list(bits)[1]
    bits[name] = [2, 2] if bits[name] != [2, 2] else [2, 3]
    path.write_text(json.dumps(bits))
    with pytest.raises(ArqError, match="other bit-widths than"):
        check_budget(Workspace(load_recipe(copied_run)), "found", 0)
