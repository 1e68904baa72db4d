"""From a recipe to the search problem: layers with their ties and costs, measures, floor and objectives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arqsearch.errors import ArqError
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import known_costs
from arqsearch.quantize.network import QuantizedNet
from arqsearch.recipe import Recipe
from arqsearch.search import terms as reward_terms
from arqsearch.search.evaluator import ProgramEvaluator
from arqsearch.search.require import ESTIMATED, Requirement, RequirementEvaluator, objective_term
from arqsearch.search.require_estimates import Estimator, Measure
from arqsearch.search.workspace import Workspace


def requirement(recipe: Recipe) -> Requirement | None:
    """The floors of a recipe, if it states some."""
    return Requirement.parse(recipe.search.require) if recipe.search.require is not None else None


def usual_radius(recipe: Recipe) -> Measure:
    """What ``certified`` alone means: certified accuracy at r = σ, or at the largest certified radius below it."""
    below = [radius for radius in recipe.certify.radii if 0 < radius <= recipe.sigma]
    return Measure("certified", max(below) if below else recipe.sigma)


def objectives(recipe: Recipe, costs: tuple[str, ...]) -> tuple[str, ...]:
    """The recipe's objectives under the names that the evaluation's terms have.

    :param costs: known costs.
    :raises ArqError: for an unknown one, or fewer than two.
    """
    named = recipe.search.objectives
    if len(named) == 1:
        raise ArqError(f"search.objectives: {named[0]!r} alone has no trade-off; name two, such as [bops, certified].")
    terms = list(reward_terms.weights(recipe.evaluate))
    return tuple(objective_term(name, costs, terms, usual_radius(recipe)) for name in named)


def measures(recipe: Recipe, named: tuple[str, ...]) -> tuple[Measure, ...]:
    """Every measure that a search estimates: those of the floors and of the objectives.

    :param named: as :func:`objectives` gives them.
    """
    floors = requirement(recipe)
    found = [floor.measure for floor in floors.floors] if floors is not None else []
    found += [Measure.parse(name.removeprefix(ESTIMATED)) for name in named if name.startswith(ESTIMATED)]
    return tuple(dict.fromkeys(found))


def check(recipe: Recipe, net: QuantizedNet) -> None:
    """Refuse, before any training, what a search would refuse: constraints, budget, floors, objectives.

    :raises ArqError: saying which key, and what to write.
    """
    space = Workspace(recipe)
    space.feasibility(net)
    named = objectives(recipe, known_costs(space.layer_infos(net)))
    Estimator.of(recipe, measures(recipe, named))


def constrained(space: Workspace, evaluator: ProgramEvaluator) -> RequirementEvaluator:
    """The evaluator as environments and policies see it.

    :param evaluator: scores candidates in full where the recipe states a floor or objectives.
    """
    recipe, net = space.recipe, evaluator.net
    layers = space.layer_infos(net)
    named = objectives(recipe, known_costs(layers))

    def counts(bitwidths: BitWidths) -> Mapping[str, Any]:
        entry = evaluator.record.get(evaluator.key, bitwidths)
        if entry is None:
            evaluator.evaluate(bitwidths)
            entry = evaluator.record.get(evaluator.key, bitwidths)
        assert entry is not None
        return entry.counts

    most = max(recipe.search.bits)
    largest = BitWidths.uniform(net.bitwidths.names, most, most, space.fixed(net))
    estimator = Estimator.of(recipe, measures(recipe, named))
    return RequirementEvaluator(
        evaluator, counts, estimator, layers, requirement(recipe), recipe.search.minimise, largest
    )


def problem(space: Workspace, evaluator: RequirementEvaluator, net: QuantizedNet) -> SearchProblem:
    """What every policy of the run searches."""
    recipe = space.recipe
    named = objectives(recipe, known_costs(evaluator.layers)) or ("reward",)
    return SearchProblem(evaluator, space.budget(net), tuple(recipe.search.bits), space.fixed(net), named)


def needs_full_scores(recipe: Recipe) -> bool:
    """Whether candidates must not be stopped early: estimates need every image."""
    return recipe.search.require is not None or bool(recipe.search.objectives)


def requirement_path(folder: Path) -> Path:
    """Verdict on the floor, in a run folder."""
    return folder / "search" / "requirement.json"


def front_path(folder: Path) -> Path:
    """The trade-off of a run, in a run folder."""
    return folder / "search" / "front.json"
