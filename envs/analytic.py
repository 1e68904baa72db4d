"""The embedded task: a synthetic network whose score is a closed formula, so that ids work without arguments.

It stands for no trained network. It has what a real search has (layers of unequal cost and unequal sensitivity,
diminishing returns per bit, shared budgets) and answers in microseconds: for tests, tutorials and agent checks.
"""

from __future__ import annotations

from collections.abc import Sequence

from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import MAX_BITS, BitWidths
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost

#: Six layers of a small image classifier, with a depthwise one.
EMBEDDED_LAYERS: tuple[LayerInfo, ...] = (
    LayerInfo("conv1", "conv", 3, 8, 3, 3, 1, 1, (16, 16), (16, 16)),
    LayerInfo("conv2", "conv", 8, 16, 3, 3, 2, 1, (16, 16), (8, 8)),
    LayerInfo("conv3.depthwise", "conv", 16, 16, 3, 3, 1, 16, (8, 8), (8, 8)),
    LayerInfo("conv3.pointwise", "conv", 16, 32, 1, 1, 1, 1, (8, 8), (8, 8)),
    LayerInfo("conv4", "conv", 32, 32, 3, 3, 2, 1, (8, 8), (4, 4)),
    LayerInfo("fc", "linear", 32, 10),
)
#: (weights, activations): the α and β of `AnalyticEvaluator`; their order is not that of the costs.
EMBEDDED_SENSITIVITIES: tuple[tuple[float, float], ...] = (
    (0.9, 0.3),
    (0.2, 0.6),
    (0.8, 0.9),
    (0.3, 0.2),
    (0.1, 0.4),
    (0.7, 0.1),
)


class AnalyticEvaluator:
    """Score = product over layers of 1 − (α·4^(1−w) + β·4^(1−a)) / 2, minus the same at 8/8.

    w and a are the layer's weight and activation bits, α and β its sensitivities; 4^−b is how the
    mean squared error of uniform quantization falls with the bits. The reward lies in (−1, 0], 0 at 8/8 everywhere.

    :param layers: the layers.
    :param sensitivities: (α, β) of each layer, each in [0, 1].
    :raises ArqError: when the two lengths differ or a sensitivity lies outside [0, 1].
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo] = EMBEDDED_LAYERS,
        sensitivities: Sequence[tuple[float, float]] = EMBEDDED_SENSITIVITIES,
    ) -> None:
        if len(layers) != len(sensitivities):
            raise ArqError(f"{len(sensitivities)} sensitivities for {len(layers)} layers; give one pair a layer.")
        if not all(0 <= value <= 1 for pair in sensitivities for value in pair):
            raise ArqError(f"Sensitivities {list(sensitivities)} must lie in [0, 1].")
        self._layers = tuple(layers)
        self._sensitivities = tuple(sensitivities)
        self._reference = self._quality(BitWidths.uniform([layer.name for layer in layers], MAX_BITS, MAX_BITS))

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer in execution order."""
        return self._layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one candidate.

        :param bitwidths: bits of every layer.
        """
        quality = self._quality(bitwidths)
        return Evaluation(bitwidths, quality - self._reference, {"quality": quality})

    def _quality(self, bitwidths: BitWidths) -> float:
        quality = 1.0
        for layer, (alpha, beta) in zip(self._layers, self._sensitivities, strict=True):
            bits = bitwidths[layer.name]
            quality *= 1 - (alpha * 4.0 ** (1 - bits.weight) + beta * 4.0 ** (1 - bits.activation)) / 2
        return quality


def embedded_budget() -> Budget:
    """BOPs and weight bytes of 4/4 everywhere in the embedded network, plus 2 %."""
    four = BitWidths.uniform([layer.name for layer in EMBEDDED_LAYERS], 4, 4)
    return Budget(tuple((n, total_cost(n, EMBEDDED_LAYERS, four) * 102 // 100) for n in ("bops", "weight_bytes")))
