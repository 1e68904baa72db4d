"""The recipe: one strict schema for files, overrides and the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from arqsearch.errors import ArqError
from arqsearch.recipe import RECIPES, Recipe, dump_recipe, load_recipe, parse_recipe

PACKAGED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


# ---- unknown keys and wrong values ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("sigm", "sigma"),
        ("serach", "search"),
        ("data.holdot", "holdout"),
        ("train.objective.epsillon", "epsilon"),
        ("search.budget.bop", "bops"),
        ("evaluate.smoothed.sample", "samples"),
        ("evaluate.training.objective.intervall", "interval"),
        ("certify.clean_image", "clean_images"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(path: str, nearest: str) -> None:
    data: dict[str, Any] = {}
    target = data
    *sections, key = path.split(".")
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = 1
    with pytest.raises(ArqError) as error:
        parse_recipe(data, "my.yaml")
    assert f"my.yaml:\n  {path}: unknown key. Did you mean {nearest!r}?" in str(error.value)


def test_every_problem_is_listed_at_once() -> None:
    data = {"sigma": -1, "search": {"evaluations": 0, "bits": [1]}, "quantize": {"rounding": "up"}, "nam": "x"}
    with pytest.raises(ArqError) as error:
        parse_recipe(data)
    for part in ("sigma: ", "search.evaluations: ", "search.bits.0: ", "quantize.rounding: ", "nam: unknown key"):
        assert f"\n  {part}" in str(error.value)
    assert "given: -1" in str(error.value) and "'half_up'" in str(error.value)


@pytest.mark.parametrize(
    ("override", "valid"),
    [
        ("certify.alpha=0.001", True), ("certify.alpha=0.499", True), ("certify.alpha=0", False),
        ("certify.alpha=0.5", False), ("certify.alpha=-0.1", False), ("certify.alpha=1", False),
        ("sigma=0", False), ("search.bits=[]", False), ("search.bits=[2,9]", False), ("search.bits=[2,8]", True),
        ("search.first_last=null", True), ("search.first_last=[8]", False), ("search.first_last=[4,6]", True),
        ("train.objective.interval=1.5", False), ("train.objective.ramp=0", False), ("workers=0", False),
        ("evaluate.interval.epsilons=[0]", False), ("export.formats=[onx]", False), ("quantize.multiplier=31", False),
        ("quantize.multiplier='31'", True),
    ],
)  # fmt: skip
def test_ranges(override: str, valid: bool) -> None:
    if valid:
        load_recipe("digits", [override])
        return
    with pytest.raises(ArqError, match=override.partition("=")[0]):
        load_recipe("digits", [override])


def test_a_recipe_cannot_be_changed_afterwards() -> None:
    recipe = parse_recipe({})
    with pytest.raises(ValueError, match="frozen"):
        recipe.sigma = 0.5  # type: ignore[misc]


# ---- overrides --------------------------------------------------------------------------------


def test_overrides_are_yaml_values_at_dotted_keys() -> None:
    recipe = load_recipe(
        "digits",
        ["search.evaluations=7", "sigma=0.5", "search.first_last=[4, 6]", "search.budget.bops=null",
         "search.options.learning_rate=1.0e-4", "model.options={width: 8}", "name=2024-a", "data.path=a=b",
         "evaluate.allow_constant_term=true", "train.lr=1e-3"],
    )  # fmt: skip
    assert recipe.search.evaluations == 7 and recipe.sigma == 0.5 and recipe.search.first_last == [4, 6]
    assert recipe.search.budget.bops is None and recipe.search.options == {"learning_rate": 1e-4}
    assert recipe.model.options == {"width": 8} and recipe.name == "2024-a" and recipe.data.path == "a=b"
    assert recipe.evaluate.allow_constant_term is True and recipe.train.lr == 0.001
    untouched = load_recipe("digits")
    assert recipe.search.compare == untouched.search.compare and recipe.train.epochs == untouched.train.epochs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.evaluations", r"write section\.key=value"),
        ("=5", r"write section\.key=value"),
        ("sigma.x=5", "'sigma' is a value, not a section"),
        ("search.evaluatons=5", r"search\.evaluatons: unknown key\. Did you mean 'evaluations'"),
        ("search.bits=[2, 3", "not valid YAML"),
    ],
)
def test_overrides_that_are_not_understood(override: str, message: str) -> None:
    with pytest.raises(ArqError, match=message):
        load_recipe("digits", [override])


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_load_and_name_what_exists(name: str) -> None:
    from arqsearch import models
    from arqsearch.policies import registry

    recipe = load_recipe(name)
    assert recipe.name == name and recipe == load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.model.name in models.available()
    assert {recipe.search.policy, *recipe.search.compare} <= set(registry.available())
    # What a packaged recipe writes is all there is to know: every section that it names is one.
    assert set(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())) <= set(Recipe.model_fields)


def test_what_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="packaged recipes: " + ", ".join(PACKAGED)):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ArqError, match="holds a list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ArqError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("# only a comment\n")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


@pytest.mark.parametrize("name", PACKAGED)
def test_dump_and_load_give_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["search.budget.weight_bytes=80k", "model.options={width: 4}"])
    dump_recipe(recipe, tmp_path / "new" / "copy.yaml")
    assert load_recipe(tmp_path / "new" / "copy.yaml") == recipe


def test_a_run_folder_is_a_recipe_where_it_lies_now(tmp_path: Path) -> None:
    dump_recipe(load_recipe("digits", ["run=elsewhere"]), tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path).run_dir == tmp_path
    assert parse_recipe({"name": "x"}).run_dir == Path("runs/x")


# ---- the JSON Schema --------------------------------------------------------------------------


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def schema_keys(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, entry in node.get("properties", {}).items():
        yield prefix + name
        reference = entry.get("$ref") or next((part["$ref"] for part in entry.get("allOf", [])), None)
        if reference:
            yield from schema_keys(schema, schema["$defs"][reference.rsplit("/", 1)[1]], f"{prefix}{name}.")


def test_the_schema_covers_every_key_and_allows_no_other() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    expected = sorted(keys(Recipe))
    assert sorted(schema_keys(schema, schema)) == expected
    assert "evaluate.training.objective.epsilon" in expected
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False


def test_every_default_is_valid() -> None:
    assert parse_recipe(Recipe().model_dump(mode="json")) == Recipe()
