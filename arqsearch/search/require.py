"""A robustness floor such as ``certified@0.5 >= 40%``, and the evaluator with which any policy minimises cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arqsearch.envs.evaluator import BatchEvaluator, Evaluation, Evaluator
from arqsearch.errors import ArqError, nearest
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo, total_cost
from arqsearch.search.require_estimates import Estimate, Estimator, Measure

_FORM = "write it as 'certified@0.5 >= 40%', 'ibp@1 >= 30%' or 'acr >= 0.4', several joined by 'and'"
#: Prefix of the terms that hold estimates: nothing that a search sees is certified.
ESTIMATED = "estimated "


@dataclass(frozen=True)
class Floor:
    """One condition: a measure and the least value that it must have.

    :param measure: what is measured.
    :param value: a share in [0, 1], or an average radius in [0,1] pixels.
    """

    measure: Measure
    value: float

    @property
    def text(self) -> str:
        """As a recipe writes it."""
        return f"{self.measure.name} >= {self.measure.shown(self.value)}"


@dataclass(frozen=True)
class Requirement:
    """Conditions that must hold together."""

    floors: tuple[Floor, ...]

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read ``certified@R >= 40%``, ``ibp@EPS >= 0.3``, ``acr >= 0.4``, joined by ``and``.

        :raises ArqError: saying which part is not understood.
        """
        floors = []
        for part in re.split(r"\band\b", text):
            match = re.fullmatch(r"\s*([a-z]+(?:@[0-9.]+)?)\s*(>=|≥)\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*", part)
            if not match:
                raise ArqError(f"Requirement {part.strip()!r} is not understood; {_FORM}.")
            measure, value = Measure.parse(match[1]), float(match[3]) / (100 if match[4] else 1)
            if measure.kind == "acr" and match[4]:
                raise ArqError(f"Requirement {part.strip()!r}: acr is a radius in [0,1] pixels, not a share.")
            if measure.kind != "acr" and value > 1:
                raise ArqError(f"Requirement {part.strip()!r}: {value:g} is no share; write 40% or 0.4.")
            floors.append(Floor(measure, value))
        names = [floor.measure.name for floor in floors]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ArqError(f"Requirement {text!r} states {twice[0]} twice; state it once.")
        return cls(tuple(floors))

    def shortfall(self, found: Mapping[str, Estimate]) -> float:
        """Sum over the floors of what the lower confidence bounds lack; 0 when every floor is met by its bound.

        Shares count as they are, radii relative to their floor.
        """
        return sum(max(0.0, -self._margin(floor, found)) for floor in self.floors)

    def margin(self, found: Mapping[str, Estimate]) -> float:
        """Least distance of a lower confidence bound to its floor, negative where it lies below."""
        return min(self._margin(floor, found) for floor in self.floors)

    @staticmethod
    def _margin(floor: Floor, found: Mapping[str, Estimate]) -> float:
        distance = found[floor.measure.name].bound - floor.value
        return distance / max(floor.value, 1e-12) if floor.measure.kind == "acr" else distance


class RequirementEvaluator:
    """Adds estimates to an evaluator's terms and, with a requirement, makes cost the reward.

    Reward with a requirement: −cost share, in [−1, 0), where every floor is met by its lower confidence bound; else
    −1 − shortfall. So every candidate that meets the floors beats every one that does not, among the former the
    cheapest wins, among the latter the nearest. The cost share is the cost over that of the largest assignment.

    :param inner: scores candidates.
    :param counts: integer counts behind a candidate that `inner` has scored.
    :param estimator: from counts to estimates.
    :param layers: every layer with its ties and costs, which environments and policies see.
    :param requirement: the floors; None leaves the reward of `inner`.
    :param minimise: the cost.
    :param largest: the largest assignment.
    """

    def __init__(
        self, inner: Evaluator, counts: Callable[[BitWidths], Mapping[str, Any]], estimator: Estimator,
        layers: Sequence[LayerInfo], requirement: Requirement | None, minimise: str, largest: BitWidths,
    ) -> None:  # fmt: skip
        self.inner, self.counts, self.estimator = inner, counts, estimator
        self.requirement, self.minimise = requirement, minimise
        self._layers = tuple(layers)
        self._full = total_cost(minimise, self._layers, largest) if requirement is not None else 1

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self._layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one assignment."""
        return self.evaluate_many([bitwidths])[0]

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        """Score assignments, together where the evaluator behind takes them together."""
        if isinstance(self.inner, BatchEvaluator):
            found = self.inner.evaluate_many(candidates)
        else:
            found = [self.inner.evaluate(bitwidths) for bitwidths in candidates]
        return [self._extended(evaluation) for evaluation in found]

    def estimates(self, bitwidths: BitWidths) -> dict[str, Estimate]:
        """Estimates of a candidate that was scored, by measure."""
        return self.estimator.estimates(self.counts(bitwidths)) if self.estimator.measures else {}

    def _extended(self, evaluation: Evaluation) -> Evaluation:
        if not self.estimator.measures:
            return evaluation
        found, reward = self.estimates(evaluation.bitwidths), evaluation.reward
        if self.requirement is not None:
            shortfall = self.requirement.shortfall(found)
            share = total_cost(self.minimise, self._layers, evaluation.bitwidths) / self._full
            reward = -share if shortfall == 0 else -1.0 - shortfall
        terms = evaluation.terms | {ESTIMATED + name: estimate.value for name, estimate in found.items()}
        return replace(evaluation, reward=reward, terms=terms)


def objective_term(name: str, costs: Sequence[str], terms: Sequence[str], certified: Measure) -> str:
    """What a recipe's objective is called in a search problem.

    :param name: a cost, ``reward``, a term, a measure, or ``certified`` for the usual radius.
    :param costs: known costs.
    :param terms: names of the reward's terms.
    :param certified: what ``certified`` alone stands for.
    :raises ArqError: naming the nearest valid objective.
    """
    if name in {*costs, "reward", *terms}:
        return name
    if name == "certified":
        return ESTIMATED + certified.name
    if re.fullmatch(r"(certified|ibp)@[0-9.]+|acr", name):
        return ESTIMATED + Measure.parse(name).name
    choices = [*costs, "reward", *terms, "certified", certified.name, "acr"]
    raise ArqError(f"search.objectives: no objective {name!r}. {nearest(name, choices)}")
