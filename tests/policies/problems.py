"""Small and middle-sized synthetic problems for the searchers, with an exhaustive answer where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from arqsearch.envs.analytic import AnalyticEvaluator
from arqsearch.envs.evaluator import Evaluation
from arqsearch.policies import SearchProblem
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost


class AdditiveEvaluator:
    """Reward = −Σ over layers of α·4^(2−w) + β·4^(2−a), less γ times the product of the first and last layer's sums.

    :param layers: the layers.
    :param sensitivities: (α, β) of each layer.
    :param coupling: γ.
    """

    def __init__(
        self, layers: Sequence[LayerInfo], sensitivities: Sequence[tuple[float, float]], coupling: float = 0.0
    ) -> None:
        self.layers = tuple(layers)
        self._sensitivities = tuple(sensitivities)
        self._coupling = coupling
        self.calls: list[int] = []

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        losses = [
            alpha * 4.0 ** (2 - bits.weight) + beta * 4.0 ** (2 - bits.activation)
            for (_, bits), (alpha, beta) in zip(bitwidths, self._sensitivities, strict=True)
        ]
        reward = -sum(losses) - self._coupling * losses[0] * losses[-1]
        self.calls.append(1)
        return Evaluation(bitwidths, reward, {"loss": -reward})


class BatchAdditiveEvaluator(AdditiveEvaluator):
    """The same, several at once; remembers the sizes of the batches."""

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        found = [self.evaluate(bitwidths) for bitwidths in candidates]
        self.calls = [*self.calls[: -len(candidates)], len(candidates)]
        return found


def layers(count: int, seed: int = 0) -> tuple[LayerInfo, ...]:
    """Linear layers of different sizes."""
    sizes = np.random.default_rng((seed, 1)).integers(4, 40, size=(count, 2))
    return tuple(LayerInfo(f"layer{i}", "linear", int(c_in), int(c_out)) for i, (c_in, c_out) in enumerate(sizes))


def problem(
    count: int, choices: Sequence[int] = (2, 4, 8), seed: int = 0, coupling: float = 0.0, batch: bool = False
) -> SearchProblem:
    """A problem whose budget is that of 4/4 everywhere, with sensitivities over two orders of magnitude."""
    infos = layers(count, seed)
    scale = np.exp(1.2 * np.random.default_rng((seed, 2)).normal(size=(count, 2)))
    kind = BatchAdditiveEvaluator if batch else AdditiveEvaluator
    evaluator = kind(infos, [(float(a), float(b)) for a, b in scale], coupling)
    four = BitWidths.uniform([layer.name for layer in infos], 4, 4)
    return SearchProblem(evaluator, Budget((("bops", total_cost("bops", infos, four)),)), tuple(choices))


def everything(task: SearchProblem) -> list[BitWidths]:
    """Every assignment within budget."""
    infos = task.evaluator.layers
    pairs = [LayerBits(w, a) for w, a in product(task.choices, repeat=2)]
    names = [layer.name for layer in infos]
    found = (BitWidths.from_mapping(list(zip(names, bits, strict=True))) for bits in product(pairs, repeat=len(infos)))
    return [bitwidths for bitwidths in found if task.budget.met(infos, bitwidths)]


def optimum(task: SearchProblem) -> float:
    """The largest reward within budget."""
    return max(task.evaluator.evaluate(bitwidths).reward for bitwidths in everything(task))


def embedded() -> SearchProblem:
    """The embedded task under its own budget."""
    from arqsearch.envs.analytic import embedded_budget

    return SearchProblem(AnalyticEvaluator(), embedded_budget())
