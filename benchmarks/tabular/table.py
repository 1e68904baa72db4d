"""`Table`: the stored scores of every assignment within a limit, and `TabularEvaluator`, which answers from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost

#: Mean radii are stored in this part of a [0,1] pixel.
RADIUS_UNIT = 1e-5
#: The committed table.
DIGITS5 = Path(__file__).with_name("digits5.npz")
SMOOTHED, INTERVAL = "smoothed_radius", "interval_accuracy"


@dataclass(frozen=True)
class Facts:
    """What a table is about; stored beside the scores.

    :param layers: every layer, all searched.
    :param choices: bits that a layer may take.
    :param bops_limit: every assignment of at most so many bit operations is in the table.
    :param epsilons: L∞ radii of the interval term, in grey levels.
    :param sigma: noise level in [0,1] pixels.
    :param samples: noisy copies of each image.
    :param images: held-out training images that were scored.
    :param reference: radius in units of :data:`RADIUS_UNIT` and proved images at each ε of the W8A8 program.
    :param recipe: recipe and changes that made the network.
    :param weights_hash: of the shared weights that every assignment was scored on.
    :param settings_hash: of data, noise and scoring.
    :param arithmetic_version: of the integer programs.
    :param cpu_seconds: that scoring took.
    """

    layers: tuple[LayerInfo, ...]
    choices: tuple[int, ...]
    bops_limit: int
    epsilons: tuple[int, ...]
    sigma: float
    samples: int
    images: int
    reference: tuple[int, ...]
    recipe: tuple[str, ...]
    weights_hash: str
    settings_hash: str
    arithmetic_version: int
    cpu_seconds: float

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Inverse of :meth:`to_json`."""
        data = json.loads(text)
        layers = tuple(LayerInfo(**_tuples(layer)) for layer in data.pop("layers"))
        return cls(layers=layers, **_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


class Table:
    """Scores of every assignment whose bit operations are within a limit.

    Assignments are numbered as the pairs (weight, activation) of their layers, weights slowest and the first layer
    first: a number in base choices². Scores stand in rising order of that number.

    :param facts: what the table is about.
    :param radius: mean smoothed radius over the images in units of :data:`RADIUS_UNIT`, uint16 (assignments,).
    :param robust: images proved at each ε, uint16 (assignments, ε).
    :raises ArqError: when the numbers of scores and of assignments differ.
    """

    def __init__(self, facts: Facts, radius: NDArray[np.uint16], robust: NDArray[np.uint16]) -> None:
        self.facts, self.radius, self.robust = facts, radius, robust
        if len(radius) != len(self.numbers) or robust.shape != (len(radius), len(facts.epsilons)):
            raise ArqError(
                f"The table holds {len(radius):,} scores for {len(self.numbers):,} assignments within its limit; "
                "it is damaged. `arqsearch bench tabular build` makes it again."
            )

    @classmethod
    def load(cls, path: str | Path = DIGITS5) -> Table:
        """Read a table.

        :raises ArqError: when the file is missing or no table.
        """
        if not Path(path).is_file():
            raise ArqError(f"No table at {path}; `arqsearch bench tabular build --output {path}` makes one.")
        try:
            with np.load(path) as data:
                facts = Facts.from_json(bytes(data["facts"]).decode())
                return cls(facts, data["radius"], np.ascontiguousarray(data["robust"].T))
        except (ValueError, KeyError, TypeError) as error:
            raise ArqError(f"{path} is no table of this version: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the table, compressed; the same table gives the same scores, not the same bytes."""
        facts = np.frombuffer(self.facts.to_json().encode(), np.uint8)
        partial = Path(path).with_suffix(".partial.npz")
        # Neighbours agree in their high bytes; stored column by column they compress better.
        np.savez_compressed(partial, facts=facts, radius=self.radius, robust=np.ascontiguousarray(self.robust.T))
        partial.replace(path)

    def __len__(self) -> int:
        return len(self.radius)

    @cached_property
    def pairs(self) -> tuple[LayerBits, ...]:
        """Every (weight, activation) pair of a layer, in the order of its number."""
        return tuple(LayerBits(w, a) for w, a in product(self.facts.choices, repeat=2))

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The number of every assignment in the table, rising."""
        costs = every_cost("bops", self.facts.layers, self.pairs)
        return np.flatnonzero(costs <= self.facts.bops_limit)

    def number(self, bitwidths: BitWidths) -> int:
        """Number of an assignment, whether it is in the table or not.

        :raises ArqError: when it is not of these layers and choices.
        """
        names = tuple(layer.name for layer in self.facts.layers)
        if bitwidths.names != names:
            raise ArqError(f"The table is about the layers {', '.join(names)}, not {', '.join(bitwidths.names)}.")
        number = 0
        for name, bits in bitwidths:
            if bits not in self.pairs:
                raise ArqError(f"Layer {name!r} has bits {tuple(bits)}; the table knows {list(self.facts.choices)}.")
            number = number * len(self.pairs) + self.pairs.index(bits)
        return number

    def bitwidths(self, number: int) -> BitWidths:
        """The assignment of a number."""
        found = []
        for layer in reversed(self.facts.layers):
            number, pair = divmod(int(number), len(self.pairs))
            found.append((layer.name, self.pairs[pair]))
        return BitWidths.from_mapping(found[::-1])

    def costs(self, name: str) -> NDArray[np.int64]:
        """A cost of every assignment in the table.

        :param name: an additive cost, ``bops`` or ``weight_bytes``.
        """
        return every_cost(name, self.facts.layers, self.pairs)[self.numbers]

    def terms(self) -> dict[str, NDArray[np.float64]]:
        """Each term of every assignment: the mean radius, and the share of proved images at the largest ε."""
        radius: NDArray[np.float64] = self.radius.astype(np.float64) * RADIUS_UNIT
        proved: NDArray[np.float64] = self.robust[:, -1].astype(np.float64) / self.facts.images
        return {SMOOTHED: radius, INTERVAL: proved}

    @property
    def reference(self) -> dict[str, float]:
        """The terms of the W8A8 program."""
        return {
            SMOOTHED: self.facts.reference[0] * RADIUS_UNIT,
            INTERVAL: self.facts.reference[-1] / self.facts.images,
        }


def every_cost(name: str, layers: Sequence[LayerInfo], pairs: Sequence[LayerBits]) -> NDArray[np.int64]:
    """A cost of every assignment, by number: int64 (pairs^layers,).

    :param name: an additive cost.
    """
    costs = np.zeros(1, np.int64)
    for layer in layers:
        own = [total_cost(name, [layer], BitWidths(((layer.name, pair),))) for pair in pairs]
        costs = (costs[:, None] + np.array(own, np.int64)).ravel()
    return costs


@cache
def shared_table(path: Path = DIGITS5) -> Table:
    """The table, read once in a process."""
    return Table.load(path)


@dataclass
class TabularEvaluator:
    """The `Evaluator` protocol answered from a table.

    :param table: the scores.
    :param weights: weight of each term in the reward.
    :raises ArqError: for a term that the table does not have.
    """

    table: Table
    weights: Mapping[str, float] = field(default_factory=lambda: {SMOOTHED: 1.0, INTERVAL: 0.5})

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in self.table.reference:
                raise ArqError(f"The table has no term {name!r}; it has {', '.join(self.table.reference)}.")

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self.table.facts.layers

    @cached_property
    def rewards(self) -> NDArray[np.float64]:
        """Reward of every assignment in the table."""
        terms, reference = self.table.terms(), self.table.reference
        # One sum in one order, so that a looked-up reward and the optimum are the same float.
        total = np.zeros(len(self.table))
        for name, weight in self.weights.items():
            total += weight * (terms[name] - reference[name])
        return total

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Look one assignment up.

        :raises ArqError: when it is not in the table.
        """
        number = self.table.number(bitwidths)
        position = int(np.searchsorted(self.table.numbers, number))
        if position == len(self.table) or self.table.numbers[position] != number:
            limit = self.table.facts.bops_limit
            raise ArqError(f"These bit-widths exceed the {limit:,} bit operations up to which the table was made.")
        return self.at(position)

    def at(self, position: int) -> Evaluation:
        """The evaluation at a position of the table."""
        terms: dict[str, Any] = {name: float(values[position]) for name, values in self._terms.items()}
        bitwidths = self.table.bitwidths(int(self.table.numbers[position]))
        return Evaluation(bitwidths, float(self.rewards[position]), terms)

    @cached_property
    def _terms(self) -> dict[str, NDArray[np.float64]]:
        return self.table.terms()

    def within(self, budget: Budget) -> NDArray[np.int64]:
        """Positions of the assignments that meet every limit, rising.

        :raises ArqError: when the table does not reach as far as the budget.
        """
        bops = dict(budget.limits).get("bops")
        if bops is None or bops > self.table.facts.bops_limit:
            raise ArqError(f"The table reaches up to bops = {self.table.facts.bops_limit:,}; limit bops to that.")
        met = np.ones(len(self.table), dtype=bool)
        for name, limit in budget.limits:
            met &= self.table.costs(name) <= limit
        return np.flatnonzero(met)

    def optimum(self, budget: Budget) -> Evaluation:
        """The assignment with the largest reward within a budget, the first of several.

        :raises ArqError: when none meets it, or the table does not reach as far.
        """
        positions = self.within(budget)
        if not len(positions):
            raise ArqError(f"No assignment of the table meets {dict(budget.limits)}.")
        return self.at(int(positions[self.rewards[positions].argmax()]))
