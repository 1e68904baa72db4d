"""The trade-off between objectives: values, the non-dominated evaluations, hypervolume."""

from __future__ import annotations

from collections.abc import Sequence

from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.cost import COSTS, LayerInfo, known_costs, total_cost

REWARD = "reward"


def is_cost(objective: str) -> bool:
    """Whether an objective is a cost, which is to be small; reward and terms are to be large.

    :param objective: its name.
    """
    return objective in COSTS


def objective_values(
    evaluation: Evaluation, objectives: Sequence[str], layers: Sequence[LayerInfo]
) -> tuple[float, ...]:
    """Value of each objective in its own unit.

    :param evaluation: a scored candidate.
    :param objectives: ``"reward"``, names of costs, names of the evaluation's terms.
    :param layers: every conv and linear layer.
    :raises ArqError: for an objective that is none of these.
    """
    return tuple(_value(evaluation, objective, layers) for objective in objectives)


def _value(evaluation: Evaluation, objective: str, layers: Sequence[LayerInfo]) -> float:
    if objective == REWARD:
        return float(evaluation.reward)
    if objective in known_costs(layers):
        return float(total_cost(objective, layers, evaluation.bitwidths))
    if objective in evaluation.terms:
        return float(evaluation.terms[objective])
    choices = (REWARD, *known_costs(layers), *evaluation.terms)
    raise ArqError(f"No objective named {objective!r} in this search. {nearest(objective, choices)}")


def losses(evaluation: Evaluation, objectives: Sequence[str], layers: Sequence[LayerInfo]) -> tuple[float, ...]:
    """:func:`objective_values` with the sign that makes every objective small: costs as they are, the others negated.

    :param evaluation: a scored candidate.
    :param objectives: names.
    :param layers: every conv and linear layer.
    """
    values = objective_values(evaluation, objectives, layers)
    return tuple(v if is_cost(name) else -v for name, v in zip(objectives, values, strict=True))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether point a is nowhere larger than b and somewhere smaller.

    :param a: losses.
    :param b: losses.
    """
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(
    history: Sequence[Evaluation], objectives: Sequence[str], layers: Sequence[LayerInfo]
) -> tuple[Evaluation, ...]:
    """The evaluations that no other one dominates, from the smallest loss of the first objective on.

    Of several with equal values only the first is kept.

    :param history: evaluations in order.
    :param objectives: names, at least one.
    :param layers: every conv and linear layer.
    :raises ArqError: when no objective is given, or one is unknown.
    """
    if not objectives:
        raise ArqError("A front needs at least one objective, for example ('bops', 'reward').")
    first: dict[tuple[float, ...], Evaluation] = {}
    for evaluation in history:
        first.setdefault(losses(evaluation, objectives, layers), evaluation)
    kept = [point for point in first if not any(dominates(other, point) for other in first)]
    return tuple(first[point] for point in sorted(kept))


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that is dominated by `points` and dominates the reference point, all losses.

    Exact, by slicing along the last objective; meant for fronts of hundreds of points and two or three objectives.

    :param points: losses of any points; those that do not dominate the reference count nothing.
    :param reference: losses of the reference point.
    """
    inside = [tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0]) - min(p[0] for p in inside)
    volume = 0.0
    levels = sorted({p[-1] for p in inside})
    for level, following in zip(levels, [*levels[1:], float(reference[-1])], strict=True):
        layer = [p[:-1] for p in inside if p[-1] <= level]
        volume += (following - level) * hypervolume(layer, reference[:-1])
    return volume
